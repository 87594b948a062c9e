"""Attention on intervals in plain torch: the definition, and the product with a dense mask."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import compute_dtype


def visible(low: Tensor, high: Tensor, keys: int, key_mask: Tensor | None) -> Tensor:
    """True (B, N, S), or (1, N, S), where a query sees a key."""
    key = torch.arange(keys, device=low.device)
    seen = (key >= low[..., None]) & (key <= high[..., None])
    return seen if key_mask is None else seen & key_mask[:, None]


def interval_attention_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Softmax by its formula, in fp32 or wider; all scores are held at once."""
    dtype, groups = compute_dtype(q, k, v), q.shape[2] // k.shape[2]
    k, v = (t.to(dtype).repeat_interleave(groups, dim=2) for t in (k, v))
    seen = visible(low, high, k.shape[1], key_mask)[:, None]
    scores = torch.einsum("bnhd,bshd->bhns", q.to(dtype), k) * scale
    scores = scores.masked_fill(~seen, -math.inf)
    # A query that sees nothing has no largest score.
    top = scores.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
    weights = (scores - top).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    return torch.einsum("bhns,bshd->bnhd", weights, v).to(q.dtype)


def interval_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    key_mask: Tensor | None,
    places: Tensor | None,
    scale: float,
) -> Tensor:
    """The same by torch's scaled_dot_product_attention with a mask of N S bits a row."""
    if places is not None:
        chosen = rows_at(q, places)
        y = interval_attention_torch(chosen, k, v, low, high, key_mask, None, scale)
        return put_rows(y, places, q.shape[1])
    dtype = product_dtype(q, k, v)
    groups = q.shape[2] // k.shape[2]
    # Repeated heads: with a mask, torch's fused kernels take no groups.
    k, v = (t.repeat_interleave(groups, dim=2) if groups > 1 else t for t in (k, v))
    seen = visible(low, high, k.shape[1], key_mask)
    # Softmax over nothing is not a number: such a query sees all, and what comes out is dropped.
    blind = ~seen.any(dim=-1)
    seen = seen | blind[..., None]
    heads_first = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(*heads_first, attn_mask=seen[:, None], scale=scale)
    return y.transpose(1, 2).masked_fill(blind[..., None, None], 0.0).to(q.dtype)


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """x (B, T, ...), places (B, N) -> (B, N, ...)."""
    row = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (row + places).flatten()).unflatten(0, places.shape)


def put_rows(x: Tensor, places: Tensor, length: int) -> Tensor:
    """x (B, N, ...), places (B, N) -> (B, length, ...), 0 at other places."""
    row = torch.arange(len(x), device=x.device)[:, None] * length
    y = x.new_zeros(len(x) * length, *x.shape[2:])
    return y.index_copy(0, (row + places).flatten(), x.flatten(0, 1)).unflatten(0, (-1, length))


def product_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of the products: one that holds what all three hold."""
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The scale of the scores; raise `ValueError` unless it is positive."""
    found = 1 / math.sqrt(head_dim) if scale is None else scale
    if not found > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return found
