"""HunyuanVideo, its image variants and FramePack, patched."""

from functools import partial

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel, HunyuanVideoTransformer3DModel
from diffusers_contract import FamilyContract, Inputs, Variant, given, made
from torch import Tensor

from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "mlp_ratio": 1.0,
    "guidance_embeds": False,
    "text_embed_dim": 32,
    "pooled_projection_dim": 16,
}
SIZES = ((2, 3, 8, 8), (3, 2, 8, 12), (5, 5, 12, 4))


def inputs(size: int, guidance: bool = False, text: int = 256) -> Inputs:
    b, *grid = SIZES[size]
    text -= 10 * size
    lengths = torch.randint(1, text, (b,))
    made = {
        "hidden_states": torch.randn(b, 4, *grid),
        "timestep": torch.randint(0, 1000, (b,)),
        "encoder_hidden_states": torch.randn(b, text, 32),
        "encoder_attention_mask": (torch.arange(text) < lengths[:, None]).long(),
        "pooled_projections": torch.randn(b, 16),
    }
    return made | {"guidance": torch.full((b,), 6000.0)} if guidance else made


def framepack_inputs(size: int, batch: int | None = None) -> Inputs:
    made = inputs(size, text=77)
    b, t, h, w = SIZES[size]
    made |= {
        "image_embeds": torch.randn(b, 9, 24),
        "indices_latents": torch.arange(11, 11 + t),
        "latents_clean": torch.randn(b, 4, 2, h, w),
        "indices_latents_clean": torch.tensor([0, 10]),
        "latents_history_2x": torch.randn(b, 4, 2, h, w),
        "indices_latents_history_2x": torch.arange(8, 10),
        "latents_history_4x": torch.randn(b, 4, 6, h, w),
        "indices_latents_history_4x": torch.arange(2, 8),
    }
    per_sample = {name for name, x in made.items() if "indices" not in name}
    return {name: x[:batch] if name in per_sample else x for name, x in made.items()}


def build(kind: type = HunyuanVideoTransformer3DModel, **changes):
    return partial(kind, **(CONFIG | changes))


FRAMEPACK = build(HunyuanVideoFramepackTransformer3DModel, has_image_proj=True, image_proj_dim=24, has_clean_x_embedder=True)
VARIANTS = {
    "t2v": Variant(build(guidance_embeds=True), partial(inputs, guidance=True)),
    "token_replace": Variant(build(image_condition_type="token_replace"), inputs),
    "no_qk_norm": Variant(build(qk_norm=None), inputs),
    "framepack": Variant(FRAMEPACK, framepack_inputs),
    "framepack_one": Variant(FRAMEPACK, partial(framepack_inputs, batch=1)),
}
PADDED = "t2v", "token_replace", "framepack"


class TestHunyuanVideo(FamilyContract):
    @pytest.mark.parametrize("name", PADDED)
    @pytest.mark.parametrize("where", ["front", "middle", "mixed"])
    def test_padding_anywhere(self, name: str, where: str) -> None:
        """Equals the same prompt with its padding behind it."""
        model, inputs = made(VARIANTS[name]).eval(), given(VARIANTS[name])
        with torch.no_grad():
            want = model(**inputs, return_dict=False)[0]
            apply(model)
            got = model(**padded(inputs, where), return_dict=False)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_long_prompt_with_a_mask_of_two_bytes(self) -> None:
        """As FramePack's pipeline makes it: in bfloat16, which cannot count beyond 256."""
        model, inputs = made(VARIANTS["framepack"]).eval(), given(VARIANTS["framepack"])
        batch = inputs["hidden_states"].shape[0]
        inputs["encoder_hidden_states"] = torch.randn(batch, 310, inputs["encoder_hidden_states"].shape[-1])
        inputs["encoder_attention_mask"] = (torch.arange(310) < 301).expand(batch, -1).long()
        with torch.no_grad():
            want = model(**inputs, return_dict=False)[0]
            apply(model)
            inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].bfloat16()
            got = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", PADDED)
    def test_sample_without_prompt(self, name: str) -> None:
        """diffusers computes NaN of it, by dividing by its length. Otherwise nothing would depend on its text."""
        model, inputs = made(VARIANTS[name]).eval(), given(VARIANTS[name])
        inputs["encoder_attention_mask"][0] = 0
        with torch.no_grad():
            assert model(**inputs, return_dict=False)[0][0].isnan().all()
            apply(model)
            got = model(**inputs, return_dict=False)[0]
            model.context_embedder.forward = lambda text, *_: torch.zeros(*text.shape[:2], 256)
            want = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)


def padded(inputs: Inputs, where: str) -> Inputs:
    """The same prompts with padding in front of them, or in the middle, or anywhere between tokens of another order."""
    text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
    order = torch.stack([placed(row, where) for row in mask.bool()])
    return inputs | {
        "encoder_hidden_states": text.take_along_dim(order[..., None], dim=1),
        "encoder_attention_mask": mask.gather(1, order),
    }


def placed(mask: Tensor, where: str) -> Tensor:
    """An order of tokens, of which those that are kept come first."""
    count, length = int(mask.sum()), len(mask)
    tokens, padding = torch.arange(count), torch.arange(count, length)
    if where == "front":
        return torch.cat([padding, tokens])
    if where == "middle":
        return torch.cat([tokens[: count // 2], padding, tokens[count // 2 :]])
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))
