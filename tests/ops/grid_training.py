"""The operators that a training step is made of, for the grid: several kernels and products each.

Their rows are a list of their own, `pairwise.TRAINING`: `extras` are the optional inputs of the
operators inside, `norm` and `out` the parts that a layer can do without, and with `wide` the
weights stay fp32 beside bf16 activations, as under autocast.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops import rms_norm
from ssm_hf.ops.mamba1_mix import mamba1_mix
from ssm_hf.ops.mamba2_mix import mamba2_mix
from ssm_hf.ops.norm_proj import norm_proj
from ssm_hf.ops.packing import document_numbers
from ssm_hf.ops.selective_scan import selective_scan_recurrent
from ssm_hf.ops.ssd import ssd_recurrent
from tests.ops.grid_operators import (
    Inputs,
    Operator,
    conv_definition,
    packing_of,
    randn,
    scan_definition,
)
from tests.ops.pairwise import Row


def _matrix(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return randn(generator, rows, columns) / columns**0.5


def _packing(row: Row, generator: torch.Generator) -> Inputs:
    """Mixers take numbers that pads share with the token before them."""
    found = packing_of(row, generator)
    if "seq_idx" in found:
        found["seq_idx"] = document_numbers(found["seq_idx"], found.get("mask"))
    return found


def _out_proj(row: Row, inner: int, generator: torch.Generator) -> Inputs:
    if not row["out"]:
        return {}
    found = {"out_weight": _matrix(generator, 24, inner)}
    if row["extras"]:
        found["out_bias"] = randn(generator, 24)
    return found


def _draw_mamba2_mix(row: Row, generator: torch.Generator) -> Inputs:
    B, T, G, N, P = (row[k] for k in "BTGNP")
    H, taps = 2 * G, {64: 2, 128: 3}.get(N, 4)
    inner, channels = H * P, H * P + 2 * G * N
    normal = functools.partial(randn, generator)
    inputs = {
        "proj": normal(B, T, inner + channels + H),
        "conv_weight": normal(channels, taps) / 2,
        "A": -torch.exp(normal(H)),
        "D": normal(H),
        "dt_bias": normal(H) - 2,
        "n_groups": G,
        "norm_before_gate": row["extras"],
    }
    if row["norm"]:
        inputs["norm_weight"] = normal(inner)
    if row["extras"]:
        inputs |= {"conv_bias": normal(channels), "D": normal(H, P)}
    return {**inputs, **_out_proj(row, inner, generator), **_packing(row, generator)}


def _draw_mamba1_mix(row: Row, generator: torch.Generator) -> Inputs:
    B, T, N = (row[k] for k in "BTN")
    # Once sizes that no block and no vector divides.
    inner, rank = (row["P"], 4) if row["G"] == 1 else (row["P"] + 7, 5)
    normal = functools.partial(randn, generator)
    inputs = {
        "proj": normal(B, T, 2 * inner),
        "conv_weight": normal(inner, {64: 2, 128: 3}.get(N, 4)) / 2,
        "x_weight": _matrix(generator, rank + 2 * N, inner),
        "dt_weight": _matrix(generator, inner, rank),
        "dt_bias": normal(inner) - 2,
        "A": -torch.exp(normal(inner, N)),
        "D": normal(inner),
    }
    if row["extras"]:
        inputs["conv_bias"] = normal(inner)
    return {**inputs, **_out_proj(row, inner, generator), **_packing(row, generator)}


def _draw_norm_proj(row: Row, generator: torch.Generator) -> Inputs:
    shape = (row["B"], row["T"], row["G"] * row["P"])
    inputs = {
        "x": randn(generator, *shape),
        "norm_weight": randn(generator, shape[-1]),
        "weight": _matrix(generator, row["N"] + 8, shape[-1]),
    }
    if row["norm"]:  # the stream that is added is not there before the first layer
        inputs["residual"] = randn(generator, *shape)
    if row["extras"]:
        inputs["bias"] = randn(generator, row["N"] + 8)
    return inputs


def _mamba1_mix(
    *, conv_bias: Tensor | None = None, out_weight: Tensor | None = None, **inputs: Any
) -> Tensor:
    return mamba1_mix(conv_bias=conv_bias, out_weight=out_weight, **inputs)


def _mamba2_mix(
    *, conv_bias: Tensor | None = None, norm_weight: Tensor | None = None,
    out_weight: Tensor | None = None, **inputs: Any,
) -> Tensor:  # fmt: skip
    return mamba2_mix(conv_bias=conv_bias, norm_weight=norm_weight, out_weight=out_weight, **inputs)


def _norm_proj(
    x: Tensor, norm_weight: Tensor, weight: Tensor, residual: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    return norm_proj(x, residual, norm_weight, weight, eps=1e-5, dtype=x.dtype, **options)


def _convolved(x: Tensor, inputs: Inputs) -> Tensor:
    packing = {name: inputs[name] for name in ("seq_idx", "mask") if name in inputs}
    weights = {"weight": inputs["conv_weight"], "bias": inputs.get("conv_bias")}
    return conv_definition({"x": x, **weights, **packing})[0]


def _projected(y: Tensor, inputs: Inputs) -> tuple[Tensor]:
    if "out_weight" in inputs:
        y = F.linear(y, inputs["out_weight"], inputs.get("out_bias"))
    return (y,)


def _mamba1_definition(inputs: Inputs) -> tuple[Tensor]:
    rank, states = inputs["dt_weight"].shape[1], inputs["A"].shape[1]
    x, z = inputs["proj"].chunk(2, dim=-1)
    x = _convolved(x, inputs)
    low, B, C = F.linear(x, inputs["x_weight"]).split([rank, states, states], dim=-1)
    scanned = {**inputs, "x": x, "z": z, "dt": F.linear(low, inputs["dt_weight"]), "B": B, "C": C}
    return _projected(scan_definition(selective_scan_recurrent, scanned)[0], inputs)


def _mamba2_definition(inputs: Inputs) -> tuple[Tensor]:
    heads, channels, groups = inputs["A"].numel(), inputs["conv_weight"].shape[0], "n_groups"
    inner = inputs["proj"].shape[-1] - channels - heads
    z, x, dt = inputs["proj"].split([inner, channels, heads], dim=-1)
    states = (channels - inner) // 2
    x, B, C = _convolved(x, inputs).split([inner, states, states], dim=-1)
    B, C = (v.unflatten(-1, (inputs[groups], -1)) for v in (B, C))
    scanned = {**inputs, "x": x.unflatten(-1, (heads, -1)), "dt": dt, "B": B, "C": C}
    if "norm_weight" not in inputs:
        scanned["z"] = z.unflatten(-1, (heads, -1))
    y = scan_definition(ssd_recurrent, scanned)[0].flatten(2)
    if "norm_weight" in inputs:
        y = rms_norm(
            y, inputs["norm_weight"], eps=1e-5, gate=z, group_size=inner // inputs[groups],
            norm_before_gate=inputs["norm_before_gate"], impl="reference",
        )  # fmt: skip
    return _projected(y, inputs)


TRAINING = {
    "mamba1_mix": Operator(_draw_mamba1_mix, _mamba1_mix, _mamba1_definition),
    "mamba2_mix": Operator(_draw_mamba2_mix, _mamba2_mix, _mamba2_definition),
    "norm_proj": Operator(_draw_norm_proj, _norm_proj, None),
}
