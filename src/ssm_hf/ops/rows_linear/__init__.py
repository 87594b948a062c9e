"""Linear layers for the rows of a decoding step: too many for vectors, too few to fill a GPU.

A long sum is cut into shares, which other programs form, and which whoever reads them adds up, in
the order of the shares. What stands beside a product is done by the kernel before or after it.
"""

import torch
from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, pick, runs_kernels
from ssm_hf.ops.launch import can_overlap
from ssm_hf.ops.packing import in_given_precision
from ssm_hf.ops.rows_linear.reference import (
    rows_linear_torch,
    shares_linear_torch,
    shares_norm_torch,
)

if HAS_TRITON:
    from ssm_hf.ops.rows_linear.launch import (
        rows_linear_triton,
        shares_linear_triton,
        shares_norm_triton,
    )
else:
    rows_linear_triton = shares_linear_triton = shares_norm_triton = None

__all__ = ["rows_linear", "shares_linear", "shares_norm", "some_rows"]

# Fewer rows are vectors (`norm_linear`); with more a library's product fills the GPU.
_LEAST_ROWS, _MOST_ROWS = 3, 64
# Weights beyond this take longer than launches, and a library reads them as fast.
_MOST_WEIGHTS = 1 << 22


def some_rows(update: Tensor, weight: Tensor) -> bool:
    """Whether a decoding step of update (..., B, 1, D) is faster in these kernels.

    Args:
        update: what a sublayer begins with.
        weight: (O, K) of its first product.
    """
    return (
        _LEAST_ROWS <= update.shape[-3] <= _MOST_ROWS
        and weight.itemsize == 2
        and weight.numel() <= _MOST_WEIGHTS
        and can_overlap(update.device)
        and not torch.is_autocast_enabled(update.device.type)
        and runs_kernels("rows_linear", update.device)
    )


@in_given_precision
def rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    conv_state: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_first: int = 0,
    shares: bool = False,
    overlap: bool = False,
    impl: str = "auto",
) -> Tensor:
    """conv(scale weight x + bias), every part but the product optional.

    Args:
        x: (B, K), of the weight's dtype.
        weight: (O, K); the kernel takes 16 bits.
        bias: (O,) or None.
        squares: (B, Q) fp32, whose sums over Q are those of the squares of what x was before it was
            scaled by the weight of an RMS norm over K; the norm's factor is applied here. None = no
            norm.
        eps: of the norm.
        conv_state: (B, taps-1, C), window of a causal depthwise convolution with silu over the
            outputs `conv_first` to `conv_first + C`; updated in place. None = no convolution.
        conv_weight: (C, taps), given with `conv_state`.
        conv_bias: (C,) or None.
        conv_first: first output that is convolved.
        shares: return (S, B, O) fp32, whose sum over S is the result; without bias and convolution.
        overlap: the kernel may begin before the ones in front of it have ended: what is read beside
            x and squares was written before the last kernel that was launched without overlap.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, O) in x's dtype, or its shares.

    Raises:
        ValueError: shapes or dtypes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"x must have shape (B, K) and weight (O, K), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x must be of the weight's dtype {weight.dtype}, got {x.dtype}")
    rows, outputs = x.shape[0], weight.shape[0]
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must have shape {(outputs,)}, got {tuple(bias.shape)}")
    if squares is not None and (squares.ndim != 2 or squares.shape[0] != rows):
        raise ValueError(f"squares must have shape ({rows}, Q), got {tuple(squares.shape)}")
    if (conv_state is None) != (conv_weight is None):
        raise ValueError("conv_state and conv_weight are given together or not at all")
    if shares and (bias is not None or conv_state is not None):
        raise ValueError("shares are of the product alone, without bias and convolution")
    if conv_state is not None and conv_weight is not None:
        channels, taps = conv_weight.shape
        if conv_state.shape != (rows, taps - 1, channels):
            raise ValueError(
                f"conv_state must have shape {(rows, taps - 1, channels)}, "
                f"got {tuple(conv_state.shape)}"
            )
        if conv_bias is not None and conv_bias.shape != (channels,):
            raise ValueError(
                f"conv_bias must have shape {(channels,)}, got {tuple(conv_bias.shape)}"
            )
        if conv_first < 0 or conv_first + channels > outputs:
            raise ValueError(
                f"conv_first={conv_first} and {channels} channels exceed the {outputs} outputs"
            )
    run = pick(
        "rows_linear",
        impl,
        x.device,
        reference=rows_linear_torch,
        triton=rows_linear_triton,
        unsupported=_unsupported(x, weight),
    )
    return run(
        x,
        weight,
        bias,
        squares,
        eps,
        conv_state,
        conv_weight,
        conv_bias,
        conv_first,
        shares,
        overlap,
    )


@in_given_precision
def shares_linear(
    shares: Tensor, weight: Tensor, *, overlap: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """weight x for the first K numbers x of each row's sum of shares, and the numbers behind them.

    Args:
        shares: (S, B, K + L) fp32, contiguous.
        weight: (O, K), K at most 256.
        overlap: as of `rows_linear`, the weight was written before.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, O) and (B, L) fp32.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.
    """
    if shares.ndim != 3 or weight.ndim != 2 or weight.shape[1] > shares.shape[2]:
        raise ValueError(
            f"shares must have shape (S, B, K + L) and weight (O, K), got {tuple(shares.shape)} "
            f"and {tuple(weight.shape)}"
        )
    unsupported = _unsupported(shares, weight)
    if weight.shape[1] > 256:
        unsupported = f"the kernel takes at most 256 numbers, got {weight.shape[1]}"
    run = pick(
        "rows_linear",
        impl,
        shares.device,
        reference=shares_linear_torch,
        triton=shares_linear_triton,
        unsupported=unsupported,
    )
    return run(shares, weight, overlap)


@in_given_precision
def shares_norm(
    shares: Tensor,
    stream: Tensor,
    weight: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    overlap: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """norm(x) in `dtype`, and x = stream + the sum of the shares.

    Args:
        shares: (S, B, D) fp32, contiguous.
        stream: (B, D).
        weight: (D,) of the RMS norm.
        eps: of the norm.
        dtype: of the normed rows.
        overlap: as of `rows_linear`, the weight was written before.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        (B, D) each, x in the stream's dtype.

    Raises:
        ValueError: shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.
    """
    if shares.ndim != 3 or stream.shape != shares.shape[1:] or weight.shape != shares.shape[2:]:
        raise ValueError(
            f"shares (S, B, D), stream (B, D) and weight (D,) disagree: {tuple(shares.shape)}, "
            f"{tuple(stream.shape)} and {tuple(weight.shape)}"
        )
    unsupported = None
    if torch.float64 in (shares.dtype, stream.dtype):
        unsupported = "the kernel takes fp32, fp16 and bf16, got fp64"
    run = pick(
        "rows_linear",
        impl,
        shares.device,
        reference=shares_norm_torch,
        triton=shares_norm_triton,
        unsupported=unsupported,
    )
    return run(shares, stream, weight, eps, dtype, overlap)


def _unsupported(x: Tensor, weight: Tensor) -> str | None:
    if torch.float64 in (x.dtype, weight.dtype):
        return "the kernel takes fp32, fp16 and bf16, got fp64"
    if weight.is_cuda and weight.itemsize != 2:
        return f"the kernel takes weights of 16 bits, got {weight.dtype}"
    return None
