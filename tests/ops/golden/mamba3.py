"""Values of Mamba-3's scan that owe nothing to `ssm_hf`: complex numbers in numpy, fp64.

A rotated pair of states is one complex number. Where every token turns by φ, q_t · k_s is the real
part of conj(Q_t) K_s exp(-i (θ_t - θ_s)), with Q and K as they were before the rotation. So the
recurrence can run without rotated keys, on a state that turns instead:

    h_t = e^{-iφ_t} (α_t h_{t-1} + β_t x_{t-1} K_{t-1}) + γ_t x_t K_t,   y_t = Re(conj(Q_t) h_t)

and the operator's state is h e^{iθ}. States without rotation have φ = 0 and no imaginary part.

`python -m tests.ops.golden.mamba3` writes mamba3.safetensors anew; tests/ops/test_mamba3_scan.py
holds the operator, and this file, to the arrays in it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Arrays = dict[str, Any]
FILE = Path(__file__).with_suffix(".safetensors")

# name: (ranks, groups, states, rotated pairs, layout); pairs < states / 2 leave some unrotated
CASES = {
    "siso": (1, 2, 6, 2, "pairwise"),
    "siso-half": (1, 1, 6, 3, "half"),
    "mimo": (2, 1, 8, 2, "half"),
}
BATCH, LENGTH, HEADS, HEAD_DIM = 1, 5, 2, 2


def draw(name: str) -> Arrays:
    """Inputs of one case; also a state before the first token."""
    ranks, groups, states, pairs, _ = CASES[name]
    rng = np.random.default_rng(list(CASES).index(name))
    tokens, per_rank = (BATCH, LENGTH), (HEADS, ranks, HEAD_DIM)
    shapes = {
        "x": (*tokens, HEADS, HEAD_DIM),
        "dt": (*tokens, HEADS),
        "A": (*tokens, HEADS),
        "trap": (*tokens, HEADS),
        "B": (*tokens, ranks, groups, states),
        "C": (*tokens, ranks, groups, states),
        "angles": (*tokens, pairs),
        "D": (HEADS,),
        "z": (*tokens, HEADS, HEAD_DIM),
        "B_bias": (HEADS, ranks, states),
        "C_bias": (HEADS, ranks, states),
        "dt_bias": (HEADS,),
        "angle": (BATCH, HEADS, pairs),
        "ssm": (BATCH, HEADS, HEAD_DIM, states),
        "k": (BATCH, ranks, HEADS, states),
        "v": (BATCH, HEADS, HEAD_DIM),
    }
    if ranks > 1:
        shapes |= {"mimo_x": per_rank, "mimo_z": per_rank, "mimo_o": per_rank}
    drawn = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    drawn["A"] = -np.abs(drawn["A"])
    drawn["angle"] = np.abs(drawn["angle"])
    return drawn


def places(states: int, pairs: int, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where real parts, imaginary parts and unrotated states lie."""
    first = np.arange(pairs)
    re, im = (2 * first, 2 * first + 1) if layout == "pairwise" else (first, first + states // 2)
    return re, im, np.setdiff1d(np.arange(states), np.concatenate([re, im]))


def to_complex(v: np.ndarray, where: tuple[np.ndarray, ...]) -> np.ndarray:
    """(..., N) -> (..., S + N - 2 S): pairs, then what is not rotated."""
    re, im, rest = where
    return np.concatenate([v[..., re] + 1j * v[..., im], v[..., rest] + 0j], axis=-1)


def to_real(h: np.ndarray, where: tuple[np.ndarray, ...]) -> np.ndarray:
    """The inverse of `to_complex`."""
    re, im, rest = where
    v = np.empty((*h.shape[:-1], len(re) + len(im) + len(rest)))
    v[..., re], v[..., im] = np.real(h[..., : len(re)]), np.imag(h[..., : len(re)])
    v[..., rest] = np.real(h[..., len(re) :])
    return v


def sigmoid(v: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-v)."""
    return 1 / (1 + np.exp(-v))


def scan(name: str, inputs: Arrays) -> Arrays:
    """y and the final states, head by head."""
    ranks, groups, states, pairs, layout = CASES[name]
    where = places(states, pairs, layout)
    ones = np.ones((HEADS, ranks, HEAD_DIM))
    mx, mz, mo = (inputs.get(key, ones) for key in ("mimo_x", "mimo_z", "mimo_o"))
    out = {key: np.empty_like(inputs[key]) for key in ("angle", "ssm", "k", "v")}
    out["y"] = np.empty_like(inputs["x"])
    for b in range(BATCH):
        for head in range(HEADS):
            group = head * groups // HEADS
            unrotated = np.zeros(states - 2 * pairs)
            theta = np.concatenate([inputs["angle"][b, head], unrotated])
            # Into the frame that turns with the tokens.
            back = np.exp(-1j * theta)
            h = to_complex(inputs["ssm"][b, head], where) * back
            K = to_complex(inputs["k"][b, :, head], where) * back
            x = inputs["v"][b, head]
            for t in range(LENGTH):
                delta = np.log1p(np.exp(inputs["dt"][b, t, head] + inputs["dt_bias"][head]))
                share = sigmoid(inputs["trap"][b, t, head])
                alpha = np.exp(delta * inputs["A"][b, t, head])
                phi = np.concatenate([np.pi * np.tanh(inputs["angles"][b, t]) * delta, unrotated])
                theta = theta + phi
                h = alpha * h
                for r in range(ranks):
                    h = h + (1 - share) * delta * alpha * np.outer(mx[head, r] * x, K[r])
                h = h * np.exp(-1j * phi)
                x = inputs["x"][b, t, head]
                K = to_complex(inputs["B"][b, t, :, group] + inputs["B_bias"][head], where)
                Q = to_complex(inputs["C"][b, t, :, group] + inputs["C_bias"][head], where)
                out["y"][b, t, head] = 0
                for r in range(ranks):
                    h = h + share * delta * np.outer(mx[head, r] * x, K[r])
                for r in range(ranks):
                    y = (h @ Q[r].conj()).real + inputs["D"][head] * mx[head, r] * x
                    gate = inputs["z"][b, t, head] * mz[head, r]
                    out["y"][b, t, head] += y * gate * sigmoid(gate) * mo[head, r]
            turned = np.exp(1j * theta)
            out["ssm"][b, head] = to_real(h * turned, where)
            out["k"][b, :, head] = to_real(K * turned, where)
            out["angle"][b, head] = theta[:pairs] % (2 * np.pi)
            out["v"][b, head] = x
    return out


def compute() -> Arrays:
    """All arrays of the file: case.in.name and case.out.name."""
    arrays: Arrays = {}
    for name in CASES:
        inputs = draw(name)
        arrays |= {f"{name}.in.{key}": value for key, value in inputs.items()}
        arrays |= {f"{name}.out.{key}": value for key, value in scan(name, inputs).items()}
    return arrays


def load() -> dict[str, tuple[Arrays, Arrays]]:
    """The file's inputs and outputs by case."""
    arrays = load_file(FILE)
    found: dict[str, tuple[Arrays, Arrays]] = {name: ({}, {}) for name in CASES}
    for key, value in arrays.items():
        name, kind, tensor = key.split(".")
        found[name][kind == "out"][tensor] = value
    return found


if __name__ == "__main__":
    save_file(compute(), FILE)
