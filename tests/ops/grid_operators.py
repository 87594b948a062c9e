"""The operators of the grid: how inputs are drawn for a row, and the definition token by token."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops import (
    add_rms_norm,
    causal_conv1d,
    linear_cross_entropy,
    rms_norm,
    selective_scan,
    ssd,
)
from ssm_hf.ops.causal_conv1d import causal_conv1d_recurrent
from ssm_hf.ops.packing import document_numbers
from ssm_hf.ops.selective_scan import selective_scan_recurrent
from ssm_hf.ops.ssd import ssd_recurrent
from ssm_hf.ops.step_size import step_size
from tests.ops.pairwise import Row

Inputs = dict[str, Any]
# Inputs that do not belong to a row of the batch.
WEIGHTS = (
    "A", "D", "dt_bias", "weight", "bias", "conv_weight", "conv_bias", "norm_weight", "x_weight",
    "dt_weight", "out_weight", "out_bias", "n_groups", "norm_before_gate",
)  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """How one operator is drawn for a row of the list, called, and defined token by token."""

    draw: Callable[[Row, torch.Generator], Inputs]
    run: Callable[..., Any]
    sequential: Callable[[Inputs], tuple[Tensor, ...]] | None


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


def packing_of(row: Row, generator: torch.Generator) -> Inputs:
    B, T, device = row["B"], row["T"], generator.device
    found: Inputs = {}
    if row["packing"] == "seq_idx":
        # Numbers that repeat later and do not rise: only a change from token to token counts.
        new = torch.rand(B, T, generator=generator, device=device) < 0.05
        found["seq_idx"] = new.cumsum(1).remainder(3).to(torch.int32)
    elif row["packing"] == "cu_seqlens":
        # One document is empty: its state passes through.
        cuts = torch.randint(0, T + 1, (min(T, 5),), generator=generator, device=device)
        ends = torch.tensor([0, T], device=device)
        found["cu_seqlens"] = torch.cat([ends, cuts, cuts[:1]]).sort().values.to(torch.int32)
    if row["mask"]:
        found["mask"] = torch.rand(B, T, generator=generator, device=device) < 0.8
    return found


def _states(
    row: Row, packing: Inputs, shape: tuple[int, ...], generator: torch.Generator
) -> Inputs:
    if not row["initial_state"]:
        return {}
    cu_seqlens = packing.get("cu_seqlens")
    count = row["B"] if cu_seqlens is None else cu_seqlens.numel() - 1
    return {"initial_state": randn(generator, count, *shape)}


def _draw_ssd(row: Row, generator: torch.Generator) -> Inputs:
    B, T, G, N, P = (row[k] for k in "BTGNP")
    H = {1: 3, 2: 4, 8: 8}[G]
    normal = functools.partial(randn, generator)
    packing = packing_of(row, generator)
    inputs = {
        "x": normal(B, T, H, P),
        "dt": normal(B, T, H) - 2,
        "A": -torch.exp(normal(H)),
        "B": normal(B, T, G, N),
        "C": normal(B, T, G, N),
        "dt_bias": normal(H),
        "D": normal(H),
    }
    if row["extras"]:
        inputs |= {"D": normal(H, P), "z": normal(B, T, H, P)}
    return {**inputs, **_states(row, packing, (H, P, N), generator), **packing}


def _draw_selective_scan(row: Row, generator: torch.Generator) -> Inputs:
    B, T, N = (row[k] for k in "BTN")
    channels = row["P"] + row["G"]  # not a multiple of any block
    normal = functools.partial(randn, generator)
    packing = packing_of(row, generator)
    inputs = {
        "x": normal(B, T, channels),
        "dt": normal(B, T, channels) - 2,
        "A": -torch.exp(normal(channels, N)),
        "B": normal(B, T, N),
        "C": normal(B, T, N),
        "dt_bias": normal(channels),
    }
    if row["extras"]:
        inputs |= {"D": normal(channels), "z": normal(B, T, channels)}
    return {**inputs, **_states(row, packing, (channels, N), generator), **packing}


def _draw_conv(row: Row, generator: torch.Generator) -> Inputs:
    taps, channels = {64: 2, 128: 3}.get(row["N"], 4), row["P"] * row["G"] + 8
    packing = packing_of(row, generator)
    inputs = {
        "x": randn(generator, row["B"], row["T"], channels),
        "weight": randn(generator, channels, taps),
    }
    if row["extras"]:
        inputs["bias"] = randn(generator, channels)
    return {**inputs, **_states(row, packing, (taps - 1, channels), generator), **packing}


def _draw_norm(row: Row, generator: torch.Generator) -> Inputs:
    shape = (row["B"], row["T"], row["G"] * row["P"])
    inputs = {"x": randn(generator, *shape), "weight": randn(generator, shape[-1])}
    if row["extras"]:
        inputs["gate"] = randn(generator, *shape)
    return inputs


def _draw_add_norm(row: Row, generator: torch.Generator) -> Inputs:
    inputs = _draw_norm({**row, "extras": False}, generator)
    if row["extras"]:
        inputs["residual"] = randn(generator, *inputs["x"].shape)
    return inputs


def _add_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, **options: Any) -> Any:
    return add_rms_norm(x, residual, weight, eps=1e-5, **options)


def _draw_loss(row: Row, generator: torch.Generator) -> Inputs:
    """A vocabulary that no block divides; some targets are ignored."""
    tokens, width, vocabulary = row["B"] * row["T"], row["P"] * row["G"], 7 * row["N"] + 5
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=generator.device)
    if row["mask"]:
        ignored = torch.rand(tokens, generator=generator, device=generator.device) < 0.2
        targets = targets.masked_fill(ignored, -100)
        targets[0] = 0  # a mean over nothing is not defined
    inputs = {
        "hidden": randn(generator, tokens, width),
        "weight": randn(generator, vocabulary, width) / width**0.5,
        "targets": targets,
    }
    if row["extras"]:
        inputs["bias"] = randn(generator, vocabulary)
    return inputs


def _finish(y: Tensor, inputs: Inputs) -> Tensor:
    D, z, mask, x = inputs.get("D"), inputs.get("z"), inputs.get("mask"), inputs["x"]
    if D is not None:
        y = y + (D if D.ndim == x.ndim - 2 else D[:, None]) * x
    if z is not None:
        y = y * F.silu(z)
    return y if mask is None else y * mask.reshape(*mask.shape, *(1,) * (y.ndim - 2))


def scan_definition(
    recurrent: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs
) -> tuple[Tensor, ...]:
    """D, gate, step size and packing of both scans around the recurrence of one."""
    x, mask = inputs["x"], inputs.get("mask")
    delta = step_size(inputs["dt"], inputs.get("dt_bias"), True, (0.0, float("inf")), mask)
    doc = document_numbers(inputs["seq_idx"], mask) if "seq_idx" in inputs else None
    state = inputs.get("initial_state")
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], inputs["B"].shape[-1])
    y, state = recurrent(x, delta, inputs["A"], inputs["B"], inputs["C"], state, doc)
    return _finish(y, inputs), state


def conv_definition(inputs: Inputs) -> tuple[Tensor, ...]:
    mask = inputs.get("mask")
    doc = document_numbers(inputs["seq_idx"], mask) if "seq_idx" in inputs else None
    weight, bias, state = inputs["weight"], inputs.get("bias"), inputs.get("initial_state")
    return causal_conv1d_recurrent(inputs["x"], weight, bias, "silu", state, doc, mask)


def per_document(
    sequential: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs
) -> tuple[Tensor, ...]:
    """Documents of `cu_seqlens` one after another, each with its own state."""
    cu_seqlens = inputs["cu_seqlens"].tolist()
    length, pieces, states = inputs["x"].shape[1], [], []
    for number, (start, end) in enumerate(pairwise(cu_seqlens)):
        part = {
            name: value[:, start:end] if value.ndim > 1 and value.shape[1] == length else value
            for name, value in inputs.items()
            if name not in ("cu_seqlens", "initial_state", *WEIGHTS)
        }
        part |= {name: inputs[name] for name in WEIGHTS if name in inputs}
        if "initial_state" in inputs:
            part["initial_state"] = inputs["initial_state"][number : number + 1]
        if start == end:
            states.append(part.get("initial_state"))
            continue
        y, state = sequential(part)
        pieces.append(y)
        states.append(state)
    empty = torch.zeros_like(next(s for s in states if s is not None))
    return torch.cat(pieces, dim=1), torch.cat([empty if s is None else s for s in states])


KERNELS = {
    "ssd": Operator(
        _draw_ssd,
        functools.partial(ssd, dt_softplus=True, return_final_state=True),
        functools.partial(scan_definition, ssd_recurrent),
    ),
    "selective_scan": Operator(
        _draw_selective_scan,
        functools.partial(selective_scan, dt_softplus=True, return_final_state=True),
        functools.partial(scan_definition, selective_scan_recurrent),
    ),
    "causal_conv1d": Operator(
        _draw_conv,
        functools.partial(causal_conv1d, activation="silu", return_final_state=True),
        conv_definition,
    ),
    "rms_norm": Operator(_draw_norm, functools.partial(rms_norm, eps=1e-5), None),
    "add_rms_norm": Operator(_draw_add_norm, _add_norm, None),
    "linear_cross_entropy": Operator(_draw_loss, linear_cross_entropy, None),
}
