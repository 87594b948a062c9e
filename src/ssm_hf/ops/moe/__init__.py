"""Mixture of experts: routing of tokens, the experts' feed-forward product, losses of routers."""

from typing import Literal

import torch
from torch import Tensor

from ssm_hf.ops.dispatch import HAS_TRITON, ImplementationUnavailableError, pick
from ssm_hf.ops.launch import unsupported_dtypes
from ssm_hf.ops.moe.grouped import experts_grouped, why_not_grouped
from ssm_hf.ops.moe.losses import (
    RouterKind,
    RouterStatistics,
    Routing,
    load_balancing_loss,
    router_statistics,
    router_z_loss,
)
from ssm_hf.ops.moe.reference import experts_definition, experts_torch, route_torch
from ssm_hf.ops.packing import in_given_precision

if HAS_TRITON:
    from ssm_hf.ops.moe.launch import experts_triton, why_unsupported
    from ssm_hf.ops.moe.route_launch import route_triton
else:
    experts_triton = route_triton = why_unsupported = None

__all__ = [
    "RouterStatistics",
    "Routing",
    "check_activation",
    "check_router",
    "experts_definition",
    "load_balancing_loss",
    "moe_experts",
    "moe_route",
    "router_statistics",
    "router_z_loss",
]

Activation = Literal["silu", "relu2"]
_KINDS = ("softmax", "sigmoid")
_ACTIVATIONS = ("silu", "relu2")


def check_activation(activation: str) -> None:
    """Raise `ValueError` unless experts can have this activation."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {_ACTIVATIONS}, got {activation!r}")


def check_router(
    num_experts: int,
    top_k: int,
    *,
    kind: str = "softmax",
    bias: bool = False,
    groups: int = 1,
    top_groups: int = 1,
) -> None:
    """Raise `ValueError` where the options of a router do not fit one another."""
    if kind not in _KINDS:
        raise ValueError(f"the kind of a router must be one of {_KINDS}, got {kind!r}")
    if num_experts < 1:
        raise ValueError(f"the number of experts must be at least 1, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k must lie between 1 and the number of experts, {num_experts}, got {top_k}"
        )
    if groups < 1 or num_experts % groups:
        raise ValueError(f"groups must divide the {num_experts} experts, got {groups}")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"top_groups must lie between 1 and groups={groups}, got {top_groups}")
    reachable = top_groups * (num_experts // groups)
    if top_k > reachable:
        raise ValueError(
            f"top_k={top_k} is more than the {reachable} experts of {top_groups} of {groups} groups"
        )
    if kind != "sigmoid" and (bias or groups > 1):
        raise ValueError(f'a correction bias or groups need kind="sigmoid", got {kind!r}')


@in_given_precision
def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    kind: RouterKind = "softmax",
    renormalise: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Routing:
    """The k experts of each token, and the weights of their outputs.

    `"softmax"`: the k largest logits; weights are the softmax over all logits there, or, with
    `renormalise`, over the chosen ones alone. `"sigmoid"`: scores are sigmoids; chosen are the k
    largest of scores + bias, of those in the `top_groups` groups whose two best sum highest;
    weights are the scores without the bias, with `renormalise` divided by their sum. Of equals the
    lower number is chosen.

    Args:
        logits: (..., E), any float dtype; everything is computed in fp32 or wider.
        top_k: k, experts of a token.
        kind: `"softmax"` or `"sigmoid"`.
        renormalise: the weights of a token sum to 1 (before `scale`).
        scale: factor of all weights.
        bias: (E,) that corrects the choice, never the weights; it gets no gradient.
        groups: number of groups of E / groups neighbouring experts.
        top_groups: groups that experts of one token may lie in.
        mask: (...) bool, True = real token; pads get expert E, which is none, and weight 0.
        impl: `"auto"`, `"reference"` or `"triton"`.

    Returns:
        `Routing` with experts in descending order of choice.

    Raises:
        ValueError: options do not fit one another (see `check_router`), or shapes disagree.
        ImplementationUnavailableError: `impl="triton"` cannot run.

    Source: Lieber et al. 2024, "Jamba" (softmax); DeepSeek-AI 2024, "DeepSeek-V3", section 2.1.2
    (sigmoid with correction bias and groups).
    """
    if logits.ndim < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floats of shape (..., E), got {logits.dtype} "
            f"of shape {tuple(logits.shape)}"
        )
    lead, num_experts = logits.shape[:-1], logits.shape[-1]
    check_router(
        num_experts, top_k, kind=kind, bias=bias is not None, groups=groups, top_groups=top_groups
    )
    if bias is not None and bias.shape != (num_experts,):
        raise ValueError(f"bias must have shape ({num_experts},), got {tuple(bias.shape)}")
    if mask is not None and (mask.shape != lead or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be a bool tensor of shape {tuple(lead)} (True = real token), "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    run = pick(
        "moe_route",
        impl,
        logits.device,
        reference=route_torch,
        triton=route_triton,
        unsupported=unsupported_dtypes(logits, bias),
    )
    weights, experts = run(
        logits.flatten(0, -2) if logits.ndim > 1 else logits[None],
        bias,
        None if mask is None else mask.flatten(),
        top_k,
        kind,
        renormalise,
        float(scale),
        groups,
        top_groups,
    )
    shape = (*lead, top_k)
    return Routing(logits, weights.view(shape), experts.view(shape), kind)


@in_given_precision
def moe_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    activation: Activation = "silu",
    gated: bool = True,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """y = Σ_k weights_k · ffn_{experts_k}(x), every token by its own experts, none dropped.

    ffn_e(x) = w_out[e] (act(w_in[e]'s first I rows x) * (its last I rows x)), or, without `gated`,
    w_out[e] act(w_in[e] x).

    Args:
        x: (..., D), any float dtype; brought to `dtype`.
        experts: (..., k) integers; a number of E or more is no expert and adds nothing. Negative
            numbers are not allowed and not checked.
        weights: (..., k), any float dtype; the sum is formed in fp32 or wider.
        w_in: (E, 2 I, D) with rows [gate | up], or (E, I, D) without `gated`.
        w_out: (E, D', I).
        activation: `"silu"` or `"relu2"`, relu(x)².
        gated: whether half of the first product multiplies the activated other half.
        dtype: of the products; default that of w_in. Gradients of the weights are rounded to their
            own dtype alone.
        impl: `"auto"`, `"reference"` (a loop over the experts that are hit), `"torch"` (torch's
            grouped product; CUDA or CPU, sizes in multiples of 16 bytes) or `"triton"`.

    Returns:
        (..., D') in `dtype`. There are no second derivatives, but with `"torch"`.

    Raises:
        ValueError: shapes disagree, or an unknown activation or implementation.
        ImplementationUnavailableError: the implementation asked for cannot run.

    Source: Shazeer et al. 2017; gated experts: Shazeer 2020; grouped products without dropping:
    Gale et al. 2022, "MegaBlocks".
    """
    check_activation(activation)
    if x.ndim < 1 or w_in.ndim != 3 or w_in.shape[2] != x.shape[-1]:
        raise ValueError(
            f"w_in must have shape (E, {'2 ' if gated else ''}I, D) for x (..., D), "
            f"got {tuple(w_in.shape)} and {tuple(x.shape)}"
        )
    num_experts, width, size = w_in.shape
    if gated and width % 2:
        raise ValueError(f"w_in must hold as many rows for the gate as for the rest, got {width}")
    inner = width // 2 if gated else width
    if w_out.ndim != 3 or (w_out.shape[0], w_out.shape[2]) != (num_experts, inner):
        raise ValueError(
            f"w_out must have shape ({num_experts}, D', {inner}), got {tuple(w_out.shape)}"
        )
    lead = x.shape[:-1]
    if experts.shape[:-1] != lead or experts.ndim != x.ndim or experts.is_floating_point():
        raise ValueError(
            f"experts must be integers of shape {(*lead, 'k')}, "
            f"got {experts.dtype} of shape {tuple(experts.shape)}"
        )
    if weights.shape != experts.shape or not weights.is_floating_point():
        raise ValueError(
            f"weights must be floats of shape {tuple(experts.shape)}, "
            f"got {weights.dtype} of shape {tuple(weights.shape)}"
        )
    top_k = experts.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"each token must have between 1 and {num_experts} experts, the number there is, "
            f"got {top_k}"
        )
    if dtype is None:
        dtype = w_in.dtype
    if impl == "torch":
        reason = why_not_grouped(x, w_in, w_out, dtype)
        if reason is not None:
            raise ImplementationUnavailableError(
                f'impl="torch" was requested for moe_experts, but {reason}; '
                'use impl="auto" or "reference"'
            )
        run = experts_grouped
    else:
        unsupported = unsupported_dtypes(x, weights, w_in, w_out)
        if unsupported is None and why_unsupported is not None:
            unsupported = why_unsupported(w_in, w_out, dtype)
        run = pick(
            "moe_experts",
            impl,
            x.device,
            reference=experts_torch,
            triton=experts_triton,
            unsupported=unsupported,
        )
    y = run(
        x.reshape(-1, size),
        experts.reshape(-1, top_k),
        weights.reshape(-1, top_k),
        w_in,
        w_out,
        activation,
        gated,
        dtype,
    )
    return y.view(*lead, w_out.shape[1])
