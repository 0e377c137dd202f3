"""Kandinsky 5, Lite and Pro, patched."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers_contract import FamilyContract, Inputs, Variant, check_close, given, made, outputs, results

from sora_kernels import record
from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "in_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 24,
    "time_dim": 32,
    "out_visual_dim": 4,
    "model_dim": 128,
    "ff_dim": 64,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
}
SIZES = ((2, 3, 10, 12), (3, 5, 12, 14), (5, 2, 14, 18))
TEXT = (256, 224, 200)


def inputs(size: int, channels: int = 4, grid: tuple[int, int, int] | None = None) -> Inputs:
    b, *sizes = SIZES[size]
    t, h, w = grid or sizes
    return {
        "hidden_states": torch.randn(b, t, h, w, channels),
        "encoder_hidden_states": torch.randn(b, TEXT[size], 16),
        "timestep": 1000 * torch.rand(b),
        "pooled_projections": torch.randn(b, 24),
        "visual_rope_pos": [torch.arange(t), torch.arange(h // 2), torch.arange(w // 2)],
        "text_rope_pos": torch.arange(TEXT[size]),
        "scale_factor": (1.0, 2.0, 2.0),
    }


def _as_weight(module: torch.nn.Linear, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].to(module.weight.dtype),)


def build_any_dtype(**config) -> torch.nn.Module:
    """The embedding of time is computed in float32; so that its layers can have other dtypes."""
    model = Kandinsky5Transformer3DModel(**config)
    model.time_embeddings.in_layer.register_forward_pre_hook(_as_weight)
    return model


def build(**changes):
    return partial(build_any_dtype, **(CONFIG | changes))


def variant(model: partial, inputs=inputs, lora: tuple[str, ...] = ("to_query", "to_key", "to_value")) -> Variant:
    """diffusers rounds rotated queries and keys to bfloat16. What is near the middle of two of its numbers falls either way."""
    return Variant(model, inputs, lora, rounds_to=torch.bfloat16)


VARIANTS = {
    "lite": variant(build(), lora=("to_query", "to_key", "to_value", "self_attention.out_layer")),
    "pro": variant(build(model_dim=256, axes_dims=(32, 48, 48))),
    "i2v": variant(build(visual_cond=True), partial(inputs, channels=9), lora=("to_query", "feed_forward.in_layer")),
}


class TestKandinsky5(FamilyContract):
    pass


def test_tables() -> None:
    """Cosines and sines of diffusers' matrices, without their copies for each sample."""
    model, inputs = made(VARIANTS["lite"]), given(VARIANTS["lite"])
    ropes = model.text_rope_embeddings, model.visual_rope_embeddings
    b, t, h, w = SIZES[0]
    args = (inputs["text_rope_pos"],), ((b, t, h // 2, w // 2), inputs["visual_rope_pos"], inputs["scale_factor"])
    want = [rope(*a)[..., 0, :, :, 0] for rope, a in zip(ropes, args, strict=True)]  # [..., d/2, (cos, sin)]
    apply(model)
    text, visual = (rope(*a).transpose(-1, -2) for rope, a in zip(ropes, args, strict=True))
    assert visual.shape == (1, *want[1].shape[1:])
    torch.testing.assert_close([text, visual.expand_as(want[1])], want, rtol=0, atol=1e-6)


def test_blocks_in_float32() -> None:
    """Without rotation nothing is rounded."""
    model = made(VARIANTS["pro"]).eval()
    x, text, time = torch.randn(2, 100, 256), torch.randn(2, 30, 256), torch.randn(2, 32)
    want = model.text_transformer_blocks[0](text, time, None), model.visual_transformer_blocks[0](x, text, time, None, None)
    apply(model)
    got = model.text_transformer_blocks[0](text, time, None), model.visual_transformer_blocks[0](x, text, time, None, None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_samples_share() -> None:
    model, given_ = made(VARIANTS["lite"]).eval(), given(VARIANTS["lite"])
    given_["encoder_hidden_states"] = given_["encoder_hidden_states"][:1]
    with torch.no_grad():
        want = outputs(model, given_)
        apply(model)
        torch.testing.assert_close(outputs(model, given_), want, rtol=0.02, atol=0.02)


def test_modulation_in_float32() -> None:
    """As `from_pretrained` leaves a model of bfloat16."""
    lite = VARIANTS["lite"]
    model = made(lite)
    exact = results(copy.deepcopy(model).double(), given(lite, torch.float64))
    for name, module in model.named_modules():
        if not list(module.children()) and not any(part in name for part in ("time_embeddings", "modulation")):
            module.bfloat16()
    inputs = given(lite, torch.bfloat16)
    rows = []
    model.visual_transformer_blocks[0].visual_modulation.register_forward_hook(lambda _m, _args, out: rows.append(out.dtype))
    plain = results(model, inputs)
    apply(model)
    check_close(results(model, inputs), plain, exact, torch.bfloat16)
    assert set(rows) == {torch.float32}


def _flex(query, key, value, attn_mask, **_options) -> torch.Tensor:
    """flex_attention of whole blocks, which torch has only in compiled form."""
    mask = None if attn_mask is None else attn_mask.to_dense().bool().repeat_interleave(64, -1).repeat_interleave(64, -2)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), mask).transpose(1, 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_sparse_attention(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """NABLA's masks of blocks, which flex_attention takes in diffusers, are block-sparse attention's; cross-attention is dense."""
    flex = AttentionBackendName("flex")
    monkeypatch.setitem(_AttentionBackendRegistry._backends, flex, _flex)
    sparse = variant(build(attention_type="nabla"), partial(inputs, grid=(3, 16, 32)))
    model, given_ = made(sparse).eval(), given(sparse)
    blocks = 3 * 2  # of 8 x 8 tokens
    diagonal = torch.eye(blocks, dtype=torch.bool)[None, None]
    given_["sparse_params"] = {"to_fractal": True, "sta_mask": diagonal, "P": 0.3}
    with torch.no_grad():
        dense = outputs(model, given_ | {"sparse_params": None})
        for block in model.visual_transformer_blocks:
            block.self_attention.processor._attention_backend = flex
        want = outputs(model, given_)
        apply(model)
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        else:
            with torch.inference_mode():  # keeps nothing that a training could not use
                outputs(model, given_)
        with record() as calls:
            got = outputs(model, given_)
    assert (want[0] - dense[0]).abs().max() > 1e-2
    assert [name for name, _ in calls].count("block_sparse_attention_forward") == len(model.visual_transformer_blocks)
    if not compiled:
        outputs(model, given_)[0].sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
