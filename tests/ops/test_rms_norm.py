"""RMS norm against a loop over rows and groups."""

import pytest
import torch
import torch.nn.functional as F

from ssm_hf.ops import rms_norm
from tests.helpers import relative_error


def _by_hand(x, weight, eps, gate, group_size, norm_before_gate):
    rows = []
    for i in range(x.shape[0]):
        row = x[i]
        if gate is not None and not norm_before_gate:
            row = row * F.silu(gate[i])
        parts = row.split(group_size or row.shape[0])
        row = torch.cat([p / torch.sqrt((p * p).mean() + eps) for p in parts]) * weight
        if gate is not None and norm_before_gate:
            row = row * F.silu(gate[i])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 12, 4])
def test_rms_norm_equals_loop(gated: bool, norm_before_gate: bool, group_size: int | None) -> None:
    x, gate = (torch.randn(5, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    leaves = [x, weight, *([gate] if gated else [])]
    options = {"group_size": group_size, "norm_before_gate": norm_before_gate}
    y = rms_norm(x, weight, eps=1e-3, gate=gate if gated else None, **options)
    expected = _by_hand(x, weight, 1e-3, gate if gated else None, **options)
    probe = torch.randn_like(y)
    assert relative_error(y, expected) < 1e-14
    grads = torch.autograd.grad((y * probe).sum(), leaves)
    for grad, right in zip(
        grads, torch.autograd.grad((expected * probe).sum(), leaves), strict=True
    ):
        assert relative_error(grad, right) < 1e-13


def test_rms_norm_forms_statistics_in_fp32() -> None:
    x = (torch.randn(4, 64) * 300).half()  # squares overflow fp16
    weight = torch.ones(64)
    y = rms_norm(x, weight, eps=1e-5)
    assert y.dtype == torch.float16
    # one rounding to 11 bits
    assert relative_error(y, rms_norm(x.double(), weight.double(), eps=1e-5)) < 2**-11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight must have shape \(12,\), got \(5,\)"),
        ({"gate": torch.ones(3, 5)}, r"gate must have x's shape"),
        ({"group_size": 5}, r"group_size must divide the width 12, got 5"),
    ],
)
def test_rms_norm_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.ones(3, 12), "weight": torch.ones(12), "eps": 1e-5, **changes})
