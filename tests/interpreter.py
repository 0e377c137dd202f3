"""Makes Triton's interpreter fast enough for tests, and right for bfloat16."""

import inspect

import numpy as np


def prepare() -> None:
    _patch_language_once()
    _widen_bfloat16_products()


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


def _widen_bfloat16_products() -> None:
    """The interpreter keeps bfloat16 as its bits in uint16, and its tl.dot (of Triton 3.9) multiplies those integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.create_dot

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    builder.create_dot = lambda self, a, b, *rest: original(self, widen(a), widen(b), *rest)
