"""The DiT: packed as alone, equal to diffusers' DiT where both can run, and every wrong input named."""

import json
import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from sora_kernels import backends
from sora_kernels.layout import PackedLayout, Span
from sora_model.diffusion.loss import diffusion_loss
from sora_model.diffusion.noise import add_noise
from sora_model.model.conditioning import PackedText, drop_captions
from sora_model.model.config import DiTConfig
from sora_model.model.convert.dit import from_diffusers_dit
from sora_model.model.dit import DiT, places, sinusoids
from sora_model.text.words import WordEncoder, hash_words
from sora_model.training.dit import smallest_sigma

SIZES = [(4, 8, 12), (1, 16, 8), (2, 4, 4), (6, 8, 8)]
CAPTIONS = ["a red circle moves right", "", "snow", "a cat, asleep; then a dog, awake"]


def small(**changes) -> DiTConfig:
    fields = {"in_channels": 4, "patch_size": (1, 2, 2), "hidden_size": 48, "depth": 3, "num_heads": 2, "text_dim": 32}
    return DiTConfig(**{**fields, **changes})


def awake(module: nn.Module) -> nn.Module:
    """Random weights everywhere: what adaLN-Zero starts at would hide every error."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def latents_of(sizes: list[tuple[int, int, int]], channels: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(channels, *size, generator=generator) for size in sizes]


def gradients(dit: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in dit.named_parameters()}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def test_places_are_fractions_of_each_grid() -> None:
    """Of t, h and w, and of how much a token covers of them; steps and origins change nothing."""
    plain = PackedLayout.from_grids([(4, 2, 8), (1, 3, 5)])
    spans = [[Span((4, 2, 8), origin=(3.0, 0.0, 1.0), step=(2.0, 0.5, 0.5))], [Span((1, 3, 5), step=(1.0, 4 / 3, 4 / 3))]]
    for layout in (plain, PackedLayout.from_spans(spans)):
        channels = places(layout).unflatten(1, (2, 6, -1))  # cos and sin
        assert channels.shape == (64 + 15, 2, 6, 16)
        last = torch.atan2(channels[:, 1, :, 1], channels[:, 0, :, 1]) / (torch.pi / 2)  # the slowest wave: a quarter turn
        torch.testing.assert_close(last[[0, 63], :3], torch.tensor([[0.5 / 4, 0.5 / 2, 0.5 / 8], [3.5 / 4, 1.5 / 2, 7.5 / 8]]))
        torch.testing.assert_close(last[64 + 7, :3], torch.tensor([0.5, 1.5 / 3, 2.5 / 5]))
        torch.testing.assert_close(last[[0, 64], 3:], torch.tensor([[1 / 4, 1 / 2, 1 / 8], [1, 1 / 3, 1 / 5]]))


def test_rotary_positions_may_be_stretched() -> None:
    """With rope_size a frame of any size spans the same positions, and frames sampled from a longer clip lie apart in time."""
    dit = DiT(small(rope_size=4))
    pt, ph, pw = dit.config.patch_size
    clips = [torch.empty(4, pt * t, ph * h, pw * w) for t, h, w in ((2, 8, 12), (3, 4, 2))]
    layout = dit._layout(clips, [1.0, 2.5])
    positions = layout.positions()
    assert positions[:192].amax(0).tolist() == [1.0, 3.5, 5.5]
    assert positions[192:].amax(0).tolist() == [5.0, 6.0, 2.0]
    assert DiT(small())._layout(clips, [1.0, 1.0]) is None, "positions count from zero"
    latents, levels = [torch.randn(4, 3, 4, 4)], torch.tensor([500.0])
    model = awake(DiT(small()))
    near, far = (model(latents, levels, frame_steps=[step])[0] for step in (1.0, 3.0))
    assert (near - far).abs().max() > 1e-4


@torch.no_grad()
def test_windows() -> None:
    """Larger than a grid they are the whole sample; of one frame they let nothing through from another, in all blocks."""
    dit, latents, levels = awake(DiT(small(text_dim=None))), latents_of(SIZES), torch.full((4,), 500.0)
    whole = dit(latents, levels)
    for window in ((9, 9, 9), (None, None, None)):
        for one, other in zip(dit(latents, levels, window=window), whole, strict=True):
            assert_close(one, other, 1e-5)
    changed = [latents[0].clone(), *latents[1:]]
    changed[0][:, 2] += 1
    seen, other = (dit(x, levels, window=(1, None, None))[0] for x in (latents, changed))
    assert torch.equal(seen[:, [0, 1, 3]], other[:, [0, 1, 3]])
    assert (seen - whole[0]).abs().max() > 1e-3
    near, far = (dit(x, levels, window=(None, 3, 3))[0] for x in (latents, changed))
    assert (near - far)[:, 0].abs().max() > 1e-3
    with pytest.raises(ValueError, match="window: expected three sizes >= 1"):
        dit(latents, levels, window=(0, 3, 3))


@pytest.mark.parametrize("per_frame", [False, True], ids=["per sample", "per frame"])
@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(qk_norm=False, patch_size=(2, 4, 2)),
        small(prediction="clean", patch_size=(2, 2, 2)),
        small(absolute_positions=True),
        small(modulation="shared", rope_size=4),
    ],
    ids=["qk_norm", "plain rope", "clean", "absolute", "shared, stretched"],
)
def test_packed_equals_sample_by_sample(config: DiTConfig, per_frame: bool) -> None:
    torch.manual_seed(0)
    sizes = [(t + t % config.patch_size[0], h, w) for t, h, w in SIZES]
    dit, encoder, latents = awake(DiT(config)), awake(WordEncoder(32)), latents_of(sizes)
    frames = [t // config.patch_size[0] for t, _, _ in sizes]
    levels = torch.rand(sum(frames) if per_frame else len(sizes)) * 1000
    cotangents = [torch.randn_like(latent) for latent in latents]

    def loss(outputs: list[Tensor], wanted: list[Tensor]) -> Tensor:
        return sum((output * w).sum() for output, w in zip(outputs, wanted, strict=True))

    packed = dit(latents, levels, encoder(CAPTIONS))
    loss(packed, cotangents).backward()
    packed_grads = gradients(dit) | gradients(encoder)
    dit.zero_grad(), encoder.zero_grad()
    parts = levels.split(frames) if per_frame else levels.split(1)
    for i, caption in enumerate(CAPTIONS):
        (alone,) = dit([latents[i]], parts[i], encoder([caption]))
        assert_close(packed[i], alone, 1e-5, f"sample {i}")
        loss([alone], [cotangents[i]]).backward()
    for name, expected in (gradients(dit) | gradients(encoder)).items():
        assert_close(packed_grads[name], expected, 2e-5, name)


def test_levels_per_frame_equal_levels_per_sample_where_they_agree() -> None:
    dit, text, latents = awake(DiT(small())), WordEncoder(32)(CAPTIONS), latents_of(SIZES)
    levels = torch.tensor([3.0, 500.0, 20.5, 999.0])
    per_frame = levels.repeat_interleave(torch.tensor([t for t, _, _ in SIZES]))
    for one, other in zip(dit(latents, levels, text), dit(latents, per_frame, text), strict=True):
        assert_close(other, one, 1e-5)
    per_frame[0] = 900.0
    changed = dit(latents, per_frame, text)
    assert not torch.allclose(changed[0], dit(latents, levels, text)[0], atol=1e-3)
    assert_close(changed[1], dit(latents, levels, text)[1], 1e-5, "another sample's level")


def test_a_clean_prediction_becomes_a_velocity() -> None:
    """Of x_sigma = (1 - sigma) x + sigma noise, with a network that puts out x: noise - x, at every level."""
    dit, direct = (awake(DiT(small(prediction=kind, text_dim=None))) for kind in ("clean", "direct"))
    direct.load_state_dict(dit.state_dict())
    latents, levels = latents_of(SIZES), torch.tensor([3.0, 500.0, 200.0, 1000.0])
    for per_frame in (False, True):
        rows = levels.repeat_interleave(torch.tensor([t for t, _, _ in SIZES])) if per_frame else levels
        velocities = dit(latents, rows)
        for v, x, noised, sigma in zip(velocities, direct(latents, rows), latents, (0.003, 0.5, 0.2, 1), strict=True):
            assert_close(noised - sigma * v, x, 1e-5)
            noise = (noised - (1 - sigma) * x) / sigma
            assert_close(v, noise - x, 1e-5)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(velocities, dit(latents, rows), strict=True)), "gradients change no number"
    assert dit.bfloat16()(latents, levels)[0].dtype == torch.float32


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_loss_bounds_what_a_clean_prediction_counts_at_low_noise(per_frame: bool) -> None:
    """The error of a velocity is that of the clean latent over sigma; below 0.05 it counts as over 0.05."""
    dit, direct = (awake(DiT(small(prediction=kind, text_dim=None))) for kind in ("clean", "direct"))
    direct.load_state_dict(dit.state_dict())
    latents = latents_of(SIZES)
    masks = [torch.arange(t) < (t > 1) for t, _, _ in SIZES] if per_frame else None
    generator = torch.Generator().manual_seed(0)
    # Logits around -3: sigma lies on both sides of 0.05.
    batch = add_noise(FlowMatchEulerDiscreteScheduler(), latents, clean_masks=masks, logit_mean=-3.0, generator=generator)
    assert (batch.sigmas > 0).logical_and(batch.sigmas < 0.05).any()
    assert (batch.sigmas > 0.05).any()
    loss = diffusion_loss(dit(batch.latents, batch.timesteps), batch, smallest_sigma=smallest_sigma(dit))
    errors = []
    rows = batch.sigmas.split([t for t, _, _ in SIZES] if per_frame else 1)
    for x, right, sigma, mask in zip(direct(batch.latents, batch.timesteps), latents, rows, masks or [None] * 4, strict=True):
        error = (x - right) / sigma.clamp(min=0.05)[:, None, None]
        errors.append((error if mask is None else error[:, ~mask]).flatten())
    torch.testing.assert_close(loss, torch.cat(errors).square().mean(), rtol=1e-4, atol=0)
    with torch.no_grad():
        assert torch.equal(loss, diffusion_loss(dit(batch.latents, batch.timesteps), batch, smallest_sigma=smallest_sigma(dit)))
    assert smallest_sigma(direct) == 0
    ddpm = add_noise(DDPMScheduler(), latents)
    with pytest.raises(ValueError, match="smallest_sigma: expected 0"):
        diffusion_loss(latents, ddpm, smallest_sigma=0.05)


@pytest.mark.parametrize("frame_steps", [None, [1.0, 2.0, 1.0, 1.0]])
@pytest.mark.parametrize("rope_size", [None, 4])
def test_one_layout_is_built_in_a_step(rope_size, frame_steps, monkeypatch) -> None:
    dit, built = DiT(small(rope_size=rope_size, text_dim=None)), []
    init = PackedLayout.__init__
    monkeypatch.setattr(PackedLayout, "__init__", lambda self, *args: built.append(1) or init(self, *args))
    dit(latents_of(SIZES), torch.full([4], 500.0), frame_steps=frame_steps)
    assert len(built) == 1


def test_starts_as_zero_and_learns() -> None:
    torch.manual_seed(0)
    dit, encoder, latents = DiT(small()), WordEncoder(32), latents_of(SIZES)
    levels = torch.tensor([3.0, 500.0, 20.5, 999.0])
    assert all(not output.any() for output in dit(latents, levels, encoder(CAPTIONS)))
    optimizer = torch.optim.Adam([*dit.parameters(), *encoder.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        outputs = dit(latents, levels, encoder(CAPTIONS))
        loss = torch.stack([(o - x).square().mean() for o, x in zip(outputs, latents, strict=True)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    silent = [name for name, parameter in [*dit.named_parameters(), *encoder.named_parameters()] if not parameter.grad.any()]
    assert silent == []


def test_text_is_heard_and_no_text_is_empty_text() -> None:
    dit, encoder, latents = awake(DiT(small())), WordEncoder(32), latents_of(SIZES)
    levels = torch.full((4,), 300.0)
    none = dit(latents, levels)
    for one, other in zip(none, dit(latents, levels, PackedText.empty(4, 32)), strict=True):
        assert torch.equal(one, other)
    said = dit(latents, levels, encoder(CAPTIONS))
    swapped = dit(latents, levels, encoder(CAPTIONS[::-1]))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(said, swapped, strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(said, none, strict=True))
    # A sample without text among others that have some.
    mixed = PackedText.concat([encoder(CAPTIONS[:2]), PackedText.empty(1, 32), encoder(CAPTIONS[3:])])
    for i, (output, expected) in enumerate(zip(dit(latents, levels, mixed), said, strict=True)):
        assert_close(output, none[2] if i == 2 else expected, 1e-5, f"sample {i}")
    text = encoder(CAPTIONS)
    tokens_only = PackedText(text.tokens, text.cu_seqlens, torch.zeros_like(text.pooled))
    assert (dit(latents, levels, tokens_only)[0] - dit(latents, levels)[0]).abs().max() > 1e-3  # cross-attention alone


def test_a_frame_sees_its_place_in_time() -> None:
    """With rotary positions a video backwards is not the prediction backwards."""
    dit, (latent,) = awake(DiT(small(text_dim=None))), latents_of([(4, 8, 8)])
    forwards = dit([latent], torch.tensor([100.0]))[0]
    backwards = dit([latent.flip(1)], torch.tensor([100.0]))[0].flip(1)
    assert (forwards - backwards).abs().max() > 1e-3


def test_gradient_checkpointing_changes_nothing() -> None:
    dit, encoder, latents = awake(DiT(small())), WordEncoder(32), latents_of(SIZES)
    results = []
    for checkpointing in (False, True):
        dit.gradient_checkpointing = checkpointing
        dit.zero_grad()
        with backends.record() as calls:
            sum(o.square().sum() for o in dit(latents, torch.full((4,), 300.0), encoder(CAPTIONS))).backward()
        results.append((gradients(dit), sum(name == "attention_forward" for name, _ in calls)))
    for name, expected in results[0][0].items():
        assert_close(results[1][0][name], expected, 1e-6, name)
    assert results[1][1] == results[0][1] + 2 * dit.config.depth  # each block's attention ran again


def test_bfloat16_is_close_to_float32() -> None:
    dit, encoder, latents = awake(DiT(small())), WordEncoder(32), latents_of(SIZES)
    levels, text = torch.tensor([3.0, 500.0, 20.5, 999.0]), encoder(CAPTIONS)
    exact = dit(latents, levels, text)
    rounded = dit.bfloat16()(latents, levels, text)
    for one, other in zip(rounded, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one.float(), other, 0.05)
    sum(output.float().square().sum() for output in rounded).backward()
    assert all(parameter.grad.isfinite().all() for parameter in dit.parameters())


@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_frequencies(shift: int) -> None:
    levels = torch.tensor([0.0, 0.25, 17.0, 999.0])
    expected = get_timestep_embedding(levels, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(sinusoids(levels, 256, shift), expected, atol=1e-4, rtol=0)


def diffusers_dit(sample_size: int, **changes) -> DiTTransformer2DModel:
    torch.manual_seed(3)
    fields = {"num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "num_layers": 3, "patch_size": 2}
    fields |= {"out_channels": 8, "num_embeds_ada_norm": 10, "sample_size": sample_size, **changes}
    model = awake(DiTTransformer2DModel(**fields)).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def test_equals_diffusers_dit_on_many_sizes_in_one_pass() -> None:
    theirs = diffusers_dit(16)
    ours = from_diffusers_dit(theirs)
    latents = latents_of([(1, 16, 16), (1, 8, 8), (1, 24, 24), (1, 16, 16)])
    levels, labels = torch.tensor([0, 999, 417, 23]), torch.tensor([4, 10, 0, 9])
    with torch.no_grad():
        packed = ours(latents, levels, labels=labels)
        for latent, level, label, output in zip(latents, levels, labels, packed, strict=True):
            expected = theirs(latent[None, :, 0], level[None], label[None]).sample[0]
            assert expected.std() > 0.1
            assert (output[:, 0] - expected).abs().max() < 1e-4


def test_positions_count_from_zero_when_not_stretched() -> None:
    """The paper's own positions are diffusers' for the size that its model is made for."""
    config = from_diffusers_dit(diffusers_dit(16)).config
    with torch.no_grad():
        for size in (12, 16):
            theirs = diffusers_dit(size)
            ours = DiT(DiTConfig(**{**config.to_dict(), "sincos_size": None}))
            ours.load_state_dict(from_diffusers_dit(theirs).state_dict())
            (latent,) = latents_of([(1, size, size)])
            expected = theirs(latent[None, :, 0], torch.tensor([5]), torch.tensor([1])).sample[0]
            assert (ours([latent], torch.tensor([5]), labels=torch.tensor([1]))[0][:, 0] - expected).abs().max() < 1e-4


def test_conversion_refuses_what_it_cannot_keep() -> None:
    model = diffusers_dit(16)
    model.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias.data[0] += 1e-3
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\.norm1\.emb\.timestep_embedder\.linear_2\.bias"):
        from_diffusers_dit(model)
    with pytest.raises(ValueError, match="activation_fn: expected 'gelu-approximate', got 'geglu'"):
        from_diffusers_dit(diffusers_dit(16, activation_fn="geglu"))
    with pytest.raises(ValueError, match="out_channels: expected 4 or 8, got 6"):
        from_diffusers_dit(diffusers_dit(16, out_channels=6))


def test_wrong_inputs_are_named() -> None:
    dit, encoder, latents = DiT(small()), WordEncoder(32), latents_of(SIZES)
    levels, text = torch.zeros(4), encoder(CAPTIONS)
    with pytest.raises(ValueError, match=r"videos\[1\].*divisible by patch_size \(1, 2, 2\), got \(1, 7, 8\)"):
        dit([latents[0], torch.zeros(4, 1, 7, 8)], torch.zeros(2))
    with pytest.raises(ValueError, match=r"timesteps: expected \[4\] \(samples\) or \[13\] \(token frames\), got \[5\]"):
        dit(latents, torch.zeros(5), text)
    with pytest.raises(ValueError, match="text: expected 4 captions, got 3"):
        dit(latents, levels, encoder(CAPTIONS[:3]))
    with pytest.raises(ValueError, match=r"labels: expected None \(no num_classes\), got \[4\]"):
        dit(latents, levels, text, torch.zeros(4, dtype=torch.long))
    classes = DiT(small(text_dim=None, num_classes=10, positions="sincos", qk_norm=False))
    with pytest.raises(ValueError, match=r"labels: expected \[4\], got None"):
        classes(latents_of([(1, 8, 8)] * 4), levels)
    with pytest.raises(ValueError, match=r"text: expected None \(no text_dim\)"):
        classes(latents[1:2], levels[:1], encoder(["a"]), torch.tensor([3]))
    with pytest.raises(ValueError, match="tells h and w only, got 4 token frames"):
        classes(latents[:1], levels[:1], labels=torch.tensor([3]))


NOT_NUMBERS = [{name: value} for name in ("rope_theta", "mlp_ratio", "timestep_shift") for value in ("x", None, True, math.nan, -1)]


def test_config() -> None:
    config = DiTConfig.preset("XL", patch=(1, 2, 2), in_channels=4, text_dim=256)
    assert (config.depth, config.hidden_size, config.num_heads) == (28, 1152, 16)
    assert DiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"expected keys out of in_channels, .*, got hidden, width"):
        DiTConfig.from_dict({"hidden": 3, "depth": 2, "width": 1})
    with pytest.raises(ValueError, match="name: expected one of tiny, XS, S, B, L, XL, got 'XXL'"):
        DiTConfig.preset("XXL", patch=(1, 2, 2), in_channels=4)
    for wrong in (
        {"hidden_size": 50},
        {"patch_size": (2, 2)},
        {"positions": "none"},
        {"depth": 0},
        {"num_classes": 0},
        *NOT_NUMBERS,
    ):
        with pytest.raises(ValueError, match=f"DiTConfig: {next(iter(wrong))}: expected"):
            small(**wrong)
    with pytest.raises(ValueError, match="text_length: expected at most 1048576 tokens, got"):
        small(text_dim=8, text_projection=True, text_length=2**70)
    with pytest.raises(ValueError, match="qk_norm: expected False with positions='sincos'"):
        small(positions="sincos")
    with pytest.raises(ValueError, match="learn_sigma: expected False with prediction='clean'"):
        small(prediction="clean", learn_sigma=True)


def test_size_of_the_papers_model() -> None:
    """DiT-XL/2 has 675 million parameters (table 4 of the paper, positions not counted)."""
    with torch.device("meta"):
        config = DiTConfig.preset("XL", patch=(1, 2, 2), in_channels=4, num_classes=1000, learn_sigma=True)
        dit = DiT(DiTConfig(**{**config.to_dict(), "positions": "sincos", "qk_norm": False}))
    assert round(sum(parameter.numel() for parameter in dit.parameters()) / 1e6) == 675


def test_word_encoder() -> None:
    encoder = awake(WordEncoder(32, depth=2))
    text = encoder(CAPTIONS)
    assert text.cu_seqlens.tolist() == [0, 5, 6, 7, 17]  # punctuation counts, an empty caption is the null token
    assert (text.tokens.shape, text.pooled.shape, text.num_samples) == ((17, 32), (4, 32), 4)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder([caption])
        start, end = text.cu_seqlens[i : i + 2]
        assert_close(text.tokens[start:end], alone.tokens, 1e-5)
        assert_close(text.pooled[i], alone.tokens.mean(0), 1e-5)
    order = encoder(["left of right", "right of left"]).pooled
    assert not torch.allclose(order[0], order[1], atol=1e-4)
    assert torch.equal(encoder(["A  Red\nCIRCLE"]).pooled, encoder(["a red circle"]).pooled)
    check = 0xCBF43926  # of "123456789", by which implementations of CRC-32 are told
    assert hash_words("123456789", 8192) == [((check & 8191) + 1, (check >> 13 & 8191) + 1)]
    with pytest.raises(TypeError, match="expected a list of strings"):
        encoder("a red circle")
    with pytest.raises(ValueError, match="dim a multiple of 2"):
        WordEncoder(30, num_heads=4)


def test_packed_text() -> None:
    encoder = WordEncoder(32)
    parts = [encoder(CAPTIONS[:1]), PackedText.empty(2, 32), encoder(CAPTIONS[1:])]
    whole = PackedText.concat(parts)
    assert whole.cu_seqlens.tolist() == [0, 5, 5, 5, 6, 7, 17]
    assert whole.cu_seqlens.dtype == torch.int32
    assert whole.num_samples == 6
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert all(a <= b for a, b in pairwise(whole.cu_seqlens.tolist()))
    dropped = drop_captions(["x"] * 10_000, 0.1, torch.Generator().manual_seed(0))
    assert 900 < dropped.count("") < 1100
    with pytest.raises(ValueError, match="probability"):
        drop_captions(["x"], 1.5)
