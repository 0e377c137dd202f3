"""One training step (loss and all gradients) of a two-block DiT of S width on a packed batch, against its weights in plain torch.

On a GPU it runs in bfloat16 on the large batch: the small one would measure Python.

The peers are a DiT on dense tensors, run over the samples one by one or on the batch padded to its longest sample, as one does
without packing. Both get their latents cut into patches, and their RoPE tables, before the clock starts.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from benchmarks.bench_adaln import modulate
from benchmarks.bench_rope import norm_rotate, rope_tables
from benchmarks.race import BOTH, DEVICE, MAIN, ON_GPU, OURS, Implementation, Race, randn
from benchmarks.race import LAYOUT as LARGE
from sora_kernels.layout import PackedLayout
from sora_model.model.config import DiTConfig
from sora_model.model.dit import FREQUENCIES, DiT, sinusoids

SMALL = PackedLayout.from_grids([(1, 16, 16), (4, 16, 16), (4, 20, 20), (16, 16, 16), (1, 24, 24), (1, 32, 18)], DEVICE)
LAYOUT = LARGE if ON_GPU else SMALL
CONFIG = DiTConfig.preset("S", patch=(1, 2, 2), in_channels=16, depth=2)


def dense_dit(dit: DiT, patches: Tensor, timesteps: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
    """patches [B, S, K], timesteps [B], cos and sin [B, S, 1, d/2], mask bool [B, S] -> predicted patches [B, S, K]."""

    def attend(attention: torch.nn.Module, y: Tensor) -> Tensor:
        q, k, v = attention.qkv(y).unflatten(-1, (3, CONFIG.num_heads, -1)).unbind(2)
        q, k = norm_rotate(q, k, attention.q_norm, attention.k_norm, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = None if mask is None else mask[:, None, None]
        return attention.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))

    def mlp(layers: torch.nn.Sequential, y: Tensor) -> Tensor:
        for layer in layers:
            y = layer(y)
        return y

    def same(row: Tensor) -> Tensor:  # [B, 1, D] serves the S tokens of its sample by broadcasting
        return row

    x = F.linear(patches, dit.patch_embed.weight.flatten(1), dit.patch_embed.bias)
    c = F.silu(dit.time_embed(sinusoids(timesteps, FREQUENCIES).type_as(patches)))[:, None]
    for block in dit.blocks:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.modulation(c).chunk(6, dim=-1)
        x = x + gate * attend(block.attention, modulate(x, shift, scale, same))
        x = x + gate_mlp * mlp(block.mlp, modulate(x, shift_mlp, scale_mlp, same))
    return dit.final(modulate(x, *dit.final_modulation(c).chunk(2, dim=-1), same))


class Dense(torch.nn.Module):
    """`dense_dit` with parameters that `functional_call` can replace."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, *args: Tensor) -> Tensor:
        return dense_dit(self.dit, *args)


def cut(videos: Sequence[Tensor], channels: str) -> list[Tensor]:
    """Each video's patches [S, K], their channels in the given order."""
    pt, ph, pw = CONFIG.patch_size
    return [rearrange(x, f"c (t pt) (h ph) (w pw) -> (t h w) ({channels})", pt=pt, ph=ph, pw=pw) for x in videos]


def training_step() -> Race:
    torch.manual_seed(0)
    dit = DiT(CONFIG).to(DEVICE, MAIN)
    parameters = list(dit.parameters())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.05)  # at its own initialisation most gradients are zero
    shapes = [[n * p for n, p in zip(sample[0].grid, CONFIG.patch_size, strict=True)] for sample in LAYOUT.spans]
    latents, targets = ([randn(CONFIG.in_channels, *shape, dtype=MAIN) for shape in shapes] for _ in range(2))
    timesteps = torch.linspace(50, 950, LAYOUT.num_samples, device=DEVICE)
    cos, sin = rope_tables(LAYOUT, CONFIG.hidden_size // CONFIG.num_heads, CONFIG.rope_theta)

    inputs, outputs, cos, sin = cut(latents, "c pt ph pw"), cut(targets, "pt ph pw c"), LAYOUT.unpack(cos), LAYOUT.unpack(sin)
    padded = [pad_sequence(list(x), batch_first=True) for x in (inputs, outputs, cos, sin)]
    mask = torch.arange(LAYOUT.max_seqlen, device=DEVICE) < LAYOUT.cu_seqlens.diff()[:, None]

    def loss(differences: Sequence[Tensor]) -> Tensor:
        return sum(x.float().square().sum() for x in differences) / sum(x.numel() for x in targets)

    def packed(_: Sequence[Tensor]) -> Tensor:
        return loss([x - y for x, y in zip(dit(latents, timesteps), targets, strict=True)])

    def each(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        samples = zip(inputs, timesteps, cos, sin, outputs, strict=True)
        return loss([run(x[None], t[None], c[None], s[None])[0] - y for x, t, c, s, y in samples])

    def per_sample(_: Sequence[Tensor]) -> Tensor:
        return each(partial(dense_dit, dit), inputs)

    def padded_batch(_: Sequence[Tensor]) -> Tensor:
        x, y, c, s = padded
        return loss([(dense_dit(dit, x, timesteps, c, s, mask) - y) * mask[..., None]])

    def reference(parameters: Sequence[Tensor]) -> Tensor:
        replaced = dict(zip((name for name, _ in dense.named_parameters()), parameters, strict=True))
        return each(lambda *args: functional_call(dense, replaced, args), [x.float() for x in inputs])

    dense = Dense(dit)
    runs: dict[str, Callable] = {OURS: packed, "torch per sample": per_sample, "torch padded": padded_batch}
    rows = {name: Implementation(run) for name, run in runs.items()}
    per_token = sum(x.numel() for block in dit.blocks for m in (block.attention, block.mlp) for x in m.parameters() if x.ndim == 2)
    ends = 2 * dit.patch_embed.weight.numel() + 3 * dit.final.weight.numel()  # the latents need no gradient
    scores = CONFIG.depth * CONFIG.hidden_size * sum(n * n for n in LAYOUT.seqlens)
    work = {"gflops": (2 * LAYOUT.num_tokens * (3 * per_token + ends) + 14 * scores) / 1e9}
    one = torch.ones((), device=DEVICE)
    return Race("DiT training step", MAIN, BOTH, work, [parameters], [one], reference, rows)


@pytest.mark.parametrize("implementation", [OURS, "torch per sample", "torch padded"])
def test_training_step(measure, implementation):
    measure(implementation, training_step)
