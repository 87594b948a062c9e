"""Gated product and projection as one torch operator that keeps nothing but its input."""
# Kernels annotate plain values as constexpr.
# pyright: reportArgumentType=false

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.gated_linear.kernels import gated_bwd_kernel, gated_fwd_kernel
from ssm_hf.ops.launch import KERNEL_DTYPES, call, check_tensors, on_device, tuned
from ssm_hf.ops.product import product_into


def _rows(t: Tensor) -> Tensor:
    """(rows, channels), channels next to one another."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


@torch.library.custom_op("ssm_hf::gated_linear_fwd", mutates_args=())
def _forward(u: Tensor, weight: Tensor) -> Tensor:
    """(..., D) in u's dtype."""
    rows, width = _rows(u), weight.shape[1]
    h = u.new_empty(rows.shape[0], width)
    options = tuned("gated_fwd", "default", u.device)
    if h.numel():
        with on_device(u):
            gated_fwd_kernel[(len(rows), -(-width // options["BLOCK"]))](
                rows, h, rows.stride(0), h.stride(0), width, **options
            )
    return F.linear(h, weight.to(u.dtype)).view(*u.shape[:-1], weight.shape[0])


@_forward.register_fake
def _(u: Tensor, weight: Tensor) -> Tensor:
    return u.new_empty(*u.shape[:-1], weight.shape[0])


@torch.library.custom_op("ssm_hf::gated_linear_bwd", mutates_args=())
def _backward(dy: Tensor, u: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Gradients of u, and of the weight if it is wanted (else empty)."""
    rows, dy_rows, width = _rows(u), _rows(dy), weight.shape[1]
    dh = dy_rows @ weight.to(dy.dtype)
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    du_rows = du.view(-1, 2 * width)
    dweight = weight.new_empty(weight.shape if wanted else (0,))
    h = u.new_empty(len(rows) if wanted else 0, width)
    options = tuned("gated_bwd", "default", u.device)
    if dh.numel():
        with on_device(u):
            gated_bwd_kernel[(len(rows), -(-width // options["BLOCK"]))](
                rows, dh, du_rows, h, rows.stride(0), dh.stride(0), du_rows.stride(0),
                h.stride(0), width, KEEP=wanted, **options,
            )  # fmt: skip
    if wanted:
        product_into(dweight, dy_rows.t(), h)
    return du, dweight


@_backward.register_fake
def _(dy: Tensor, u: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return du, weight.new_empty(weight.shape if wanted else (0,))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    u, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    du, dweight = _backward(dy, u, weight, wanted)
    return du, dweight if wanted else None


_forward.register_autograd(_gradients, setup_context=_setup)


def gated_linear_triton(u: Tensor, weight: Tensor) -> Tensor:
    """See `ssm_hf.ops.gated_linear`."""
    check_tensors("gated_linear", KERNEL_DTYPES, u=u, weight=weight)
    return call(_forward, u, weight)
