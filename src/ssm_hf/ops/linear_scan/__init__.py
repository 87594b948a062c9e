"""First-order linear recurrence, real or complex."""

import torch
from torch import Tensor

from ssm_hf.ops.dispatch import pick
from ssm_hf.ops.linear_scan.reference import (
    linear_scan_parallel,
    linear_scan_recurrent,
    linear_scan_step,
)
from ssm_hf.ops.packing import (
    check_packing,
    compute_dtype,
    document_numbers,
    document_starts,
    in_given_precision,
    run_per_document,
)

__all__ = ["linear_scan", "linear_scan_recurrent", "linear_scan_step"]


@in_given_precision
def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t, elementwise.

    Args:
        a: (B, T, ...), real or complex decay; broadcasts against b.
        b: (B, T, ...), input.
        initial_state: (B, ...) h before the first token, (n, ...) with `cu_seqlens`; None = zeros.
        seq_idx: (B, T) integers; h is dropped where the number changes.
        cu_seqlens: (n+1,) document offsets into one row (B = 1); not together with `seq_idx`.
        mask: (B, T) bool, True = real token; pads hold the state and give 0.
        return_final_state: also return h after the last token.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        h (B, T, ...) in b's dtype (at least fp32 inside); with `return_final_state` also the state
        (B, ...) of each row's last document, or (n, ...) with `cu_seqlens`, fp32 or wider.

    Raises:
        ValueError: shapes or packing arguments disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Blelloch 1990, section 1.4 (first-order recurrences as scans).
    """
    if b.ndim < 2:
        raise ValueError(f"b must have shape (B, T, ...), got {tuple(b.shape)}")
    try:
        a = a.expand(b.shape)
    except RuntimeError as error:
        raise ValueError(
            f"a must broadcast to b's shape {tuple(b.shape)}, got {tuple(a.shape)}"
        ) from error
    batch, length = b.shape[:2]
    check_packing(batch, length, initial_state, tuple(b.shape[2:]), seq_idx, cu_seqlens, mask)
    scan = pick("linear_scan", impl, b.device, reference=linear_scan_parallel)
    dtype = compute_dtype(a, b, initial_state)

    def run(
        a: Tensor, b: Tensor, initial_state: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a, b = a.to(dtype), b.to(dtype)
        if mask is not None:
            real = mask.reshape(*mask.shape, *[1] * (b.ndim - 2))
            h, state = scan(a.masked_fill(~real, 1), b.masked_fill(~real, 0), initial_state)
            return h * real, state
        return scan(a, b, initial_state)

    if cu_seqlens is not None:
        h, state = run_per_document(run, {"a": a, "b": b}, cu_seqlens, initial_state, mask)
    elif length == 1 and mask is None:
        before = torch.zeros_like(b[:, 0]) if initial_state is None else initial_state
        state = linear_scan_step(a[:, 0].to(dtype), b[:, 0].to(dtype), before.to(dtype))
        h = state[:, None]
    else:
        if seq_idx is not None:
            starts = document_starts(document_numbers(seq_idx, mask))
            a = a.masked_fill(starts.reshape(*starts.shape, *[1] * (b.ndim - 2)), 0)
        h, state = run(a, b, initial_state, mask)
    h = h.to(b.dtype if h.is_complex() == b.is_complex() else h.dtype)
    return (h, state) if return_final_state else h
