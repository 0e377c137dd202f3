"""A video captioner, and the expansion of short prompts into detailed ones: `Captioner`.

    clean latents of any sizes -> packed encoder -> tokens |
    a short prompt -> the text encoder           -> tokens | -> decoder (transformers' GPT-2 with cross-attention) -> text

Sora's report describes both: captions written by a captioner, detailed ones for training, and short prompts made long before they
are generated from (after DALL-E 3: Betker et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sora_kernels.layout import PackedLayout

from ..limits import check_text
from ..model.block import Mlp, SelfAttention
from ..model.conditioning import PackedText
from ..model.config import DiTConfig
from ..model.dit import PLACES, places
from ..model.patches import embed_patches
from ..storage.files import save_module, settle
from ..storage.pretrained import load_tokenizer
from ..storage.tokenizer import detokenize, save_tokenizer, tokenize
from ..storage.weights import open_module, read_json
from ..text.words import WordEncoder

LONGEST = 4096  # tokens of a caption, which come one by one
MARKS = PAD, END, SHORT, DETAILED = "<pad>", "<end>", "<short>", "<detailed>"
LEAST_VOCABULARY = 256 + len(MARKS)  # bytes and marks, which every tokenizer has


@dataclass(frozen=True)
class CaptionerConfig:
    """Sizes of a captioner.

    Args:
        in_channels: of a latent.
        patch_size: (pt, ph, pw).
        num_frames: n_t, latent frames seen of a clip, evenly spread (see `patches.py`); None: tubelets of all of them.
        hidden_size: D of encoder and decoder.
        depth: layers of the encoder. decoder_depth: of the decoder.
        num_heads: of both.
        vocabulary: tokens of the byte-pair tokenizer.
        longest: tokens of a caption; of a longer one the first are learned, and that it goes on.
    """

    in_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_frames: int | None = 4
    hidden_size: int = 96
    depth: int = 2
    decoder_depth: int = 2
    num_heads: int = 4
    vocabulary: int = 512
    longest: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.num_frames is not None and (type(self.num_frames) is not int or self.num_frames < 1):
            raise ValueError(f"CaptionerConfig: num_frames: expected a number of at least 1 or None, got {self.num_frames!r}")
        if type(self.longest) is not int or not 2 <= self.longest <= LONGEST:
            raise ValueError(f"CaptionerConfig: longest: expected a number of tokens from 2 to {LONGEST}, got {self.longest!r}")
        if self.num_frames is not None and self.patch_size[0] != 1:
            raise ValueError(
                f"CaptionerConfig: num_frames: expected None (tubelets) with patches of several frames {self.patch_size}, "
                f"got {self.num_frames}"
            )


class Captioner(nn.Module):
    """Writes captions of latents, and detailed prompts from short ones.

    >>> captioner.caption([latent], detailed=True)
    ['A ... red circle ... moves right. The background is navy. ...']
    >>> captioner.expand(["a red circle moves right"])
    ['A ... red circle ... moves right. The background is ... The camera stays still.']

    Args:
        config: see `CaptionerConfig`.
        tokenizer: of transformers, with the special tokens of this file; see `train_tokenizer`.
    """

    def __init__(self, config: CaptionerConfig, tokenizer: Any) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.config, self.tokenizer = config, tokenizer
        dim = config.hidden_size
        encoder = DiTConfig(in_channels=config.in_channels, hidden_size=dim, num_heads=config.num_heads, depth=config.depth)
        self.patch_embed = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.place_embed = nn.Linear(6 * PLACES, dim, bias=False)
        self.layers = nn.ModuleList(VideoLayer(encoder) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.words = WordEncoder(dim, depth=1, num_heads=config.num_heads, buckets=1024)
        special = tokenizer.convert_tokens_to_ids([*MARKS])
        if not all(type(one) is int and 0 <= one < config.vocabulary for one in special):
            expected = f"ids from 0 to {config.vocabulary - 1} for {' '.join(MARKS)}"
            raise ValueError(f"Captioner: tokenizer: expected {expected}, got {special}")
        self.pad, self.end, self.short, self.detailed = special
        self.decoder: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocabulary,
                n_embd=dim,
                n_layer=config.decoder_depth,
                n_head=config.num_heads,
                n_positions=config.longest,
                add_cross_attention=True,
                bos_token_id=self.short,
                eos_token_id=self.end,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )

    def see(self, latents: Sequence[Tensor]) -> PackedText:
        """Tokens of clean latents [C, T, H, W] of any sizes, as the decoder reads them."""
        weight, config = self.patch_embed.weight, self.config
        inputs, bias = [latent.to(weight) for latent in latents], self.patch_embed.bias
        assert bias is not None
        x, layout = embed_patches(inputs, weight, bias, patch_size=config.patch_size, num_frames=config.num_frames)
        x = x + self.place_embed(places(layout).to(x))
        for layer in self.layers:
            x = layer(x, layout)
        return PackedText(self.norm(x), layout.cu_seqlens, x.new_zeros(layout.num_samples, 0))

    def loss(self, source: PackedText, captions: Sequence[str], detailed: Sequence[bool]) -> Tensor:
        """Mean negative log-likelihood of the captions' tokens, given what was seen or read."""
        rows = []
        for caption, long in zip(captions, detailed, strict=True):
            tokens = tokenize(self.tokenizer, caption, self.config.vocabulary, "Captioner")["input_ids"]
            written = [*tokens, self.end][: self.config.longest - 1]  # no end where it is cut off
            rows.append(torch.tensor([self.detailed if long else self.short, *written]))
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad).to(source.tokens.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        states, seen = _padded(source)
        labels = ids.masked_fill(mask == 0, -100)
        return self.decoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=states, encoder_attention_mask=seen, labels=labels
        ).loss

    @torch.no_grad()
    def caption(self, latents: Sequence[Tensor], *, detailed: bool = False) -> list[str]:
        """What is seen in each of the latents, most likely word after most likely word."""
        return self._write(self.see(latents), detailed)

    @torch.no_grad()
    def expand(self, prompts: Sequence[str]) -> list[str]:
        """A detailed prompt for each short one. Raises ValueError for one over the limit of texts."""
        for prompt in prompts:
            check_text(prompt, "Captioner.expand: prompts")
        return self._write(self.words(prompts), True)

    def _write(self, source: PackedText, detailed: bool) -> list[str]:
        states, seen = _padded(source)
        start = torch.full((len(states), 1), self.detailed if detailed else self.short, device=states.device)
        ids = self.decoder.generate(
            start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=states,
            encoder_attention_mask=seen,
            max_new_tokens=self.config.longest - 1,
            pad_token_id=self.pad,  # not in the config: the decoder would warn of every caption that ends before others do
            do_sample=False,
        )
        return [detokenize(self.tokenizer, row, "Captioner").strip() for row in ids]

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes config.json, model.safetensors and the tokenizer into a folder."""
        save_module(self, asdict(self.config), Path(folder), dtype)
        save_tokenizer(self.tokenizer, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Captioner:
        """Reads what `save_pretrained` wrote, in float32; a write that was killed is first ended (`settle`)."""
        folder, owner = Path(folder), "Captioner.from_pretrained"
        settle(folder)
        values = read_json(folder / "config.json", owner)
        tokenizer = load_tokenizer(folder, owner)
        return open_module(lambda: cls(CaptionerConfig(**values), tokenizer), values, folder, owner).float().eval()


class VideoLayer(nn.Module):
    """A pre-norm transformer layer on packed patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = SelfAttention(config), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        x = x + self.attention(self.norm_attention(x), layout)
        return x + self.mlp(self.norm_mlp(x))


def train_tokenizer(captions: Iterable[str], vocabulary: int = 512) -> Any:
    """A byte-pair tokenizer of some captions; it can write any other text too, in more tokens.

    vocabulary: its tokens, LEAST_VOCABULARY or more.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def _padded(source: PackedText) -> tuple[Tensor, Tensor]:
    """Packed tokens as transformers wants them: [B, longest, D], and a mask."""
    parts = source.tokens.split(source.cu_seqlens.diff().tolist())
    mask = [torch.ones(len(part), dtype=torch.long, device=part.device) for part in parts]
    return pad_sequence(list(parts), batch_first=True), pad_sequence(mask, batch_first=True)
