"""Makes Triton's interpreter fast enough for tests, right for bfloat16, and the same on every machine."""

import inspect

import numpy as np


def prepare() -> None:
    _patch_language_once()
    _define_products()


def _patch_language_once() -> None:
    """The interpreter replaces every function of triton.language anew for each call of a kernel's helper; once is enough.

    Halves the time of a test. The replaced functions stay, as nothing in the process compiles kernels.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original, patched = interpreter._patch_lang, set()

    def patch(function):
        modules = [(name, value) for name, value in function.__globals__.items() if inspect.ismodule(value)]
        names = frozenset(name for name, value in modules if value in (tl, tl.core))
        if names not in patched:
            patched.add(names)
            original(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def _define_products() -> None:
    """The interpreter keeps bfloat16 as its bits in uint16, and its tl.dot (of Triton 3.9) multiplies those integers; float32 is
    left to numpy's BLAS.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.create_dot

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        a, b = widen(a), widen(b)
        if {x.data.dtype for x in (a, b, d)} != {np.dtype(np.float32)}:
            return original(self, a, b, d, *rest)
        # In float64, rounded once: in float32, sums would be ordered by whatever BLAS kernel suits the machine.
        return handle((a.data.astype(np.float64) @ b.data + d.data).astype(np.float32), d.dtype.scalar)

    builder.create_dot = create_dot
