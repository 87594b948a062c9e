"""Triton kernels of Mamba-3's scan: from the gradients of chunks to those of the inputs."""

import triton
import triton.language as tl

from ssm_hf.ops.mamba3_scan.kernels_prepare import LOWEST, exponents, sizes
from ssm_hf.ops.ssd.kernels import place_of_chunk

PI = tl.constexpr(3.141592653589793)


@triton.jit
def mamba3_prepare_bwd_kernel(
    dt_ptr, A_ptr, trap_ptr, bias_ptr, mask_ptr, before_ptr, doc_ptr, cu_ptr, first_ptr, row_ptr,
    grad_ptr, ddt_ptr, dA_ptr, dtrap_ptr, dbias_ptr,
    dt_sb, dt_st, dt_sh, A_sb, A_st, A_sh, trap_sb, trap_st, trap_sh,
    mask_sb, mask_st, before_sb, before_st, doc_sb, doc_st,
    rows, length, heads, plane,
    SOFTPLUS: tl.constexpr, TURNS: tl.constexpr, VARLEN: tl.constexpr, Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of dt, A and trap (B, T, H), and each chunk's share of d dt_bias (chunks, H).

    grad (5, chunks, H, Q): of a_t; what t leaves in the state that leaves; of s_t; of gamma_t as
    what t adds to itself; of Δ through the angles, in TURNS parts. before (B, T): the real token
    before each, -1 for none (with a mask).
    """
    blocks = tl.cdiv(heads, BLOCK_H)
    v = tl.program_id(0) // blocks
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    if VARLEN:
        row = tl.minimum(tl.load(row_ptr + v), rows - 1)
        start = tl.load(cu_ptr + row).to(tl.int64)
        first = tl.load(first_ptr + row).to(tl.int64)
    else:
        start = batch * 0
        first = batch * ((length + Q - 1) // Q)
    h = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_in = h < heads
    i = tl.arange(0, Q)
    t = token + i
    t_in = t < end
    raw, delta, share = sizes(
        dt_ptr, trap_ptr, bias_ptr, batch, t, t_in, h, h_in, dt_sb, dt_st, dt_sh,
        trap_sb, trap_st, trap_sh, SOFTPLUS,
    )  # fmt: skip
    real = t_in
    previous = t - 1
    if mask_ptr is not None:
        real = real & (tl.load(mask_ptr + batch * mask_sb + t * mask_st, mask=t_in, other=0) != 0)
        previous = tl.load(before_ptr + batch * before_sb + t * before_st, mask=t_in, other=-1)
    inside = real[:, None] & h_in[None, :]
    delta = tl.where(inside, delta, 0.0)
    A, exponent = exponents(
        A_ptr, doc_ptr, delta, batch, t, t_in, h, h_in, A_sb, A_st, A_sh, doc_sb, doc_st
    )
    at = (v.to(tl.int64) * heads + h)[None, :] * Q + i[:, None]
    in_chunk = h_in[None, :] & (i < Q)[:, None]
    # The last place of a chunk counts even behind the row's end: it carries the leaving state.
    da = tl.load(grad_ptr + at, mask=in_chunk, other=0.0)
    left = tl.load(grad_ptr + plane + at, mask=inside, other=0.0)
    dgamma = tl.load(grad_ptr + 2 * plane + at, mask=inside, other=0.0)
    dgamma += tl.load(grad_ptr + 3 * plane + at, mask=inside, other=0.0)
    # The exponent of t acts on what earlier tokens leave, and on all a from t on. Where a decay is
    # 0 whatever Δ is, it has no gradient.
    dexponent = tl.cumsum(da, axis=0, reverse=True) + (tl.cumsum(left, axis=0) - left)
    dexponent = tl.where((exponent > LOWEST) & inside, dexponent, 0.0)
    ddelta = A * dexponent + share * dgamma
    for part in tl.static_range(TURNS):
        ddelta += tl.load(grad_ptr + (4 + part) * plane + at, mask=inside, other=0.0)
    in_row = t_in[:, None] & h_in[None, :]
    t = t.to(tl.int64)
    to = ((batch * length + t) * heads)[:, None] + h[None, :]
    if trap_ptr is not None:
        # b of t is part of s of the token before it in the document.
        follows = real & (previous >= start)
        if doc_ptr is not None:
            at_doc = doc_ptr + batch * doc_sb
            doc = tl.load(at_doc + t * doc_st, mask=follows, other=0)
            follows = follows & (doc == tl.load(at_doc + previous * doc_st, mask=follows, other=0))
        place = tl.where(follows, previous - start, 0)
        at_before = ((first + place // Q)[:, None] * heads + h[None, :]) * Q + (place % Q)[:, None]
        db = tl.load(grad_ptr + 2 * plane + at_before, mask=follows[:, None] & h_in[None, :],
                     other=0.0)  # fmt: skip
        ddelta += (1.0 - share) * db
        dtrap = tl.where(inside, delta * (dgamma - db) * share * (1.0 - share), 0.0)
        tl.store(dtrap_ptr + to, dtrap.to(dtrap_ptr.dtype.element_ty), mask=in_row)
    ddelta = tl.where(inside, ddelta, 0.0)
    if SOFTPLUS:
        ddelta = ddelta / (1.0 + tl.exp(-raw))
    tl.store(ddt_ptr + to, ddelta.to(ddt_ptr.dtype.element_ty), mask=in_row)
    tl.store(dA_ptr + to, (delta * dexponent).to(dA_ptr.dtype.element_ty), mask=in_row)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + v.to(tl.int64) * heads + h, tl.sum(ddelta, axis=0), mask=h_in)


@triton.jit
def slot_of_column(n, pairs, half, PAIRWISE: tl.constexpr, W: tl.constexpr):
    """Slot of a column of the caller's B or C; see `column_of_slot`."""
    if PAIRWISE:
        return tl.where(n < 2 * pairs, (n % 2) * W + n // 2, 2 * W + n - 2 * pairs)
    else:
        j = n // half
        i = n - j * half
        return tl.where(i < pairs, j * W + i, 2 * W + i - pairs + j * (half - pairs))


@triton.jit
def sum_of_parts(
    parts_ptr, to_ptr, row, n, slot, inside, part, length, groups, ranks, states,
    PARTS: tl.constexpr, RANKS: tl.constexpr, PITCH: tl.constexpr,
):  # fmt: skip
    """Rows of parts (PARTS, B, G, T, RANKS, PITCH) -> rows of (B, T, R, G, N)."""
    g = row % groups
    r = (row // groups) % ranks
    token = row // (groups * ranks)
    batch = token // length
    t = token - batch * length
    at = (((batch * groups + g) * length + t) * RANKS + r) * PITCH + slot
    total = tl.load(parts_ptr + at, mask=inside, other=0.0)
    for k in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + k * part + at, mask=inside, other=0.0)
    tl.store(to_ptr + row * states + n, total.to(to_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_of_turns(
    dturns_ptr, turns_ptr, dangle_ptr, row, s, tokens, angles, turns_part, PARTS: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Rows of dturns (PARTS, B T, W) -> gradients of the angles (B T, S)."""
    inside = (row < tokens) & (s < angles)
    total = tl.load(dturns_ptr + row * W + s, mask=inside, other=0.0)
    for k in range(1, PARTS):
        total += tl.load(dturns_ptr + k * turns_part + row * W + s, mask=inside, other=0.0)
    half = tl.load(turns_ptr + row * W + s, mask=inside, other=0.0)
    total *= PI * (1.0 - 4.0 * half * half)
    tl.store(dangle_ptr + row * angles + s, total.to(dangle_ptr.dtype.element_ty), mask=inside)


@triton.jit
def mamba3_sum_kernel(
    dB_parts_ptr, dC_parts_ptr, dturns_ptr, turns_ptr, dB_ptr, dC_ptr, dangle_ptr,
    tokens, length, groups, ranks, states, angles, pairs, half, part, turns_part,
    PAIRWISE: tl.constexpr, PARTS: tl.constexpr, TURNS_PARTS: tl.constexpr, RANKS: tl.constexpr,
    W: tl.constexpr, PITCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up parts of the gradients of B, C (B, T, R, G, N) and, ROWS tokens a program, of the
    angles (B, T, S).
    """
    all_rows = tokens * ranks * groups
    blocks = tl.cdiv(all_rows, ROWS)
    pid = tl.program_id(0)
    i = tl.arange(0, ROWS)
    if pid < blocks:
        row = (pid * ROWS + i).to(tl.int64)[:, None]
        n = tl.arange(0, COLUMNS)[None, :]
        of_states = (row < all_rows) & (n < states)
        slot = slot_of_column(n, pairs, half, PAIRWISE, W)
        sum_of_parts(dB_parts_ptr, dB_ptr, row, n, slot, of_states, part, length, groups, ranks,
                     states, PARTS, RANKS, PITCH)  # fmt: skip
        sum_of_parts(dC_parts_ptr, dC_ptr, row, n, slot, of_states, part, length, groups, ranks,
                     states, PARTS, RANKS, PITCH)  # fmt: skip
    elif dangle_ptr is not None:
        token = ((pid - blocks) * ROWS + i).to(tl.int64)[:, None]
        s = tl.arange(0, W)[None, :]
        sum_of_turns(dturns_ptr, turns_ptr, dangle_ptr, token, s, tokens, angles, turns_part,
                     TURNS_PARTS, W)  # fmt: skip
