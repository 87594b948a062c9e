"""Triton kernel of attention on intervals, forward (after Dao 2023, FlashAttention-2)."""

import triton
import triton.language as tl

# In place of minus infinity where a difference with itself must stay a number.
_LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def intervals(low_ptr, high_ptr, n, queries, keys):
    """Intervals of the queries n, clipped to the keys; (keys, -1) of those that see none."""
    inside = n < queries
    low = tl.load(low_ptr + n, mask=inside, other=0)
    high = tl.load(high_ptr + n, mask=inside, other=-1)
    low = tl.maximum(tl.minimum(low, keys), 0).to(tl.int32)
    high = tl.maximum(tl.minimum(high, keys - 1), -1).to(tl.int32)
    some = low <= high
    return tl.where(some, low, keys), tl.where(some, high, -1)


@triton.jit
def tiles_of_keys(low, high, BLOCK_N: tl.constexpr):
    """Keys begin..end that a tile of queries sees, and those full..full_end among them that lie in
    blocks which all of its queries see in full."""
    begin = tl.min(low, axis=0) // BLOCK_N * BLOCK_N
    end = (tl.max(high, axis=0) // BLOCK_N + 1) * BLOCK_N
    full = (tl.max(low, axis=0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_end = (tl.min(high, axis=0) + 1) // BLOCK_N * BLOCK_N
    # Of a tile that sees nothing, high is -1 and C's division rounds to 0.
    end = tl.where(tl.max(high, axis=0) < 0, begin, end)
    none = full_end <= full
    return begin, tl.where(none, end, full), tl.where(none, end, full_end), end


@triton.jit
def load_rows(
    ptr, row, rows, stride, head_dim,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    RAGGED: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Rows row..row+BLOCK of a matrix, (BLOCK, BLOCK_D); strides count UNITs.

    Where they may pass the last one (RAGGED) that one comes again: it costs less than a mask.
    """
    r, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    if RAGGED:
        r = tl.minimum(r, rows - 1 - row)
    ptrs = ptr + tl.cast(row, tl.int64) * stride * UNIT + (r[:, None] * stride * UNIT + d[None, :])
    if EVEN_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(d < head_dim)[None, :], other=0.0)


@triton.jit
def places_of(places_ptr, n, queries, PLACED: tl.constexpr):
    """The rows (BLOCK,) int64 of q and y that the queries n stand for; n behind the last go with
    it."""
    n = tl.minimum(n, queries - 1).to(tl.int64)
    if PLACED:
        return tl.load(places_ptr + n).to(tl.int64)
    else:
        return n


@triton.jit
def tile_and_head(pid, tiles, PLACED: tl.constexpr):
    """The tile of queries, and the head counted over the batch, of a program."""
    if PLACED:
        # All heads go along the keys together, and tiles that see nothing, which are the last,
        # begin last.
        rows = tl.num_programs(0) // tiles
        return pid // rows, pid % rows
    else:
        # Later tiles of a causal row see more keys: they begin first.
        return tiles - 1 - pid % tiles, pid // tiles


@triton.jit
def sees(low, high, key, key_mask_ptr, keys, HAS_KEY_MASK: tl.constexpr):
    """Whether queries see keys; of low, high and key one pair is a column, the other a row."""
    seen = (key >= low) & (key <= high)
    if HAS_KEY_MASK:
        seen &= tl.load(key_mask_ptr + key, mask=key < keys, other=0) != 0
    return seen


@triton.jit
def _attend(
    acc, top, total, q, k_ptr, v_ptr, key_mask_ptr, low, high, begin, end,
    keys, stride_k, stride_v, head_dim, scale,
    MASKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, EVEN_D: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the keys begin..end to acc, the sum of exponentials and their largest exponent."""
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        k = load_rows(k_ptr, start, keys, stride_k, head_dim, BLOCK_N, BLOCK_D, UNIT, MASKED,
                      EVEN_D)  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED or HAS_KEY_MASK:
            key = start + tl.arange(0, BLOCK_N)
            seen = sees(low[:, None], high[:, None], key[None, :], key_mask_ptr, keys, HAS_KEY_MASK)
            scores = tl.where(seen, scores, float("-inf"))
        # The scale is positive. It joins the exponents in one multiplication and addition.
        larger = tl.maximum(top, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - larger[:, None])
        fade = tl.exp2(top - larger)
        total = total * fade + tl.sum(weights, axis=1)
        v = load_rows(v_ptr, start, keys, stride_v, head_dim, BLOCK_N, BLOCK_D, UNIT, MASKED,
                      EVEN_D)  # fmt: skip
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = larger
    return acc, top, total


@triton.jit
def interval_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, low_ptr, high_ptr, key_mask_ptr, places_ptr, y_ptr, lse_ptr,
    queries, rows, keys, heads, per_group, head_dim, tiles, scale, stride_low, stride_key_mask,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs,
    stride_vg,
    HAS_KEY_MASK: tl.constexpr, PLACED: tl.constexpr, EVEN_D: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: y (B, T, H, d) of BLOCK_M queries of a head, and lse (B, H, N) in base 2."""
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
    k_ptr += b * stride_kb * UNIT + group * stride_kg * UNIT
    v_ptr += b * stride_vb * UNIT + group * stride_vg * UNIT
    key_mask_ptr += b * stride_key_mask
    row = places_of(places_ptr + b * queries, n, queries, PLACED)
    d = tl.arange(0, BLOCK_D)
    # Queries that see nothing need not be read.
    q = tl.load(
        q_ptr + row[:, None] * stride_qn * UNIT + d[None, :],
        mask=(high >= 0)[:, None] & (d < head_dim)[None, :],
        other=0.0,
    )
    scale = scale * _LOG2_E
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = total + _LOWEST
    acc, top, total = _attend(
        acc, top, total, q, k_ptr, v_ptr, key_mask_ptr, low, high, begin, full, keys, stride_ks,
        stride_vs, head_dim, scale, True, HAS_KEY_MASK, EVEN_D, UNIT, PRECISION, BLOCK_N, BLOCK_D,
        STAGES,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, k_ptr, v_ptr, key_mask_ptr, low, high, full, full_end, keys, stride_ks,
        stride_vs, head_dim, scale, False, HAS_KEY_MASK, EVEN_D, UNIT, PRECISION, BLOCK_N, BLOCK_D,
        STAGES,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, k_ptr, v_ptr, key_mask_ptr, low, high, full_end, end, keys, stride_ks,
        stride_vs, head_dim, scale, True, HAS_KEY_MASK, EVEN_D, UNIT, PRECISION, BLOCK_N, BLOCK_D,
        STAGES,
    )  # fmt: skip
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, top + tl.log2(total), 0.0)
    tl.store(lse_ptr + (b * heads + head) * queries + n, lse, mask=n < queries)
    y_row = ((b * rows + row) * heads + head) * head_dim
    tl.store(
        y_ptr + y_row[:, None] + d[None, :],
        acc / total[:, None],
        mask=(n < queries)[:, None] & (d < head_dim)[None, :],
    )
