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

# What is read of the config of an image processor: others could replace its methods.
PROCESSED = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "do_convert_rgb",
)  # fmt: skip
LARGEST = 2048


class ImageEncoder(nn.Module):
    """CLIP's tokens of images, those before its last layer, as Wan 2.1's image-to-video models take them; frozen.

    Args:
        model: CLIPVisionModel of transformers.
        processor: its image processor, which scales, cuts and normalises.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        if model.config.num_hidden_layers < 1:
            raise ValueError(f"ImageEncoder: model: expected at least 1 layer, got {model.config.num_hidden_layers}")
        self.model: Any = model.eval().requires_grad_(False)
        self.processor = processor
        self.dim = int(model.config.hidden_size)

    @torch.no_grad()
    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """images: [3, 1, H, W] each, in [-1, 1], of any sizes. Returns the tokens of all, end to end [M, dim]."""
        if not images:
            raise ValueError("ImageEncoder: images: expected at least one, got none")
        pictures = [((image[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy() for image in images]
        pixels = self.processor(images=[np.ascontiguousarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
        states = self.model(
            pixel_values=pixels.to(self.model.device, self.model.dtype), output_hidden_states=True, return_dict=True
        )
        return states.hidden_states[-2].flatten(0, 1)

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
            raise ValueError(f"{owner}: {folder / 'config.json'}: expected model_type clip_vision_model, got {kind}")
        if isinstance(config.get("vision_config"), dict):  # a whole CLIP
            config = config["vision_config"]
        # The one that works on arrays, where transformers has two: the other needs torchvision.
        image_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        path, side = Path(processor) / "preprocessor_config.json", config.get("image_size")
        values = {key: value for key, value in read_json(path, owner).items() if key in PROCESSED}
        for name in ("size", "crop_size"):
            sides = values.get(name, {}).values() if isinstance(values.get(name, {}), dict) else [values[name]]
            if not all(type(n) is int and 1 <= n <= LARGEST for n in sides):
                raise ValueError(f"{owner}: {path}: {name}: expected sides of 1 to {LARGEST} pixels, got {values[name]!r}")
        reader = built(image_processor.from_dict, {"image_processor_dict": values}, owner, path)
        pixels = built(reader, {"images": np.zeros((8, 8, 3), np.uint8), "return_tensors": "pt"}, owner, path)["pixel_values"]
        if tuple(pixels.shape) != (1, 3, side, side):
            raise ValueError(
                f"{owner}: {path}: expected images of {side} pixels a side, as the model takes, got {list(pixels.shape)}"
            )
        return cls(open_pretrained(transformers.CLIPVisionModel, config, folder, owner, dtype), reader)
