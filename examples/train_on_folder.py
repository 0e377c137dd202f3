"""Trains a tiny model on a folder of videos and images: python examples/train_on_folder.py [FOLDER] [STEPS]

Captions are in .txt files beside the media. Without a FOLDER, a small one of fading colours is made in a temporary place.
`sora train` does the same with a VAE, larger models and all options.
"""

import sys
import tempfile
from pathlib import Path

import torch

from sora_model import SoraPipeline
from sora_model.data import FolderSource, PackedSampler, write_video
from sora_model.training.config import TrainConfig
from sora_model.training.dit import DiffusionObjective
from sora_model.training.trainer import Trainer

COLORS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


def make_folder(folder: Path) -> None:
    """A video and an image of each colour, of different sizes."""
    for name, color in COLORS.items():
        plane = torch.tensor(color)[:, None, None, None]
        fade = torch.linspace(-1, 1, 6)[None, :, None, None]
        write_video(folder / f"{name}.mp4", (plane * fade).expand(3, 6, 24, 32))
        write_video(folder / f"{name}-image.png", plane.expand(3, 1, 32, 16))
        (folder / f"{name}.txt").write_text(f"{name} fades in")
        (folder / f"{name}-image.txt").write_text(f"plain {name}")


def main(folder: Path | None = None, steps: int = 10) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            make_folder(folder := Path(temporary))
        pipeline = SoraPipeline.from_preset("tiny", patch=(1, 8, 8), size=(6, 24, 32))
        source = FolderSource(folder, multiple_of=pipeline.unit, max_frames=16, max_pixels=64 * 64)
        sampler = PackedSampler(source, patch_size=(1, 8, 8), tokens_per_batch=256)
        trainer = Trainer(DiffusionObjective(pipeline), sampler, TrainConfig(steps=steps), "outputs/folder")
        for step in trainer.train():
            print(f"step {step.step}  loss {step.loss:.3f}  {len(step.sizes)} samples, {step.tokens} tokens")
    print("checkpoint: outputs/folder/checkpoint")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]), *map(int, sys.argv[2:3]))
