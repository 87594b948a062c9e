"""Triton kernels of the selective scan's forward pass, and what they share with the backward pass.

A program owns BLOCK_E channels with all their states and walks through time, BLOCK_T tokens at a
time. Step sizes are formed once per token and channel; decays and inputs of a tile are
(BLOCK_T, BLOCK_E, BLOCK_N) tensors whose time axis lies inside a thread, so that `_row` and
`_with_row`, which address one token of a tile, are a choice of registers and cost nothing.

Tiles are loaded STAGES - 1 tiles ahead through shared memory. Loads into registers would not do:
a warp has six scoreboards for all that it waits for, and an exponential that shares one with a load
from memory waits for that load.

A row may be cut into segments that run side by side: `selective_scan_carry_kernel` then finds out
what each one hands to the next (backwards: to the one before it).
"""

import triton
import triton.language as tl

from ssm_hf.ops.kernels_dtype import widened

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row(tile, t: tl.constexpr):
    """Token t of a tile with time first."""
    at = tl.arange(0, tile.shape[0])[:, None, None] == t
    # A sum of integers, since there x + 0 = x: all other terms vanish when it is compiled.
    bits = tl.sum(tl.where(at, tile.to(tl.int32, bitcast=True), 0), axis=0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _with_row(tile, t: tl.constexpr, row):
    """The tile with token t replaced."""
    at = tl.arange(0, tile.shape[0])[:, None, None] == t
    return tl.where(at, row[None, :, :], tile)


@triton.jit
def _softplus(v):
    """log(1 + e^v), as accurate for v << 0 as for v >> 0."""
    w = tl.exp2(-tl.abs(v) * LOG2E)
    # log(1 + w) / w on [0, 1]: the polynomial whose largest relative error, 3e-8, is smallest.
    p = w * 0.00523269409 - 0.0295052398
    p = p * w + 0.0782259554
    p = p * w - 0.136632457
    p = p * w + 0.191060066
    p = p * w - 0.24842982
    p = p * w + 0.333190978
    p = p * w - 0.499994934
    p = p * w + 0.99999994
    return tl.maximum(v, 0.0) + w * p


@triton.jit
def _sigmoid(v):
    """1 / (1 + e^-v), through a square root because a division takes ten instructions."""
    root = tl.rsqrt(1.0 + tl.exp2(-v * LOG2E))
    return root * root


@triton.jit
def _load_rows(ptr, stride, t, columns, inside, FAST: tl.constexpr):
    tile = tl.load(ptr + t[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return widened(tile, FAST)


@triton.jit
def _per_channel(ptr, channels, BLOCK_T: tl.constexpr, E):
    """A parameter of each channel as a tile (BLOCK_T, channels), zeros where there is none.

    It is loaded as a tile, not as a row: tensors keep the layout of what was loaded, and in this
    one each thread has its own tokens and channels. Otherwise the step size would be formed in the
    layout of the states, once for every group of states.
    """
    tile = tl.zeros((BLOCK_T, channels.shape[0]), tl.float32)
    if ptr is not None:
        any_token = tl.arange(0, BLOCK_T)[:, None] >= 0
        tile += _load_rows(
            ptr,
            0,
            tl.arange(0, BLOCK_T),
            channels,
            any_token & (channels < E)[None, :],
            False,
        )
    return tile


@triton.jit
def _step_size(raw, bias, real, lowest, highest, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr):
    """Δ (T, E) of a tile, 0 where no real token stands: the state is held there."""
    delta = raw + bias
    if SOFTPLUS:
        delta = _softplus(delta)
    if CLAMP:
        delta = tl.minimum(tl.maximum(delta, lowest), highest)
    return tl.where(real, delta, 0.0)


@triton.jit
def _document_drops(seq_ptr, t, first, length):
    """-inf (T,) in the decay's exponent where a new document drops the state, else 0."""
    after = (t > 0) & (t < length)
    here = tl.load(seq_ptr + first + t, mask=after, other=0)
    before = tl.load(seq_ptr + first + t - 1, mask=after, other=0)
    return tl.where(here != before, float("-inf"), 0.0)


@triton.jit
def _decays(delta, A2, drops, HAS_DROPS: tl.constexpr):
    """exp(Δ A) (T, E, N), from Δ (T, E, 1 or N) and A log2(e) (1, E, N)."""
    exponent = delta * A2
    if HAS_DROPS:
        exponent += drops[:, None, None]
    return tl.exp2(exponent)


@triton.jit
def _row_extent(row, cu_ptr, T):
    """Batch index, first token and length of a row, or of a document of the only row."""
    batch, first, length = row.to(tl.int64), tl.zeros((), tl.int64), T
    if cu_ptr is not None:
        batch *= 0
        first += tl.load(cu_ptr + row)
        length = (tl.load(cu_ptr + row + 1) - first).to(tl.int32)
    return batch, first, length


@triton.jit
def _first_saved(row, first, cu_ptr, T, CHUNK: tl.constexpr):
    """Place of a row's first saved state: rows of ceil(length / CHUNK) places never overlap."""
    place = row.to(tl.int64) * tl.cdiv(T, CHUNK)
    if cu_ptr is not None:
        place = first // CHUNK + row
    return place


@triton.jit
def _segment(segment, segments, length, CHUNK: tl.constexpr):
    """First token of a segment and the one after its last: whole chunks, except at the end."""
    size = tl.cdiv(tl.cdiv(length, segments), CHUNK) * CHUNK
    start = tl.minimum(segment * size, length)
    return start, tl.minimum(start + size, length)


@triton.jit
def _handed_on(s, carry_ptr, size, en, in_en):
    """What leaves a segment when s (1, E, N) enters it; see `selective_scan_carry_kernel`."""
    decay = tl.load(carry_ptr + en, mask=in_en, other=0.0)
    return decay * s + tl.load(carry_ptr + size + en, mask=in_en, other=0.0)


@triton.jit(do_not_specialize=["T", "segments"])
def selective_scan_carry_kernel(
    v_ptr,
    dt_ptr,
    A_ptr,
    W_ptr,
    z_ptr,
    bias_ptr,
    seq_ptr,
    cu_ptr,
    mask_ptr,
    carry_ptr,
    v_b,
    v_t,
    dt_b,
    dt_t,
    W_b,
    W_t,
    z_b,
    z_t,
    T,
    E,
    N,
    segments,
    lowest,
    highest,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FAST: tl.constexpr,
):
    """carry (rows, segments, 2, E, N): P and Q of the map s -> P s + Q that a segment stands for.

    Forward, s is the state, v is x (B, T, E) and W is B (B, T, N). With REVERSE, s is the gradient
    that goes from the segment's end to its start, v is y's gradient (gated by z) and W is C.
    Nobody asks what the last segment hands on (with REVERSE: the first), which has no program.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    place = tl.program_id(0) // blocks
    row, segment = place // (segments - 1), place % (segments - 1)
    if REVERSE:
        segment += 1
    place = row * segments + segment
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    in_e, in_n = e < E, n < N
    batch, first, length = _row_extent(row, cu_ptr, T)
    start, end = _segment(segment, segments, length, CHUNK)

    en = e[None, :, None] * N + n[None, None, :]
    in_en = in_e[None, :, None] & in_n[None, None, :]
    A2 = tl.load(A_ptr + en, mask=in_en, other=0.0).to(tl.float32) * LOG2E
    bias = _per_channel(bias_ptr, e, BLOCK_T, E)

    v_ptr += batch * v_b + first * v_t
    dt_ptr += batch * dt_b + first * dt_t
    W_ptr += batch * W_b + first * W_t
    if z_ptr is not None:
        z_ptr += batch * z_b + first * z_t
    first += batch * T

    s = tl.sum(tl.zeros((1, BLOCK_E, BLOCK_N), tl.float32), axis=0)
    steps = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    dropped = tl.zeros((BLOCK_T,), tl.float32)
    tiles = tl.cdiv(end - start, BLOCK_T)
    step = -BLOCK_T if REVERSE else BLOCK_T
    t0 = start + (tiles - 1) * BLOCK_T if REVERSE else start
    long = tl.cast(t0, tl.int64)
    v_ptr += long * v_t
    dt_ptr += long * dt_t
    W_ptr += long * W_t
    if z_ptr is not None:
        z_ptr += long * z_t
    for _ in tl.range(0, tiles, num_stages=STAGES):
        here = (t0 + t >= start) & (t0 + t < end)
        v = _load_rows(v_ptr, v_t, t, e, here[:, None] & in_e[None, :], FAST)
        raw = _load_rows(dt_ptr, dt_t, t, e, here[:, None] & in_e[None, :], FAST)
        W = _load_rows(W_ptr, W_t, t, n, here[:, None] & in_n[None, :], FAST)
        v_ptr += step * v_t
        dt_ptr += step * dt_t
        W_ptr += step * W_t
        if z_ptr is not None:
            z = _load_rows(z_ptr, z_t, t, e, here[:, None] & in_e[None, :], FAST)
            z_ptr += step * z_t
            v *= z * _sigmoid(z)
        real = here[:, None] & in_e[None, :]
        if mask_ptr is not None:
            mask = tl.load(mask_ptr + first + t0 + t, mask=here, other=0)
            real &= mask[:, None] != 0
        drops = tl.zeros((BLOCK_T,), tl.float32)
        if seq_ptr is not None:
            drops = _document_drops(seq_ptr, t0 + t, first, length)
            dropped += tl.where(here, drops, 0.0)
        t0 += step
        delta = _step_size(raw, bias, real, lowest, highest, SOFTPLUS, CLAMP)
        steps += delta
        a = _decays(delta[:, :, None], A2, drops, seq_ptr is not None)
        if REVERSE:
            added = tl.where(real, v, 0.0)[:, :, None] * W[:, None, :]
            for i in tl.static_range(BLOCK_T - 1, -1, -1):
                s = _row(a, i) * (_row(added, i) + s)
        else:
            added = (delta * v)[:, :, None] * W[:, None, :]
            for i in tl.static_range(BLOCK_T):
                s = _row(a, i) * s + _row(added, i)
    whole = tl.sum(steps, axis=0)[None, :]
    decay = _decays(whole[:, :, None], A2, tl.sum(dropped, axis=0)[None], seq_ptr is not None)
    size = tl.cast(E, tl.int64) * N
    carry_ptr += place.to(tl.int64) * 2 * size
    tl.store(carry_ptr + en, decay, mask=in_en)
    tl.store(carry_ptr + size + en, s[None, :, :], mask=in_en)


@triton.jit(do_not_specialize=["T", "segments"])
def selective_scan_fwd_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    initial_ptr,
    seq_ptr,
    cu_ptr,
    mask_ptr,
    carry_ptr,
    y_ptr,
    final_ptr,
    saved_ptr,
    ungated_ptr,
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
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FAST: tl.constexpr,
):
    """One program per row (or document), segment of the row and block of channels.

    saved (places, E, N), if given, receives the state before every EVERY-th token of a row, and
    ungated (B, T, E) what y was before the gate.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    place = tl.program_id(0) // blocks
    row, segment = place // segments, place % segments
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    in_e, in_n = e < E, n < N
    batch, first, length = _row_extent(row, cu_ptr, T)
    start, end = _segment(segment, segments, length, CHUNK)

    # Loaded as three axes: this load decides how the threads share channels and states. Four states
    # in a row to a thread, also of 16 bits, of which it would take eight and then exchange them.
    en = tl.max_contiguous(e[None, :, None] * N + n[None, None, :], (1, 1, 4))
    in_en = in_e[None, :, None] & in_n[None, None, :]
    A2 = tl.load(A_ptr + en, mask=in_en, other=0.0).to(tl.float32) * LOG2E
    bias = _per_channel(bias_ptr, e, BLOCK_T, E)
    D = _per_channel(D_ptr, e, BLOCK_T, E)
    state = tl.zeros((1, BLOCK_E, BLOCK_N), tl.float32)
    size = tl.cast(E, tl.int64) * N
    if initial_ptr is not None:
        initial = tl.load(initial_ptr + row * size + en, mask=in_en, other=0.0)
        state += initial.to(tl.float32)
    if carry_ptr is not None:
        carry_ptr += row.to(tl.int64) * segments * 2 * size
        for before in range(0, segment):
            state = _handed_on(state, carry_ptr + before * 2 * size, size, en, in_en)
    h = tl.sum(state, axis=0)

    if saved_ptr is not None:
        saved_ptr += (_first_saved(row, first, cu_ptr, T, EVERY) + start // EVERY) * size
    x_ptr += batch * x_b + (first + start) * x_t
    dt_ptr += batch * dt_b + (first + start) * dt_t
    B_ptr += batch * B_b + (first + start) * B_t
    C_ptr += batch * C_b + (first + start) * C_t
    if z_ptr is not None:
        z_ptr += batch * z_b + (first + start) * z_t
    first += batch * T
    y_ptr += (first + start) * E
    if ungated_ptr is not None:
        ungated_ptr += (first + start) * E

    for t0 in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        inside = (t0 + t < end)[:, None] & in_e[None, :]
        inside_n = (t0 + t < end)[:, None] & in_n[None, :]
        x = _load_rows(x_ptr, x_t, t, e, inside, FAST)
        raw = _load_rows(dt_ptr, dt_t, t, e, inside, FAST)
        B = _load_rows(B_ptr, B_t, t, n, inside_n, FAST)
        C = _load_rows(C_ptr, C_t, t, n, inside_n, FAST)
        x_ptr += BLOCK_T * x_t
        dt_ptr += BLOCK_T * dt_t
        B_ptr += BLOCK_T * B_t
        C_ptr += BLOCK_T * C_t
        if z_ptr is not None:
            z = _load_rows(z_ptr, z_t, t, e, inside, FAST)
            z_ptr += BLOCK_T * z_t
        real = inside
        if mask_ptr is not None:
            real &= tl.load(mask_ptr + first + t0 + t, mask=t0 + t < end, other=0)[:, None] != 0
        if saved_ptr is not None and EVERY >= BLOCK_T:
            # Where more tiles than one lie between two of them, the others write nothing.
            tl.store(saved_ptr + en, h[None, :, :], mask=in_en & (t0 % EVERY == 0))
            saved_ptr += tl.where(t0 % EVERY == 0, size, 0)
        drops = tl.zeros((BLOCK_T,), tl.float32)
        if seq_ptr is not None:
            drops = _document_drops(seq_ptr, t0 + t, first, length)
        delta = _step_size(raw, bias, real, lowest, highest, SOFTPLUS, CLAMP)
        a = _decays(delta[:, :, None], A2, drops, seq_ptr is not None)
        b = (delta * x)[:, :, None] * B[:, None, :]
        states = b
        for i in tl.static_range(BLOCK_T):
            if saved_ptr is not None and EVERY < BLOCK_T and i % EVERY == 0:
                tl.store(saved_ptr + en, h[None, :, :], mask=in_en & (t0 + i < end))
                saved_ptr += tl.where(t0 + i < end, size, 0)
            h = _row(a, i) * h + _row(b, i)
            states = _with_row(states, i, h)
        y = tl.sum(states * C[:, None, :], axis=2)
        y += D * x
        if mask_ptr is not None:
            y = tl.where(real, y, 0.0)
        if ungated_ptr is not None:
            tl.store(ungated_ptr + t[:, None] * E + e[None, :], y, mask=inside)
            ungated_ptr += BLOCK_T * E
        if z_ptr is not None:
            y *= z * _sigmoid(z)
        tl.store(y_ptr + t[:, None] * E + e[None, :], y, mask=inside)
        y_ptr += BLOCK_T * E
    if segment == segments - 1:
        tl.store(final_ptr + row * size + en, h[None, :, :], mask=in_en)
