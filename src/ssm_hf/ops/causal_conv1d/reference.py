"""Causal depthwise convolution in plain torch: the equations, a vectorised path, one step."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import (
    compute_dtype,
    document_numbers,
    document_starts,
    run_per_document,
)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return F.silu(y) if activation == "silu" else y


def causal_conv1d_recurrent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition: slide a window of K inputs over the real tokens, one token at a time."""
    batch, length, channels = x.shape
    dtype = compute_dtype(x, weight)
    starts = None if doc is None else document_starts(doc)
    window = x.new_zeros(batch, weight.shape[1] - 1, channels)
    if initial_state is not None:
        window = initial_state.to(x.dtype)
    outputs = []
    for t in range(length):
        if starts is not None:
            window = window * ~starts[:, t, None, None]
        y, shifted = causal_conv1d_step(x[:, t], weight, bias, activation, window)
        if mask is not None:
            real = mask[:, t, None]
            y, shifted = y * real, torch.where(real[:, None], shifted, window)
        window = shifted
        outputs.append(y.to(dtype))
    return torch.stack(outputs, dim=1).to(x.dtype), window


def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x (B, C), state (B, K-1, C) of the inputs before it -> y (B, C), next state."""
    window = torch.cat([state, x[:, None]], dim=1)
    dtype = compute_dtype(x, weight)
    y = (window.to(dtype) * weight.t().to(dtype)).sum(dim=1)
    if bias is not None:
        y = y + bias.to(dtype)
    return _activate(y, activation).to(x.dtype), window[:, 1:]


class _ShiftedSum(torch.autograd.Function):
    """y_t = act(bias + sum_k w_k padded_{t+k}), taps of another document left out.

    A backward pass of its own adds all taps into one gradient; autograd would pad, write and add a
    whole tensor for each of them.
    """

    @staticmethod
    def _tap(padded: Tensor, k: int, doc: Tensor | None, padded_doc: Tensor | None) -> Tensor:
        length = padded.shape[1] if doc is None else doc.shape[1]
        shifted = padded[:, k : k + length]
        if doc is None or padded_doc is None:
            return shifted
        return shifted * (padded_doc[:, k : k + length] == doc)[..., None]

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        padded: Tensor,
        weight: Tensor,
        bias: Tensor,
        activation: str | None,
        doc: Tensor | None,
        padded_doc: Tensor | None,
    ) -> Tensor:
        length = padded.shape[1] - weight.shape[1] + 1
        y = bias
        for k in range(weight.shape[1]):
            tap = _ShiftedSum._tap(padded, k, doc, padded_doc)[:, :length]
            y = torch.addcmul(y, tap, weight[:, k])
        ctx.save_for_backward(padded, weight, doc, padded_doc, y if activation else None)
        return _activate(y, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        padded, weight, doc, padded_doc, before_activation = ctx.saved_tensors
        if before_activation is not None:
            dy = torch.ops.aten.silu_backward(dy, before_activation)
        length = dy.shape[1]
        dpadded, dweight = torch.zeros_like(padded), torch.empty_like(weight)
        for k in range(weight.shape[1]):
            part = dpadded[:, k : k + length]
            if doc is None:
                part.addcmul_(dy, weight[:, k])
            else:
                same = (padded_doc[:, k : k + length] == doc)[..., None]
                part.addcmul_(dy * same, weight[:, k])
            tap = _ShiftedSum._tap(padded, k, doc, padded_doc)[:, :length]
            dweight[:, k] = (dy * tap).sum(dim=(0, 1))
        return dpadded, dweight, dy.sum(dim=(0, 1)), None, None, None


def causal_conv1d_shifted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Vectorised path: K shifted multiply-adds over the whole sequence.

    Five times faster than `conv1d` with groups on a CPU, forward and backward, and it needs no
    transpose. Padding is handled by moving the real tokens to the front of each row and back.
    """
    batch, length, channels = x.shape
    taps = weight.shape[1]
    real_first = None
    if mask is not None:
        real_first = torch.argsort(~mask, dim=1, stable=True)
        x = x.gather(1, real_first[..., None].expand_as(x))
        doc = None if doc is None else doc.gather(1, real_first)

    before = x.new_zeros(batch, taps - 1, channels)
    if initial_state is not None:
        before = initial_state.to(x.dtype)
    padded = torch.cat([before, x], dim=1)

    # `doc` of the window's inputs; those before the row belong to the document that continues.
    padded_doc = None if doc is None else F.pad(doc, (taps - 1, 0), value=0)

    dtype = compute_dtype(x, weight)
    wide_bias = x.new_zeros(channels, dtype=dtype) if bias is None else bias.to(dtype)
    y: Tensor = _ShiftedSum.apply(  # pyright: ignore[reportAssignmentType]
        padded.to(dtype), weight.to(dtype), wide_bias, activation, doc, padded_doc
    )
    y = y.to(x.dtype)

    if mask is None or real_first is None:
        state = padded[:, length:]
        state_doc = None if padded_doc is None else padded_doc[:, length:]
        last_doc = None if doc is None else doc[:, -1:]
    else:
        y = y.gather(1, torch.argsort(real_first, dim=1)[..., None].expand_as(y)) * mask[..., None]
        tokens = mask.sum(dim=1, keepdim=True)
        index = tokens + torch.arange(taps - 1, device=x.device)
        state = padded.gather(1, index[..., None].expand(-1, -1, channels))
        state_doc = None if padded_doc is None else padded_doc.gather(1, index)
        last_doc = None if doc is None else doc.gather(1, (tokens - 1).clamp(min=0))
        # A row of pads alone leaves document 0 as it was.
        last_doc = None if last_doc is None else last_doc * (tokens > 0)
    if state_doc is not None and last_doc is not None:
        state = state * (state_doc == last_doc)[..., None]
    return y, state


def causal_conv1d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """The public function's arguments brought to those of the vectorised path or of one step."""
    del return_final_state
    if cu_seqlens is not None:

        def run_batch(
            x: Tensor, initial_state: Tensor | None, mask: Tensor
        ) -> tuple[Tensor, Tensor]:
            return causal_conv1d_shifted(x, weight, bias, activation, initial_state, None, mask)

        return run_per_document(run_batch, {"x": x}, cu_seqlens, initial_state, mask)
    if x.shape[1] == 1 and mask is None and initial_state is not None:
        state = initial_state.to(x.dtype)
        y, state = causal_conv1d_step(x[:, 0], weight, bias, activation, state)
        return y[:, None], state
    doc = None if seq_idx is None else document_numbers(seq_idx, mask)
    return causal_conv1d_shifted(x, weight, bias, activation, initial_state, doc, mask)
