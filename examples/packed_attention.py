"""Packed attention in a model of your own: the same numbers as SDPA on each sample, in one call.

Your model has a padded batch and a mask, or a loop over samples. With the boundaries of the samples, neither is needed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_kernels import flash_attn_varlen_func


class Attention(nn.Module):
    """Self-attention of packed tokens [N, D]; each sample attends to itself."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # views, never copied
        return self.out(flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens).flatten(1))

    def per_sample(self, x: Tensor) -> Tensor:
        """The same for one sample, with torch's attention."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).permute(1, 2, 0, 3)  # [3, H, n, d]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


def main() -> None:
    torch.manual_seed(0)
    lengths = [2048, 576, 77]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    model, x = Attention(dim=256, num_heads=4), torch.randn(sum(lengths), 256)

    packed = model(x, cu_seqlens)
    separate = torch.cat([model.per_sample(sample) for sample in x.split(lengths)])
    torch.testing.assert_close(packed, separate)
    packed.square().mean().backward()
    print(f"{len(lengths)} samples, {len(x)} tokens, no padding; largest difference {(packed - separate).abs().max():.1e}")


if __name__ == "__main__":
    main()
