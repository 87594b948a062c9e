"""The inside of a Mamba-1 mixer, operator by operator."""

import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.causal_conv1d import causal_conv1d
from ssm_hf.ops.selective_scan import selective_scan


def mamba1_mix_torch(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    real_first: tuple[Tensor, Tensor] | None,
    impl: str,
) -> Tensor:
    """One operator after another; each decides by `impl` for itself."""
    x, z = proj.chunk(2, dim=-1)
    x = causal_conv1d(
        x, conv_weight, conv_bias, activation="silu", seq_idx=seq_idx, mask=mask, impl=impl
    )
    assert isinstance(x, Tensor)
    rank, states = dt_weight.shape[1], A.shape[1]
    low, B, C = F.linear(x, x_weight.to(x.dtype)).split([rank, states, states], dim=-1)
    y = selective_scan(
        x,
        F.linear(low, dt_weight.to(x.dtype)),
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=True,
        seq_idx=seq_idx,
        mask=mask,
        impl=impl,
    )
    assert isinstance(y, Tensor)
    if out_weight is None:
        return y
    return F.linear(y, out_weight.to(y.dtype), None if out_bias is None else out_bias.to(y.dtype))
