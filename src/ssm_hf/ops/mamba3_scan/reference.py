"""Mamba-3's scan in plain torch: one token, the loop over tokens, and a chunked path.

The loop over `mamba3_step` is the definition. Letters as in the operator's docstring: R ranks, G
groups of B and C, S rotated pairs of the N states.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.mamba3_scan.chunked import Inputs, chunked_scan
from ssm_hf.ops.packing import (
    compute_dtype,
    document_numbers,
    next_real,
    run_per_document,
)
from ssm_hf.ops.ssd.reference import LONGEST_CHUNK
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

    By way of fp64: 2 pi rounded to fp32 is 1.7e-7 too large, and that adds up turn by turn.
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


def rotate(v: Tensor, angle: Tensor, rope_layout: str) -> Tensor:
    """Turn the first S pairs of v (..., N) by the angles (..., S)."""
    n, s = v.shape[-1], angle.shape[-1]
    if not s:
        return v
    cos, sin = angle.cos(), angle.sin()
    if rope_layout == "pairwise":
        a, b = v[..., : 2 * s].unflatten(-1, (s, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        return torch.cat([turned, v[..., 2 * s :]], dim=-1)
    half = n // 2
    a, b = v[..., :s], v[..., half : half + s]
    parts = [a * cos - b * sin, v[..., s:half], a * sin + b * cos, v[..., half + s :]]
    return torch.cat(parts, dim=-1)


def keys(B: Tensor, bias: Tensor | None, angle: Tensor, rope_layout: str) -> Tensor:
    """k (B, H, R, N) of B (B, R, G, N), bias (H, R, N) and θ (B, H, S); and so q of C."""
    groups, heads = B.shape[2], angle.shape[1]
    k = B.transpose(1, 2)[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
    return rotate(k if bias is None else k + bias, angle[:, :, None], rope_layout)


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
    B_bias, C_bias, D, mimo_x, mimo_z, mimo_o = (
        None if w is None else w.to(dtype) for w in (B_bias, C_bias, D, mimo_x, mimo_z, mimo_o)
    )
    delta = step_size(dt, dt_bias, dt_softplus, NO_LIMIT, None).to(dtype)
    share = torch.ones_like(delta) if trap is None else torch.sigmoid(trap.to(dtype))
    angle = state.angle.to(dtype)
    if angles is not None:
        turn = math.pi * torch.tanh(angles.to(dtype))
        angle = wrap(angle + turn[:, None] * delta[..., None])
    k, q = (keys(v.to(dtype), w, angle, rope_layout) for v, w in ((B, B_bias), (C, C_bias)))
    # (B, H, R, P)
    v, v_before = (u.to(dtype)[:, :, None] for u in (x, state.v))
    if mimo_x is not None:
        v, v_before = v * mimo_x, v_before * mimo_x

    decay = torch.exp(delta * A.to(dtype))
    before, now = (1 - share) * delta * decay, share * delta
    # What both tokens add to the state is one product over their ranks.
    added = torch.cat([before[..., None, None] * v_before, now[..., None, None] * v], dim=2)
    k_pair = torch.cat([state.k.to(dtype).transpose(1, 2), k], dim=2)
    ssm = decay[..., None, None] * state.ssm.to(dtype) + added.transpose(2, 3) @ k_pair

    y = q @ ssm.transpose(2, 3)
    if D is not None:
        y = y + D[:, None, None] * v
    if z is not None:
        gate = z.to(dtype)[:, :, None]
        y = y * F.silu(gate if mimo_z is None else gate * mimo_z)
    if mimo_o is not None:
        y = (y * mimo_o).sum(dim=2)
    else:
        y = y[:, :, 0] if y.shape[2] == 1 else y.transpose(1, 2)
    return y.to(x.dtype), Mamba3State(angle, ssm, k.transpose(1, 2).to(x.dtype), x)


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

    Source: Lahoti et al. 2026, "Mamba-3" (arXiv 2603.15569).
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
    weights = {
        "D": D, "B_bias": B_bias, "C_bias": C_bias,
        "mimo_x": mimo_x, "mimo_z": mimo_z, "mimo_o": mimo_o,
    }  # fmt: skip

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
        state = initial_state or zero_state(x, B, angles, dtype)
        if x.shape[1] == 1 and mask is None:
            trap_1, angles_1, z_1 = (None if v is None else v[:, 0] for v in (trap, angles, z))
            y, state = mamba3_step(
                x[:, 0], dt[:, 0], A[:, 0], trap_1, B[:, 0], C[:, 0], angles_1, z=z_1, **weights,
                dt_bias=dt_bias, dt_softplus=dt_softplus, rope_layout=rope_layout, state=state,
            )  # fmt: skip
            return y[:, None], state
        delta = step_size(dt, dt_bias, dt_softplus, NO_LIMIT, mask).to(dtype)
        doc = None if seq_idx is None else document_numbers(seq_idx, mask)
        return mamba3_chunked(
            x, delta, A, trap, B, C, angles, z, weights, rope_layout, state, doc, mask, chunk_size
        )

    sequences = {
        "x": x, "dt": dt, "A": A, "trap": trap, "B": B, "C": C, "angles": angles, "z": z,
    }  # fmt: skip
    if cu_seqlens is not None:
        return run_per_document(run, sequences, cu_seqlens, initial_state, mask)
    return run(x, dt, A, trap, B, C, angles, z, initial_state, mask)


def _first_pairs(n: int, s: int, rope_layout: str, device: torch.device) -> Tensor:
    """Index (N,) that puts the rotated pairs at (i, i + S) and the rest behind them."""
    place = torch.arange(n, device=device)
    if rope_layout == "pairwise":
        return torch.cat([place[: 2 * s : 2], place[1 : 2 * s : 2], place[2 * s :]])
    half = n // 2
    return torch.cat([place[:s], place[half : half + s], place[s:half], place[half + s :]])


def _neighbours(lag: Tensor, doc: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of lag (B, T, H), 0 at pads: that of the real token after each real token of its document,
    else 0, and that of the row's first real token (B, H).
    """
    length = lag.shape[1]
    if mask is None:
        after, first = F.pad(lag[:, 1:], (0, 0, 0, 1)), lag[:, 0]
        if doc is not None:
            after = after * F.pad(doc[:, 1:] == doc[:, :-1], (0, 1))[..., None]
        return after, first
    following = next_real(mask)
    index = following.clamp(max=length - 1)
    joined = mask & (following < length)
    if doc is not None:
        joined = joined & (doc.gather(1, index) == doc)
    after = lag.gather(1, index[..., None].expand(lag.shape)) * joined[..., None]
    start = mask.int().argmax(dim=1)
    return after, lag[torch.arange(lag.shape[0], device=lag.device), start]


def _chunk_angles(
    turn: Tensor, delta: Tensor, doc: Tensor | None, angle: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """θ before each chunk (c, B, H, S), and after the last token (B, H, S).

    Within a row only differences of angles matter, so θ before a chunk is counted from the row's
    start. θ after the last token is counted from the start of its document, and with several
    documents comes with what it differs by from the row's.

    turn (c, B, Q, S), delta (c, B, Q, H), doc (c, B, Q), angle (B, H, S) before the row. In fp64:
    sums over a long row would lose digits that a phase needs.
    """
    dtype, angle = delta.dtype, angle.double()
    turn, delta = turn.double(), delta.double()
    turned = torch.einsum("cbqs,cbqh->cbhs", turn, delta).cumsum(dim=0)
    entry = wrap(torch.cat([angle[None], angle + turned[:-1]])).to(dtype)
    through = angle + turned[-1]
    if doc is None:
        return entry, wrap(through).to(dtype), None
    number = doc[-1, :, -1:]
    here = delta * (doc == number)[..., None]
    last = torch.einsum("cbqs,cbqh->bhs", turn, here) + angle * (number == 0)[..., None]
    return entry, wrap(last).to(dtype), wrap(last - through).to(dtype)


def mamba3_chunked(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    z: Tensor | None,
    weights: dict[str, Tensor | None],
    rope_layout: str,
    state: Mamba3State,
    doc: Tensor | None,
    mask: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Mamba3State]:
    """Vectorised path: the recurrence as one of SSD's kind, see `chunked_scan`.

    delta (B, T, H) is Δ, 0 at pads; doc (B, T) canonical document numbers.
    """
    dtype = delta.dtype
    batch, length, heads, _ = x.shape
    ranks, _, n = B.shape[2:]
    weights = {name: None if w is None else w.to(dtype) for name, w in weights.items()}
    B_bias, C_bias, mimo_x = weights["B_bias"], weights["C_bias"], weights["mimo_x"]
    own, lag = delta, torch.zeros_like(delta)
    if trap is not None:
        trap = trap.to(dtype)
        own, lag = delta * torch.sigmoid(trap), delta * torch.sigmoid(-trap)
    after, first = _neighbours(lag, doc, mask)

    # Later tokens find the last one's lagged term in the state: so it enters here.
    k_before, v_before = state.k.to(dtype), state.v.to(dtype)
    v_ranks = v_before[:, None] if mimo_x is None else v_before[:, None] * mimo_x.transpose(0, 1)
    entering = torch.einsum("brhp,brhn->bhpn", v_ranks, k_before)
    entering = state.ssm.to(dtype) + first[..., None, None] * entering

    # As many rows as ssd's chunks have, but not so short that the states take all the memory.
    size = min(chunk_size, max(LONGEST_CHUNK // ranks, LONGEST_CHUNK // 2), length)
    pad = -length % size

    def split(v: Tensor) -> Tensor:
        """(B, T, ...) -> (c, B, Q, ...); tokens added at the end have Δ = 0."""
        if pad:
            v = F.pad(v, (*[0, 0] * (v.ndim - 2), 0, pad))
        return v.unflatten(1, (-1, size)).transpose(0, 1)

    chunk_doc = None
    if doc is not None:
        chunk_doc = torch.cat([doc, doc[:, -1:].expand(-1, pad)], dim=1)
        chunk_doc = chunk_doc.unflatten(1, (-1, size)).transpose(0, 1)
    deltas = split(delta)
    turn = angle = order = offset = None
    last_angle = state.angle.to(dtype)
    if angles is not None:
        turn = split(math.pi * torch.tanh(angles.to(dtype)))
        angle, last_angle, offset = _chunk_angles(turn, deltas, chunk_doc, last_angle)
        order = _first_pairs(n, angles.shape[-1], rope_layout, x.device)

    def ordered(v: Tensor) -> Tensor:
        return v if order is None else v[..., order]

    # Chunks processed at once: few on a CPU, whose cache they should fit, many on a GPU.
    elements = 2**20 if x.device.type == "cpu" else 2**26
    rows = size * ranks
    batch_of_chunks = max(1, elements // (batch * heads * rows * (rows + 2 * n)))
    inputs = Inputs(
        x=split(x),
        B=split(ordered(B)),
        C=split(ordered(C)),
        z=None if z is None else split(z),
        turn=turn,
        delta=deltas,
        exponent=split(delta * A.to(dtype)),
        scale=split(own + after),
        own=split(own),
        angle=angle,
        state=ordered(entering),
        B_bias=None if B_bias is None else ordered(B_bias),
        C_bias=None if C_bias is None else ordered(C_bias),
        D=weights["D"],
        mimo_x=mimo_x,
        mimo_z=weights["mimo_z"],
        mimo_o=weights["mimo_o"],
    )
    y, ssm = chunked_scan(inputs, chunk_doc, batch_of_chunks)
    y = y.transpose(0, 1).flatten(1, 2)[:, :length]
    if order is not None:
        ssm = ssm[..., order.argsort()]
    if offset is not None:
        ssm = rotate(ssm, offset[:, :, None], rope_layout)

    if mask is None:
        k, v = B[:, -1], x[:, -1].clone()  # a state should not keep all of x in memory
    else:
        y = y * mask.view(batch, length, *[1] * (y.ndim - 2))
        last = length - 1 - mask.flip(1).int().argmax(dim=1)
        row = torch.arange(batch, device=x.device)
        k, v = B[row, last], x[row, last]
    k = keys(k.to(dtype), B_bias, last_angle, rope_layout).transpose(1, 2)
    if mask is not None:
        nothing = ~mask.any(dim=1)
        k = torch.where(nothing[:, None, None, None], k_before, k)
        v = torch.where(nothing[:, None, None], v_before.to(v.dtype), v)
    return y, Mamba3State(last_angle, ssm, k.to(x.dtype), v)
