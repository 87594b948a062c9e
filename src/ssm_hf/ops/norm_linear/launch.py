"""The kernel as a torch operator."""
# Kernels annotate plain values as constexpr.
# pyright: reportArgumentType=false

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops.launch import check_tensors, on_device, overlapping, tuned
from ssm_hf.ops.norm_linear.kernels import norm_linear_kernel, norm_linear_walk_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# More outputs than this take several rounds of programs, as a vocabulary does.
_TALL = 16384
# From so many weights on, too many for the registers of a GPU, they are walked through; the rows
# are held in their place.
_WALKED = 1 << 23


@torch.library.custom_op("ssm_hf::norm_linear", mutates_args=("conv_state",))
def norm_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    group_size: int,
    gated: bool,
    residual: Tensor | None,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: int,
    out_dtype: torch.dtype,
    overlap: bool,
) -> Tensor:
    """See `ssm_hf.ops.norm_linear`."""
    check_tensors(
        "norm_linear",
        DTYPES,
        x=x,
        weight=weight,
        bias=bias,
        norm_weight=norm_weight,
        residual=residual,
        conv_state=conv_state,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
    )
    x, weight = _rows(x), _rows(weight)
    residual = None if residual is None else _rows(residual)
    rows, (outputs, size) = x.shape[0], weight.shape
    out = x.new_empty(rows, outputs, dtype=out_dtype)
    taps = 0
    if conv_state is not None and conv_weight is not None:
        if not conv_state.is_contiguous():
            raise ValueError("norm_linear: conv_state must be contiguous")
        taps, conv_weight = conv_weight.shape[1], conv_weight.contiguous()
    walked = outputs * size >= _WALKED
    kernel: Any = norm_linear_walk_kernel if walked else norm_linear_kernel
    name = "norm_linear_walk" if walked else "norm_linear"
    options: dict[str, Any] = {
        **tuned(name, _size_class(weight), x.device),
        **overlapping(overlap, x.device),
    }
    programs = -(-outputs // (options["BLOCK_O"] * options.get("STEPS", 1)))
    with on_device(x):
        kernel[(programs,)](
            x,
            norm_weight,
            weight,
            bias,
            residual,
            out,
            conv_state,
            conv_weight,
            conv_bias,
            x.stride(0),
            weight.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            outputs,
            conv_first,
            0 if conv_state is None else conv_state.shape[2],
            eps,
            SIZE_IN=size,
            GROUP_SIZE=group_size,
            NORM=norm_weight is not None,
            GATED=gated,
            HAS_BIAS=bias is not None,
            RESIDUAL=residual is not None,
            TAPS=taps,
            CONV_BIAS=conv_bias is not None,
            BATCH=rows,
            **options,
        )
    return out


@norm_linear_triton.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    group_size: int,
    gated: bool,
    residual: Tensor | None,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: int,
    out_dtype: torch.dtype,
    overlap: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


def _size_class(weight: Tensor) -> str:
    """By the width of a weight's row, which decides how many rows fit into registers."""
    outputs, size = weight.shape
    width = next((str(bound) for bound in (1024, 2048, 4096) if size <= bound), "wide")
    return f"{width}-tall" if outputs > _TALL else width


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
