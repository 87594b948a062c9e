"""Models that are any sequence of blocks. Parameter names are those of mamba_ssm's hybrids."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from ssm_hf.cache import RecurrentCache, RecurrentLayer
from ssm_hf.layers.attention import FusedAttention
from ssm_hf.layers.feed_forward import FeedForward
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mamba1 import Mamba1Mixer
from ssm_hf.layers.mamba2 import Mamba2Mixer
from ssm_hf.layers.mamba3 import Mamba3Mixer
from ssm_hf.layers.mixer import Initialization, Mixer, Sublayer
from ssm_hf.layers.mlp import GatedMLP
from ssm_hf.layers.moe import MoE
from ssm_hf.layers.norm import ResidualNorm
from ssm_hf.models.backbone import (
    BackboneMixin,
    CausalLMMixin,
    SSMPreTrainedModel,
    residual,
    routed,
)
from ssm_hf.models.hybrid.configuration_hybrid import HybridConfig
from ssm_hf.sequence import SequenceInfo


def _sublayer(config: HybridConfig, index: int) -> Sublayer:
    """What block `index` consists of beside its norm."""
    kind, o = config.block_options(index)
    width, eps = config.hidden_size, config.layer_norm_epsilon
    if kind == "mamba1":
        o = {**o, "inner_norm_eps": eps if o["inner_norms"] else None}
        o["inner_size"] = o["expand"] * width
        _drop(o, "expand", "inner_norms")
        return Mamba1Mixer(hidden_size=width, layer_idx=index, **o)
    if kind == "mamba2":
        o = {**o, "norm_eps": eps if o["norm"] else None, "inner_size": o["expand"] * width}
        o["num_heads"] = o["d_ssm"] // o["head_dim"]
        _drop(o, "expand", "d_ssm", "norm")
        return Mamba2Mixer(hidden_size=width, layer_idx=index, **o)
    if kind == "mamba3":
        o = {**o, "norm_eps": eps, "num_heads": o["expand"] * width // o["head_dim"]}
        o["num_angles"] = int(o["state_size"] * o["rope_fraction"]) // 2
        _drop(o, "expand", "rope_fraction")
        return Mamba3Mixer(hidden_size=width, layer_idx=index, **o)
    if kind in ("attention", "sliding_attention"):
        return FusedAttention(hidden_size=width, layer_idx=index, config=config, **o)
    if kind == "moe":
        return MoE(hidden_size=width, **o)
    if o["gated"]:
        return GatedMLP(hidden_size=width, intermediate_size=o["intermediate_size"])
    return FeedForward(hidden_size=width, use_bias=False, **o)


def _drop(options: dict[str, Any], *names: str) -> None:
    for name in names:
        del options[name]


class _Redirected:
    """A cache in which layer `asked` is layer `given` of another one."""

    def __init__(self, cache: RecurrentCache, asked: int, given: int) -> None:
        self.layers = {asked: cache.layers[given]}
        self.seen_tokens = cache.seen_tokens


class SharedSublayer(Mixer):
    """The sublayer of an earlier block, used once more: with its weights, and a state of its own.

    Args:
        source: the earlier block's sublayer; it stays that block's.
        layer_idx: place in the cache.
    """

    def __init__(self, source: Sublayer, layer_idx: int) -> None:
        super().__init__(layer_idx)
        self._source = (source,)  # in a tuple, so that its parameters are not listed twice

    def forward(
        self, x: Tensor, seq: SequenceInfo, past_key_values: RecurrentCache | None = None
    ) -> Tensor:
        """As the earlier block's."""
        (source,) = self._source
        cache: Any = past_key_values
        if cache is not None and isinstance(source, Mixer):
            cache = _Redirected(cache, source.layer_idx, self.layer_idx)
        return source(x, seq, cache)

    @property
    def sublayer(self) -> Sublayer:
        """Whose weights these are."""
        return self._source[0]

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """The earlier block draws them."""

    def flops_per_token(self, sequence_length: int) -> int:
        """As the earlier block's."""
        return self.sublayer.flops_per_token(sequence_length)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """As the earlier block's."""
        return self.sublayer.state_shapes(batch) if isinstance(self.sublayer, Mixer) else {}

    def begin(
        self,
        layer: RecurrentLayer,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[..., Tensor] = torch.zeros,
    ) -> None:
        """As the earlier block's."""
        if isinstance(self.sublayer, Mixer):
            self.sublayer.begin(layer, batch, dtype, device, make)


class HybridBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), where the mixer may also be an MLP or a mixture of experts."""

    def __init__(self, config: HybridConfig, layer_idx: int, shared: Sublayer | None) -> None:
        super().__init__()
        self.norm = ResidualNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        if shared is None:
            self.mixer = _sublayer(config, layer_idx)
        else:
            self.mixer = SharedSublayer(shared, layer_idx)

    def forward(
        self,
        update: Tensor,
        stream: Tensor | None,
        seq: SequenceInfo,
        past_key_values: RecurrentCache | None = None,
    ) -> tuple[Any, ...]:
        """(B, T, D) each, see `residual`; and what the router decided, see `routed`."""
        update, stream = residual(update, stream, self.norm, self.mixer, seq, past_key_values)
        source = self.mixer.sublayer if isinstance(self.mixer, SharedSublayer) else self.mixer
        return (update, stream, *routed(source))


class HybridPreTrainedModel(SSMPreTrainedModel):
    """Base of the hybrid models."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "backbone"
    _no_split_modules: ClassVar[list[str]] = ["HybridBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class HybridModel(BackboneMixin, HybridPreTrainedModel):
    """The blocks without a head."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        for index in range(config.num_hidden_layers):
            first = config.shared_with(index)
            shared: Any = None if first == index else self.layers[first].mixer
            self.layers.append(HybridBlock(config, index, shared))
        self.norm_f = ResidualNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def _parts(self) -> tuple[nn.Embedding, nn.ModuleList, nn.Module]:
        return self.embeddings, self.layers, self.norm_f

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embeddings = value


class HybridForCausalLM(CausalLMMixin, HybridPreTrainedModel, GenerationMixin):
    """Language model of any sequence of blocks."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.backbone = HybridModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
