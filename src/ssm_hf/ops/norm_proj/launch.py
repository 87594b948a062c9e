"""Norm and projection as one torch operator that keeps nothing but the stream."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.launch import KERNEL_DTYPES, check_tensors
from ssm_hf.ops.product import product_into
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
) -> tuple[Tensor, Tensor, Tensor]:
    """y in `dtype`, x + residual in residual's dtype (or empty), 1/rms (rows, 1)."""
    y, total, scale = norm._forward(x, residual, None, norm_weight, eps, x.shape[-1], False, dtype)
    return F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype)), total, scale


@_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, scale = norm._empty_outputs(x, residual, norm_weight, x.shape[-1], dtype)
    return y.new_empty(*x.shape[:-1], weight.shape[0]), total, scale


@torch.library.custom_op("ssm_hf::norm_proj_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    h: Tensor,
    scale: Tensor,
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
    dy = dy.contiguous()
    dnormed = dy @ weight.to(dy.dtype)
    normed = torch.empty_like(dnormed) if wanted[1] else None
    norm.gradients_into(
        dx, dresidual, h.new_empty(0), dnorm_weight, normed, dnormed, dtotal, h, None, norm_weight,
        scale, h.shape[-1], False,
    )  # fmt: skip
    rows = dy.flatten(0, -2)
    if normed is not None:
        product_into(dweight, rows.t(), normed.flatten(0, -2))
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
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    wanted: list[bool],
) -> list[Tensor]:
    return _empty_grads(h, norm_weight, weight, bias, dtype, residual_dtype, wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, norm_weight, weight, bias, _, ctx.y_dtype = inputs
    _, total, scale = output
    ctx.mark_non_differentiable(*((scale, total) if residual is None else (scale,)))
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else total, scale, norm_weight, weight, bias)


def _gradients(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None) -> tuple[Any, ...]:
    h, scale, norm_weight, weight, bias = ctx.saved_tensors
    if dy is None:
        dy = h.new_zeros((), dtype=ctx.y_dtype).expand(*h.shape[:-1], weight.shape[0])
    wanted = list(ctx.needs_input_grad[2:5])
    has_residual = ctx.residual_dtype is not None
    dx, dresidual, *of_weights = _backward(
        dy, dtotal if has_residual else None, h, scale, norm_weight, weight, bias, ctx.dtype,
        ctx.residual_dtype, wanted,
    )  # fmt: skip
    if ctx.residual_dtype == ctx.dtype:
        dresidual = dx
    return (
        dx,
        dresidual if has_residual else None,
        *(grad if needed else None for grad, needed in zip(of_weights, wanted, strict=True)),
        None,
        None,
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
    y, total, _ = _forward(x, residual, norm_weight, weight, bias, eps, dtype)
    return y, x if residual is None else total
