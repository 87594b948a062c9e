"""Mamba-3 language models. Attribute names are the released checkpoints' keys."""

from typing import ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mamba3 import Mamba3Mixer
from ssm_hf.layers.mlp import GatedMLP
from ssm_hf.layers.norm import ResidualNorm
from ssm_hf.models.backbone import BackboneMixin, CausalLMMixin, SSMPreTrainedModel, residual
from ssm_hf.models.mamba3.configuration_mamba3 import Mamba3Config
from ssm_hf.sequence import SequenceInfo


class Mamba3Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), and then x + mlp(norm2(x))."""

    def __init__(self, config: Mamba3Config, layer_idx: int) -> None:
        super().__init__()
        self.norm = ResidualNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = Mamba3Mixer(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            state_size=config.state_size,
            n_groups=config.n_groups,
            mimo_rank=config.mimo_rank,
            num_angles=config.num_angles,
            rope_layout=config.rope_layout or "",
            A_activation=config.A_activation,
            A_floor=config.A_floor,
            trapezoid=config.trapezoid,
            bc_bias=config.bc_bias,
            chunk_size=config.chunk_size,
            time_step_min=config.time_step_min,
            time_step_max=config.time_step_max,
            time_step_floor=config.time_step_floor,
            norm_eps=config.layer_norm_epsilon,
            output_norm=config.output_norm,
            use_bias=config.use_bias,
            layer_idx=layer_idx,
        )
        self.has_mlp = config.intermediate_size > 0
        if self.has_mlp:
            self.norm2 = ResidualNorm(config.hidden_size, eps=config.layer_norm_epsilon)
            self.mlp = GatedMLP(
                hidden_size=config.hidden_size, intermediate_size=config.intermediate_size
            )

    def forward(
        self,
        update: Tensor,
        stream: Tensor | None,
        seq: SequenceInfo,
        past_key_values: RecurrentCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) each, see `residual`."""
        update, stream = residual(update, stream, self.norm, self.mixer, seq, past_key_values)
        if not self.has_mlp:
            return update, stream
        return residual(update, stream, self.norm2, self.mlp, seq, past_key_values)


class Mamba3PreTrainedModel(SSMPreTrainedModel):
    """Base of the Mamba-3 models."""

    config: Mamba3Config
    config_class = Mamba3Config
    base_model_prefix = "backbone"
    _no_split_modules: ClassVar[list[str]] = ["Mamba3Block"]


class Mamba3Model(BackboneMixin, Mamba3PreTrainedModel):
    """Mamba-3 without a head."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Mamba3Block(config, i) for i in range(config.num_hidden_layers))
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


class Mamba3ForCausalLM(CausalLMMixin, Mamba3PreTrainedModel, GenerationMixin):
    """Mamba-3 language model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__(config)
        self.backbone = Mamba3Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
