"""Residual norm and projection: the one operator against the two."""

import pytest
import torch
from torch import Tensor

from ssm_hf.ops.dispatch import keep_activations
from ssm_hf.ops.norm_proj import norm_proj
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
SHAPE, OUT = (2, 5, 24), 40


def _leaves(residual: bool, bias: bool) -> dict[str, Tensor | None]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    return {
        "x": randn(*SHAPE),
        "residual": randn(*SHAPE) if residual else None,
        "norm_weight": randn(SHAPE[-1]),
        "weight": randn(OUT, SHAPE[-1]) / SHAPE[-1] ** 0.5,
        "bias": randn(OUT) if bias else None,
    }


def _outputs(
    leaves: dict[str, Tensor | None], dtype: torch.dtype, impl: str, both: bool = True
) -> dict[str, Tensor]:
    given = {
        name: None if leaf is None else leaf.to(dtype, copy=True).requires_grad_()
        for name, leaf in leaves.items()
    }
    y, total = norm_proj(**given, eps=1e-5, dtype=dtype, impl=impl)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator(DEVICE).manual_seed(1)
    loss = y.new_zeros(())
    for out in (y, total) if both else (y,):
        weight = torch.randn(out.shape, generator=generator, device=DEVICE)
        loss = loss + (out * weight.to(dtype)).sum()
    present = {name: leaf for name, leaf in given.items() if leaf is not None}
    grads = torch.autograd.grad(loss, list(present.values()))
    return {"y": y, "total": total, **{f"d{n}": g for n, g in zip(present, grads, strict=True)}}


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("residual", "bias"), [(True, False), (True, True), (False, False)])
def test_kernels_equal_norm_and_projection(residual: bool, bias: bool, both: bool) -> None:
    leaves = _leaves(residual, bias)
    got = _outputs(leaves, torch.float32, "triton", both)
    for name, right in _outputs(leaves, torch.float64, "reference", both).items():
        # fp32 rounding
        assert got[name].shape == right.shape, name
        assert relative_error(got[name], right) < 1e-6, name


def test_a_stream_wider_than_the_sublayers_has_gradients_of_its_own_dtype() -> None:
    leaves = {name: t for name, t in _leaves(True, False).items() if t is not None}
    leaves["x"] = leaves["x"].bfloat16()
    for t in leaves.values():
        t.requires_grad_()
    y, total = norm_proj(**leaves, eps=1e-5, dtype=torch.bfloat16, impl="triton")  # pyright: ignore[reportArgumentType]
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    (y.float().sum() + total.sum()).backward()
    for name, t in leaves.items():
        assert t.grad is not None, name
        assert t.grad.dtype == t.dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_changes_no_gradient(dtype: torch.dtype) -> None:
    def gradients(keep: bool) -> list[Tensor]:
        given = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        with keep_activations(keep):
            y, total = norm_proj(**given, eps=1e-5, dtype=dtype, impl="triton")  # pyright: ignore[reportArgumentType]
        return list(torch.autograd.grad(y.float().square().sum() + total.sum(), given.values()))

    leaves = {name: t for name, t in _leaves(True, True).items() if t is not None}
    for kept, formed in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(kept, formed)


def test_rows_begin_on_cache_lines() -> None:
    leaves = _leaves(True, True)
    y, _ = norm_proj(**leaves, eps=1e-5, dtype=torch.float32, impl="triton")  # pyright: ignore[reportArgumentType]
    assert y.shape == (*SHAPE[:-1], OUT)
    assert y.stride() == (64 * SHAPE[1], 64, 1)


def test_only_the_stream_is_kept_and_frozen_weights_get_no_gradient() -> None:
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.extend([t.numel()] if t.numel() else [])
        return t

    leaves = {name: t for name, t in _leaves(True, False).items() if t is not None}
    leaves["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, _ = norm_proj(**leaves, eps=1e-5, dtype=torch.float32, impl="triton")  # pyright: ignore[reportArgumentType]
    rows = SHAPE[0] * SHAPE[1]
    assert sorted(kept) == sorted([rows * SHAPE[2], rows, SHAPE[2], OUT * SHAPE[2]])
    y.sum().backward()
    assert leaves["x"].grad is not None
    assert leaves["weight"].grad is None


def test_wrong_shapes_are_named() -> None:
    leaves = _leaves(True, False)
    with pytest.raises(ValueError, match="residual must have shape"):
        norm_proj(**{**leaves, "residual": torch.ones(2)}, eps=1e-5, dtype=torch.float32)  # pyright: ignore[reportArgumentType]
