"""packed_forward: several sizes, times and texts in one sequence are what each is alone."""

import re

import pytest
import torch
from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel, ZImageTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, LayerSkipConfig, apply_layer_skip
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers_contract import Variant, made
from einops import rearrange
from peft import LoraConfig, get_peft_model
from test_diffusers_qwenimage import CONFIG as QWEN
from test_diffusers_wan import CONFIG
from test_diffusers_wan import VARIANTS as WAN_VARIANTS
from test_diffusers_z_image import CONFIG as Z_IMAGE
from tolerance import assert_bit_equal
from torch import Tensor

from sora_kernels.integrations.diffusers import apply, packed_forward, revert
from sora_kernels.integrations.diffusers.wan import WanProcessor

# Three sizes, of which one is an image; conditional and unconditional together.
GRIDS = ((3, 8, 8), (1, 12, 4), (2, 4, 16)) * 2
TEXTS = (7, 512, 31, 2, 2, 1)


def wan(**changes):
    return made(Variant(lambda: WanTransformer3DModel(**(CONFIG | changes)), None)).eval()


def samples(width: int = 32, grids=GRIDS, texts=TEXTS) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    torch.manual_seed(1)
    latents = [torch.randn(4, *grid) for grid in grids]
    return latents, torch.randint(0, 1000, (len(grids),)), [torch.randn(n, width) for n in texts]


def alone(model, latents, timesteps, text, image=None):
    image = [None] * len(latents) if image is None else [x[None] for x in image]
    given = zip(latents, timesteps, text, image, strict=True)
    return [model(x[None], t[None], c[None], i, return_dict=False)[0][0] for x, t, c, i in given]


def qwen():
    return made(Variant(lambda: QwenImageTransformer2DModel(**QWEN), None)).eval()


def qwen_alone(model, latents, timesteps, text):
    """As diffusers' pipelines do: patches as channels, and back."""
    outs = []
    for x, t, c in zip(latents, timesteps, text, strict=True):
        _, f, h, w = x.shape
        patches = rearrange(x, "c f (h ph) (w pw) -> 1 (f h w) (c ph pw)", ph=2, pw=2)
        out = model(patches, c[None], None, t[None], [[(f, h // 2, w // 2)]], return_dict=False)[0]
        outs.append(rearrange(out, "1 (f h w) (c ph pw) -> c f (h ph) (w pw)", f=f, h=h // 2, w=w // 2, ph=2, pw=2))
    return outs


def z_image():
    return made(Variant(lambda: ZImageTransformer2DModel(**Z_IMAGE), None)).eval()


def z_image_alone(model, latents, timesteps, text):
    return [model([x], t[None], [c], return_dict=False)[0][0] for x, t, c in zip(latents, timesteps, text, strict=True)]


IMAGES = ((1, 8, 8), (1, 12, 4), (1, 4, 18)) * 2
OTHERS = {"qwen": (qwen, qwen_alone, 2), "z_image": (z_image, z_image_alone, 16)}


def image_samples(channels: int, grids=IMAGES, texts=TEXTS) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    torch.manual_seed(1)
    return [torch.randn(channels, *g) for g in grids], torch.rand(len(grids)), [torch.randn(n, 32) for n in texts]


@pytest.mark.parametrize("family", OTHERS)
def test_images(family):
    build, alone, channels = OTHERS[family]
    model, given = build(), image_samples(channels)

    def results(outs):
        loss = sum((x * torch.cos(torch.arange(x.numel())).view_as(x)).sum() for x in outs)
        return list(outs), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    want, want_grads = results(alone(model, *given))
    apply(model)
    got, grads = results(packed_forward(model, *given))
    close(got, want)
    for g, w in zip(grads, want_grads, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-3, atol=3e-5 * max(1, float(w.abs().max())))
    with pytest.raises(ValueError, match=r"timesteps\[0\]: expected one, got 3"):
        packed_forward(model, given[0], [torch.zeros(3)] * 6, given[2])
    with pytest.raises(ValueError, match="image: expected None, got some"):
        packed_forward(model, *given, image=given[2])


@pytest.mark.parametrize("family", OTHERS)
def test_images_compiled_once_for_all_packings(family):
    torch._dynamo.reset()
    build, alone, channels = OTHERS[family]
    model, plain = build(), build()
    apply(model)
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    for step, (grids, texts) in enumerate(
        ((IMAGES, TEXTS), (IMAGES[:3], TEXTS[:3]), (IMAGES[1:5], TEXTS[2:]), (IMAGES[:2], (4, 77)))
    ):
        given = image_samples(channels, grids, texts)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=step > 1):
            close(packed_forward(model, *given), alone(plain, *given))
    torch._dynamo.reset()


@pytest.mark.parametrize("option", ["zero_cond_t", "use_layer3d_rope"])
def test_qwen_images_to_edit_are_refused(option):
    model = QwenImageTransformer2DModel(**QWEN, **{option: True})
    apply(model)
    with pytest.raises(ValueError, match=f"packed_forward: model: expected one without {option}, got one with it"):
        packed_forward(model, *image_samples(2))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_wan():
    model, given = wan(), samples()
    want = alone(model, *given)
    apply(model)
    got = packed_forward(model, *given)
    assert [x.shape for x in got] == [x.shape for x in given[0]]
    close(got, want)
    close(packed_forward(model, given[0], given[1].tolist(), given[2]), want)
    revert(model)
    assert_bit_equal(alone(model, *given), want)


def test_gradients():
    model, given = wan(), samples()

    def gradients(outs):
        loss = sum((x * torch.cos(torch.arange(x.numel())).view_as(x)).sum() for x in outs)
        return torch.autograd.grad(loss, list(model.parameters()))

    want = gradients(alone(model, *given))
    apply(model)
    got = gradients(packed_forward(model, *given))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=2e-5 * max(1, float(w.abs().max())))
    model.enable_gradient_checkpointing()
    model.train()
    for g, w in zip(gradients(packed_forward(model, *given)), got, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_wan_with_a_time_for_each_frame():
    """As Wan 2.2 TI2V, which is given one for each token."""
    model, (latents, timesteps, text) = wan(), samples()
    frames = [torch.randint(0, 1000, (x.shape[1],)) if i % 2 else timesteps[i] for i, x in enumerate(latents)]
    tokens = [t.repeat_interleave(x.shape[2] * x.shape[3] // 4) if t.ndim else t for x, t in zip(latents, frames, strict=True)]
    want = alone(model, latents, tokens, text)
    apply(model)
    close(packed_forward(model, latents, frames, text), want)


def test_wan_with_images():
    model, given = wan(image_dim=16, added_kv_proj_dim=256), samples(texts=(512,) * 6)
    image = [torch.randn(5 + i, 16) for i in range(6)]
    want = alone(model, *given, image)
    apply(model)
    close(packed_forward(model, *given, image=image), want)
    with pytest.raises(ValueError, match=r"text\[1\]: expected 512 tokens beside an image, .* got 9"):
        packed_forward(model, *given[:2], [given[2][0], *[torch.zeros(9, 32)] * 5], image=image)


def test_compiled_once_for_all_packings():
    """Other sizes and numbers of samples take no other graph after the second."""
    torch._dynamo.reset()
    model = wan()
    apply(model)
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    plain = wan()
    for step, (grids, texts) in enumerate(((GRIDS, TEXTS), (GRIDS[:3], TEXTS[:3]), (GRIDS[1:5], TEXTS[2:]), (GRIDS[:2], (4, 77)))):
        given = samples(grids=grids, texts=texts)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=step > 1):
            close(packed_forward(model, *given), alone(plain, *given))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(6, 4, 1, 4, 4)}, "latents: expected a sequence of tensors, got Tensor"),
        ({"latents": []}, "latents: expected a sequence of tensors, got 0"),
        ({"latents": [torch.zeros(4, 1, 4, 5)] * 6}, "latents[0]: expected shape [4, 1 n, 2 n, 2 n], got [4, 1, 4, 5]"),
        ({"latents": [torch.zeros(3, 1, 4, 4)] * 6}, "latents[0]: expected shape [4, 1 n, 2 n, 2 n], got [3, 1, 4, 4]"),
        ({"latents": [torch.zeros(1, 4, 4)] * 6}, "latents[0]: expected shape [C, F, H, W], got [1, 4, 4]"),
        ({"timesteps": 500}, "timesteps: expected a list or 1-D tensor of 6, got int"),
        ({"timesteps": torch.tensor(500)}, "timesteps: expected a list or 1-D tensor of 6, got Tensor"),
        ({"timesteps": torch.zeros(5)}, "timesteps: expected 6 of them, got 5"),
        ({"timesteps": [torch.zeros(2)] * 6}, "timesteps[0]: expected one, or one for each of 3 token frames, got 2"),
        ({"text": [torch.zeros(7, 32)] * 5}, "text: expected a sequence of 6 tensors, got 5"),
        ({"text": [torch.zeros(7)] * 6}, "text[0]: expected shape [L, width], got [7]"),
        ({"text": [torch.zeros(7, 31)] * 6}, "text[0]: expected shape [L, 32], got [7, 31]"),
        (
            {"latents": [torch.zeros(4, 1, 4, 4), *[torch.zeros(4, 1, 4, 4).half()] * 5]},
            "latents[1]: expected dtype float32, got float16",
        ),
        ({"image": [torch.zeros(7, 16)] * 6}, "image: expected None, got some"),
    ],
)
def test_what_is_refused(change, message):
    model = wan()
    apply(model)
    given = dict(zip(("latents", "timesteps", "text"), samples(), strict=True)) | change
    with pytest.raises((ValueError, TypeError)) as raised:
        packed_forward(model, **given)
    assert str(raised.value) == f"packed_forward: {message}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: (wan(image_dim=16, added_kv_proj_dim=256), *samples(), [torch.zeros(3, 15)] * 6),
            "image[0]: expected shape [L, 16]",
        ),
        (lambda: (qwen(), *image_samples(2)[:2], [torch.zeros(3, 31)] * 6), "text[0]: expected shape [L, 32]"),
        (lambda: (z_image(), *image_samples(16)[:2], [torch.zeros(3, 31)] * 6), "text[0]: expected shape [L, 32]"),
    ],
    ids=["wan", "qwenimage", "z_image"],
)
def test_widths_that_are_refused(make, message):
    model, latents, timesteps, text, *image = make()
    apply(model)
    with pytest.raises(ValueError, match=f"packed_forward: {re.escape(message)}, got "):
        packed_forward(model, latents, timesteps, text, image=image[0] if image else None)


def test_models_that_are_refused():
    model = wan()
    with pytest.raises(ValueError, match=r"model: expected one of .* that apply has patched, got WanTransformer3DModel"):
        packed_forward(model, *samples())
    with pytest.raises(ValueError, match=r"model: expected one of .* got Linear"):
        packed_forward(torch.nn.Linear(2, 2), *samples())
    apply(model)
    handle = model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model: expected one without hooks"):
        packed_forward(model, *samples())
    handle.remove()
    model.blocks[1].attn1.set_processor(WanAttnProcessor())
    with pytest.raises(ValueError, match="model: expected one whose attention processors are all those of apply, got other ones"):
        packed_forward(model, *samples())
    model.blocks[1].attn1.set_processor(WanProcessor())
    vace = made(WAN_VARIANTS["vace"])
    apply(vace)
    with pytest.raises(ValueError, match=r"model: expected one of .* got WanVACETransformer3DModel"):
        packed_forward(vace, *samples())
    model = wan()
    apply(model)
    model.norm_out.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="norm_out: expected a module without hooks or offloading, got one with them"):
        packed_forward(model, *samples())
    model = wan(image_dim=16, added_kv_proj_dim=256, pos_embed_seq_len=3)
    apply(model)
    with pytest.raises(ValueError, match="model: expected one without pos_embed_seq_len"):
        packed_forward(model, *samples(), image=[torch.zeros(3, 16)] * 6)
    model = wan()
    apply(model)
    model.blocks[0].norm2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"WanTransformerBlock: expected norm1, norm2, norm3 without hooks, .* got one with them"):
        packed_forward(model, *samples())


@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (lambda m: get_peft_model(m, LoraConfig(target_modules=["to_q"])), r"model.get_base_model\(\)"),
        (torch.nn.DataParallel, "model.module"),
        (
            lambda m: torch.compile(m, backend="eager"),
            "not compiled: compile its blocks, by compile_repeated_blocks",
        ),
    ],
    ids=["peft", "data parallel", "compiled"],
)
def test_wrapped_models_are_refused_by_what_to_give(wrap, advice):
    model = wan()
    apply(model)
    wrapped = wrap(model)
    with pytest.raises(ValueError, match=rf"model: expected the WanTransformer3DModel in it \({advice}\), got "):
        packed_forward(wrapped, *samples())


@pytest.mark.parametrize(
    "make", [lambda: (wan(), samples()), lambda: (qwen(), image_samples(2)), lambda: (z_image(), image_samples(16))]
)
def test_dtypes_that_are_refused(make):
    model, (latents, timesteps, text) = make()
    model.to(torch.bfloat16)
    apply(model)
    with pytest.raises(TypeError, match=r"latents\[0\]: expected dtype bfloat16, got float32"):
        packed_forward(model, latents, timesteps, text)
    latents = [x.bfloat16() for x in latents]
    with pytest.raises(TypeError, match=r"text\[0\]: expected dtype bfloat16, got float32"):
        packed_forward(model, latents, timesteps, text)
    with torch.autocast("cpu", torch.bfloat16):
        packed_forward(model, latents, timesteps, text)


@pytest.mark.parametrize("at", [None, "a", True])
def test_times_that_are_no_numbers(at):
    model = wan()
    apply(model)
    latents, _, text = samples()
    with pytest.raises(TypeError, match=r"packed_forward: timesteps\[5\]: expected a number or a tensor, got "):
        packed_forward(model, latents, [500] * 5 + [at], text)


def test_perturbed_attention_guidance():
    """Where diffusers skips an attention's scores, so does a packed forward."""
    model = z_image()
    apply(model)
    latents, timesteps, text = image_samples(16)
    plain = packed_forward(model, latents, timesteps, text)
    apply_layer_skip(
        model, LayerSkipConfig(indices=[0], fqn="layers", skip_attention=False, skip_attention_scores=True, skip_ff=False)
    )
    with torch.no_grad():
        got = packed_forward(model, latents, timesteps, text)
        for x, t, c, y, before in zip(latents, timesteps, text, got, plain, strict=True):
            want = model([x], t[None], [c], return_dict=False)[0][0]
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
            assert (y - before).norm() > 0.01 * before.norm()


def test_caches_are_refused():
    model = wan()
    apply(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    with pytest.raises(ValueError, match=r"model: expected one without a cache of diffusers \(call disable_cache\)"):
        packed_forward(model, *samples())
    model.disable_cache()
    packed_forward(model, *samples())


def test_a_model_that_gets_its_weights_later():
    weights = z_image().state_dict()
    with torch.device("meta"):
        model = ZImageTransformer2DModel(**Z_IMAGE)
    apply(model)
    model.load_state_dict(weights, assign=True)
    latents, timesteps, text = image_samples(16)
    with torch.no_grad():
        got = packed_forward(model, latents, timesteps, text)
        want = model(latents[:1], timesteps[:1], text[:1], return_dict=False)[0][0]
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)
