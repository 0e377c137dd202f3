"""The tests that every op passes, whatever the op: a class that the op's test file subclasses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import Case, Target, assert_bit_equal, check_packed, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sora_kernels import backends


class RecordOps(TorchDispatchMode):
    """Collects the calls of this library's registered operators: (operator, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "sora_kernels":
            self.calls.append((func, tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


class OpContract:
    """Runs for every entry of the test module's OPS, a dict of functions that make a Case for a target."""

    def test_repeatable(self, target: Target, make_case: Callable[[Target], Case]) -> None:
        """The same run twice gives the same bits, forward and backward, and leaves the inputs as they were."""
        case = make_case(target)
        before = [x.clone() for x in case.arguments]
        first, second = run(case, case.arguments), run(case, case.arguments)
        assert_bit_equal(first[0] + first[1], second[0] + second[1])
        assert_bit_equal(case.arguments, before)

    @pytest.mark.parametrize("strided", ["rows", "columns", "cotangent"])
    def test_any_strides(self, target: Target, make_case: Callable[[Target], Case], strided: str) -> None:
        """Rows of a wider buffer, a last dimension of stride 2 or a cotangent of stride 0 (that of a sum) change no bit."""
        case = make_case(target)
        inputs, ones = case.arguments, torch.ones_like
        expected = run(case, inputs, ones)
        if strided == "rows":
            inputs = [torch.cat([torch.full_like(x, torch.nan), x], dim=-1)[..., x.shape[-1] :] for x in inputs]
        elif strided == "columns":
            inputs = [torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0] for x in inputs]
        else:
            ones = lambda output: output.new_ones(()).expand(output.shape)  # noqa: E731
        actual = run(case, inputs, ones)
        assert_bit_equal(actual[0] + actual[1], expected[0] + expected[1])

    @pytest.mark.skipif("SORA_KERNELS_BACKEND" in os.environ, reason="the environment forces a backend")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_default_backend(self, make_case: Callable[[Target], Case], dtype: torch.dtype) -> None:
        """Left alone, every function runs on the first backend in the list that can run it, forward and backward."""
        case = make_case(Target("cpu", "any", dtype))
        with backends.record() as calls:
            run(case, case.arguments)
        assert {function for function, _ in calls} == case.operators
        for function, name in calls:
            able = [candidate for candidate, reason in backends.candidates(function, "cpu", dtype) if reason is None]
            assert name == able[0]

    def test_registration(self, target32: Target, make_case: Callable[[Target], Case]) -> None:
        """Exactly the expected operators run, forward and backward, and each passes torch.library.opcheck."""
        case = make_case(target32)
        with RecordOps() as recorded:
            run(case, case.arguments)
        leaves = {x.data_ptr() for x in case.arguments}
        assert {func.name().removeprefix("sora_kernels::") for func, _ in recorded.calls} == case.operators
        for func, args in recorded.calls:
            if not func.name().endswith("_backward"):
                args = tree_map_only(Tensor, lambda x: x.requires_grad_(x.data_ptr() in leaves), args)
            torch.library.opcheck(func, args)

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compiled(self, target32: Target, make_case: Callable[[Target], Case], compiler: str) -> None:
        """One graph under torch.compile, and the bits of the eager run, forward and backward."""
        case = make_case(target32)
        torch.compiler.reset()
        compiled = torch.compile(case, fullgraph=True, backend=compiler)
        actual, expected = run(compiled, case.arguments), run(case, case.arguments)
        assert_bit_equal(actual[0] + actual[1], expected[0] + expected[1])


class PackedContract(OpContract):
    """Of an op on packed samples."""

    def test_packed_equals_separate(self, target: Target, make_case: Callable[[Target], Case]) -> None:
        check_packed(make_case(target))
