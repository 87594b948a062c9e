"""RMS norm in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import compute_dtype


def rms_norm_torch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    group_size: int | None,
    norm_before_gate: bool,
) -> Tensor:
    """The definition; statistics, gate and weight in fp32 (fp64 for fp64 inputs)."""
    dtype = compute_dtype(x)
    y = x.to(dtype)
    act = None if gate is None else F.silu(gate.to(dtype))
    if act is not None and not norm_before_gate:
        y = y * act
    grouped = y if group_size is None else y.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(grouped.square().mean(dim=-1, keepdim=True) + eps)
    y = (grouped * scale).view_as(y) * weight.to(dtype)
    if act is not None and norm_before_gate:
        y = y * act
    return y.to(x.dtype)
