"""The gated product with its projection: kernels and torch path against autograd's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.gated_linear import gated_linear
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()


def _plain(u: Tensor, weight: Tensor) -> Tensor:
    value, gate = u.chunk(2, dim=-1)
    return F.linear(value * F.silu(gate), weight)


def _outputs(run, u: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (u, weight)]
    y = run(*leaves)
    share = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64)
    loss = (y.double() * share.view(y.shape)).sum()
    return [y, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-14),
        ("reference", torch.float32, 1e-6),
        ("triton", torch.float32, 1e-6),
        # 8 bits of inputs and outputs; Triton's interpreter cuts off where a GPU rounds.
        ("triton", torch.bfloat16, 1e-2),
    ],
)
def test_equals_the_operations_one_by_one(impl: str, dtype: torch.dtype, tolerance: float) -> None:
    u = torch.randn(2, 3, 2 * 1100, device=DEVICE).to(dtype)
    weight = (torch.randn(5, 1100, device=DEVICE) / 30).to(dtype)
    expected = _outputs(_plain, u, weight, torch.float64)
    got = _outputs(lambda u, w: gated_linear(u, w, impl=impl), u, weight, dtype)
    for value, right in zip(got, expected, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, right) < tolerance


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_only_the_input_is_kept_and_a_frozen_weight_gets_no_gradient(impl: str) -> None:
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    # Rows of a wider tensor, as a view.
    whole = torch.randn(4, 30, device=DEVICE, requires_grad=True)
    u, weight = whole[:, 3:19], torch.randn(6, 8, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = gated_linear(u, weight, impl=impl)
    assert sorted(kept) == [48, 64]
    y.sum().backward()
    assert whole.grad is not None
    (expected,) = torch.autograd.grad(_plain(whole[:, 3:19], weight).sum(), whole)
    assert relative_error(whole.grad, expected) < 1e-6
    assert weight.grad is None


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 6\) and \(4, 4\)"):
        gated_linear(torch.ones(2, 6), torch.ones(4, 4))
