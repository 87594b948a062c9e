"""RMS norm layers."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ssm_hf.layers.linear import linear_dtype
from ssm_hf.ops import add_rms_norm, rms_norm
from ssm_hf.ops.rows_linear import shares_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight; see `ssm_hf.ops.rms_norm` for shapes, gate and groups."""

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        group_size: int | None = None,
        norm_before_gate: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All ones."""
        init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise x (..., size), optionally gated by silu(gate)."""
        return rms_norm(
            x,
            self.weight,
            eps=self.eps,
            gate=gate,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ResidualNorm(RMSNorm):
    """Adds a sublayer's output to the residual stream and norms the sum, in one pass over both."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, update: Tensor, stream: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(..., size) each -> norm(stream + update) for the next sublayer, stream + update.

        Without a stream the update is its beginning; a fused step may leave it as shares (S, B, 1,
        D) of a sum. The norm is returned in the dtype that the next sublayer's linear layers
        compute in: autocast's, else the weight's.
        """
        dtype = linear_dtype(self.weight)
        if update.ndim == 4 and stream is not None:
            normed, stream = shares_norm(
                update[:, :, 0],
                stream[:, 0],
                self.weight,
                eps=self.eps,
                dtype=dtype,
                overlap=True,
            )
            return normed[:, None], stream[:, None]
        return add_rms_norm(update, stream, self.weight, eps=self.eps, dtype=dtype)
