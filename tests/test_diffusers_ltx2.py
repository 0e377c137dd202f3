"""LTX-2, patched: 2.0 with RoPE of halves, 2.3 and 2.5 with gates, 9 rows and perturbed attention."""

from functools import partial

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers_contract import FamilyContract, Inputs, Reads, Variant, given, made, outputs
from test_diffusers_ltx import BATCHES, GRIDS, padding

from sora_kernels.integrations.diffusers import apply

CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "cross_attention_dim": 256,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 256,
    "caption_channels": 16,
    "num_layers": 2,
    "rope_type": "split",
}
NEWER = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
    "use_prompt_embeddings": False,
}
TEXT = (256, 200, 192)


def inputs(size: int, newer: bool = False, per_token: bool = False, masks: str = "keys", **changes) -> Inputs:
    b, grid, length = BATCHES[size], GRIDS[size], TEXT[size]
    tokens = grid[0] * grid[1] * grid[2]
    made = {
        "hidden_states": torch.randn(b, tokens, 4),
        "audio_hidden_states": torch.randn(b, 20 + size, 4),
        "encoder_hidden_states": torch.randn(b, length, 256 if newer else 16),
        "audio_encoder_hidden_states": torch.randn(b, length, 256 if newer else 16),
        "timestep": 1000 * torch.rand(b, tokens if per_token else 1),
        "audio_timestep": 1000 * torch.rand(b),
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "audio_num_frames": 20 + size,
    }
    if newer:
        made |= {"sigma": 1000 * torch.rand(b), "audio_sigma": 1000 * torch.rand(b), "use_cross_timestep": True}
    if masks == "keys":
        made |= {"encoder_attention_mask": padding(b, length), "audio_encoder_attention_mask": padding(b, length).flip(1)}
    elif masks == "strength":  # of attention between tokens, as the pipeline of in-context LoRA has it
        made["video_self_attention_mask"] = (torch.rand(b, tokens, tokens) > 0.3).float()
    return made | changes


def perturbed(size: int) -> Inputs:
    mask = torch.ones(BATCHES[size])
    mask[1] = 0
    return inputs(size, newer=True, spatio_temporal_guidance_blocks=[0], perturbation_mask=mask)


def build(**changes):
    return partial(LTX2VideoTransformer3DModel, **(CONFIG | changes))


newer = build(**NEWER)
VARIANTS = {
    "2.0": Variant(build(), inputs),
    "2.0_per_token": Variant(build(), partial(inputs, per_token=True)),
    "2.0_interleaved": Variant(build(rope_type="interleaved"), inputs),
    "2.0_strength": Variant(build(), partial(inputs, masks="strength")),
    "2.0_isolated": Variant(build(), partial(inputs, isolate_modalities=True)),
    "2.3": Variant(newer, partial(inputs, newer=True, per_token=True)),
    "2.3_perturbed": Variant(newer, perturbed),
    "2.5": Variant(build(**NEWER, use_prompt_adaln_single=False, ff_bias=False), partial(inputs, newer=True)),
    "9_rows_of_video": Variant(build(**(NEWER | {"audio_cross_attn_mod": False})), partial(inputs, newer=True)),
}


class TestLTX2(FamilyContract):
    pass


def test_all_perturbed() -> None:
    """As diffusers does without attention, where no mask says which samples are."""
    variant = VARIANTS["2.3"]
    model, inputs = made(variant).eval(), given(variant) | {"spatio_temporal_guidance_blocks": [0, 1]}
    with torch.no_grad():
        want = outputs(model, inputs)
        apply(model)
        with Reads() as reads:
            got = outputs(model, inputs)
    assert reads.count == 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("to_video", "to_audio"), [(True, False), (False, True)])
def test_one_of_the_cross_attentions(to_video: bool, to_audio: bool) -> None:
    """diffusers' model has both or none, and its blocks either."""
    model, inputs = made(VARIANTS["2.0"]).eval(), given(VARIANTS["2.0"])

    def one_of_both(block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"use_a2v_cross_attention": to_video, "use_v2a_cross_attention": to_audio}

    for block in model.transformer_blocks:
        block.register_forward_pre_hook(one_of_both, with_kwargs=True)
    with torch.no_grad():
        want = outputs(model, inputs)
        apply(model)
        got = outputs(model, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
