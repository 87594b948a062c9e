"""Mamba-3's scan in plain torch: one token, the loop over tokens, and a chunked path.

The loop over `mamba3_step` is the definition. Letters as in the operator's docstring: R ranks, G
groups of B and C, S rotated pairs of the N states.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import (
    compute_dtype,
    document_numbers,
    next_real,
    run_per_document,
)
from ssm_hf.ops.ssd.reference import chunk_decays
from ssm_hf.ops.step_size import step_size

NO_LIMIT = (0.0, float("inf"))


class Mamba3State(NamedTuple):
    """What one token needs of those before it.

    angle: (B, H, S) θ in [0, 2 pi), fp32 or wider. ssm: (B, H, P, N) S, fp32 or wider. k: (B, R, H,
    N) the last token's k, with bias and rotation, in x's dtype. v: (B, H, P) the last token's x.
    """

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


def wrap(angle: Tensor) -> Tensor:
    """Angle in [0, 2 pi), in its dtype.

    By way of fp64: 2 pi rounded to fp32 is 1.7e-7 too large, an error that grows with every turn.
    """
    turn = 2 * math.pi
    wrapped = torch.remainder(angle.double(), turn).to(angle.dtype)
    # A tiny negative angle may round to a whole turn.
    return wrapped - turn * (wrapped >= turn)


def rope_permutation(n: int, s: int) -> Tensor:
    """Index p (N,): what is rotated in pairs (2i, 2i+1) is, as v[..., p], rotated in (i, i + N/2).

    With B, C, their biases and the N axis of the states permuted so, `rope_layout="half"` gives
    exactly what `"pairwise"` gives without. n even, 0 <= 2 s <= n.
    """
    if n % 2 or not 0 <= 2 * s <= n:
        raise ValueError(f"rope_permutation needs an even n and 0 <= 2 s <= n, got n={n}, s={s}")
    rest = torch.arange(2 * s, n).view(2, -1)
    pairs = torch.arange(2 * s).view(-1, 2).T
    return torch.cat([pairs, rest], dim=1).flatten()


def rotate(v: Tensor, cos: Tensor, sin: Tensor, rope_layout: str) -> Tensor:
    """Turn the first S pairs of v (..., N) by angles given as cos, sin (..., S)."""
    s = cos.shape[-1]
    if rope_layout == "pairwise":
        a, b = v[..., : 2 * s].unflatten(-1, (s, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        return torch.cat([turned, v[..., 2 * s :]], dim=-1)
    half = v.shape[-1] // 2
    a, b = v[..., :s], v[..., half : half + s]
    parts = [a * cos - b * sin, v[..., s:half], a * sin + b * cos, v[..., half + s :]]
    return torch.cat(parts, dim=-1)


def keys(B: Tensor, bias: Tensor | None, angle: Tensor, heads: int, rope_layout: str) -> Tensor:
    """k (..., R, H, N) of B (..., R, G, N), bias (H, R, N) and θ (..., H, S); the same for q, C."""
    k = B.repeat_interleave(heads // B.shape[-2], dim=-2)
    if bias is not None:
        k = k + bias.transpose(0, 1)
    if angle.shape[-1]:
        angle = angle.unsqueeze(-3)
        k = rotate(k, angle.cos(), angle.sin(), rope_layout)
    return k


def zero_state(x: Tensor, B: Tensor, angles: Tensor | None, dtype: torch.dtype) -> Mamba3State:
    """The state before any token, for x (B, ..., H, P), B (B, ..., R, G, N), angles (B, ..., S)."""
    batch, (heads, head_dim) = x.shape[0], x.shape[-2:]
    ranks, _, states = B.shape[-3:]
    pairs = 0 if angles is None else angles.shape[-1]
    return Mamba3State(
        angle=x.new_zeros(batch, heads, pairs, dtype=dtype),
        ssm=x.new_zeros(batch, heads, head_dim, states, dtype=dtype),
        k=x.new_zeros(batch, ranks, heads, states),
        v=x.new_zeros(batch, heads, head_dim),
    )


def finish(
    y: Tensor,
    v: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
) -> Tensor:
    """Skip, gate and contraction of y (..., R, H, P), with v of the same shape and z (..., H, P).

    (..., H, P), or (..., R, H, P) without mimo_o and with several ranks.
    """
    if D is not None:
        y = y + D[:, None] * v
    if z is not None:
        gate = z.unsqueeze(-3)
        y = y * F.silu(gate if mimo_z is None else gate * mimo_z.transpose(0, 1))
    if mimo_o is not None:
        return (y * mimo_o.transpose(0, 1)).sum(dim=-3)
    return y.squeeze(-3) if y.shape[-3] == 1 else y


def mamba3_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    rope_layout: str = "pairwise",
    state: Mamba3State | None,
) -> tuple[Tensor, Mamba3State]:
    """One token: x (B, H, P), dt, A, trap (B, H), B, C (B, R, G, N), angles (B, S), z (B, H, P).

    y (B, H, P) in x's dtype, or (B, R, H, P) without mimo_o and with several ranks, and the next
    state. Weights and meaning as in `mamba3_scan`.
    """
    dtype = compute_dtype(x, dt, A, None if state is None else state.ssm)
    if state is None:
        state = zero_state(x, B, angles, dtype)
    x_wide, A, B, C = (v.to(dtype) for v in (x, A, B, C))
    delta = step_size(dt, dt_bias, dt_softplus, NO_LIMIT, None).to(dtype)
    share = torch.ones_like(delta) if trap is None else torch.sigmoid(trap.to(dtype))
    angle = state.angle.to(dtype)
    if angles is not None:
        turn = math.pi * torch.tanh(angles.to(dtype))
        angle = wrap(angle + turn[:, None] * delta[..., None])
    B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o = (
        None if v is None else v.to(dtype) for v in (B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o)
    )
    k, q = (keys(v, w, angle, x.shape[1], rope_layout) for v, w in ((B, B_bias), (C, C_bias)))

    def per_rank(v: Tensor) -> Tensor:
        return v[:, None] if mimo_x is None else v[:, None] * mimo_x.transpose(0, 1)

    def outer(v: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("brhp,brhn->bhpn", per_rank(v), k)

    decay = torch.exp(delta * A)
    before = ((1 - share) * delta * decay)[..., None, None] * outer(
        state.v.to(dtype), state.k.to(dtype)
    )
    now = (share * delta)[..., None, None] * outer(x_wide, k)
    ssm = decay[..., None, None] * state.ssm.to(dtype) + before + now
    y = torch.einsum("bhpn,brhn->brhp", ssm, q)
    y = finish(y, per_rank(x_wide), D, z, mimo_z, mimo_o)
    return y.to(x.dtype), Mamba3State(angle, ssm, k.to(x.dtype), x)


def mamba3_scan_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    initial_state: Mamba3State | None = None,
    **weights: Tensor | bool | str | None,
) -> tuple[Tensor, Mamba3State]:
    """The definition, one token at a time; arguments as `mamba3_scan`, without packing and masks.

    Source: Lahoti et al. 2026, section 3.
    """
    state, outputs = initial_state, []
    for t in range(x.shape[1]):
        trap_t, angles_t, z_t = (None if v is None else v[:, t] for v in (trap, angles, z))
        y, state = mamba3_step(
            x[:, t], dt[:, t], A[:, t], trap_t, B[:, t], C[:, t], angles_t, D, z_t,
            **weights, state=state,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        outputs.append(y)
    assert state is not None
    return torch.stack(outputs, dim=1), state


def mamba3_scan_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    rope_layout: str,
    initial_state: Mamba3State | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Mamba3State]:
    """y and the final state; arguments as `mamba3_scan` takes them."""
    dtype = compute_dtype(x, dt, A, None if initial_state is None else initial_state.ssm)

    def run(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        trap: Tensor | None,
        B: Tensor,
        C: Tensor,
        angles: Tensor | None,
        z: Tensor | None,
        initial_state: Mamba3State | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Mamba3State]:
        state = zero_state(x, B, angles, dtype) if initial_state is None else initial_state
        doc = None if seq_idx is None else document_numbers(seq_idx, mask)
        return _chunked(
            x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o,
            dt_bias, dt_softplus, rope_layout, state, doc, mask, chunk_size, dtype,
        )  # fmt: skip

    sequences = {
        "x": x, "dt": dt, "A": A, "trap": trap, "B": B, "C": C, "angles": angles, "z": z,
    }  # fmt: skip
    if cu_seqlens is not None:
        return run_per_document(run, sequences, cu_seqlens, initial_state, mask)
    if x.shape[1] == 1 and mask is None:
        y, state = mamba3_step(
            x[:, 0], dt[:, 0], A[:, 0], *(None if v is None else v[:, 0] for v in (trap, B, C, angles)), D,  # noqa: E501 # pyright: ignore
            None if z is None else z[:, 0], B_bias=B_bias, C_bias=C_bias, mimo_x=mimo_x,
            mimo_z=mimo_z, mimo_o=mimo_o, dt_bias=dt_bias, dt_softplus=dt_softplus,
            rope_layout=rope_layout, state=initial_state,
        )  # fmt: skip
        return y[:, None], state
    return run(**sequences, initial_state=initial_state, mask=mask)  # pyright: ignore


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    rope_layout: str,
    state: Mamba3State,
    doc: Tensor | None,
    mask: Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Mamba3State]:
    """Vectorised path through the identity with SSD (docs/math/mamba3_scan.md)."""
    batch, length, heads, _ = x.shape
    out_dtype = x.dtype
    x, A, B, C, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o = (
        None if v is None else v.to(dtype)
        for v in (x, A, B, C, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o)
    )
    assert x is not None
    assert A is not None
    assert B is not None
    assert C is not None
    delta = step_size(dt, dt_bias, dt_softplus, NO_LIMIT, mask).to(dtype)
    if trap is None:
        now, lag = delta, torch.zeros_like(delta)
    else:
        now, lag = delta * torch.sigmoid(trap.to(dtype)), delta * torch.sigmoid(-trap.to(dtype))
    # What the next real token of the same document adds of this one.
    if mask is None:
        after = F.pad(lag[:, 1:], (0, 0, 0, 1))
        first, last = lag[:, 0], torch.full((batch,), length - 1, device=x.device)
        any_real = None
        following = torch.arange(1, length + 1, device=x.device).expand(batch, -1)
    else:
        following = next_real(mask)
        index = following.clamp(max=length - 1)
        after = lag.gather(1, index[..., None].expand(lag.shape))
        after = after * (mask & (following < length))[..., None]
        first = lag.gather(1, mask.int().argmax(1)[:, None, None].expand(-1, 1, heads))[:, 0]
        last = length - 1 - mask.flip(1).int().argmax(1)
        any_real = mask.any(dim=1)
    if doc is not None:
        same = doc.gather(1, following.clamp(max=length - 1)) == doc
        after = after * same[..., None]

    def per_rank(v: Tensor) -> Tensor:
        return v.unsqueeze(-3) if mimo_x is None else v.unsqueeze(-3) * mimo_x.transpose(0, 1)

    k_before, v_before = state.k.to(dtype), state.v.to(dtype)
    entering = state.ssm.to(dtype) + first[..., None, None] * torch.einsum(
        "brhp,brhn->bhpn", per_rank(v_before), k_before
    )
    # Angles of all tokens
    theta = state.angle.to(dtype)[:, None].expand(batch, length, -1, -1)
    if angles is not None:
        phi = math.pi * torch.tanh(angles.to(dtype))[:, :, None] * delta[..., None]
        total = phi.cumsum(1)
        if doc is not None:
            position = torch.arange(length, device=x.device)
            starts = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0))
            start = torch.where(starts, position, 0).cummax(1).values
            offset = F.pad(total, (0, 0, 0, 0, 1, 0)).gather(
                1, start[..., None, None].expand(total.shape)
            )
            theta = torch.where((doc == 0)[..., None, None], theta, 0) - offset
        theta = wrap(theta + total)
    k, q = (keys(v, w, theta, heads, rope_layout) for v, w in ((B, B_bias), (C, C_bias)))
    v = per_rank(x)
    y, ssm = _scan(q, k, v, delta * A, now + after, now, entering, doc, chunk_size)
    y = finish(y, v, D, z, mimo_z, mimo_o)
    if mask is not None:
        y = y * mask.view(batch, length, *[1] * (y.ndim - 2))
    rows = torch.arange(batch, device=x.device)
    angle, k_last, v_last = theta[rows, -1], k[rows, last], x[rows, last]
    if any_real is not None:
        k_last = torch.where(any_real[:, None, None, None], k_last, k_before)
        v_last = torch.where(any_real[:, None, None], v_last, v_before)
    if angles is None:
        angle = state.angle.to(dtype)
    return y.to(out_dtype), Mamba3State(angle, ssm, k_last.to(out_dtype), v_last.to(out_dtype))


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponent: Tensor,
    scale: Tensor,
    diagonal: Tensor,
    state: Tensor,
    doc: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    batch, length, ranks, heads = q.shape[:4]
    size = min(chunk_size, 64, length)
    pad = -length % size

    def split(u: Tensor) -> Tensor:
        """(B, T, [R,] H, ...) -> (c, B, H, Q, [R,] ...)."""
        if pad:
            u = F.pad(u, (*[0, 0] * (u.ndim - 2), 0, pad))
        u = u.unflatten(1, (-1, size)).transpose(0, 1)
        return u.movedim(4, 2) if u.ndim > 4 else u.movedim(3, 2)

    if doc is not None:
        doc = torch.cat([doc, doc[:, -1:].expand(-1, pad)], dim=1)
        doc = doc.view(batch, -1, size).transpose(0, 1)
        before = F.pad(doc[:, :, -1], (0, 0, 1, 0))[:-1]
    else:
        before = None
    q, k, v = (split(u) for u in (q, k, v))
    scale, diagonal = split(scale), split(diagonal)
    M, from_entry, to_exit, whole = chunk_decays(
        split(exponent).transpose(2, 3)[:, :, None], doc, before
    )
    M = M[:, :, 0].tril(-1) * scale[..., None, :] + torch.diag_embed(diagonal)
    from_entry = from_entry[:, :, 0, :, :, 0].transpose(2, 3)
    to_exit = to_exit[:, :, 0, :, :, 0].transpose(2, 3)
    whole = whole[:, :, 0, 0]
    outputs = []
    for i in range(q.shape[0]):
        weights = torch.einsum("bhtrn,bhsun->bhtrsu", q[i], k[i]) * M[i][:, :, :, None, :, None]
        y = torch.einsum("bhtrsu,bhsup->bhtrp", weights, v[i])
        y = y + torch.einsum("bhtrn,bhpn,bht->bhtrp", q[i], state, from_entry[i])
        outputs.append(y)
        added = torch.einsum("bht,bhtrp,bhtrn->bhpn", to_exit[i] * scale[i], v[i], k[i])
        state = whole[i][..., None] * state + added
    y = torch.stack(outputs).permute(1, 0, 3, 4, 2, 5).flatten(1, 2)[:, :length]
    return y, state
