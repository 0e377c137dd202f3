"""What every family of diffusers' models has to keep when `apply` has patched it."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tolerance import allowed_error, assert_bit_equal, error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sora_kernels import backends
from sora_kernels.integrations.diffusers import apply, revert

Inputs = dict[str, Any]


class Variant(NamedTuple):
    """A model with random weights, real head dims and two layers, and what it is called with."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    """Of three sizes, 0 to 2: other batches, grids and lengths of text."""
    lora: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers that get an adapter."""
    blocks: bool = True
    """Whether forwards of its blocks are replaced, and not their attention alone."""
    rounds_to: torch.dtype | None = None
    """What the model rounds to on its way, whatever its own dtype: the tolerance is that of this one."""


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for values: items, and shapes that depend on them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.count += any(
            word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave")
        )
        return function(*args, **(kwargs or {}))


def made(variant: Variant) -> nn.Module:
    """With weights that all matter: models start with gates and last layers of zero."""
    torch.manual_seed(0)
    model = variant.build()
    for p in model.parameters():
        if p.detach().abs().max() == 0 or p.detach().std() == 0:
            p.data += 0.1 * torch.randn_like(p)
    return model


def given(variant: Variant, dtype: torch.dtype = torch.float32, size: int = 0) -> Inputs:
    torch.manual_seed(1 + size)
    return to(variant.inputs(size), dtype)


def to(inputs: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, in lists and tuples too, in this dtype."""
    if isinstance(inputs, dict):
        return {name: to(x, dtype) for name, x in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(to(x, dtype) for x in inputs)
    return inputs.to(dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def tensors(output: Any) -> list[Tensor]:
    """Those of an output, which may be nested tuples and lists. Other things in it, such as caches, have none."""
    if isinstance(output, Tensor):
        return [output]
    return [x for part in output for x in tensors(part)] if isinstance(output, (tuple, list)) else []


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return tensors(model(**inputs, return_dict=False))


def operators(model: nn.Module, inputs: Inputs) -> set[str]:
    """Those of ours that a forward takes."""
    with backends.record() as calls:
        outputs(model, inputs)
    return {name for name, _ in calls}


def results(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and the gradients of all parameters, by name."""
    model.zero_grad()
    outs = outputs(model, inputs)
    cotangents = [torch.randn(out.shape, generator=torch.Generator().manual_seed(i)).to(out) for i, out in enumerate(outs)]
    sum((out * c).sum() for out, c in zip(outs, cotangents, strict=True)).backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_close(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The rule of tolerance.py for each result, twice as wide: many roundings add up by chance."""
    assert got.keys() == plain.keys() == exact.keys()
    far = {}
    for name, right in exact.items():
        distance, allowed = error(got[name], right), allowed_error(plain[name], right, dtype)
        if not distance <= 2 * allowed:
            far[name] = f"{distance:.3g} > {allowed:.3g} of {right.abs().max():.3g}"
    assert not far, str(far)


# Only forwards of blocks call one of these.
GATES = {"gate_residual_forward", "gate_residual_layer_norm_modulate_forward", "norm_gate_residual_forward"}


class FamilyContract:
    """Of a module whose VARIANTS are the family's, by name."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "variant" in metafunc.fixturenames:
            variants = metafunc.module.VARIANTS
            metafunc.parametrize("variant", variants.values(), ids=variants)

    @pytest.fixture
    def first(self, request: pytest.FixtureRequest) -> Variant:
        """For what costs much and does not depend on the variant."""
        return next(iter(request.module.VARIANTS.values()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_unpatched(self, variant: Variant, dtype: torch.dtype) -> None:
        model = made(variant)
        exact = results(copy.deepcopy(model).double(), given(variant, torch.float64))
        model, inputs = model.to(dtype), given(variant, dtype)
        plain = results(model, inputs)
        apply(model)
        with backends.record() as calls:
            got = results(model, inputs)
        ran = {name for name, _ in calls}
        assert ran >= {"attention_forward", "attention_backward"}
        assert bool(ran & GATES) == variant.blocks
        check_close(got, plain, exact, variant.rounds_to or dtype)

    def test_revert_is_exact(self, variant: Variant) -> None:
        model, inputs = made(variant).eval(), given(variant)
        names = {name: set(m.__dict__) for name, m in model.named_modules()}
        processors = {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
        keys, before = list(model.state_dict()), results(model, inputs)
        apply(model)
        assert list(model.state_dict()) == keys
        revert(model)
        assert {name: set(m.__dict__) for name, m in model.named_modules()} == names
        for name, processor in processors.items():
            assert model.get_submodule(name).processor is processor
        after = results(model, inputs)
        assert_bit_equal(list(after.values()), list(before.values()))

    def test_lora(self, variant: Variant) -> None:
        """An adapter trains as it does unpatched, be it added before or after; reverted it is as it was."""
        config = LoraConfig(r=4, target_modules=list(variant.lora), init_lora_weights=False)
        model, inputs = made(variant), given(variant)
        late = copy.deepcopy(model)
        apply(late)
        for m in (model, late):
            torch.manual_seed(2)
            inject_adapter_in_model(config, m)  # as add_adapter of those models that have it
        exact = results(copy.deepcopy(model).double(), given(variant, torch.float64))
        plain = results(model, inputs)
        assert any("lora" in name for name in plain)
        apply(model)
        got = results(model, inputs)
        check_close(got, plain, exact, variant.rounds_to or torch.float32)
        assert_bit_equal(list(results(late, inputs).values()), list(got.values()))
        revert(model)
        assert_bit_equal(list(results(model, inputs).values()), list(plain.values()))

    def test_compiled_once_for_all_sizes(self, first: Variant) -> None:
        """In one graph; no other one after the second size."""
        torch._dynamo.reset()
        model = made(first).eval()
        apply(model)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        with torch.no_grad():
            for size in range(3):
                inputs = given(first, size=size)
                with torch._dynamo.config.patch(error_on_recompile=size == 2):
                    got = outputs(compiled, inputs)
                torch.testing.assert_close(got, outputs(model, inputs), rtol=1e-4, atol=1e-5)

    def test_checkpointed(self, first: Variant) -> None:
        model, inputs = made(first).train(), given(first)
        apply(model)
        want = results(model, inputs)
        model.enable_gradient_checkpointing()
        got = results(model, inputs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    def test_autocast(self, first: Variant) -> None:
        model, inputs = made(first), given(first)
        exact = results(copy.deepcopy(model).double(), given(first, torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            plain = results(model, inputs)
            apply(model)
            got = results(model, inputs)
        check_close(got, plain, exact, torch.bfloat16)

    def test_exported(self, first: Variant) -> None:
        model, inputs = made(first).eval(), given(first)
        apply(model)
        with torch.no_grad():
            program = torch.export.export(model, (), {**inputs, "return_dict": False})
            torch.testing.assert_close(tensors(program.module()(**inputs, return_dict=False)), outputs(model, inputs))

    def test_no_value_is_read(self, variant: Variant) -> None:
        model, inputs = made(variant).eval(), given(variant)
        with torch.no_grad(), Reads() as reads:
            outputs(model, inputs)
        before = reads.count
        apply(model)
        with torch.no_grad(), Reads() as reads:
            outputs(model, inputs)
        assert reads.count == 0, f"{reads.count} values were read; unpatched {before}"
