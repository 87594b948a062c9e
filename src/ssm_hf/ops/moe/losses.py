"""Losses and statistics of routers, over the layers of a model."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ssm_hf.ops.packing import compute_dtype

Scope = Literal["global", "per_layer"]
RouterKind = Literal["softmax", "sigmoid"]


class Routing(NamedTuple):
    """Where one layer sends its tokens (...,), k experts each.

    Attributes:
        logits: (..., E) of the router.
        weights: (..., k) of the chosen experts' outputs, fp32 or wider; 0 at pads.
        experts: (..., k) int64, numbers of the chosen experts; E, which is none, at pads.
        kind: as of `moe_route`.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor
    kind: RouterKind = "softmax"


class RouterStatistics(NamedTuple):
    """How evenly the experts of L layers are used; tensors, so that nobody waits for a device.

    Attributes:
        load: (L, E) share of the assignments that each expert got; the rows sum to 1.
        imbalance: (L,) the largest load over the mean one; 1 when perfectly even.
        unused: (L,) number of experts without a token.
        entropy: (L,) mean over tokens of the entropy of the router's probabilities, in nats.
    """

    load: Tensor
    imbalance: Tensor
    unused: Tensor
    entropy: Tensor


def probabilities(routing: Routing) -> Tensor:
    """(..., E) that sum to 1: the softmax, or the sigmoid scores divided by their sum."""
    logits = routing.logits.to(compute_dtype(routing.logits))
    if routing.kind != "sigmoid":
        return logits.softmax(dim=-1)
    scores = torch.sigmoid(logits)
    return scores / scores.sum(dim=-1, keepdim=True)


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """values (..., n) with 0 at pads, flattened to (N, n)."""
    if mask is not None:
        values = values.masked_fill(~mask[..., None], 0)
    return values.flatten(0, -2)


def _number(routing: Routing, mask: Tensor | None) -> Tensor | int:
    return routing.logits[..., 0].numel() if mask is None else mask.sum().clamp(min=1)


def _assignments(routing: Routing, mask: Tensor | None) -> Tensor:
    """(E,) how often each expert was chosen, by real tokens."""
    number = torch.arange(routing.logits.shape[-1], device=routing.experts.device)
    chosen = (routing.experts[..., None] == number).sum(dim=-2)
    return _real(chosen, mask).sum(dim=0)


def _check(routings: Sequence[Routing], mask: Tensor | None) -> None:
    if not routings:
        raise ValueError("no layer with experts: expected at least one routing")
    sizes = {r.logits.shape[-1] for r in routings}
    if len(sizes) > 1:
        raise ValueError(f"layers must have the same number of experts, got {sorted(sizes)}")
    for r in routings:
        if mask is not None and (mask.shape != r.logits.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be a bool tensor of shape {tuple(r.logits.shape[:-1])} (True = real "
                f"token), got {mask.dtype} of shape {tuple(mask.shape)}"
            )


def load_balancing_loss(
    routings: Sequence[Routing], *, mask: Tensor | None = None, scope: Scope = "global"
) -> Tensor:
    """E Σ_e f_e P_e: f_e the assignments to expert e per token, P_e its mean probability.

    At its least, with even f, it is k. Gradients flow through P alone.

    Args:
        routings: of every layer with experts.
        mask: (...) bool, True = real token; pads do not count.
        scope: `"global"`: f and P are means over the tokens of all layers, so that opposite
            imbalances of two layers cancel, as in released models; `"per_layer"`: the mean of the
            layers' losses.

    Returns:
        (), fp32 or wider.

    Raises:
        ValueError: no layers, layers of different sizes, a mask that does not fit, or an unknown
            scope.

    Source: Fedus et al. 2021, "Switch Transformers", equations 4 to 6, for k experts a token.
    """
    _check(routings, mask)
    if scope not in ("global", "per_layer"):
        raise ValueError(f'scope must be "global" or "per_layer", got {scope!r}')
    counts, sums = [], []
    for r in routings:
        p = _real(probabilities(r), mask).sum(dim=0)
        counts.append(_assignments(r, mask).to(p).to(routings[0].logits.device))
        sums.append(p.to(routings[0].logits.device))
    f, P = torch.stack(counts), torch.stack(sums)
    number = _number(routings[0], mask)
    if scope == "global":
        f, P = f.mean(dim=0), P.mean(dim=0)
    loss = (f / number * (P / number)).sum(dim=-1) * P.shape[-1]
    return loss.mean()


def router_z_loss(routings: Sequence[Routing], *, mask: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)² over the tokens of all layers: keeps logits small.

    Args:
        routings: of every layer with experts.
        mask: (...) bool, True = real token; pads do not count.

    Returns:
        (), fp32 or wider.

    Raises:
        ValueError: as of `load_balancing_loss`.

    Source: Zoph et al. 2022, "ST-MoE", equation 5.
    """
    _check(routings, mask)
    total = torch.stack(
        [
            _real(r.logits.to(compute_dtype(r.logits)).logsumexp(-1, keepdim=True).square(), mask)
            .sum()
            .to(routings[0].logits.device)
            for r in routings
        ]
    )
    return total.mean() / _number(routings[0], mask)


@torch.no_grad()
def router_statistics(
    routings: Sequence[Routing], *, mask: Tensor | None = None
) -> RouterStatistics:
    """How evenly experts are used, of layers in order; arguments as of `load_balancing_loss`."""
    _check(routings, mask)
    device = routings[0].logits.device
    counts = torch.stack([_assignments(r, mask).to(device) for r in routings])
    entropy = []
    for r in routings:
        p = probabilities(r)
        mean = _real(-torch.xlogy(p, p).sum(-1, keepdim=True), mask).sum() / _number(r, mask)
        entropy.append(mean.to(device))
    load = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return RouterStatistics(
        load=load,
        imbalance=load.amax(dim=1) * load.shape[1],
        unused=(counts == 0).sum(dim=1),
        entropy=torch.stack(entropy),
    )
