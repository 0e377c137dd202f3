"""The attention backends that diffusers' models are given: right values, masks, refusals, and no value read from the device."""

import os
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers_contract import Reads
from tolerance import allowed_error, error, largest
from torch import Tensor

from sora_kernels import backends
from sora_kernels.integrations import diffusers as ours
from sora_kernels.integrations.key_mask import pack_keys, packed_keys

B, S, SK, H, D = 3, 11, 14, 2, 16


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float = D**-0.5) -> tuple[Tensor, Tensor]:
    """(out, lse) at the inputs' dtype; a query without keys gets 0 and -inf."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    p = scores.softmax(-1).nan_to_num(0)
    return torch.einsum("bhqk,bkhd->bqhd", p, v), scores.logsumexp(-1)


def padded(where: str) -> Tensor:
    """Of three samples: 14, 9 and 5 keys, or one sample without any."""
    mask = torch.ones(B, SK, dtype=torch.bool)
    for b, missing in enumerate((0, 5, 9)):
        first = {"front": 0, "middle": 3, "end": SK - missing}.get(where, 0)
        mask[b, first : first + missing] = False
    if where == "sample":
        mask[1] = False
    return mask


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, n, H, D).to(dtype).requires_grad_() for n in (S, SK, SK)]


def run(function: Callable, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    out = function(*tensors)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), list(torch.autograd.grad(out, tensors, cotangent))


def dispatched(backend: str, **options: object) -> Callable:
    return lambda q, k, v: dispatch_attention_fn(q, k, v, backend=AttentionBackendName(backend), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["[B, Sk]", "[B, 1, 1, Sk]"])
@pytest.mark.parametrize("where", ["front", "middle", "end", "sample", "none"])
@pytest.mark.parametrize("backend", ours.BACKENDS)
def test_masks_of_keys(backend: str, where: str, form: str, dtype: torch.dtype) -> None:
    """Output and gradients obey the rule; padding keys get a gradient of exactly 0."""
    mask, tensors = padded(where), inputs(dtype)
    given = mask if form == "[B, Sk]" else mask[:, None, None]
    out, grads = run(dispatched(backend, attn_mask=given), tensors)
    exact = run(lambda q, k, v: formula(q, k, v, mask)[0], [x.detach().double().requires_grad_() for x in tensors])
    plain = run(lambda q, k, v: formula(q, k, v, mask)[0], tensors)
    for got, right, rough in zip([out, *grads], [exact[0], *exact[1]], [plain[0], *plain[1]], strict=True):
        assert error(got, right) <= allowed_error(rough, right, dtype)
    for grad in grads[1:]:
        assert largest(grad[~mask]) == 0


@pytest.mark.parametrize("where", ["front", "middle", "end", "sample"])
def test_lse(where: str) -> None:
    mask, (q, k, v) = padded(where), inputs()
    out, lse = ours.sora_varlen(q, k, v, attn_mask=mask, return_lse=True)
    right, right_lse = formula(q.double(), k.double(), v.double(), mask)
    assert error(out, right) < 1e-6
    assert lse.shape == (B, H, S)
    assert error(lse, right_lse) < 1e-6
    for backend in (ours.sora, ours.sora_varlen):
        _, lse = backend(q, k, v, return_lse=True)
        assert error(lse, formula(q.double(), k.double(), v.double(), None)[1]) < 1e-6


def test_additive_masks() -> None:
    """Numbers are added to the scores by "sora"; "sora_varlen" takes masks of keys only."""
    q, k, v = inputs()
    numbers = torch.randn(B, 1, 1, SK)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).double() * D**-0.5 + numbers
    right = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    assert error(ours.sora(q, k, v, attn_mask=numbers), right) < 1e-6


def test_no_value_of_a_mask_is_read() -> None:
    with Reads() as reads:
        pack_keys(padded("middle"))
        padded("middle").nonzero()
    assert reads.count == 1, "the counter counts"


def test_a_mask_is_packed_once_while_it_is_the_same() -> None:
    mask, (q, k, v) = padded("front"), inputs()
    with mock.patch("sora_kernels.integrations.key_mask.pack_keys", wraps=pack_keys) as packing:
        for _ in range(3):
            ours.sora_varlen(q, k, v, attn_mask=mask)
        assert packing.call_count == 1
        mask[0, :2] = False
        out = ours.sora_varlen(q, k, v, attn_mask=mask)
        assert packing.call_count == 2
        ours.sora_varlen(q, k, v, attn_mask=mask.clone())
        assert packing.call_count == 3
    assert error(out, formula(q.double(), k.double(), v.double(), mask)[0]) < 1e-6


def test_what_a_mask_was_packed_to_goes_with_it() -> None:
    ours.sora_varlen(*inputs(), attn_mask=padded("front"))
    assert packed_keys.kept is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p: expected 0 (attention dropout is not supported), got 0.1"),
        ({"_parallel_config": object()}, "_parallel_config: expected None, as there is no context parallelism, got object"),
        ({"attn_mask": torch.ones(B, 1, S, SK, dtype=torch.bool)}, "attn_mask: expected a mask of keys, ~, got [3, 1, 11, 14]"),
        ({"attn_mask": torch.ones(B, H, 1, SK, dtype=torch.bool)}, "attn_mask: expected a mask of keys, ~, got [3, 2, 1, 14]"),
        ({"attn_mask": torch.zeros(B, SK)}, "attn_mask: expected dtype bool (~), got float32"),
        ({"attn_mask": torch.ones(B, SK + 1, dtype=torch.bool)}, "attn_mask: expected a mask of keys, ~, got [3, 15]"),
        (
            {"attn_mask": torch.ones(B, SK, dtype=torch.bool), "is_causal": True},
            "attn_mask: expected None with is_causal=True, got a mask",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict, message: str) -> None:
    q, k, v = inputs()
    head, _, tail = message.partition("~")
    with pytest.raises((ValueError, TypeError), match="sora") as raised:
        ours.sora_varlen(q, k, v, **options)
    assert head in str(raised.value)
    assert str(raised.value).endswith(tail)


def test_keys_and_values_of_a_mask() -> None:
    """Those of one sample serve a batch; other shapes are refused, as rows are taken by number."""
    q, k, v = (x.detach() for x in inputs())
    mask = padded("middle")
    shared = formula(q.double(), k[:1].double().expand(B, -1, -1, -1), v[:1].double().expand(B, -1, -1, -1), mask)[0]
    assert error(ours.sora_varlen(q, k[:1], v[:1], attn_mask=mask), shared) < 1e-6
    with pytest.raises(ValueError, match=r"sora_varlen: value: expected shape \[3 or 1, 14, 2, d\], got \[3, 13, 2, 16\]"):
        ours.sora_varlen(q, k, v[:, 1:], attn_mask=mask)
    with pytest.raises(ValueError, match=r"sora_varlen: key: expected shape \[3 or 1, 14, 2, d\], got \[6, 14, 2, 16\]"):
        ours.sora_varlen(q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), attn_mask=mask)


def test_lse_that_sora_does_not_have_is_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="sora: return_lse: expected False with an attn_mask, got True"):
        ours.sora(q, k, v, attn_mask=padded("end"), return_lse=True)
    with pytest.raises(ValueError, match="sora: return_lse: expected False with is_causal and 11 queries of 14 keys, got True"):
        ours.sora(q, k, v, is_causal=True, return_lse=True)
    with pytest.raises(ValueError, match="sora: enable_gqa: expected True for 2 query heads and 1 key heads, got False"):
        ours.sora(q, k[:, :, :1], v[:, :, :1])


def wan() -> tuple[torch.nn.Module, dict]:
    config = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 64, "text_dim": 32, "freq_dim": 32}
    model = diffusers.WanTransformer3DModel(**config, in_channels=4, out_channels=4, rope_max_seq_len=32)
    given = {"hidden_states": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor([5, 900])}
    return model, {**given, "encoder_hidden_states": torch.randn(2, 7, 32)}


def hunyuan() -> tuple[torch.nn.Module, dict]:
    config = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    shapes = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 32, "pooled_projection_dim": 16}
    model = diffusers.HunyuanVideoTransformer3DModel(**config, **shapes, guidance_embeds=False)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    given = {"hidden_states": torch.randn(2, 4, 2, 8, 8), "timestep": torch.tensor([5, 900]), "encoder_attention_mask": mask}
    return model, {**given, "encoder_hidden_states": torch.randn(2, 9, 32), "pooled_projections": torch.randn(2, 16)}


def ltx() -> tuple[torch.nn.Module, dict]:
    config = {"num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128, "caption_channels": 32}
    model = diffusers.LTXVideoTransformer3DModel(**config, in_channels=8, out_channels=8, num_layers=2)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0  # T5's tokenizer may pad in front
    given = {"hidden_states": torch.randn(2, 24, 8), "timestep": torch.tensor([5, 900]), "encoder_attention_mask": mask}
    return model, {**given, "encoder_hidden_states": torch.randn(2, 9, 32), "num_frames": 2, "height": 3, "width": 4}


def flux() -> tuple[torch.nn.Module, dict]:
    config = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 1, "num_single_layers": 1}
    shapes = {"in_channels": 8, "joint_attention_dim": 32, "pooled_projection_dim": 16}
    model = diffusers.FluxTransformer2DModel(**config, **shapes, guidance_embeds=False)
    given = {"hidden_states": torch.randn(2, 12, 8), "timestep": torch.tensor([0.1, 0.9]), "pooled_projections": torch.randn(2, 16)}
    ids = {"img_ids": torch.randint(0, 5, (12, 3)).float(), "txt_ids": torch.zeros(5, 3)}
    return model, {**given, **ids, "encoder_hidden_states": torch.randn(2, 5, 32)}


# LTX adds numbers to the scores, which are no mask of keys.
ON_MODELS = [*((make, backend) for make in (wan, hunyuan, flux) for backend in ours.BACKENDS), (ltx, "sora")]


@pytest.mark.parametrize(("make", "backend"), ON_MODELS)
def test_models(make: Callable, backend: str) -> None:
    """Real head dims, masks where the model makes them: the output and every gradient are those of torch's attention."""
    torch.manual_seed(0)
    model, given = make()

    def results() -> list[Tensor]:
        model.zero_grad()
        out = model(**given, return_dict=False)[0]
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with backends.record() as calls:
        native = results()
    assert not calls
    with attention_backend(backend), backends.record() as calls:
        here = results()
    assert {name for name, _ in calls} >= {"attention_forward", "attention_backward"}
    for got, right in zip(here, native, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5 * max(1, largest(right)))
    model.set_attention_backend(backend)
    torch.testing.assert_close(results(), here, rtol=1e-5, atol=1e-6)


def test_numbers_that_ltx_adds_to_scores_are_not_taken_for_a_mask_of_keys() -> None:
    model, given = ltx()
    with (
        attention_backend("sora_varlen"),
        pytest.raises(TypeError, match=r"sora_varlen: attn_mask: expected dtype bool .*, got float32"),
    ):
        model(**given)


def test_compiled_whole() -> None:
    """In one graph, for padding of any kind and sizes that change, without a new graph after the second."""
    frames = []

    def count(graph, example):
        frames.append(1)
        return graph

    function = torch.compile(dispatched("sora_varlen"), fullgraph=True, dynamic=True, backend=count)
    masked = torch.compile(
        lambda q, k, v, mask: dispatch_attention_fn(q, k, v, attn_mask=mask, backend=AttentionBackendName("sora_varlen")),
        fullgraph=True, dynamic=True, backend=count,
    )  # fmt: skip
    for size in (5, 9, 14, 23):
        q, k, v = (torch.randn(2, size, H, D) for _ in range(3))
        mask = torch.rand(2, size) < 0.7
        assert error(function(q, k, v), formula(q.double(), k.double(), v.double(), None)[0]) < 1e-6
        assert error(masked(q, k, v, mask), formula(q.double(), k.double(), v.double(), mask)[0]) < 1e-6
    assert len(frames) <= 4


@pytest.mark.parametrize(("program", "expected"), [
    ("import sora_kernels.integrations.diffusers", "sora"),
    ("import diffusers", "'sora' is not a valid AttentionBackendName"),
])  # fmt: skip
def test_by_environment_variable(program: str, expected: str) -> None:
    """If we come first; otherwise diffusers itself refuses the name, in its own words."""
    show = "from diffusers.models.attention_dispatch import _AttentionBackendRegistry as r; print(r.get_active_backend()[0].value)"
    command = [sys.executable, "-c", f"{program}; {show}"]
    done = subprocess.run(command, env={**os.environ, "DIFFUSERS_ATTN_BACKEND": "sora"}, capture_output=True, text=True)
    assert expected in done.stdout + done.stderr


def test_importing_the_kernels_imports_no_other_library() -> None:
    command = "import sys, sora_kernels.attention; print('diffusers' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout.split() == ["False", "False"]
