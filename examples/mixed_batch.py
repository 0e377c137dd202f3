"""A mixed batch: a video, a tall image and a wide image go through one transformer block together.

The layout that the patch embedding returns is all that the other ops need: sample boundaries for attention, positions for RoPE,
frame boundaries for adaLN. At the end the tokens become latents of the original sizes again.
"""

import torch
from torch import nn

from sora_kernels import (
    gate_residual_layer_norm_modulate,
    layer_norm_modulate,
    patch_embed_3d,
    qk_norm_rope_3d,
    spatiotemporal_attention,
    unpatchify_3d,
)

DIM, HEADS, CHANNELS, PATCH = 256, 4, 16, (1, 2, 2)


def main() -> None:
    torch.manual_seed(0)
    sizes = [(8, 32, 32), (1, 64, 36), (1, 24, 80)]
    latents = [torch.randn(CHANNELS, *size) for size in sizes]
    conv, qkv = nn.Conv3d(CHANNELS, DIM, PATCH, stride=PATCH), nn.Linear(DIM, 3 * DIM)
    head = nn.Linear(DIM, CHANNELS * PATCH[0] * PATCH[1] * PATCH[2])

    x, layout = patch_embed_3d(latents, conv.weight, conv.bias, patch_size=PATCH)
    print(layout)

    # One row of modulation for each latent frame, so that frames can have noise levels of their own.
    shift, scale, gate = torch.randn(layout.num_frames, 3 * DIM).chunk(3, dim=1)
    h = layer_norm_modulate(x, shift, scale, layout.cu_frames)
    q, k, v = qkv(h).unflatten(1, (3, HEADS, -1)).unbind(1)
    ones = torch.ones(DIM // HEADS)
    q, k = qk_norm_rope_3d(q, k, ones, ones, layout)
    # A token sees 3 frames and 9 x 9 tokens around it, always within its own sample.
    y = spatiotemporal_attention(q, k, v, layout, window=(3, 9, 9)).flatten(1)
    x, h = gate_residual_layer_norm_modulate(x, y, gate, shift, scale, layout.cu_frames)

    outputs = unpatchify_3d(head(h), layout, patch_size=PATCH)
    for latent, output in zip(latents, outputs, strict=True):
        assert output.shape == latent.shape
        print(f"{tuple(latent.shape)} -> {tuple(output.shape)}")


if __name__ == "__main__":
    main()
