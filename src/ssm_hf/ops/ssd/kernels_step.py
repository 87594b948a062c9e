"""Triton kernel of Mamba-2's whole step between its two projections, in place on the cache."""

import triton
import triton.language as tl

from ssm_hf.ops.causal_conv1d.kernels_step import convolved, shift_window, silu
from ssm_hf.ops.kernels_overlap import begin_next, wait_for_all, wait_for_previous


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to full relative precision (log1p after Kahan), x itself above 20."""
    small = tl.exp(tl.minimum(x, 20.0))
    one = 1.0 + small
    log1p = tl.where(
        one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0))
    )
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def mamba2_step_kernel(
    proj_ptr, conv_state_ptr, ssm_state_ptr, conv_weight_ptr, conv_bias_ptr, dt_bias_ptr, A_log_ptr,
    D_ptr, norm_weight_ptr, mixed_ptr, out_ptr, scratch_ptr, tickets_ptr,
    stride_proj, stride_out, heads, per_group, groups, head_dim, states, channels, mlp, splits,
    dt_low, dt_high, eps,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CONV: tl.constexpr,  # 0: done, in proj; 1: still to be done; 2: done, in `mixed` (B, C)
    NORM: tl.constexpr,  # 0: gate alone; 1: norm(y silu(z)); 2: norm(y) silu(z)
    D_PER_CHANNEL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MLP: tl.constexpr,
    BLOCK_NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P channels of one head of one row.

    B and C of a group are read by all its programs. The one that takes the group's last ticket
    moves their windows on and normalises what all of them have written.
    """
    per_row = heads * splits
    row = (tl.program_id(0) // per_row).to(tl.int64)
    part = tl.program_id(0) % per_row
    head = part // splits
    group = head // per_group
    width = heads * head_dim

    p = (part % splits) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_inside, n_inside = p < head_dim, n < states
    x_channel = head * head_dim + p

    # The long load first.
    state = ssm_state_ptr + ((row * heads + head) * head_dim + p[:, None]) * states + n[None, :]
    inside = p_inside[:, None] & n_inside[None, :]
    S = tl.load(state, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)

    wait_for_previous(OVERLAP)
    proj = proj_ptr + row * stride_proj
    z_ptr = proj + 2 * mlp
    conv_in = z_ptr + width
    B_channel = width + group * states + n
    C_channel = B_channel + groups * states
    mixed = conv_in
    if CONV == 2:
        mixed = mixed_ptr + row * channels
    x = tl.load(mixed + x_channel, mask=p_inside, other=0.0)
    B = tl.load(mixed + B_channel, mask=n_inside, other=0.0)
    C = tl.load(mixed + C_channel, mask=n_inside, other=0.0)
    window = conv_state_ptr + row * (TAPS - 1) * channels
    new_x, new_B, new_C = x, B, C
    if CONV == 1:
        x = convolved(new_x, window, conv_weight_ptr, conv_bias_ptr, x_channel, p_inside, channels,
                      TAPS, HAS_BIAS)  # fmt: skip
        B = convolved(new_B, window, conv_weight_ptr, conv_bias_ptr, B_channel, n_inside, channels,
                      TAPS, HAS_BIAS)  # fmt: skip
        C = convolved(new_C, window, conv_weight_ptr, conv_bias_ptr, C_channel, n_inside, channels,
                      TAPS, HAS_BIAS)  # fmt: skip
    x, B, C = x.to(tl.float32), B.to(tl.float32), C.to(tl.float32)

    dt = tl.load(conv_in + channels + head).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias_ptr + head).to(tl.float32))
    dt = tl.minimum(tl.maximum(dt, dt_low), dt_high)
    A = -tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    S = S * tl.exp(dt * A) + (dt * x)[:, None] * B[None, :]
    y = tl.sum(S * C[None, :], axis=1)
    if D_PER_CHANNEL:
        y += tl.load(D_ptr + x_channel, mask=p_inside, other=0.0).to(tl.float32) * x
    else:
        y += tl.load(D_ptr + head).to(tl.float32) * x

    if NORM != 2:
        y *= silu(tl.load(z_ptr + x_channel, mask=p_inside, other=0.0).to(tl.float32))
    out = out_ptr + row * stride_out
    if NORM == 0:
        tl.store(out + mlp + x_channel, y, mask=p_inside)
    else:
        tl.store(scratch_ptr + row * width + x_channel, y, mask=p_inside)

    if BLOCK_MLP > 0:
        m = part * BLOCK_MLP + tl.arange(0, BLOCK_MLP)
        gate = tl.load(proj + m, mask=m < mlp, other=0.0).to(tl.float32)
        value = tl.load(proj + mlp + m, mask=m < mlp, other=0.0).to(tl.float32)
        tl.store(out + m, silu(gate) * value, mask=m < mlp)

    last = False
    if CONV == 1 or NORM != 0:
        # All threads have read B, C and their windows, and written y, before the ticket is taken.
        # The state's store comes after it, or the ticket would wait for all of it.
        tl.debug_barrier()
        ticket = tickets_ptr + row * groups + group
        last = tl.atomic_add(ticket, 1, sem="acq_rel") == per_group * splits - 1
    tl.store(state, S, mask=inside, eviction_policy="evict_first")
    if CONV == 1:
        shift_window(new_x, window, x_channel, p_inside, channels, TAPS)
    if CONV == 1 or NORM != 0:  # noqa: SIM102  (decided when the kernel is compiled)
        if last:
            tl.store(ticket, 0)
            if CONV == 1:
                shift_window(new_B, window, B_channel, n_inside, channels, TAPS)
                shift_window(new_C, window, C_channel, n_inside, channels, TAPS)
            if NORM != 0:
                group_size = per_group * head_dim
                first = group * group_size
                y_ptr = scratch_ptr + row * width + first
                squares = tl.zeros([BLOCK_NORM], tl.float32)
                for start in range(0, group_size, BLOCK_NORM):
                    i = start + tl.arange(0, BLOCK_NORM)
                    y_i = tl.load(y_ptr + i, mask=i < group_size, other=0.0)
                    squares += y_i * y_i
                scale = tl.rsqrt(tl.sum(squares) / group_size + eps)
                for start in range(0, group_size, BLOCK_NORM):
                    i = start + tl.arange(0, BLOCK_NORM)
                    i_inside = i < group_size
                    y_i = tl.load(y_ptr + i, mask=i_inside, other=0.0) * scale
                    weight = tl.load(norm_weight_ptr + first + i, mask=i_inside, other=0.0)
                    y_i *= weight.to(tl.float32)
                    if NORM == 2:
                        z = tl.load(z_ptr + first + i, mask=i_inside, other=0.0)
                        y_i *= silu(z.to(tl.float32))
                    tl.store(out + mlp + first + i, y_i, mask=i_inside)


@triton.jit
def mamba2_step_tile(
    S, state, x, z, D_ptr, norm_weight_ptr, out_ptr, first, at, h, p, n_inside, B, C,
    deltas, decays, D_of_heads,
    D_PER_CHANNEL: tl.constexpr,
    NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK_P channels from `at` on, whose state S was loaded from `state`; y's squares."""
    x, z = x.to(tl.float32), z.to(tl.float32)
    here = h == (first + at) // HEAD_DIM
    delta = tl.sum(tl.where(here, deltas, 0.0))
    decay = tl.sum(tl.where(here, decays, 0.0))
    if D_PER_CHANNEL:
        D = tl.load(D_ptr + first + at + p).to(tl.float32)
    else:
        D = tl.sum(tl.where(here, D_of_heads, 0.0))
    new = S.to(tl.float32) * decay + (delta * x)[:, None] * B[None, :]
    y = tl.sum(new * C[None, :], axis=1) + D * x
    tl.store(state, new, mask=n_inside[None, :], eviction_policy="evict_first")
    y *= silu(z)
    squares = y * y
    if NORM:
        y *= tl.load(norm_weight_ptr + first + at + p).to(tl.float32)
    tl.store(out_ptr + at, y)
    return squares


@triton.jit
def mamba2_step_rows_kernel(
    proj_ptr, ssm_state_ptr, dt_bias_ptr, A_log_ptr, D_ptr, norm_weight_ptr, squares_ptr, out_ptr,
    stride_proj, stride_out, heads, per_group, groups, channels, dt_low, dt_high,
    D_PER_CHANNEL: tl.constexpr,
    NORM: tl.constexpr,  # scale by the norm's weight, and write down the sum of squares before it
    HEAD_DIM: tl.constexpr,
    STATES: tl.constexpr,
    TILES: tl.constexpr,
    EARLY: tl.constexpr,  # tiles whose states are loaded while the kernels before still run
    BLOCK_P: tl.constexpr,  # divides HEAD_DIM
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least the heads that a program meets
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Recurrence, skip and gate. One program: TILES times BLOCK_P channels of one row and group.

    The states of the first EARLY tiles wait in registers for the kernels before; those of the rest
    are fetched STAGES - 1 steps ahead. Nobody reads a state again before the next token, so it
    leaves the L2 cache first.
    """
    begin_next(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (TILES * BLOCK_P)
    width = heads * HEAD_DIM
    group = first // (per_group * HEAD_DIM)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    n_inside = n < STATES
    start = ssm_state_ptr + (row * width + first) * STATES
    state = start + p[:, None] * STATES + n[None, :]
    tiles = ()
    for tile in tl.static_range(EARLY):
        S = tl.load(state + tile * BLOCK_P * STATES, mask=n_inside[None, :], other=0.0,
                    eviction_policy="evict_first")  # fmt: skip
        tiles = tiles + (S,)
    h = first // HEAD_DIM + tl.arange(0, BLOCK_H)
    h_inside = h < heads
    bias = tl.load(dt_bias_ptr + h, mask=h_inside, other=0.0).to(tl.float32)
    A = -tl.exp(tl.load(A_log_ptr + h, mask=h_inside, other=0.0).to(tl.float32))
    D_of_heads = 0.0
    if not D_PER_CHANNEL:
        D_of_heads = tl.load(D_ptr + h, mask=h_inside, other=0.0).to(tl.float32)
    wait_for_all(OVERLAP)

    z_ptr = proj_ptr + row * stride_proj + first
    x_ptr = z_ptr + width
    grouped = proj_ptr + row * stride_proj + 2 * width + group * STATES + n
    dt = tl.load(proj_ptr + row * stride_proj + width + channels + h, mask=h_inside, other=0.0)
    B = tl.load(grouped, mask=n_inside, other=0.0)
    C = tl.load(grouped + groups * STATES, mask=n_inside, other=0.0)
    xs, zs = (), ()
    for tile in tl.static_range(EARLY):
        x = tl.load(x_ptr + tile * BLOCK_P + p)
        z = tl.load(z_ptr + tile * BLOCK_P + p)
        xs, zs = xs + (x,), zs + (z,)
    B, C = B.to(tl.float32), C.to(tl.float32)
    deltas = softplus(dt.to(tl.float32) + bias)
    deltas = tl.minimum(tl.maximum(deltas, dt_low), dt_high)
    decays = tl.exp(deltas * A)
    out = out_ptr + row * stride_out + first + p
    squares = tl.zeros([BLOCK_P], tl.float32)
    for tile in tl.static_range(EARLY):
        squares += mamba2_step_tile(
            tiles[tile], state + tile * BLOCK_P * STATES, xs[tile], zs[tile], D_ptr,
            norm_weight_ptr, out, first, tile * BLOCK_P, h, p, n_inside, B, C, deltas, decays,
            D_of_heads, D_PER_CHANNEL, NORM, HEAD_DIM,
        )  # fmt: skip
    for tile in tl.range(EARLY, TILES, num_stages=STAGES):
        at = tile * BLOCK_P
        S = tl.load(state + at * STATES, mask=n_inside[None, :], other=0.0,
                    eviction_policy="evict_first")  # fmt: skip
        x = tl.load(x_ptr + at + p)
        z = tl.load(z_ptr + at + p)
        squares += mamba2_step_tile(
            S, state + at * STATES, x, z, D_ptr, norm_weight_ptr, out,
            first, at, h, p, n_inside, B, C, deltas, decays, D_of_heads,
            D_PER_CHANNEL, NORM, HEAD_DIM,
        )  # fmt: skip
    if NORM:
        tl.store(squares_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(squares))
