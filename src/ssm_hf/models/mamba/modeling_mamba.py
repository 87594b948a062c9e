"""Mamba-1 language models. Attribute names are the released checkpoints' keys."""

from typing import ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mamba1 import Mamba1Mixer
from ssm_hf.layers.norm import ResidualNorm
from ssm_hf.models.backbone import BackboneMixin, CausalLMMixin, SSMPreTrainedModel, residual
from ssm_hf.models.mamba.configuration_mamba import MambaConfig
from ssm_hf.sequence import SequenceInfo


class MambaBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x))."""

    def __init__(self, config: MambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = ResidualNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = Mamba1Mixer(
            hidden_size=config.hidden_size,
            inner_size=config.intermediate_size,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            time_step_rank=int(config.time_step_rank),
            time_step_min=config.time_step_min,
            time_step_max=config.time_step_max,
            time_step_floor=config.time_step_floor,
            time_step_scale=config.time_step_scale,
            time_step_init_scheme=config.time_step_init_scheme,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            inner_norm_eps=None,
            layer_idx=layer_idx,
        )

    def forward(
        self,
        update: Tensor,
        stream: Tensor | None,
        seq: SequenceInfo,
        past_key_values: RecurrentCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) each, see `residual`."""
        return residual(update, stream, self.norm, self.mixer, seq, past_key_values)


class MambaPreTrainedModel(SSMPreTrainedModel):
    """Base of the Mamba-1 models."""

    config: MambaConfig
    config_class = MambaConfig
    base_model_prefix = "backbone"
    _no_split_modules: ClassVar[list[str]] = ["MambaBlock"]


class MambaModel(BackboneMixin, MambaPreTrainedModel):
    """Mamba-1 without a head (Gu and Dao 2023)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MambaBlock(config, i) for i in range(config.num_hidden_layers))
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


class MambaForCausalLM(CausalLMMixin, MambaPreTrainedModel, GenerationMixin):
    """Mamba-1 language model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.backbone = MambaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
