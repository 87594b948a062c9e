"""What models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.selection import Gate
from ssm_hf.ops.moe import RouterStatistics, Routing


@dataclass
class SSMModelOutput(BaseModelOutputWithPast):
    """Hidden states (B, T, D), the cache, and optionally every layer's output.

    `hidden_states` holds the output of each layer and then the normalised last one, as
    transformers' Mamba models return it.

    Attributes:
        router_logits: (B * T, E) of every layer with experts, if asked for.
        routings: all that their routers decided, if asked for.
        gates: what those of selective attention decided, in training or if asked for.
    """

    router_logits: tuple[Tensor, ...] | None = None
    routings: tuple[Routing, ...] | None = None
    gates: tuple[Gate, ...] | None = None

    @property
    def cache_params(self) -> RecurrentCache | None:
        """Another name of `past_key_values`."""
        return self.past_key_values  # pyright: ignore[reportReturnType]


@dataclass
class SSMCausalLMOutput(CausalLMOutputWithPast):
    """Loss, logits (B, T, V) in fp32, the cache, and optionally every layer's output.

    Attributes:
        aux_loss: load-balancing loss over all layers with experts, if asked for.
        z_loss: mean square of the routers' log-partition, if asked for. `loss` holds both, times
            their weights.
        router_logits: (B * T, E) of every layer with experts, if asked for.
        router_statistics: how evenly the experts are used, if asked for.
        capacity_loss: of the budget of selective attention, in training or if asked for; in
            training `loss` holds it, times its weight at the time.
        gate_fractions: (n,) share of the real tokens that each of its n layers selects, likewise.
        gates: all that their gates decided, likewise.
    """

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_statistics: RouterStatistics | None = None
    capacity_loss: Tensor | None = None
    gate_fractions: Tensor | None = None
    gates: tuple[Gate, ...] | None = None

    @property
    def cache_params(self) -> RecurrentCache | None:
        """Another name of `past_key_values`."""
        return self.past_key_values  # pyright: ignore[reportReturnType]
