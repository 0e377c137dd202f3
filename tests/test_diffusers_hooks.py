"""Hooks, offloading, casts and caches on a patched model, and layers that guidance skips."""

import copy
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, LayerSkipConfig, TaylorSeerCacheConfig, apply_layer_skip
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers_contract import given, made, operators, outputs
from test_diffusers_hunyuan_video import VARIANTS as HUNYUAN
from test_diffusers_qwenimage import VARIANTS as QWEN
from test_diffusers_wan import OPERATORS
from test_diffusers_wan import VARIANTS as WAN
from test_diffusers_z_image import VARIANTS as Z_IMAGE
from tolerance import assert_bit_equal

from sora_kernels.integrations.diffusers import apply, revert


@pytest.fixture
def model():
    return made(WAN["t2v"]).eval()


@pytest.fixture
def inputs():
    return given(WAN["t2v"])


class Seen:
    """Both libraries' kinds of hook; counts its calls."""

    def __init__(self, kind):
        self.calls = 0
        seen = self

        class Hook(kind):
            def pre_forward(self, module, *args, **kwargs):
                seen.calls += 1
                return args, kwargs

            def post_forward(self, module, output):
                return output

        self.hook = Hook()


class Replacing(DiffusersHook):
    """As diffusers' caches do, with a forward of its own around the module's."""

    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


def accelerate_hook(module, seen):
    add_hook_to_module(module, seen.hook)
    return partial(remove_hook_from_module, module)


def diffusers_hook(module, seen):
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(seen.hook, "seen")
    registry.register_hook(Replacing(), "replacing")

    def remove():
        registry.remove_hook("replacing")
        registry.remove_hook("seen")

    return remove


def torch_hook(module, seen):
    def count(*_):
        seen.calls += 1

    return module.register_forward_hook(count).remove


HOOKS = {
    "accelerate": (accelerate_hook, ModelHook),
    "diffusers": (diffusers_hook, DiffusersHook),
    "torch": (torch_hook, DiffusersHook),
}


@pytest.mark.parametrize("on", ["blocks.1", "blocks.1.ffn.net.0", "blocks.1.attn1.to_q"])
@pytest.mark.parametrize("removed", ["patched", "reverted"])
@pytest.mark.parametrize("first", ["hook", "apply"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(model, inputs, kind, first, removed, on):
    """A hook sees every call, whichever comes first and goes first, and takes nothing with it when it is removed."""
    before = outputs(model, inputs)
    put, base = HOOKS[kind]
    seen = Seen(base)
    if first == "apply":
        apply(model)
    remove = put(model.get_submodule(on), seen)
    if first == "hook":
        apply(model)
    patched = outputs(model, inputs)
    assert seen.calls == 1
    assert operators(model, inputs) >= OPERATORS
    if removed == "patched":
        remove()
        assert_bit_equal(outputs(model, inputs), patched)
        assert operators(model, inputs) >= OPERATORS
    revert(model)
    assert_bit_equal(outputs(model, inputs), before)
    assert not operators(model, inputs)
    if removed == "reverted":
        remove()
        assert_bit_equal(outputs(model, inputs), before)


@pytest.mark.parametrize("norm", ["norm1", "norm2", "norm3", "attn1.norm_q", "attn2.norm_k"])
@pytest.mark.parametrize("kind", HOOKS)
def test_norms_that_are_watched(model, inputs, kind, norm):
    """They are called, and the results are the same."""
    apply(model)
    patched = outputs(model, inputs)
    put, base = HOOKS[kind]
    seen = Seen(base)
    put(model.blocks[0].get_submodule(norm), seen)
    torch.testing.assert_close(outputs(model, inputs), patched, rtol=1e-4, atol=1e-5)
    assert seen.calls == 1


def test_offloaded_leaf_by_leaf(model, inputs):
    """Weights are there only while their module is called."""
    before = outputs(model, inputs)
    apply(model)
    cpu_offload(model, torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-5)


def test_layerwise_casting(model, inputs):
    """Weights are kept in another dtype than they are used in."""
    apply(model)
    patched = outputs(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    got = outputs(model, inputs)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    torch.testing.assert_close(got, patched, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("order", ["hook", "apply"])
@pytest.mark.parametrize(
    ("variant", "fqn", "what"),
    [
        (Z_IMAGE["one_size"], "layers", "skip_attention"),
        (Z_IMAGE["one_size"], "layers", "skip_attention_scores"),
        (QWEN["no_mask"], "transformer_blocks", "skip_attention_scores"),  # the other fails in diffusers
    ],
    ids=["z_image", "z_image_scores", "qwenimage_scores"],
)
def test_layers_that_guidance_skips(variant, fqn, what, order):
    """Perturbed-attention guidance and its kin change the prediction as they do unpatched, whichever comes first."""
    wanted = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False, what: True}
    model, given_ = made(variant).eval(), given(variant)
    with torch.no_grad():
        unskipped = outputs(model, given_)
        want = copy.deepcopy(model)
        apply_layer_skip(want, LayerSkipConfig(indices=[0], fqn=fqn, **wanted))
        want = outputs(want, given_)
        if order == "apply":
            apply(model)
        apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=fqn, **wanted))
        if order == "hook":
            apply(model)
        got = outputs(model, given_)
    assert (want[0] - unskipped[0]).norm() > 0.01 * want[0].norm()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_cache_that_sits_on_attention():
    """TaylorSeer keeps what each attention returns."""
    model, given_ = made(HUNYUAN["t2v"]).eval(), given(HUNYUAN["t2v"])
    plain = copy.deepcopy(model)
    apply(model)
    for m in (plain, model):
        m.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1))
    with torch.no_grad():
        for _ in range(4):
            with model.cache_context("all"), plain.cache_context("all"):
                torch.testing.assert_close(outputs(model, given_), outputs(plain, given_), rtol=1e-3, atol=1e-4)
