"""Matrix products whose sum is written in a wider dtype than their factors'."""

import torch
from torch import Tensor

# Products of 16-bit matrices with a sum in fp32 came with torch 2.8, for NVIDIA's GPUs.
_HAS_WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.mm.overloads() and torch.version.hip is None


def product_into(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) = a (m, k) b (k, n), without a rounding to a's dtype where torch can."""
    if total.dtype == torch.float32 != a.dtype and _HAS_WIDE_PRODUCTS and total.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        total.copy_(a @ b)
