"""A linear layer with norm, residual and convolution in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.causal_conv1d.reference import causal_conv1d_step
from ssm_hf.ops.packing import compute_dtype
from ssm_hf.ops.rms_norm.reference import rms_norm_torch


def norm_linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    group_size: int,
    gated: bool,
    residual: Tensor | None,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: int,
    out_dtype: torch.dtype,
    overlap: bool,
) -> Tensor:
    """The definition, in fp32 or wider; see `ssm_hf.ops.norm_linear`."""
    del overlap
    dtype = compute_dtype(x, weight)
    x = x.to(dtype)
    if gated:
        value, gate = x.chunk(2, dim=-1)
        x = value * F.silu(gate)
    if norm_weight is not None:
        x = rms_norm_torch(x, norm_weight, eps, None, group_size, False)
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if conv_state is not None and conv_weight is not None:
        part = y[:, conv_first : conv_first + conv_state.shape[2]]
        convolved, window = causal_conv1d_step(
            part, conv_weight, conv_bias, "silu", conv_state.to(dtype)
        )
        conv_state.copy_(window)
        part.copy_(convolved)
    y = y if residual is None else residual.to(dtype) + y
    return y.to(out_dtype)
