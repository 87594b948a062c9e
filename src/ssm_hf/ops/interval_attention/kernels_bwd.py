"""Triton kernels of attention on intervals, backward.

With weights p = softmax(s): dv = pᵀ dy, ds = p (dy vᵀ - rowsum(dy y)), dq = ds k, dk = dsᵀ q. Both
passes form p anew from the scores and their stored logarithmic sums; none adds to what another
program writes.
"""

import inspect

import triton
import triton.language as tl

from ssm_hf.ops.interval_attention.kernels import (
    _LOG2_E,
    intervals,
    load_rows,
    places_of,
    sees,
    tile_and_head,
    tiles_of_keys,
)

# Triton 3.4 fails on keys' gradients for GPUs with tensor memory; 3.5 is told by what it added.
compiles_for_tensor_memory = "disable_licm" in inspect.signature(tl.range.__init__).parameters


@triton.jit
def interval_attention_delta_kernel(
    y_ptr, dy_ptr, q_ptr, low_ptr, high_ptr, places_ptr, delta_ptr, bounds_ptr, near_ptr,
    queries, rows, keys, heads, head_dim, tiles, plane, near_plane, stride_low,
    stride_db, stride_dn, stride_dh, stride_qb, stride_qn, stride_qh,
    PLACED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta (B, H, N) = rowsum(dy y); and bounds (4, B, tiles), of each BLOCK_M queries: least low,
    greatest high, greatest low, least high. `plane` is B * tiles.

    With places, also near (2, B, N, H, d): q and dy of the queries, side by side. Tiles whose
    queries see nothing are left out of it and of delta.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % heads
    b = (pid // tiles // heads).to(tl.int64)
    n, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    low, high = intervals(low_ptr + b * stride_low, high_ptr + b * stride_low, n, queries, keys)
    if tl.max(high, axis=0) >= 0:
        row = places_of(places_ptr + b * queries, n, queries, PLACED)
        inside = (n < queries)[:, None] & (d < head_dim)[None, :]
        y_row = ((b * rows + row) * heads + head) * head_dim
        y = tl.load(y_ptr + y_row[:, None] + d[None, :], mask=inside, other=0.0)
        dy_row = b * stride_db + row * stride_dn + head.to(tl.int64) * stride_dh
        dy = tl.load(dy_ptr + dy_row[:, None] + d[None, :], mask=inside, other=0.0)
        delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
        tl.store(delta_ptr + (b * heads + head) * queries + n, delta, mask=n < queries)
        if PLACED:
            q_row = b * stride_qb + row * stride_qn + head.to(tl.int64) * stride_qh
            q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=inside, other=0.0)
            near_row = ((b * queries + n) * heads + head) * head_dim
            near_ptrs = near_ptr + near_row[:, None] + d[None, :]
            tl.store(near_ptrs, q, mask=inside)
            tl.store(near_ptrs + tl.cast(near_plane, tl.int64), dy, mask=inside)
    if head == 0:
        bounds_ptr += b * tiles + tile
        tl.store(bounds_ptr, tl.min(low, axis=0))
        tl.store(bounds_ptr + plane, tl.max(high, axis=0))
        tl.store(bounds_ptr + 2 * plane, tl.max(low, axis=0))
        tl.store(bounds_ptr + 3 * plane, tl.min(high, axis=0))


@triton.jit
def _queries_step(
    dq, q, dy, lse, delta, k_ptr, v_ptr, key_mask_ptr, low, high, begin, end,
    keys, stride_k, stride_v, head_dim, scale,
    MASKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, EVEN_D: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what the keys begin..end give to dq."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        k = load_rows(k_ptr, start, keys, stride_k, head_dim, BLOCK_N, BLOCK_D, UNIT, MASKED,
                      EVEN_D)  # fmt: skip
        v = load_rows(v_ptr, start, keys, stride_v, head_dim, BLOCK_N, BLOCK_D, UNIT, MASKED,
                      EVEN_D)  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED or HAS_KEY_MASK:
            key = start + tl.arange(0, BLOCK_N)
            seen = sees(low[:, None], high[:, None], key[None, :], key_mask_ptr, keys, HAS_KEY_MASK)
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores * scale - lse[:, None])
        dweights = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def interval_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, low_ptr, high_ptr, key_mask_ptr, places_ptr, dy_ptr, lse_ptr, delta_ptr,
    dq_ptr,
    queries, rows, keys, heads, per_group, head_dim, tiles, scale, stride_low, stride_key_mask,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs,
    stride_vg, stride_db, stride_dn, stride_dh,
    HAS_KEY_MASK: tl.constexpr, PLACED: tl.constexpr, EVEN_D: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: dq (B, T, H, d) of BLOCK_M queries of a head."""
    tile, head = tile_and_head(tl.program_id(0), tiles, PLACED)
    b = tl.cast(head // heads, tl.int64)
    head %= heads
    group = (head // per_group).to(tl.int64)
    n = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows behind the last query go with it and are not stored.
    low_ptr += b * stride_low
    high_ptr += b * stride_low
    low, high = intervals(low_ptr, high_ptr, tl.minimum(n, queries - 1), queries, keys)
    begin, full, full_end, end = tiles_of_keys(low, high, BLOCK_N)
    q_ptr += b * stride_qb * UNIT + head.to(tl.int64) * stride_qh * UNIT
    dy_ptr += b * stride_db * UNIT + head.to(tl.int64) * stride_dh * UNIT
    k_ptr += b * stride_kb * UNIT + group * stride_kg * UNIT
    v_ptr += b * stride_vb * UNIT + group * stride_vg * UNIT
    key_mask_ptr += b * stride_key_mask
    q = load_rows(
        q_ptr, tile * BLOCK_M, queries, stride_qn, head_dim, BLOCK_M, BLOCK_D, UNIT, True, EVEN_D
    )
    dy = load_rows(
        dy_ptr, tile * BLOCK_M, queries, stride_dn, head_dim, BLOCK_M, BLOCK_D, UNIT, True, EVEN_D
    )
    # Queries that see nothing may have no delta, q and dy.
    some = high >= 0
    at = (b * heads + head) * queries + n
    lse = tl.load(lse_ptr + at, mask=some & (n < queries), other=0.0)
    delta = tl.load(delta_ptr + at, mask=some & (n < queries), other=0.0)
    log_scale = scale * _LOG2_E
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = _queries_step(
        dq, q, dy, lse, delta, k_ptr, v_ptr, key_mask_ptr, low, high, begin, full, keys, stride_ks,
        stride_vs, head_dim, log_scale, True, HAS_KEY_MASK, EVEN_D, UNIT, PRECISION, BLOCK_N,
        BLOCK_D, STAGES,
    )  # fmt: skip
    dq = _queries_step(
        dq, q, dy, lse, delta, k_ptr, v_ptr, key_mask_ptr, low, high, full, full_end, keys,
        stride_ks, stride_vs, head_dim, log_scale, False, HAS_KEY_MASK, EVEN_D, UNIT, PRECISION,
        BLOCK_N, BLOCK_D, STAGES,
    )  # fmt: skip
    dq = _queries_step(
        dq, q, dy, lse, delta, k_ptr, v_ptr, key_mask_ptr, low, high, full_end, end, keys,
        stride_ks, stride_vs, head_dim, log_scale, True, HAS_KEY_MASK, EVEN_D, UNIT, PRECISION,
        BLOCK_N, BLOCK_D, STAGES,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    row = places_of(places_ptr + b * queries, n, queries, PLACED)
    dq_row = ((b * rows + row) * heads + head) * head_dim
    tl.store(
        dq_ptr + dq_row[:, None] + d[None, :],
        tl.where(some[:, None], dq * scale, 0.0),
        mask=(n < queries)[:, None] & (d < head_dim)[None, :],
    )


@triton.jit
def _tiles_of_queries(bounds_ptr, tiles, plane, first, last, LOOK: tl.constexpr):
    """Tiles begin..end of queries that see keys of first..last, and a run full..full_end of tiles
    among them whose queries all see them all."""
    begin, end, full, full_end = tiles, 0, tiles, tiles
    for start in range(0, tiles, LOOK):
        tile = start + tl.arange(0, LOOK)
        inside = tile < tiles
        least_low = tl.load(bounds_ptr + tile, mask=inside, other=last + 1)
        most_high = tl.load(bounds_ptr + plane + tile, mask=inside, other=-1)
        most_low = tl.load(bounds_ptr + 2 * plane + tile, mask=inside, other=last + 1)
        least_high = tl.load(bounds_ptr + 3 * plane + tile, mask=inside, other=-1)
        some = (least_low <= last) & (most_high >= first)
        all_ = (most_low <= first) & (least_high >= last)
        begin = tl.minimum(begin, tl.min(tl.where(some, tile, tiles), axis=0))
        end = tl.maximum(end, tl.max(tl.where(some, tile + 1, 0), axis=0))
        full = tl.minimum(full, tl.min(tl.where(all_, tile, tiles), axis=0))
        after = tl.where(inside & (tile > full) & (all_ == 0), tile, tiles)
        full_end = tl.minimum(full_end, tl.min(after, axis=0))
    none = full >= tiles
    return begin, tl.where(none, end, full), tl.where(none, end, full_end), end


@triton.jit
def _keys_step(
    dk, dv, k, v, q_ptr, dy_ptr, lse_ptr, delta_ptr, low_ptr, high_ptr, key, key_seen, begin, end,
    queries, keys, stride_q, stride_d, head_dim, scale,
    MASKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, EVEN_D: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what the tiles begin..end of queries give to dk and dv."""
    for tile in tl.range(begin, end, num_stages=STAGES):
        start = tile * BLOCK_M
        n = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, start, queries, stride_q, head_dim, BLOCK_M, BLOCK_D, UNIT, MASKED,
                      EVEN_D)  # fmt: skip
        dy = load_rows(dy_ptr, start, queries, stride_d, head_dim, BLOCK_M, BLOCK_D, UNIT, MASKED,
                       EVEN_D)  # fmt: skip
        there = n
        if MASKED:
            there = tl.minimum(n, queries - 1)
        lse = tl.load(lse_ptr + there)
        delta = tl.load(delta_ptr + there)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if MASKED:
            low, high = intervals(low_ptr, high_ptr, n, queries, keys)
            seen = (key[:, None] >= low[None, :]) & (key[:, None] <= high[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        if HAS_KEY_MASK:
            scores = tl.where(key_seen[:, None], scores, float("-inf"))
        weights = tl.exp2(scores * scale - lse[None, :])
        dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def interval_attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, low_ptr, high_ptr, key_mask_ptr, dy_ptr, lse_ptr, delta_ptr, bounds_ptr,
    dk_ptr, dv_ptr,
    queries, keys, groups, per_group, head_dim, key_tiles, tiles, plane, scale, stride_low,
    stride_key_mask, stride_qb, stride_qn, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb,
    stride_vs, stride_vg, stride_db, stride_dn, stride_dh,
    HAS_KEY_MASK: tl.constexpr, EVEN_D: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOOK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv (B, S, G, d) of BLOCK_N keys, summed over the heads that read them."""
    pid = tl.program_id(0)
    first = pid % key_tiles * BLOCK_N
    group = pid // key_tiles % groups
    b = (pid // key_tiles // groups).to(tl.int64)
    last = tl.minimum(first + BLOCK_N, keys) - 1
    begin, full, full_end, end = _tiles_of_queries(
        bounds_ptr + b * tiles, tiles, plane, first, last, LOOK
    )
    key = first + tl.arange(0, BLOCK_N)
    k_ptr += b * stride_kb * UNIT + group.to(tl.int64) * stride_kg * UNIT
    v_ptr += b * stride_vb * UNIT + group.to(tl.int64) * stride_vg * UNIT
    k = load_rows(k_ptr, first, keys, stride_ks, head_dim, BLOCK_N, BLOCK_D, UNIT, True, EVEN_D)
    v = load_rows(v_ptr, first, keys, stride_vs, head_dim, BLOCK_N, BLOCK_D, UNIT, True, EVEN_D)
    key_seen = key < keys
    if HAS_KEY_MASK:
        key_seen = tl.load(key_mask_ptr + b * stride_key_mask + key, mask=key_seen, other=0) != 0
    low_ptr += b * stride_low
    high_ptr += b * stride_low
    heads = groups * per_group
    log_scale = scale * _LOG2_E
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(per_group):
        head = (group * per_group + i).to(tl.int64)
        q_head = q_ptr + b * stride_qb * UNIT + head * stride_qh * UNIT
        dy_head = dy_ptr + b * stride_db * UNIT + head * stride_dh * UNIT
        lse_head = lse_ptr + (b * heads + head) * queries
        delta_head = delta_ptr + (b * heads + head) * queries
        dk, dv = _keys_step(
            dk, dv, k, v, q_head, dy_head, lse_head, delta_head, low_ptr, high_ptr, key, key_seen,
            begin, full, queries, keys, stride_qn, stride_dn, head_dim, log_scale, True,
            HAS_KEY_MASK, EVEN_D, UNIT, PRECISION, BLOCK_M, BLOCK_D, STAGES,
        )  # fmt: skip
        dk, dv = _keys_step(
            dk, dv, k, v, q_head, dy_head, lse_head, delta_head, low_ptr, high_ptr, key, key_seen,
            full, full_end, queries, keys, stride_qn, stride_dn, head_dim, log_scale, False,
            HAS_KEY_MASK, EVEN_D, UNIT, PRECISION, BLOCK_M, BLOCK_D, STAGES,
        )  # fmt: skip
        dk, dv = _keys_step(
            dk, dv, k, v, q_head, dy_head, lse_head, delta_head, low_ptr, high_ptr, key, key_seen,
            full_end, end, queries, keys, stride_qn, stride_dn, head_dim, log_scale, True,
            HAS_KEY_MASK, EVEN_D, UNIT, PRECISION, BLOCK_M, BLOCK_D, STAGES,
        )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    row = ((b * keys + key) * groups + group) * head_dim
    inside = (key < keys)[:, None] & (d < head_dim)[None, :]
    tl.store(dk_ptr + row[:, None] + d[None, :], dk * scale, mask=inside)
    tl.store(dv_ptr + row[:, None] + d[None, :], dv, mask=inside)
