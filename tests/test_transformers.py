"""transformers' models with the attention "sora": values and gradients, masks, position bias, refusals."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.t5 import modeling_t5

from sora_kernels import backends
from sora_kernels.integrations import transformers as ours

# Before transformers 5.15, T5's attention is its own and asks for no implementation.
T5_ASKS = pytest.mark.skipif(not hasattr(modeling_t5, "ALL_ATTENTION_FUNCTIONS"), reason="T5 computes its attention itself")


def clip() -> tuple[torch.nn.Module, dict]:
    """Causal, with padding behind the text."""
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, eos_token_id=98
    )
    return transformers.CLIPTextModel(config), {}


def t5() -> tuple[torch.nn.Module, dict]:
    """A learned bias of relative positions."""
    config = transformers.T5Config(vocab_size=99, d_model=64, d_kv=64, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0)
    return transformers.T5EncoderModel(config), {}


def umt5() -> tuple[torch.nn.Module, dict]:
    """A bias in every layer."""
    config = transformers.UMT5Config(vocab_size=99, d_model=64, d_kv=64, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0)
    return transformers.UMT5EncoderModel(config), {}


def decoder() -> tuple[torch.nn.Module, dict]:
    """Grouped heads, causal."""
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config), {"labels": torch.randint(0, 98, (3, 13))}


def padded(where: str) -> Tensor:
    mask = torch.ones(3, 13, dtype=torch.long)
    for b, missing in enumerate((0, 4, 9)):
        first = {"front": 0, "middle": 3, "end": 13 - missing}[where]
        mask[b, first : first + missing] = 0
    return mask


@pytest.mark.parametrize("where", ["none", "front", "middle", "end"])
@pytest.mark.parametrize("make", [clip, pytest.param(t5, marks=T5_ASKS), pytest.param(umt5, marks=T5_ASKS), decoder])
def test_models(make: Callable, where: str) -> None:
    """Every output of a token that is there, and every gradient, the bias's included, as with torch's attention."""
    torch.manual_seed(0)
    model, given = make()
    given["input_ids"] = torch.randint(0, 98, (3, 13))
    if where != "none":
        given["attention_mask"] = padded(where)
    there = given.get("attention_mask", torch.ones(3, 13)).bool()

    def results(name: str) -> list[Tensor]:
        model.set_attn_implementation(name)
        model.zero_grad()
        out = model(**given)[1 if "labels" in given else 0]
        out[there].square().mean().backward()
        return [out[there].detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    right = results("sdpa")
    with backends.record() as calls:
        here = results("sora")
    assert {name for name, _ in calls} >= {"attention_forward", "attention_backward"}
    for got, expected in zip(here, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_generation() -> None:
    """With a cache: prefill, then a query at a time."""
    torch.manual_seed(0)
    model, _ = decoder()
    ids, mask = torch.randint(0, 98, (3, 13)), padded("front")
    made = []
    for name in ("sdpa", "sora"):
        model.set_attn_implementation(name)
        made.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "sora: dropout: expected 0 .*, got 0.1"),
        ({"softcap": 50.0}, "sora: softcap: expected None, got 50.0"),
        ({"output_attentions": True}, "sora: output_attentions: expected None, got True"),
        ({"cache": object()}, "sora: cache: expected None, got object"),
        ({"s_aux": torch.zeros(2)}, "sora: s_aux: expected None, got Tensor"),
        ({"attention_mask": torch.ones(1, 1, 3, 9)}, "attn_mask: expected a shape that broadcasts to"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict, message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 16)
    with pytest.raises(ValueError, match=message):
        ours.sora(torch.nn.Identity(), q, k, v, **{"attention_mask": None, **options})
