"""Cosmos 1, 2 and 2.5 and its ControlNet, patched."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import CosmosControlNetModel, CosmosTransformer3DModel
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available
from diffusers_contract import FamilyContract, Inputs, Reads, Variant, check_close, given, made, outputs, results
from test_diffusers_ltx import padding

from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "num_layers": 2,
    "mlp_ratio": 1.0,
    "text_embed_dim": 32,
    "adaln_lora_dim": 16,
    "max_size": (8, 16, 16),
    "extra_pos_embed_type": None,
}
IMAGE = {
    "img_context_dim_in": 24,
    "img_context_dim_out": 256,
    "controlnet_block_every_n": 1,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 32,
    "encoder_hidden_states_channels": 32,
}
SIZES = ((2, 3, 8, 8), (3, 2, 8, 12), (5, 5, 12, 4))
TEXT = (512, 500, 480)


@pytest.fixture(autouse=True)
def _resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of padded pixels are resized by torchvision, which may be missing."""
    if not is_torchvision_available():
        resize = SimpleNamespace(resize=lambda x, size, interpolation: torch.nn.functional.interpolate(x, size, mode="nearest"))
        stand_in = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
        for module in (controlnet_cosmos, transformer_cosmos):
            monkeypatch.setattr(module, "transforms", stand_in, raising=False)


def inputs(size: int, per_frame: bool = False, image: bool = False, masked: str = "", samples: int = 0) -> Inputs:
    b, t, h, w = SIZES[size]
    b = samples or b
    made = {
        "hidden_states": torch.randn(b, 4, t, h, w),
        "timestep": torch.rand(b, 1, t, 1, 1) if per_frame else torch.rand(b),
        "encoder_hidden_states": torch.randn(b, TEXT[size], 32),
        "padding_mask": torch.ones(1, 1, h * 8, w * 8),
        "fps": 16,
    }
    if image:
        made["encoder_hidden_states"] = made["encoder_hidden_states"], torch.randn(b, 256, 24)
        made["block_controlnet_hidden_states"] = [torch.randn(b, t * h * w // 4, 256) for _ in range(2)]
    if masked:
        made["attention_mask"] = padding(b, TEXT[size]).bool()
    if masked == "bias":
        made["attention_mask"] = torch.randn(b, TEXT[size])
    return made


class _KeptInFloat32(transformer_cosmos.CosmosLearnablePositionalEmbed):
    """As `from_pretrained` keeps it; in float64 it cannot be computed."""

    def _apply(self, fn, recurse=True):
        return self


def build_kept(kind: type, **config) -> torch.nn.Module:
    model = kind(**config)
    if model.learnable_pos_embed is not None:
        model.learnable_pos_embed.__class__ = _KeptInFloat32
    return model


def build(**changes):
    return partial(build_kept, CosmosTransformer3DModel, **(CONFIG | changes))


VARIANTS = {
    "2_video2world": Variant(build(), partial(inputs, per_frame=True)),
    "2_text2image": Variant(build(), inputs),
    "1_learnable": Variant(build(extra_pos_embed_type="learnable"), inputs),
    "2.5_image": Variant(build(**IMAGE), partial(inputs, per_frame=True, image=True)),
    "masked": Variant(build(), partial(inputs, masked="keys", samples=4)),
    "bias": Variant(build(), partial(inputs, masked="bias", samples=4)),
}


class TestCosmos(FamilyContract):
    pass


def control(size: int) -> Inputs:
    made = inputs(size, per_frame=True)
    b, _, t, h, w = made.pop("hidden_states").shape
    made["encoder_hidden_states"] = made["encoder_hidden_states"], torch.randn(b, 256, 24)
    latents = {name: torch.randn(b, 4, t, h, w) for name in ("controls_latents", "latents")}
    return made | latents | {"condition_mask": torch.randn(b, 1, t, h, w)}


CONTROL = Variant(
    partial(
        build_kept,
        CosmosControlNetModel,
        n_controlnet_blocks=2,
        in_channels=8,
        latent_channels=6,
        model_channels=256,
        num_attention_heads=2,
        mlp_ratio=1.0,
        text_embed_dim=32,
        adaln_lora_dim=16,
        max_size=(8, 16, 16),
        extra_pos_embed_type="learnable",
        img_context_dim_in=24,
        img_context_dim_out=256,
    ),
    control,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_controlnet(dtype: torch.dtype) -> None:
    """What the contract asks of models that take adapters."""
    model = made(CONTROL)
    exact = results(copy.deepcopy(model).double(), given(CONTROL, torch.float64))
    model, inputs = model.to(dtype), given(CONTROL, dtype)
    plain = results(model, inputs)
    apply(model)
    with Reads() as reads:
        outputs(model, inputs)
    assert reads.count == 0
    check_close(results(model, inputs), plain, exact, dtype)


@pytest.mark.parametrize("watched", ["transformer_blocks.1.norm2", "transformer_blocks.0.norm1.norm", "norm_out.norm"])
def test_watched_norms(watched: str) -> None:
    """A hook sees what it saw, and so do forwards of diffusers' beside ours: embeddings per token."""
    variant = VARIANTS["2_video2world"]
    model, inputs = made(variant).eval(), given(variant)
    seen = []
    model.get_submodule(watched).register_forward_hook(lambda _module, args, _output: seen.append(args[0].detach()))
    with torch.no_grad():
        want = outputs(model, inputs)
        apply(model)
        got = outputs(model, inputs)
    assert len(seen) == 2
    torch.testing.assert_close([*got, seen[1]], [*want, seen[0]], rtol=1e-4, atol=1e-5)


def test_one_noise_level_for_all_samples() -> None:
    variant = VARIANTS["2_text2image"]
    model, inputs = made(variant).eval(), given(variant) | {"timestep": torch.tensor([0.5])}
    with torch.no_grad():
        want = outputs(model, inputs)
        apply(model)
        torch.testing.assert_close(outputs(model, inputs), want, rtol=1e-4, atol=1e-5)


def test_rows_are_of_frames() -> None:
    """diffusers computes modulation for each token. It has as many values as there are frames."""
    variant = VARIANTS["2_video2world"]
    model, inputs = made(variant).eval(), given(variant)
    apply(model)
    shapes = []
    model.transformer_blocks[0].norm1.linear_2.register_forward_hook(lambda _module, _args, output: shapes.append(output.shape))
    with torch.no_grad():
        outputs(model, inputs)
    b, t, *_ = SIZES[0]
    assert shapes == [(b * t, 3 * 256)]
