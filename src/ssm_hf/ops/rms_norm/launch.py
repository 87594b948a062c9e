"""The norm's kernels as torch operators: launches, shapes for tracing, gradients."""

import torch
from torch import Tensor

from ssm_hf.ops.launch import on_device, tuned
from ssm_hf.ops.rms_norm.kernels import rms_norm_fwd_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("ssm_hf::rms_norm_fwd", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (rows, D) -> y (rows, D), 1 / rms (rows,)."""
    rows, size = x.shape
    y, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    options = tuned("rms_norm_fwd", "default", x.device)
    block = 1 << (size - 1).bit_length()
    with on_device(x):
        rms_norm_fwd_kernel[(rows,)](
            x, weight, y, scale, x.stride(0), y.stride(0), size, eps, BLOCK=block, **options
        )
    return y, scale


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
