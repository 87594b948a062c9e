"""Mamba-2's scan (state-space duality) in plain torch: the equations, a chunked path, one step.

`ssd_torch` is the whole operator. The functions below it take Δ ready made and know no D and gate:
x (B, T, H, P), dt (B, T, H), A (H,), B, C (B, T, G, N), state (B, H, P, N); head h reads group
h // (H / G).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import (
    backward_in_given_precision,
    compute_dtype,
    document_numbers,
    document_starts,
    run_per_document,
)
from ssm_hf.ops.step_size import step_size

# Longer chunks cost more inside the chunk, shorter ones more between chunks; on CPUs 64 is best.
LONGEST_CHUNK = 64


def ssd_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y and the final state; arguments as `ssd` takes them."""
    dtype = compute_dtype(x, dt, A, initial_state)
    u, A_wide, B_wide, C_wide = (v.to(dtype) for v in (x, A, B, C))
    delta = step_size(dt, dt_bias, dt_softplus, dt_limit, mask).to(dtype)
    state_shape = (*x.shape[2:], B.shape[-1])

    def entry(x: Tensor, initial_state: Tensor | None) -> Tensor:
        if initial_state is None:
            return x.new_zeros(x.shape[0], *state_shape)
        return initial_state.to(dtype)

    def run(
        x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Pads of the packed batch hold the state as masked tokens do.
        state = entry(x, initial_state)
        return ssd_chunked(x, dt * mask[..., None], A_wide, B, C, state, None, chunk_size)

    if cu_seqlens is not None:
        sequences = {"x": u, "dt": delta, "B": B_wide, "C": C_wide}
        y, state = run_per_document(run, sequences, cu_seqlens, initial_state, mask)
    elif x.shape[1] == 1:
        state = entry(u, initial_state)
        y, state = ssd_step(u[:, 0], delta[:, 0], A_wide, B_wide[:, 0], C_wide[:, 0], state)
        y = y[:, None]
    else:
        doc = None if seq_idx is None else document_numbers(seq_idx, mask)
        state = entry(u, initial_state)
        y, state = ssd_chunked(u, delta, A_wide, B_wide, C_wide, state, doc, chunk_size)
    if D is not None:
        y = torch.addcmul(y, D.to(dtype) if D.ndim == 2 else D.to(dtype)[:, None], u)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if mask is not None:
        y = y * mask[..., None, None]
    return y.to(x.dtype), state


def ssd_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    doc: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time (Dao and Gu 2024, equation 1)."""
    starts = None if doc is None else document_starts(doc)
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = state * ~starts[:, t, None, None, None]
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: S <- exp(Δ A) S + Δ x ⊗ B, y = S C; x (B, H, P), dt (B, H), B, C (B, G, N)."""
    per_group = x.shape[1] // B.shape[1]
    B, C = (v.repeat_interleave(per_group, dim=1)[:, :, None] for v in (B, C))
    decayed = torch.exp(dt * A)[..., None, None] * state
    state = torch.addcmul(decayed, (dt[..., None] * x)[..., None], B)
    # Six times faster on a CPU than a batched matrix-vector product.
    return torch.linalg.vecdot(state, C), state


class _Chunks(NamedTuple):
    """One batch of chunks, chunk number first: c chunks of Q tokens, R = H / G heads per group."""

    u: Tensor  # (c, B, G, Q, R, P), Δ x
    B: Tensor  # (c, B, G, Q, N)
    C: Tensor  # (c, B, G, Q, N)
    M: Tensor  # (c, B, G, R, Q, Q), decay from token s to token t >= s of one document, else 0
    from_entry: Tensor  # (c, B, G, Q, R, 1), decay from the chunk's start to token t
    to_exit: Tensor  # (c, B, G, Q, R, 1), decay from token s to the chunk's end
    whole: Tensor  # (c, B, G, 1, R, 1), decay over the chunk


def chunk_decays(
    dtA: Tensor, doc: Tensor | None, doc_before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays of chunks: dtA (c, B, G, Q, R), doc (c, B, Q), doc_before (c, B) of the token before.

    Exponents are differences of a running sum; in fp64 they keep fp32 accuracy even behind a token
    with an exponent in the thousands. They are masked before exp: above the diagonal they are
    positive, and inf * 0 would be NaN.
    """
    a = dtA.double().cumsum(dim=3)
    at = a.transpose(3, 4)
    length = a.shape[3]
    future = torch.ones(length, length, dtype=torch.bool, device=a.device).triu(1)
    exponent = at[..., :, None] - at[..., None, :]
    if doc is not None:
        future = future | (doc[..., :, None] != doc[..., None, :])[:, :, None, None]
    M = exponent.masked_fill_(future, -torch.inf).to(dtA.dtype).exp_()
    last = a[:, :, :, -1:]
    from_entry, to_exit, whole = (v.exp().to(dtA.dtype) for v in (a, last - a, last))
    if doc is not None and doc_before is not None:
        same_as_entry = (doc == doc_before[..., None])[:, :, None, :, None]
        from_entry = from_entry * same_as_entry
        whole = whole * same_as_entry[:, :, :, -1:]
        to_exit = to_exit * (doc == doc[..., -1:])[:, :, None, :, None]
    return M, from_entry[..., None], to_exit[..., None], whole[..., None]


class _ChunkedScan(torch.autograd.Function):
    """Chunks of Q tokens: quadratic inside a chunk, a state passed between chunks.

    Kept for the backward pass: the inputs, y, and the state entering each chunk. Decays and the
    Q x Q products exist for one batch of chunks at a time. States are laid out (B, G, N, R, P), so
    that all heads of a group share one matrix product with its B or C.
    """

    @staticmethod
    def _chunks(
        i: slice, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, doc: Tensor | None
    ) -> _Chunks:
        before = None
        if doc is not None:
            # The document before the first chunk is number 0: it continues the initial state.
            last = F.pad(doc[:, :, -1], (0, 0, 1, 0))
            doc, before = doc[i], last[:-1][i]
        M, from_entry, to_exit, whole = chunk_decays(dt[i] * A[:, None], doc, before)
        return _Chunks(x[i] * dt[i][..., None], B[i], C[i], M, from_entry, to_exit, whole)

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        doc: Tensor | None,
        batch_of_chunks: int,
    ) -> tuple[Tensor, Tensor]:
        # x (c, B, G, Q, R, P), dt (c, B, G, Q, R), A (G, R), B, C (c, B, G, Q, N),
        # state (B, G, N, R, P), doc (c, B, Q)
        chunks = x.shape[0]
        y = torch.empty_like(x)
        entering = x.new_empty(chunks, *state.shape)
        for s in range(0, chunks, batch_of_chunks):
            i = slice(s, s + batch_of_chunks)
            k = _ChunkedScan._chunks(i, x, dt, A, B, C, doc)
            added = torch.matmul(k.B.transpose(-1, -2), (k.u * k.to_exit).flatten(-2))
            added = added.unflatten(-1, state.shape[-2:])
            for j in range(added.shape[0]):
                entering[s + j] = state
                state = torch.addcmul(added[j], state, k.whole[j])
            scores = torch.matmul(k.C, k.B.transpose(-1, -2))[:, :, :, None] * k.M
            y[i] = torch.matmul(scores, k.u.transpose(3, 4)).transpose(3, 4)
            carried = torch.matmul(k.C, entering[i].flatten(-2)).unflatten(-1, state.shape[-2:])
            y[i].addcmul_(carried, k.from_entry)
        ctx.save_for_backward(x, dt, A, B, C, doc, y, entering, state)
        ctx.batch_of_chunks = batch_of_chunks
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    @backward_in_given_precision
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, dt, A, B, C, doc, y, entering, leaving = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty_like(v) for v in (x, dt, B, C))
        dA = torch.zeros_like(A)
        heads = leaving.shape[-2:]
        step = ctx.batch_of_chunks
        for s in reversed(range(0, x.shape[0], step)):
            i = slice(s, s + step)
            k = _ChunkedScan._chunks(i, x, dt, A, B, C, doc)
            dyi = dy[i]
            dy_entry = (dyi * k.from_entry).flatten(-2)
            dentering = torch.matmul(k.C.transpose(-1, -2), dy_entry).unflatten(-1, heads)
            # Gradient of the state that leaves each chunk, passed backwards.
            dleaving = torch.empty_like(dentering)
            for j in reversed(range(dentering.shape[0])):
                dleaving[j] = dstate
                dstate = torch.addcmul(dentering[j], dstate, k.whole[j])
            after = torch.cat([entering[s + 1 : s + step + 1], leaving[None]])[: dleaving.shape[0]]

            dyh = dyi.transpose(3, 4)
            W = torch.matmul(dyh, k.u.permute(0, 1, 2, 4, 5, 3)).mul_(k.M)
            Wsum = W.sum(dim=3)
            scores = torch.matmul(k.C, k.B.transpose(-1, -2))[:, :, :, None] * k.M
            dC[i] = torch.matmul(Wsum, k.B) + torch.matmul(
                dy_entry, entering[i].flatten(-2).transpose(-1, -2)
            )
            flat = dleaving.flatten(-2)
            dB[i] = torch.matmul(Wsum.transpose(-1, -2), k.C) + torch.matmul(
                (k.u * k.to_exit).flatten(-2), flat.transpose(-1, -2)
            )
            du = torch.matmul(scores.transpose(-1, -2), dyh).transpose(3, 4).contiguous()
            du.addcmul_(torch.matmul(k.B, flat).unflatten(-1, heads), k.to_exit)
            # d/d(running sum of Δ A) needs no further products: y_t grows with it, the share of
            # u_s falls, and the leaving state grows with the last one.
            da = (dyi * y[i]).sum(-1) - (k.u * du).sum(-1)
            da[:, :, :, -1] += (dleaving * after).sum(dim=(3, 5))
            dexponent = da.flip(3).cumsum(3).flip(3)
            dx[i] = du * dt[i][..., None]
            ddt[i] = (du * x[i]).sum(-1) + dexponent * A[:, None]
            dA += (dexponent * dt[i]).sum(dim=(0, 1, 3))
        return dx, ddt, dA, dB, dC, dstate, None, None


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    doc: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Vectorised path (Dao and Gu 2024, listing 1); see `_ChunkedScan`."""
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    per_group = heads // groups
    q = min(chunk_size, LONGEST_CHUNK, length)
    pad = -length % q

    def split(v: Tensor, *tail: int) -> Tensor:
        """(B, T, ...) -> (c, B, G, Q, *tail); tokens added at the end have Δ = 0."""
        v = F.pad(v.flatten(2), (0, 0, 0, pad)) if pad else v
        v = v.reshape(batch, -1, q, groups, *tail)
        return v.permute(1, 0, 3, 2, *range(4, v.ndim)).contiguous()

    if doc is not None:
        doc = torch.cat([doc, doc[:, -1:].expand(-1, pad)], dim=1)
        doc = doc.view(batch, -1, q).transpose(0, 1)
    # Chunks processed at once: few on a CPU, whose cache they should fit, many on a GPU.
    elements = 2**20 if x.device.type == "cpu" else 2**26
    batch_of_chunks = max(1, elements // (batch * heads * q * (q + head_dim)))
    y, state = _ChunkedScan.apply(  # pyright: ignore[reportGeneralTypeIssues]
        split(x, per_group, head_dim),
        split(dt, per_group),
        A.view(groups, per_group),
        split(B, states),
        split(C, states),
        state.view(batch, groups, per_group, head_dim, states).permute(0, 1, 4, 2, 3),
        doc,
        batch_of_chunks,
    )
    y = y.permute(1, 0, 3, 2, 4, 5).reshape(batch, -1, heads, head_dim)[:, :length]
    state = state.permute(0, 1, 3, 4, 2).reshape(batch, heads, head_dim, states)
    return y, state
