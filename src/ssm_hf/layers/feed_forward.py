"""Feed-forward networks with a projection for each of their parts."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mixer import Initialization, Sublayer, reset_linear, reset_out_proj
from ssm_hf.sequence import SequenceInfo


class FeedForward(Sublayer):
    """down_proj(act(gate_proj(x)) * up_proj(x)), or down_proj(act(up_proj(x))).

    Args:
        hidden_size: D.
        intermediate_size: inner width.
        activation: `"silu"` or `"relu2"`, relu(x)².
        gated: whether there is a gate_proj.
        use_bias: biases of all projections.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        activation: Literal["silu", "relu2"],
        gated: bool,
        use_bias: bool,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = None
        if gated:
            self.gate_proj = Linear(hidden_size, intermediate_size, bias=use_bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=use_bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=use_bias)
        self.reset_parameters("mamba_ssm", std=0.0, num_residual_layers=None)

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values."""
        for linear in (self.gate_proj, self.up_proj):
            if linear is not None:
                reset_linear(linear, scheme, std)
        reset_out_proj(self.down_proj, num_residual_layers)

    def flops_per_token(self, sequence_length: int) -> int:
        """The projections."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return 2 * sum(m.weight.numel() for m in linears if m is not None)

    def forward(
        self,
        x: Tensor,
        seq: SequenceInfo | None = None,
        past_key_values: RecurrentCache | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); neither neighbours nor a state matter."""
        up = self.up_proj(x)
        first = up if self.gate_proj is None else self.gate_proj(x)
        hidden = F.silu(first) if self.activation == "silu" else F.relu(first).square()
        return self.down_proj(hidden if self.gate_proj is None else hidden * up)
