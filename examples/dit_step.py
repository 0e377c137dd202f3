"""A training step of the DiT, without the Trainer: noise, prediction, loss, gradients.

Latents of different sizes are one packed pass. Some frames stay clean, which is how the model learns to extend and join videos.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sora_model import DiT, DiTConfig
from sora_model.diffusion.loss import diffusion_loss
from sora_model.diffusion.noise import add_noise
from sora_model.diffusion.task_mix import TaskMix
from sora_model.text.words import WordEncoder


def main(steps: int = 5) -> None:
    torch.manual_seed(0)
    encoder = WordEncoder(dim=64)
    dit = DiT(DiTConfig.preset("tiny", patch=(1, 2, 2), in_channels=16, text_dim=64))
    scheduler, tasks = FlowMatchEulerDiscreteScheduler(), TaskMix()
    optimizer = torch.optim.AdamW([*dit.parameters(), *encoder.parameters()], lr=1e-3)

    latents = [torch.randn(16, 4, 8, 8), torch.randn(16, 1, 12, 6)]  # a video and an image, as a VAE codes them
    captions = ["a storm at sea", "a cat"]
    for step in range(steps):
        masks = [tasks.draw_mask(latent.shape[1]) for latent in latents]  # True for frames that stay clean
        batch = add_noise(scheduler, latents, clean_masks=masks)
        loss = diffusion_loss(dit(batch.latents, batch.timesteps, encoder(captions)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.3f}  clean frames {[int(mask.sum()) for mask in masks]}")


if __name__ == "__main__":
    main()
