"""Mixture of experts between mixers: router, experts, shared experts."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.feed_forward import FeedForward
from ssm_hf.layers.linear import Linear, linear_dtype
from ssm_hf.layers.mixer import Initialization, Sublayer, reset_linear
from ssm_hf.ops.moe import (
    Activation,
    RouterKind,
    Routing,
    check_activation,
    check_router,
    moe_experts,
    moe_route,
)
from ssm_hf.ops.packing import compute_dtype, in_given_precision
from ssm_hf.sequence import SequenceInfo


@in_given_precision
def _wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product in fp32 or wider, under autocast too."""
    dtype = compute_dtype(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype))


class TopKRouter(nn.Module):
    """x -> logits -> the k experts of each token; see `ssm_hf.ops.moe.moe_route` for the options.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: k.
        kind: `"softmax"` or `"sigmoid"`.
        renormalise: whether the weights of a token sum to 1.
        scale: factor of all weights.
        groups: groups of neighbouring experts.
        top_groups: groups that experts of one token may lie in.
        correction_bias: keep a buffer `e_score_correction_bias` (E,) that corrects the choice.
        wide: form the logits in fp32, whatever dtype x has.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        *,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        kind: RouterKind,
        renormalise: bool,
        scale: float,
        groups: int,
        top_groups: int,
        correction_bias: bool,
        wide: bool,
    ) -> None:
        super().__init__()
        check_router(
            num_experts,
            top_k,
            kind=kind,
            bias=correction_bias,
            groups=groups,
            top_groups=top_groups,
        )
        self.top_k = top_k
        self.kind: RouterKind = kind
        self.renormalise = renormalise
        self.scale = scale
        self.groups = groups
        self.top_groups = top_groups
        self.wide = wide
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        bias = torch.zeros(num_experts) if correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def reset_parameters(self, scheme: Initialization, std: float) -> None:
        """Weight by scheme, the correction bias 0."""
        _reset(self.weight, scheme, std, None)
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        """x (..., D), mask (...) True at real tokens -> logits (..., E), experts, weights."""
        logits = (_wide_linear if self.wide else F.linear)(x, self.weight)
        return moe_route(
            logits,
            self.top_k,
            kind=self.kind,
            renormalise=self.renormalise,
            scale=self.scale,
            bias=self.e_score_correction_bias,
            groups=self.groups,
            top_groups=self.top_groups,
            mask=mask,
        )

    @torch.no_grad()
    def balance_(self, load: Tensor, rate: float) -> None:
        """Move the correction bias by `rate` towards experts of less than the mean load.

        Args:
            load: (E,) assignments or shares of this layer, as in `RouterStatistics.load`.
            rate: step of the bias.

        Raises:
            ValueError: the router has no correction bias.

        Source: Wang et al. 2024, "Auxiliary-loss-free load balancing", algorithm 1.
        """
        bias = self.e_score_correction_bias
        if bias is None:
            raise ValueError("this router has no correction bias to balance with")
        load = load.to(bias)
        bias += rate * torch.sign(load.mean() - load)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.weight.shape[1]}, experts={self.weight.shape[0]}, top_k={self.top_k}"


class Experts(nn.Module):
    """The weights of E feed-forward experts, fused: (E, out, in).

    Per-expert weights, `{e}.{gate,up,down}_proj.weight` below this module's name, are accepted by
    `load_state_dict` as well.

    Args:
        hidden_size: D.
        intermediate_size: I.
        num_experts: E.
        activation: `"silu"` or `"relu2"`.
        gated: parameters `gate_up_proj` (E, 2 I, D), rows [gate | up], and `down_proj` (E, D, I);
            without, `up_proj` (E, I, D) and `down_proj`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        activation: Activation,
        gated: bool,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation: Activation = activation
        self.gated = gated
        # "auto", "reference", "torch" or "triton"; see `ssm_hf.ops.moe.moe_experts`.
        self.impl = "auto"
        if gated:
            width = 2 * intermediate_size
            self.gate_up_proj = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        else:
            self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    @property
    def in_proj(self) -> nn.Parameter:
        """The weights before the activation."""
        return self.gate_up_proj if self.gated else self.up_proj

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Every expert like a layer of its own."""
        _reset(self.in_proj, scheme, std, None)
        _reset(self.down_proj, scheme, std, num_residual_layers)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (..., D) -> the weighted sum of each token's experts (..., D)."""
        return moe_experts(
            x,
            routing.experts,
            routing.weights,
            self.in_proj,
            self.down_proj,
            activation=self.activation,
            gated=self.gated,
            dtype=linear_dtype(self.down_proj),
            impl=self.impl,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        single = {n: t for n, t in state_dict.items() if n.startswith(prefix) and _SINGLE.search(n)}
        for name in single:
            del state_dict[name]
        state_dict.update(fuse_experts(single))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        experts, out, inner = self.down_proj.shape
        return f"{experts} of {out} x {inner}, activation={self.activation}, gated={self.gated}"


class MoE(Sublayer):
    """Σ_k weight_k expert_k(x) of each token's k experts, and the shared experts' output.

    Attribute names are those of released checkpoints: `router.weight`, `experts.gate_up_proj`,
    `experts.down_proj`, or `experts.up_proj` of ungated experts. After a call `routing` holds what
    the router decided, until `take_routings` or the next call; pads are sent to no expert.

    Args:
        hidden_size: D.
        intermediate_size: I of each expert.
        num_experts: E.
        top_k: k.
        activation: `"silu"` or `"relu2"`.
        gated: see `Experts`.
        kind, renormalise, scale, groups, top_groups, correction_bias, wide_router: see
            `TopKRouter`.
        shared_size: width of the shared experts; 0 = none.
        shared_gate: whether sigmoid(shared_gate(x)) multiplies their output.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        activation: Activation = "silu",
        gated: bool = True,
        kind: RouterKind = "softmax",
        renormalise: bool = False,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        correction_bias: bool = False,
        wide_router: bool = False,
        shared_size: int = 0,
        shared_gate: bool = False,
    ) -> None:
        super().__init__()
        self.router = TopKRouter(
            hidden_size=hidden_size,
            num_experts=num_experts,
            top_k=top_k,
            kind=kind,
            renormalise=renormalise,
            scale=scale,
            groups=groups,
            top_groups=top_groups,
            correction_bias=correction_bias,
            wide=wide_router,
        )
        self.experts = Experts(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            activation=activation,
            gated=gated,
        )
        self.shared_experts = self.shared_gate = None
        if shared_size > 0:
            self.shared_experts = FeedForward(
                hidden_size=hidden_size,
                intermediate_size=shared_size,
                activation=activation,
                gated=gated,
                use_bias=False,
            )
            if shared_gate:
                self.shared_gate = Linear(hidden_size, 1, bias=False)
        elif shared_gate:
            raise ValueError("shared_gate needs shared experts: expected shared_size > 0, got 0")
        self.routing: Routing | None = None
        self.reset_parameters("mamba_ssm", std=0.0, num_residual_layers=None)

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values."""
        self.router.reset_parameters(scheme, std)
        self.experts.reset_parameters(scheme, std, num_residual_layers)
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters(scheme, std, num_residual_layers)
        if self.shared_gate is not None:
            reset_linear(self.shared_gate, scheme, std)

    def flops_per_token(self, sequence_length: int) -> int:
        """Router, k experts, and what is shared."""
        of_expert = self.experts.in_proj[0].numel() + self.experts.down_proj[0].numel()
        weights = self.router.weight.numel() + self.router.top_k * of_expert
        flops = 2 * weights
        if self.shared_experts is not None:
            flops += self.shared_experts.flops_per_token(sequence_length)
        if self.shared_gate is not None:
            flops += 2 * self.shared_gate.weight.numel()
        return flops

    def forward(
        self,
        x: Tensor,
        seq: SequenceInfo | None = None,
        past_key_values: RecurrentCache | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); of `seq` only the padding matters, a state does not."""
        routing = self.router(x, None if seq is None else seq.mask)
        self.routing = routing
        y = self.experts(x, routing)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(x)) * shared
            y = y + shared
        return y


def take_routings(layers: Iterable[nn.Module]) -> list[Routing]:
    """The routings of the last call of every `MoE` among the modules, which then forget them."""
    taken = []
    for layer in layers:
        if isinstance(layer, MoE) and layer.routing is not None:
            taken.append(layer.routing)
            layer.routing = None
    return taken


def _reset(
    weight: nn.Parameter, scheme: Initialization, std: float, num_residual_layers: int | None
) -> None:
    """Weight (..., out, in): uniform in ±1/sqrt(in) or normal, over the root of the depth."""
    scale = 1.0 if num_residual_layers is None else 1 / math.sqrt(num_residual_layers)
    if scheme == "transformers":
        init.normal_(weight, mean=0.0, std=std * scale)
    else:
        bound = scale / math.sqrt(weight.shape[-1])
        init.uniform_(weight, -bound, bound)


_SINGLE = re.compile(r"(?:^|\.)(\d+)\.(gate|up|down)_proj\.weight$")
_FUSED = re.compile(r"(.*experts\.)(gate_up|up|down)_proj$")


def fuse_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per-expert weights brought to the fused layout; all else stays as it is.

    `….{e}.gate_proj.weight` and `….{e}.up_proj.weight`, (I, D) each, become `….gate_up_proj`
    (E, 2 I, D), or `….up_proj` (E, I, D) where there is no gate; `….{e}.down_proj.weight` (D, I)
    becomes `….down_proj` (E, D, I).

    Raises:
        ValueError: an expert is missing, or has other weights than its neighbours.
    """
    fused: dict[str, Tensor] = {}
    found: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _SINGLE.search(name)
        if match is None:
            fused[name] = tensor
            continue
        place = name[: match.start(1)]
        found.setdefault(place, {}).setdefault(match[2], {})[int(match[1])] = tensor
    for place, kinds in found.items():
        numbers = sorted(set().union(*kinds.values()))
        for kind in {"up", "down", *kinds}:
            missing = [e for e in range(numbers[-1] + 1) if e not in kinds.get(kind, {})]
            if missing:
                raise ValueError(f"{place}{missing[0]}.{kind}_proj.weight is missing")
        stacks = {
            kind: torch.stack([by_number[e] for e in numbers]) for kind, by_number in kinds.items()
        }
        fused[f"{place}down_proj"] = stacks["down"]
        if "gate" in stacks:
            fused[f"{place}gate_up_proj"] = torch.cat((stacks["gate"], stacks["up"]), dim=1)
        else:
            fused[f"{place}up_proj"] = stacks["up"]
    return fused


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `fuse_experts`, for parameters of modules called `experts`; with copies."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            split[name] = tensor
            continue
        for e, of_expert in enumerate(tensor.unbind()):
            parts = {match[2]: of_expert}
            if match[2] == "gate_up":
                parts = dict(zip(("gate", "up"), of_expert.chunk(2), strict=True))
            for kind, part in parts.items():
                split[f"{match[1]}{e}.{kind}_proj.weight"] = part.clone()
    return split
