"""The norm's kernels against the torch path in fp64."""

import pytest
import torch
from torch import Tensor

from ssm_hf.ops import add_rms_norm, rms_norm
from ssm_hf.ops.rms_norm import launch
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
# fp32 rounding of sums over at most a few thousand squares.
SINGLE = 1e-6


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def _double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def _assert_same(run, leaves: dict[str, Tensor | None], tolerance: float, **options) -> None:
    """Outputs and all gradients of `run` by kernels in given dtypes, and by torch in fp64."""
    got = run(**leaves, **options, impl="triton")
    wide = dict(zip(leaves, _double(*leaves.values()), strict=True))
    if "dtype" in options:
        options = {**options, "dtype": torch.float64}
    expected = run(**wide, **options, impl="reference")
    got, expected = ((v,) if isinstance(v, Tensor) else v for v in (got, expected))
    probes = [torch.randn_like(v) for v in expected]
    sums = [
        sum((v.double() * p).sum() for v, p in zip(out, probes, strict=True))
        for out in (got, expected)
    ]
    grads = [
        torch.autograd.grad(loss, [v for v in group.values() if v is not None])
        for loss, group in zip(sums, (leaves, wide), strict=True)
    ]
    for value, right in zip((*got, *grads[0]), (*expected, *grads[1]), strict=True):
        assert value.shape == right.shape
        assert relative_error(value, right) < tolerance
    named = [leaf for leaf in leaves.values() if leaf is not None]
    assert [g.dtype for g in grads[0]] == [leaf.dtype for leaf in named]


@pytest.mark.parametrize(
    ("rows", "width", "group_size"),
    [(1, 3, None), (5, 7, None), (3, 48, 16), (9, 24, 3), (2, 1024, None)],
)
@pytest.mark.parametrize("gate", ["none", "first", "last"])
def test_rms_norm_kernel_equals_torch(
    rows: int, width: int, group_size: int | None, gate: str
) -> None:
    leaves = {
        "x": _leaf(rows, width),
        "weight": _leaf(width),
        "gate": None if gate == "none" else _leaf(rows, width),
    }
    options = {"eps": 1e-3, "group_size": group_size, "norm_before_gate": gate == "last"}
    _assert_same(rms_norm, leaves, SINGLE, **options)


# A tile of five parts, and tiles of two rows of which the last holds one.
@pytest.mark.parametrize(("rows", "width"), [(2, 5120), (3, 2560)])
def test_rms_norm_kernel_takes_wide_rows(rows: int, width: int) -> None:
    leaves = {"x": _leaf(rows, width), "weight": _leaf(width), "gate": _leaf(rows, width)}
    _assert_same(rms_norm, leaves, SINGLE, eps=1e-3)


@pytest.mark.parametrize("gate", ["none", "first", "last"])
def test_rms_norm_kernel_walks_wide_groups(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_WIDEST_BLOCK", 32)
    leaves = {
        "x": _leaf(3, 2 * 75),
        "weight": _leaf(2 * 75),
        "gate": None if gate == "none" else _leaf(3, 2 * 75),
    }
    _assert_same(rms_norm, leaves, SINGLE, eps=1e-3, group_size=75, norm_before_gate=gate == "last")


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("walked", [False, True])
def test_add_rms_norm_kernel_equals_torch(
    residual: torch.dtype | None, walked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if walked:
        monkeypatch.setattr(launch, "_WIDEST_BLOCK", 16)
    leaves = {
        "x": _leaf(2, 3, 40),
        "residual": None if residual is None else _leaf(2, 3, 40, dtype=residual),
        "weight": _leaf(40),
    }
    # A bf16 stream is rounded to 8 bits; the interpreter cuts off, which costs one bit more.
    tolerance = 2**-7 if residual == torch.bfloat16 else SINGLE
    _assert_same(add_rms_norm, leaves, tolerance, eps=1e-3, dtype=torch.float32)


def test_add_rms_norm_kernel_takes_a_wide_stream_beside_half_sublayers() -> None:
    x, residual, weight = _leaf(6, 40, dtype=torch.bfloat16), _leaf(6, 40), _leaf(40)
    y, total = add_rms_norm(x, residual, weight, eps=1e-5, impl="triton")
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, x.float() + residual)
    expected, _ = add_rms_norm(*_double(x, residual, weight), eps=1e-5, impl="reference")
    assert relative_error(y, expected) < 2**-7  # as above
    _assert_same(
        add_rms_norm,
        {"x": x, "residual": residual, "weight": weight},
        2**-7,
        eps=1e-5,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_kernel_in_half_precision(dtype: torch.dtype) -> None:
    leaves = {
        "x": _leaf(5, 32, dtype=dtype),
        "weight": _leaf(32),
        "gate": _leaf(5, 32, dtype=dtype),
    }
    _assert_same(rms_norm, leaves, 2**-7 if dtype == torch.bfloat16 else 2**-10, eps=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_rms_norm_kernel_takes_views_as_they_are(gated: bool) -> None:
    wide = torch.randn(2, 5, 100, device=DEVICE)
    x, gate = wide[..., 3:51], wide[..., 52:100]
    weight = torch.randn(48, device=DEVICE)
    arguments = {"eps": 1e-5, "gate": gate if gated else None, "impl": "triton"}
    y = rms_norm(x, weight, **arguments)
    if gated:
        arguments["gate"] = gate.contiguous()
    assert torch.equal(y, rms_norm(x.contiguous(), weight, **arguments))
    expanded = x[:1].expand(4, -1, -1)
    y = rms_norm(expanded.transpose(0, 1), weight, eps=1e-5, impl="triton")
    assert torch.equal(y, rms_norm(expanded.transpose(0, 1).contiguous(), weight, eps=1e-5,
                                   impl="triton"))  # fmt: skip


def test_rms_norm_kernel_without_rows_and_with_a_frozen_weight() -> None:
    x, weight = _leaf(0, 8), _leaf(8)
    y, total = add_rms_norm(x, x, weight, eps=1e-5, impl="triton")
    (y.sum() + total.sum()).backward()
    assert y.shape == (0, 8)
    assert weight.grad is not None
    assert not weight.grad.any()
    x, weight = _leaf(3, 8), torch.ones(8, device=DEVICE)
    rms_norm(x, weight, eps=1e-5, impl="triton").sum().backward()
    assert x.grad is not None


def test_rms_norm_kernel_repeats_itself() -> None:
    x, weight = _leaf(300, 40), _leaf(40)
    first, second = (
        torch.autograd.grad(
            rms_norm(x, weight, eps=1e-5, impl="triton").square().sum(), [x, weight]
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rms_norm_kernels_are_traceable() -> None:
    arguments = (_leaf(2, 3, 8), None, _leaf(2, 3, 8), _leaf(8), 1e-5, 4, False, torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(launch._forward, arguments, test_utils=tests)
    arguments = (_leaf(2, 8), _leaf(2, 8), None, _leaf(8), 1e-5, 8, False, torch.bfloat16)
    torch.library.opcheck(launch._forward, arguments, test_utils=tests)


def test_rms_norm_kernels_compile_without_breaks() -> None:
    def norms(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, total = add_rms_norm(x, residual, weight, eps=1e-5, impl="triton")
        return rms_norm(y, weight, eps=1e-5, gate=total, impl="triton").square().sum()

    leaves = [_leaf(2, 3, 8), _leaf(2, 3, 8), _leaf(8)]
    expected = torch.autograd.grad(norms(*leaves), leaves)
    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    for grad, right in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert relative_error(grad, right) < SINGLE


def test_rms_norm_kernel_refuses_tensors_on_several_devices_and_doubles() -> None:
    x = torch.ones(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"rms_norm: weight lies on meta, expected"):
        rms_norm(x, torch.ones(8, device="meta"), eps=1e-5, impl="triton")
    with pytest.raises(RuntimeError, match=r"float32, float16 and bfloat16, got torch.float64"):
        rms_norm(x.double(), torch.ones(8, device=DEVICE), eps=1e-5, impl="triton")
