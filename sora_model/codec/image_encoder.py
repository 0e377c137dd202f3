"""What CLIP sees of an image, for transformers that attend to it: `ImageEncoder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..storage.pretrained import open_pretrained
from ..storage.weights import built, read_json


class ImageEncoder(nn.Module):
    """CLIP's tokens of images, those before its last layer, as Wan 2.1's image-to-video models take them; frozen.

    Args:
        model: CLIPVisionModel of transformers.
        processor: its image processor, which scales, cuts and normalises.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.processor = processor
        self.dim = int(model.config.hidden_size)

    @torch.no_grad()
    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """images: [3, 1, H, W] each, in [-1, 1], of any sizes. Returns the tokens of all, end to end [M, dim]."""
        pictures = [((image[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy() for image in images]
        pixels = self.processor(images=[np.ascontiguousarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
        states = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype), output_hidden_states=True).hidden_states
        return states[-2].flatten(0, 1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, processor: str | Path, *, dtype: torch.dtype | None = None) -> ImageEncoder:
        """Reads CLIPVisionModel and CLIPImageProcessor from local folders.

        dtype: of the weights; default: that of the files.

        Raises:
            FileNotFoundError: no config or no safetensors there.
            ValueError: another kind of model; weights that are broken, missing, of another shape or not finite.
        """
        import transformers

        folder, owner = Path(folder), "ImageEncoder.from_pretrained"
        config = read_json(folder / "config.json", owner)
        if (kind := config.get("model_type")) not in ("clip_vision_model", "clip"):
            raise ValueError(f"{owner}: {folder}: expected model_type clip_vision_model, got {kind}")
        if isinstance(config.get("vision_config"), dict):  # a whole CLIP
            config = config["vision_config"]
        # The one that works on arrays, where transformers has two: the other needs torchvision.
        image_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        values = read_json(Path(processor) / "preprocessor_config.json", owner)
        reader = built(image_processor.from_dict, {"image_processor_dict": values}, owner)
        return cls(open_pretrained(transformers.CLIPVisionModel, config, folder, owner, dtype), reader)
