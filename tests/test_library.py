"""How registered ops are called: eager code past torch.library's autograd, everything else through the op itself."""

import pytest
import torch
from torch import Tensor

from sora_kernels.adaln import gate_residual_layer_norm_modulate, layer_norm_modulate

CU = torch.tensor([0, 5, 12], dtype=torch.int32)


@pytest.fixture
def inputs() -> list[Tensor]:
    """residual, x, gate, shift, scale."""
    torch.manual_seed(0)
    return [torch.randn(n, 16, requires_grad=True) for n in (12, 12, 2, 2, 2)]


def test_eager_and_the_op_give_the_same(inputs: list[Tensor]) -> None:
    _, x, _, shift, scale = inputs
    op = torch.ops.sora_kernels.layer_norm_modulate_forward.default
    results = [layer_norm_modulate(x, shift, scale, CU), op(x, shift, scale, CU, False, None, None, 1e-6)[0]]
    assert torch.equal(*results)
    ours, theirs = (torch.autograd.grad(y, (x, shift, scale), torch.ones_like(y)) for y in results)
    assert all(map(torch.equal, ours, theirs))
    assert results[0].grad_fn.name().startswith("layer_norm_modulate")  # not torch.library's
    with torch.no_grad():
        assert not layer_norm_modulate(x, shift, scale, CU).requires_grad


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_is_not_used_has_a_gradient_of_zero(inputs: list[Tensor], used: int) -> None:
    def grads(cotangents: list[Tensor | None]) -> tuple[Tensor, ...]:
        outputs = gate_residual_layer_norm_modulate(*inputs, CU)
        kept = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if g is not None]
        return torch.autograd.grad([y for y, _ in kept], inputs, [g for _, g in kept])

    ones, zeros = torch.ones(12, 16), torch.zeros(12, 16)
    expected = grads([ones if i == used else zeros for i in range(2)])
    got = grads([ones if i == used else None for i in range(2)])
    assert all(map(torch.equal, got, expected))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(inputs: list[Tensor]) -> None:
    _, x, _, shift, scale = inputs
    batch = torch.stack([x, 2 * x, x - 1]).detach()
    got = torch.vmap(lambda one: layer_norm_modulate(one, shift.detach(), scale.detach(), CU))(batch)
    assert torch.equal(got, torch.stack([layer_norm_modulate(one, shift, scale, CU) for one in batch]))
