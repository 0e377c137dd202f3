"""A `DiT` with Wan's weights is diffusers' WanTransformer3DModel, packed, whatever the sizes, times and lengths of prompts."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from test_dit import awake, latents_of
from tolerance import allowed_error, assert_bit_equal, error
from torch import Tensor

from sora_model.model.conditioning import PackedText
from sora_model.model.config import DiTConfig
from sora_model.model.convert.wan import from_diffusers_wan, load_wan, to_diffusers_wan, wan_config, weight_names
from sora_model.model.dit import DiT
from sora_model.model.experts import Experts

SMALL = {"num_attention_heads": 2, "attention_head_dim": 128, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_dim": 32}
SIZES = [(3, 8, 8), (1, 12, 4), (2, 4, 16)]
LENGTHS = [7, 512, 0]


def wan(**changes) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return awake(WanTransformer3DModel(**(SMALL | {"ffn_dim": 320, "rope_max_seq_len": 32} | changes))).eval()


KINDS = {
    "text": {},
    "given channels": {"in_channels": 9},
    "image": {"in_channels": 9, "image_dim": 24, "added_kv_proj_dim": 256},
    "first and last image": {"in_channels": 9, "image_dim": 24, "added_kv_proj_dim": 256, "pos_embed_seq_len": 10},
}
"""Options of each kind of Wan: text to video and TI2V; 2.2's image to video; 2.1's; 2.1's with both ends given."""


def inputs(model: WanTransformer3DModel, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor] | None]:
    """Latents, and CLIP's tokens of one image for each sample or of two."""
    latents = [x.to(dtype) for x in latents_of(SIZES, model.config.in_channels)]
    if model.config.image_dim is None:
        return latents, None
    tokens = 5 if model.config.pos_embed_seq_len is None else 10
    generator = torch.Generator().manual_seed(4)
    return latents, [torch.randn(tokens, model.config.image_dim, generator=generator).to(dtype) for _ in SIZES]


def captions(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 32, generator=generator).to(dtype) for n in LENGTHS]


def packed(texts: list[Tensor]) -> PackedText:
    lengths = torch.tensor([0, *map(len, texts)]).cumsum(0).int()
    return PackedText(torch.cat(texts), lengths, texts[0].new_zeros(len(texts), 32))


def alone(
    model: WanTransformer3DModel,
    latents: list[Tensor],
    times: list[Tensor],
    texts: list[Tensor],
    images: list[Tensor] | None = None,
) -> list[Tensor]:
    """As diffusers' pipelines call it: each sample by itself, its prompt padded with zeros to 512 tokens."""
    outs = []
    for x, t, text, image in zip(latents, times, texts, images or [None] * len(latents), strict=True):
        if image is not None:  # two images are a batch
            image = image[None] if model.config.pos_embed_seq_len is None else image.unflatten(0, (2, -1))
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text)))
        if t.ndim:  # a time for each token, of its frame
            t = t.repeat_interleave(x.shape[2] * x.shape[3] // 4)
        outs.append(model(x[None], t[None], text[None], image, return_dict=False)[0][0])
    return outs


def results(model: torch.nn.Module, outs: list[Tensor]) -> dict[str, Tensor]:
    sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outs).backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    return found | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "per_frame"), [("text", True), *((kind, False) for kind in KINDS)])
def test_equals_diffusers(kind: str, dtype: torch.dtype, per_frame: bool) -> None:
    """Outputs and the gradient of every weight, against diffusers in float64."""
    model = wan(**KINDS[kind])
    exact = copy.deepcopy(model).double()
    for name, p in model.named_parameters():
        if not any(part in name for part in ("time_embedder", "scale_shift_table", "norm1", "norm2")):
            p.data = p.data.to(dtype)
    ours = from_diffusers_wan(model)
    (latents, images), texts = inputs(model, dtype), captions(dtype)
    times = [torch.tensor([0.0, 500.0, 500.0]), torch.tensor([900.0]), torch.tensor([20.0, 0.0])]
    times = times if per_frame else [t.max() for t in times]

    plain = results(model, alone(model, latents, times, texts, images))
    wide = [None if listed is None else [x.double() for x in listed] for listed in (latents, texts, images)]
    right = results(exact, alone(exact, wide[0], times, *wide[1:]))
    levels = torch.cat(times) if per_frame else torch.stack(times)
    got = results(ours, ours(latents, levels, packed(texts), image_tokens=images))

    theirs = weight_names(ours.config)
    for name, value in got.items():
        parts = theirs.get(name, (name,))
        of = [torch.cat([found[part].flatten() for part in parts]) for found in (plain, right)]
        distance, allowed = error(value.flatten(), of[1]), allowed_error(*of, dtype)
        assert distance <= 2 * allowed, f"{name}: {distance:.2g} > {allowed:.2g} of {of[1].abs().max():.2g}"


def test_padding_counts_as_many_keys() -> None:
    """Of a caption given with its zeros and without them, the results are the same."""
    ours, latents, texts = from_diffusers_wan(wan()), latents_of(SIZES), captions()
    filled = [torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text))) for text in texts]
    with torch.no_grad():
        got, want = (ours(latents, torch.tensor([900.0, 500.0, 3.0]), packed(t)) for t in (texts, filled))
        nothing = ours(latents, torch.tensor([900.0, 500.0, 3.0]))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nothing[2], want[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_samples_do_not_depend_on_the_others(checkpointed: bool) -> None:
    ours, latents, texts = from_diffusers_wan(wan()), latents_of(SIZES), captions()
    ours.gradient_checkpointing = checkpointed
    levels = torch.tensor([900.0, 500.0, 3.0])
    for i, out in enumerate(ours(latents, levels, packed(texts))):
        (own,) = ours(latents[i : i + 1], levels[i : i + 1], packed(texts[i : i + 1]))
        torch.testing.assert_close(own, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, dtype: torch.dtype, tmp_path) -> None:
    """To the last bit, and diffusers loads what it gets."""
    model = wan(**KINDS[kind]).to(dtype)
    ours = from_diffusers_wan(model)
    back = to_diffusers_wan(ours)
    same = set(back.config) - {"rope_max_seq_len", "_name_or_path", "_use_default_values"}
    assert {name: back.config[name] for name in same} == {name: model.config[name] for name in same}
    assert_bit_equal([*back.state_dict().values()], [model.state_dict()[name] for name in back.state_dict()])
    assert {p.dtype for p in ours.parameters()} == {dtype}
    back.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype).to(dtype)
    assert_bit_equal([*loaded.state_dict().values()], [*back.state_dict().values()])
    (latents, images), texts = inputs(model, dtype), captions(dtype)
    one = latents[:1], [torch.tensor(500)], texts[:1], images and images[:1]
    with torch.no_grad():  # their tables of positions are in this dtype, too, as model.to has made those of the first
        want, *others = [alone(m.to(dtype), *one)[0] for m in (model, back, loaded)]
    assert_bit_equal(others[:1], [want])
    torch.testing.assert_close(others[1], want, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_weights_are_copies() -> None:
    model = wan()
    before = copy.deepcopy(model.state_dict())
    ours = from_diffusers_wan(model)
    with torch.no_grad():
        for p in [*ours.parameters(), *to_diffusers_wan(ours).parameters()]:
            p += 1
    assert_bit_equal([*model.state_dict().values()], [*before.values()])


def test_what_stays_in_float32() -> None:
    model = wan(**KINDS["first and last image"])
    dit = load_wan(wan_config(model.config, "test"), model.state_dict().__getitem__, torch.bfloat16)
    wide = {name for name, p in dit.named_parameters() if p.dtype == torch.float32}
    of_diffusers = tuple(set(WanTransformer3DModel._keep_in_fp32_modules) - {"norm1", "norm3"})  # which have no weights in blocks
    kept = (*of_diffusers, "image_embedder.norm1")
    assert wide == {ours for ours, theirs in weight_names(dit.config).items() if any(part in theirs[0] for part in kept)}
    assert {p.dtype for p in dit.parameters()} == {torch.float32, torch.bfloat16}
    assert dit.config == DiTConfig.from_dict(dit.config.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_dim": 16, "added_kv_proj_dim": 128}, "added_kv_proj_dim: expected 256, .*, got 128"),
        ({"added_kv_proj_dim": 256}, "added_kv_proj_dim: expected 256, .* None without, got 256"),
        ({"cross_attn_norm": False}, "cross_attn_norm: expected True, got False"),
        ({"freq_dim": 128}, "freq_dim: expected 256, got 128"),
        ({"out_channels": 5}, "out_channels: expected from 1 to in_channels 4, got 5"),
    ],
)
def test_options_that_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"from_diffusers_wan: {message}"):
        from_diffusers_wan(wan(**changes))


@pytest.mark.parametrize("value", [None, "16", 0, 2.5])
def test_numbers_of_a_config_that_are_none(value: object) -> None:
    for name in ("in_channels", "attention_head_dim", "num_layers", "out_channels"):
        if (name, value) != ("out_channels", None):
            with pytest.raises(ValueError, match=f"test: {name}: expected .*, got {value!r}"):
                wan_config(dict(wan().config) | {name: value}, "test")


def test_images_that_do_not_fit_are_refused() -> None:
    for kind, given, message in (
        ("text", [torch.zeros(5, 24)], r"image_tokens: expected None \(no image_dim\), got 1"),
        ("image", None, "image_tokens: expected tokens of 1 samples, got None"),
        ("image", [torch.zeros(5, 24)] * 2, "image_tokens: expected tokens of 1 samples, got 2"),
        ("first and last image", [torch.zeros(5, 24)], r"image_tokens: expected \[10, 24\] for each sample, got \[\[5, 24\]\]"),
    ):
        model = wan(**KINDS[kind])
        with pytest.raises(ValueError, match=f"DiT: {message}"):
            from_diffusers_wan(model)(inputs(model)[0][:1], torch.tensor([500.0]), image_tokens=given)


def test_a_model_of_another_kind_does_not_become_wans() -> None:
    with pytest.raises(ValueError, match=r"to_diffusers_wan: dit: expected a DiT \(each of Experts by itself\), got Experts"):
        to_diffusers_wan(Experts(DiT(DiTConfig()), DiT(DiTConfig()), 500.0))
    with pytest.raises(ValueError, match="to_diffusers_wan: qk_norm_across_heads: expected True, got False"):
        to_diffusers_wan(DiT(DiTConfig(text_dim=32)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": False, "qk_norm_across_heads": True}, "qk_norm: expected a value with qk_norm_across_heads, got False"),
        ({"text_projection": True}, "text_dim: expected a value with text_projection, got None"),
        ({"text_dim": 8, "text_length": 512}, "text_projection: expected a value with text_length, got False"),
        ({"cross_attention_norms": True}, "text_dim: expected a value with cross_attention_norms, got None"),
        ({"modulation": "rows"}, "modulation: expected 'block', 'shared' or 'tables', got 'rows'"),
        ({"text_dim": 8, "image_dim": 8}, "cross_attention_norms: expected a value with image_dim, got False"),
        ({"condition_channels": 3}, "condition_channels: expected from 0 to below in_channels 3, got 3"),
        ({"condition_channels": 1, "prediction": "clean"}, "condition_channels: expected 0 with prediction='clean', got 1"),
        ({"eps": 0}, "eps: expected a number between 0 and 1, got 0"),
        ({"mlp_size": True}, "mlp_size: expected a number of at least 1 or None, got True"),
        ({"timestep_float32": "no"}, "timestep_float32: expected true or false, got 'no'"),
        ({"mlp_size": 0}, "mlp_size: expected a number of at least 1 or None, got 0"),
    ],
)
def test_configs_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"DiTConfig: {message}"):
        DiTConfig(**changes)
