"""Z-Image, patched: lists of images and texts of one size and of several, and images to edit beside their features."""

from functools import partial

import torch
from diffusers import ZImageTransformer2DModel
from diffusers_contract import FamilyContract, Inputs, Variant

CONFIG = {"in_channels": 16, "dim": 256, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
LORA = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2")


def inputs(size: int, padded: bool = False, control: bool = False) -> Inputs:
    """Where nothing is padded, all images have one size and all texts one length: multiples of 32, at which diffusers branches."""
    grids = [(1, 8, 12 + 4 * size), (1, 16, 4)] if padded else [(1, 16, 16 + 8 * size)] * 2
    texts = (256, 77) if padded else (256, 256)
    made = {
        "x": [torch.randn(16, *grid) for grid in grids],
        "t": torch.rand(2),
        "cap_feats": [torch.randn(n + 32 * size, 32) for n in texts],
    }
    if control:
        made["controlnet_block_samples"] = {0: torch.randn(2, 320, 256)}
    return made


def edit(size: int, features: bool = True) -> Inputs:
    """Of two samples, a clean image and the noisy one of each; the second sample has no clean one."""
    images = [[torch.randn(16, 1, 8, 12), torch.randn(16, 1, 16, 8)], [None, torch.randn(16, 1, 12, 8)]]
    made = {
        "x": images,
        "t": torch.rand(2),
        "cap_feats": [[torch.randn(20, 32), torch.randn(40, 32), torch.randn(7, 32)] for _ in range(2)],
        "siglip_feats": [None, None],
        "image_noise_mask": [[0, 1], [0, 1]],
    }
    if features:
        made["siglip_feats"] = [[torch.randn(4, 4, 16), None], [None, torch.randn(5, 3, 16)]]
    return made


def build(**changes):
    return partial(ZImageTransformer2DModel, **(CONFIG | changes))


VARIANTS = {
    "one_size": Variant(build(), inputs, lora=LORA),
    "padded": Variant(build(), partial(inputs, padded=True), lora=LORA),
    "no_qk_norm": Variant(build(qk_norm=False), partial(inputs, padded=True), lora=LORA),
    "control": Variant(build(), partial(inputs, control=True), lora=LORA),
    "edit": Variant(build(siglip_feat_dim=16), edit, lora=LORA),
}


class TestZImage(FamilyContract):
    pass
