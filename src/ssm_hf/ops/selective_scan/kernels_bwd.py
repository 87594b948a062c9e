"""Triton kernels of the selective scan's backward pass, with tiles as in the forward one."""

import triton
import triton.language as tl

from ssm_hf.ops.selective_scan.kernels import (
    _decays,
    _document_drops,
    _first_saved,
    _handed_on,
    _load_rows,
    _per_channel,
    _row,
    _row_extent,
    _segment,
    _sigmoid,
    _step_size,
    _with_row,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _over_channels(one, other):
    """Sums of two tiles (T, E, N) over their channels.

    Channels 8 apart lie in one thread, and the 8 sums lie in different threads. Splitting those in
    halves moves the halves into a thread, all in one pass through shared memory; plain sums would
    take three rounds of shuffles for each value and leave every result in 8 threads.
    """
    T: tl.constexpr = one.shape[0]
    E: tl.constexpr = one.shape[1]
    N: tl.constexpr = one.shape[2]
    if E < 16:
        return tl.sum(one, axis=1), tl.sum(other, axis=1)
    else:
        sums = tl.sum(tl.reshape(one, (T, E // 8, 8, N)), axis=1)
        sums = tl.join(sums, tl.sum(tl.reshape(other, (T, E // 8, 8, N)), axis=1))
        halves = tl.permute(tl.reshape(sums, (T, 2, 4, N, 2)), (0, 2, 3, 4, 1))
        first, second = tl.split(halves)
        return tl.split(tl.sum(first + second, axis=1))


@triton.jit
def _over_states(one, other):
    """Sums of two tiles (T, E, N) over their states, in the same way: a thread has four of them."""
    T: tl.constexpr = one.shape[0]
    E: tl.constexpr = one.shape[1]
    N: tl.constexpr = one.shape[2]
    if N < 16:
        return tl.sum(one, axis=2), tl.sum(other, axis=2)
    else:
        sums = tl.sum(tl.reshape(one, (T, E, N // 4, 4)), axis=3)
        sums = tl.join(sums, tl.sum(tl.reshape(other, (T, E, N // 4, 4)), axis=3))
        first, second = tl.split(
            tl.permute(tl.reshape(sums, (T, E, N // 8, 2, 2)), (0, 1, 2, 4, 3))
        )
        sums = tl.reshape(first + second, (T, E, N // 16, 2, 2))
        first, second = tl.split(tl.permute(sums, (0, 1, 2, 4, 3)))
        return tl.split(tl.sum(first + second, axis=2))


@triton.jit
def _along_states(one, other, N: tl.constexpr):
    """Two tiles (T, E) as (T, E, N), brought into the layout of the states in one go."""
    both = tl.join(one, other)[:, :, None, :]
    return tl.split(tl.broadcast_to(both, (one.shape[0], one.shape[1], N, 2)))


@triton.jit
def _along_channels(one, other, E: tl.constexpr):
    """Two tiles (T, N) as (T, E, N), in the same way."""
    both = tl.join(one, other)[:, None, :, :]
    return tl.split(tl.broadcast_to(both, (one.shape[0], E, one.shape[1], 2)))


@triton.jit(do_not_specialize=["tokens", "T", "segments"])
def selective_scan_bwd_kernel(
    dy_ptr,
    dfinal_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    seq_ptr,
    cu_ptr,
    mask_ptr,
    saved_ptr,
    ungated_ptr,
    carry_ptr,
    scratch_ptr,
    dx_ptr,
    ddt_ptr,
    dz_ptr,
    y_ptr,
    dB_ptr,
    dC_ptr,
    dA_ptr,
    dD_ptr,
    dbias_ptr,
    dinitial_ptr,
    dy_b,
    dy_t,
    x_b,
    x_t,
    dt_b,
    dt_t,
    B_b,
    B_t,
    C_b,
    C_t,
    z_b,
    z_t,
    dz_t,
    tokens,
    T,
    E,
    N,
    segments,
    lowest,
    highest,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per row (or document), segment of the row and block of channels.

    Chunks of CHUNK tokens in reverse order: states are formed again from the saved one, once to
    note the state before each tile in scratch (BLOCK_F tokens at a time), once on the way back
    (BLOCK_T at a time). Where the state before every tile was saved (EVERY = BLOCK_T), the segment
    is one chunk and there is only the way back.

    y (B, T, E), if given, receives what the forward pass gave, from ungated as it was before the
    gate. dB, dC (blocks, tokens, N), dA (rows * segments, E, N), dD, dbias (rows * segments, E)
    receive each program's share, to be summed over the first axis.
    """
    ALL_SAVED: tl.constexpr = EVERY == BLOCK_T
    blocks = tl.cdiv(E, BLOCK_E)
    block = tl.program_id(0) % blocks
    place = tl.program_id(0) // blocks
    row, segment = place // segments, place % segments
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    t, f = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_F)
    in_e, in_n = e < E, n < N
    batch, first, length = _row_extent(row, cu_ptr, T)
    start, end = _segment(segment, segments, length, CHUNK)
    size = tl.cast(E, tl.int64) * N
    saved_ptr += (_first_saved(row, first, cu_ptr, T, EVERY) + start // EVERY) * size

    # As in the forward kernel.
    en = tl.max_contiguous(e[None, :, None] * N + n[None, None, :], (1, 1, 4))
    in_en = in_e[None, :, None] & in_n[None, None, :]
    A2 = tl.load(A_ptr + en, mask=in_en, other=0.0).to(tl.float32) * LOG2E
    bias_f, bias = _per_channel(bias_ptr, e, BLOCK_F, E), _per_channel(bias_ptr, e, BLOCK_T, E)
    D = _per_channel(D_ptr, e, BLOCK_T, E)

    leaving = tl.zeros((1, BLOCK_E, BLOCK_N), tl.float32)
    if dfinal_ptr is not None:
        leaving += tl.load(dfinal_ptr + row * size + en, mask=in_en, other=0.0).to(tl.float32)
    if carry_ptr is not None:
        carry_ptr += row.to(tl.int64) * segments * 2 * size
        for after in range(segments - 1, segment, -1):
            leaving = _handed_on(leaving, carry_ptr + after * 2 * size, size, en, in_en)
    k = tl.sum(leaving, axis=0)

    dy_ptr += batch * dy_b + first * dy_t
    x_ptr += batch * x_b + first * x_t
    dt_ptr += batch * dt_b + first * dt_t
    B_ptr += batch * B_b + first * B_t
    C_ptr += batch * C_b + first * C_t
    if z_ptr is not None:
        z_ptr += batch * z_b + first * z_t
    first += batch * T
    # Scratch is laid out as the program likes it, so no mask is needed.
    own = tl.arange(0, BLOCK_E)[None, :, None] * BLOCK_N + n[None, None, :]
    if not ALL_SAVED:
        scratch_ptr += tl.program_id(0).to(tl.int64) * (CHUNK // BLOCK_T * BLOCK_E * BLOCK_N)

    dA = tl.sum(tl.zeros((1, BLOCK_E, BLOCK_N), tl.float32), axis=0)
    dD = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    dbias = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    chunks = tl.cdiv(end - start, CHUNK)
    if ALL_SAVED:
        chunks = tl.minimum(chunks, 1)
    for reverse_chunk in range(0, chunks):
        chunk = chunks - 1 - reverse_chunk
        c0 = start + chunk * CHUNK
        stop = end if ALL_SAVED else tl.minimum(c0 + CHUNK, end)
        long = tl.cast(c0, tl.int64)
        if not ALL_SAVED:
            entering = tl.load(saved_ptr + chunk * size + en, mask=in_en, other=0.0)
            h = tl.sum(entering, axis=0)
            # Forward through the chunk: the state before each tile goes to scratch.
            x_at, dt_at, B_at = x_ptr + long * x_t, dt_ptr + long * dt_t, B_ptr + long * B_t
            noted = scratch_ptr
            for t0 in tl.range(c0, stop, BLOCK_F, num_stages=STAGES):
                here = t0 + f < stop
                x = _load_rows(x_at, x_t, f, e, here[:, None] & in_e[None, :], FAST)
                raw = _load_rows(dt_at, dt_t, f, e, here[:, None] & in_e[None, :], FAST)
                B = _load_rows(B_at, B_t, f, n, here[:, None] & in_n[None, :], FAST)
                x_at += BLOCK_F * x_t
                dt_at += BLOCK_F * dt_t
                B_at += BLOCK_F * B_t
                real = here[:, None] & in_e[None, :]
                if mask_ptr is not None:
                    mask = tl.load(mask_ptr + first + t0 + f, mask=here, other=0)
                    real &= mask[:, None] != 0
                drops = tl.zeros((BLOCK_F,), tl.float32)
                if seq_ptr is not None:
                    drops = _document_drops(seq_ptr, t0 + f, first, length)
                delta = _step_size(raw, bias_f, real, lowest, highest, SOFTPLUS, CLAMP)
                a = _decays(delta[:, :, None], A2, drops, seq_ptr is not None)
                b = (delta * x)[:, :, None] * B[:, None, :]
                for i in tl.static_range(BLOCK_F):
                    if i % BLOCK_T == 0:
                        tl.store(noted + i // BLOCK_T * (BLOCK_E * BLOCK_N) + own, h[None, :, :])
                    h = _row(a, i) * h + _row(b, i)
                noted += BLOCK_F // BLOCK_T * BLOCK_E * BLOCK_N
            tl.debug_barrier()

        # And back, tile by tile.
        tiles = tl.cdiv(stop - c0, BLOCK_T)
        long = tl.cast(c0 + (tiles - 1) * BLOCK_T, tl.int64)
        x_at, dt_at, dy_at = x_ptr + long * x_t, dt_ptr + long * dt_t, dy_ptr + long * dy_t
        B_at, C_at = B_ptr + long * B_t, C_ptr + long * C_t
        z_at = dy_at if z_ptr is None else z_ptr + long * z_t
        y_at = dy_at if z_ptr is None else ungated_ptr + (first + long) * E
        if ALL_SAVED:
            noted = saved_ptr + (tiles - 1) * size
            entering_next = tl.load(noted + en, mask=in_en, other=0.0)
        else:
            noted = scratch_ptr + (tiles - 1) * (BLOCK_E * BLOCK_N)
        here = long + t < stop
        x_next = _load_rows(x_at, x_t, t, e, here[:, None] & in_e[None, :], FAST)
        dt_next = _load_rows(dt_at, dt_t, t, e, here[:, None] & in_e[None, :], FAST)
        dy_next = _load_rows(dy_at, dy_t, t, e, here[:, None] & in_e[None, :], FAST)
        B_next = _load_rows(B_at, B_t, t, n, here[:, None] & in_n[None, :], FAST)
        C_next = _load_rows(C_at, C_t, t, n, here[:, None] & in_n[None, :], FAST)
        z_next, y_next = x_next, x_next
        if z_ptr is not None:
            z_next = _load_rows(z_at, z_t, t, e, here[:, None] & in_e[None, :], FAST)
            y_next = _load_rows(y_at, E, t, e, here[:, None] & in_e[None, :], FAST)
        for tile in range(tiles - 1, -1, -1):
            x, raw, dy, B, C, z, y = x_next, dt_next, dy_next, B_next, C_next, z_next, y_next
            at = c0 + tile * BLOCK_T + t
            inside = (at < stop)[:, None] & in_e[None, :]
            inside_n = (at < stop)[:, None] & in_n[None, :]
            if not ALL_SAVED:
                entering = tl.load(noted + own)
                noted -= BLOCK_E * BLOCK_N
            # The tile before this one is whole; in front of the first there is none.
            x_at -= BLOCK_T * x_t
            dt_at -= BLOCK_T * dt_t
            dy_at -= BLOCK_T * dy_t
            B_at -= BLOCK_T * B_t
            C_at -= BLOCK_T * C_t
            more = (t >= 0) & (tile > 0)
            if ALL_SAVED:
                entering = entering_next.to(tl.float32)
                noted -= size
                entering_next = tl.load(noted + en, mask=in_en & (tile > 0), other=0.0)
            x_next = _load_rows(x_at, x_t, t, e, more[:, None] & in_e[None, :], FAST)
            dt_next = _load_rows(dt_at, dt_t, t, e, more[:, None] & in_e[None, :], FAST)
            dy_next = _load_rows(dy_at, dy_t, t, e, more[:, None] & in_e[None, :], FAST)
            B_next = _load_rows(B_at, B_t, t, n, more[:, None] & in_n[None, :], FAST)
            C_next = _load_rows(C_at, C_t, t, n, more[:, None] & in_n[None, :], FAST)
            if z_ptr is not None:
                z_at -= BLOCK_T * z_t
                y_at -= BLOCK_T * E
                z_next = _load_rows(z_at, z_t, t, e, more[:, None] & in_e[None, :], FAST)
                y_next = _load_rows(y_at, E, t, e, more[:, None] & in_e[None, :], FAST)
            real = inside
            if mask_ptr is not None:
                mask = tl.load(mask_ptr + first + at, mask=at < stop, other=0)
                real &= mask[:, None] != 0
                dy = tl.where(real, dy, 0.0)
            drops = tl.zeros((BLOCK_T,), tl.float32)
            if seq_ptr is not None:
                drops = _document_drops(seq_ptr, at, first, length)
            delta = _step_size(raw, bias, real, lowest, highest, SOFTPLUS, CLAMP)
            steps, u = _along_states(delta, delta * x, BLOCK_N)
            a = _decays(steps, A2, drops, seq_ptr is not None)
            if ALL_SAVED:
                # Else registers are short: B and C take their own passes, C when it is needed.
                B, C = _along_channels(B, C, BLOCK_E)
            b = u * (B if ALL_SAVED else B[:, None, :])
            h = tl.sum(entering, axis=0)
            before, states = b, b
            for i in tl.static_range(BLOCK_T):
                before = _with_row(before, i, h)
                h = _row(a, i) * h + _row(b, i)
                states = _with_row(states, i, h)
            out = (first + at)[:, None] * E + e[None, :]
            if z_ptr is not None:
                open_ = _sigmoid(z)
                gate = z * open_
                dz_at = (first + at)[:, None] * dz_t + e[None, :]
                slope = open_ + gate * (1.0 - open_)
                tl.store(dz_ptr + dz_at, dy * y * slope, mask=inside)
                if y_ptr is not None:
                    tl.store(y_ptr + out, y * gate, mask=inside)
                dy *= gate
            at_C = states * dy[:, :, None]
            g, exponent = a, a
            for i in tl.static_range(BLOCK_T - 1, -1, -1):
                gi = _row(C if ALL_SAVED else C[:, None, :], i) * _row(dy[:, :, None], i) + k
                k = _row(a, i) * gi
                g = _with_row(g, i, gi)
                # Gradient of the decay's exponent.
                exponent_i = k * _row(before, i)
                exponent = _with_row(exponent, i, exponent_i)
                dA += exponent_i * _row(steps, i)
            dB, dC = _over_channels(g * u, at_C)
            du, dstep = _over_states(g * (B if ALL_SAVED else B[:, None, :]), exponent * A2)
            ddelta = x * du + LN2 * dstep
            if CLAMP:
                free = _step_size(raw, bias, real, lowest, highest, SOFTPLUS, False)
                ddelta = tl.where((free >= lowest) & (free <= highest), ddelta, 0.0)
            if SOFTPLUS:
                ddelta *= _sigmoid(raw + bias)
            ddelta = tl.where(real, ddelta, 0.0)
            tl.store(ddt_ptr + out, ddelta, mask=inside)
            tl.store(dx_ptr + out, D * dy + delta * du, mask=inside)
            dD += dy * x
            dbias += ddelta
            share = (block.to(tl.int64) * tokens + first + at)[:, None] * N + n[None, :]
            tl.store(dB_ptr + share, dB, mask=inside_n)
            tl.store(dC_ptr + share, dC, mask=inside_n)
        tl.debug_barrier()

    tl.store(dA_ptr + place.to(tl.int64) * size + en, dA[None, :, :], mask=in_en)
    if dD_ptr is not None:
        tl.store(dD_ptr + place.to(tl.int64) * E + e, tl.sum(dD, axis=0), mask=in_e)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + place.to(tl.int64) * E + e, tl.sum(dbias, axis=0), mask=in_e)
    if dinitial_ptr is not None and segment == 0:
        tl.store(dinitial_ptr + row * size + en, k[None, :, :], mask=in_en)


@triton.jit
def _sum_of_shares(share_ptr, to_ptr, to_b, to_t, row, n, tokens, length, N, shares,
                   UNROLL: tl.constexpr):  # fmt: skip
    inside = (row < tokens)[:, None] & (n < N)[None, :]
    share_ptr += row[:, None] * N + n[None, :]
    size = tl.cast(tokens, tl.int64) * N
    total = tl.zeros(inside.shape, tl.float32)
    for i in range(0, shares, UNROLL):
        for j in tl.static_range(UNROLL):
            there = inside & (i + j + 0 * n < shares)[None, :]
            share = tl.load(share_ptr + j * size, mask=there, other=0.0)
            total += share.to(tl.float32)
        share_ptr += UNROLL * size
    batch = row // length
    to_ptr += (batch * to_b + (row - batch * length) * to_t)[:, None] + n[None, :]
    tl.store(to_ptr, total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "length", "shares", "rows"])
def selective_scan_sum_kernel(
    dB_shares_ptr, dC_shares_ptr, dA_shares_ptr, dD_shares_ptr, dbias_shares_ptr,
    dB_ptr, dC_ptr, dA_ptr, dD_ptr, dbias_ptr, dB_b, dB_t, dC_b, dC_t,
    tokens, length, E, N, shares, rows,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums of what the programs found, always in the same order.

    dB and dC (B, T, N) of (shares, B T, N), dA (E, N), dD and dbias (E,) of (rows, ...). The second
    number of a program says which, the first which ROWS tokens or channels.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    if which == 0:
        _sum_of_shares(dB_shares_ptr, dB_ptr, dB_b, dB_t, row, n, tokens, length, N, shares, UNROLL)
    elif which == 1:
        _sum_of_shares(dC_shares_ptr, dC_ptr, dC_b, dC_t, row, n, tokens, length, N, shares, UNROLL)
    elif which == 2:
        _sum_of_shares(dA_shares_ptr, dA_ptr, 0, N, row, n, E, E, N, rows, UNROLL)
    else:
        if dD_ptr is not None:
            _sum_of_shares(dD_shares_ptr, dD_ptr, 0, 1, row, n, E, E, 1, rows, UNROLL)
        if dbias_ptr is not None:
            _sum_of_shares(dbias_shares_ptr, dbias_ptr, 0, 1, row, n, E, E, 1, rows, UNROLL)
