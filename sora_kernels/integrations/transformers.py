"""transformers' models on these kernels. Importing this registers the attention implementation "sora".

>>> from transformers import CLIPTextConfig, CLIPTextModel
>>> config = CLIPTextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
>>> model = CLIPTextModel(config)
>>> model.set_attn_implementation("sora")
>>> model(torch.randint(0, 1000, (1, 16))).last_hidden_state.shape
torch.Size([1, 16, 64])

A new model takes it by `from_pretrained(..., attn_implementation="sora")`. Masks are those of "sdpa", so every model that runs with
that one has the same masks here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..attention import scaled_dot_product_attention
from ..checks import fail

NAME = "sora"


def sora(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    output_attentions: bool | None = None,
    cache: Any = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as a model calls it.

    Args:
        module: its `is_causal` says whether the model is a decoder where the call does not.
        query: [B, H, S, d].
        key, value: [B, Hk, Sk, d]; H is a multiple of Hk.
        attention_mask: broadcastable to [B, H, S, Sk]: bool, True is seen, or numbers to add to the scores.
        dropout: must be 0.
        position_bias: numbers to add to the scores, such as T5's, [1, H, S, Sk]; it may need a gradient.
        softcap, output_attentions, cache, s_aux: must be None or False. Scores are neither capped nor returned, and there is no
            paged cache and no attention sink.

    Other keywords are the model's own and change nothing that its mask does not say.

    Returns:
        (out [B, S, H, d], None).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if dropout:
        fail(
            NAME,
            "dropout",
            "0 (attention dropout is not supported; call model.eval(), or build the model with its config's dropout at 0)",
            str(dropout),
        )
    for name, given in (("softcap", softcap), ("output_attentions", output_attentions), ("cache", cache), ("s_aux", s_aux)):
        if given is not None and given is not False:
            fail(NAME, name, "None", repr(given) if isinstance(given, float | bool) else type(given).__name__)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1  # one query sees all that came before it
    mask = attention_mask
    if position_bias is not None:
        mask = _biased(position_bias, attention_mask, (query.shape[2], key.shape[2]) if causal else None)
        causal = False
    out = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def _biased(bias: Tensor, mask: Tensor | None, causal: tuple[int, int] | None) -> Tensor:
    """A bias where the mask lets a key be seen; causal: the sizes of the scores whose upper right is not."""
    if causal is not None:
        mask = torch.ones(causal, dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


AttentionInterface.register(NAME, sora)
AttentionMaskInterface.register(NAME, sdpa_mask)
