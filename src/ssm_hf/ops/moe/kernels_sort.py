"""Triton kernels that sort the slots of a mixture of experts by expert: counting, no comparisons.

A slot is one of the k choices of one token, number token * k + choice. Experts of number EXPERTS or
more are none: their slots are left out.
"""

import triton
import triton.language as tl


@triton.jit
def moe_count_kernel(
    experts_ptr, counts_ptr, slots,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How often each expert occurs in a block of slots: counts (blocks, BLOCK_E)."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_E)
    expert = tl.load(experts_ptr + slot, mask=slot < slots, other=EXPERTS)
    hits = (expert[:, None] == column[None, :]).to(tl.int32)
    tl.store(counts_ptr + block * BLOCK_E + column, tl.sum(hits, axis=0))


@triton.jit
def moe_scan_kernel(
    counts_ptr, totals_ptr, blocks,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of COLUMNS experts: counts become the counts of all blocks before; totals (E,)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None] * BLOCK_E + column[None, :]
        inside = (row < blocks)[:, None] & (column < EXPERTS)[None, :]
        counts = tl.load(counts_ptr + at, mask=inside, other=0)
        upto = tl.cumsum(counts, axis=0)
        tl.store(counts_ptr + at, before[None, :] + upto - counts, mask=inside)
        before += tl.sum(counts, axis=0)
    tl.store(totals_ptr + column, before, mask=column < EXPERTS)


@triton.jit
def moe_place_kernel(
    experts_ptr, counts_ptr, totals_ptr, order_ptr, slots,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Every slot of a block to its place in order (S,): by expert, then by number.

    ALONE: there is one block; it finds the totals itself.
    """
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_E)
    expert = tl.load(experts_ptr + slot, mask=slot < slots, other=EXPERTS)
    hit = (expert[:, None] == column[None, :]) & (column < EXPERTS)[None, :]
    hits = hit.to(tl.int32)
    if ALONE:
        totals = tl.sum(hits, axis=0)
        tl.store(totals_ptr + column, totals, mask=column < EXPERTS)
        first = tl.cumsum(totals, axis=0) - totals
    else:
        totals = tl.load(totals_ptr + column, mask=column < EXPERTS, other=0)
        first = tl.cumsum(totals, axis=0) - totals
        first += tl.load(counts_ptr + block * BLOCK_E + column, mask=column < EXPERTS, other=0)
    place = first[None, :] + tl.cumsum(hits, axis=0) - 1
    place = tl.sum(tl.where(hit, place, 0), axis=1)
    tl.store(order_ptr + place, slot, mask=expert < EXPERTS)
