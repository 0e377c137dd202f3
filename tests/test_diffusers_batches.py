"""What all samples of a batch may share, as diffusers' broadcasting lets them: a prompt, a time."""

import pytest
import test_diffusers_flux as flux
import test_diffusers_flux2 as flux2
import test_diffusers_hunyuan_video as hunyuan_video
import test_diffusers_hunyuan_video15 as hunyuan_video15
import test_diffusers_qwenimage as qwenimage
import torch
from diffusers_contract import given, made, outputs

from sora_kernels.integrations.diffusers import apply

SHARED = {
    "flux prompt": (flux.VARIANTS["dev"], ["encoder_hidden_states"]),
    "flux2 prompt": (flux2.VARIANTS["dev"], ["encoder_hidden_states"]),
    "qwenimage prompt": (qwenimage.VARIANTS["no_mask"], ["encoder_hidden_states"]),
    "qwenimage time": (qwenimage.VARIANTS["edit"], ["timestep"]),
    "hunyuan_video time": (hunyuan_video.VARIANTS["token_replace"], ["timestep", "pooled_projections"]),
}


@pytest.mark.parametrize(("variant", "names"), SHARED.values(), ids=SHARED)
def test_shared(variant, names) -> None:
    """Equal to the same for each sample, and to the unpatched model."""
    model, inputs = made(variant).eval(), given(variant)
    one = inputs | {name: inputs[name][:1] for name in names}
    each = inputs | {name: inputs[name][:1].expand_as(inputs[name]) for name in names}
    assert all(len(inputs[name]) > 1 for name in names)
    with torch.no_grad():
        want = outputs(model, one)
        apply(model)
        torch.testing.assert_close(outputs(model, one), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs(model, one), outputs(model, each), rtol=1e-5, atol=1e-6)


def test_a_prompt_beside_masks_of_each_sample() -> None:
    """diffusers cuts it by the first sample's mask; here it is the prompt of each."""
    variant = hunyuan_video.VARIANTS["t2v"]
    model, inputs = made(variant).eval(), given(variant)
    prompt = inputs["encoder_hidden_states"][:1]
    apply(model)
    with torch.no_grad():
        got = outputs(model, inputs | {"encoder_hidden_states": prompt})
        want = outputs(model, inputs | {"encoder_hidden_states": prompt.expand(len(inputs["timestep"]), -1, -1)})
    torch.testing.assert_close(got, want)


def test_batches_that_differ_are_named() -> None:
    variant = hunyuan_video15.VARIANTS["i2v"]
    model, inputs = made(variant).eval(), given(variant)
    apply(model)
    inputs["encoder_hidden_states_2"] = inputs["encoder_hidden_states_2"][:1]
    message = "HunyuanVideo15Transformer3DModel: encoder_hidden_states_2: expected a batch of 2, got 1"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        outputs(model, inputs)
