"""Mamba-2 language models. Attribute names are the released checkpoints' keys."""

from typing import ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mamba2 import Mamba2Mixer
from ssm_hf.layers.norm import ResidualNorm
from ssm_hf.models.backbone import BackboneMixin, CausalLMMixin, SSMPreTrainedModel, residual
from ssm_hf.models.mamba2.configuration_mamba2 import Mamba2Config
from ssm_hf.sequence import SequenceInfo


class Mamba2Block(GradientCheckpointingLayer):
    """x + mixer(norm(x))."""

    def __init__(self, config: Mamba2Config, layer_idx: int) -> None:
        super().__init__()
        self.norm = ResidualNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(
            hidden_size=config.hidden_size,
            inner_size=config.num_heads * config.head_dim,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            state_size=config.state_size,
            n_groups=config.n_groups,
            conv_kernel=config.conv_kernel,
            chunk_size=config.chunk_size,
            time_step_min=config.time_step_min,
            time_step_max=config.time_step_max,
            time_step_floor=config.time_step_floor,
            time_step_limit=(config.time_step_limit[0], config.time_step_limit[1]),
            norm_eps=config.layer_norm_epsilon,
            norm_before_gate=False,
            D_per_channel=False,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
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


class Mamba2PreTrainedModel(SSMPreTrainedModel):
    """Base of the Mamba-2 models."""

    config: Mamba2Config
    config_class = Mamba2Config
    base_model_prefix = "backbone"
    _no_split_modules: ClassVar[list[str]] = ["Mamba2Block"]


class Mamba2Model(BackboneMixin, Mamba2PreTrainedModel):
    """Mamba-2 without a head (Dao and Gu 2024)."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mamba2Block(config, i) for i in range(config.num_hidden_layers))
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


class Mamba2ForCausalLM(CausalLMMixin, Mamba2PreTrainedModel, GenerationMixin):
    """Mamba-2 language model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.backbone = Mamba2Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
