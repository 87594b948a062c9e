"""The gated product and its projection in plain torch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import backward_in_given_precision, compute_dtype


class _GatedLinear(torch.autograd.Function):
    """Keeps u and the weight alone."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(u, weight)
        value, gate = u.to(compute_dtype(u)).chunk(2, dim=-1)
        return F.linear((value * F.silu(gate)).to(u.dtype), weight.to(u.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @backward_in_given_precision
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, weight = ctx.saved_tensors
        value, gate = u.to(compute_dtype(u)).chunk(2, dim=-1)
        dh = (dy @ weight.to(dy.dtype)).to(value.dtype)
        share = torch.sigmoid(gate)
        opened = gate * share
        du = torch.cat([dh * opened, dh * value * (share + opened * (1 - share))], dim=-1)
        dweight = None
        if ctx.needs_input_grad[1]:
            h = (value * opened).to(dy.dtype)
            dweight = (dy.flatten(0, -2).t() @ h.flatten(0, -2)).to(weight.dtype)
        return du.to(u.dtype), dweight


def gated_linear_torch(u: Tensor, weight: Tensor) -> Tensor:
    """weight (value * silu(gate)); formed in fp32 or wider, rounded before the product."""
    return _GatedLinear.apply(u, weight)  # pyright: ignore[reportReturnType]
