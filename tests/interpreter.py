"""Makes Triton's interpreter fast enough for tests, right for bfloat16, the same on every machine, and no more exact than a GPU."""

import inspect

import numpy as np

# Of PTX's ex2.approx.f32, relative, and of its div.full.f32 in units in the last place. The last half unit is left to rounding.
EXP2_ERROR = 2.0**-22 - 2.0**-24
DIVISION_ULPS = 2 - 0.5


def prepare() -> None:
    _patch_language_once()
    _take_booleans()
    _define_products()
    _define_fma()
    _round_to_bfloat16()
    _define_approximations()


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
            # Triton 3.6 takes an array of one element for a number, which NumPy 2.5 no longer does.
            tl.core.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def _take_booleans() -> None:
    """That of Triton 3.6 fails where an argument is a bool."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._implicit_cvt

    def convert(argument):
        if isinstance(argument, bool):
            return tl.tensor(interpreter.TensorHandle(np.array([argument]), tl.int1), tl.int1)
        return original(argument)

    interpreter._implicit_cvt = convert


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


def _define_fma() -> None:
    """That of Triton 3.6 rounds the product, too. In float64 products of float32 are exact."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.create_fma

    def create_fma(self, x, y, z):
        if x.data.dtype != np.float32:
            return original(self, x, y, z)
        return handle((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), z.dtype.scalar)

    builder.create_fma = create_fma


def _round_to_bfloat16() -> None:
    """The interpreter cuts float32 off to bfloat16; GPUs round to the nearest, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.cast_impl

    def cast_impl(self, x, dtype):
        if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return original(self, x, dtype)
        bits = np.ascontiguousarray(x.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
        quiet = (bits >> np.uint64(16)) | np.uint64(0x40)  # a NaN stays one
        return handle(np.where(np.isnan(x.data), quiet, rounded).astype(np.uint16), tl.bfloat16)

    builder.cast_impl = cast_impl


def _define_approximations() -> None:
    """exp2 and a plain division of float32 are off by as much as they may be on a GPU; tl.div_rn and tl.sqrt_rn round, there too.

    How far off depends on the operands alone, so that the same operands give the same bits, as they do on a GPU. Zeros, infinities
    and NaN are exact, and so is exp2(0) = 1.
    """
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    exact_exp2, exact_division = builder.create_exp2, builder.create_fdiv

    def create_exp2(self, x):
        if x.data.dtype != np.float32:
            return exact_exp2(self, x)
        exact = np.exp2(x.data.astype(np.float64))
        with np.errstate(over="ignore"):
            near = (exact * (1 + EXP2_ERROR * _scatter(x.data))).astype(np.float32)
        return handle(np.where(x.data == 0, np.float32(1), near), x.dtype.scalar)

    def create_fdiv(self, a, b):
        result = exact_division(self, a, b)
        if a.data.dtype != np.float32:
            return result
        rounded = result.data
        off = np.isfinite(rounded) & (rounded != 0)
        ulp = np.spacing(np.where(off, rounded, 1)).astype(np.float64)
        with np.errstate(all="ignore"):
            exact = a.data.astype(np.float64) / b.data
        near = np.where(off, exact + DIVISION_ULPS * ulp * _scatter(a.data, b.data), rounded)
        return handle(near.astype(np.float32), result.dtype.scalar)

    builder.create_exp2, builder.create_fdiv = create_exp2, create_fdiv


def _scatter(*operands: np.ndarray) -> np.ndarray:
    """Numbers in [-1, 1) that depend on the bits of float32 operands and look random."""
    mixed = np.uint32(0)
    for x in operands:
        mixed = (mixed ^ np.asarray(x).view(np.uint32)) * np.uint32(0x9E3779B1)
        mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
        mixed = mixed ^ (mixed >> np.uint32(13))
    return mixed / 2.0**31 - 1
