"""Linear layers of a decoding step of several rows in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.causal_conv1d.reference import causal_conv1d_step
from ssm_hf.ops.packing import compute_dtype
from ssm_hf.ops.rms_norm.reference import rms_norm_torch


def rows_linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    squares: Tensor | None,
    eps: float,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: int,
    shares: bool,
    overlap: bool,
) -> Tensor:
    """The definition, in fp32 or wider; see `ssm_hf.ops.rows_linear`."""
    del overlap
    dtype = compute_dtype(x, weight)
    y = F.linear(x.to(dtype), weight.to(dtype))
    if squares is not None:
        y = y * torch.rsqrt(squares.to(dtype).sum(1, keepdim=True) / x.shape[1] + eps)
    if bias is not None:
        y = y + bias.to(dtype)
    if conv_state is not None and conv_weight is not None:
        part = y[:, conv_first : conv_first + conv_state.shape[2]]
        convolved, window = causal_conv1d_step(
            part, conv_weight, conv_bias, "silu", conv_state.to(dtype)
        )
        conv_state.copy_(window)
        part.copy_(convolved)
    return y[None] if shares else y.to(x.dtype)


def shares_linear_torch(shares: Tensor, weight: Tensor, overlap: bool) -> tuple[Tensor, Tensor]:
    """The definition; see `ssm_hf.ops.rows_linear.shares_linear`."""
    del overlap
    dtype = compute_dtype(shares, weight)
    total = shares.to(dtype).sum(0)
    size = weight.shape[1]
    return F.linear(total[:, :size], weight.to(dtype)), total[:, size:].clone()


def shares_norm_torch(
    shares: Tensor, stream: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, overlap: bool
) -> tuple[Tensor, Tensor]:
    """The definition; see `ssm_hf.ops.rows_linear.shares_norm`."""
    del overlap
    wide = compute_dtype(shares, stream)
    x = stream.to(wide) + shares.to(wide).sum(0)
    normed = rms_norm_torch(x, weight, eps, None, x.shape[-1], False)
    return normed.to(dtype), x.to(stream.dtype)
