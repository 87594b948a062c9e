"""The inside of a Mamba-2 mixer, operator by operator."""

import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.causal_conv1d import causal_conv1d
from ssm_hf.ops.rms_norm import rms_norm
from ssm_hf.ops.ssd import ssd


def mamba2_mix_torch(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    n_groups: int,
    chunk_size: int,
    dt_limit: tuple[float, float],
    norm_eps: float,
    norm_before_gate: bool,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    real_first: tuple[Tensor, Tensor] | None,
    impl: str,
) -> Tensor:
    """One operator after another; each decides by `impl` for itself."""
    heads, conv_size = dt_bias.shape[0], conv_weight.shape[0]
    inner = proj.shape[-1] - conv_size - heads
    grouped = (conv_size - inner) // 2
    z, conv_in, dt = proj.split([inner, conv_size, heads], dim=-1)
    conv_out = causal_conv1d(
        conv_in, conv_weight, conv_bias, activation="silu", seq_idx=seq_idx, mask=mask, impl=impl
    )
    assert isinstance(conv_out, Tensor)
    x, B, C = conv_out.split([inner, grouped, grouped], dim=-1)
    x, gate = (v.unflatten(-1, (heads, -1)) for v in (x, z))
    B, C = (v.unflatten(-1, (n_groups, -1)) for v in (B, C))
    y = ssd(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=chunk_size,
        D=D,
        z=gate if norm_weight is None else None,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
        seq_idx=seq_idx,
        mask=mask,
        impl=impl,
    )
    assert isinstance(y, Tensor)
    y = y.flatten(2)
    if norm_weight is not None:
        y = rms_norm(
            y,
            norm_weight,
            eps=norm_eps,
            gate=z,
            group_size=inner // n_groups,
            norm_before_gate=norm_before_gate,
            impl=impl,
        )
    if out_weight is None:
        return y
    out_bias = None if out_bias is None else out_bias.to(y.dtype)
    return F.linear(y, out_weight.to(y.dtype), out_bias)
