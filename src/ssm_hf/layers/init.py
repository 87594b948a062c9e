"""Initial values as pure functions of shape and bounds."""

import math

import torch
from torch import Tensor


def dt_bias_values(
    size: int, low: float, high: float, floor: float, device: torch.device
) -> Tensor:
    """Biases (size,) whose softplus is log-uniform in [low, high], but at least `floor`.

    Source: Gu and Dao 2023, section 3.6 (initialisation of Δ).
    """
    dt = torch.rand(size, device=device) * (math.log(high) - math.log(low)) + math.log(low)
    dt = dt.exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def log_uniform_values(low: float, high: float, size: int, device: torch.device) -> Tensor:
    """log of uniform draws (size,) from [low, high] (Dao and Gu 2024: A in [1, 16])."""
    return torch.empty(size, device=device).uniform_(low, high).log()
