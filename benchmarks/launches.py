"""What Triton compiles when ops run, for a GPU that is not there: `with compilations("sm90") as compiled: ...`.

Ops on CPU tensors go the real way through the Triton backend, Triton's binder and its compiler. Only the driver is another: it
names a GPU and launches nothing. So a kernel is compiled for the very types, constants and alignments that a GPU would see; on
AMD's, with the instructions for buffers below 2 GiB.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from sora_kernels import backends

# Triton's target (backend, architecture, warp size), and the most shared memory of one block in KiB.
ARCHS: dict[str, tuple[tuple, int]] = {
    "sm80": (("cuda", 80, 32), 163),
    "sm90": (("cuda", 90, 32), 227),
    "sm100": (("cuda", 100, 32), 227),
    "gfx942": (("hip", "gfx942", 64), 64),
    "gfx1100": (("hip", "gfx1100", 32), 64),
}
MAX_THREADS = 1024  # of a block
_numbers = itertools.count()


class Compiled(NamedTuple):
    """A kernel: Triton's source (the function, its constants and argument types), its metadata, and the files of all stages."""

    source: Any
    metadata: dict[str, Any]
    files: dict[str, str]

    @property
    def name(self) -> str:
        function = self.source.fn.fn
        return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"

    @property
    def constants(self) -> dict[str, Any]:
        """The values of the parameters that are constexpr."""
        return {p.name: self.source.constants[(p.num,)] for p in self.source.fn.params if p.is_constexpr}


class AbsentGPU:
    """A driver for Triton, as far as compiling and launching ask it. The report shows what does not fit, so it sets no limit."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*ARCHS[arch][0])
        self.number = next(_numbers)  # Triton keeps what it compiled by the device's number
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 1 << 30}, load_binary=lambda *_: (None, None, 0, 0, MAX_THREADS)
        )
        self.launcher_cls = lambda source, metadata: lambda *_: None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


def run_on_triton() -> None:
    """In this process, ops on CPU tensors run on the Triton backend from here on."""
    backends.BACKENDS["triton"] = replace(backends.BACKENDS["triton"], devices=("cuda", "cpu"))
    backends.ORDER["cpu"] = ("triton",)


@contextmanager
def compilations(arch: str) -> Iterator[list[Compiled]]:
    """Yields a list that fills with the kernels that ops inside launch, each version once."""
    from triton import knobs
    from triton.runtime import driver

    from sora_kernels.triton import configs

    found: list[Compiled] = []

    def listen(*, src: Any, metadata: dict, metadata_group: dict, times: Any, cache_hit: bool) -> None:
        found.append(Compiled(src, metadata, metadata_group))

    run_on_triton()
    knobs.compilation.listener = listen
    driver.set_active(AbsentGPU(arch))
    try:
        with configs.use_architecture(arch):
            yield found
    finally:
        knobs.compilation.listener = None
