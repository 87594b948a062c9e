"""Causal depthwise convolution of the Mamba family."""

from typing import Literal

from torch import Tensor

from ssm_hf.ops.causal_conv1d.reference import (
    causal_conv1d_recurrent,
    causal_conv1d_step,
    causal_conv1d_torch,
)
from ssm_hf.ops.dispatch import HAS_TRITON, pick, runs_kernels
from ssm_hf.ops.launch import unsupported_dtypes
from ssm_hf.ops.packing import check_packing, in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.causal_conv1d.launch import causal_conv1d_triton, real_first_triton
else:
    causal_conv1d_triton = real_first_triton = None

# Each tap is a register of its own in the kernels.
MAX_TAPS = 8

__all__ = ["causal_conv1d", "causal_conv1d_recurrent", "causal_conv1d_step", "real_first"]


def real_first(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """What kernels of convolutions need to know of a padding mask, for operators that take it.

    Args:
        mask: (B, T) bool, True = real token.

    Returns:
        positions (B, T) int32 of each row's real tokens and then its pads, and how many are real
        (B,) int32; None where `impl="auto"` does not take the kernels.
    """
    if real_first_triton is None or not runs_kernels("causal_conv1d", mask.device):
        return None
    return real_first_triton(mask)


@in_given_precision
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_k weight[:, k] x_{t-K+1+k}), per channel, over the real tokens.

    Args:
        x: (B, T, C), any float dtype.
        weight: (C, K).
        bias: (C,) or None.
        activation: `"silu"` or None.
        initial_state: (B, K-1, C), the last K-1 inputs before x; with `cu_seqlens` one per
            document, (n, K-1, C). None means zeros.
        seq_idx: (B, T) integers; the window never reaches over a change of number.
        cu_seqlens: (n+1,) document offsets into one row (B = 1); not together with `seq_idx`.
        mask: (B, T) bool, True = real token. Pads are skipped: they enter no window, y is 0 there.
        return_final_state: also return the last K-1 inputs.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        y (B, T, C) in x's dtype; with `return_final_state` also the state (B, K-1, C) of each row's
        last document, or (n, K-1, C) with `cu_seqlens`.

    Raises:
        ValueError: shapes or packing arguments disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Gu and Dao 2023, section 3.4 (the short convolution before the selective scan).
    """
    if x.ndim != 3:
        raise ValueError(f"x must have shape (B, T, C), got {tuple(x.shape)}")
    batch, length, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels:
        raise ValueError(f"weight must have shape ({channels}, K), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be "silu" or None, got {activation!r}')
    taps = weight.shape[1]
    check_packing(batch, length, initial_state, (taps - 1, channels), seq_idx, cu_seqlens, mask)
    unsupported = unsupported_dtypes(x, weight, bias, initial_state)
    if unsupported is None and taps > MAX_TAPS:
        unsupported = f"kernels take 1 to {MAX_TAPS} taps, got K={taps}"
    run = pick(
        "causal_conv1d",
        impl,
        x.device,
        reference=causal_conv1d_torch,
        triton=causal_conv1d_triton,
        unsupported=unsupported,
    )
    y, state = run(
        x,
        weight,
        bias,
        activation,
        initial_state,
        seq_idx,
        cu_seqlens,
        mask,
        return_final_state,
    )
    return (y, state) if return_final_state else y
