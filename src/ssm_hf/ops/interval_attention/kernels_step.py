"""Triton kernels of attention for one token: the cache is read in shares, which are then summed."""

import triton
import triton.language as tl

from ssm_hf.ops.interval_attention.kernels import _LOG2_E, _LOWEST


@triton.jit
def interval_attention_step_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, length_ptr, first_ptr, attend_ptr, store_ptr,
    y_ptr, parts_ptr, tops_ptr, totals_ptr,
    slots, heads, groups, per_group, head_dim, window, scale,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_vb, stride_vg,
    HAS_FIRST: tl.constexpr, HAS_ATTEND: tl.constexpr, HAS_STORE: tl.constexpr,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of a group of a row, over one share of the keys that it sees.

    The first share has the new token itself, and stores it. Of several SPLITS each writes its sum
    (B, H, SPLITS, d), largest exponent and sum of exponentials (B, H, SPLITS).
    """
    pid = tl.program_id(0)
    split = pid % SPLITS
    chunks = (per_group + HEADS - 1) // HEADS
    chunk = pid // SPLITS % chunks
    group = pid // SPLITS // chunks % groups
    row = pid // SPLITS // chunks // groups
    b = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_inside = d < head_dim
    in_group = chunk * HEADS + tl.arange(0, HEADS)
    h_inside = in_group < per_group
    head = group * per_group + in_group
    inside = h_inside[:, None] & d_inside[None, :]

    number = tl.load(length_ptr + row).to(tl.int64)
    begin = tl.maximum(number - window + 1, 0)
    if HAS_FIRST:
        begin = tl.minimum(tl.maximum(begin, tl.load(first_ptr + row).to(tl.int64)), number)
    attends = True
    if HAS_ATTEND:
        attends = tl.load(attend_ptr + row) != 0
        begin = tl.where(attends, begin, number)
    share = (number - begin + SPLITS - 1) // SPLITS
    share = (share + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin += split * share
    count = tl.maximum(tl.minimum(number - begin, share), 0).to(tl.int32)
    slot = (begin % slots).to(tl.int32)

    q = tl.load(q_ptr + b * stride_qb + head[:, None] * stride_qh + d[None, :], mask=inside,
                other=0.0).to(tl.float32) * (scale * _LOG2_E)  # fmt: skip
    k = tl.load(k_ptr + b * stride_kb + group * stride_kg + d, mask=d_inside, other=0.0)
    v = tl.load(v_ptr + b * stride_vb + group * stride_vg + d, mask=d_inside, other=0.0)
    k, v = k.to(keys_ptr.dtype.element_ty), v.to(values_ptr.dtype.element_ty)
    width = groups * head_dim
    cache = b * slots * width + group * head_dim
    if (split == 0) & (chunk == 0):
        kept = head_dim
        if HAS_STORE:
            kept = tl.where(tl.load(store_ptr + row) != 0, head_dim, 0)
        stored = d < kept
        own = cache + (number % slots) * width + d
        tl.store(keys_ptr + own, k, mask=stored)
        tl.store(values_ptr + own, v, mask=stored)

    # Each place of a tile has a softmax of its own until the end: nothing in the loop is summed
    # over keys. The new token, in the first place of the first share, begins.
    offset = tl.arange(0, BLOCK_N)
    mine = ((split == 0) & (offset == 0))[None, :]
    own_score = tl.sum(q * k.to(tl.float32)[None, :], axis=1)
    top = tl.where(mine, own_score[:, None], _LOWEST)
    total = tl.where(mine, 1.0, 0.0) + tl.zeros((HEADS, BLOCK_N), tl.float32)
    acc = total[:, :, None] * v.to(tl.float32)[None, None, :]
    for start in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        at = slot + start + offset
        at = tl.where(at >= slots, at - slots, at)
        seen = start + offset < count
        place = cache + at.to(tl.int64)[:, None] * width + d[None, :]
        taken = seen[:, None] & d_inside[None, :]
        old_k = tl.load(keys_ptr + place, mask=taken, other=0.0).to(tl.float32)
        old_v = tl.load(values_ptr + place, mask=taken, other=0.0).to(tl.float32)
        scores = tl.sum(q[:, None, :] * old_k[None, :, :], axis=2)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        larger = tl.maximum(top, scores)
        weights = tl.exp2(scores - larger)
        fade = tl.exp2(top - larger)
        total = total * fade + weights
        acc = acc * fade[:, :, None] + weights[:, :, None] * old_v[None, :, :]
        top = larger
    largest = tl.max(top, axis=1)
    fade = tl.exp2(top - largest[:, None])
    total = tl.sum(total * fade, axis=1)
    acc = tl.sum(acc * fade[:, :, None], axis=1)

    out = b * heads + head
    if SPLITS == 1:
        y = acc / total[:, None]
        if HAS_ATTEND:
            y = tl.where(attends, y, 0.0)
        tl.store(y_ptr + out[:, None] * head_dim + d[None, :], y, mask=inside)
    else:
        part = out * SPLITS + split
        tl.store(parts_ptr + part[:, None] * head_dim + d[None, :], acc, mask=inside)
        tl.store(tops_ptr + part, largest, mask=h_inside)
        tl.store(totals_ptr + part, total, mask=h_inside)


@triton.jit
def interval_attention_step_sum_kernel(
    parts_ptr, tops_ptr, totals_ptr, attend_ptr, y_ptr, heads, head_dim,
    HAS_ATTEND: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: y of one head of one row, from its shares."""
    pid = tl.program_id(0)
    out = pid.to(tl.int64)
    d, split = tl.arange(0, BLOCK_D), tl.arange(0, SPLITS)
    top = tl.load(tops_ptr + out * SPLITS + split)
    weight = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(weight * tl.load(totals_ptr + out * SPLITS + split), axis=0)
    place = (out * SPLITS + split)[:, None] * head_dim + d[None, :]
    parts = tl.load(parts_ptr + place, mask=(d < head_dim)[None, :], other=0.0)
    y = tl.sum(parts * weight[:, None], axis=0) / total
    if HAS_ATTEND:
        y = tl.where(tl.load(attend_ptr + pid // heads) != 0, y, 0.0)
    tl.store(y_ptr + out * head_dim + d, y, mask=d < head_dim)
