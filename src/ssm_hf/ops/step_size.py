"""The step size Δ that both selective scans discretise with."""

import math

import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import compute_dtype


def check_dt_limit(dt_limit: tuple[float, float]) -> None:
    """Raise `ValueError` unless 0 <= lowest <= highest."""
    if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (lowest, highest) with 0 <= lowest, got {dt_limit}")


def step_size(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    mask: Tensor | None,
) -> Tensor:
    """clamp(softplus(dt + bias)) in fp32 or wider, and 0 at pads, which then hold the state.

    dt (B, T, H) or (B, H), dt_bias (H,), mask (B, T) -> Δ with dt's shape.
    """
    dt = dt.to(compute_dtype(dt, dt_bias))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    lowest, highest = dt_limit
    if lowest > 0 or not math.isinf(highest):
        dt = dt.clamp(lowest, highest)
    return dt if mask is None else dt * mask[..., None]
