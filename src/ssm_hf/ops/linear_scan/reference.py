"""First-order linear recurrence in plain torch: the equation and a log-depth scan."""

import torch
from torch import Tensor


def linear_scan_recurrent(
    a: Tensor, b: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time: h_t = a_t h_{t-1} + b_t over dimension 1."""
    h = torch.zeros_like(b[:, 0]) if initial_state is None else initial_state.to(b.dtype)
    states = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1), h


def scan_(a: Tensor, b: Tensor, reverse: bool = False) -> None:
    """In place over dimension 0: b_t <- b_t + a_t b_{t-1} + a_t a_{t-1} b_{t-2} + ...

    With `reverse` the recurrence runs from the end, b_t + a_t b_{t+1} + ...; `a` is overwritten.
    Brent and Kung 1982: 2 log2(T) passes, 2 T multiply-adds in all, and only products of `a`, so
    nothing overflows where |a| <= 1.
    """
    length = b.shape[0]
    stride = 1
    while 2 * stride <= length:
        if reverse:
            first = length % (2 * stride)
            here = slice(first, length - 2 * stride + 1, 2 * stride)
            there = slice(first + stride, length - stride + 1, 2 * stride)
        else:
            here = slice(2 * stride - 1, length, 2 * stride)
            there = slice(stride - 1, length - stride, 2 * stride)
        b[here].addcmul_(a[here], b[there])
        a[here].mul_(a[there])
        stride *= 2
    while stride >= 1:
        if length >= 3 * stride:
            if reverse:
                first = (length - stride) % (2 * stride)
                here = slice(first, length - 3 * stride + 1, 2 * stride)
                there = slice(first + stride, length - 2 * stride + 1, 2 * stride)
            else:
                here = slice(3 * stride - 1, length, 2 * stride)
                there = slice(2 * stride - 1, length - stride, 2 * stride)
            b[here].addcmul_(a[here], b[there])
        stride //= 2


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        h = b.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        scan_(a.transpose(0, 1).clone(memory_format=torch.contiguous_format), h)
        h = h.transpose(0, 1)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, h = ctx.saved_tensors
        # g_t = dh_t + conj(a_{t+1}) g_{t+1}, then da_t = g_t conj(h_{t-1}) and db_t = g_t.
        g = dh.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        after = torch.zeros_like(g)
        after[:-1] = a.transpose(0, 1)[1:].conj()
        scan_(after, g, reverse=True)
        g = g.transpose(0, 1)
        da = torch.zeros_like(a)
        da[:, 1:] = g[:, 1:] * h[:, :-1].conj()
        return da, g


def linear_scan_parallel(
    a: Tensor, b: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Vectorised path: the initial state joins the first input, then one log-depth scan."""
    if initial_state is not None:
        first = b[:, :1] + a[:, :1] * initial_state[:, None].to(b.dtype)
        b = torch.cat([first, b[:, 1:]], dim=1)
    h: Tensor = _LinearScan.apply(a, b)  # pyright: ignore[reportAssignmentType]
    return h, h[:, -1]


def linear_scan_step(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """One token: a, b, state (B, ...) -> a state + b."""
    return a * state + b
