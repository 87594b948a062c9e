"""Norm and projection as one torch operator that keeps little but the stream."""

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops.dispatch import keeps_activations
from ssm_hf.ops.launch import KERNEL_DTYPES, check_tensors
from ssm_hf.ops.narrow import is_kept, narrow
from ssm_hf.ops.product import empty_rows, linear_in_rows, product_into
from ssm_hf.ops.rms_norm import launch as norm


@torch.library.custom_op("ssm_hf::norm_proj_fwd", mutates_args=())
def _forward(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y in `dtype`, x + residual in residual's dtype (or empty), 1/rms (rows, 1); with `keep` the
    norm, and the weight in `dtype` if it is in another one (else empty)."""
    normed, total, scale = norm._forward(
        x, residual, None, norm_weight, eps, x.shape[-1], False, dtype
    )
    narrowed = narrow(weight, dtype)
    y = linear_in_rows(normed, narrowed, None if bias is None else bias.to(dtype))
    if not keep or is_kept(weight, dtype):
        narrowed = normed.new_empty(0)
    return y, total, scale, normed if keep else normed.new_empty(0), narrowed


@_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    normed, total, scale = norm._empty_outputs(x, residual, norm_weight, x.shape[-1], dtype)
    narrowed = normed.new_empty(weight.shape if keep and weight.dtype != dtype else (0,))
    y = empty_rows(normed, *x.shape[:-1], weight.shape[0])
    return y, total, scale, normed if keep else normed.new_empty(0), narrowed


@torch.library.custom_op("ssm_hf::norm_proj_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    h: Tensor,
    scale: Tensor,
    normed: Tensor,
    narrowed: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of x in `dtype`, residual (empty: the same as x's, or none), norm_weight, weight
    and bias; of these three only the wanted ones."""
    grads = _empty_grads(h, norm_weight, weight, bias, dtype, residual_dtype, wanted)
    dx, dresidual, dnorm_weight, dweight, dbias = grads
    rows = norm._rows(dy)
    dnormed = rows @ (narrowed if narrowed.numel() else narrow(weight, dy.dtype))
    again = torch.empty_like(dnormed) if wanted[1] and not normed.numel() else None
    norm.gradients_into(
        dx, dresidual, h.new_empty(0), dnorm_weight, again, dnormed, dtotal, h, None, norm_weight,
        scale, h.shape[-1], False,
    )  # fmt: skip
    if wanted[1]:
        product_into(dweight, rows.t(), norm._rows(normed) if again is None else again)
    if dbias.numel():
        dbias.copy_(rows.sum(dim=0, dtype=torch.float32))
    return grads


def _empty_grads(
    h: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    wanted: list[bool],
) -> list[Tensor]:
    two_grads = residual_dtype is not None and residual_dtype != dtype
    weights = zip((norm_weight, weight, bias), wanted, strict=True)
    return [
        h.new_empty(h.shape, dtype=dtype),
        h.new_empty(h.shape if two_grads else (0,), dtype=residual_dtype),
        *(h.new_empty(0) if t is None or not w else t.new_empty(t.shape) for t, w in weights),
    ]


@_backward.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    h: Tensor,
    scale: Tensor,
    normed: Tensor,
    narrowed: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    wanted: list[bool],
) -> list[Tensor]:
    return _empty_grads(h, norm_weight, weight, bias, dtype, residual_dtype, wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, norm_weight, weight, bias, _, ctx.y_dtype, _ = inputs
    _, total, *formed = output
    ctx.mark_non_differentiable(*((*formed, total) if residual is None else formed))
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else total, *formed, norm_weight, weight, bias)


def _gradients(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: None) -> tuple[Any, ...]:
    h, scale, normed, narrowed, norm_weight, weight, bias = ctx.saved_tensors
    if dy is None:
        dy = h.new_zeros((), dtype=ctx.y_dtype).expand(*h.shape[:-1], weight.shape[0])
    wanted = list(ctx.needs_input_grad[2:5])
    has_residual = ctx.residual_dtype is not None
    dx, dresidual, *of_weights = _backward(
        dy, dtotal if has_residual else None, h, scale, normed, narrowed, norm_weight, weight,
        bias, ctx.dtype, ctx.residual_dtype, wanted,
    )  # fmt: skip
    if ctx.residual_dtype == ctx.dtype:
        dresidual = dx
    return (
        dx,
        dresidual if has_residual else None,
        *(grad if needed else None for grad, needed in zip(of_weights, wanted, strict=True)),
        *(None,) * 3,
    )


_forward.register_autograd(_gradients, setup_context=_setup)


def norm_proj_triton(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As the operators one after another."""
    check_tensors("norm_proj", KERNEL_DTYPES, x=x, residual=residual, norm_weight=norm_weight,
                  weight=weight, bias=bias)  # fmt: skip
    keep = keeps_activations()
    y, total, *_ = _forward(x, residual, norm_weight, weight, bias, eps, dtype, keep)
    return y, x if residual is None else total
