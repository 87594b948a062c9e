"""Attention of one new token of each row over a cache of keys and values, in place."""

import math

import torch
from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick
from ssm_hf.ops.interval_attention.reference import checked_scale
from ssm_hf.ops.launch import unsupported_dtypes
from ssm_hf.ops.packing import compute_dtype, in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.interval_attention.step_launch import interval_attention_step_triton
else:
    interval_attention_step_triton = None

__all__ = ["interval_attention_step"]

# A program holds whole heads in registers.
_MOST_DIMENSIONS = 256


@in_given_precision
def interval_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    *,
    window: int | None = None,
    first: Tensor | None = None,
    attend: Tensor | None = None,
    store: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Store the new token's key and value, and attend over what its window holds.

    Token number p of a row lies in slot p mod S of the cache. The new token of a row that has seen
    n has number n; it sees itself and the numbers max(n - window + 1, n - S + 1, first, 0)..n-1.

    Args:
        q: (B, H, d).
        k: (B, G, d), G divides H; head h reads keys and values h // (H / G).
        v: (B, G, d).
        keys: (B, S, G, d), contiguous, changed in place; any float dtype.
        values: the same.
        length: (B,) int64 n, at least 0; it stays as it is.
        window: tokens that a query sees, itself included; None = all that are held.
        first: (B,) int64, least number that is seen; None = 0.
        attend: (B,) bool, False = y is 0 and no cached key is read; None = all attend.
        store: (B,) bool, False = the key and value are not stored; None = all are.
        scale: of the scores, positive; default d^-0.5.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, H, d) in q's dtype. No gradients flow.

    Raises:
        ValueError: shapes or dtypes disagree, or the window or scale is not positive.
        ImplementationUnavailableError: `impl="triton"` cannot run.
    """
    if q.ndim != 3:
        raise ValueError(f"q must have shape (B, H, d), got {tuple(q.shape)}")
    batch, heads, head_dim = q.shape
    if keys.ndim != 4 or keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(
            f"keys must have shape ({batch}, S, G, {head_dim}), got {tuple(keys.shape)}"
        )
    slots, groups = keys.shape[1:3]
    if slots < 1 or groups < 1 or heads % groups:
        raise ValueError(
            f"keys must have at least one slot, and a number of heads that divides q's {heads}, "
            f"got shape {tuple(keys.shape)}"
        )
    for name, value, shape in (
        ("k", k, (batch, groups, head_dim)),
        ("v", v, (batch, groups, head_dim)),
        ("values", values, tuple(keys.shape)),
        ("length", length, (batch,)),
        ("first", first, (batch,)),
        ("attend", attend, (batch,)),
        ("store", store, (batch,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    for name, value, dtype in (
        ("length", length, torch.int64),
        ("first", first, torch.int64),
        ("attend", attend, torch.bool),
        ("store", store, torch.bool),
    ):
        if value is not None and value.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {value.dtype}")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous: they are written in place")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, or None for all, got {window}")
    factor = checked_scale(scale, head_dim)
    unsupported = unsupported_dtypes(q, k, v, keys, values)
    if head_dim > _MOST_DIMENSIONS:
        unsupported = (
            f"its kernels take heads of at most {_MOST_DIMENSIONS} dimensions, got {head_dim}"
        )
    run = pick(
        "interval_attention",
        impl,
        q.device,
        reference=interval_attention_step_torch,
        triton=interval_attention_step_triton,
        unsupported=unsupported,
    )
    window = slots if window is None else min(window, slots)
    return run(q, k, v, keys, values, length, first, attend, store, window, factor)


@torch.no_grad()
def interval_attention_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    first: Tensor | None,
    attend: Tensor | None,
    store: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """The step in plain torch."""
    batch, slots, groups = keys.shape[:3]
    rows, slot = torch.arange(batch, device=keys.device), length % slots
    k, v = k.to(keys.dtype), v.to(values.dtype)
    for cache, new in ((keys, k), (values, v)):
        old = cache[rows, slot]
        cache.index_put_(
            (rows, slot), new if store is None else torch.where(store[:, None, None], new, old)
        )
    # Numbers of the tokens before the new one, by slot; the new one's own slot holds none of them.
    number = (
        length[:, None]
        - 1
        - (length[:, None] - 1 - torch.arange(slots, device=keys.device)) % slots
    )
    low = (length - window + 1).clamp(min=0)
    low = low if first is None else torch.maximum(low, first)
    seen = (number >= low[:, None]) & (number > length[:, None] - slots)
    dtype = compute_dtype(q, keys, values)
    grouped = q.to(dtype).unflatten(1, (groups, -1))
    scores = torch.einsum("bghd,bsgd->bghs", grouped, keys.to(dtype)) * scale
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    own = torch.einsum("bghd,bgd->bgh", grouped, k.to(dtype))[..., None] * scale
    weights = torch.cat([scores, own], dim=-1).softmax(dim=-1)
    y = torch.einsum("bghs,bsgd->bghd", weights[..., :-1], values.to(dtype))
    y = (y + weights[..., -1:] * v.to(dtype)[:, :, None]).flatten(1, 2)
    if attend is not None:
        y = y.masked_fill(~attend[:, None, None], 0.0)
    return y.to(q.dtype)
