"""Registration with torch.library, so that every op traces, compiles and differentiates like one of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("sora_kernels", "DEF")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Defines torch.ops.sora_kernels.<name> and returns it.

    `torch.library.Library` rather than `custom_op`: the same op, 6 instead of 12 microseconds of overhead a call (18 instead of
    38 with autograd). `run` must return fresh tensors, as neither mutation nor aliasing is declared.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    qualified = f"sora_kernels::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.sora_kernels, name).default
