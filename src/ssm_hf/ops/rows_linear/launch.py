"""The kernels as torch operators."""
# Kernels annotate plain values as constexpr.
# pyright: reportArgumentType=false

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops.launch import (
    KERNEL_DTYPES,
    architecture,
    check_tensors,
    on_device,
    overlapping,
    power_of_two,
    tuned,
)
from ssm_hf.ops.rows_linear.kernels import (
    rows_linear_kernel,
    shares_linear_kernel,
    shares_norm_kernel,
)

# Outputs are written in whole vectors of so many.
_UNIT = 16


@torch.library.custom_op("ssm_hf::rows_linear", mutates_args=("conv_state",))
def rows_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    squares: Tensor | None,
    eps: float,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: int,
    shares: bool,
    overlap: bool,
) -> Tensor:
    """See `ssm_hf.ops.rows_linear`."""
    check_tensors(
        "rows_linear",
        KERNEL_DTYPES,
        x=x,
        weight=weight,
        bias=bias,
        squares=squares,
        conv_state=conv_state,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
    )
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    rows, (outputs, size) = x.shape[0], weight.shape
    options = dict(
        tuned("rows_linear", _size_class(outputs, shares, squares is not None), x.device)
    )
    share = min(options.pop("SHARE"), size) if shares else size
    parts = -(-size // share)
    out = _empty(x, outputs, parts if shares else None)
    taps = 0
    if conv_state is not None and conv_weight is not None:
        if not conv_state.is_contiguous():
            raise ValueError("rows_linear: conv_state must be contiguous")
        taps, conv_weight = conv_weight.shape[1], conv_weight.contiguous()
    options["BLOCK_R"] = min(options["BLOCK_R"], max(power_of_two(rows), 16))
    row_blocks = -(-rows // options["BLOCK_R"])
    numbers = 0 if squares is None else squares.shape[1]
    with on_device(x):
        rows_linear_kernel[(-(-outputs // options["BLOCK_O"]) * row_blocks, parts)](
            x,
            weight,
            bias,
            None if squares is None else squares.contiguous(),
            out,
            conv_state,
            conv_weight,
            conv_bias,
            x.stride(0),
            weight.stride(0),
            out.stride(0) if shares else 0,
            out.stride(-2),
            rows,
            row_blocks,
            outputs,
            outputs if shares else -(-outputs // _UNIT) * _UNIT,
            conv_first,
            0 if conv_state is None else conv_state.shape[2],
            eps,
            SIZE=size,
            SHARE=share,
            HAS_BIAS=bias is not None,
            SQUARES=numbers,
            TAPS=taps,
            CONV_BIAS=conv_bias is not None,
            BLOCK_S=power_of_two(numbers),
            **_operands(x),
            **options,
            **overlapping(overlap, x.device),
        )
    return out


@rows_linear_triton.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    squares: Tensor | None,
    eps: float,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: int,
    shares: bool,
    overlap: bool,
) -> Tensor:
    outputs, size = weight.shape
    if not shares:
        return _empty(x, outputs, None)
    share = tuned("rows_linear", _size_class(outputs, True, squares is not None), x.device)["SHARE"]
    return _empty(x, outputs, -(-size // min(share, size)))


@torch.library.custom_op("ssm_hf::shares_linear", mutates_args=())
def shares_linear_triton(shares: Tensor, weight: Tensor, overlap: bool) -> tuple[Tensor, Tensor]:
    """See `ssm_hf.ops.rows_linear.shares_linear`."""
    check_tensors("shares_linear", KERNEL_DTYPES, shares=shares, weight=weight)
    shares, weight = shares.contiguous(), weight.contiguous()
    parts, rows, numbers = shares.shape
    outputs, size = weight.shape
    out = shares.new_empty(rows, outputs)
    rest = shares.new_empty(rows, numbers - size)
    options = tuned("shares_linear", "default", shares.device)
    blocks = -(-outputs // options["BLOCK_O"]) + 1
    with on_device(shares):
        shares_linear_kernel[(blocks * -(-rows // options["BLOCK_R"]),)](
            shares,
            weight,
            out,
            rest,
            shares.stride(0),
            rows,
            outputs,
            blocks,
            SIZE=size,
            REST=numbers - size,
            SHARES=parts,
            BLOCK_K=max(power_of_two(size), 16),
            BLOCK_REST=power_of_two(numbers - size),
            **_operands(shares),
            **options,
            **overlapping(overlap, shares.device),
        )
    return out, rest


@shares_linear_triton.register_fake
def _(shares: Tensor, weight: Tensor, overlap: bool) -> tuple[Tensor, Tensor]:
    rows, numbers = shares.shape[1:]
    outputs, size = weight.shape
    return shares.new_empty(rows, outputs), shares.new_empty(rows, numbers - size)


@torch.library.custom_op("ssm_hf::shares_norm", mutates_args=())
def shares_norm_triton(
    shares: Tensor, stream: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, overlap: bool
) -> tuple[Tensor, Tensor]:
    """See `ssm_hf.ops.rows_linear.shares_norm`."""
    check_tensors("shares_norm", KERNEL_DTYPES, shares=shares, stream=stream, weight=weight)
    shares, stream = shares.contiguous(), stream.contiguous()
    parts, rows, size = shares.shape
    total = torch.empty_like(stream)
    out = torch.empty_like(stream, dtype=dtype)
    with on_device(stream):
        shares_norm_kernel[(rows,)](
            stream,
            shares,
            weight,
            total,
            out,
            shares.stride(0),
            eps,
            SIZE=size,
            SHARES=parts,
            BLOCK=power_of_two(size),
            **tuned("shares_norm", "default", stream.device),
            **overlapping(overlap, stream.device),
        )
    return out, total


@shares_norm_triton.register_fake
def _(
    shares: Tensor, stream: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, overlap: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(stream, dtype=dtype), torch.empty_like(stream)


def _empty(x: Tensor, outputs: int, parts: int | None) -> Tensor:
    """The result, rows of whole vectors, or its shares."""
    if parts is not None:
        return x.new_empty(parts, x.shape[0], outputs, dtype=torch.float32)
    return x.new_empty(x.shape[0], -(-outputs // _UNIT) * _UNIT)[:, :outputs]


def _size_class(outputs: int, shares: bool, normed: bool) -> str:
    """What a product does best depends also on what runs before it: with a norm Mamba-2's step."""
    if not shares:
        return "whole"
    return "small" if outputs <= 256 else "normed" if normed else "shares"


def _operands(x: Tensor) -> dict[str, Any]:
    # Triton's interpreter multiplies the bits of bf16 numbers as if they were integers.
    return {"WIDE": architecture(x.device) == "cpu", "PRECISION": "ieee"}
