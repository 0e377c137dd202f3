"""Sizes and choices of a diffusion transformer, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

LONGEST_TEXT = 2**20  # tokens that captions count as, whatever they have
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"depth": 4, "hidden_size": 128, "num_heads": 4, "absolute_positions": True},
    "XS": {"depth": 6, "hidden_size": 192, "num_heads": 6, "absolute_positions": True, "rope_size": 4, "modulation": "shared"},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}


@dataclass(frozen=True)
class DiTConfig:
    """What a `DiT` is made of.

    >>> config = DiTConfig.preset("S", patch=(1, 2, 2), in_channels=16, text_dim=256)
    >>> DiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    True

    Args:
        in_channels: channels of what is patched: of a latent, and of what is given with it.
        condition_channels: the last ones of them, which are given and not predicted: of Wan's image-to-video models, which frames
            are given and what they show.
        patch_size: (pt, ph, pw), latent positions per token.
        hidden_size: D, a multiple of num_heads.
        depth: blocks.
        num_heads: H; D / H must be even.
        mlp_ratio: hidden width of the MLP, in D.
        mlp_size: hidden width of the MLP, in place of mlp_ratio.
        eps: of all norms.
        qk_norm: RMS-normalise queries and keys per head; with positions="rope" only.
        qk_norm_across_heads: with qk_norm, take the mean over all heads of a token (Wan).
        positions: "rope", 3D rotary for videos; "sincos", added to the tokens as in the DiT paper: h and w only, for images.
        rope_theta: base of the rotary frequencies.
        rope_size: tokens along the shorter side of a frame that rotary positions are stretched onto, so that a larger frame is the
            same picture seen more finely; None counts tokens.
        absolute_positions: with positions="rope", also add to each token a learned linear map of sinusoids of where it lies, as
            fractions of the clip's length, height and width (NaViT: Dehghani et al., 2023), and of how much of them it covers.
            Rotary positions are relative: without this, a network finds out only late in its training which end of a clip is
            the first.
        sincos_size: tokens along a side of the grid that other grids are stretched onto, as diffusers does; None counts 0, 1, 2...
        text_dim: width of the text tokens; None for a model without text.
        text_projection: two linear layers with a GELU bring tokens of text to hidden_size once, for all blocks, and pooled text is
            not used (Wan).
        text_length: with text_projection, attend as if each caption were padded with tokens of zeros up to this length, as Wan was
            trained (512). Padding is computed as one key.
        image_dim: width of CLIP's tokens of an image, to which cross-attention attends, too, with keys and values of their own
            (Wan 2.1's image-to-video models).
        image_positions: tokens of a sample's images, to each of which a learned vector is added (those of first and last frames).
        cross_attention_norms: a LayerNorm with weights before cross-attention, and RMS norms of its queries and keys across heads
            (Wan).
        num_classes: class labels; label num_classes means none. None for a model without labels.
        modulation: "block": every block has a linear layer from the conditioning to its shifts, scales and gates, as in the DiT
            paper; "shared": one for all, to which each block adds a vector of its own (PixArt-alpha's adaLN-single), which saves a
            quarter of the weights; "tables": the same, and the last shift and scale are a vector plus the conditioning itself,
            all added in float32 (Wan).
        prediction: "direct": the network puts out what the scheduler asks for. "clean": it puts out the clean latent x, and the
            model returns flow matching's velocity, (x_sigma - x) / sigma (JiT: Li and He, 2025). Noise need not pass through the
            network then, so it learns much faster where a patch holds many numbers next to hidden_size, as patches of pixels do.
        learn_sigma: predict 2 * in_channels; the second half is the variance, as in the DiT paper.
        timestep_shift: of the 128 timestep frequencies 10000**(-i / (128 - shift)): 0 in the DiT paper's code, 1 in diffusers.
        timestep_float32: compute them in float32, as diffusers and the DiT paper's code do: of large timesteps that is 1e-5 off.
    """

    in_channels: int = 3
    condition_channels: int = 0
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    mlp_size: int | None = None
    eps: float = 1e-6
    qk_norm: bool = True
    qk_norm_across_heads: bool = False
    positions: str = "rope"
    rope_theta: float = 256.0
    rope_size: int | None = None
    absolute_positions: bool = False
    sincos_size: int | None = None
    text_dim: int | None = None
    text_projection: bool = False
    text_length: int | None = None
    image_dim: int | None = None
    image_positions: int | None = None
    cross_attention_norms: bool = False
    num_classes: int | None = None
    modulation: str = "block"
    prediction: str = "direct"
    learn_sigma: bool = False
    timestep_shift: int = 0
    timestep_float32: bool = False

    @classmethod
    def preset(cls, name: str, *, patch: tuple[int, int, int], in_channels: int, **changes: Any) -> DiTConfig:
        """DiT-S, -B, -L or -XL of the DiT paper, or "tiny" and "XS" for a CPU; `changes` are further fields."""
        if name not in PRESETS:
            raise ValueError(f"DiTConfig.preset: name: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], "patch_size": patch, "in_channels": in_channels, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiTConfig:
        """The inverse of `to_dict`; an unknown key is an error."""
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"DiTConfig: expected keys out of {', '.join(known)}, got {', '.join(unknown)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @property
    def latent_channels(self) -> int:
        return self.in_channels - self.condition_channels

    @property
    def out_channels(self) -> int:
        return self.latent_channels * (2 if self.learn_sigma else 1)

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_ratio) if self.mlp_size is None else self.mlp_size

    @property
    def context_dim(self) -> int | None:
        """Width of the tokens that cross-attention takes."""
        return self.hidden_size if self.text_projection else self.text_dim

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "patch_size", tuple(int(p) for p in self.patch_size))
        except (TypeError, ValueError):
            self._fail("patch_size", "three sizes (pt, ph, pw)", self.patch_size)
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            self._fail("patch_size", "three sizes (pt, ph, pw) of at least 1", self.patch_size)
        optionals = "mlp_size", "rope_size", "sincos_size", "text_dim", "text_length", "image_dim", "image_positions", "num_classes"
        for name in ("in_channels", "hidden_size", "depth", "num_heads", *optionals):
            value, optional = getattr(self, name), name in optionals
            if not (optional and value is None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                self._fail(name, "a number of at least 1" + (" or None" if optional else ""), value)
        if self.text_length is not None and self.text_length > LONGEST_TEXT:
            self._fail("text_length", f"at most {LONGEST_TEXT} tokens", self.text_length)
        if type(self.condition_channels) is not int or not 0 <= self.condition_channels < self.in_channels:
            self._fail("condition_channels", f"from 0 to below in_channels {self.in_channels}", self.condition_channels)
        if self.hidden_size % (2 * self.num_heads):
            self._fail("hidden_size", f"a multiple of 2 * num_heads = {2 * self.num_heads}", self.hidden_size)
        if self.positions not in ("rope", "sincos"):
            self._fail("positions", "'rope' or 'sincos'", self.positions)
        if self.modulation not in ("block", "shared", "tables"):
            self._fail("modulation", "'block', 'shared' or 'tables'", self.modulation)
        for field in fields(self):
            if isinstance(field.default, bool) and not isinstance(getattr(self, field.name), bool):
                self._fail(field.name, "true or false", getattr(self, field.name))
        for name in ("mlp_ratio", "rope_theta"):
            number = getattr(self, name)
            if type(number) not in (int, float) or not 0 < number < math.inf:
                self._fail(name, "a number above 0", number)
        if type(self.timestep_shift) is not int or not 0 <= self.timestep_shift < 128:
            self._fail("timestep_shift", "a whole number from 0 to 127", self.timestep_shift)
        if not isinstance(self.eps, int | float) or not 0 < self.eps < 1:
            self._fail("eps", "a number between 0 and 1", self.eps)
        for name, needed in (
            ("qk_norm_across_heads", "qk_norm"),
            ("text_projection", "text_dim"),
            ("text_length", "text_projection"),
            ("image_dim", "cross_attention_norms"),
            ("image_positions", "image_dim"),
            ("cross_attention_norms", "text_dim"),
        ):
            if getattr(self, name) and not getattr(self, needed):
                self._fail(needed, f"a value with {name}", getattr(self, needed))
        if self.prediction not in ("direct", "clean"):
            self._fail("prediction", "'direct' or 'clean'", self.prediction)
        for name, none in (("learn_sigma", False), ("condition_channels", 0)):
            if self.prediction == "clean" and getattr(self, name):
                self._fail(name, f"{none} with prediction='clean'", getattr(self, name))
        if self.positions == "sincos" and self.absolute_positions:
            self._fail("absolute_positions", "False with positions='sincos'", self.absolute_positions)
        if self.positions == "sincos" and self.qk_norm:
            self._fail("qk_norm", "False with positions='sincos'", self.qk_norm)
        if self.positions == "sincos" and self.hidden_size % 4:
            self._fail("hidden_size", "a multiple of 4 with positions='sincos'", self.hidden_size)

    def _fail(self, field: str, expected: str, actual: object) -> None:
        raise ValueError(f"DiTConfig: {field}: expected {expected}, got {actual!r}")
