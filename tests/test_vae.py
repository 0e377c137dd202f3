"""Causal video VAEs of diffusers behind one interface: sizes, causality, tiles, normalisation, and training a small one."""

from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from sora_model.codec.codec import PixelCodec, latent_frames, latent_size, nearest_known, pixel_frames
from sora_model.codec.vae import CLASSES, DECODE_SEED, VideoVAE
from sora_model.data import Batch, Sample
from sora_model.training.vae import VAEObjective, finish, reconstruction_psnr
from sora_model.world.config import WorldConfig
from sora_model.world.source import WorldSource
from sora_model.world.world import World

WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}


def wan():
    return diffusers.AutoencoderKLWan(**WAN, latents_mean=[0.5] * 4, latents_std=[2.0] * 4)


def cogvideox():
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    return diffusers.AutoencoderKLCogVideoX(
        **blocks, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, scaling_factor=0.7
    )


def hunyuan():
    blocks = {
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    }
    return diffusers.AutoencoderKLHunyuanVideo(
        **blocks, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )


def ltx(**options):
    return diffusers.AutoencoderKLLTXVideo(
        **options,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )


def hunyuan15():
    return diffusers.AutoencoderKLHunyuanVideo15(block_out_channels=(32,) * 5, latent_channels=4, layers_per_block=1)


def ltx2(padding="zeros"):  # the published one reflects, which takes two latent positions a side
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 16, 32, 32),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_spatial_padding_mode=padding,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )


def mochi():
    return diffusers.AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=(64, 64, 64, 64),
        decoder_block_out_channels=(64, 64, 64, 64),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=[0.5] * 4,
        latents_std=[2.0] * 4,
    )


def cosmos():
    return VideoVAE.small(latent_channels=4, channels=(8, 16, 16)).model


MODELS = {
    "AutoencoderKLWan": (wan, (4, 8, 8)),
    "AutoencoderKLCogVideoX": (cogvideox, (4, 8, 8)),
    "AutoencoderKLHunyuanVideo": (hunyuan, (4, 8, 8)),
    "AutoencoderKLHunyuanVideo15": (hunyuan15, (4, 16, 16)),
    "AutoencoderKLLTX2Video": (ltx2, (8, 32, 32)),
    "AutoencoderKLLTXVideo": (ltx, (8, 32, 32)),
    "AutoencoderKLMochi": (mochi, (6, 8, 8)),
    "AutoencoderKLCosmos": (cosmos, (4, 8, 8)),
}


def made(name: str) -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(MODELS[name][0]().eval())


def test_every_class_is_tested() -> None:
    assert set(MODELS) == set(CLASSES)


@pytest.mark.parametrize("name", MODELS)
def test_videos_and_images_there_and_back(name: str, tmp_path: Path) -> None:
    vae = made(name)
    assert vae.compression == MODELS[name][1]
    ct, ch, cw = vae.compression
    videos = [
        torch.rand(3, 1 + 2 * ct, 2 * ch, 3 * cw),
        torch.rand(3, 1, 3 * ch, 2 * cw),
        torch.rand(3, 1 + 2 * ct, 2 * ch, 3 * cw),
    ]
    latents = vae.encode(videos)
    assert [tuple(x.shape[1:]) for x in latents] == [(3, 2, 3), (1, 3, 2), (3, 2, 3)]
    assert [x.shape[1:] for x in latents] == [latent_size(vae, tuple(v.shape[1:])) for v in videos]
    assert all(x.shape[0] == vae.channels for x in latents)
    assert [y.shape for y in vae.decode(latents)] == [v.shape for v in videos]
    torch.testing.assert_close(vae.encode(videos[2:])[0], latents[2], atol=1e-4, rtol=1e-4)
    vae.save_pretrained(tmp_path)
    assert VideoVAE.read_compression(tmp_path) == vae.compression
    torch.testing.assert_close(VideoVAE.from_pretrained(tmp_path).encode(videos)[1], latents[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_length_comes_back(name: str) -> None:
    vae = made(name)
    ct, ch, cw = vae.compression
    for more in range(5):
        video = torch.rand(3, 1 + more * ct, ch, cw)
        latents = vae.encode([video])
        assert latents[0].shape[1] == 1 + more
        assert vae.decode(latents)[0].shape == video.shape


def test_statistics_of_each_latent_frame() -> None:
    """NVIDIA's Cosmos has a mean and a deviation for each of the first frames."""
    vae = VideoVAE.small(latent_channels=2, channels=(8, 8, 8))
    vae.model.register_to_config(latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0, 8.0])  # channel by channel
    both = VideoVAE(vae.model)
    video = torch.rand(3, 9, 8, 8)
    (raw,), (normal,) = vae.encode([video]), both.encode([video])
    mean, std = torch.tensor([[0.0, 1.0, 1.0], [2.0, 3.0, 3.0]]), torch.tensor([[1.0, 2.0, 2.0], [4.0, 8.0, 8.0]])
    torch.testing.assert_close(normal, (raw - mean[:, :, None, None]) / std[:, :, None, None])
    torch.testing.assert_close(both.decode([normal])[0], vae.decode([raw])[0])


def test_a_decoder_that_takes_noise_off() -> None:
    """LTX 0.9.1's and later: as its pipeline in diffusers decodes, and twice the same."""
    torch.manual_seed(0)
    model = ltx(timestep_conditioning=True, decoder_inject_noise=(True, False, False, True, True)).eval()
    for name, weight in model.decoder.named_parameters():
        if "per_channel_scale" in name:
            weight.data += 0.1
    vae = VideoVAE(model, decode_timestep=0.1, decode_noise_scale=0.2)
    latents = torch.randn(2, 8, 2, 2, 3)
    first, second = vae.decode(list(latents)), vae.decode(list(latents))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (alone,) = vae.decode([latents[1]])
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(DECODE_SEED))
    noised = 0.8 * latents[1:] + 0.2 * noise  # mean and deviation are 0 and 1
    torch.manual_seed(0)
    with torch.no_grad():
        want = model.decode(noised, torch.tensor([0.1])).sample.clamp(-1, 1)[0]
    torch.testing.assert_close(alone, want, atol=1e-5, rtol=1e-5)
    other = VideoVAE(model, decode_timestep=0.5, decode_noise_scale=0.2).decode([latents[1]])[0]
    assert (other - alone).abs().max() > 1e-4
    with pytest.raises(ValueError, match="VideoVAE: decode_noise_scale: expected a number from 0 to 1, got 2"):
        VideoVAE(model, decode_noise_scale=2)
    with pytest.raises(ValueError, match="VideoVAE: decode_timestep: expected None for a decoder"):
        VideoVAE(ltx(), decode_timestep=0.1)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"}))
def test_the_past_does_not_depend_on_the_future(name: str) -> None:
    """An image's latent is that of the first frame of any video that begins with it, and so for every start."""
    vae = made(name)
    ct, ch, cw = vae.compression
    video = torch.rand(3, 1 + 2 * ct, ch, 2 * cw)
    (whole,), (start,), (image,) = (vae.encode([video[:, :t]]) for t in (1 + 2 * ct, 1 + ct, 1))
    torch.testing.assert_close(whole[:, :2], start, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole[:, :1], image, atol=1e-4, rtol=1e-4)
    assert (whole[:, 1:] - image).abs().max() > 1e-3


def test_latents_are_normalised() -> None:
    vae = made("AutoencoderKLWan")
    video = torch.rand(3, 5, 16, 16)
    raw = vae.model.encode(video[None]).latent_dist.mode()[0]
    torch.testing.assert_close(vae.encode([video])[0], (raw - 0.5) / 2)
    cog = made("AutoencoderKLCogVideoX")
    raw = cog.model.encode(video[None]).latent_dist.mode()[0]
    torch.testing.assert_close(cog.encode([video])[0], raw * 0.7, atol=1e-5, rtol=1e-5)


class Local(torch.nn.Module):
    """Stands in for a VAE: each latent position is the mean of its pixels, so tiles must agree exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.widest = 0

    def encode(self, x: Tensor):
        self.widest = max(self.widest, *x.shape[3:])
        mean = x[:, :, ::4].unflatten(3, (-1, 8)).unflatten(5, (-1, 8)).mean((4, 6))
        return type("Out", (), {"latent_dist": type("Dist", (), {"mode": lambda _: mean})()})

    def decode(self, z: Tensor):
        video = z.repeat_interleave(4, 2)[:, :, 3:].repeat_interleave(8, 3).repeat_interleave(8, 4)
        return type("Out", (), {"sample": video})


def test_tiles_are_blended_without_a_seam() -> None:
    vae = VideoVAE.small(latent_channels=3, channels=(8, 8, 8))
    vae.model = local = Local()
    video = torch.rand(3, 5, 8, 8).repeat_interleave(81, 2).repeat_interleave(131, 3)  # 648 x 1048
    (latent,) = vae.encode([video])
    assert latent.shape == (3, 2, 81, 131)
    assert local.widest == 512
    expected = local.encode(video[None]).latent_dist.mode()[0]
    torch.testing.assert_close(latent, expected)
    (back,) = vae.decode([latent])
    torch.testing.assert_close(back, local.decode(latent[None]).sample[0])


def test_a_small_one_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VideoVAE.small(latent_channels=8, channels=(16, 32, 32))
    source = WorldSource(World(WorldConfig.simple()), [(5, 16, 16), (1, 24, 16)])
    objective, generator = VAEObjective(vae), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    samples = [source.load(i) for i in range(16)]
    losses = []
    for _ in range(30):
        loss = objective.loss(Batch(samples, list(range(16)), 0), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    videos = [sample.video for sample in samples]
    finish(vae, videos, tmp_path / "vae")
    loaded = VideoVAE.from_pretrained(tmp_path / "vae")
    latents = torch.cat([x.flatten(1) for x in loaded.encode(videos)], dim=1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(1, correction=0), torch.ones(8), atol=1e-3, rtol=0)
    assert all(ratio > 10 for ratio in reconstruction_psnr(loaded, videos[:3]))


@pytest.mark.parametrize("name", MODELS)
def test_latents_of_any_are_normalised(name: str, tmp_path: Path) -> None:
    """What `finish` sets is what a checkpoint reads back; a channel that never changes is no NaN."""
    vae = made(name)
    ct, ch, cw = vae.compression
    videos = [torch.rand(3, 1 + 2 * ct, 2 * ch, 3 * cw, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    finish(vae, videos, tmp_path / "vae")
    again = VideoVAE.from_pretrained(tmp_path / "vae")
    latents = torch.cat([x.flatten(1) for x in again.encode(videos)], dim=1)
    if name.startswith("AutoencoderKLHunyuanVideo"):
        assert latents.square().mean() == pytest.approx(1, abs=0.05)
    else:
        assert latents.mean(1).abs().max() < 0.05
        assert (latents.std(1) - 1).abs().max() < 0.05
    torch.testing.assert_close(again.encode(videos[:1])[0], vae.encode(videos[:1])[0], rtol=1e-4, atol=1e-4)
    finish(vae, [0 * videos[0]], tmp_path / "vae")
    assert VideoVAE.from_pretrained(tmp_path / "vae").encode([0 * videos[0]])[0].isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_only_the_decoder_of_any_learns(name: str) -> None:
    objective = VAEObjective(made(name), decoder_only=True)
    trained = {name.split(".")[0] for name, p in objective.vae.model.named_parameters() if p.requires_grad}
    assert "decoder" in trained
    assert trained <= {"decoder", "post_quant_conv"}


def test_a_third_of_the_ends_are_encoded_as_given() -> None:
    """Of clips that come alone too, as files of sizes of their own do."""
    objective, generator = VAEObjective(made("AutoencoderKLCosmos")), torch.Generator().manual_seed(0)
    video = World(WorldConfig.studio()).sample(1).render(9, 16, 16)[None]
    plain, count = objective.vae.raw_latents(video), 0
    with torch.no_grad():
        for _ in range(90):
            count += not torch.equal(objective._latents(video, generator), plain)
    assert 20 <= count <= 40


def test_a_decoder_learns_while_latents_stay() -> None:
    torch.manual_seed(0)
    vae = VideoVAE.small(latent_channels=8, channels=(16, 32, 32))
    source = WorldSource(World(WorldConfig.simple()), [(9, 16, 16), (1, 16, 16)])
    samples = [source.load(i) for i in range(8)]
    before = vae.encode([samples[0].video])[0]
    objective, generator = VAEObjective(vae, decoder_only=True), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(15):
        loss = objective.loss(Batch(samples, list(range(8)), 0), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(vae.encode([samples[0].video])[0], before)


def test_which_latent_frames_are_given() -> None:
    vae = VideoVAE.small(latent_channels=4, channels=(8, 8, 8))
    frames = torch.arange(13)
    assert latent_frames(vae, frames < 5).tolist() == [True, True, False, False]
    assert latent_frames(vae, frames < 8).tolist() == [True, True, False, False]
    assert latent_frames(vae, frames >= 9).tolist() == [False, False, False, True]
    assert latent_frames(PixelCodec(), frames[:3] < 2).tolist() == [True, True, False]
    for marked in ([True, True, False, False], [False, False, False, True]):
        mask = torch.tensor(marked)
        assert torch.equal(latent_frames(vae, pixel_frames(vae, mask)), mask)
    assert pixel_frames(PixelCodec(), torch.tensor([True, False])).tolist() == [True, False]


def test_coding_says_how_far_it_is() -> None:
    """After each tile and batch, in positions; the last one says that all is done."""
    vae = VideoVAE.small(latent_channels=3, channels=(8, 8, 8))
    vae.model = Local()
    seen: list[tuple[int, int]] = []
    latents = vae.encode([torch.zeros(3, 5, 1024, 64), torch.zeros(3, 1, 16, 16)], progress=lambda *told: seen.append(told))
    rows = 512 + 512 + 512  # tiles from rows 0, 448 and 512
    assert seen == [(5 * 512 * 64 * (i + 1), 5 * rows * 64 + 256) for i in range(3)] + [(5 * rows * 64 + 256,) * 2]
    seen.clear()
    vae.decode(latents, progress=lambda *told: seen.append(told))
    assert len(seen) == 4
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]


def test_what_is_not_known_shows_the_nearest_known_frame() -> None:
    video = torch.arange(9.0)[None, :, None, None].expand(3, 9, 2, 2)
    known = torch.tensor([True, True, False, False, False, False, False, True, True])
    assert nearest_known(video, known)[0, :, 0, 0].tolist() == [0, 1, 1, 1, 1, 7, 7, 7, 8]
    assert nearest_known(video, torch.arange(9) >= 7)[0, :, 0, 0].tolist() == [7] * 8 + [8]


@pytest.mark.parametrize(("temporal", "spatial"), [(4, 8), (8, 8), (4, 16), (8, 16)])
def test_small_ones_compress_as_they_say(temporal: int, spatial: int) -> None:
    for channels in (None, (8, 8, 8, 8)):
        vae = VideoVAE.small(latent_channels=4, temporal=temporal, spatial=spatial, channels=channels)
        (latent,) = vae.encode([torch.zeros(3, 17, 32, 48)])
        assert tuple(latent.shape) == (4, 1 + 16 // temporal, 32 // spatial, 48 // spatial)
        assert tuple(vae.decode([latent])[0].shape) == (3, 17, 32, 48)


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    vae = VideoVAE.small(latent_channels=4, channels=(8, 8, 8))
    with pytest.raises(ValueError, match=r"expected 1 \+ 4 n frames of height 8 n and width 8 n, got \(T, H, W\) = \(4, 16, 16\)"):
        vae.encode([torch.zeros(3, 4, 16, 16)])
    with pytest.raises(ValueError, match=r"videos: expected \[3, T, H, W\], got \[1, 5, 16, 16\]"):
        vae.encode([torch.zeros(1, 5, 16, 16)])
    with pytest.raises(ValueError, match=r"model: expected one of AutoencoderKLCogVideoX, .*, got AutoencoderKL"):
        VideoVAE(diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2))
    with pytest.raises(ValueError, match="tile: expected a multiple of 8 from 128 on, got 100"):
        VideoVAE(vae.model, tile=100)
    for options, message in (
        ({"temporal": 3}, "temporal: expected 4 or 8, got 3"),
        ({"spatial": 32}, "spatial: expected 8 or 16, got 32"),
        ({"temporal": 8, "channels": (8, 8, 8)}, "channels: expected 4 widths or more for this compression"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoVAE.small(**options)
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        VideoVAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(ValueError, match=r"expected _class_name out of .*, got UNet"):
        VideoVAE.from_pretrained(tmp_path)


def test_samples_of_a_batch_are_weighed_by_their_pixels() -> None:
    vae = VideoVAE.small(latent_channels=4, channels=(8, 8, 8))
    small, large = torch.rand(3, 1, 8, 8), torch.rand(3, 5, 16, 16)

    def loss(*videos: Tensor) -> float:
        batch = Batch([Sample(video, "") for video in videos], list(range(len(videos))), 0)
        return VAEObjective(vae).loss(batch, torch.Generator().manual_seed(0)).item()

    pixels = small.numel(), large.numel()
    mean = (loss(small) * pixels[0] + loss(large) * pixels[1]) / sum(pixels)
    assert loss(small, large) == pytest.approx(mean, rel=0.05)  # the noise on latents differs
