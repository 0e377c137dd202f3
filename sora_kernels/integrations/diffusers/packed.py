"""One forward of a patched model over videos and images of any sizes, each with its own time step and text, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...checks import FLOATS, check_tensor, fail
from .parts import is_plain
from .patching import check_not_wrapped, family_of, is_hooked, is_patched, is_whole

OP = "packed_forward"
PACKED = "QwenImageTransformer2DModel", "WanTransformer3DModel", "ZImageTransformer2DModel"


class Samples(NamedTuple):
    """What a family's packed forward is given, checked."""

    latents: list[Tensor]
    """Each [C, F, H, W]."""
    timesteps: list[Tensor]
    """Each [1], or [F] of a family that takes one per latent frame."""
    text: list[Tensor]
    """Each [L, width]."""
    image: list[Tensor] | None


def packed_forward(
    model: nn.Module,
    latents: Sequence[Tensor],
    timesteps: Tensor | Sequence[Tensor | float],
    text: Sequence[Tensor],
    *,
    image: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The predictions for several samples, which share weights and nothing else.

    >>> import sora_kernels.integrations.diffusers
    >>> from diffusers import WanTransformer3DModel
    >>> model = WanTransformer3DModel(
    ...     num_attention_heads=2, attention_head_dim=64, num_layers=2, ffn_dim=64, text_dim=32, freq_dim=32, rope_max_seq_len=32
    ... )
    >>> report = sora_kernels.integrations.diffusers.apply(model)
    >>> video, still = torch.randn(16, 3, 8, 8), torch.randn(16, 1, 12, 4)
    >>> prompt, none = torch.randn(9, 32), torch.randn(2, 32)
    >>> [x.shape for x in packed_forward(model, [video, still, video, still], torch.full((4,), 500), [prompt, prompt, none, none])]
    [torch.Size([16, 3, 8, 8]), torch.Size([16, 1, 12, 4]), torch.Size([16, 3, 8, 8]), torch.Size([16, 1, 12, 4])]

    Each equals the model's own forward of that sample alone. Conditional and unconditional samples go together, as above. Blocks
    are called as modules: `model.compile_repeated_blocks(fullgraph=True, dynamic=True)` after `apply` compiles them once for all.

    Args:
        model: one of PACKED, a Wan, Qwen-Image or Z-Image transformer, that `apply` has patched.
        latents: each [C, F, H, W] as its VAE gives; an image has F = 1. F, H and W are multiples of the model's patch size.
        timesteps: one per sample, in the model's own units. Wan also takes [F / pt] of a sample, one per token frame, where the
            model itself is given one per token (Wan 2.2 TI2V).
        text: each [L, width], attended to as it is. What a model was trained to see padded, as Wan to 512 tokens, has to be padded.
            Beside an image Wan's has to have 512.
        image: Wan 2.1's embeddings of an image for each sample, [tokens, width].

    Returns:
        A tensor [C, F, H, W] for each sample.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if isinstance(model, nn.Module):
        check_not_wrapped(OP, model)
    family = family_of(model)
    known = any(kind.__name__ in PACKED for kind in type(model).__mro__)
    if family is None or family.packed is None or not known or not is_patched(model):
        fail(OP, "model", f"one of {', '.join(PACKED)} that apply has patched", type(model).__name__)
    if not is_whole(model):
        fail(OP, "model", "one whose attention processors are all those of apply", "other ones")
    if is_hooked(model):
        fail(OP, "model", "one without hooks or offloading of the whole model", "one with them")
    if getattr(model, "is_cache_enabled", False):  # some decide from all tokens at once
        fail(OP, "model", "one without a cache of diffusers (call disable_cache)", "one with it")
    return family.packed(model, _check(model, latents, timesteps, text, image))


def _check(model: nn.Module, latents: Any, timesteps: Any, text: Any, image: Any) -> Samples:
    like = next(model.parameters())
    for name, given, ndim in (("latents", latents, 4), ("text", text, 2), ("image", image, 2)):
        if given is None and name == "image":
            continue
        if isinstance(given, Tensor) or not isinstance(given, Sequence) or len(given) != len(latents) or not given:
            count = f"a sequence of {'' if name == 'latents' else f'{len(latents)} '}tensors"
            fail(OP, name, count, f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__, TypeError)
        for i, x in enumerate(given):
            shape = ("C", "F", "H", "W") if ndim == 4 else ("L", "width")
            check_tensor(OP, f"{name}[{i}]", x, shape, dtype=FLOATS if i == 0 else given[0].dtype, like=like)
    if not isinstance(timesteps, Sequence) and not (isinstance(timesteps, Tensor) and timesteps.ndim):
        fail(OP, "timesteps", f"a list or 1-D tensor of {len(latents)}", type(timesteps).__name__, TypeError)
    if len(timesteps) != len(latents):
        fail(OP, "timesteps", f"{len(latents)} of them", str(len(timesteps)))
    for i, t in enumerate(timesteps):
        if isinstance(t, bool) or not isinstance(t, int | float | Tensor):
            fail(OP, f"timesteps[{i}]", "a number or a tensor", repr(t), TypeError)
    times = [torch.as_tensor(t, device=like.device).reshape(-1) for t in timesteps]
    return Samples(list(latents), times, list(text), None if image is None else list(image))


def check_latents(samples: Samples, channels: int, patch_size: Sequence[int]) -> list[tuple[int, ...]]:
    """The samples' grids of tokens."""
    for i, x in enumerate(samples.latents):
        if x.shape[0] != channels or any(n % p or not n for n, p in zip(x.shape[1:], patch_size, strict=True)):
            shape = ", ".join(f"{p} n" for p in patch_size)
            fail(OP, f"latents[{i}]", f"shape [{channels}, {shape}]", str(list(x.shape)))
    return [tuple(n // p for n, p in zip(x.shape[1:], patch_size, strict=True)) for x in samples.latents]


def check_width(name: str, tensors: Sequence[Tensor], width: int) -> None:
    for i, x in enumerate(tensors):
        check_tensor(OP, f"{name}[{i}]", x, ("L", width))


def check_dtype(name: str, tensors: Sequence[Tensor], first: Any) -> None:
    """Against that of the layer that takes them first, if it is a plain one of floating-point weights and autocast is off."""
    weight: Any = getattr(first, "weight", None)
    known = isinstance(weight, Tensor) and weight.dtype in FLOATS and is_plain(first)
    if known and not torch.is_autocast_enabled(weight.device.type):
        check_tensor(OP, f"{name}[0]", tensors[0], dtype=weight.dtype)


def check_not_hooked(model: nn.Module, *names: str) -> None:
    """Modules that a packed forward takes over, and so would not call."""
    for name in names:
        module = model.get_submodule(name)
        replaced = "_old_forward" in module.__dict__ or "_diffusers_hook" in module.__dict__
        if module._forward_hooks or module._forward_pre_hooks or replaced:
            fail(OP, name, "a module without hooks or offloading", "one with them")


def one_time_each(samples: Samples) -> list[Tensor]:
    for i, t in enumerate(samples.timesteps):
        if len(t) != 1:
            fail(OP, f"timesteps[{i}]", "one", str(len(t)))
    return samples.timesteps


def refuse_image(samples: Samples) -> None:
    if samples.image is not None:
        fail(OP, "image", "None", "some")


def boundaries(lengths: Sequence[int], like: Tensor) -> Tensor:
    """int32 [B+1]."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=like.device)


def run_block(model: Any, block: nn.Module, *args: Any) -> Any:
    """A block, checkpointed if the model is."""
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        return model._gradient_checkpointing_func(block, *args)
    return block(*args)
