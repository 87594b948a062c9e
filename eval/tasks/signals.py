"""Delay reconstruction of a continuous signal: what of the past can be read out of a state.

Source: Voelker et al. 2019, Gu et al. 2020 (HiPPO). Only the readout is fitted, in closed form, so
the result says what the recurrence keeps and nothing of training.
"""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def band_limited_noise(rows: int, steps: int, cutoff: float, generator: Generator) -> Tensor:
    """Signals (rows, steps) fp64 of mean power 1 without frequencies above `cutoff`.

    Args:
        rows, steps: shape.
        cutoff: highest frequency in cycles per step, in (0, 0.5].
        generator: decides the draw; the result lies on its device.

    Raises:
        ValueError: `cutoff` is out of range, or below the lowest frequency of so few steps.
    """
    kept = math.floor(cutoff * steps)
    if not 0 < cutoff <= 0.5 or kept < 1:
        raise ValueError(
            f"cutoff must lie in [1 / steps, 0.5] = [{1 / steps:.3g}, 0.5] cycles per step, "
            f"got {cutoff}"
        )
    shape = (rows, kept, 2)
    parts = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
    spectrum = parts.new_zeros(rows, steps // 2 + 1, dtype=torch.complex128)
    spectrum[:, 1 : kept + 1] = torch.view_as_complex(parts)[:, : steps // 2]
    signal = torch.fft.irfft(spectrum, n=steps, dim=1)
    return signal / signal.square().mean(1, keepdim=True).sqrt()


def reconstruction_error(
    states: Tensor, signal: Tensor, lags: Sequence[int], *, warmup: int = 0, ridge: float = 1e-8
) -> Tensor:
    """How well u(t - lag) can be read linearly from the state at t, for each lag.

    The readout is fitted by least squares on the first half of the rows and scored on the second.

    Args:
        states: (rows, steps, N), what a recurrence holds after reading step t.
        signal: (rows, steps).
        lags: in steps, 0 is the step just read.
        warmup: steps at the start of each row that are left out, besides the lag itself.
        ridge: added to the normal equations' diagonal, as a share of its mean.

    Returns:
        (len(lags),) fp64: root mean square error over the signal's root mean square; 0 is perfect,
        1 is what a constant 0 would reach.

    Raises:
        ValueError: shapes that do not agree, fewer than two rows, or no step left to score.
    """
    rows, steps = signal.shape
    if states.shape[:2] != signal.shape or rows < 2:
        raise ValueError(
            "expected states (rows, steps, N) and signal (rows, steps) of two rows or more, got "
            f"{tuple(states.shape)} and {tuple(signal.shape)}"
        )
    half = rows // 2
    states, signal = states.double(), signal.double()
    errors = []
    for lag in lags:
        first = warmup + lag
        if not lag >= 0 or first >= steps:
            raise ValueError(f"lag {lag} with warmup {warmup} leaves nothing of {steps} steps")
        x, y = states[:, first:], signal[:, warmup : steps - lag]
        train, target = x[:half].flatten(0, 1), y[:half].flatten()
        normal = train.T @ train
        normal.diagonal().add_(ridge * normal.diagonal().mean() + torch.finfo(x.dtype).tiny)
        readout = torch.linalg.solve(normal, train.T @ target)
        wrong = x[half:] @ readout - y[half:]
        errors.append(wrong.square().mean().sqrt() / y[half:].square().mean().sqrt())
    return torch.stack(errors)
