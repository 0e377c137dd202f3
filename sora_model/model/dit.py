"""A diffusion transformer over latents of any sizes, packed into one sequence.

    x, layout = patches of every latent, packed end to end
    c         = embedding of the noise level + of the pooled text or the class, per sample or per token frame
    blocks    attention, cross-attention to text, MLP; shifts, scales and gates from c
    output    patches of linear(modulate(norm(x))), put back together

Sources: Peebles and Xie, Scalable Diffusion Models with Transformers (2023): adaLN-Zero, embeddings, initialisation; Chen et al.,
PixArt-alpha (2023): the output projection of cross-attention is zero at first; Li and He, Back to Basics: Let Denoising Generative
Models Denoise (JiT, 2025): a network that puts out x, trained on velocities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sora_kernels.layout import PackedLayout, Span
from sora_kernels.patch_embed import patch_embed_3d, unpatchify_3d

from .block import Block, Context, ImageProjection, Mlp, Residual, TextKeys, Window
from .conditioning import PackedText, Samples
from .config import DiTConfig

if TYPE_CHECKING:
    from .step_cache import CachedSamples

FREQUENCIES = 256  # channels of the timestep's sinusoids
PLACES = 32  # channels of the sinusoids of each of t, h and w, and of how much of an axis a token covers
TIMESTEPS = 1000  # the timestep of pure noise
LOWEST_SIGMA = 1e-4  # a velocity is a quotient by sigma, which is 0 for clean frames


class Begun(NamedTuple):
    """A pass before its first block.

    x: tokens [N, D]. c: conditioning [R, D]. modulations: of each block, [R, 6D].
    """

    samples: Samples
    x: Tensor
    c: Tensor
    modulations: list[Tensor]
    context: Context


def sinusoids(positions: Tensor, dim: int, shift: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """[cos(x w_i), sin(x w_i)], w_i = 10000**(-i / (dim/2 - shift)), computed in `dtype`: [n] -> float32 [n, dim]."""
    half = torch.arange(dim // 2, dtype=dtype, device=positions.device)
    angles = positions.to(dtype)[:, None] * (-math.log(10000) * half / (dim // 2 - shift)).exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def places(layout: PackedLayout) -> Tensor:
    """Sinusoids of where each token lies on its grid, along each axis from 0 to 1, and of what share of it it covers.

    float32 [N, 6 * PLACES]. Shares rather than sizes: for ever larger grids they go to 0, near what finer ones were trained on.
    """
    rows = torch.stack([layout.origin, layout.step, layout.grid], dim=1)  # of each span
    origin, step, grid = rows.repeat_interleave(layout.cu_spans.diff(), 0, output_size=layout.num_tokens).unbind(1)
    place = torch.cat([((layout.positions() - origin) / step + 0.5) / grid, 1 / grid], dim=1)
    quarter_turns = torch.pi / 2 * torch.arange(PLACES // 2, device=place.device)
    angles = (place[:, :, None] * quarter_turns).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def embedder(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class DiT(nn.Module):
    """A diffusion transformer; see the top of this file.

    >>> dit = DiT(DiTConfig.preset("S", patch=(1, 2, 2), in_channels=16, text_dim=256))
    >>> latents = [torch.randn(16, 8, 32, 32), torch.randn(16, 1, 64, 36)]                  # a video and an image
    >>> from sora_model.text.words import WordEncoder
    >>> text = WordEncoder(dim=256)(["a storm", "a cat"])
    >>> [tuple(x.shape) for x in dit(latents, torch.tensor([700.0, 20.0]), text)]
    [(16, 8, 32, 32), (16, 1, 64, 36)]

    Set `gradient_checkpointing` to keep two [N, D] per block for the backward and compute the rest again.
    """

    blocks: list[Block]

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim = config.hidden_size
        # Conv3d only holds the weights: patch_embed_3d computes the same as one matrix product.
        self.patch_embed = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.place_embed = nn.Linear(6 * PLACES, dim, bias=False) if config.absolute_positions else None
        self.time_embed = embedder(FREQUENCIES, dim)
        projected = config.text_projection
        self.text_embed = embedder(config.text_dim, dim) if config.text_dim and not projected else None
        self.text_projection = Mlp(config.text_dim, dim, dim) if config.text_dim and projected else None
        self.image_projection = ImageProjection(config) if config.image_dim else None
        self.label_embed = nn.Embedding(config.num_classes + 1, dim) if config.num_classes else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))  # type: ignore[assignment]
        self.shared_modulation = nn.Linear(dim, 6 * dim) if config.modulation != "block" else None
        self.final_modulation = nn.Linear(dim, 2 * dim) if config.modulation != "tables" else None
        self.final_offset = nn.Parameter(torch.zeros(2 * dim)) if config.modulation == "tables" else None
        self.final_norm = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        pt, ph, pw = config.patch_size
        self.final = nn.Linear(dim, pt * ph * pw * config.out_channels)
        self._initialize()

    def forward(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        text: PackedText | None = None,
        labels: Tensor | None = None,
        frame_steps: Sequence[float] | None = None,
        image_tokens: Sequence[Tensor] | None = None,
        *,
        window: Window | None = None,
        cache: CachedSamples | None = None,
    ) -> list[Tensor]:
        """Predicts what the model was trained for (noise, velocity, ...) for every latent.

        Args:
            latents: B tensors [C, T, H, W] of any sizes divisible by the patch, with the channels of a condition behind their own.
            timesteps: noise levels as the scheduler counts them: [B], one per sample, or [F], one per token frame in packed order
                (T/pt of each latent). The former costs less; where both say the same, so do the results.
            text: captions of the B samples, for a model with text; None is no text.
            labels: int64 [B], for a model with classes.
            frame_steps: how far apart in time each latent's token frames are, where they were sampled evenly from a longer clip
                (`patches.uniform_frames`); default: 1.
            image_tokens: CLIP's [n, image_dim] of the images of each sample, for a model with an image_dim.
            window: how many tokens a token sees along T, H and W, of models trained to see all of them an approximation; default:
                the whole sample.
            cache: of `StepCache`, which leaves out blocks of a sample where the step before is near enough.

        Returns:
            B tensors [out_channels, T, H, W], in the model's dtype or, with prediction="clean", in the latents' if that is wider.

        Raises:
            ValueError: sizes that the patch does not divide, a number of timesteps, captions or labels that does not fit,
                a video for a model with sin-cos positions.
        """
        samples = Samples(latents, timesteps, text, labels, frame_steps, image_tokens)
        if cache is not None:
            if not hasattr(cache, "run"):
                self._fail("cache", "what StepCache.of returns", type(cache).__name__, TypeError)
            return cache.run(self, samples, window)
        begun = self.begin(samples, window)
        return self.end(begun, self.run_blocks(begun, Residual(begun.x)))

    def begin(self, samples: Samples, window: Window | None = None) -> Begun:
        """What comes before the blocks; see `forward`."""
        latents, timesteps, text, labels, frame_steps, image_tokens = samples
        weight, patch = self.final.weight, self.config.patch_size
        inputs = [latent.to(weight) for latent in latents]
        weights = self.patch_embed.weight, self.patch_embed.bias
        x, layout = patch_embed_3d(inputs, *weights, patch_size=patch, layout=self._layout(inputs, frame_steps))
        if torch.is_autocast_enabled(x.device.type):  # the residual stream too, as it is what the kernels read and write
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.config.positions == "sincos":
            x = x + self._sincos(layout).to(x)
        if self.place_embed is not None:
            x = x + self.place_embed(places(layout).to(x))
        if text_dim := self.config.text_dim:
            text = PackedText.empty(len(latents), text_dim) if text is None else text
            text = text.to(weight.device, weight.dtype)
        c, cu_rows = self._condition(layout, timesteps, text, labels)
        keys = None if text is None else self._text_keys(text, layout)
        if (image_tokens is None) != (self.image_projection is None) or len(image_tokens or latents) != len(latents):
            expected = "None (no image_dim)" if self.image_projection is None else f"tokens of {len(latents)} samples"
            self._fail("image_tokens", expected, None if image_tokens is None else len(image_tokens))
        if keys is not None and image_tokens is not None and self.image_projection is not None:
            keys = keys._replace(images=self.image_projection(image_tokens))
        return Begun(samples, x, c, self._modulations(c), Context(layout, cu_rows, keys, window))

    def run_blocks(self, begun: Begun, stream: Residual, first: int = 0, last: int | None = None) -> Residual:
        """The stream behind blocks[first:last]."""
        for block, modulation in zip(list(self.blocks)[first:last], begun.modulations[first:last], strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                stream = checkpoint(block, stream, modulation, begun.context, use_reentrant=False)
            else:
                stream = block(stream, modulation, begun.context)
        return stream

    def end(self, begun: Begun, stream: Residual) -> list[Tensor]:
        """What comes after the blocks."""
        context, samples = begun.context, begun.samples
        shift, scale = self._final_modulation(begun.c).chunk(2, dim=1)
        _, y = stream.norm_modulate(shift, scale, context.cu_rows, self.final_norm)
        outputs = unpatchify_3d(self.final(y), context.layout, patch_size=self.config.patch_size)
        return outputs if self.config.prediction == "direct" else self._velocities(samples.latents, outputs, samples.timesteps)

    def _text_keys(self, text: PackedText, layout: PackedLayout) -> TextKeys:
        """Captions as cross-attention takes them. With a text_length they are as if padded with zeros up to it."""
        if self.text_projection is None:
            return TextKeys(text.tokens, text.cu_seqlens)
        length = self.config.text_length
        if length is None:
            return TextKeys(self.text_projection(text.tokens), text.cu_seqlens)
        padding = length - text.cu_seqlens.diff()
        of_tokens = padding.clamp(min=0).float().log().repeat_interleave(layout.cu_seqlens.diff(), output_size=layout.num_tokens)
        return TextKeys(self.text_projection(F.pad(text.tokens, (0, 0, 0, 1))), text.cu_seqlens, of_tokens[:, None])

    def _layout(self, latents: Sequence[Tensor], frame_steps: Sequence[float] | None) -> PackedLayout | None:
        """The tokens' layout, where the config or the frames' steps move their positions; None where they count from zero."""
        size = self.config.rope_size
        if size is None and (frame_steps is None or all(step == 1 for step in frame_steps)):
            return None
        if any(x.ndim != 4 for x in latents):
            return None  # patch_embed_3d says what is wrong
        pt, ph, pw = self.config.patch_size
        grids = [(x.shape[1] // pt, x.shape[2] // ph, x.shape[3] // pw) for x in latents]
        across = [1.0 if size is None else size / max(min(grid[1:]), 1) for grid in grids]
        along = [1.0] * len(grids) if frame_steps is None else frame_steps
        spans = [[Span(grid, step=(t, s, s))] for grid, t, s in zip(grids, along, across, strict=True)]
        return PackedLayout.from_spans(spans, latents[0].device)

    def _modulations(self, c: Tensor) -> list[Tensor]:
        """Every block's [R, 6D]; those of tables are float32, as Wan's are."""
        c = F.silu(c)
        if self.shared_modulation is None:
            return [block.modulation(c) for block in self.blocks]
        shared = self.shared_modulation(c)
        shared = shared.float() if self.config.modulation == "tables" and shared.dtype.itemsize < 4 else shared
        return [shared + block.offset.to(shared) for block in self.blocks]

    def _final_modulation(self, c: Tensor) -> Tensor:
        """[R, 2D]."""
        if self.final_modulation is not None:
            return self.final_modulation(F.silu(c))
        offset: Any = self.final_offset
        return offset.to(torch.promote_types(c.dtype, torch.float32)) + c.repeat(1, 2)

    def _velocities(self, latents: Sequence[Tensor], clean: list[Tensor], timesteps: Tensor) -> list[Tensor]:
        """(x_sigma - x) / sigma of each latent."""
        pt = self.config.patch_size[0]
        levels = [1 if len(timesteps) == len(latents) else latent.shape[1] // pt for latent in latents]
        sigmas = (timesteps.to(clean[0].device) / TIMESTEPS).clamp(min=LOWEST_SIGMA).split(levels)
        return [
            (noised.to(x.device) - x) / sigma.repeat_interleave(x.shape[1] // len(sigma))[:, None, None]
            for noised, x, sigma in zip(latents, clean, sigmas, strict=True)
        ]

    def _condition(
        self, layout: PackedLayout, timesteps: Tensor, text: PackedText | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The conditioning rows [R, D], and int32 [R+1], the tokens that each serves."""
        samples = layout.num_samples
        weight = self.final.weight
        if timesteps.ndim != 1 or timesteps.shape[0] not in (samples, layout.num_frames):
            self._fail("timesteps", f"[{samples}] (samples) or [{layout.num_frames}] (token frames)", list(timesteps.shape))
        computed_in = torch.float32 if self.config.timestep_float32 else torch.float64
        frequencies = sinusoids(timesteps.to(weight.device), FREQUENCIES, self.config.timestep_shift, computed_in)
        time_weight: Any = self.time_embed[0].weight
        c = self.time_embed(frequencies.to(time_weight))
        c = c if time_weight.dtype == weight.dtype else c.to(weight.dtype)  # Wan's time embedding is in float32
        per_sample = self._label_or_text(samples, text, labels)
        if timesteps.shape[0] == samples:
            return c if per_sample is None else c + per_sample, layout.cu_seqlens
        if per_sample is not None:
            frames = torch.tensor([sample[0].num_frames for sample in layout.spans], device=c.device)
            c = c + per_sample.repeat_interleave(frames, dim=0, output_size=layout.num_frames)
        return c, layout.cu_frames

    def _label_or_text(self, samples: int, text: PackedText | None, labels: Tensor | None) -> Tensor | None:
        """What text and labels add to the conditioning of each sample [B, D]."""
        if text is not None and (self.config.text_dim is None or text.num_samples != samples):
            self._fail("text", "None (no text_dim)" if self.config.text_dim is None else f"{samples} captions", text.num_samples)
        if (labels is None) != (self.label_embed is None) or (labels is not None and labels.shape != (samples,)):
            expected = "None (no num_classes)" if self.label_embed is None else f"[{samples}]"
            self._fail("labels", expected, None if labels is None else list(labels.shape))
        added = [] if self.label_embed is None else [self.label_embed(labels)]
        if self.text_embed is not None and text is not None:
            added.append(self.text_embed(text.pooled))
        return sum(added[1:], added[0]) if added else None

    def _sincos(self, layout: PackedLayout) -> Tensor:
        """Sines and cosines of w, then of h: float32 [N, D]."""
        grids = [sample[0].grid for sample in layout.spans]
        for grid in grids:
            if grid[0] > 1:
                self._fail("latents", "images (T = pt): positions='sincos' tells h and w only", f"{grid[0]} token frames")
        if size := self.config.sincos_size:
            spans = [[Span(grid, step=(1.0, size / grid[1], size / grid[2]))] for grid in grids]
            layout = PackedLayout.from_spans(spans, layout.device)
        _, h, w = layout.positions().unbind(1)
        half = self.config.hidden_size // 2
        # `sinusoids` puts cosines first, the DiT paper's positions put them last.
        return torch.cat([sinusoids(axis, half).roll(half // 2, dims=1) for axis in (w, h)], dim=1)

    def _initialize(self) -> None:
        """As in the DiT paper's code, but for the embedders, whose 0.02 suits wide models only. Residuals and output start at 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        zero: list[Any] = [self.final]
        zero += [] if self.final_modulation is None else [self.final_modulation]
        zero += [block.modulation for block in self.blocks] if self.shared_modulation is None else [self.shared_modulation]
        zero += [block.cross_attention.out for block in self.blocks if block.cross_attention is not None]
        for layer in zero:
            nn.init.zeros_(layer.weight)

    def _fail(self, argument: str, expected: str, actual: object, kind: type[Exception] = ValueError) -> None:
        raise kind(f"DiT: {argument}: expected {expected}, got {actual}")
