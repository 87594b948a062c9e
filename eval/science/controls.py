"""Models that exist to be compared with: a time-invariant mixer, and a gated network.

They are made of what is there and are known by their `model_type` once `register` has run, so that
a suite gives them like any other model.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

import ssm_hf


class TimeInvariantMambaConfig(ssm_hf.MambaConfig):
    """As `MambaConfig`."""

    model_type = "mamba_time_invariant"


class ConstantProjection(nn.Linear):
    """A learnt constant in the place of a projection: no input changes what it gives."""

    def __init__(self, out_features: int) -> None:
        super().__init__(1, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., anything) -> (..., out_features)."""
        return F.linear(torch.ones_like(input[..., :1]), self.weight)


class TimeInvariantMambaForCausalLM(ssm_hf.MambaForCausalLM):
    """Mamba-1 whose step sizes, B and C are learnt constants.

    The scan is then a convolution with a fixed kernel, as in S4D with real rates (Gu et al. 2022),
    inside an otherwise equal block: gate, short convolution, widths and states are Mamba's.
    """

    config: TimeInvariantMambaConfig
    config_class = TimeInvariantMambaConfig

    def __init__(self, config: TimeInvariantMambaConfig) -> None:
        super().__init__(config)
        for module in list(self.modules()):
            projection = getattr(module, "x_proj", None)
            if isinstance(projection, nn.Linear):
                module.x_proj = ConstantProjection(projection.out_features)


class LSTMConfig(PreTrainedConfig):
    """hidden_size, num_hidden_layers and vocab_size of an `LSTMForCausalLM`."""

    model_type = "lstm"

    vocab_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 1
    tie_word_embeddings: bool = False


class LSTM(nn.Module):
    """Embedding and `nn.LSTM` (Hochreiter and Schmidhuber 1997)."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, size)
        self.lstm = nn.LSTM(size, size, config.num_hidden_layers, batch_first=True)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor]:
        """(B, T) -> hidden states (B, T, D), in fp32."""
        with torch.autocast(input_ids.device.type, enabled=False):
            hidden, _ = self.lstm(self.embeddings(input_ids))
        return (hidden,)


class LSTMForCausalLM(PreTrainedModel):
    """A gated recurrent network, which can do what diagonal linear ones cannot: parity.

    It has no borders inside a row: train it with one sample to a row (`pack: false`).
    """

    config: LSTMConfig
    config_class = LSTMConfig
    base_model_prefix = "backbone"
    _tied_weights_keys: ClassVar[Any] = {}

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.backbone = LSTM(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initial values stand."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.backbone.embeddings

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False, **_: Any
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the loss if labels are given."""
        logits = self.lm_head(self.backbone(input_ids)[0])
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


def register() -> None:
    """Make our models and the controls known to transformers' Auto classes; may run twice."""
    ssm_hf.register(override=True)
    for config, model in (
        (TimeInvariantMambaConfig, TimeInvariantMambaForCausalLM),
        (LSTMConfig, LSTMForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
