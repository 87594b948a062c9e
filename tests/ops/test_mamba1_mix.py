"""The inside of a Mamba-1 mixer: the one operator against the single ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_hf.ops.dispatch import keep_activations
from ssm_hf.ops.mamba1_mix import mamba1_mix
from ssm_hf.ops.packing import document_numbers
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
BATCH, LENGTH, INNER, STATES, RANK, TAPS, OUT = 2, 7, 16, 4, 5, 4, 24


def _leaves(*, out: bool = True, bias: bool = True) -> dict[str, Tensor | None]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    return {
        "proj": randn(BATCH, LENGTH, 2 * INNER),
        "conv_weight": randn(INNER, TAPS),
        "conv_bias": randn(INNER) if bias else None,
        "x_weight": randn(RANK + 2 * STATES, INNER) / INNER**0.5,
        "dt_weight": randn(INNER, RANK) / RANK**0.5,
        "dt_bias": randn(INNER) - 2,
        "A": -torch.rand(INNER, STATES, device=DEVICE),
        "D": randn(INNER),
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
    y = mamba1_mix(**given, **options, impl=impl)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator(DEVICE).manual_seed(1)
    weight = torch.randn(y.shape, generator=generator, device=DEVICE).to(dtype)
    present = {name: leaf for name, leaf in given.items() if leaf is not None}
    grads = torch.autograd.grad((y * weight).sum(), list(present.values()))
    return {"y": y, **dict(zip(present, grads, strict=True))}


@pytest.mark.parametrize(
    ("shape", "padded", "packed"),
    [({}, False, False), ({"bias": False}, True, True), ({"out": False}, False, True)],
    ids=["plain", "padded and packed", "without out_proj, packed"],
)
def test_kernels_equal_the_operators_one_after_another(
    shape: dict[str, Any], padded: bool, packed: bool
) -> None:
    leaves, options = _leaves(**shape), _packing(padded, packed)
    got = _outputs(leaves, torch.float32, "triton", **options)
    for name, right in _outputs(leaves, torch.float64, "reference", **options).items():
        assert got[name].shape == right.shape, name
        # fp32 rounding
        assert relative_error(got[name], right) < 2e-6, name


def test_what_is_kept_changes_no_gradient() -> None:
    leaves = _leaves()
    formed = _outputs(leaves, torch.float32, "triton")
    with keep_activations():
        kept = _outputs(leaves, torch.float32, "triton")
    assert all(torch.equal(kept[name], formed[name]) for name in formed)


def test_frozen_weights_get_no_gradient() -> None:
    leaves = {name: t for name, t in _leaves().items() if t is not None}
    proj = leaves["proj"].requires_grad_()
    mamba1_mix(**leaves, impl="triton").sum().backward()  # pyright: ignore[reportArgumentType]
    assert proj.grad is not None
    assert all(t.grad is None for name, t in leaves.items() if name != "proj")


def test_outputs_of_convolution_and_step_projection_are_not_kept() -> None:
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    leaves = {name: None if t is None else t.requires_grad_() for name, t in _leaves().items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        mamba1_mix(**leaves, impl="triton")  # pyright: ignore[reportArgumentType]
    as_wide = [numel for numel in kept.values() if numel == BATCH * LENGTH * INNER]
    assert len(as_wide) == 1, "of this size only what the scan gave"
    assert 2 * BATCH * LENGTH * INNER in kept.values(), "proj"


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_packing_that_does_not_fit_is_named(impl: str) -> None:
    leaves = _leaves()
    short = torch.zeros(BATCH, LENGTH - 1, dtype=torch.long)
    with pytest.raises(ValueError, match="seq_idx must be an integer tensor of shape"):
        mamba1_mix(**leaves, seq_idx=short, impl=impl)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mask must be a bool tensor of shape"):
        mamba1_mix(**leaves, mask=short == 0, impl=impl)  # pyright: ignore[reportArgumentType]
    empty = {**leaves, "proj": leaves["proj"][:, :0]}  # pyright: ignore[reportOptionalSubscript]
    with pytest.raises(ValueError, match="T=0"):
        mamba1_mix(**empty, impl=impl)  # pyright: ignore[reportArgumentType]


def test_wrong_shapes_are_named() -> None:
    leaves = _leaves()
    with pytest.raises(ValueError, match="x_weight must have shape"):
        mamba1_mix(**{**leaves, "x_weight": torch.ones(3, 3)})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="proj must have shape"):
        mamba1_mix(**{**leaves, "proj": torch.ones(1, 2, 3)})  # pyright: ignore[reportArgumentType]
