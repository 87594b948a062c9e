"""Matrix products: sums in a wider dtype than the factors', rows that begin on cache lines."""

import torch
from torch import Tensor

# Products of 16-bit matrices with a sum in fp32 came with torch 2.8, for NVIDIA's GPUs.
_HAS_WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.mm.overloads() and torch.version.hip is None
# Bytes of a cache line.
_LINE = 128


def product_into(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) = a (m, k) b (k, n), without a rounding to a's dtype where torch can."""
    if total.dtype == torch.float32 != a.dtype and _HAS_WIDE_PRODUCTS and total.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    elif total.dtype == a.dtype:
        torch.mm(a, b, out=total)
    else:
        total.copy_(a @ b)


def empty_rows(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Like `new_empty`, but each row (the last dimension) begins on a cache line.

    Matrix products and kernels that take parts of rows write and read whole sectors of memory then,
    whatever the width: that of a projection is seldom a multiple of a line.
    """
    line = _LINE // (dtype or like.dtype).itemsize
    return like.new_empty(*shape[:-1], -(-shape[-1] // line) * line, dtype=dtype)[..., : shape[-1]]


def linear_in_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x (..., D), weight (O, D), bias) in `empty_rows`."""
    rows = x.reshape(-1, x.shape[-1])
    y = empty_rows(rows, rows.shape[0], weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=y)
    else:
        torch.addmm(bias, rows, weight.t(), out=y)
    return y.view(*x.shape[:-1], weight.shape[0])
