"""A thin diffusion transformer for video in the manner of Sora, on the kernels of `sora_kernels`.

    from sora_model import SoraPipeline, extend, text_to_video

    model        DiT: latents of any sizes -> predictions, in one packed pass; its sizes, patches, conditioning; weights of others
    text         text encoders: words learned with the model; T5, UMT5 and CLIP
    codec        pixels <-> latents: diffusers' causal video VAEs
    diffusion    noising, loss, guidance and sampling, with diffusers' schedulers; every task is a mask of clean frames
    pipeline     SoraPipeline: requests -> videos; a request per task; loops, long videos, simulated worlds
    caption      latents -> captions, short prompts -> long ones
    training     Trainer, and what it trains: transformer, VAE, captioner
    data         folders of videos and images, batches of mixed sizes, video files
    storage      files that are written whole; configs and weights of others, read safely
    world        a procedural world with ground truth, and what needs it: evaluation, gallery, scaling study, demo
    cli          the command `sora`; a room brings commands and training data of its own (`rooms.py`), as world does

Letters are those of `sora_kernels`; M counts text tokens, and a *token frame* is the tokens of one t: pt latent frames.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .missing import not_installed

if TYPE_CHECKING:
    from .model.config import DiTConfig as DiTConfig
    from .model.dit import DiT as DiT
    from .model.step_cache import StepCache as StepCache
    from .pipeline.pipeline import SoraPipeline as SoraPipeline
    from .pipeline.request import Request as Request
    from .pipeline.request import extend as extend
    from .pipeline.request import image_to_video as image_to_video
    from .pipeline.request import join as join
    from .pipeline.request import text_to_image as text_to_image
    from .pipeline.request import text_to_video as text_to_video
    from .pipeline.request import video_to_video as video_to_video
    from .pipeline.stitch import Stitch as Stitch
    from .pipeline.tasks import Simulation as Simulation
    from .pipeline.tasks import long_video as long_video
    from .pipeline.tasks import loop as loop
    from .pipeline.tasks import refined as refined
    from .sizes import Timing as Timing

# Loaded when first asked for: torch, diffusers and transformers take seconds to import.
_HOMES = {
    "model.config": ["DiTConfig"],
    "model.dit": ["DiT"],
    "model.step_cache": ["StepCache"],
    "pipeline.pipeline": ["SoraPipeline"],
    "pipeline.request": ["Request", "extend", "image_to_video", "join", "text_to_image", "text_to_video", "video_to_video"],
    "pipeline.stitch": ["Stitch"],
    "pipeline.tasks": ["Simulation", "long_video", "loop", "refined"],
    "sizes": ["Timing"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_HOME_OF[name]}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sora_"):
            raise
        raise ModuleNotFoundError(not_installed(error.name, f"sora_model.{name} needs"), name=error.name) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
