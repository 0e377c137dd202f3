"""A small text encoder that needs no download: hashed words, learned vectors, a short transformer on packed attention."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from sora_kernels.attention import flash_attn_varlen_qkvpacked_func

from ..model.block import Mlp
from ..model.conditioning import PackedText
from ..model.dit import sinusoids
from ..storage.documents import read_text_file
from ..storage.files import save_module

_WORD = re.compile(r"\w+|[^\w\s]")
VOCABULARY = "vocab.txt"
WORDS = 2**20  # of it; all of English has fewer


def hash_words(caption: str, buckets: int) -> list[tuple[int, int]]:
    """Two bucket numbers from 1 to `buckets` for every word and punctuation mark of a caption; case does not matter.

    >>> hash_words("A red circle.", 8192) == hash_words("a red circle .", 8192)
    True

    The numbers are digits, to the base `buckets`, of the word's CRC-32, so they are the same on every machine. Two words are told
    apart unless their numbers agree, in whatever order, as they are summed: once in 34 million pairs with 8192 buckets.
    """
    codes = (zlib.crc32(word.encode()) for word in _WORD.findall(caption.lower()))
    return [(code % buckets + 1, code // buckets % buckets + 1) for code in codes]


class Vocabulary(set[str]):
    """The words of captions that an encoder was trained on. Copies of the encoder, such as averages of its weights, share it."""

    def learn(self, captions: Sequence[str]) -> None:
        for caption in captions:
            self.update(_WORD.findall(caption.lower()))

    def unknown(self, captions: Sequence[str]) -> list[str]:
        """The words of captions that are not here, each once; marks are no words."""
        words = (word for caption in captions for word in _WORD.findall(caption.lower()))
        return [word for word in dict.fromkeys(words) if word not in self and word[0].isalnum()]

    def __deepcopy__(self, _: object) -> Vocabulary:
        return self

    def save(self, folder: Path) -> None:
        """vocab.txt, a word a line."""
        (folder / VOCABULARY).write_text("".join(f"{word}\n" for word in sorted(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Vocabulary | None:
        """None where there is no vocab.txt: which words the encoder has learned is then not known."""
        path = folder / VOCABULARY
        if not path.is_file():
            return None
        try:
            text = read_text_file(path, "tokenizer_bytes")
        except UnicodeDecodeError as error:
            raise ValueError(f"Vocabulary.read: {path}: expected text in UTF-8, got {error}") from None
        words = text.split(maxsplit=WORDS)
        if len(words) > WORDS:
            raise ValueError(f"Vocabulary.read: {path}: expected at most {WORDS} words, got more")
        return cls(words)


class WordEncoder(nn.Module):
    """Captions of any length -> `PackedText`; trained together with the model it serves.

    >>> encoder = WordEncoder(dim=256)
    >>> encoder(["a red circle moves right", ""]).tokens.shape
    torch.Size([6, 256])

    A word is the sum of two vectors of one table (see `hash_words`). A caption without words is one learned null token.
    pooled is the mean of a caption's tokens. Any word has a vector; `vocabulary` says which ones mean something: those seen in
    training mode.

    Args:
        dim: D, a multiple of 2 * num_heads.
        depth: transformer layers.
        num_heads: H.
        buckets: rows of the table.
    """

    def __init__(self, dim: int = 256, depth: int = 1, num_heads: int = 4, buckets: int = 8192) -> None:
        super().__init__()
        if min(dim, num_heads, buckets) < 1 or depth < 0 or dim % (2 * num_heads):
            raise ValueError(
                "WordEncoder: expected dim a multiple of 2 * num_heads, num_heads and buckets >= 1 and depth >= 0, "
                f"got dim={dim}, num_heads={num_heads}, buckets={buckets}, depth={depth}"
            )
        self.config = {"dim": dim, "depth": depth, "num_heads": num_heads, "buckets": buckets}
        self.dim, self.buckets = dim, buckets
        self.vocabulary: Vocabulary | None = Vocabulary()  # None: words were learned that are not known
        self.words = nn.Embedding(buckets + 1, dim)  # row 0 is the null token
        self.layers = nn.ModuleList(TextLayer(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.words.weight, std=0.5**0.5)

    def forward(self, captions: Sequence[str]) -> PackedText:
        """captions: B strings. Returns tokens [M, D], cu_seqlens [B+1] and pooled [B, D] on the encoder's device."""
        if isinstance(captions, str):
            raise TypeError("WordEncoder: captions: expected a list of strings, got one string")
        if self.training and self.vocabulary is not None:
            self.vocabulary.learn(captions)
        device = self.words.weight.device
        words = [hash_words(caption, self.buckets) or [(0, 0)] for caption in captions]
        lengths = [len(word) for word in words]
        ids = torch.tensor([word for caption in words for word in caption], device=device).view(-1, 2)
        places = torch.tensor([place for length in lengths for place in range(length)], device=device)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        x = self.words(ids).sum(1)
        x = x + sinusoids(places, self.dim).to(x)
        for layer in self.layers:
            x = layer(x, cu_seqlens)
        x = self.norm(x)
        # segment_reduce adds up in x's dtype: the mean is taken in float32.
        pooled = torch.segment_reduce(x.float(), "mean", offsets=cu_seqlens.long(), axis=0).to(x.dtype)
        return PackedText(x, cu_seqlens, pooled)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes config.json, model.safetensors and the vocabulary."""
        save_module(self, self.config, Path(folder), dtype)
        if self.vocabulary is not None:
            self.vocabulary.save(Path(folder))


class TextLayer(nn.Module):
    """A pre-norm transformer layer on packed tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(1, (3, self.num_heads, -1))  # [M, 3, H, d]
        x = x + self.out(flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens).flatten(1))
        return x + self.mlp(self.norm_mlp(x))
