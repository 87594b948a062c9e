"""Softmax attention of queries that each see one interval of the keys."""

import torch
from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.interval_attention.reference import (
    checked_scale,
    interval_attention_definition,
    interval_attention_torch,
    product_dtype,
    put_rows,
    rows_at,
)
from ssm_hf.ops.interval_attention.step import interval_attention_step
from ssm_hf.ops.launch import architecture, unsupported_dtypes
from ssm_hf.ops.packing import in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.interval_attention.kernels_bwd import compiles_for_tensor_memory
    from ssm_hf.ops.interval_attention.launch import interval_attention_triton
else:
    compiles_for_tensor_memory = True
    interval_attention_triton = None

__all__ = [
    "interval_attention",
    "interval_attention_definition",
    "interval_attention_step",
    "put_rows",
    "rows_at",
    "why_unsupported",
]


def why_unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these; None when they can."""
    if not compiles_for_tensor_memory and architecture(q.device).startswith("sm10"):
        return "its kernels need Triton 3.5 or later on this GPU (Blackwell)"
    most = 128 if product_dtype(q, k, v) == torch.float32 else 256
    if q.shape[-1] > most:
        return (
            "its kernels take heads of at most 256 dimensions, and of 128 in float32, "
            f"got {q.shape[-1]}"
        )
    return unsupported_dtypes(q, k, v)


@in_given_precision
def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    key_mask: Tensor | None = None,
    places: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(q kᵀ scale) v over the keys low..high of each query.

    Causal rows, documents, sliding windows and any selection of queries are such intervals, of
    places among the keys. The kernels skip tiles of keys that no query of a tile sees: neighbouring
    queries should have neighbouring intervals, which is a matter of speed alone. They keep the
    logarithm of the softmax's denominator for the backward pass, which is deterministic.

    Args:
        q: (B, N, H, d); with `places` (B, T, H, d).
        k: (B, S, G, d), G divides H; head h reads keys and values h // (H / G).
        v: (B, S, G, d).
        low: (B, N), or (1, N) where all rows are alike, integers: the first key of each query.
        high: the same shape: its last key, included. Parts of an interval outside 0..S-1 hold no
            keys. A query that sees no key gives 0, and no gradients.
        key_mask: (B, S) bool, False = seen by nobody.
        places: (B, N) int64, which rows of q the queries are, each at most once; other rows give 0.
            Default: all, in their order. So queries that lie scattered need not be gathered.
        scale: of the scores, positive; default d^-0.5.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        q's shape, in q's dtype; softmax and sums are formed in fp32 or wider.

    Raises:
        ValueError: shapes disagree, or the scale is not positive.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Dao 2023, "FlashAttention-2" (the kernels' algorithm).
    """
    check_heads(q, k, v)
    rows = (q.shape[0], q.shape[1])
    if places is not None:
        if places.ndim != 2 or places.dtype != torch.int64 or places.shape[0] != q.shape[0]:
            raise ValueError(
                f"places must be an int64 tensor of shape ({q.shape[0]}, N), "
                f"got {places.dtype} of shape {tuple(places.shape)}"
            )
        rows = (q.shape[0], places.shape[1])
    for name, bound in (("low", low), ("high", high)):
        is_integer = not bound.is_floating_point() and bound.dtype != torch.bool
        if bound.shape not in (rows, (1, rows[1])) or not is_integer:
            raise ValueError(
                f"{name} must be an integer tensor of shape {rows} or {(1, rows[1])}, "
                f"got {bound.dtype} of shape {tuple(bound.shape)}"
            )
    if low.shape != high.shape:
        raise ValueError(
            f"low and high must have one shape, got {tuple(low.shape)} and {tuple(high.shape)}"
        )
    if key_mask is not None and (key_mask.shape != k.shape[:2] or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be a bool tensor of shape {tuple(k.shape[:2])} (False = seen by "
            f"nobody), got {key_mask.dtype} of shape {tuple(key_mask.shape)}"
        )
    run = pick(
        "interval_attention",
        impl,
        q.device,
        reference=interval_attention_torch,
        triton=interval_attention_triton,
        unsupported=why_unsupported(q, k, v),
    )
    return run(q, k, v, low, high, key_mask, places, checked_scale(scale, q.shape[-1]))


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `ValueError` unless k and v have one shape and q's heads share them evenly."""
    if q.ndim != 4 or k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "q must have shape (B, N, H, d), and k (B, S, G, d), "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[1] < 1 or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k must have at least one key, and a number of heads that divides q's {q.shape[2]}, "
            f"got shape {tuple(k.shape)}"
        )
