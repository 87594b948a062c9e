"""Jamba language models. Attribute names are the keys of transformers' model."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.attention import SelfAttention
from ssm_hf.layers.feed_forward import FeedForward
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mamba1 import Mamba1Mixer
from ssm_hf.layers.moe import MoE
from ssm_hf.layers.norm import ResidualNorm
from ssm_hf.models.backbone import (
    BackboneMixin,
    CausalLMMixin,
    SSMPreTrainedModel,
    residual,
    routed,
)
from ssm_hf.models.jamba.configuration_jamba import JambaConfig
from ssm_hf.sequence import SequenceInfo

# Files hold a matrix for each expert, models all of them in one tensor. transformers knows how to
# go from one to the other, but applies it to classes of others only if they ask for it by name.
_CONVERSION: Any = get_checkpoint_conversion_mapping("jamba")
register_checkpoint_conversion_mapping("jamba", _CONVERSION, overwrite=True)


class JambaBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), and then x + feed_forward(norm(x))."""

    def __init__(self, config: JambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_attention = config.layers_block_type[layer_idx] == "attention"
        self.input_layernorm = ResidualNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.is_attention:
            self.self_attn = SelfAttention(
                hidden_size=config.hidden_size,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.attention_head_dim,
                window=None,
                rotary_dim=0,
                rope_theta=1e4,
                scaling=None,
                dropout=config.attention_dropout,
                use_bias=False,
                use_out_bias=False,
                config=config,
                layer_idx=layer_idx,
            )
        else:
            self.mamba = Mamba1Mixer(
                hidden_size=config.hidden_size,
                inner_size=config.mamba_expand * config.hidden_size,
                state_size=config.mamba_d_state,
                conv_kernel=config.mamba_d_conv,
                time_step_rank=int(config.mamba_dt_rank),
                time_step_min=0.001,
                time_step_max=0.1,
                time_step_floor=1e-4,
                time_step_scale=1.0,
                time_step_init_scheme="random",
                use_bias=config.mamba_proj_bias,
                use_conv_bias=config.mamba_conv_bias,
                inner_norm_eps=config.rms_norm_eps,
                layer_idx=layer_idx,
            )
        self.pre_ff_layernorm = ResidualNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.layers_num_experts[layer_idx] > 1:
            self.feed_forward = MoE(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
            )
        else:
            self.feed_forward = FeedForward(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                activation="silu",
                gated=True,
                use_bias=False,
            )

    def forward(
        self,
        update: Tensor,
        stream: Tensor | None,
        seq: SequenceInfo,
        past_key_values: RecurrentCache | None = None,
    ) -> tuple[Any, ...]:
        """(B, T, D) each, see `residual`; and what the router decided, see `routed`."""
        mixer = self.self_attn if self.is_attention else self.mamba
        update, stream = residual(update, stream, self.input_layernorm, mixer, seq, past_key_values)
        update, stream = residual(
            update, stream, self.pre_ff_layernorm, self.feed_forward, seq, past_key_values
        )
        return (update, stream, *routed(self.feed_forward))


class JambaPreTrainedModel(SSMPreTrainedModel):
    """Base of the Jamba models."""

    config: JambaConfig
    config_class = JambaConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["JambaBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.config.initialization != "transformers":
            return
        # Upstream draws the last projections like all others.
        for name in ("out_proj", "o_proj", "down_proj"):
            last = getattr(module, name, None)
            if isinstance(last, nn.Linear):
                init.normal_(last.weight, std=self.config.initializer_range)


class JambaModel(BackboneMixin, JambaPreTrainedModel):
    """Jamba without a head (Lieber et al. 2024)."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(JambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = ResidualNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def _parts(self) -> tuple[nn.Embedding, nn.ModuleList, nn.Module]:
        return self.embed_tokens, self.layers, self.final_layernorm

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value


class JambaForCausalLM(CausalLMMixin, JambaPreTrainedModel, GenerationMixin):
    """Jamba language model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: JambaConfig) -> None:
        super().__init__(config)
        self.model = JambaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
