"""Delay reconstruction: the noise, the error measure, and what known recurrences keep."""

import math

import pytest
import torch

from eval.tasks import seeded
from eval.tasks.signals import band_limited_noise, reconstruction_error

STEPS = 512


def noise(rows=8, cutoff=1 / 32):
    return band_limited_noise(rows, STEPS, cutoff, seeded(0))


def recurrence(A, B, signal):
    """States (rows, steps, N) of h = A h + B u."""
    h = signal.new_zeros(len(signal), len(B))
    states = []
    for u in signal.T:
        h = h @ A.T + u[:, None] * B
        states.append(h)
    return torch.stack(states, 1)


def bilinear(A, B, step):
    """Tustin's rule: second order in the step."""
    eye = torch.eye(len(A), dtype=A.dtype)
    left = torch.linalg.inv(eye - step / 2 * A)
    return left @ (eye + step / 2 * A), step * left @ B


def legt(size, window):
    """The translated Legendre system (Voelker et al. 2019, eq. 2) of a window in steps."""
    i = torch.arange(size, dtype=torch.float64)
    row, column = i[:, None], i[None, :]
    A = (2 * row + 1) * torch.where(
        row < column, -torch.ones(size, size), (-1.0) ** (row - column + 1)
    )
    return A / window, (2 * i + 1) * (-1.0) ** i / window


def test_noise_has_unit_power_and_no_high_frequencies() -> None:
    signal = noise()
    assert signal.shape == (8, STEPS)
    assert torch.allclose(signal.square().mean(1), torch.ones(8, dtype=torch.float64))
    spectrum = torch.fft.rfft(signal).abs()
    assert spectrum[:, 17:].max() < 1e-9 * spectrum.max()
    assert spectrum[:, 1:17].min() > 0
    assert torch.equal(signal, noise())
    with pytest.raises(ValueError, match="cutoff must lie"):
        band_limited_noise(1, 16, 0.6, seeded(0))
    with pytest.raises(ValueError, match="cutoff must lie"):
        band_limited_noise(1, 16, 0.01, seeded(0))


def test_a_shift_register_remembers_exactly_its_taps() -> None:
    # White noise: what is not kept cannot be guessed.
    signal = band_limited_noise(32, STEPS, 0.5, seeded(0))
    taps = torch.stack([signal.roll(k, 1) for k in range(8)], 2)
    errors = reconstruction_error(taps, signal, [0, 3, 7, 8, 20], warmup=8)
    assert (errors[:3] < 1e-6).all()
    assert (errors[3:] > 0.9).all()


def test_no_state_reconstructs_nothing() -> None:
    signal = noise()
    errors = reconstruction_error(torch.zeros(8, STEPS, 4), signal, [0, 5])
    assert torch.allclose(errors, torch.ones(2, dtype=torch.float64))


def test_legendre_states_keep_their_window_and_fast_decays_do_not() -> None:
    """The shape of HiPPO's claim: low error up to the window, high beyond it."""
    signal, window, size = noise(16), 64, 16
    kept = recurrence(*bilinear(*legt(size, window), 1.0), signal)
    lags = [0, 16, 32, 60, 128]
    errors = reconstruction_error(kept, signal, lags, warmup=200)
    assert (errors[:4] < 0.05).all()
    assert errors[4] > 0.5
    rates = torch.arange(1, size + 1, dtype=torch.float64)
    fast = recurrence(torch.diag(torch.exp(-rates)), torch.ones(size, dtype=torch.float64), signal)
    of_fast = reconstruction_error(fast, signal, lags, warmup=200)
    assert of_fast[3] > 10 * errors[3]


def test_bilinear_steps_are_of_second_order() -> None:
    """Halving the step divides the error of a decay by four, Euler's by two only."""

    def error(rule, step):
        A, B = -torch.eye(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        decay, _ = rule(A, B, step)
        return abs(decay.item() ** round(1 / step) - math.exp(-1))

    def euler(A, B, step):
        return torch.eye(1) + step * A, step * B

    assert error(bilinear, 0.1) / error(bilinear, 0.05) == pytest.approx(4, abs=0.1)
    assert error(euler, 0.1) / error(euler, 0.05) == pytest.approx(2, abs=0.2)


def test_wrong_shapes_are_refused() -> None:
    signal = noise()
    with pytest.raises(ValueError, match="expected states"):
        reconstruction_error(torch.zeros(8, STEPS - 1, 2), signal, [0])
    with pytest.raises(ValueError, match="leaves nothing"):
        reconstruction_error(torch.zeros(8, STEPS, 2), signal, [STEPS])
