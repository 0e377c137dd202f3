"""Text encoders of transformers, frozen, as a pipeline wants them: `PretrainedEncoder`, `load_text_encoder`."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.conditioning import PackedText, TextEncoder
from ..storage.pretrained import load_tokenizer, most_positions, open_pretrained
from ..storage.tokenizer import detokenize, save_tokenizer, tokenize
from ..storage.weights import open_module, read_json
from .words import Vocabulary, WordEncoder

# What a config says it is -> the class that holds the encoder alone.
CLASSES = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
logger = logging.getLogger(__name__)
SHOWN, MOST_WARNINGS = 100, 10  # characters of what was cut
MOST_TOKENS = 4096  # of a caption: attention takes memory by their square, and some tokenizers have no limit of their own


def clean_caption(text: str) -> str:
    """Without the broken characters, entities and line breaks of web pages, as captions in the training of such encoders are."""
    import ftfy  # a third of a second

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class PretrainedEncoder(nn.Module):
    """T5, UMT5 or CLIP's text encoder from a local folder: captions of any length to packed tokens, nothing padded.

    >>> encoder = PretrainedEncoder.from_pretrained("checkpoints/umt5-base")      # doctest: +SKIP
    >>> encoder(["a red circle moves right", ""]).cu_seqlens                      # doctest: +SKIP
    tensor([0, 7, 8], dtype=torch.int32)

    An empty caption is what the tokenizer makes of it, an end mark: the null conditioning. pooled is CLIP's own, else the mean
    of a caption's tokens. Captions longer than a model can take (CLIP: 77 tokens) are cut, as diffusers does.

    Args:
        model: of transformers, on any device; it is frozen.
        tokenizer: its tokenizer.
        longest: tokens of a caption, behind which it is cut, at most MOST_TOKENS; default: as many as the model or its tokenizer
            can take.
    """

    def __init__(self, model: Any, tokenizer: Any, *, longest: int | None = None) -> None:
        super().__init__()
        kind = model.config.model_type
        if kind not in CLASSES:
            raise ValueError(f"PretrainedEncoder: model: expected one of {', '.join(CLASSES)}, got {kind}")
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.dim = int(model.config.hidden_size)
        if longest is not None:
            if not 1 <= longest <= MOST_TOKENS:
                raise ValueError(f"PretrainedEncoder: longest: expected 1 to {MOST_TOKENS} tokens, got {longest}")
            tokenizer.model_max_length = longest  # which is saved with it
        positions = most_positions(model.config, "PretrainedEncoder") or MOST_TOKENS
        if not len(self._tokens([""])["input_ids"][0]):  # the null text of guidance
            raise ValueError(
                "PretrainedEncoder: tokenizer: expected one that marks the end of a text, got no token for an empty one"
            )
        self.longest = min(tokenizer.model_max_length, positions, MOST_TOKENS)
        self.warnings = 0

    def train(self, mode: bool = True) -> PretrainedEncoder:
        return self  # frozen: dropout never runs

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> PackedText:
        """captions: B strings. Returns tokens [M, D], cu_seqlens [B+1] and pooled [B, D] on the model's device."""
        if isinstance(captions, str):
            raise TypeError("PretrainedEncoder: captions: expected a list of strings, got one string")
        captions = [clean_caption(caption) for caption in captions]
        batch = self._tokens(captions, padding=True, return_tensors="pt", verbose=False)
        if batch["input_ids"].shape[1] > self.longest:
            self._warn_of_cuts(captions)
            cut = {"truncation": True, "max_length": self.longest}
            batch = self._tokens(captions, padding=True, return_tensors="pt", **cut)
        batch = batch.to(self.model.device)
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

    def _tokens(self, captions: Sequence[str], **options: Any) -> Any:
        return tokenize(self.tokenizer, captions, self.model.get_input_embeddings().num_embeddings, "PretrainedEncoder", **options)

    def _warn_of_cuts(self, captions: Sequence[str]) -> None:
        """Warns of what the encoder leaves out of a caption, of the first MOST_WARNINGS captions: training has many."""
        if self.warnings >= MOST_WARNINGS:
            return
        for ids in self._tokens(captions, verbose=False)["input_ids"] if captions else []:
            if len(ids) > self.longest:
                rest = detokenize(self.tokenizer, ids[self.longest - 1 :], "PretrainedEncoder")
                shown = rest if len(rest) <= SHOWN else f"{rest[:SHOWN]}..."
                self.warnings += 1
                logger.warning("a prompt of %d tokens is cut to %d, without: %s", len(ids), self.longest, shown)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes model and tokenizer as transformers does; weights keep their dtype, as T5 overflows in float16."""
        self.model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, tokenizer: str | Path | None = None, *, dtype: torch.dtype | None = None, **options: Any
    ) -> PretrainedEncoder:
        """Reads a checkpoint of transformers from a local folder.

        tokenizer: the folder of its tokenizer; default: the same. dtype: of the weights, but for those that transformers keeps in
        float32, as of T5 in float16; default: that of the files. options: see `PretrainedEncoder`.

        Raises:
            FileNotFoundError: no config.json or no safetensors there.
            ValueError: another kind of model; weights that are broken, missing, of another shape or not finite.
        """
        import transformers

        folder, owner = Path(folder), "PretrainedEncoder.from_pretrained"
        config = read_json(folder / "config.json", owner)
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in CLASSES:
            raise ValueError(f"{owner}: {folder / 'config.json'}: expected model_type out of {', '.join(CLASSES)}, got {kind}")
        reader = load_tokenizer(folder if tokenizer is None else Path(tokenizer), owner, kind)
        if isinstance(config.get("text_config"), dict):  # a whole CLIP
            config = config["text_config"]
        _check_distances(config, f"{owner}: {folder / 'config.json'}")
        return cls(open_pretrained(getattr(transformers, CLASSES[kind]), config, folder, owner, dtype), reader, **options)


def _check_distances(config: Mapping[str, Any], where: str) -> None:
    """T5 counts small distances between words one by one, in a quarter of its buckets, and larger ones by their logarithm."""
    buckets, most = config.get("relative_attention_num_buckets", 32), config.get("relative_attention_max_distance", 128)
    if not all(type(one) is int for one in (buckets, most)) or buckets < 4 or most <= buckets // 4:
        expected = "a distance above a quarter of the buckets, of which there are at least 4"
        raise ValueError(f"{where}: relative_attention_max_distance: expected {expected}, got {most!r} for {buckets!r} buckets")


def load_text_encoder(folder: str | Path) -> TextEncoder:
    """The text encoder of a checkpoint: a `WordEncoder`, or one of transformers."""
    folder, owner = Path(folder), "load_text_encoder"
    config = read_json(folder / "config.json", owner)
    if "model_type" in config:
        return PretrainedEncoder.from_pretrained(folder)
    encoder = open_module(lambda: WordEncoder(**config), config, folder, owner)
    encoder.vocabulary = Vocabulary.read(folder)
    return encoder
