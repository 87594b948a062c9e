"""Triton kernel of Mamba-2's scan: gradients that several programs found in parts, added up."""

import triton
import triton.language as tl


@triton.jit
def _sum_of_tokens(
    part_ptr, scale_ptr, to_ptr, to_sb, to_st, row, row_in, group, column, length, part, groups,
    STATES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Rows of one group of (PARTS, B T, G, STATES), times their scales, -> (B, T, G, STATES)."""
    inside = row_in[:, None] & (column < STATES)[None, :]
    at_scale = row * groups + group
    at = at_scale[:, None] * STATES + column[None, :]
    total = tl.zeros(inside.shape, tl.float32)
    for i in tl.static_range(PARTS):
        share = tl.load(part_ptr + i * part + at, mask=inside, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            scales = scale_ptr + i * (part // STATES) + at_scale
            share *= tl.load(scales, mask=row_in, other=0.0)[:, None]
        total += share
    batch = row // length
    to = to_ptr + batch * to_sb + (row - batch * length) * to_st + group * STATES
    to = to[:, None] + column[None, :]
    tl.store(to, total.to(to_ptr.dtype.element_ty), mask=inside)


@triton.jit
def ssd_sum_kernel(
    dB_parts_ptr, dC_parts_ptr, dB_scale_ptr, dC_scale_ptr, sums_ptr, dD_parts_ptr,
    dB_ptr, dC_ptr, dA_ptr, dbias_ptr, dD_ptr,
    dB_sb, dB_st, dC_sb, dC_st, tokens, length, part, chunks, heads, groups,
    STATES: tl.constexpr, B_PARTS: tl.constexpr, C_PARTS: tl.constexpr, LAST: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A program a head, first since they take longest, adds up what chunks found; all others
    ROWS tokens and COLUMNS states of dB and dC.

    dB_parts (B_PARTS, B, T, G, N), dC_parts (C_PARTS, ...) and their scales (B_PARTS, B, T, G), if
    any: what `store_part` wrote, `part` elements each. sums (2, chunks, H) of dA and d dt_bias;
    dD_parts (chunks, H, LAST), with LAST = P for D per channel.
    """
    head = tl.program_id(0)
    if head >= heads:
        blocks: tl.constexpr = (STATES + COLUMNS - 1) // COLUMNS
        pid = head - heads
        column = (pid % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        pid = pid // blocks
        group = pid % groups
        row = (pid // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row_in = row < tokens
        _sum_of_tokens(dB_parts_ptr, dB_scale_ptr, dB_ptr, dB_sb, dB_st, row, row_in, group, column,
                       length, part, groups, STATES, B_PARTS)  # fmt: skip
        _sum_of_tokens(dC_parts_ptr, dC_scale_ptr, dC_ptr, dC_sb, dC_st, row, row_in, group, column,
                       length, part, groups, STATES, C_PARTS)  # fmt: skip
    else:
        c = tl.arange(0, CHUNKS)
        last = tl.arange(0, BLOCK_L)
        dA = tl.zeros((CHUNKS,), tl.float32)
        dbias = tl.zeros((CHUNKS,), tl.float32)
        dD = tl.zeros((CHUNKS, BLOCK_L), tl.float32)
        for start in range(0, chunks, CHUNKS):
            chunk = (start + c).to(tl.int64)
            at = chunk * heads + head
            dA += tl.load(sums_ptr + at, mask=chunk < chunks, other=0.0)
            # `chunk` is a tensor; `chunks` is a plain number where it is 1.
            at_bias = (chunk + chunks) * heads + head
            dbias += tl.load(sums_ptr + at_bias, mask=chunk < chunks, other=0.0)
            if dD_ptr is not None:
                inside = (chunk < chunks)[:, None] & (last < LAST)[None, :]
                at_D = dD_parts_ptr + at[:, None] * LAST + last[None, :]
                dD += tl.load(at_D, mask=inside, other=0.0)
        tl.store(dA_ptr + head, tl.sum(dA, axis=0))
        if dbias_ptr is not None:
            tl.store(dbias_ptr + head, tl.sum(dbias, axis=0))
        if dD_ptr is not None:
            of_channels = tl.sum(dD, axis=0)
            if D_PER_CHANNEL:
                tl.store(dD_ptr + head * LAST + last, of_channels, mask=last < LAST)
            else:
                tl.store(dD_ptr + head, tl.sum(of_channels, axis=0))
