"""The convolution's kernels as torch operators: launches, shapes for tracing, gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.causal_conv1d.kernels import (
    causal_conv1d_bwd_kernel,
    causal_conv1d_bwd_sum_kernel,
    causal_conv1d_fwd_kernel,
    real_first_kernel,
)
from ssm_hf.ops.launch import KERNEL_DTYPES, call, check_tensors, common_unit, on_device, tuned


def _options(kernel: str, x: Tensor, packed: bool, **constants: Any) -> dict[str, Any]:
    options: dict[str, Any] = dict(tuned(kernel, "packed" if packed else "default", x.device))
    block = 1 << (x.shape[2] - 1).bit_length()
    options["BLOCK_C"] = max(min(options["BLOCK_C"], block), 16)
    return {**options, **constants}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Strides of batch and time, in a common unit; a row alone needs no stride between rows."""
    strides = [s for t in tensors for s in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1))]
    unit = common_unit(*strides)
    return unit, [s // unit for s in strides]


@torch.library.custom_op("ssm_hf::real_first", mutates_args=())
def real_first_triton(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask (B, T) -> positions of the real tokens and then the pads (B, T), how many are real."""
    order, counts = _empty_order(mask)
    mask = mask.contiguous()
    options: dict[str, Any] = dict(tuned("real_first", "default", mask.device))
    with on_device(mask):
        real_first_kernel[(mask.shape[0],)](mask, order, counts, mask.shape[1], **options)
    return order, counts


@real_first_triton.register_fake
def _empty_order(mask: Tensor) -> tuple[Tensor, Tensor]:
    return (
        mask.new_empty(mask.shape, dtype=torch.int32),
        mask.new_empty(mask.shape[0], dtype=torch.int32),
    )


@torch.library.custom_op("ssm_hf::causal_conv1d_fwd", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    numbers: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    silu: bool,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """y and the final state (or empty); packing as kernels.py describes it."""
    y, final = _empty_outputs(
        x, weight, bias, state, numbers, offsets, order, counts, silu, return_state
    )
    batch, length, channels = x.shape
    x, weight = _rows(x), weight.contiguous()
    unit, strides = _strides(x)
    options = _options(
        "causal_conv1d_fwd", x, numbers is not None, SILU=silu, TAPS=weight.shape[1], UNIT=unit
    )
    documents = 1 if offsets is None else offsets.numel() - 1
    programs = -(-length // (options["SEGMENTS"] * options["ROWS"] * options["STEPS"]))
    if final.numel():
        programs += -(-documents // options["SEGMENTS"])
    grid = batch * programs * -(-channels // options["BLOCK_C"])
    with on_device(x):
        causal_conv1d_fwd_kernel[(grid,)](
            x,
            weight,
            None if bias is None else bias.contiguous(),
            None if state is None else state.contiguous(),
            None if numbers is None else numbers.contiguous(),
            offsets,
            order,
            counts,
            y,
            final,
            *strides,
            length=length,
            channels=channels,
            programs=programs,
            documents=documents,
            **options,
        )
    return y, final


@_forward.register_fake
def _empty_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    numbers: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    silu: bool,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    states = x.shape[0] if offsets is None else offsets.shape[0] - 1
    shape = (states, weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(shape if return_state else (0,))


@torch.library.custom_op("ssm_hf::causal_conv1d_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    numbers: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    silu: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and initial state, each empty where there is none to form."""
    dx, dweight, dbias, dstate = _empty_grads(
        dy, dfinal, x, weight, bias, state, numbers, offsets, order, counts, silu, weight_grad
    )
    gradients_into(
        dx,
        dweight,
        dbias,
        dstate,
        dy,
        dfinal,
        x,
        weight,
        bias,
        state,
        numbers,
        offsets,
        order,
        counts,
        silu,
    )
    return dx, dweight, dbias, dstate


def gradients_into(
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dstate: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    numbers: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    silu: bool,
) -> None:
    """Write the gradients, where not empty; dx may have any strides of batch and time."""
    batch, length, channels = x.shape
    taps = weight.shape[1]
    x, dy, weight = _rows(x), _rows(dy), weight.contiguous()
    unit, strides = _strides(dy, x, dx)
    options = _options("causal_conv1d_bwd", x, numbers is not None, SILU=silu, TAPS=taps, UNIT=unit)
    documents = 1 if offsets is None else offsets.numel() - 1
    pieces = -(-length // (options["SEGMENTS"] * options["ROWS"] * options["STEPS"]))
    programs = pieces + (-(-documents // options["SEGMENTS"]) if dstate.numel() else 0)
    grid = batch * programs * -(-channels // options["BLOCK_C"])
    partial = None
    if dweight.numel():
        partial = x.new_empty((batch * pieces, taps + 1, channels), dtype=torch.float32)
    with on_device(x):
        causal_conv1d_bwd_kernel[(grid,)](
            dy,
            None if dfinal is None else dfinal.contiguous(),
            x,
            weight,
            None if bias is None else bias.contiguous(),
            None if state is None else state.contiguous(),
            None if numbers is None else numbers.contiguous(),
            offsets,
            order,
            counts,
            dx,
            dstate,
            partial,
            *strides,
            length=length,
            channels=channels,
            programs=programs,
            documents=documents,
            **options,
        )
        if partial is not None:
            options: dict[str, Any] = dict(tuned("causal_conv1d_bwd_sum", "default", x.device))
            causal_conv1d_bwd_sum_kernel[(-(-channels // options["BLOCK_C"]), taps + 1)](
                partial,
                dweight,
                None if bias is None else dbias,
                rows=partial.shape[0],
                channels=channels,
                TAPS=taps,  # pyright: ignore[reportArgumentType]
                **options,
            )


@_backward.register_fake
def _empty_grads(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    numbers: Tensor | None,
    offsets: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    silu: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape if weight_grad else (0,)),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape if weight_grad else (0,)),
        x.new_empty(0) if state is None else state.new_empty(state.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.silu, return_state = inputs
    if not return_state:
        ctx.mark_non_differentiable(output[1])
    ctx.return_state = return_state
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, *packing = ctx.saved_tensors
    weight_grad = any(ctx.needs_input_grad[1:3])
    dx, dweight, dbias, dstate = _backward(
        torch.zeros_like(x) if dy is None else dy,
        dfinal if ctx.return_state else None,
        x,
        weight,
        bias,
        state,
        *packing,
        ctx.silu,
        weight_grad,
    )
    return (
        dx,
        dweight if weight_grad else None,
        dbias if weight_grad and bias is not None else None,
        None if state is None else dstate,
        *(None,) * 6,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


def causal_conv1d_triton(
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
    """As `causal_conv1d_torch`; pads and packing are dealt with inside the kernels."""
    check_tensors(
        "causal_conv1d",
        KERNEL_DTYPES,
        x=x,
        weight=weight,
        bias=bias,
        initial_state=initial_state,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        mask=mask,
    )
    order = counts = None
    if mask is not None:
        order, counts = call(real_first_triton, mask)
    if cu_seqlens is not None:
        token = torch.arange(x.shape[1], device=x.device)
        seq_idx = torch.searchsorted(cu_seqlens, token, right=True)[None] - 1
        if mask is not None:
            # documents begin behind so many real tokens
            real = F.pad(mask[0].cumsum(dim=0), (1, 0))
            cu_seqlens = real[cu_seqlens.long()]
        cu_seqlens = cu_seqlens.int()
    return call(
        _forward,
        x,
        weight,
        bias,
        initial_state,
        seq_idx,
        cu_seqlens,
        order,
        counts,
        activation == "silu",
        return_final_state,
    )
