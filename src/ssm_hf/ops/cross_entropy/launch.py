"""The chunked loss with its kernels as torch operators: launches, shapes for tracing, gradients."""

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops.cross_entropy.kernels import cross_entropy_kernel, scale_kernel
from ssm_hf.ops.cross_entropy.reference import TILE, Wanted, loss_and_gradients
from ssm_hf.ops.launch import KERNEL_DTYPES, check_tensors, on_device, tuned


def _project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A `Project` whose rows are aligned, and `_score` may write all of them, whatever the size of
    the vocabulary."""
    row = -(-weight.shape[0] // TILE) * TILE
    logits = h.new_empty(h.shape[0], row)[:, : weight.shape[0]]
    if bias is None:
        return torch.mm(h, weight.t(), out=logits)
    return torch.addmm(bias, h, weight.t(), out=logits)


def _score(logits: Tensor, targets: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """A `Score` in one kernel."""
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    options: dict[str, Any] = dict(tuned("cross_entropy", "default", logits.device))
    cross_entropy_kernel[(logits.shape[0],)](
        logits,
        targets,
        losses,
        logits.stride(0),
        vocabulary=logits.shape[1],
        ignore_index=ignore_index,
        GRADIENT=gradient,  # pyright: ignore[reportArgumentType]
        **options,
    )
    return losses


@torch.library.custom_op("ssm_hf::linear_cross_entropy_fwd", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `loss_and_gradients`."""
    with on_device(hidden):
        return loss_and_gradients(
            hidden,
            weight,
            bias,
            targets.contiguous(),
            ignore_index,
            dtype,
            Wanted(*wanted),
            _project,
            _score,
        )


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    return (
        empty(torch.float32),
        empty(torch.int64),
        empty(dtype, *(hidden.shape if wanted[0] else (0,))),
        empty(torch.float32, *(weight.shape if wanted[1] else (0,))),
        empty(torch.float32, weight.shape[0] if wanted[2] else 0),
    )


@torch.library.custom_op("ssm_hf::linear_cross_entropy_bwd", mutates_args=())
def _scaled(x: Tensor, factor: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    """x times factor in `dtype`; 0 where count is."""
    y = x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        options: dict[str, Any] = dict(tuned("cross_entropy_scale", "default", x.device))
        with on_device(x):
            scale_kernel[(-(-x.numel() // options["BLOCK"]),)](
                x, factor, count, y, x.numel(), **options
            )
    return y


@_scaled.register_fake
def _(x: Tensor, factor: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, *_ = inputs
    _, count, *grads = output
    ctx.mark_non_differentiable(count, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(count, *grads)
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)


def _gradients(ctx: Any, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    count, *grads = ctx.saved_tensors
    scaled: list[Tensor | None] = [None, None, None]
    if dtotal is not None:
        for i, (grad, dtype) in enumerate(zip(grads, ctx.dtypes, strict=True)):
            if ctx.needs_input_grad[i]:
                scaled[i] = _scaled(grad, dtotal, count, dtype)
    return (*scaled, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy_torch`, with kernels for everything but the matrix products."""
    check_tensors(
        "linear_cross_entropy",
        KERNEL_DTYPES,
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
    )
    wanted = Wanted.by(hidden, weight, bias)
    total, count, *_ = _forward(hidden, weight, bias, targets, ignore_index, dtype, list(wanted))
    return total, count
