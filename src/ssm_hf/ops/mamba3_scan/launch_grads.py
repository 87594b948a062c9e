"""Launches of Mamba-3's backward scan from the states of chunks to the gradients of B, C, angles.

Each chunk and head has a program of its own, and sums over heads follow.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssm_hf.ops.launch import processors
from ssm_hf.ops.mamba3_scan.kernels_heads import mamba3_heads_kernel, mamba3_turns_kernel
from ssm_hf.ops.mamba3_scan.kernels_keys import mamba3_keys_kernel, mamba3_queries_kernel
from ssm_hf.ops.mamba3_scan.kernels_pairs import mamba3_pairs_kernel
from ssm_hf.ops.mamba3_scan.kernels_sum import mamba3_sum_kernel
from ssm_hf.ops.mamba3_scan.launch_parts import (
    Inputs,
    Marks,
    Prepared,
    Sizes,
    gradient_strides,
    strides_of,
)

# Triton's annotations do not know that plain values may stand for constants.
_pairs_kernel: Any = mamba3_pairs_kernel
_keys_kernel: Any = mamba3_keys_kernel
_queries_kernel: Any = mamba3_queries_kernel
_heads_kernel: Any = mamba3_heads_kernel
_turns_kernel: Any = mamba3_turns_kernel
_sum_kernel: Any = mamba3_sum_kernel


class Found(NamedTuple):
    """What the kernels of chunks and heads fill; see `mamba3_pairs_kernel`."""

    dx: Tensor
    dz: Tensor | None
    dmimo_x: Tensor | None
    dmimo_z: Tensor | None
    dmimo_o: Tensor | None
    dD: Tensor | None
    grad: Tensor


class Sums(NamedTuple):
    """What is left of the gradients of B, C and angles; first dimensions are to be added up."""

    dB: Tensor  # (parts, B, G, T, RANKS, PITCH)
    dC: Tensor
    dB_bias: Tensor | None  # (parts, H, R, PITCH)
    dC_bias: Tensor | None
    dturns: Tensor | None  # (parts, B, T, W)
    dphase: Tensor | None  # (parts, rows, H, W)
    turns: int  # planes of grad that are gradients of Δ through the angles


def _new(k: Sizes, *shape: int, zero: bool = False) -> Tensor:
    make = torch.zeros if zero else torch.empty
    return make(shape, dtype=torch.float32, device=k.device)


def _numbers(k: Sizes, t: Inputs, marks: Marks, dy: Tensor, grad: Tensor) -> tuple[Any, ...]:
    """Tables, strides and sizes that all kernels of chunks and heads take."""
    return (
        *k.tables, *strides_of(t.x), *strides_of(t.z), *strides_of(marks.mask, 2),
        *gradient_strides(k, dy), k.rows, k.length, k.heads, k.groups, k.ranks, grad[0].numel(),
    )  # fmt: skip


def _blocks(k: Sizes, options: dict[str, Any]) -> dict[str, Any]:
    return {"P_BLOCKS": -(-k.head_dim // options["BLOCK_P"]), **k.shape}


def of_chunks(
    k: Sizes,
    t: Inputs,
    marks: Marks,
    made: Prepared,
    dy: Tensor,
    states: Tensor,
    dstates: Tensor,
    extra: Tensor | None,
    found: Found,
) -> Sums:
    """Launch the kernels of pairs, keys and queries, and the sums over heads."""
    rows = k.chunk * k.padded
    pairs = states.new_empty(k.chunks, k.heads, 2, rows, rows)
    dk, dq = (states.new_empty(k.chunks, k.heads, rows, k.pitch) for _ in range(2))
    dangle = later = None
    if k.angles:
        dangle = _new(k, k.chunks, k.heads, k.chunk, k.width)
        later = _new(k, k.chunks, k.heads, k.width)
    numbers = _numbers(k, t, marks, dy, found.grad)
    options = k.options("mamba3_pairs")
    _pairs_kernel[(k.chunks * k.heads,)](
        t.x, t.mimo_x, made.B, made.B_bias, made.C, made.C_bias, t.D, t.z, t.mimo_z, t.mimo_o,
        marks.mask, dy, made.token, made.scale, made.angle, found.dD, found.grad, pairs,
        *numbers, **_blocks(k, options), **options,
    )  # fmt: skip
    options = k.options("mamba3_keys")
    _keys_kernel[(k.chunks * k.heads,)](
        t.x, t.mimo_x, made.B, made.B_bias, made.C, made.C_bias, t.z, t.mimo_z, t.mimo_o,
        marks.mask, dy, made.token, made.scale, made.angle, dstates, pairs, found.dx,
        found.dmimo_x, found.grad, dk, dangle, later, *numbers, **_blocks(k, options), **options,
    )  # fmt: skip
    options = k.options("mamba3_queries")
    _queries_kernel[(k.chunks * k.heads,)](
        t.x, t.mimo_x, made.B, made.B_bias, made.C, made.C_bias, t.z, t.mimo_z, t.mimo_o,
        marks.mask, dy, made.token, made.angle, states, dstates, found.dz, found.dmimo_z,
        found.dmimo_o, found.grad, pairs, dq, dangle, later, *numbers, **_blocks(k, options),
        **options,
    )  # fmt: skip

    options = k.options("mamba3_heads")
    heads = _heads_per_program(k, options.pop("HEADS"))
    parts = k.heads // k.groups // heads
    dB, dC = (_new(k, parts, *made.B.shape) for _ in range(2))
    width = k.padded * k.pitch
    columns = min(options.pop("COLUMNS"), width & -width)  # a power of two that divides width
    tokens = min(options.pop("TILE") // columns, k.chunk)
    slices = k.chunk // tokens
    dB_bias, dC_bias = (_new(k, k.chunks * slices, k.heads, k.ranks, k.pitch) for _ in range(2))
    _heads_kernel[(2 * (width // columns) * slices * k.chunks * k.groups * parts,)](
        dk, dq, dB, dB_bias, dC, dC_bias, *k.tables, k.rows, k.length, k.heads, k.groups, k.ranks,
        made.B.numel(), VARLEN=k.varlen, Q=k.chunk, RANKS=k.padded, HEADS=heads, HEAD_BLOCKS=parts,
        PITCH=k.pitch, TOKENS=tokens, COLUMNS=columns, **options,
    )  # fmt: skip
    biases = (None if t.B_bias is None else dB_bias, None if t.C_bias is None else dC_bias)
    if dangle is None:
        return Sums(dB, dC, *biases, None, None, 0)
    options = k.options("mamba3_turns")
    heads = _heads_per_program(k, options.pop("HEADS"))
    parts = k.heads // heads
    dturns = _new(k, parts, k.batch, k.length, k.width)
    dphase = _new(k, 1, k.rows, k.heads, k.width, zero=k.varlen)
    _turns_kernel[(k.chunks * parts,)](
        dangle, later, made.token, made.turns, extra, marks.last, found.grad[4], dturns, dphase,
        *k.tables, k.rows, k.length, k.heads, k.groups, dturns[0].numel(), RAGGED=k.ragged,
        VARLEN=k.varlen, Q=k.chunk, HEADS=heads, HEAD_BLOCKS=parts // k.groups, W=k.width,
        **options,
    )  # fmt: skip
    return Sums(dB, dC, *biases, dturns, dphase, 1)


def sum_parts(
    k: Sizes, t: Inputs, made: Prepared, sums: Sums, pairwise: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of B, C and angles in the caller's columns."""
    dB, dC = (v.new_empty(v.shape) for v in (t.B, t.C))
    dangles = None if t.angles is None else t.angles.new_empty(t.angles.shape)
    turns, turns_part = 0, 0
    if sums.dturns is not None:
        turns, turns_part = len(sums.dturns), sums.dturns[0].numel()
    options = k.options("mamba3_sum")
    tokens = k.batch * k.length
    grid = -(-tokens * k.ranks * k.groups // options["ROWS"])
    grid += -(-tokens // options["ROWS"]) if k.angles else 0
    _sum_kernel[(grid,)](
        sums.dB, sums.dC, sums.dturns, made.turns, dB, dC, dangles, tokens, k.length, k.groups,
        k.ranks, k.states, k.angles, k.pairs, k.half, made.B.numel(), turns_part,
        PAIRWISE=pairwise and k.angles > 0, PARTS=len(sums.dB), TURNS_PARTS=turns,
        COLUMNS=1 << (k.states - 1).bit_length(), **k.columns, **options,
    )  # fmt: skip
    return dB, dC, dangles


def _heads_per_program(k: Sizes, most: int) -> int:
    """Largest number of heads that divides a group's, at most `most`, and keeps the GPU full."""
    per_group = k.heads // k.groups
    enough = 2 * processors(k.device)
    fitting = [h for h in range(1, min(most, per_group) + 1) if per_group % h == 0]
    full = [h for h in fitting if k.chunks * k.heads // h >= enough]
    return max(full) if full else 1
