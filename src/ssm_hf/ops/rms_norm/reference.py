"""RMS norm in plain torch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import compute_dtype


def _normed(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor]:
    """The definition: y in the computing dtype, and 1 / rms of every group."""
    dtype = compute_dtype(x)
    h, act = x.to(dtype), None if gate is None else F.silu(gate.to(dtype))
    if act is not None and not norm_before_gate:
        h = h * act
    grouped = h if group_size == x.shape[-1] else h.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(grouped.square().mean(dim=-1, keepdim=True) + eps)
    y = (grouped * scale).view_as(h) * weight
    if act is not None and norm_before_gate:
        y = y * act
    return y, scale


class _RMSNorm(torch.autograd.Function):
    """Keeps the inputs and one number per group; everything else is formed again backwards."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        y, scale = _normed(x, weight, eps, gate, group_size, norm_before_gate)
        # (..., groups, 1), also where there is one group
        scale = scale if scale.ndim > x.ndim else scale.unsqueeze(-2)
        ctx.save_for_backward(x, weight, gate, scale)
        ctx.group_size, ctx.norm_before_gate = group_size, norm_before_gate
        return y.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, gate, scale = ctx.saved_tensors
        wide, dy = x.to(scale.dtype), dy.to(scale.dtype)
        gate_wide = None if gate is None else gate.to(scale.dtype)
        act = None if gate_wide is None else F.silu(gate_wide)
        gate_first = act is not None and not ctx.norm_before_gate
        h = wide * act if gate_first else wide
        normed = (h.unflatten(-1, (-1, ctx.group_size)) * scale).view_as(h)
        dact = None
        if act is not None and ctx.norm_before_gate:
            dact = dy * normed * weight
            dy = dy * act
        dweight = (dy * normed).flatten(0, -2).sum(dim=0)
        g = (dy * weight).unflatten(-1, (-1, ctx.group_size))
        n = normed.unflatten(-1, (-1, ctx.group_size))
        along = torch.linalg.vecdot(g, n).unsqueeze(-1).div_(-ctx.group_size)
        dh = torch.addcmul(g, n, along).mul_(scale).view_as(h)
        if gate_first and act is not None:
            dact = dh * wide
            dh = dh.mul_(act)
        dgate = None
        if dact is not None and gate is not None:
            dgate = torch.ops.aten.silu_backward(dact, gate_wide).to(gate.dtype)
        return dh.to(x.dtype), dweight, dgate, None, None, None, None


def rms_norm_torch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    group_size: int | None,
    norm_before_gate: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Statistics, gate and weight in fp32 (fp64 for fp64 inputs); see `_RMSNorm`."""
    size = x.shape[-1] if group_size is None else group_size
    dtype = x.dtype if dtype is None else dtype
    wide_weight = weight.to(compute_dtype(x))
    if not torch.is_grad_enabled():
        return _normed(x, wide_weight, eps, gate, size, norm_before_gate)[0].to(dtype)
    return _RMSNorm.apply(x, wide_weight, gate, eps, size, norm_before_gate, dtype)  # pyright: ignore[reportReturnType]


def add_rms_norm_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum is rounded to residual's dtype before it is normalised, as two operators would."""
    total = x if residual is None else (x + residual).to(residual.dtype)
    return rms_norm_torch(total, weight, eps, None, None, False, dtype), total
