"""What all launches of Mamba-3's scan share: sizes, inputs, and what the first kernels prepare."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops import launch as common
from ssm_hf.ops.launch import tuned
from ssm_hf.ops.mamba3_scan.kernels_prepare import (
    mamba3_angles_kernel,
    mamba3_phase_kernel,
    mamba3_prepare_kernel,
)

# Triton's annotations do not know that plain values may stand for constants.
_prepare_kernel: Any = mamba3_prepare_kernel
_phase_kernel: Any = mamba3_phase_kernel
_angles_kernel: Any = mamba3_angles_kernel

# Rows (tokens times ranks) of a chunk.
ROWS = 64
TURN = 2 * math.pi
# Least channels, and slots of states, of a tile on a GPU. With Triton 3.6 on Hopper, products with
# a side below 64 have led to invalid memory accesses and to wrong results.
CHANNELS, SLOTS = 64, 32


class Sizes(NamedTuple):
    """What all launches of one call share."""

    batch: int
    length: int
    heads: int
    groups: int
    ranks: int
    padded: int  # ranks, rounded up to a power of two
    head_dim: int
    states: int
    angles: int  # rotated pairs of states
    pairs: int  # of states that lie in tiles a and b
    width: int  # slots of tiles a and b
    rest: int  # slots of tile c
    chunk: int  # tokens
    rows: int  # batch rows, or documents of one row
    chunks: int  # of all rows; with cu_seqlens an upper bound
    longest: int  # chunks of the longest row; with cu_seqlens an upper bound
    tables: tuple[
        Tensor | None, Tensor | None, Tensor | None
    ]  # cu_seqlens, first chunk, row of chunk
    wide: bool  # products in fp32, not in the inputs' 16 bits
    per_rank: bool  # y has a row for each rank
    precision: str
    fast: bool  # the GPU's own sine and cosine
    device: torch.device

    @property
    def varlen(self) -> bool:
        """Whether rows are documents."""
        return self.tables[0] is not None

    @property
    def ragged(self) -> bool:
        """Whether chunks may end behind their row."""
        return self.varlen or self.length % self.chunk != 0

    @property
    def shape(self) -> dict[str, Any]:
        """What the kernels of chunks are compiled for."""
        return {
            "HEAD_DIM": self.head_dim,
            "RAGGED": self.ragged,
            "PER_RANK": self.per_rank,
            "ROPE": self.angles > 0,
            "VARLEN": self.varlen,
            "WIDE": self.wide,
            "PRECISION": self.precision,
            "FAST": self.fast,
            "Q": self.chunk,
            "RANKS": self.padded,
            "W": self.width,
            "V": self.rest,
        }

    @property
    def pitch(self) -> int:
        """Slots of a row."""
        return 2 * self.width + self.rest

    @property
    def half(self) -> int:
        """Where the second halves of pairs begin in the caller's columns (not pairwise)."""
        return self.states // 2 if self.angles else self.pairs

    @property
    def columns(self) -> dict[str, int]:
        """What kernels of columns are compiled for."""
        return {"RANKS": self.padded, "W": self.width, "PITCH": self.pitch}

    def options(self, kernel: str) -> dict[str, Any]:
        """Tuned options, with blocks no larger than a head."""
        size = "wide" if self.wide else "ranks" if self.ranks > 1 else f"n{self.pitch}"
        options: dict[str, Any] = dict(tuned(kernel, size, self.device))
        if "BLOCK_P" in options:
            options["BLOCK_P"] = min(
                options["BLOCK_P"], _block(self.head_dim, CHANNELS, self.device)
            )
        return options


def _block(extent: int, least: int, device: torch.device) -> int:
    """Smallest power of two that covers `extent`, on a GPU at least `least`."""
    least = 16 if common.architecture(device) == "cpu" else least
    return max(least, 1 << (extent - 1).bit_length())


def _tiles(turning: int, states: int, device: torch.device) -> tuple[int, int, int]:
    """Pairs of states in tiles a and b, slots of those tiles, and of tile c.

    Pairs that do not turn may lie among those that do, at an angle of 0, where that saves slots.
    """
    if not turning:
        return -(-states // 2), _block(-(-states // 2), SLOTS, device), 0
    found: list[tuple[int, int, int, int]] = []
    for pairs in (turning, states // 2):
        width, rest = _block(pairs, SLOTS, device), states - 2 * pairs
        rest = _block(rest, SLOTS, device) if rest else 0
        found.append((2 * width + rest, pairs, width, rest))
    return min(found)[1:]


class Inputs(NamedTuple):
    """Tensors of one call that have gradients, in the operators' order."""

    x: Tensor
    dt: Tensor
    A: Tensor
    trap: Tensor | None
    B: Tensor
    C: Tensor
    angles: Tensor | None
    D: Tensor | None
    z: Tensor | None
    B_bias: Tensor | None
    C_bias: Tensor | None
    mimo_x: Tensor | None
    mimo_z: Tensor | None
    mimo_o: Tensor | None
    dt_bias: Tensor | None
    entry: Tensor | None  # (rows, H, P, N), what the first token finds, in the caller's columns
    phase: Tensor | None  # (rows, H, S), the angle before it


class Marks(NamedTuple):
    """Integer tensors of one call."""

    doc: Tensor | None
    last: Tensor | None  # (B,) first token of each row's last document
    cu_seqlens: Tensor | None
    mask: Tensor | None
    before: Tensor | None  # with mask: the real token before each
    after: Tensor | None  # ... and after it


def describe(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    mimo_o: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Sizes:
    """Sizes of a call, tiles and chunks for them, and where chunks of documents lie."""
    batch, length, heads, head_dim = x.shape
    ranks, groups, states = B.shape[2:]
    padded = 1 << (ranks - 1).bit_length()
    chunk = ROWS // padded
    rows, chunks = batch, batch * -(-length // chunk)
    tables: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if cu_seqlens is not None:
        rows = cu_seqlens.numel() - 1
        chunks = length // chunk + rows
        counts = (cu_seqlens.diff() + (chunk - 1)) // chunk
        first = F.pad(counts.cumsum(0), (1, 0))
        numbers = torch.arange(chunks, device=x.device)
        tables = (cu_seqlens, first, torch.searchsorted(first[1:], numbers, right=True))
    precision, where = "ieee", common.architecture(x.device)
    nvidia = where.startswith("sm")
    if nvidia:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    # Triton's interpreter multiplies the bits of bf16 numbers as if they were integers.
    interpreted = where == "cpu" and x.dtype == torch.bfloat16
    turning = 0 if angles is None else angles.shape[-1]
    pairs, width, rest = _tiles(turning, states, x.device)
    return Sizes(
        batch=batch,
        length=length,
        heads=heads,
        groups=groups,
        ranks=ranks,
        padded=padded,
        head_dim=head_dim,
        states=states,
        angles=turning,
        pairs=pairs,
        width=width,
        rest=rest,
        chunk=chunk,
        rows=rows,
        chunks=chunks,
        longest=-(-length // chunk),
        tables=tables,
        wide=interpreted or x.dtype == torch.float32 or not x.dtype == B.dtype == C.dtype,
        per_rank=ranks > 1 and mimo_o is None,
        precision=precision,
        fast=nvidia,
        device=x.device,
    )


def in_rows(x: Tensor) -> Tensor:
    """x with channels side by side and a chunk's offsets below 2^31; any other strides stay."""
    plain = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if plain and x.stride(1) < 2**31 // ROWS else x.contiguous()


def strides_of(x: Tensor | None, count: int = 3) -> tuple[int, ...]:
    """The first strides, 0 for what is not given."""
    return (0,) * count if x is None else x.stride()[:count]


def gradient_strides(k: Sizes, dy: Tensor | None) -> tuple[int, ...]:
    """Batch, time, rank and head of a gradient of y."""
    if dy is None:
        return (0,) * 4
    if k.per_rank:
        return dy.stride()[:4]
    batch, time, head = dy.stride()[:3]
    return batch, time, 0, head


def slots_of(k: Sizes, pairwise: bool) -> Tensor:
    """Index (N,): slot of each of the caller's columns of states; see `slot_of_column`."""
    n = torch.arange(k.states, device=k.device)
    if pairwise and k.angles:
        return torch.where(n < 2 * k.pairs, n % 2 * k.width + n // 2, 2 * k.width + n - 2 * k.pairs)
    j, i = n // k.half, n % k.half
    rest = 2 * k.width + i - k.pairs + j * (k.half - k.pairs)
    return torch.where(i < k.pairs, j * k.width + i, rest)


def spread(k: Sizes, value: Tensor, slots: Tensor) -> Tensor:
    """(..., N) -> (..., slots) fp32."""
    wide = value.new_zeros(*value.shape[:-1], k.pitch, dtype=torch.float32)
    return wide.index_copy_(-1, slots, value.float())


class Prepared(NamedTuple):
    """What the first kernels leave for the others; see `mamba3_prepare_kernel`."""

    token: Tensor
    scale: Tensor | None
    turns: Tensor | None
    angle: Tensor | None  # (chunks, H, Q, W)
    final: Tensor | None  # (rows, H, W) ... and at which rows end
    before: Tensor | None  # (rows, H, W) ... and at which their last document starts
    B: Tensor
    C: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    pairwise: bool


def prepare(k: Sizes, t: Inputs, marks: Marks, softplus: bool, pairwise: bool) -> Prepared:
    """Launch the kernels of kernels_prepare.py."""

    def new(*shape: int, zero: bool = False) -> Tensor:
        make = t.x.new_zeros if zero else t.x.new_empty
        return make(shape, dtype=torch.float32)

    token = new(k.chunks, k.heads, k.chunk, 4)
    scale = new(k.chunks, k.heads, k.chunk) if k.wide else None
    narrow = torch.float32 if k.wide else t.x.dtype
    rows = (k.batch, k.groups, k.length, k.padded, k.pitch)
    B, C = (t.x.new_empty(rows, dtype=narrow) for _ in range(2))
    B_bias, C_bias = (
        None if b is None else new(k.heads, k.padded, k.pitch) for b in (t.B_bias, t.C_bias)
    )
    turns = sums = before_sums = phase = angle = final = before = None
    if t.angles is not None:
        turns = new(k.batch, k.length, k.width)
        sums = new(k.chunks, k.heads, k.width)
        # Chunks beyond the last are not entered.
        phase = new(k.chunks, k.heads, k.width, zero=k.varlen)
        final = new(k.rows, k.heads, k.width)
        if marks.last is not None:
            before_sums, before = torch.empty_like(sums), torch.empty_like(final)
    options = k.options("mamba3_prepare")
    # Angles are never rounded, whatever products may be.
    exact = "tf32x3" if k.fast else "ieee"
    grid = k.chunks + (k.chunks + 1) * -(-k.heads // options["BLOCK_H"])
    _prepare_kernel[(grid,)](
        t.dt, t.A, t.trap, t.dt_bias, t.B, t.C, t.angles, marks.mask, marks.after, marks.doc,
        marks.last, *k.tables, t.B_bias, t.C_bias, token, scale, turns, sums, before_sums, B, C,
        B_bias, C_bias,
        *strides_of(t.dt), *strides_of(t.A), *strides_of(t.trap), *strides_of(t.B, 4),
        *strides_of(t.C, 4), *strides_of(t.angles, 2), *strides_of(marks.mask, 2),
        *strides_of(marks.after, 2), *strides_of(marks.doc, 2), k.rows, k.length, k.chunks,
        k.heads, k.groups, k.states, k.angles, k.pairs, k.half, k.ranks, SOFTPLUS=softplus,
        VARLEN=k.varlen, WIDE=k.wide, PAIRWISE=pairwise and k.angles > 0, PRECISION=exact,
        Q=k.chunk, STEP=math.gcd(2 * k.width, k.rest),
        **k.columns, **options,
    )  # fmt: skip
    if sums is not None:
        entry = None
        if t.phase is not None:
            entry = F.pad(t.phase.float() / TURN, (0, k.width - k.angles))
        options = k.options("mamba3_phase")
        columns = k.heads * k.width
        shared = (k.rows, k.length, columns)
        grid = (k.rows * -(-columns // options["BLOCK_C"]),)
        kinds = {"VARLEN": k.varlen, "Q": k.chunk, **options}
        _phase_kernel[grid](sums, entry, phase, final, *k.tables[:2], *shared, **kinds)
        if before is not None:
            _phase_kernel[grid](before_sums, entry, None, before, *k.tables[:2], *shared, **kinds)
            # The row's first document starts from the row's own angle.
            assert marks.last is not None
            before = before * (marks.last > 0)[:, None, None]
        options = k.options("mamba3_angles")
        kind = torch.float32 if k.wide else torch.int16
        angle = t.x.new_empty(k.chunks, k.heads, k.chunk, k.width, dtype=kind)
        _angles_kernel[(k.chunks * -(-k.heads // options["BLOCK_H"]),)](
            token, turns, phase, angle, *k.tables, k.rows, k.length, k.heads, VARLEN=k.varlen,
            Q=k.chunk, W=k.width, **options,
        )  # fmt: skip
    return Prepared(token, scale, turns, angle, final, before, B, C, B_bias, C_bias, pairwise)


def plain(t: Inputs) -> Inputs:
    """Inputs as the kernels take them: weights dense, the others with strides of their own."""
    dense = {
        name: None if v is None else v.contiguous()
        for name, v in t._asdict().items()
        if name in ("D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o", "dt_bias")
    }
    strided = {
        name: None if v is None else in_rows(v)
        for name, v in t._asdict().items()
        if name in ("x", "B", "C", "angles", "z")
    }
    return t._replace(**dense, **strided)


def turned(k: Sizes, state: Tensor, turns: Tensor, sign: int) -> Tensor:
    """State (rows, H, P, slots) with its pairs turned by sign * turns (rows, H, W)."""
    angle = (sign * TURN) * turns[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    a, b, c = state.split([k.width, k.width, k.rest], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, c], dim=-1)
