"""Representative launches of attention on intervals."""

from collections.abc import Callable, Iterator

import torch

from ssm_hf.ops.interval_attention import interval_attention, interval_attention_step


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    yield "rows", lambda: _rows(2, 4096, 12, 4, 64, torch.bfloat16)
    yield "large heads", lambda: _rows(2, 4096, 16, 8, 128, torch.bfloat16)
    yield "largest heads", lambda: _rows(1, 4096, 8, 8, 256, torch.bfloat16)
    yield "pads, odd heads", lambda: _rows(2, 300, 8, 8, 80, torch.float16, masked=True)
    for head_dim in (16, 64, 128):
        yield f"fp32, {head_dim}", lambda d=head_dim: _rows(2, 300, 4, 2, d, torch.float32)
    yield "selected queries", lambda: _rows(2, 4096, 12, 12, 64, torch.bfloat16, queries=614)
    yield "in their places", lambda: _rows(2, 4096, 12, 12, 64, torch.bfloat16, placed=True)
    yield "ones", lambda: _rows(1, 1, 1, 1, 1, torch.float32)
    yield "one token", lambda: _step(1, 4096, 12, 4, 64, torch.bfloat16)
    yield "one token of many rows", lambda: _step(64, 4096, 32, 32, 128, torch.bfloat16)
    yield "one token, selected", lambda: _step(8, 2048, 12, 12, 64, torch.bfloat16, selected=True)
    yield "one token, ones", lambda: _step(1, 1, 1, 1, 1, torch.float32)


def _rows(
    batch: int, keys: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype,
    masked: bool = False, queries: int | None = None, placed: bool = False,
) -> None:  # fmt: skip
    queries = queries or keys
    width = (heads + 2 * groups) * head_dim
    rows = torch.empty(batch, keys, width, dtype=dtype, requires_grad=True)
    q, k, v = rows.unflatten(-1, (-1, head_dim)).split([heads, groups, groups], dim=2)
    bound = torch.zeros(batch, queries, dtype=torch.int64)
    mask = torch.ones(batch, keys, dtype=torch.bool) if masked else None
    places = torch.zeros(batch, queries, dtype=torch.int64) if placed else None
    y = interval_attention(q[:, :queries], k, v, bound, bound, key_mask=mask, places=places,
                           impl="triton")  # fmt: skip
    y.sum().backward()


def _step(
    batch: int, slots: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype,
    selected: bool = False,
) -> None:  # fmt: skip
    qkv = torch.empty(batch, heads + 2 * groups, head_dim, dtype=dtype)
    q, k, v = qkv.split([heads, groups, groups], dim=1)
    keys = torch.empty(batch, slots, groups, head_dim, dtype=dtype)
    length = torch.zeros(batch, dtype=torch.int64)
    some = torch.ones(batch, dtype=torch.bool) if selected else None
    first = length if selected else None
    interval_attention_step(q, k, v, keys, torch.empty_like(keys), length, first=first,
                            attend=some, store=some, impl="triton")  # fmt: skip
