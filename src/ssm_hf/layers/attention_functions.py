"""Attention by transformers' functions, and by its definition."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ssm_hf.layers.attention_mask import Places, by_document
from ssm_hf.ops.packing import compute_dtype


def call_attention(
    module: Any, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
) -> Tensor:
    """q (B, T, H, d), k and v (B, S, G, d) -> (B, T, H, d).

    Args:
        module: the layer, of which transformers' functions read attributes.
        name: of the function.
        q: queries.
        k: keys.
        v: values.
        mask: as the function takes it; None = causal.
        options: for the function.
    """
    function: Callable[..., tuple[Tensor, Any]] = (
        _eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    )
    y, _ = function(
        module,
        *(t.transpose(1, 2) for t in (q, k.to(q.dtype), v.to(q.dtype))),
        mask,
        dropout=module.dropout if module.training else 0.0,
        scaling=module.scaling,
        is_causal=mask is None,
        **options,
    )
    return y


def call_by_document(
    module: Any, name: str, q: Tensor, k: Tensor, v: Tensor, own: Places, numbers: Tensor
) -> Tensor:
    """The same for flash attentions, which take documents by their offsets."""
    layout = by_document(own, numbers, q.shape[0])
    y = call_attention(
        module,
        name,
        q.flatten(0, 1)[layout.queries][None],
        k.flatten(0, 1)[layout.keys][None],
        v.flatten(0, 1)[layout.keys][None],
        None,
        sliding_window=module.window,
        cu_seq_lens_q=layout.query_offsets,
        cu_seq_lens_k=layout.key_offsets,
        max_length_q=layout.most_queries,
        max_length_k=layout.most_keys,
    )
    whole = y.new_zeros(q.shape[0] * q.shape[1], *y.shape[2:])
    return whole.index_put((layout.queries,), y[0]).view(q.shape)


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The definition: query (B, H, T, d), key and value (B, G, S, d) -> (B, T, H, d), weights."""
    groups = module.num_key_value_groups
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    weights = scores.to(compute_dtype(scores)).softmax(dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout)
    return (weights @ value).transpose(1, 2), weights
