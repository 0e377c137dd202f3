"""The arguments of a pipeline's call: checked, and as one `Request` and one generator for each video."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from ..limits import MOST_DENOISING_STEPS
from ..model.block import Window
from ..model.step_cache import StepCache
from ..sizes import Size
from .request import Request

Seeds = int | torch.Generator | Sequence[int | torch.Generator] | None
OUTPUTS = ("pt", "np", "pil", "latent")


def check_options(
    num_inference_steps: int,
    guidance_from: float,
    output_type: str,
    precision: str,
    window: Window | None,
    step_cache: StepCache | float | None,
) -> None:
    if window is not None and not isinstance(window, Sequence):
        raise TypeError(f"SoraPipeline: window: expected three numbers of tokens or None, got {window!r}")
    if window is not None and (len(window) != 3 or any(n is not None and (type(n) is not int or n < 1) for n in window)):
        raise ValueError(f"SoraPipeline: window: expected three numbers of tokens of at least 1 or None, got {window!r}")
    if isinstance(step_cache, bool) or not isinstance(step_cache, StepCache | int | float | None):
        raise TypeError(f"SoraPipeline: step_cache: expected a StepCache, a number or None, got {step_cache!r}")
    if precision not in ("no", "bf16"):
        raise ValueError(f"SoraPipeline: precision: expected 'no' or 'bf16', got {precision!r}")
    if not 1 <= num_inference_steps <= MOST_DENOISING_STEPS:
        raise ValueError(f"SoraPipeline: num_inference_steps: expected 1 to {MOST_DENOISING_STEPS}, got {num_inference_steps}")
    if not 0 <= guidance_from <= 1:
        raise ValueError(f"SoraPipeline: guidance_from: expected a number from 0 to 1, got {guidance_from}")
    if output_type not in OUTPUTS:
        raise ValueError(f"SoraPipeline: output_type: expected one of {', '.join(OUTPUTS)}, got {output_type!r}")


def as_requests(
    requests: str | Request | Sequence[str | Request], size: Size | Sequence[Size] | None, default: Size
) -> list[Request]:
    """A `Request` for each; strings are prompts of text to video, of `size` or of one size each."""
    if not isinstance(requests, str | Request | Sequence):
        raise TypeError(f"SoraPipeline: requests: expected prompts and Requests, got {requests!r}")
    listed: list[str | Request] = [requests] if isinstance(requests, str | Request) else list(requests)
    if not listed:
        raise ValueError("SoraPipeline: requests: expected at least one, got none")
    for request in listed:
        if not isinstance(request, str | Request):
            raise TypeError(f"SoraPipeline: requests: expected prompts and Requests, got {request!r}")
    sizes: list[Any] = [default if size is None else size] * len(listed)
    if size is not None and isinstance(size[0], Sequence):
        if len(size) != len(listed):
            raise ValueError(f"SoraPipeline: size: expected one (T, H, W) or {len(listed)}, one per request, got {len(size)}")
        sizes = list(size)
    for one in sizes:
        if isinstance(one, str):
            raise TypeError(f"SoraPipeline: size: expected (T, H, W), got {one!r}")
    return [Request(one, tuple(s)) if isinstance(one, str) else one for one, s in zip(listed, sizes, strict=True)]


def as_generators(generator: Seeds, requests: Sequence[Request]) -> list[torch.Generator]:
    """One per request, on the host: a sample starts from the same noise on every device, alone or packed with others."""
    sources: list[Any]
    if generator is None:
        generator = int(torch.randint(2**31, ()))
    if isinstance(generator, Integral) and not isinstance(generator, bool):
        sources = [int(generator) + i for i in range(len(requests))]
    elif isinstance(generator, torch.Generator):
        sources = [generator] * len(requests)
    elif isinstance(generator, Sequence) and all(isinstance(one, Integral | torch.Generator) for one in generator):
        sources = list(generator)
    else:
        raise TypeError(f"SoraPipeline: generator: expected a seed or a torch.Generator, or one per request, got {generator!r}")
    if len(sources) != len(requests):
        raise ValueError(f"SoraPipeline: generator: expected {len(requests)}, one per request, got {len(sources)}")
    drawn: list[Any] = [source if request.seed is None else request.seed for source, request in zip(sources, requests, strict=True)]
    return [_seeded(int(one)) if isinstance(one, Integral) else one for one in drawn]


def _seeded(seed: int) -> torch.Generator:
    if not 0 <= seed < 2**64:
        raise ValueError(f"SoraPipeline: generator: expected seeds from 0 to 2**64 - 1, got {seed}")
    return torch.Generator().manual_seed(seed)
