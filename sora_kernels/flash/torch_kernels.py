"""What the two backends of torch's own kernels share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .common import missing


def unavailable_in_torch(at_least: str, majors: tuple[int, ...], is_built: Callable[[], bool], what: str) -> str | None:
    """Why torch's kernels cannot run on this machine, or None."""
    if not is_built():
        return f"needs a torch that was built with {what}"
    return missing("torch", "torch", at_least, majors)


def no_dropout(device: torch.device) -> tuple[Tensor, Tensor]:
    """The state of a random generator that no kernel reads."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.zeros((), dtype=torch.uint64, device=device)
