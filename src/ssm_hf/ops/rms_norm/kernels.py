"""Triton kernels of the RMS norm."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, scale_ptr, stride_x, stride_y, size, eps, BLOCK: tl.constexpr
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * stride_y + columns, x * scale * weight, mask=inside)
    tl.store(scale_ptr + row, scale)
