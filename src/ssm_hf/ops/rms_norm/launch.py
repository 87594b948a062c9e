"""The norm's kernels as torch operators: launches, shapes for tracing, gradients."""

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops.launch import (
    KERNEL_DTYPES,
    call,
    check_tensors,
    common_unit,
    on_device,
    processors,
    tuned,
)
from ssm_hf.ops.rms_norm.kernels import (
    rms_norm_bwd_kernel,
    rms_norm_fwd_kernel,
    sum_rows_kernel,
)

# The widest group that is read once; it lies in the registers of one program.
_WIDEST_BLOCK = 16384
# A tile may be cut into at most so many parts of at least so many columns, where that leaves
# no gap: 3 parts of 256 for a width of 768, for which one block would have 1024 columns.
_MOST_PARTS = 8
_LEAST_PART = 128
# Bytes of the tiles that are fetched ahead backwards: sm80 gives a program 163 KiB.
_MOST_AHEAD = 150 * 1024


def _rows(x: Tensor) -> Tensor:
    """(..., D) as (rows, D), a view where the strides allow it and the last one is 1."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _options(kernel: str, size: int, device: torch.device, **constants: Any) -> dict[str, Any]:
    """Tuned options for groups of `size`, with the tile of TILE elements in rows and columns."""
    block = min(max(1 << (size - 1).bit_length(), 16), _WIDEST_BLOCK)
    options: dict[str, Any] = dict(tuned(kernel, str(block), device))
    rows, whole = max(options.pop("TILE") // block, 1), size <= block
    return {**options, "ROWS": rows if whole else 1, "BLOCK": block, "WHOLE": whole, **constants}


def _parts(block: int, size: int) -> tuple[int, int]:
    """BLOCK and PARTS of a tile `block` columns wide for groups of `size`."""
    part = size & -size
    if part >= _LEAST_PART and size // part <= _MOST_PARTS and size <= block:
        return part, size // part
    return block, 1


@torch.library.custom_op("ssm_hf::rms_norm_fwd", mutates_args=())
def _forward(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., D) -> y in `dtype`, x + residual in residual's dtype (or empty), 1/rms per group."""
    y, total, scale = _empty_outputs(x, residual, weight, group_size, dtype)
    rows, groups = scale.shape
    if rows == 0:
        return y, total, scale
    x, weight = _rows(x), weight.contiguous()
    residual_rows = x if residual is None else _rows(residual)
    gate_rows = x if gate is None else _rows(gate)
    strides = (x.stride(0), residual_rows.stride(0), gate_rows.stride(0), y.shape[-1])
    unit = common_unit(*strides, group_size)
    options = _options(
        "rms_norm_fwd",
        group_size,
        x.device,
        HAS_RESIDUAL=residual is not None,
        GATE_FIRST=gate is not None and not norm_before_gate,
        GATE_LAST=gate is not None and norm_before_gate,
        UNIT=unit,
    )
    if options.pop("SPLIT"):
        options["BLOCK"], options["PARTS"] = _parts(options["BLOCK"], group_size)
    else:
        options["PARTS"] = 1
    with on_device(x):
        rms_norm_fwd_kernel[(-(-rows // options["ROWS"]) * groups,)](
            x,
            residual_rows,
            gate_rows,
            weight,
            y,
            total,
            scale,
            *(stride // unit for stride in strides),
            rows=rows,
            groups=groups,
            size=group_size,
            eps=eps,
            **options,
        )
    return y, total, scale


def _empty_outputs(
    x: Tensor, residual: Tensor | None, weight: Tensor, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    y = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return (
        y,
        total,
        weight.new_empty((x.numel() // width, width // group_size), dtype=torch.float32),
    )


@_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(x, residual, weight, group_size, dtype)


@torch.library.custom_op("ssm_hf::rms_norm_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    group_size: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x in `dtype`, residual (empty: the same as x's, or none), gate and weight."""
    grads = _empty_grads(dy, h, gate, weight, dtype, residual_dtype, weight_grad)
    gradients_into(*grads, None, dy, dtotal, h, gate, weight, scale, group_size, norm_before_gate)
    return grads


def gradients_into(
    dx: Tensor,
    dresidual: Tensor,
    dgate: Tensor,
    dweight: Tensor,
    y: Tensor | None,
    dy: Tensor,
    dtotal: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    group_size: int,
    norm_before_gate: bool,
) -> None:
    """Write the gradients, where not empty, and with `y` the output of forward once more.

    dgate may have any stride between its rows; all else that is written is contiguous.
    """
    rows, groups = scale.shape
    weight_grad = dweight.numel() > 0
    if rows == 0:
        dweight.zero_()
        return
    dy, h, weight = _rows(dy), _rows(h), weight.contiguous()
    dtotal_rows = dy if dtotal is None else _rows(dtotal)
    gate_rows = dy if gate is None else _rows(gate)
    dgate_stride = dx.shape[-1] if gate is None else dgate.flatten(0, -2).stride(0)
    strides = (
        dy.stride(0), dtotal_rows.stride(0), h.stride(0), gate_rows.stride(0), dx.shape[-1],
        dgate_stride,
    )  # fmt: skip
    unit = common_unit(*strides, group_size)
    options = _options(
        "rms_norm_bwd",
        group_size,
        dy.device,
        HAS_DTOTAL=dtotal is not None,
        TWO_GRADS=dresidual.numel() > 0,
        GATE_FIRST=gate is not None and not norm_before_gate,
        GATE_LAST=gate is not None and norm_before_gate,
        WEIGHT_GRAD=weight_grad,
        UNIT=unit,
    )
    options["BLOCK"], options["PARTS"] = _parts(options["BLOCK"], group_size)
    inputs = [dy, h, *(t for t in (dtotal, gate) if t is not None)]
    tile = options["ROWS"] * options["BLOCK"] * options["PARTS"]
    if (options["STAGES"] - 1) * tile * sum(t.itemsize for t in inputs) > _MOST_AHEAD:
        options["STAGES"] = 1
    # As many programs as run at once; each adds up its rows' share of dweight.
    programs = max(options.pop("PROGRAMS") * processors(dy.device) // groups, 1)
    programs = min(programs, -(-rows // options["ROWS"]))
    partial = dy.new_empty((programs, dx.shape[-1] if weight_grad else 0), dtype=torch.float32)
    with on_device(dy):
        rms_norm_bwd_kernel[(programs, groups)](
            dy,
            dtotal_rows,
            h,
            gate_rows,
            weight,
            scale,
            dx,
            dresidual,
            dgate,
            y,
            partial,
            *(stride // unit for stride in strides),
            rows=rows,
            size=group_size,
            **options,
        )
        if weight_grad:
            options = dict(tuned("sum_rows", "default", dy.device))
            sum_rows_kernel[(-(-partial.shape[1] // options["BLOCK"]),)](
                partial,
                dweight,
                partial.shape[0],
                partial.shape[1],
                **options,  # pyright: ignore[reportArgumentType]
            )


def _empty_grads(
    dy: Tensor,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    two_grads = residual_dtype is not None and residual_dtype != dtype
    return (
        h.new_empty(h.shape, dtype=dtype),
        h.new_empty(h.shape if two_grads else (0,), dtype=residual_dtype),
        h.new_empty(0) if gate is None else gate.new_empty(gate.shape),
        weight.new_empty(weight.shape if weight_grad else (0,)),
    )


@_backward.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    group_size: int,
    norm_before_gate: bool,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_grads(dy, h, gate, weight, dtype, residual_dtype, weight_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, gate, weight, _, ctx.group_size, ctx.norm_before_gate, dtype = inputs
    _, total, scale = output
    ctx.mark_non_differentiable(*((scale, total) if residual is None else (scale,)))
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.y_dtype = dtype
    ctx.save_for_backward(x if residual is None else total, gate, weight, scale)


def _gradients(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, dscale: None) -> Any:
    h, gate, weight, scale = ctx.saved_tensors
    if dy is None:
        dy = h.new_zeros((), dtype=ctx.y_dtype).expand(h.shape)
    dx, dresidual, dgate, dweight = _backward(
        dy,
        dtotal if ctx.residual_dtype is not None else None,
        h,
        gate,
        weight,
        scale,
        ctx.group_size,
        ctx.norm_before_gate,
        ctx.dtype,
        ctx.residual_dtype,
        ctx.needs_input_grad[3],
    )
    if ctx.residual_dtype is None:
        dresidual = None
    elif ctx.residual_dtype == ctx.dtype:
        dresidual = dx
    return (
        dx,
        dresidual,
        None if gate is None else dgate,
        dweight if ctx.needs_input_grad[3] else None,
        None,
        None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


def rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    group_size: int | None,
    norm_before_gate: bool,
) -> Tensor:
    """As `rms_norm_torch`, in one kernel each way."""
    check_tensors("rms_norm", KERNEL_DTYPES, x=x, weight=weight, gate=gate)
    size = x.shape[-1] if group_size is None else group_size
    return call(_forward, x, None, gate, weight, eps, size, norm_before_gate, x.dtype)[0]


def add_rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm_torch`, in one kernel each way."""
    check_tensors("add_rms_norm", KERNEL_DTYPES, x=x, residual=residual, weight=weight)
    y, total, _ = call(_forward, x, residual, None, weight, eps, x.shape[-1], False, dtype)
    return y, x if residual is None else total
