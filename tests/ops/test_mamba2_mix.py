"""The inside of a Mamba-2 mixer: the one operator against the single ones."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_hf.ops.dispatch import keep_activations
from ssm_hf.ops.mamba2_mix import mamba2_mix
from ssm_hf.ops.packing import document_numbers
from ssm_hf.ops.product import empty_rows
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
BATCH, LENGTH, HEADS, HEAD_DIM, STATES, TAPS, OUT = 2, 19, 2, 16, 16, 4, 24
INNER = HEADS * HEAD_DIM


def _leaves(
    *, groups: int = 1, norm: bool = True, out: bool = True, bias: bool = True, D: int = 1
) -> dict[str, Tensor | None]:
    channels = INNER + 2 * groups * STATES

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    return {
        "proj": randn(BATCH, LENGTH, INNER + channels + HEADS),
        "conv_weight": randn(channels, TAPS),
        "conv_bias": randn(channels) if bias else None,
        "A": -torch.rand(HEADS, device=DEVICE),
        "D": randn(HEADS) if D == 1 else randn(HEADS, HEAD_DIM),
        "dt_bias": randn(HEADS),
        "norm_weight": randn(INNER) if norm else None,
        "out_weight": randn(OUT, INNER) / INNER**0.5 if out else None,
        "out_bias": randn(OUT) if out and bias else None,
    }


def _packing(padded: bool, packed: bool) -> dict[str, Tensor | None]:
    mask = torch.rand(BATCH, LENGTH, device=DEVICE) > 0.2 if padded else None
    number = (torch.rand(BATCH, LENGTH, device=DEVICE) > 0.8).cumsum(dim=1)
    return {"mask": mask, "seq_idx": document_numbers(number, mask) if packed else None}


def _outputs(
    leaves: dict[str, Tensor | None], dtype: torch.dtype, impl: str, **options: Any
) -> dict[str, Tensor]:
    given = {
        name: None if leaf is None else leaf.to(dtype, copy=True).requires_grad_()
        for name, leaf in leaves.items()
    }
    y = mamba2_mix(**given, **options, impl=impl)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator(DEVICE).manual_seed(1)
    weight = torch.randn(y.shape, generator=generator, device=DEVICE).to(dtype)
    present = {name: leaf for name, leaf in given.items() if leaf is not None}
    grads = torch.autograd.grad((y * weight).sum(), list(present.values()))
    return {"y": y, **dict(zip(present, grads, strict=True))}


PLAIN, PADDED = (False, False), (True, True)
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": ({}, {}),
    "grouped": ({"groups": 2, "D": 2}, {"norm_before_gate": True}),
    "without out_proj": ({"out": False, "bias": False}, {"dt_limit": (0.01, 1.0)}),
    "without norm": ({"norm": False}, {}),
    "scan alone": ({"norm": False, "out": False}, {}),
}
FEW = {("whole", *PLAIN), ("grouped", *PADDED), ("without out_proj", *PLAIN),
       ("without norm", *PLAIN), ("scan alone", *PADDED)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "padded", "packed"),
    [
        pytest.param(*case, marks=() if case in FEW else pytest.mark.slow)
        for case in itertools.product(SHAPES, (False, True), (False, True))
    ],
)
def test_kernels_equal_the_operators_one_after_another(
    name: str, padded: bool, packed: bool
) -> None:
    shape, options = SHAPES[name]
    leaves = _leaves(**shape)
    options = {"n_groups": shape.get("groups", 1), **options, **_packing(padded, packed)}
    got = _outputs(leaves, torch.float32, "triton", **options)
    for name, right in _outputs(leaves, torch.float64, "reference", **options).items():
        # fp32 rounding; the gradients of A and dt_bias are sums of terms of both signs.
        tolerance = 5e-5 if name in ("A", "dt_bias") else 2e-6
        assert got[name].shape == right.shape, name
        assert relative_error(got[name], right) < tolerance, name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "whole" else pytest.mark.slow) for n in SHAPES]
)
def test_neither_what_is_kept_nor_rows_on_cache_lines_change_a_gradient(name: str) -> None:
    shape, options = SHAPES[name]
    leaves = _leaves(**shape)
    proj = leaves["proj"]
    assert proj is not None
    # The projection in 16 bits, as under autocast, so that the output projection's weight is cast.
    leaves["proj"] = proj.bfloat16()
    options = {"n_groups": shape.get("groups", 1), **options}

    def gradients(proj: Tensor) -> list[Tensor]:
        given = {n: None if t is None else t.clone().requires_grad_() for n, t in leaves.items()}
        given["proj"] = proj
        y = mamba2_mix(**given, **options, impl="triton")  # pyright: ignore[reportArgumentType]
        present = [t for t in given.values() if t is not None]
        return list(torch.autograd.grad(y.float().square().sum(), present))

    right = gradients(proj.bfloat16().requires_grad_())
    rows = empty_rows(proj, *proj.shape, dtype=torch.bfloat16).copy_(proj)
    assert not rows.is_contiguous()
    with keep_activations():
        got = gradients(rows.requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


def test_frozen_weights_get_no_gradient() -> None:
    leaves = {name: t for name, t in _leaves().items() if t is not None}
    proj = leaves["proj"].requires_grad_()
    mamba2_mix(**leaves, n_groups=1, impl="triton").sum().backward()  # pyright: ignore[reportArgumentType]
    assert proj.grad is not None
    assert all(t.grad is None for name, t in leaves.items() if name != "proj")


def test_only_proj_and_what_the_scan_gave_are_kept() -> None:
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    leaves = {name: None if t is None else t.requires_grad_() for name, t in _leaves().items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        mamba2_mix(**leaves, n_groups=1, impl="triton")  # pyright: ignore[reportArgumentType]
    proj = leaves["proj"]
    assert proj is not None
    large = [numel for numel in kept.values() if numel >= BATCH * LENGTH * INNER]
    assert sorted(large) == [BATCH * LENGTH * INNER, proj.numel()]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_packing_that_does_not_fit_is_named(impl: str) -> None:
    leaves = _leaves()
    short = torch.zeros(BATCH, LENGTH - 1, dtype=torch.long)
    with pytest.raises(ValueError, match="seq_idx must be an integer tensor of shape"):
        mamba2_mix(**leaves, n_groups=1, seq_idx=short, impl=impl)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mask must be a bool tensor of shape"):
        mamba2_mix(**leaves, n_groups=1, mask=short == 0, impl=impl)  # pyright: ignore[reportArgumentType]
    empty = {**leaves, "proj": leaves["proj"][:, :0]}  # pyright: ignore[reportOptionalSubscript]
    with pytest.raises(ValueError, match="T=0"):
        mamba2_mix(**empty, n_groups=1, impl=impl)  # pyright: ignore[reportArgumentType]


def test_wrong_shapes_are_named() -> None:
    leaves = _leaves()
    with pytest.raises(ValueError, match="norm_weight must have shape"):
        mamba2_mix(**{**leaves, "norm_weight": torch.ones(3)}, n_groups=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="D must have shape"):
        mamba2_mix(**{**leaves, "D": torch.ones(3)}, n_groups=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="n_groups must divide"):
        mamba2_mix(**leaves, n_groups=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="proj must have shape"):
        mamba2_mix(**{**leaves, "proj": torch.ones(1, 2, 3)}, n_groups=1)  # pyright: ignore[reportArgumentType]
