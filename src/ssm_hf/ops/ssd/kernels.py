"""Triton kernels of Mamba-2's scan: decays, states of chunks, forward pass.

A sequence is cut into chunks of Q tokens. Chunks of all rows are numbered through by v; the
decays and states of a chunk lie at v. Rows are batch rows, or with `cu_seqlens` (VARLEN) documents:
row r then has tokens cu[r]..cu[r + 1] of one long row, and chunks first[r]..first[r + 1].

Mamba-3's kernels use the helpers that say where chunks and rows lie and that load and store tiles.
What they rely on: tokens are int64, chunks beyond the last are empty (token >= end), masked places
read 0, and a chunk's offsets within a row fit 32 bits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# 2^-256 is 0 in fp32: a stronger decay, or the start of a document, is an exponent of -256.
LOWEST = tl.constexpr(-256.0)
# Running sums of exponents are kept as multiples of 1/512, which add and subtract exactly in fp32
# (128 tokens of at most 256), and a remainder below 1/8. A plain fp32 sum would lose the small
# exponents that follow a large one.
GRID = tl.constexpr(512.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to fp32 accuracy, also where it is small."""
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    # log(1 + u) = 2 artanh(s), s <= 1/3; the first term left out is 1e-9 of the sum.
    p = 1.0 / 13.0 + q * (1.0 / 15.0)
    p = 1.0 / 9.0 + q * (1.0 / 11.0 + q * p)
    p = 1.0 / 5.0 + q * (1.0 / 7.0 + q * p)
    p = 1.0 + q * (1.0 / 3.0 + q * p)
    return tl.maximum(x, 0.0) + 2.0 * s * p


@triton.jit
def place_of_chunk(
    v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN: tl.constexpr, Q: tl.constexpr
):
    """Chunk v -> batch row, first token, end of the row. Chunks beyond the last are empty."""
    if VARLEN:
        row = tl.minimum(tl.load(row_ptr + v), rows - 1).to(tl.int64)
        start = tl.load(cu_ptr + row).to(tl.int64)
        end = tl.load(cu_ptr + row + 1).to(tl.int64)
        token = start + (v - tl.load(first_ptr + row)) * Q
        batch = row * 0
    else:
        chunks = (length + Q - 1) // Q
        row = (v // chunks).to(tl.int64)
        batch = row
        token = (v % chunks).to(tl.int64) * Q
        end = row * 0 + length
    return batch, token, end


@triton.jit
def place_of_row(row, length, cu_ptr, first_ptr, VARLEN: tl.constexpr, Q: tl.constexpr):
    """Row -> batch row, first token, end, first chunk, number of chunks."""
    if VARLEN:
        start = tl.load(cu_ptr + row).to(tl.int64)
        end = tl.load(cu_ptr + row + 1).to(tl.int64)
        first = tl.load(first_ptr + row).to(tl.int64)
        batch = row * 0
    else:
        start = row * 0
        end = row * 0 + length
        first = row * ((length + Q - 1) // Q)
        batch = row
    chunks = ((end - start + Q - 1) // Q).to(tl.int32)
    return batch, start, end, first, chunks


@triton.jit
def step_sizes(
    dt_ptr, A_ptr, bias_ptr, mask_ptr, doc_ptr, batch, t, t_in, h, h_in,
    dt_sb, dt_st, dt_sh, mask_sb, mask_st, doc_sb, doc_st, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Of tokens t and heads h: dt + bias, Δ, exponent in powers of 2, and which are real."""
    inside = t_in[:, None] & h_in[None, :]
    at = batch * dt_sb + t[:, None] * dt_st + h[None, :] * dt_sh
    raw = tl.load(dt_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + h, mask=h_in, other=0.0).to(tl.float32)[None, :]
    delta = raw
    if SOFTPLUS:
        delta = softplus(delta)
    if LIMIT:
        delta = tl.minimum(tl.maximum(delta, dt_min), dt_max)
    real = inside
    if mask_ptr is not None:
        is_real = tl.load(mask_ptr + batch * mask_sb + t * mask_st, mask=t_in, other=0) != 0
        real = real & is_real[:, None]
    delta = tl.where(real, delta, 0.0)
    A = tl.load(A_ptr + h, mask=h_in, other=0.0).to(tl.float32)
    exponent = tl.maximum(delta * (A * LOG2E)[None, :], LOWEST)
    if doc_ptr is not None:
        behind = t_in & (t > 0)
        at = batch * doc_sb + t * doc_st
        doc = tl.load(doc_ptr + at, mask=behind, other=0)
        before = tl.load(doc_ptr + at - doc_st, mask=behind, other=0)
        exponent = tl.where((doc != before)[:, None], LOWEST, exponent)
    return raw, delta, exponent, real


@triton.jit
def ssd_decay_kernel(
    dt_ptr, A_ptr, bias_ptr, mask_ptr, doc_ptr, cu_ptr, first_ptr, row_ptr, decay_ptr,
    dt_sb, dt_st, dt_sh, mask_sb, mask_st, doc_sb, doc_st,
    rows, length, heads, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr,
    Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Running sums a of exponents inside chunks, and Δ: decay (chunks, H, Q, 4).

    Of each token a in two parts and Δ (WIDE), or a, a - log2(Δ) and Δ. One program for a chunk and
    a block of heads. Padding, packing and ragged ends end here: pads have Δ = 0, the first token of
    a document decays all before it to 0.
    """
    blocks = tl.cdiv(heads, BLOCK_H)
    v = tl.program_id(0) // blocks
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    h = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, Q)
    t = token + i
    _raw, delta, exponent, _real = step_sizes(
        dt_ptr, A_ptr, bias_ptr, mask_ptr, doc_ptr, batch, t, t < end, h, h < heads,
        dt_sb, dt_st, dt_sh, mask_sb, mask_st, doc_sb, doc_st, dt_min, dt_max, SOFTPLUS, LIMIT,
    )  # fmt: skip
    coarse = tl.floor(exponent * GRID + 0.5) * (1.0 / GRID)
    first, second = tl.cumsum(coarse, axis=0), tl.cumsum(exponent - coarse, axis=0)
    if not WIDE:
        first += second
        second = first - tl.log2(delta)
    # Joined, a token's numbers leave a thread in one store; the fourth is never read.
    four = tl.join(tl.join(first, delta), tl.join(second, delta))
    four = tl.reshape(four, (Q, BLOCK_H, 4))
    at = ((v.to(tl.int64) * heads + h)[None, :] * Q + i[:, None]) * 4
    inside = (h < heads)[None, :] & (i < Q)[:, None]
    at = at[:, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(decay_ptr + at, four, mask=inside[:, :, None])


@triton.jit
def ssd_decay_bwd_kernel(
    dt_ptr, A_ptr, bias_ptr, mask_ptr, doc_ptr, cu_ptr, first_ptr, row_ptr,
    grad_ptr, ddt_ptr, sums_ptr,
    dt_sb, dt_st, dt_sh, mask_sb, mask_st, doc_sb, doc_st, ddt_sb, ddt_st, ddt_sh,
    rows, length, heads, plane, sums_plane, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, VARLEN: tl.constexpr, Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of the step sizes from those of a chunk's tokens: ddt (B, T, H) and each chunk's
    share of dA and d dt_bias, sums (2, chunks, H).

    grad (4, chunks, H, Q): of a_t through pairs of tokens; through the state that enters; what t
    leaves, x_t . (dS B_t) decayed to the chunk's end, without Δ; the gradient of Δ as x's factor,
    but for what t leaves.
    """
    blocks = tl.cdiv(heads, BLOCK_H)
    v = tl.program_id(0) // blocks
    batch, token, end = place_of_chunk(v, rows, length, cu_ptr, first_ptr, row_ptr, VARLEN, Q)
    h = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_in = h < heads
    i = tl.arange(0, Q)
    t = token + i
    raw, delta, exponent, real = step_sizes(
        dt_ptr, A_ptr, bias_ptr, mask_ptr, doc_ptr, batch, t, t < end, h, h_in,
        dt_sb, dt_st, dt_sh, mask_sb, mask_st, doc_sb, doc_st, dt_min, dt_max, SOFTPLUS, LIMIT,
    )  # fmt: skip
    at = (v.to(tl.int64) * heads + h)[None, :] * Q + i[:, None]
    # The last place of a chunk counts even behind the row's end: it carries the leaving state.
    da = tl.load(grad_ptr + at, mask=h_in[None, :] & (i < Q)[:, None], other=0.0)
    da += tl.load(grad_ptr + plane + at, mask=h_in[None, :] & (i < Q)[:, None], other=0.0)
    left = tl.load(grad_ptr + 2 * plane + at, mask=real, other=0.0)
    dscale = left + tl.load(grad_ptr + 3 * plane + at, mask=real, other=0.0)
    left *= delta
    # The exponent of t acts on what earlier tokens leave, and on all a from t on. Where a decay is
    # 0 whatever Δ is, it has no gradient.
    dexponent = tl.cumsum(da, axis=0, reverse=True) + (tl.cumsum(left, axis=0) - left)
    dexponent = tl.where(exponent > LOWEST, dexponent, 0.0)
    A = tl.load(A_ptr + h, mask=h_in, other=0.0).to(tl.float32)
    ddelta = tl.where(real, dscale + A[None, :] * dexponent, 0.0)
    if LIMIT:
        free = raw
        if SOFTPLUS:
            free = softplus(raw)
        ddelta = tl.where((free >= dt_min) & (free <= dt_max), ddelta, 0.0)
    if SOFTPLUS:
        ddelta = ddelta / (1.0 + tl.exp(-raw))
    at_dt = batch * ddt_sb + t.to(tl.int64)[:, None] * ddt_st + h[None, :] * ddt_sh
    inside = (t < end)[:, None] & h_in[None, :]
    tl.store(ddt_ptr + at_dt, ddelta.to(ddt_ptr.dtype.element_ty), mask=inside)
    at_sums = v.to(tl.int64) * heads + h
    tl.store(sums_ptr + at_sums, tl.sum(delta * dexponent, axis=0), mask=h_in)
    tl.store(sums_ptr + sums_plane + at_sums, tl.sum(ddelta, axis=0), mask=h_in)


@triton.jit
def load_tile(
    base, stride, i, n, in_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
):
    """Tokens i and columns n of a (Q, WIDTH) tile at `base`, 0 outside. ROWS and COLUMNS say
    whether any can be outside: without masks there is less to compute and to keep.
    """
    at = base + i[:, None] * stride + n[None, :]
    if ROWS and COLUMNS:
        return tl.load(at, mask=in_row[:, None] & (n < WIDTH)[None, :], other=0.0)
    elif ROWS:
        return tl.load(at, mask=in_row[:, None], other=0.0)
    elif COLUMNS:
        return tl.load(at, mask=(n < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_tile(
    base, stride, i, n, in_row, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Store what `load_tile` would load."""
    at = base + i[:, None] * stride + n[None, :]
    value = value.to(base.dtype.element_ty)
    if ROWS and COLUMNS:
        tl.store(at, value, mask=in_row[:, None] & (n < WIDTH)[None, :])
    elif ROWS:
        tl.store(at, value, mask=in_row[:, None])
    elif COLUMNS:
        tl.store(at, value, mask=(n < WIDTH)[None, :])
    else:
        tl.store(at, value)


@triton.jit
def save_buffer(ptr, stride, i, n, tile, length):
    """Seem to store a loaded tile (no length lets it happen): a use of it besides products.

    On Hopper, Triton gives a tile that only products use a buffer of shared memory more than
    others, since a product may still run when the next load begins. Products whose result is used
    in the same step do not. Without that buffer, three stages of two programs fit a multiprocessor.
    """
    never = tl.where(length < 0, 1, 0)
    tl.store(ptr + i[:, None] * stride + n[None, :], tile, mask=(i < never)[:, None])


@triton.jit
def load_decay(at, Q: tl.constexpr):
    """The three numbers of each token of a chunk and head; see `ssd_decay_kernel`.

    One load, of more elements than there are threads: Triton repeats smaller ones for every layout.
    """
    ac, bd = tl.split(tl.reshape(tl.load(at + tl.arange(0, 4 * Q)), (Q, 2, 2)))
    a, c = tl.split(ac)
    b, _ = tl.split(bd)
    return a, b, c


@triton.jit
def gated(dy, z):
    """Gradient before the gate: dy silu(z)."""
    return dy * (z / (1.0 + tl.exp(-z)))


@triton.jit
def entry_state(
    S, entry_ptr, totals_ptr, carry_ptr, at_state, in_state, at_total, total_step, at_carry,
    carry_step, k,
):  # fmt: skip
    """State with which segment k is entered: what comes in, taken through the segments before."""
    if entry_ptr is not None:
        S = tl.load(entry_ptr + at_state, mask=in_state, other=0.0).to(tl.float32)
    if totals_ptr is not None:
        for j in range(0, k):
            total = tl.load(totals_ptr + at_total + j * total_step, mask=in_state, other=0.0)
            S = S * tl.load(carry_ptr + at_carry + j * carry_step) + total
    return S


@triton.jit
def walk_states(
    u_ptr, k_ptr, z_ptr, mask_ptr, decay_ptr, states_ptr, entry_ptr, exit_ptr,
    totals_ptr, carry_ptr, cu_ptr, first_ptr,
    row, segment, head, n_block, p_block,
    u_sb, u_st, u_sh, k_sb, k_st, k_sg, z_sb, z_st, z_sh, mask_sb, mask_st,
    rows, length, heads, per_group,
    STATES: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
    REVERSE: tl.constexpr, TOTALS: tl.constexpr, SEGMENTS: tl.constexpr, VARLEN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of one segment; see `ssd_states_kernel`."""
    dot_type: tl.constexpr = tl.float32 if WIDE else u_ptr.dtype.element_ty
    batch, start, end, first, chunks = place_of_row(row, length, cu_ptr, first_ptr, VARLEN, Q)
    # Segments are numbered in the order in which they are walked.
    index = segment
    if REVERSE:
        index = SEGMENTS - 1 - segment
    per_segment = tl.cdiv(chunks, SEGMENTS)
    low = tl.minimum(index * per_segment, chunks)
    high = tl.minimum(low + per_segment, chunks)

    i = tl.arange(0, Q)
    p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    CUT_N: tl.constexpr = STATES % BLOCK_N != 0
    size = HEAD_DIM * STATES
    tile = p[:, None] * STATES + n[None, :]
    in_tile = (p < HEAD_DIM)[:, None] & (n < STATES)[None, :]

    S = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    carry = 1.0
    at_carry = (row * SEGMENTS) * heads + head
    if not TOTALS:
        S = entry_state(
            S, entry_ptr, totals_ptr, carry_ptr, (row * heads + head) * size + tile, in_tile,
            at_carry * size + tile, heads * size, at_carry, heads, segment,
        )  # fmt: skip
    u_base = u_ptr + batch * u_sb + head * u_sh
    k_base = k_ptr + batch * k_sb + (head // per_group) * k_sg
    for step in tl.range(0, high - low, num_stages=STAGES):
        c = low + step
        if REVERSE:
            c = high - 1 - step
        v = first + c
        t = start + (v - first) * Q
        in_row = t + i < end
        if not TOTALS:
            to = states_ptr + (v * heads + head) * size
            store_tile(to, STATES, p, n, p < HEAD_DIM, S, CUT_P, CUT_N, STATES)
        u = load_tile(u_base + t * u_st, u_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM)
        k = load_tile(k_base + t * k_st, k_st, i, n, in_row, RAGGED, CUT_N, STATES)
        at = decay_ptr + (v * heads + head) * (4 * Q)
        a, b, delta = load_decay(at, Q)
        a_end = tl.load(at + 4 * Q - 4)
        if WIDE:
            b_end = tl.load(at + 4 * Q - 3)
            whole = tl.exp2(a_end + b_end)
            weight = tl.exp2(a + b) if REVERSE else delta * tl.exp2((a_end - a) + (b_end - b))
        else:
            whole = tl.exp2(a_end)
            weight = tl.exp2(a) if REVERSE else tl.exp2(a_end - b)
        u = u.to(tl.float32)
        if REVERSE:
            if z_ptr is not None:
                at_z = z_ptr + batch * z_sb + head * z_sh + t * z_st
                z = load_tile(at_z, z_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM)
                u = gated(u, z.to(tl.float32))
            if mask_ptr is not None:
                at_mask = mask_ptr + batch * mask_sb + (t + i) * mask_st
                weight = tl.where(tl.load(at_mask, mask=in_row, other=0) != 0, weight, 0.0)
        u = (u * weight[:, None]).to(dot_type)
        added = tl.dot(tl.trans(u), k.to(dot_type), input_precision=PRECISION)
        S = S * whole + added
        carry *= whole
    if TOTALS:
        to = totals_ptr + (at_carry + segment * heads) * size + tile
        tl.store(to, S, mask=in_tile)
        tl.store(carry_ptr + at_carry + segment * heads, carry)
    elif exit_ptr is not None:
        last = in_tile & (p < tl.where(segment == SEGMENTS - 1, HEAD_DIM, 0))[:, None]
        tl.store(exit_ptr + (row * heads + head) * size + tile, S, mask=last)


@triton.jit
def ssd_states_kernel(
    x_ptr, B_ptr, dy_ptr, C_ptr, z_ptr, mask_ptr, decay_ptr,
    states_ptr, dstates_ptr, initial_ptr, dfinal_ptr, dinitial_ptr,
    totals_ptr, carry_ptr, dtotals_ptr, dcarry_ptr, cu_ptr, first_ptr,
    x_sb, x_st: tl.constexpr, x_sh, B_sb, B_st: tl.constexpr, B_sg,
    dy_sb, dy_st: tl.constexpr, dy_sh, C_sb, C_st: tl.constexpr, C_sg,
    z_sb, z_st: tl.constexpr, z_sh, mask_sb, mask_st,
    rows, length, heads: tl.constexpr, per_group, walked,
    STATES: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
    TOTALS: tl.constexpr, SEGMENTS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """States between chunks, forwards, and their gradients, backwards (where dy is given).

    One program for a row, segment, head, block of the state and direction. TOTALS: every segment
    from a state of 0, giving the state after it, totals (rows, SEGMENTS, H, P, N), and its decay,
    carry (rows, SEGMENTS, H). Otherwise from the state that enters it, storing states (chunks, H,
    P, N) before each chunk (in walking order), and dinitial. `walked` segments are walked.
    """
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    n_blocks = tl.cdiv(STATES, BLOCK_N)
    n_block = pid % n_blocks
    pid = pid // n_blocks
    p_blocks = tl.cdiv(HEAD_DIM, BLOCK_P)
    p_block = pid % p_blocks
    pid = pid // p_blocks
    segment = pid % walked
    pid = pid // walked
    row = (pid % rows).to(tl.int64)
    if pid < rows:
        walk_states(
            x_ptr, B_ptr, None, None, decay_ptr, states_ptr, initial_ptr, None,
            totals_ptr, carry_ptr, cu_ptr, first_ptr, row, segment, head, n_block, p_block,
            x_sb, x_st, x_sh, B_sb, B_st, B_sg, 0, 0, 0, 0, 0,
            rows, length, heads, per_group, STATES, HEAD_DIM, RAGGED,
            False, TOTALS, SEGMENTS, VARLEN, WIDE, PRECISION, Q, BLOCK_P, BLOCK_N, STAGES,
        )  # fmt: skip
    elif dy_ptr is not None:
        walk_states(
            dy_ptr, C_ptr, z_ptr, mask_ptr, decay_ptr, dstates_ptr, dfinal_ptr, dinitial_ptr,
            dtotals_ptr, dcarry_ptr, cu_ptr, first_ptr, row, segment, head, n_block, p_block,
            dy_sb, dy_st, dy_sh, C_sb, C_st, C_sg, z_sb, z_st, z_sh, mask_sb, mask_st,
            rows, length, heads, per_group, STATES, HEAD_DIM, RAGGED,
            True, TOTALS, SEGMENTS, VARLEN, WIDE, PRECISION, Q, BLOCK_P, BLOCK_N, STAGES,
        )  # fmt: skip


@triton.jit
def ssd_fwd_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, mask_ptr, decay_ptr, initial_ptr, totals_ptr, carry_ptr,
    y_ptr, ungated_ptr, final_ptr, cu_ptr, first_ptr,
    x_sb, x_st: tl.constexpr, x_sh, B_sb, B_st: tl.constexpr, B_sg, C_sb, C_st: tl.constexpr, C_sg,
    z_sb, z_st: tl.constexpr, z_sh, mask_sb, mask_st,
    rows, length, heads: tl.constexpr, per_group, part,
    STATES: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr, SEGMENTS: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, LEAN: tl.constexpr,
):  # fmt: skip
    """y (B, T, H, P) and the final state (rows, H, P, N).

    One program for a row, segment, head, block of its channels and block of its states, which stay
    in registers. What block j of the states adds to y lies `part` elements behind that of j - 1.
    """
    dot_type: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    p_blocks = tl.cdiv(HEAD_DIM, BLOCK_P)
    p_block = pid % p_blocks
    pid = pid // p_blocks
    n_blocks: tl.constexpr = (STATES + BLOCK_N - 1) // BLOCK_N
    n_block = pid % n_blocks
    pid = pid // n_blocks
    segment = pid % SEGMENTS
    row = (pid // SEGMENTS).to(tl.int64)
    batch, start, end, first, chunks = place_of_row(row, length, cu_ptr, first_ptr, VARLEN, Q)
    per_segment = tl.cdiv(chunks, SEGMENTS)
    low = tl.minimum(segment * per_segment, chunks)
    high = tl.minimum(low + per_segment, chunks)

    i = tl.arange(0, Q)
    p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    CUT_P: tl.constexpr = HEAD_DIM % BLOCK_P != 0
    CUT_N: tl.constexpr = STATES % BLOCK_N != 0
    size = HEAD_DIM * STATES
    tile = p[:, None] * STATES + n[None, :]
    in_tile = (p < HEAD_DIM)[:, None] & (n < STATES)[None, :]
    at_carry = (row * SEGMENTS) * heads + head
    S = entry_state(
        tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32),
        initial_ptr, totals_ptr, carry_ptr, (row * heads + head) * size + tile, in_tile,
        at_carry * size + tile, heads * size, at_carry, heads, segment,
    )  # fmt: skip
    D = 0.0
    if D_ptr is not None:
        if D_PER_CHANNEL:
            D = tl.load(D_ptr + head * HEAD_DIM + p, mask=p < HEAD_DIM, other=0.0)
            D = D.to(tl.float32)[None, :]
        else:
            D = tl.load(D_ptr + head).to(tl.float32)
        if n_blocks > 1:
            D = tl.where(n_block == 0, D, 0.0)

    group = head // per_group
    x_base = x_ptr + batch * x_sb + head * x_sh
    B_base = B_ptr + batch * B_sb + group * B_sg
    C_base = C_ptr + batch * C_sb + group * C_sg
    ends = decay_ptr + (head + 1) * (4 * Q) - 4
    chunk_step = heads * (4 * Q)
    a_end = tl.load(ends + (first + low) * chunk_step, mask=low < high, other=0.0)
    for c in tl.range(low, high, num_stages=STAGES):
        v = first + c
        t = start + (v - first) * Q
        in_row = t + i < end
        x = load_tile(x_base + t * x_st, x_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM)
        B = load_tile(B_base + t * B_st, B_st, i, n, in_row, RAGGED, CUT_N, STATES)
        C = load_tile(C_base + t * C_st, C_st, i, n, in_row, RAGGED, CUT_N, STATES)
        B, C = B.to(dot_type), C.to(dot_type)
        at = decay_ptr + (v * heads + head) * (4 * Q)
        if WIDE:
            a, b, delta = load_decay(at, Q)
        else:
            a, b = tl.split(tl.load(at + 4 * i[:, None] + tl.arange(0, 2)[None, :]))

        # Token s reaches t with exp2(a_t - a_s) Δ_s, t with D besides.
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        causal = i[:, None] >= i[None, :]
        if WIDE:
            exponent = (a[:, None] - a[None, :]) + (b[:, None] - b[None, :])
            scores *= tl.exp2(tl.where(causal, exponent, float("-inf"))) * delta[None, :]
            from_entry = tl.exp2(a + b)
            b_end = tl.load(at + 4 * Q - 3)
            to_exit = tl.exp2((a_end - a) + (b_end - b)) * delta
            whole = tl.exp2(a_end + b_end)
        else:
            scores *= tl.exp2(tl.where(causal, a[:, None] - b[None, :], float("-inf")))
            from_entry = tl.exp2(a)
            to_exit = tl.exp2(a_end - b)
            whole = tl.exp2(a_end)
        if D_ptr is not None and not D_PER_CHANNEL:
            scores += tl.where(i[:, None] == i[None, :], D, 0.0)
        if LEAN:
            save_buffer(C_ptr, C_st, i, n, C, length)
        y = tl.dot(C, tl.trans(S.to(dot_type)), input_precision=PRECISION)
        y *= from_entry[:, None]
        y = tl.dot(scores.to(dot_type), x.to(dot_type), y, input_precision=PRECISION)

        leaving = (x.to(tl.float32) * to_exit[:, None]).to(dot_type)
        S = S * whole + tl.dot(tl.trans(leaving), B, input_precision=PRECISION)
        # Used here, the product is waited for here. If it still ran when the next step began, ptxas
        # would wait after every single instruction of all four products.
        S += 0.0

        if D_ptr is not None and D_PER_CHANNEL:
            y += x.to(tl.float32) * D
        # Asked for a step ahead: nothing waits for these few bytes.
        a_end = tl.load(ends + tl.minimum(v + 1, first + high - 1) * chunk_step)
        if mask_ptr is not None:
            at_mask = mask_ptr + batch * mask_sb + (t + i) * mask_st
            is_real = tl.load(at_mask, mask=in_row, other=0) != 0
            y = tl.where(is_real[:, None], y, 0.0)
        at_y = n_block.to(tl.int64) * part + ((batch * length + t) * heads + head) * HEAD_DIM
        y_st = heads * HEAD_DIM
        if z_ptr is not None:
            to = ungated_ptr + at_y
            store_tile(to, y_st, i, p, in_row, y, RAGGED, CUT_P, HEAD_DIM)
            at_z = z_ptr + batch * z_sb + head * z_sh + t * z_st
            z = load_tile(at_z, z_st, i, p, in_row, RAGGED, CUT_P, HEAD_DIM)
            y = gated(y, z.to(tl.float32))
        store_tile(y_ptr + at_y, y_st, i, p, in_row, y, RAGGED, CUT_P, HEAD_DIM)
    if segment == SEGMENTS - 1:
        tl.store(final_ptr + (row * heads + head) * size + tile, S, mask=in_tile)
