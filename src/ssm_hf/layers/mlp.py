"""The gated MLP between mixers."""

import torch.nn.functional as F
from torch import Tensor

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mixer import Initialization, Sublayer, reset_linear, reset_out_proj
from ssm_hf.sequence import SequenceInfo

_MULTIPLE = 128


class GatedMLP(Sublayer):
    """fc2(value * silu(gate)), [value | gate] = fc1(x) (Shazeer 2020); each token by itself.

    Args:
        hidden_size: D.
        intermediate_size: width of value and gate, rounded up to a multiple of 128.
    """

    def __init__(self, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        width = -(-intermediate_size // _MULTIPLE) * _MULTIPLE
        self.fc1 = Linear(hidden_size, 2 * width, bias=False)
        self.fc2 = Linear(width, hidden_size, bias=False)
        self.reset_parameters("mamba_ssm", std=0.0, num_residual_layers=None)

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values."""
        reset_linear(self.fc1, scheme, std)
        reset_out_proj(self.fc2, num_residual_layers)

    def flops_per_token(self, sequence_length: int) -> int:
        """The two projections."""
        return 2 * sum(fc.in_features * fc.out_features for fc in (self.fc1, self.fc2))

    def forward(
        self,
        x: Tensor,
        seq: SequenceInfo | None = None,
        past_key_values: RecurrentCache | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); neither neighbours nor a state matter."""
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))
