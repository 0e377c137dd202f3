"""Text encoders of transformers, frozen, as a pipeline wants them: `PretrainedEncoder`, `load_text_encoder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import built, load_weights, read_json
from .conditioning import PackedText, TextEncoder
from .text import WordEncoder

# What a config says it is -> the class that holds the encoder alone.
CLASSES = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


class PretrainedEncoder(nn.Module):
    """T5, UMT5 or CLIP's text encoder from a local folder: captions of any length to packed tokens, nothing padded.

    >>> encoder = PretrainedEncoder.from_pretrained("checkpoints/umt5-base")
    >>> encoder(["a red circle moves right", ""]).cu_seqlens
    tensor([0, 7, 8], dtype=torch.int32)

    An empty caption is what the tokenizer makes of it, an end mark: the null conditioning. pooled is CLIP's own, else the mean
    of a caption's tokens. Captions longer than a model can take (CLIP: 77 tokens) are cut, as diffusers does.

    Args:
        model: of transformers, on any device; it is frozen.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        kind = model.config.model_type
        if kind not in CLASSES:
            raise ValueError(f"PretrainedEncoder: model: expected one of {', '.join(CLASSES)}, got {kind}")
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.dim = int(model.config.hidden_size)
        self.longest = getattr(model.config, "max_position_embeddings", None)

    def train(self, mode: bool = True) -> PretrainedEncoder:
        return self  # frozen: dropout never runs

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> PackedText:
        """captions: B strings. Returns tokens [M, D], cu_seqlens [B+1] and pooled [B, D] on the model's device."""
        if isinstance(captions, str):
            raise TypeError("PretrainedEncoder: captions: expected a list of strings, got one string")
        options = {"truncation": True, "max_length": self.longest} if self.longest else {}
        batch = self.tokenizer(list(captions), padding=True, return_tensors="pt", **options).to(self.model.device)
        mask = batch["attention_mask"]
        out = self.model(input_ids=batch["input_ids"], attention_mask=mask)
        states: Tensor = out.last_hidden_state
        tokens = states[mask.bool()]
        cu_seqlens = torch.cat([mask.new_zeros(1), mask.sum(1).cumsum(0)]).int()
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            weights = mask[:, :, None].to(states)
            pooled = (states * weights).sum(1) / weights.sum(1)
        return PackedText(tokens, cu_seqlens, pooled)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes model and tokenizer as transformers does; weights keep their dtype, as T5 overflows in float16."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PretrainedEncoder:
        """Reads a checkpoint of transformers from a local folder, in the dtype of its weights."""
        import transformers

        owner = "PretrainedEncoder.from_pretrained"
        kind = read_json(Path(folder) / "config.json", owner).get("model_type")
        if kind not in CLASSES:
            raise ValueError(f"{owner}: {folder}: expected model_type out of {', '.join(CLASSES)}, got {kind}")
        model = getattr(transformers, CLASSES[kind]).from_pretrained(folder, local_files_only=True)
        return cls(model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))


def load_text_encoder(folder: str | Path) -> TextEncoder:
    """The text encoder of a checkpoint: a `WordEncoder`, or one of transformers."""
    folder, owner = Path(folder), "load_text_encoder"
    config = read_json(folder / "config.json", owner)
    if "model_type" in config:
        return PretrainedEncoder.from_pretrained(folder)
    encoder = built(WordEncoder, config, owner)
    load_weights(encoder, folder, owner)
    return encoder
