"""The gated MLP between mixers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.linear import Linear, linear_dtype
from ssm_hf.layers.mixer import (
    Initialization,
    Sublayer,
    all_plain,
    norm_and_in_proj,
    reset_linear,
    reset_out_proj,
)
from ssm_hf.layers.norm import ResidualNorm
from ssm_hf.ops.gated_linear import gated_linear
from ssm_hf.ops.norm_linear import few_rows, norm_linear
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
        return self._rest(self.fc1(x))

    def _rest(self, u: Tensor) -> Tensor:
        """Everything after fc1."""
        fc2 = self.fc2
        # Without gradients a CPU has nothing to gain, and `Linear` is faster for a few rows.
        gains = torch.is_grad_enabled() or not u.is_cpu
        if gains and all_plain(fc2) and linear_dtype(fc2.weight) == u.dtype:
            return gated_linear(u, fc2.weight)
        value, gate = u.chunk(2, dim=-1)
        return fc2(value * F.silu(gate))

    def residual_pass(
        self, update: Tensor, stream: Tensor | None, norm: nn.Module, seq: SequenceInfo
    ) -> tuple[Tensor, Tensor] | None:
        """Two operators: norm and fc1, gate and fc2."""
        projected = norm_and_in_proj(update, stream, norm, self.fc1)
        return (self._rest(projected[0]), projected[1]) if projected else None

    def residual_step(
        self,
        update: Tensor,
        stream: Tensor | None,
        norm: nn.Module,
        past_key_values: RecurrentCache,
    ) -> tuple[Tensor, None] | None:
        """Two kernels: norm and fc1; gate, fc2 and sum."""
        if not (
            type(norm) is ResidualNorm
            and not torch.is_grad_enabled()
            and few_rows(update, self.fc1.weight)
            and all_plain(norm, self.fc1, self.fc2)
        ):
            return None
        x = (update if stream is None else stream + update)[:, 0]
        u = norm_linear(
            x,
            self.fc1.weight,
            norm_weight=norm.weight,
            eps=norm.eps,
            out_dtype=torch.float32,
            overlap=True,
        )
        y = norm_linear(u, self.fc2.weight, gated=True, residual=x, overlap=True)
        return y[:, None], None
