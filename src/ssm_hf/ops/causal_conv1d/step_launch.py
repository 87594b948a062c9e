"""The one-token kernel as a torch operator."""
# Kernels annotate plain values as constexpr.
# pyright: reportArgumentType=false

import torch
from torch import Tensor

from ssm_hf.ops.causal_conv1d.kernels_step import causal_conv1d_step_kernel
from ssm_hf.ops.launch import check_tensors, on_device, overlapping, tuned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("ssm_hf::causal_conv1d_step", mutates_args=("window",))
def causal_conv1d_step_triton(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """See `ssm_hf.ops.causal_conv1d.step.causal_conv1d_step_`."""
    check_tensors("causal_conv1d", DTYPES, x=x, window=window, weight=weight, bias=bias)
    if not window.is_contiguous():
        raise ValueError("causal_conv1d: the window must be contiguous")
    y = x.new_empty(x.shape)
    convolve_into(y, x, window, weight, bias)
    return y


def convolve_into(
    y: Tensor, x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """Write the step's result to y (B, C) of any float dtype, and move the window on."""
    if x.stride(1) != 1:
        x = x.contiguous()
    batch, channels = x.shape
    options = dict(tuned("causal_conv1d_step", "default", x.device))
    block = options["BLOCK"]
    blocks = (channels + block - 1) // block
    with on_device(x):
        causal_conv1d_step_kernel[(batch * blocks,)](
            x,
            window,
            weight.contiguous(),
            bias,
            y,
            x.stride(0),
            y.stride(0),
            channels,
            blocks,
            TAPS=weight.shape[1],
            HAS_BIAS=bias is not None,
            **options,
            **overlapping(True, x.device),
        )


@causal_conv1d_step_triton.register_fake
def _(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)
