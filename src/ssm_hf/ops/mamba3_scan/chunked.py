"""Mamba-3's recurrence chunk by chunk, with a backward pass of its own (docs/math/mamba3_scan.md).

Everything here has its ranks beside its tokens: a chunk of Q tokens has Q R rows. Rotated are the
pairs (i, i + S) of the first 2 S states.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import backward_in_given_precision
from ssm_hf.ops.ssd.reference import chunk_decays


class Inputs(NamedTuple):
    """Tensors of the recurrence, cut into c chunks of Q tokens."""

    x: Tensor  # (c, B, Q, H, P)
    B: Tensor  # (c, B, Q, R, G, N)
    C: Tensor  # (c, B, Q, R, G, N)
    z: Tensor | None  # (c, B, Q, H, P)
    turn: Tensor | None  # (c, B, Q, S), π tanh(angles)
    delta: Tensor  # (c, B, Q, H), Δ
    exponent: Tensor  # (c, B, Q, H), Δ A
    scale: Tensor  # (c, B, Q, H), weight of x ⊗ k in the states that later tokens read
    own: Tensor  # (c, B, Q, H), its weight in the token's own output
    angle: Tensor | None  # (c, B, H, S), θ before the chunk; documents do not reset it
    state: Tensor  # (B, H, P, N) before the first chunk
    B_bias: Tensor | None  # (H, R, N)
    C_bias: Tensor | None  # (H, R, N)
    D: Tensor | None  # (H,)
    mimo_x: Tensor | None  # (H, R, P)
    mimo_z: Tensor | None  # (H, R, P)
    mimo_o: Tensor | None  # (H, R, P)


class _Chunks(NamedTuple):
    """A batch of chunks of all heads, formed from the inputs; n = chunks x B x H."""

    q: Tensor  # (n, Q R, N)
    k: Tensor  # (n, Q R, N)
    v: Tensor  # (n, Q R, P)
    x: Tensor  # (c, B, H, Q, 1, P)
    z: Tensor | None  # (c, B, H, Q, 1, P)
    cos: Tensor | None  # (n, Q, 1, S)
    sin: Tensor | None
    decay: Tensor  # (n, Q, Q), decay from token s to token t > s of one document, else 0
    weight: Tensor  # (n, Q, Q), what multiplies q_t · k_s
    from_entry: Tensor  # (n, Q, 1), decay from the chunk's start to token t
    to_exit: Tensor  # (n, Q, 1), decay from token s to the chunk's end
    whole: Tensor  # (c, B, H, 1, 1), decay over the chunk


def _rows(v: Tensor, factor: Tensor) -> Tensor:
    """v (n, Q R, X) times factor (n, Q, 1), token by token."""
    tokens = factor.shape[1]
    return (v.unflatten(1, (tokens, -1)) * factor[..., None]).flatten(1, 2)


def _per_token(v: Tensor, tokens: int) -> Tensor:
    """Sum over ranks and channels: (n, Q R, X) -> (n, Q)."""
    return v.unflatten(1, (tokens, -1)).sum(dim=(2, 3))


def _ranks(weight: Tensor) -> Tensor:
    """(H, R, X) as it meets (c, B, H, Q, R, X)."""
    return weight[:, None]


def _turn(v: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate rows v (n, Q R, N) in place."""
    tokens, s = cos.shape[1], cos.shape[3]
    a, b = v.unflatten(1, (tokens, -1))[..., : 2 * s].split(s, dim=-1)
    turned = (a * cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(turned)


def _heads_first(v: Tensor) -> Tensor:
    """(c, B, Q, H, ...) -> (c, B, H, Q, ...)."""
    return v.transpose(2, 3)


def _form(inputs: Inputs, doc: Tensor | None, i: slice) -> _Chunks:
    dtype = inputs.state.dtype
    exponent = _heads_first(inputs.exponent[i])
    tokens = exponent.shape[3]
    before = now = None
    if doc is not None:
        # The document before the first chunk is number 0: it continues the initial state.
        before, now = F.pad(doc[:, :, -1], (0, 0, 1, 0))[:-1][i], doc[i]
    decay, from_entry, to_exit, whole = chunk_decays(exponent[..., None], now, before)
    decay = decay.flatten(0, 3)
    decay.diagonal(dim1=1, dim2=2).zero_()
    weight = decay * _heads_first(inputs.scale[i]).reshape(-1, 1, tokens)
    weight.diagonal(dim1=1, dim2=2).copy_(_heads_first(inputs.own[i]).reshape(-1, tokens))

    cos = sin = None
    if inputs.turn is not None and inputs.angle is not None:
        phi = inputs.turn[i][:, :, None] * _heads_first(inputs.delta[i])[..., None]
        theta = (inputs.angle[i][:, :, :, None] + phi.cumsum(dim=3)).flatten(0, 2)[:, :, None]
        cos, sin = theta.cos(), theta.sin()

    def rotated(v: Tensor, bias: Tensor | None) -> Tensor:
        v = v[i].to(dtype).permute(0, 1, 4, 2, 3, 5)[:, :, :, None]
        per_group = exponent.shape[2] // v.shape[2]
        if bias is None:
            v = v.repeat(1, 1, 1, per_group, 1, 1, 1)
        else:
            v = v + bias.unflatten(0, (-1, per_group))[:, :, None]
        v = v.flatten(0, 3).flatten(1, 2)
        if cos is not None and sin is not None:
            _turn(v, cos, sin)
        return v

    x = _heads_first(inputs.x[i]).to(dtype)[..., None, :]
    v = x if inputs.mimo_x is None else x * _ranks(inputs.mimo_x)
    z = None if inputs.z is None else _heads_first(inputs.z[i]).to(dtype)[..., None, :]
    return _Chunks(
        q=rotated(inputs.C, inputs.C_bias),
        k=rotated(inputs.B, inputs.B_bias),
        v=v.reshape(-1, tokens * v.shape[4], v.shape[5]),
        x=x,
        z=z,
        cos=cos,
        sin=sin,
        decay=decay,
        weight=weight,
        from_entry=from_entry.flatten(0, 2)[..., 0],
        to_exit=to_exit.flatten(0, 2)[..., 0],
        whole=whole[..., 0],
    )


def _weighted(scores: Tensor, weight: Tensor) -> Tensor:
    """scores (n, Q R, Q R) times weight (n, Q, Q), in place."""
    tokens = weight.shape[1]
    shape = (scores.shape[0], tokens, -1, tokens, scores.shape[1] // tokens)
    scores.view(shape).mul_(weight[:, :, None, :, None])
    return scores


def _outputs(inputs: Inputs, k: _Chunks, scores: Tensor, entering: Tensor) -> Tensor:
    """y of every rank before the gate, (c, B, H, Q, R, P); scores are weighted already."""
    y = torch.bmm(_rows(k.q, k.from_entry), entering.transpose(1, 2)).baddbmm_(scores, k.v)
    y = y.view(*k.x.shape[:4], -1, k.x.shape[5])
    if inputs.D is not None:
        y.addcmul_(inputs.D[:, None, None, None], k.v.view(y.shape))
    return y


class _ChunkedScan(torch.autograd.Function):
    """Quadratic inside a chunk, a state passed between chunks.

    Kept for the backward pass: the inputs and the state entering each chunk. Rotated q and k,
    decays and products exist for one batch of chunks at a time.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, doc: Tensor | None, batch_of_chunks: int, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # doc (c, B, Q); tensors are the fields of Inputs
        inputs = Inputs(*tensors)  # pyright: ignore[reportArgumentType]
        state = inputs.state
        chunks, ranks = inputs.B.shape[0], inputs.B.shape[3]
        per_rank = ranks > 1 and inputs.mimo_o is None
        y = inputs.x.new_empty(
            (*inputs.x.shape[:3], *([ranks] if per_rank else []), *inputs.x.shape[3:])
        )
        entering = state.new_empty(chunks, *state.shape)
        for s in range(0, chunks, batch_of_chunks):
            i = slice(s, s + batch_of_chunks)
            k = _form(inputs, doc, i)
            leaving = k.to_exit * _heads_first(inputs.scale[i]).reshape(k.to_exit.shape)
            added = torch.bmm(_rows(k.v, leaving).transpose(1, 2), k.k)
            added = added.view(-1, *state.shape)
            for j in range(added.shape[0]):
                entering[s + j] = state
                state = torch.addcmul(added[j], state, k.whole[j])
            scores = _weighted(torch.bmm(k.q, k.k.transpose(1, 2)), k.weight)
            out = _outputs(inputs, k, scores, entering[i].flatten(0, 2))
            if k.z is not None:
                gate = k.z if inputs.mimo_z is None else k.z * _ranks(inputs.mimo_z)
                out.mul_(F.silu(gate))
            if inputs.mimo_o is not None:
                out = (out * _ranks(inputs.mimo_o)).sum(dim=4, keepdim=True)
            if per_rank:
                y[i] = out.permute(0, 1, 3, 4, 2, 5)
            else:
                y[i] = out[..., 0, :].transpose(2, 3)
        ctx.save_for_backward(doc, entering, *inputs)
        ctx.batch_of_chunks = batch_of_chunks
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    @backward_in_given_precision
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        doc, entering, *tensors = ctx.saved_tensors
        inputs = Inputs(*tensors)
        grads = Inputs(*(None if v is None else torch.zeros_like(v) for v in inputs))  # pyright: ignore[reportArgumentType]
        step = ctx.batch_of_chunks
        for s in reversed(range(0, inputs.x.shape[0], step)):
            i = slice(s, s + step)
            k = _form(inputs, doc, i)
            dstate = _chunks_backward(inputs, grads, k, i, dy[i], entering[i], dstate)
        return None, None, *grads._replace(state=dstate)


def _finish_backward(
    inputs: Inputs, grads: Inputs, k: _Chunks, i: slice, dy: Tensor, y: Tensor | None
) -> Tensor:
    """Gradient of y before gate and contraction, from the output's (c, B, H, Q, R or 1, P)."""
    if y is None:
        return dy
    ungated = dy if inputs.mimo_o is None else dy * _ranks(inputs.mimo_o)
    gate = None
    if k.z is not None:
        before = k.z if inputs.mimo_z is None else k.z * _ranks(inputs.mimo_z)
        share = torch.sigmoid(before)
        gate = before * share
        dbefore = ungated * y * share * (1 + before * (1 - share))
        if inputs.mimo_z is not None and grads.mimo_z is not None:
            grads.mimo_z.add_((dbefore * k.z).sum(dim=(0, 1, 3)))
            dbefore = dbefore * _ranks(inputs.mimo_z)
        assert grads.z is not None
        grads.z[i] = _heads_first(dbefore.sum(dim=4))
    if grads.mimo_o is not None:
        gated = y if gate is None else y * gate
        grads.mimo_o.add_((dy * gated).sum(dim=(0, 1, 3)))
    return ungated if gate is None else ungated * gate


def _chunks_backward(
    inputs: Inputs,
    grads: Inputs,
    k: _Chunks,
    i: slice,
    dout: Tensor,
    entering: Tensor,
    dstate: Tensor,
) -> Tensor:
    """Write or add the gradients of one batch of chunks; return that of the state entering it."""
    dtype, tokens = inputs.state.dtype, k.decay.shape[1]
    by_chunk = (-1, *inputs.state.shape)
    state = entering.flatten(0, 2)
    scale = _heads_first(inputs.scale[i]).reshape(k.to_exit.shape)
    leaving = k.to_exit * scale

    # Through contraction and gate, for which y is formed again.
    dout = dout.to(dtype)
    ranks = dout.permute(0, 1, 4, 2, 3, 5) if dout.ndim == 6 else _heads_first(dout)[..., None, :]
    scores = torch.bmm(k.q, k.k.transpose(1, 2))
    weighted = _weighted(scores.clone(), k.weight)
    gated = k.z is not None or inputs.mimo_o is not None
    y = _outputs(inputs, k, weighted, state) if gated else None
    dy = _finish_backward(inputs, grads, k, i, ranks, y).reshape(k.v.shape)

    # Gradient of the state that leaves each chunk, passed backwards.
    dy_entry = _rows(dy, k.from_entry)
    dentering = torch.bmm(dy_entry.transpose(1, 2), k.q).view(by_chunk)
    dleaving = torch.empty_like(dentering)
    for j in reversed(range(dentering.shape[0])):
        dleaving[j] = dstate
        dstate = torch.addcmul(dentering[j], dstate, k.whole[j])
    dleft = dleaving.flatten(0, 2)

    # Products inside the chunk and with the states.
    dscores = torch.bmm(dy, k.v.transpose(1, 2))
    dweight = scores.mul_(dscores).unflatten(1, (tokens, -1)).unflatten(3, (tokens, -1))
    dweight = dweight.sum(dim=(2, 4)) if dweight.shape[2] > 1 else dweight[:, :, 0, :, 0]
    _weighted(dscores, k.weight)
    dq = torch.bmm(dy_entry, state)
    entered = _per_token(dq * k.q, tokens)
    dq.baddbmm_(dscores, k.k)
    dk = torch.bmm(_rows(k.v, leaving), dleft).baddbmm_(dscores.transpose(1, 2), k.q)
    dv = torch.bmm(k.k, dleft.transpose(1, 2))
    left = _per_token(dv * k.v, tokens) * k.to_exit[..., 0]
    dv = _rows(dv, leaving).baddbmm_(weighted.transpose(1, 2), dy)

    # Weights of a token, and exponents: the exponent of token r acts on all pairs s < r <= t, on
    # what entered and reaches t >= r, on what s < r leaves, and on the state that passes.
    per_head = (*k.x.shape[:3], tokens)
    grads.own[i] = _heads_first(dweight.diagonal(dim1=1, dim2=2).reshape(per_head))
    decayed = dweight * k.decay
    column = decayed.sum(dim=1)
    grads.scale[i] = _heads_first((column + left).view(per_head))
    left = left * scale[..., 0]
    row = torch.bmm(decayed, scale)[..., 0]
    passed = ((dleaving * entering).sum(dim=(3, 4)) * k.whole[..., 0, 0]).flatten()
    dexponent = (row - column * scale[..., 0] + entered).flip(1).cumsum(1).flip(1)
    dexponent = dexponent + (left.cumsum(1) - left) + passed[:, None]
    grads.exponent[i] = _heads_first(dexponent.view(per_head))

    # Back through skip and mimo_x to x.
    dy, dv = (u.view(*k.x.shape[:4], -1, k.x.shape[5]) for u in (dy, dv))
    if inputs.D is not None and grads.D is not None:
        grads.D.add_((dy * k.v.view(dv.shape)).sum(dim=(0, 1, 3, 4, 5)))
        dv.addcmul_(inputs.D[:, None, None, None], dy)
    if inputs.mimo_x is not None and grads.mimo_x is not None:
        grads.mimo_x.add_((dv * k.x).sum(dim=(0, 1, 3)))
        dv = (dv * _ranks(inputs.mimo_x)).sum(dim=4, keepdim=True)
    grads.x[i] = _heads_first(dv[..., 0, :])

    _angles_backward(inputs, grads, k, i, dq, dk)
    for du, dinput, dbias in ((dq, grads.C, grads.C_bias), (dk, grads.B, grads.B_bias)):
        # (c, B, G, H / G, Q, R, N)
        groups, ranks_ = inputs.B.shape[4], inputs.B.shape[3]
        per_group = du.view(*k.x.shape[:3], tokens, ranks_, -1).unflatten(2, (groups, -1))
        dinput[i] = per_group.sum(dim=3).permute(0, 1, 3, 4, 2, 5)
        if dbias is not None:
            dbias.add_(per_group.sum(dim=(0, 1, 4)).flatten(0, 1))
    return dstate


def _angles_backward(
    inputs: Inputs, grads: Inputs, k: _Chunks, i: slice, dq: Tensor, dk: Tensor
) -> None:
    """Gradients of θ's parts; dq and dk are turned back in place."""
    if k.cos is None or k.sin is None or inputs.turn is None or inputs.angle is None:
        return
    assert grads.turn is not None
    assert grads.angle is not None
    tokens, s = k.cos.shape[1], k.cos.shape[3]
    dtheta = k.cos.new_zeros(k.cos.shape[0], tokens, s)
    for u, du in ((k.q, dq), (k.k, dk)):
        a, b = u.unflatten(1, (tokens, -1))[..., : 2 * s].split(s, dim=-1)
        da, db = du.unflatten(1, (tokens, -1))[..., : 2 * s].split(s, dim=-1)
        dtheta.add_((a * db).addcmul_(b, da, value=-1).sum(dim=2))
        _turn(du, k.cos, -k.sin)
    dtheta = dtheta.view(*k.x.shape[:4], s)
    grads.angle[i] = dtheta.sum(dim=3)
    dphi = dtheta.flip(3).cumsum(dim=3).flip(3)
    delta, turn = _heads_first(inputs.delta[i]), inputs.turn[i][:, :, None]
    grads.turn[i] = (dphi * delta[..., None]).sum(dim=2)
    grads.delta[i] = _heads_first((dphi * turn).sum(dim=-1))


def chunked_scan(inputs: Inputs, doc: Tensor | None, batch_of_chunks: int) -> tuple[Tensor, Tensor]:
    """y in x's dtype and the state (B, H, P, N) after the last chunk.

    y is (c, B, Q, H, P), or (c, B, Q, R, H, P) for R > 1 without mimo_o. doc (c, B, Q) are document
    numbers; `batch_of_chunks` chunks are worked on at a time.
    """
    return _ChunkedScan.apply(doc, batch_of_chunks, *inputs)  # pyright: ignore[reportReturnType]
