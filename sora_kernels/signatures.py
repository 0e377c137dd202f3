"""What every backend function takes: the one declaration of names and order that all backends are held to.

    function(inputs) -> outputs           a "?" behind a name: may be None
    function(inputs; hints) -> outputs    hints are for backends that ask for them, and change no result where they are true

The caller allocates the outputs, and the function writes into them: they are its last arguments. An output of None is not wanted.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Signature(NamedTuple):
    """The arguments of a backend function by name, in their order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional: frozenset[str]
    hints: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.inputs + self.outputs


def parse(text: str) -> tuple[str, Signature]:
    """Name and signature of a declaration.

    >>> parse("bias_gelu_forward(x, bias?) -> out")
    ('bias_gelu_forward', Signature(inputs=('x', 'bias'), outputs=('out',), optional=frozenset({'bias'}), hints=()))
    """
    found = re.fullmatch(r"(\w+)\(([\w?, ]+)(?:; ([\w?, ]+))?\) -> ([\w?, ]+)", text)
    if found is None:
        raise ValueError(f"signatures: text: expected 'function(inputs) -> outputs', got {text!r}")
    inputs, outputs, hints = ((found[group] or "").split(", ") for group in (2, 4, 3))
    optional = frozenset(name.rstrip("?") for name in inputs + outputs if name.endswith("?"))
    return found[1], Signature(_names(inputs), _names(outputs), optional, _names(hints) if found[3] else ())


def _names(texts: list[str]) -> tuple[str, ...]:
    return tuple(text.rstrip("?") for text in texts)


_TABLES = "cu_spans, grid, origin, step, theta, axes_dim, interleaved"
_WINDOWS = "cu_seqlens, cu_spans, grid, step, window, causal, scale"
_SCORES = "cu_q?, cu_k?, bias?, alibi?, scale, left, right, softcap"
_BLOCKS = "cu_blocks_q, cu_blocks_k, cu_samples_q, cu_samples_k, offsets, indices"
_NORM = "cu_rows?, rms, weight?, bias?"

SIGNATURES = dict(
    map(
        parse,
        (
            f"attention_forward(q, k, v, {_SCORES}; max_q?, max_k?) -> out, lse, statistics",
            f"attention_backward(dout, dlse?, q, k, v, out, statistics, {_SCORES}; max_q?, max_k?) -> dq, dk, dv",
            f"spatiotemporal_attention_forward(q, k, v, {_WINDOWS}) -> out, statistics",
            f"spatiotemporal_attention_backward(dout, q, k, v, out, statistics, {_WINDOWS}) -> dq, dk, dv",
            f"block_sparse_attention_forward(q, k, v, {_BLOCKS}, block_q, block_k, scale) -> out, lse, statistics",
            f"block_sparse_attention_backward(dout, dlse?, q, k, v, out, statistics, {_BLOCKS}, key_offsets, key_indices, block_q,"
            " block_k, scale) -> dq, dk, dv",
            "int8_attention_forward(q, k, v, cu_q?, cu_k?, bias?, scale, left, right, block_q, block_k) -> out, lse",
            f"rope_3d(x, {_TABLES}, inverse) -> out",
            f"qk_norm_rope_3d_forward(q, k, q_weight?, k_weight?, {_TABLES}, across_heads, eps) -> q_out, k_out, q_rstd, k_rstd",
            f"qk_norm_rope_3d_backward(dq_out, dk_out, q, k, q_weight?, k_weight?, q_rstd, k_rstd, {_TABLES}, across_heads)"
            " -> dq, dk, dq_weight?, dk_weight?",
            "apply_rope(x, cos, sin, interleaved, inverse) -> out",
            "norm_rope_forward(x, weight?, bias?, cos?, sin?, layer, across_heads, interleaved, eps) -> out, mean?, rstd",
            "norm_rope_backward(dout, x, weight?, bias?, cos?, sin?, mean?, rstd, layer, across_heads, interleaved)"
            " -> dx, dweight?, dbias?",
            f"layer_norm_modulate_forward(x, shift?, scale?, {_NORM}, eps) -> out, mean, rstd",
            f"layer_norm_modulate_backward(dout, x, scale?, {_NORM}, mean, rstd) -> dx, dshift?, dscale?, dweight?, dbias?",
            "gate_residual_forward(residual, x, gate?, cu_rows?) -> out",
            "gate_residual_backward(dout, x?, gate?, cu_rows?) -> dresidual, dx?, dgate?",
            f"gate_residual_layer_norm_modulate_forward(residual, x, gate?, shift?, scale?, {_NORM}, eps)"
            " -> residual_out, out, mean, rstd",
            f"gate_residual_layer_norm_modulate_backward(dresidual_out, dout, residual_out, x?, gate?, scale?, {_NORM}, mean, rstd)"
            " -> dresidual, dx?, dgate?, dshift?, dscale?, dweight?, dbias?",
            f"norm_gate_residual_forward(residual, x, gate?, {_NORM}, eps) -> out, mean, rstd",
            f"norm_gate_residual_backward(dout, x, gate?, {_NORM}, mean, rstd) -> dresidual?, dx, dgate?, dweight?, dbias?",
            "bias_gelu_forward(x, bias?) -> out",
            "bias_gelu_backward(dout, x, bias?) -> dx, dbias?",
            "patch_embed_3d_forward(videos, weight, bias?, patch_size) -> tokens",
            "patch_embed_3d_backward(dtokens, videos, weight, patch_size) -> dvideos?, dweight, dbias?",
            "patchify_3d(videos, patch_size) -> tokens",
            "unpatchify_3d(tokens, patch_size) -> videos",
        ),
    )
)
