"""Mamba-1's selective scan in plain torch: the equations, a vectorised path, one step.

Up to `selective_scan_torch`, functions take Δ ready made (see `step_size`) and leave D and the gate
to the caller: x, dt (B, T, I), A (I, N), B, C (B, T, N), state (B, I, N).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.linear_scan.reference import scan_
from ssm_hf.ops.packing import (
    backward_in_given_precision,
    compute_dtype,
    document_numbers,
    document_starts,
    run_per_document,
)
from ssm_hf.ops.step_size import step_size


def selective_scan_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    doc: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time (Gu and Dao 2023, algorithm 2)."""
    starts = None if doc is None else document_starts(doc)
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = state * ~starts[:, t, None, None]
        y, state = selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: h <- exp(Δ A) h + Δ x B, y = h C, with x, dt (B, I) and B, C (B, N)."""
    decay = torch.exp(dt[..., None] * A)
    state = torch.addcmul(decay * state, (dt * x)[..., None], B[:, None])
    return torch.linalg.vecdot(state, C[:, None]), state


def _tokens_per_block(x: Tensor, states: int) -> int:
    """Block length: its (B, I, N) states should stay in a CPU's cache; a GPU wants more at once."""
    elements = 2**19 if x.device.type == "cpu" else 2**25
    per_token = x.shape[0] * x.shape[2] * states
    return max(8, min(256, elements // per_token))


class _BlockScan(torch.autograd.Function):
    """Blocks of tokens with a log-depth scan inside; only the state at each block's start is kept.

    The (B, T, I, N) states exist for one block at a time, in the forward and in the backward pass,
    which scans each block again. Inside a block time comes first, so that strided passes over time
    touch whole rows.
    """

    @staticmethod
    def _scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, starts: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States of one block and its decays; all inputs time first."""
        decay = torch.exp_(dt[..., None] * A)
        if starts is not None:
            decay.masked_fill_(starts[..., None, None], 0)
        h = (dt * x)[..., None] * B[:, :, None]
        h[0].addcmul_(decay[0], state)
        scan_(decay.clone() if h.shape[0] > 1 else decay, h)
        return h, decay

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        block = _tokens_per_block(x, A.shape[1])
        xt, dtt, Bt, Ct = (v.transpose(0, 1).contiguous() for v in (x, dt, B, C))
        startst = None if starts is None else starts.transpose(0, 1)
        y = torch.empty_like(xt)
        entering = []
        for s in range(0, xt.shape[0], block):
            part = slice(s, s + block)
            entering.append(state)
            resets = None if startst is None else startst[part]
            h, _ = _BlockScan._scan(xt[part], dtt[part], A, Bt[part], resets, state)
            y[part] = torch.matmul(h, Ct[part, :, :, None])[..., 0]
            state = h[-1].clone()
        ctx.save_for_backward(xt, dtt, A, Bt, Ct, startst, *entering)
        ctx.block = block
        return y.transpose(0, 1), state

    @staticmethod
    @torch.autograd.function.once_differentiable
    @backward_in_given_precision
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        xt, dtt, A, Bt, Ct, startst, *entering = ctx.saved_tensors
        dyt = dy.transpose(0, 1).contiguous()
        # Batch first in memory, as autograd's next operators expect their gradients.
        dx, ddt, dB, dC = (
            torch.empty_like(v.transpose(0, 1), memory_format=torch.contiguous_format)
            for v in (xt, dtt, Bt, Ct)
        )
        dx, ddt, dB, dC = (v.transpose(0, 1) for v in (dx, ddt, dB, dC))
        dA = torch.zeros_like(A)
        for i in reversed(range(len(entering))):
            part = slice(i * ctx.block, (i + 1) * ctx.block)
            xb, dtb, Bb, Cb, dyb = xt[part], dtt[part], Bt[part], Ct[part], dyt[part]
            resets = None if startst is None else startst[part]
            h, decay = _BlockScan._scan(xb, dtb, A, Bb, resets, entering[i])
            # g_t = C_t dy_t + a_{t+1} g_{t+1}: the gradient with respect to h_t after all its uses.
            g = dyb[..., None] * Cb[:, :, None]
            g[-1].add_(dstate)
            after = torch.empty_like(decay)
            after[:-1] = decay[1:]
            after[-1] = 0
            scan_(after, g, reverse=True)
            dC[part] = torch.matmul(dyb[:, :, None], h)[:, :, 0]
            dB[part] = torch.matmul((dtb * xb)[:, :, None], g)[:, :, 0]
            du = torch.matmul(g, Bb[..., None])[..., 0]
            dstate = decay[0] * g[0]
            # g_t a_t h_{t-1}, the gradient with respect to the exponent Δ_t A.
            g.mul_(decay)
            g[0].mul_(entering[i])
            g[1:].mul_(h[:-1])
            dx[part] = dtb * du
            ddt[part] = xb * du + (g * A).sum(-1)
            dA += torch.einsum("tbin,tbi->in", g, dtb)
        dx, ddt, dB, dC = (v.transpose(0, 1) for v in (dx, ddt, dB, dC))
        return dx, ddt, dA, dB, dC, dstate, None


def selective_scan_blocked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    doc: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Vectorised path; see `_BlockScan`."""
    starts = None if doc is None else document_starts(doc)
    return _BlockScan.apply(x, dt, A, B, C, state, starts)  # pyright: ignore[reportReturnType]


def selective_scan_torch(
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
) -> tuple[Tensor, Tensor]:
    """The whole operator, with arguments as in `selective_scan`: y in x's dtype, final state."""
    inner, states = A.shape
    dtype = compute_dtype(x, dt, A, initial_state)
    u, A_wide, B_wide, C_wide = (v.to(dtype) for v in (x, A, B, C))
    delta = step_size(dt, dt_bias, dt_softplus, dt_limit, mask).to(dtype)

    def _state(x: Tensor, initial_state: Tensor | None) -> Tensor:
        if initial_state is None:
            return x.new_zeros(x.shape[0], inner, states)
        return initial_state.to(dtype)

    def run(
        x: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Pads of the packed batch hold the state as masked tokens do.
        state = _state(x, initial_state)
        return selective_scan_blocked(x, dt * mask[..., None], A_wide, B, C, state, None)

    if cu_seqlens is not None:
        sequences = {"x": u, "dt": delta, "B": B_wide, "C": C_wide}
        y, state = run_per_document(run, sequences, cu_seqlens, initial_state, mask)
    elif x.shape[1] == 1:
        y, state = selective_scan_step(
            u[:, 0], delta[:, 0], A_wide, B_wide[:, 0], C_wide[:, 0], _state(u, initial_state)
        )
        y = y[:, None]
    else:
        doc = None if seq_idx is None else document_numbers(seq_idx, mask)
        state = _state(u, initial_state)
        y, state = selective_scan_blocked(u, delta, A_wide, B_wide, C_wide, state, doc)
    if D is not None:
        y = torch.addcmul(y, D.to(dtype), u)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if mask is not None:
        y = y * mask[..., None]
    return y.to(x.dtype), state
