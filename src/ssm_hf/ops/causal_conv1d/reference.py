"""Causal depthwise convolution in plain torch: the equations, a vectorised path, one step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import compute_dtype, document_starts


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
    y = torch.einsum("bkc,ck->bc", window.to(dtype), weight.to(dtype))
    if bias is not None:
        y = y + bias.to(dtype)
    return _activate(y, activation).to(x.dtype), window[:, 1:]


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
    wide, w = padded.to(dtype), weight.to(dtype)
    y = x.new_zeros(channels, dtype=dtype) if bias is None else bias.to(dtype)
    for k in range(taps):
        shifted = wide[:, k : k + length]
        if doc is not None and padded_doc is not None and k < taps - 1:
            shifted = shifted * (padded_doc[:, k : k + length] == doc)[..., None]
        y = torch.addcmul(y, shifted, w[:, k])
    y = _activate(y, activation).to(x.dtype)

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
