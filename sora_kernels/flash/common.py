"""What kernels of others can do, and what this package promises around them.

Rows of no sample are zeros, and their lse is -inf; so are those of queries that see no key. Gradients are zero there, too. What is
NaN stays NaN. The statistics are those of every backend, so that any backward can follow any forward.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from .. import backends
from ..attention_op import lse_of_statistics, statistics_of_lse
from ..checks import UNBOUNDED

# A call's arguments by the names of signatures.py.
Call = dict[str, Any]
_MOST_ELEMENTS = 2**31 - 1  # whose offsets fit 32 bits, which some of these kernels count in
_LEAST_SCALE = 1e-30  # by which lse can be divided without an overflow


class Limits(NamedTuple):
    """What a kernel can do beyond plain attention."""

    head_dim: int  # at most; all want a multiple of 8
    window: bool = True
    softcap: bool = False
    alibi: bool = False
    grouped: bool = True  # fewer key heads than query heads
    dlse: bool = False  # a gradient of lse in the backward
    square_causal: bool = False  # a causal mask only over as many keys as queries
    contiguous: bool = False
    packed: bool = True
    # A window as wide as the longest sample's keys counts as one without an end: wrong over more queries than keys.
    clips_windows: bool = False


class Window(NamedTuple):
    """How many keys before and after its own a query sees; -1: all."""

    left: int
    right: int

    @property
    def is_causal(self) -> bool:
        return self == (-1, 0)


def missing(module: str, package: str, at_least: str, majors: tuple[int, ...], functions: tuple[str, ...] = ()) -> str | None:
    """Why a package's kernels cannot run on this machine, or None.

    majors: of the compute capabilities that its kernels are for. functions: what is called of the module.
    """
    if torch.cuda.is_available():
        if torch.version.hip is not None:
            return "is for NVIDIA GPUs"
        capability = torch.cuda.get_device_capability()
        if capability[0] not in majors:
            kinds = " and ".join(f"{major}.x" for major in majors)
            return f"is for compute capability {kinds}; this GPU has {'.'.join(map(str, capability))}"
    try:
        found = loaded(module)
    except Exception as error:  # a binary of another torch fails in more ways than ImportError
        return f"needs {package}, which cannot be imported: {type(error).__name__}: {error}"
    version = _version(package)
    if version is not None and version.endswith("+sora"):
        return f"needs {package} itself, not the stand-in for it that is installed"
    # None: built in place, which the functions say more of.
    if version is not None and not (version[:1].isdigit() and TorchVersion(version) >= at_least):
        return f"needs {package} {at_least} or above, not {version}"
    for name in functions:
        if not hasattr(found, name):
            return f"needs {package} {at_least} or above, with {module}.{name}"
    return None


def _version(package: str) -> str | None:
    """Of the imported module of this name, or else of the distribution."""
    version = getattr(sys.modules.get(package), "__version__", None)
    if not isinstance(version, str):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None
    return version


def limited(call: Call, limits: Limits) -> str | None:
    """Why a kernel of these limits cannot do a call, or None."""
    q, k = call["q"], call["k"]
    left, right = window(call)
    if call["cu_q"] is not None and not limits.packed:
        return "has no packed batches"
    if call["bias"] is not None:
        return "has no mask"
    if call["alibi"] is not None and not limits.alibi:
        return "has no ALiBi"
    if call["softcap"] > 0 and not limits.softcap:
        return "has no softcap"
    if call["left"] < 0 or call["right"] < 0:
        return "takes a negative side of a window for one without an end"
    if not limits.window and not (window(call).is_causal or left == right == -1):
        return "has no window"
    if limits.square_causal and right == 0 and q.shape[1] != k.shape[1]:
        return "needs as many keys as queries under a causal mask"
    if call["scale"] < _LEAST_SCALE:
        return f"needs a softmax_scale of at least {_LEAST_SCALE}"
    if call.get("dlse") is not None and not limits.dlse:
        return "has no gradient of lse"
    if q.shape[-1] > limits.head_dim or q.shape[-1] % 8:
        return f"needs a head dim of at most {limits.head_dim} that 8 divides, not {q.shape[-1]}"
    if k.shape[-2] != q.shape[-2] and not limits.grouped:
        return f"needs as many key heads as query heads, not {k.shape[-2]} and {q.shape[-2]}"
    if call["cu_q"] is not None and None in (call["max_q"], call["max_k"]):
        return "needs max_seqlen_q and max_seqlen_k as numbers on the host"
    if limits.clips_windows and (right < 0 <= left or right >= longest(call)[1]) and not _has_as_many_keys(call):
        return "needs as many keys as queries under such a window"
    if call["cu_q"] is not None and call["cu_q"].numel() < 2:
        return "needs a sample"
    for name in ("q", "k", "v", "dout"):
        if name in call and (reason := _unreadable(name, call[name], limits.contiguous)):
            return reason
    return None


def _has_as_many_keys(call: Call) -> bool:
    most_q, most_k = longest(call)
    return most_q <= most_k + 1  # the last query may see nothing


def _unreadable(name: str, x: Tensor, contiguous: bool) -> str | None:
    """Why a kernel cannot read x in units of 16 bytes, or None."""
    if x.numel() == 0:
        return f"needs queries and keys; {name} has shape {list(x.shape)}"
    if x.numel() > _MOST_ELEMENTS:
        return f"counts in 32 bits; {name} has {x.numel()} elements"
    if contiguous and not x.is_contiguous():
        return f"needs {name} contiguous, not with strides {list(x.stride())}"
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.data_ptr() % 16 or any(stride % 8 for stride in strides):
        return f"needs rows of {name} at multiples of 16 bytes, not strides {list(x.stride())} from address {x.data_ptr()}"
    return None


def window(call: Call) -> Window:
    """As flash_attn has it."""
    left, right = call["left"], call["right"]
    return Window(-1 if left >= UNBOUNDED else left, -1 if right >= UNBOUNDED else right)


def longest(call: Call) -> tuple[int, int]:
    """Queries and keys of the longest sample."""
    return (call["q"].shape[1], call["k"].shape[1]) if call["cu_q"] is None else (call["max_q"], call["max_k"])


def samples(call: Call) -> dict[str, Any]:
    """Where the samples of a packed batch are, by flash_attn's names; None for a dense one."""
    return {
        "cu_seqlens_q": call["cu_q"],
        "cu_seqlens_k": call["cu_k"],
        "max_seqlen_q": call["max_q"],
        "max_seqlen_k": call["max_k"],
    }


def wants_determinism() -> bool:
    """Whether a backward has to add in a fixed order, which costs time."""
    return backends.preferred() != "fastest" or torch.are_deterministic_algorithms_enabled()


@functools.cache
def parameters(function: Callable) -> frozenset[str]:
    """The names that a function takes, which differ between versions; torch hides those of its custom operators."""
    return frozenset(inspect.signature(getattr(function, "_init_fn", function)).parameters)


def loaded(module: str) -> ModuleType:
    return importlib.import_module(module)


def store(call: Call, found: Tensor, found_lse: Tensor) -> None:
    """Writes what a forward found into the outputs of the call.

    found: as out; anything in rows of no sample. found_lse: as lse; an infinity for queries without keys, and for those whose
    scores are NaN, which a NaN in `found` tells apart.
    """
    is_nan = found[..., 0].isnan().mT
    masked = found_lse.isinf() & ~is_nan
    if call["cu_q"] is not None:
        masked = masked | _slack(call["cu_q"], len(found))
    lse = found_lse.masked_fill(found_lse.isinf() & is_nan, torch.nan).masked_fill(masked, -torch.inf)
    call["lse"].copy_(lse)
    torch.where(masked.mT[..., None], found.new_zeros(()), found, out=call["out"])
    call["statistics"].copy_(statistics_of_lse(lse, call["scale"], _is_plain(call)))


def stored_lse(call: Call, of_masked: float) -> Tensor:
    """The lse of a backward's call, float32, with `of_masked` for queries without keys, as each of these kernels has its own."""
    lse = lse_of_statistics(call["statistics"], call["scale"], _is_plain(call))
    return lse.masked_fill(lse == -torch.inf, of_masked)


def _is_plain(call: Call) -> bool:
    return call["alibi"] is None and call["softcap"] <= 0


def store_gradients(call: Call, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes them into the outputs of the call, with zeros in rows of no sample; they may be those outputs."""
    for name, found, cu in (("dq", dq, call["cu_q"]), ("dk", dk, call["cu_k"]), ("dv", dv, call["cu_k"])):
        if cu is None:
            call[name].copy_(found)
        else:
            torch.where(_slack(cu, len(found))[:, None, None], found.new_zeros(()), found, out=call[name])


def _slack(cu: Tensor, rows: int) -> Tensor:
    """Which rows come after the last sample, without reading where that ends."""
    return torch.arange(rows, device=cu.device) >= cu[-1]
