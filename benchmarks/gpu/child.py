"""A process of the driver: the items of one family, each in a row or more: python -m benchmarks.gpu.child FAMILY

A family is a module of this package with `items()`, and NEEDS_TRITON if it is about Triton's kernels. An item that fails costs its
own rows. One after which the GPU answers nothing any more ends the process, and the driver starts another, which goes on with the
next item.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.gpu import rows, simulated
from sora_kernels import backends

if TYPE_CHECKING:
    from benchmarks.race import Race


class Item(NamedTuple):
    name: str
    run: Callable[[], Iterable[dict[str, Any]]]


def why_not() -> str | None:
    """Why nothing can run on a GPU here."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} sees no GPU"


def without_triton(function: str = "attention_forward") -> str | None:
    """Why Triton's kernels cannot run on this GPU, such as one that nothing here knows."""
    reason = backends.BACKENDS["triton"].unavailable(function, "cuda", torch.bfloat16)
    return None if reason is None else f"the Triton backend {reason}"


def measured(race: Race, name: str) -> dict[str, Any]:
    """The row of an implementation; of a peer that does not run here, or of blocks that are too large, the reason."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    from benchmarks import measure  # where the GPU has to be installed already

    try:
        return measure.measured(race, name)
    except Exception as error:
        too_large = name != measure.OURS and isinstance(error, (CompilationError, OutOfResources))
        if not usable() or not (too_large or not name.startswith(measure.OURS)):
            raise
        return {**measure.row(race, name), "reason": rows.one_line(error)}


def usable() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def count_compilations() -> None:
    """Each kernel that Triton has to compile is a row, so that it can be seen what was not prepared."""
    try:
        from triton import knobs
    except ImportError as error:
        print(f"Triton's compilations are not counted: {error}", flush=True)
        return

    def compiled(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            rows.emit(compiled=src.name, seconds=times.total / 1e6)

    knobs.compilation.listener = compiled


def main() -> None:
    family = sys.argv[1]
    simulated.install()
    if reason := why_not():
        rows.emit(skipped=reason)
        return
    module = importlib.import_module(f"benchmarks.gpu.{family}")
    if getattr(module, "NEEDS_TRITON", False) and (reason := without_triton()):
        rows.emit(skipped=reason)
        return
    count_compilations()
    items: list[Item] = module.items()
    first = rows.first_item()
    for i, item in enumerate(items[first : first + rows.most_items()], first):
        rows.emit(begin=i, item=item.name)
        start = time.perf_counter()
        try:
            for row in item.run():
                rows.emit(**row)
        except Exception as error:
            traceback.print_exc()
            rows.emit(error=rows.one_line(error), item=item.name)
            if not usable():
                os._exit(rows.FAILED_GPU)
        print(f"{item.name}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
