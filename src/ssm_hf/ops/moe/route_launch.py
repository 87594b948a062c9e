"""The router's kernels as torch operators."""

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops.launch import KERNEL_DTYPES, call, check_tensors, on_device, tuned
from ssm_hf.ops.moe.kernels_route import moe_route_bwd_kernel, moe_route_kernel

# Triton's annotations do not know that plain values may stand for constants.
_route_kernel: Any = moe_route_kernel
_bwd_kernel: Any = moe_route_bwd_kernel


def _power(extent: int, least: int = 2) -> int:
    """Smallest power of two that covers `extent`, at least `least`."""
    return max(least, 1 << (extent - 1).bit_length())


def _options(kernel: str, num_experts: int, device: torch.device) -> dict[str, Any]:
    """Tuned options, ROWS tokens a program: as many as a tile of TILE logits holds."""
    options: dict[str, Any] = dict(tuned(kernel, "default", device))
    block = _power(num_experts)
    return {"BLOCK_E": block, "ROWS": max(options.pop("TILE") // block, 1), **options}


@torch.library.custom_op("ssm_hf::moe_route_fwd", mutates_args=())
def _forward(
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    kind: str,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    """weights (N, k) fp32, experts (N, k) int64."""
    logits = logits.contiguous()
    tokens, num_experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    experts = logits.new_empty(tokens, top_k, dtype=torch.int64)
    options = _options("moe_route", num_experts, logits.device)
    if tokens:
        with on_device(logits):
            _route_kernel[(-(-tokens // options["ROWS"]),)](
                logits,
                bias,
                mask,
                weights,
                experts,
                tokens,
                scale,
                EXPERTS=num_experts,
                TOP_K=top_k,
                SIGMOID=kind == "sigmoid",
                RENORMALISE=renormalise,
                GROUPS=groups,
                TOP_GROUPS=top_groups,
                HAS_BIAS=bias is not None,
                HAS_MASK=mask is not None,
                BLOCK_K=_power(top_k),
                BLOCK_G=_power(groups),
                **options,
            )
    return weights, experts


@_forward.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    kind: str,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("ssm_hf::moe_route_bwd", mutates_args=())
def _backward(
    dweights: Tensor, logits: Tensor, experts: Tensor, kind: str, renormalise: bool, scale: float
) -> Tensor:
    """dlogits (N, E) in logits' dtype."""
    logits, dweights = logits.contiguous(), dweights.contiguous()
    tokens, num_experts = logits.shape
    dlogits = torch.empty_like(logits)
    options = _options("moe_route_bwd", num_experts, logits.device)
    if tokens:
        with on_device(logits):
            _bwd_kernel[(-(-tokens // options["ROWS"]),)](
                dweights,
                logits,
                experts,
                dlogits,
                tokens,
                scale,
                EXPERTS=num_experts,
                TOP_K=experts.shape[1],
                SIGMOID=kind == "sigmoid",
                RENORMALISE=renormalise,
                **options,
            )
    return dlogits


@_backward.register_fake
def _(
    dweights: Tensor, logits: Tensor, experts: Tensor, kind: str, renormalise: bool, scale: float
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, _, ctx.kind, ctx.renormalise, ctx.scale, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _gradients(ctx: Any, dweights: Tensor, _: None) -> tuple[Tensor | None, ...]:
    logits, experts = ctx.saved_tensors
    dlogits = _backward(dweights, logits, experts, ctx.kind, ctx.renormalise, ctx.scale)
    return dlogits, *[None] * 8


_forward.register_autograd(_gradients, setup_context=_setup)


def route_triton(
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    kind: str,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    """As `route_torch`, in one kernel each way."""
    check_tensors("moe_route", KERNEL_DTYPES, logits=logits, bias=bias, mask=mask)
    return call(_forward, logits, bias, mask, top_k, kind, renormalise, scale, groups, top_groups)
