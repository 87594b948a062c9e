"""Triton kernel of Mamba-3's whole step between its two projections, in place on the cache."""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from ssm_hf.ops.causal_conv1d.kernels_step import silu
from ssm_hf.ops.kernels_overlap import wait_for_previous
from ssm_hf.ops.mamba3_scan.kernels_prepare import tanh
from ssm_hf.ops.ssd.kernels import softplus

PI = tl.constexpr(3.141592653589793)
TURN = tl.constexpr(6.283185307179586)
# 2 pi in two parts; small multiples of the first are exact.
TURN_HIGH = tl.constexpr(6.28125)
TURN_LOW = tl.constexpr(0.0019353071795864769)


@triton.jit
def wrap(angle):
    """Angle in [0, 2 pi)."""
    turns = tl.floor(angle * (1.0 / TURN))
    angle = (angle - turns * TURN_HIGH) - turns * TURN_LOW
    angle = tl.where(angle < 0.0, angle + TURN, angle)
    return tl.where(angle >= TURN, 0.0, angle)


@triton.jit
def normed_column(from_ptr, weight_ptr, bias_ptr, n, inside, scale):
    """Columns n of RMSNorm(B) + bias, where scale is 1 / rms."""
    value = tl.load(from_ptr + n, mask=inside, other=0.0).to(tl.float32) * scale
    value *= tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def turned_row(
    from_ptr, weight_ptr, bias_ptr, n, partner, n_in, states, eps, cos, sin, ROPE: tl.constexpr
):
    """q or k of one rank: norm, bias, rotation. sin has the sign that n's partner is added with."""
    row = tl.load(from_ptr + n, mask=n_in, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / states + eps)
    value = normed_column(from_ptr, weight_ptr, bias_ptr, n, n_in, scale)
    if ROPE:
        other = normed_column(from_ptr, weight_ptr, bias_ptr, partner, n_in, scale)
        value = value * cos + other * sin
    return value


@triton.jit
def mamba3_step_kernel(
    proj_ptr, angle_ptr, ssm_ptr, k_ptr, v_ptr, tickets_ptr, B_norm_ptr, C_norm_ptr, B_bias_ptr,
    C_bias_ptr, dt_bias_ptr, D_ptr, mx_ptr, mz_ptr, mo_ptr, norm_ptr, out_ptr,
    stride_proj, stride_out, heads, groups, head_dim, states, pairs, splits, eps, A_floor,
    RANKS: tl.constexpr,
    HEAVY_TAIL: tl.constexpr,
    TRAPEZOID: tl.constexpr,
    ROPE: tl.constexpr,
    PAIRWISE: tl.constexpr,
    FAST: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P channels of one head of one row.

    The head's k and angle are read by all its programs; the one that takes the last ticket moves
    them on. Without SPLIT there is one program and no ticket.
    """
    per_row = heads * splits
    row = (tl.program_id(0) // per_row).to(tl.int64)
    part = tl.program_id(0) % per_row
    head = part // splits
    group = head // (heads // groups)
    width = heads * head_dim

    p = (part % splits) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_in, n_in = p < head_dim, n < states
    channel = head * head_dim + p

    # The long load first.
    state = ssm_ptr + ((row * heads + head) * head_dim + p[:, None]) * states + n[None, :]
    inside = p_in[:, None] & n_in[None, :]
    S = tl.load(state, mask=inside, other=0.0).to(tl.float32)

    wait_for_previous(OVERLAP)
    z_base = proj_ptr + row * stride_proj
    B_base = z_base + 2 * width
    C_base = B_base + RANKS * groups * states
    dt_base = C_base + RANKS * groups * states
    delta = tl.load(dt_base + head).to(tl.float32)
    delta = softplus(delta + tl.load(dt_bias_ptr + head).to(tl.float32))
    rate = tl.load(dt_base + heads + head).to(tl.float32)
    if HEAVY_TAIL:
        rate = tl.where(rate >= 0.0, 1.0 + rate, 1.0 / (1.0 - tl.minimum(rate, 0.0)))
    else:
        rate = softplus(rate)
    decay = tl.exp(-delta * tl.maximum(rate, A_floor))
    share = 1.0
    angles = dt_base + 2 * heads
    if TRAPEZOID:
        share = 1.0 / (1.0 + tl.exp(-tl.load(dt_base + 2 * heads + head).to(tl.float32)))
        angles = dt_base + 3 * heads

    cos, sin, partner = 1.0, 0.0, n
    at_angle = angle_ptr + (row * heads + head) * pairs
    s = tl.arange(0, BLOCK_S)
    s_in = s < pairs
    angle = tl.zeros((BLOCK_S,), tl.float32)
    if ROPE:
        half = states // 2
        if PAIRWISE:
            pair, second = n // 2, n % 2 == 1
            partner = tl.where(second, n - 1, n + 1)
        else:
            pair, second = n % half, n >= half
            partner = tl.where(second, n - half, n + half)
        turns = n_in & (pair < pairs)
        pair = tl.where(turns, pair, 0)
        partner = tl.where(turns, partner, n)
        of_n = tl.load(at_angle + pair, mask=turns, other=0.0).to(tl.float32)
        raw = tl.load(angles + pair, mask=turns, other=0.0).to(tl.float32)
        of_n = wrap(of_n + PI * tanh(raw) * delta)
        of_n = tl.where(of_n > PI, of_n - TURN, of_n)
        if FAST:
            cos, sin = libdevice.fast_cosf(of_n), libdevice.fast_sinf(of_n)
        else:
            cos, sin = tl.cos(of_n), tl.sin(of_n)
        cos = tl.where(turns, cos, 1.0)
        sin = tl.where(turns, tl.where(second, sin, -sin), 0.0)
        raw = tl.load(angles + s, mask=s_in, other=0.0).to(tl.float32)
        angle = tl.load(at_angle + s, mask=s_in, other=0.0).to(tl.float32)
        angle = wrap(angle + PI * tanh(raw) * delta)

    x = tl.load(z_base + width + channel, mask=p_in, other=0.0)
    at_v = v_ptr + row * width + channel
    before = tl.load(at_v, mask=p_in, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    S *= decay
    for r in tl.static_range(RANKS):
        at_k = k_ptr + ((row * RANKS + r) * heads + head) * states
        at_B = B_base + (r * groups + group) * states
        B_bias = B_bias_ptr
        if B_bias_ptr is not None:
            B_bias = B_bias_ptr + (head * RANKS + r) * states
        k = turned_row(at_B, B_norm_ptr, B_bias, n, partner, n_in, states, eps, cos, sin, ROPE)
        factor = tl.full((BLOCK_P,), 1.0, tl.float32)
        if mx_ptr is not None:
            at_m = mx_ptr + (head * RANKS + r) * head_dim + p
            factor = tl.load(at_m, mask=p_in, other=0.0).to(tl.float32)
        if TRAPEZOID:
            k_before = tl.load(at_k + n, mask=n_in, other=0.0).to(tl.float32)
            lag = factor * before * ((1.0 - share) * delta * decay)
            S += lag[:, None] * k_before[None, :]
        S += (factor * wide * (share * delta))[:, None] * tl.where(n_in, k, 0.0)[None, :]
    y = tl.zeros((BLOCK_P,), tl.float32)
    z = tl.load(z_base + channel, mask=p_in, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + head).to(tl.float32)
    for r in tl.static_range(RANKS):
        at_C = C_base + (r * groups + group) * states
        C_bias = C_bias_ptr
        if C_bias_ptr is not None:
            C_bias = C_bias_ptr + (head * RANKS + r) * states
        q = turned_row(at_C, C_norm_ptr, C_bias, n, partner, n_in, states, eps, cos, sin, ROPE)
        of_rank = tl.sum(S * tl.where(n_in, q, 0.0)[None, :], axis=1)
        at_m = (head * RANKS + r) * head_dim + p
        v = wide
        if mx_ptr is not None:
            v = wide * tl.load(mx_ptr + at_m, mask=p_in, other=0.0).to(tl.float32)
        of_rank += D * v
        if norm_ptr is not None:
            of_rank = tl.where(p_in, of_rank, 0.0)
            of_rank *= tl.rsqrt(tl.sum(of_rank * of_rank, axis=0) / head_dim + eps)
            of_rank *= tl.load(norm_ptr + channel, mask=p_in, other=0.0).to(tl.float32)
        gate = z
        if mz_ptr is not None:
            gate = z * tl.load(mz_ptr + at_m, mask=p_in, other=0.0).to(tl.float32)
        of_rank *= silu(gate)
        if mo_ptr is not None:
            of_rank *= tl.load(mo_ptr + at_m, mask=p_in, other=0.0).to(tl.float32)
        y += of_rank
    tl.store(out_ptr + row * stride_out + channel, y.to(out_ptr.dtype.element_ty), mask=p_in)

    # All threads have read k and the angle before either is written.
    tl.debug_barrier()
    last = True
    if SPLIT:
        ticket = tickets_ptr + row * heads + head
        last = tl.atomic_add(ticket, 1, sem="acq_rel") == splits - 1
    tl.store(state, S.to(ssm_ptr.dtype.element_ty), mask=inside)
    tl.store(at_v, x.to(v_ptr.dtype.element_ty), mask=p_in)
    if last:
        if SPLIT:
            tl.store(tickets_ptr + row * heads + head, 0)
        if ROPE:
            tl.store(at_angle + s, angle.to(angle_ptr.dtype.element_ty), mask=s_in)
        for r in tl.static_range(RANKS):
            at_k = k_ptr + ((row * RANKS + r) * heads + head) * states
            at_B = B_base + (r * groups + group) * states
            B_bias = B_bias_ptr
            if B_bias_ptr is not None:
                B_bias = B_bias_ptr + (head * RANKS + r) * states
            k = turned_row(at_B, B_norm_ptr, B_bias, n, partner, n_in, states, eps, cos, sin, ROPE)
            tl.store(at_k + n, k.to(k_ptr.dtype.element_ty), mask=n_in)
