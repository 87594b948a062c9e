"""Triton kernel of Mamba-3's scan: sums over heads of the gradients of chunks and heads."""

import triton
import triton.language as tl

from ssm_hf.ops.ssd.kernels import load_tile, place_of_chunk, store_tile

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def mamba3_heads_kernel(
    dk_ptr, dq_ptr, dB_ptr, dB_bias_ptr, dC_ptr, dC_bias_ptr, cu_ptr, first_ptr, row_ptr,
    rows, length, heads: tl.constexpr, groups, ranks, part,
    VARLEN: tl.constexpr, Q: tl.constexpr, RANKS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, PITCH: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over heads of dk or dq (chunks, H, Q, RANKS * PITCH): gradients of B and C.

    A program sums TOKENS tokens and COLUMNS columns over HEADS heads of a group, in a fixed order.
    Sums are written in parts, (HEAD_BLOCKS, B, G, T, RANKS, PITCH), that are added up later.
    dB_bias, dC_bias (chunks, Q / TOKENS, H, R, PITCH): of each head, the sum over those tokens.
    """
    WIDTH: tl.constexpr = RANKS * PITCH
    pid = tl.program_id(0)
    side = pid % 2
    pid //= 2
    first = (pid % (WIDTH // COLUMNS)) * COLUMNS
    pid //= WIDTH // COLUMNS
    place = pid % (Q // TOKENS)
    pid //= Q // TOKENS
    block = pid % HEAD_BLOCKS
    group = (pid // HEAD_BLOCKS) % groups
    v = pid // (HEAD_BLOCKS * groups)
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    v = v.to(tl.int64)
    j = place * TOKENS + tl.arange(0, TOKENS)
    n = first + tl.arange(0, COLUMNS)
    tile = j[:, None] * WIDTH + n[None, :]
    head_0 = group * (HEADS * HEAD_BLOCKS) + block * HEADS
    d_ptr, to, bias_ptr = dk_ptr, dB_ptr, dB_bias_ptr
    if side == 1:
        d_ptr, to, bias_ptr = dq_ptr, dC_ptr, dC_bias_ptr
    to += block * part + ((batch * groups + group) * length + token) * WIDTH
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for step in range(0, HEADS):
        head = head_0 + step
        d = tl.load(d_ptr + (v * heads + head) * (Q * WIDTH) + tile).to(tl.float32)
        total += d
        of_bias = ((v * (Q // TOKENS) + place) * heads + head) * (ranks * PITCH) + n
        tl.store(bias_ptr + of_bias, tl.sum(d, axis=0), mask=n < ranks * PITCH)
    tl.store(to + tile, total, mask=(token + j < end)[:, None])


@triton.jit
def mamba3_turns_kernel(
    dangle_ptr, later_ptr, token_ptr, turns_ptr, extra_ptr, last_ptr, ddelta_ptr, dturns_ptr,
    dphase_ptr, cu_ptr, first_ptr, row_ptr, rows, length, heads: tl.constexpr, groups, part,
    RAGGED: tl.constexpr, VARLEN: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of what tokens add to angles (in radians), passed on to Δ, ddelta (chunks, H, Q),
    summed over HEADS heads to turns, dturns (G * HEAD_BLOCKS, B, T, W), and to the angles rows
    start from, dphase (rows, H, W). extra (rows, H, W) is added from the token last (rows,) on.
    """
    block = tl.program_id(0) % HEAD_BLOCKS
    group = (tl.program_id(0) // HEAD_BLOCKS) % groups
    v = tl.program_id(0) // (HEAD_BLOCKS * groups)
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    row = batch
    is_first = token == 0
    if VARLEN:
        row = tl.minimum(tl.load(row_ptr + v), rows - 1).to(tl.int64)
        is_first = token == tl.load(cu_ptr + row)
    v = v.to(tl.int64)
    head_0 = group * (HEADS * HEAD_BLOCKS) + block * HEADS
    turns_base = turns_ptr + (batch * length + token) * W
    dturns_base = dturns_ptr + (group * HEAD_BLOCKS + block) * part + (batch * length + token) * W
    j = tl.arange(0, Q)
    n = tl.arange(0, W)
    in_row = token + j < end
    turns = load_tile(turns_base, W, j, n, in_row, RAGGED, False, W)
    dturns = tl.zeros((Q, W), dtype=tl.float32)
    for step in tl.range(0, HEADS, num_stages=STAGES):
        head = head_0 + step
        here = v * heads + head
        dangle = load_tile(dangle_ptr + here * (Q * W), W, j, n, in_row, False, False, W)
        later = tl.load(later_ptr + here * W + n)
        # A sum over the tokens from one on, as what those before it leave of the whole: scans from
        # the end take Triton twice as long.
        whole = tl.sum(dangle, axis=0) + later
        dphi = (whole[None, :] + dangle) - tl.cumsum(dangle, axis=0)
        if extra_ptr is not None:
            extra = tl.load(extra_ptr + (row * heads + head) * W + n)[None, :]
            if last_ptr is not None:
                extra = tl.where((token + j >= tl.load(last_ptr + row))[:, None], extra, 0.0)
            dphi += extra
        delta = tl.load(token_ptr + here * (4 * Q) + 4 * j + 3)
        dturns += delta[:, None] * dphi
        tl.store(ddelta_ptr + here * Q + j, tl.sum(turns * dphi, axis=1) * TWO_PI)
        if is_first:
            start = tl.sum(tl.where((j == 0)[:, None], dphi, 0.0), axis=0)
            tl.store(dphase_ptr + (row * heads + head) * W + n, start)
    store_tile(dturns_base, W, j, n, in_row, dturns, RAGGED, False, W)
