"""Mamba-3's scan for the list of tests/ops/grid.json."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops import mamba3_scan
from ssm_hf.ops.mamba3_scan import Mamba3State
from tests.ops.grid_operators import Inputs, Operator, packing_of, randn
from tests.ops.pairwise import Row

# Beside those of the other scans.
FP32_INPUTS = ("B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o", "angle", "ssm")
_STATE = ("angle", "ssm", "k", "v")
# Queries and keys are turned, and with ranks x is multiplied, before products of matrices.
FORM_OPERANDS = ("mamba3_scan",)


def _draw(row: Row, generator: torch.Generator) -> Inputs:
    """`extras`: two ranks, a gate, and all states turn; else one rank, and a quarter turns."""
    B, T, G, N, P = (row[k] for k in "BTGNP")
    H = {1: 3, 2: 4, 8: 8}[G]
    R, S = (2, N // 2) if row["extras"] else (1, N // 4)
    normal = functools.partial(randn, generator)
    packing = packing_of(row, generator)
    inputs = {
        "x": normal(B, T, H, P),
        "dt": normal(B, T, H) - 2,
        "A": -torch.exp(normal(B, T, H)),
        "trap": normal(B, T, H),
        "B": normal(B, T, R, G, N),
        "C": normal(B, T, R, G, N),
        "angles": normal(B, T, S),
        "D": normal(H),
        "B_bias": normal(H, R, N),
        "C_bias": normal(H, R, N),
        "dt_bias": normal(H),
    }
    if row["extras"]:
        inputs["z"] = normal(B, T, H, P)
        inputs |= {name: normal(H, R, P) for name in ("mimo_x", "mimo_z", "mimo_o")}
    if row["initial_state"]:
        cu_seqlens = packing.get("cu_seqlens")
        n = B if cu_seqlens is None else cu_seqlens.numel() - 1
        inputs |= {
            "angle": normal(n, H, S).remainder(2 * math.pi),
            "ssm": normal(n, H, P, N),
            "k": normal(n, R, H, N),
            "v": normal(n, H, P),
        }
    return {**inputs, **packing}


def _run(**inputs: Any) -> tuple[Tensor, Tensor]:
    """y, and the final S and angle in one tensor; an angle is where it is on the circle."""
    state = None
    if "ssm" in inputs:
        state = Mamba3State(*(inputs.pop(name) for name in _STATE))
    y, final = mamba3_scan(**inputs, initial_state=state, dt_softplus=True, return_final_state=True)  # pyright: ignore[reportGeneralTypeIssues]
    parts = (final.ssm, final.angle.cos(), final.angle.sin())
    return y, torch.cat([part.flatten(1) for part in parts], dim=1)


# The torch path is what is expected: tests/ops/test_laws.py ties it to the definition.
MAMBA3 = {"mamba3_scan": Operator(_draw, _run, None)}
