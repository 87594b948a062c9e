"""Triton kernel of Mamba-2's scan: gradients that several programs found in parts, added up."""

import triton
import triton.language as tl


@triton.jit
def _sum_of_tokens(
    part_ptr, to_ptr, to_sb, to_st, row, column, inside, length, part, width, PARTS: tl.constexpr
):
    """Rows of (PARTS, B T, width) -> rows of (B, T, width) with strides."""
    at = row * width + column
    total = tl.load(part_ptr + at, mask=inside, other=0.0)
    for i in tl.static_range(1, PARTS):
        total += tl.load(part_ptr + i * part + at, mask=inside, other=0.0)
    batch = row // length
    to = to_ptr + batch * to_sb + (row - batch * length) * to_st + column
    tl.store(to, total.to(to_ptr.dtype.element_ty), mask=inside)


@triton.jit
def ssd_sum_kernel(
    dB_parts_ptr, dC_parts_ptr, sums_ptr, dD_parts_ptr, dB_ptr, dC_ptr, dA_ptr, dbias_ptr, dD_ptr,
    dB_sb, dB_st, dC_sb, dC_st, tokens, length, part, chunks, heads,
    WIDTH: tl.constexpr, B_PARTS: tl.constexpr, C_PARTS: tl.constexpr, LAST: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The first programs add up ROWS tokens of dB and dC, one more a head what chunks found.

    dB_parts (B_PARTS, B, T, G N = WIDTH), dC_parts (C_PARTS, ...); sums (2, chunks, H) of dA and
    d dt_bias; dD_parts (chunks, H, LAST), with LAST = P for D per channel.
    """
    column_blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    blocks = tl.cdiv(tokens, ROWS) * column_blocks
    pid = tl.program_id(0)
    if pid < blocks:
        row = ((pid // column_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        column = ((pid % column_blocks) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        inside = (row < tokens) & (column < WIDTH)
        _sum_of_tokens(dB_parts_ptr, dB_ptr, dB_sb, dB_st, row, column, inside, length, part, WIDTH,
                       B_PARTS)  # fmt: skip
        _sum_of_tokens(dC_parts_ptr, dC_ptr, dC_sb, dC_st, row, column, inside, length, part, WIDTH,
                       C_PARTS)  # fmt: skip
    else:
        head = pid - blocks
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
