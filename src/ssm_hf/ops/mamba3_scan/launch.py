"""Mamba-3's scan kernels as torch operators: launches, shapes for tracing, gradients."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops import launch as common
from ssm_hf.ops.launch import (
    KERNEL_DTYPES,
    check_tensors,
    on_device,
    processors,
    tuned,
    unsupported_dtypes,
)
from ssm_hf.ops.mamba3_scan.kernels import (
    CAN_KEEP_IN_LOOPS,
    mamba3_fwd_kernel,
    mamba3_states_kernel,
)
from ssm_hf.ops.mamba3_scan.kernels_bwd import mamba3_bwd_kernel
from ssm_hf.ops.mamba3_scan.kernels_pairs import mamba3_pairs_kernel
from ssm_hf.ops.mamba3_scan.kernels_prepare import mamba3_phase_kernel, mamba3_prepare_kernel
from ssm_hf.ops.mamba3_scan.kernels_sum import mamba3_prepare_bwd_kernel, mamba3_sum_kernel
from ssm_hf.ops.mamba3_scan.reference import Mamba3State, keys
from ssm_hf.ops.packing import document_numbers, next_real, previous_real
from ssm_hf.ops.step_size import step_size

# Triton's annotations do not know that plain values may stand for constants.
_prepare_kernel: Any = mamba3_prepare_kernel
_phase_kernel: Any = mamba3_phase_kernel
_states_kernel: Any = mamba3_states_kernel
_fwd_kernel: Any = mamba3_fwd_kernel
_pairs_kernel: Any = mamba3_pairs_kernel
_bwd_kernel: Any = mamba3_bwd_kernel
_prepare_bwd_kernel: Any = mamba3_prepare_bwd_kernel
_sum_kernel: Any = mamba3_sum_kernel

LARGEST = 256
MOST_RANKS = 8
# Rows (tokens times ranks) of a chunk.
ROWS = 64
# A segment of fewer chunks would cost more to enter than it saves.
SHORTEST_SEGMENT = 4
TURN = 2 * math.pi


def why_unsupported(x: Tensor, B: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these inputs; None when they can."""
    if not CAN_KEEP_IN_LOOPS:
        return "its kernels need Triton 3.5 or later"
    head_dim, ranks, states = x.shape[-1], B.shape[2], B.shape[-1]
    if head_dim > LARGEST or states > LARGEST or ranks > MOST_RANKS:
        return (
            f"its kernels take heads of at most {LARGEST} channels, {LARGEST} states and "
            f"{MOST_RANKS} ranks, got P={head_dim}, N={states}, R={ranks}"
        )
    return unsupported_dtypes(x, B, *others)


class _Launch(NamedTuple):
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
    pairs: int  # of states that lie in tiles a and b: those that turn, or all of them
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
        return self.tables[0] is not None

    @property
    def shape(self) -> dict[str, Any]:
        """What the kernels of chunks are compiled for."""
        return {
            "HEAD_DIM": self.head_dim,
            "RAGGED": self.varlen or self.length % self.chunk != 0,
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
        size = "wide" if self.wide else f"n{self.pitch}"
        options: dict[str, Any] = dict(tuned(kernel, size, self.device))
        if "BLOCK_P" in options:
            options["BLOCK_P"] = min(options["BLOCK_P"], _block(self.head_dim, 64, self.device))
        return options


def _block(extent: int, least: int, device: torch.device) -> int:
    """Smallest power of two that covers `extent`, and is at least `least` on a GPU.

    With Triton 3.6 on Hopper, products with fewer than 64 rows lead to invalid memory accesses or
    to wrong results.
    """
    least = 16 if common.architecture(device) == "cpu" else least
    return max(least, 1 << (extent - 1).bit_length())


class _Inputs(NamedTuple):
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


class _Marks(NamedTuple):
    """Integer tensors of one call."""

    doc: Tensor | None
    last: Tensor | None  # (B,) first token of each row's last document
    cu_seqlens: Tensor | None
    mask: Tensor | None
    before: Tensor | None  # with mask: the real token before each
    after: Tensor | None  # ... and after it


def _describe(x: Tensor, B: Tensor, C: Tensor, angles: Tensor | None, mimo_o: Tensor | None,
              cu_seqlens: Tensor | None) -> _Launch:  # fmt: skip
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
    interpreted = where == "cpu"
    turning = 0 if angles is None else angles.shape[-1]
    pairs = turning or -(-states // 2)
    rest = max(states - 2 * pairs, 0)
    return _Launch(
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
        width=_block(pairs, 32, x.device),
        rest=_block(rest, 32, x.device) if rest else 0,
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


def _rows(x: Tensor) -> Tensor:
    """x with channels side by side and a chunk's offsets below 2^31; any other strides stay."""
    plain = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if plain and x.stride(1) < 2**31 // ROWS else x.contiguous()


def _strides(x: Tensor | None, count: int = 3) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


def _slots(k: _Launch, pairwise: bool) -> Tensor:
    """Index (N,): slot of each of the caller's columns of states; see `slot_of_column`."""
    n = torch.arange(k.states, device=k.device)
    if pairwise and k.angles:
        return torch.where(n < 2 * k.pairs, n % 2 * k.width + n // 2, 2 * k.width + n - 2 * k.pairs)
    j, i = n // k.half, n % k.half
    rest = 2 * k.width + i - k.pairs + j * (k.half - k.pairs)
    return torch.where(i < k.pairs, j * k.width + i, rest)


def _spread(k: _Launch, value: Tensor, slots: Tensor) -> Tensor:
    """(..., N) -> (..., slots) fp32."""
    wide = value.new_zeros(*value.shape[:-1], k.pitch, dtype=torch.float32)
    return wide.index_copy_(-1, slots, value.float())


class _Prepared(NamedTuple):
    """What the first kernels leave for the others; see `mamba3_prepare_kernel`."""

    token: Tensor
    scale: Tensor | None
    turns: Tensor | None
    phase: Tensor | None  # (chunks, H, W) turns at which chunks start
    final: Tensor | None  # (rows, H, W) ... and at which rows end
    before: Tensor | None  # (rows, H, W) ... and at which their last document starts
    B: Tensor
    C: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    pairwise: bool


def _prepare(k: _Launch, t: _Inputs, marks: _Marks, softplus: bool, pairwise: bool) -> _Prepared:
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
    turns = sums = before_sums = phase = final = before = None
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
        *_strides(t.dt), *_strides(t.A), *_strides(t.trap), *_strides(t.B, 4), *_strides(t.C, 4),
        *_strides(t.angles, 2), *_strides(marks.mask, 2), *_strides(marks.after, 2),
        *_strides(marks.doc, 2), k.rows, k.length, k.chunks, k.heads, k.groups, k.states, k.angles,
        k.pairs, k.half, k.ranks, SOFTPLUS=softplus, VARLEN=k.varlen, WIDE=k.wide,
        PAIRWISE=pairwise and k.angles > 0, Q=k.chunk, STEP=math.gcd(2 * k.width, k.rest),
        PRECISION=exact,
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
    return _Prepared(token, scale, turns, phase, final, before, B, C, B_bias, C_bias, pairwise)


def _segments(k: _Launch, programs: int, wanted: int) -> int:
    """Pieces of a row that are walked at once, so that up to `wanted` programs run per processor.

    Not more: those that wait for a place gain nothing from being shorter.
    """
    segments = wanted * processors(k.device) // programs
    return max(1, min(segments, k.longest // SHORTEST_SEGMENT))


def _states(
    k: _Launch,
    t: _Inputs,
    made: _Prepared,
    dy: Tensor | None,
    mask: Tensor | None,
    segments: int,
    totals: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    entries: tuple[Tensor | None, Tensor | None],
    options: dict[str, Any],
) -> None:
    """Launch `mamba3_states_kernel`: totals of segments if `outputs` is empty, else states."""
    find_totals = outputs[0] is None
    walked = segments - 1 if find_totals else segments
    blocks = -(-k.head_dim // options["BLOCK_P"])
    grid = k.heads * blocks * walked * k.rows * (1 if dy is None else 2)
    state, carry, dstate, dcarry = totals or (None,) * 4
    _states_kernel[(grid,)](
        t.x, t.mimo_x, made.B, made.B_bias, dy, made.C, made.C_bias, t.z, t.mimo_z, t.mimo_o, mask,
        made.token, made.scale, made.turns, made.phase, outputs[0], outputs[1], *entries,
        outputs[2], state, carry, dstate, dcarry, *k.tables[:2],
        *_strides(t.x), *_gradient_strides(k, dy), *_strides(t.z), *_strides(mask, 2),
        k.rows, k.length, k.heads, k.groups, k.ranks, walked,
        TOTALS=find_totals, SEGMENTS=segments, **k.shape, **options,
    )  # fmt: skip


def _gradient_strides(k: _Launch, dy: Tensor | None) -> tuple[int, ...]:
    """Batch, time, rank and head of a gradient of y."""
    if dy is None:
        return (0,) * 4
    if k.per_rank:
        return dy.stride()[:4]
    batch, time, head = dy.stride()[:3]
    return batch, time, 0, head


def _totals(k: _Launch, segments: int) -> tuple[Tensor, Tensor]:
    """Where segments leave their state and their decay."""
    like = torch.empty(0, dtype=torch.float32, device=k.device)
    shape = (k.rows, segments, k.heads)
    return like.new_empty(*shape, k.head_dim, k.pitch), like.new_empty(shape)


def _plain(t: _Inputs) -> _Inputs:
    """Inputs as the kernels take them: weights dense, the others with strides of their own."""
    dense = {
        name: None if v is None else v.contiguous()
        for name, v in t._asdict().items()
        if name in ("D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o", "dt_bias")
    }
    strided = {
        name: None if v is None else _rows(v)
        for name, v in t._asdict().items()
        if name in ("x", "B", "C", "angles", "z")
    }
    return t._replace(**dense, **strided)


def _turned(k: _Launch, state: Tensor, turns: Tensor, sign: int) -> Tensor:
    """State (rows, H, P, slots) with its pairs turned by sign * turns (rows, H, W)."""
    angle = (sign * TURN) * turns[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    a, b, c = state.split([k.width, k.width, k.rest], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, c], dim=-1)


def _leave(k: _Launch, made: _Prepared, state: Tensor) -> tuple[Tensor, Tensor]:
    """Final state and angle in the caller's columns, as of the last document."""
    angle = state.new_empty(k.rows, k.heads, 0)
    if made.final is not None:
        turns = made.final
        if made.before is not None:
            state = _turned(k, state, made.before, -1)
            turns = turns - made.before
        angle = (turns - turns.floor())[..., : k.angles] * TURN
        angle = torch.where(angle < TURN, angle, 0.0)
    return state.index_select(-1, _slots(k, made.pairwise)), angle


@torch.library.custom_op("ssm_hf::mamba3_scan_fwd", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    dt_bias: Tensor | None,
    entry: Tensor | None,
    phase: Tensor | None,
    doc: Tensor | None,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    softplus: bool,
    pairwise: bool,
    keep_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y; with `keep_state` also S (rows, H, P, N) and angle (rows, H, S) after the last token."""
    t = _plain(
        _Inputs(x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o,
                dt_bias, entry, phase)
    )  # fmt: skip
    marks = _Marks(doc, last, cu_seqlens, mask, before, after)
    k = _describe(t.x, B, C, angles, mimo_o, cu_seqlens)
    y = x.new_empty(_y_shape(x, B, mimo_o))
    final = x.new_empty(k.rows, k.heads, k.head_dim, k.pitch, dtype=torch.float32)
    with on_device(x):
        made = _prepare(k, t, marks, softplus, pairwise)
        initial = None if entry is None else _spread(k, entry, _slots(k, pairwise))
        options = k.options("mamba3_fwd")
        wanted = options.pop("PROGRAMS")
        programs = k.rows * k.heads * -(-k.head_dim // options["BLOCK_P"])
        segments = _segments(k, programs, wanted)
        totals, carry = None, None
        if segments > 1:
            totals, carry = _totals(k, segments)
            light = k.options("mamba3_states")
            light.pop("PROGRAMS")
            _states(
                k, t, made, None, None, segments, (totals, carry, totals, carry),
                (None, None, None), (None, None), light,
            )  # fmt: skip
        _fwd_kernel[(programs * segments,)](
            t.x, t.mimo_x, made.B, made.B_bias, made.C, made.C_bias, t.D, t.z, t.mimo_z, t.mimo_o,
            mask, made.token, made.scale, made.turns, made.phase, initial, totals, carry, y, final,
            *k.tables[:2], *_strides(t.x), *_strides(t.z), *_strides(mask, 2),
            k.rows, k.length, k.heads, k.groups, k.ranks,
            SEGMENTS=segments, **k.shape, **options,
        )  # fmt: skip
    if not keep_state:
        return y, final.new_empty(0), final.new_empty(0)
    return y, *_leave(k, made, final)


def _y_shape(x: Tensor, B: Tensor, mimo_o: Tensor | None) -> tuple[int, ...]:
    if B.shape[2] > 1 and mimo_o is None:
        return (*x.shape[:2], B.shape[2], *x.shape[2:])
    return tuple(x.shape)


@_forward.register_fake
def _(x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o, dt_bias, entry,
      phase, doc, last, cu_seqlens, mask, before, after, softplus, pairwise, keep_state):  # pyright: ignore  # fmt: skip
    y = x.new_empty(_y_shape(x, B, mimo_o))
    if not keep_state:
        return y, *(x.new_empty(0, dtype=torch.float32) for _ in range(2))
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    pairs = 0 if angles is None else angles.shape[-1]
    final = x.new_empty(rows, *x.shape[2:], B.shape[-1], dtype=torch.float32)
    return y, final, final.new_empty(rows, x.shape[2], pairs)


@torch.library.custom_op("ssm_hf::mamba3_scan_bwd", mutates_args=())
def _backward(
    dy: Tensor | None,
    dstate: Tensor | None,
    dangle: Tensor | None,
    state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    dt_bias: Tensor | None,
    entry: Tensor | None,
    phase: Tensor | None,
    doc: Tensor | None,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    softplus: bool,
    pairwise: bool,
) -> list[Tensor]:
    """Gradients of the inputs from x to phase; empty ones for what is None."""
    t = _plain(
        _Inputs(x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o,
                dt_bias, entry, phase)
    )  # fmt: skip
    marks = _Marks(doc, last, cu_seqlens, mask, before, after)
    k = _describe(t.x, B, C, angles, mimo_o, cu_seqlens)
    dy = x.new_zeros(_y_shape(x, B, mimo_o)) if dy is None else _rows(dy)
    with on_device(x):
        made = _prepare(k, t, marks, softplus, pairwise)
        return _gradients_of(k, t, marks, made, dy, dstate, dangle, state, softplus, pairwise)


def _gradients_of(
    k: _Launch,
    t: _Inputs,
    marks: _Marks,
    made: _Prepared,
    dy: Tensor,
    dstate: Tensor | None,
    dangle: Tensor | None,
    state: Tensor | None,
    softplus: bool,
    pairwise: bool,
) -> list[Tensor]:
    def new(*shape: int, zero: bool = False) -> Tensor:
        make = t.x.new_zeros if zero else t.x.new_empty
        return make(shape, dtype=torch.float32)

    narrow = torch.float32 if k.wide else t.x.dtype
    shape = (k.chunks, k.heads, k.head_dim, k.pitch)
    states, dstates = (t.x.new_empty(shape, dtype=narrow) for _ in range(2))
    dfinal, extra = _of_final(k, made, dstate, dangle, state)
    dinitial = None if t.entry is None else new(k.rows, *shape[1:])
    initial = None if t.entry is None else _spread(k, t.entry, _slots(k, pairwise))
    _states_of_chunks(k, t, made, dy, marks.mask, (initial, dfinal), (states, dstates, dinitial))

    of_chunk = (k.chunks, k.heads, k.ranks)
    dx, dz = t.x.new_empty(t.x.shape), None if t.z is None else t.z.new_empty(t.z.shape)
    dmimo = [None if m is None else new(*of_chunk, k.head_dim) for m in t[11:14]]
    dD = None if t.D is None else new(k.chunks, k.heads)
    grad = new(6, k.chunks, k.heads, k.chunk)
    rows = k.chunk * k.padded
    pairs = t.x.new_empty(k.chunks, k.heads, rows, rows, dtype=narrow)
    turn = new(k.chunks, k.heads, k.width) if k.angles else None
    strides = (
        *_strides(t.x), *_strides(t.z), *_strides(marks.mask, 2), *_gradient_strides(k, dy)
    )  # fmt: skip
    options = k.options("mamba3_pairs")
    _pairs_kernel[(k.chunks * k.heads,)](
        t.x, t.mimo_x, made.B, made.B_bias, made.C, made.C_bias, t.D, t.z, t.mimo_z, t.mimo_o,
        marks.mask, dy, made.token, made.scale, made.turns, made.phase, states, dstates, dx,
        dmimo[0], dD, dz, dmimo[1], dmimo[2], grad, pairs, turn, *k.tables, *strides,
        k.rows, k.length, k.heads, k.groups, k.ranks, grad[0].numel(),
        P_BLOCKS=-(-k.head_dim // options["BLOCK_P"]), **k.shape, **options,
    )  # fmt: skip
    options = k.options("mamba3_bwd")
    heads = _heads_per_program(k, options.pop("HEADS"))
    parts = k.heads // k.groups // heads
    dB_parts, dC_parts = (new(parts, *made.B.shape) for _ in range(2))
    dB_bias, dC_bias = (
        None if b is None else new(*of_chunk, k.pitch) for b in (t.B_bias, t.C_bias)
    )
    dturns = dphase = None
    if k.angles:
        dturns = new(2 * k.groups * parts, k.batch, k.length, k.width)
        dphase = new(2, k.rows, k.heads, k.width, zero=k.varlen)
    _bwd_kernel[((3 if k.rest else 2) * k.chunks * k.groups * parts,)](
        t.x, t.mimo_x, made.B, made.B_bias, made.C, made.C_bias, t.z, t.mimo_z, t.mimo_o,
        marks.mask, dy, made.token, made.scale, made.turns, made.phase, states, dstates, pairs,
        turn, extra, marks.last, dB_parts, dB_bias, dC_parts, dC_bias, grad, dturns, dphase,
        *k.tables, *strides, k.rows, k.length, k.heads, k.groups, k.ranks, grad[0].numel(),
        made.B.numel(), 0 if dturns is None else dturns[0].numel(),
        0 if dphase is None else dphase[0].numel(), HEADS=heads, HEAD_BLOCKS=parts,
        P_BLOCKS=-(-k.head_dim // options["BLOCK_P"]), **k.shape, **options,
    )  # fmt: skip
    del states, dstates, pairs

    ddt, dA = (v.new_empty(v.shape) for v in (t.dt, t.A))
    dtrap = None if t.trap is None else t.trap.new_empty(t.trap.shape)
    dbias = None if t.dt_bias is None else new(k.chunks, k.heads)
    options = k.options("mamba3_prepare_bwd")
    _prepare_bwd_kernel[(k.chunks * -(-k.heads // options["BLOCK_H"]),)](
        t.dt, t.A, t.trap, t.dt_bias, marks.mask, marks.before, marks.doc, *k.tables,
        grad, ddt, dA, dtrap, dbias, *_strides(t.dt), *_strides(t.A), *_strides(t.trap),
        *_strides(marks.mask, 2), *_strides(marks.before, 2), *_strides(marks.doc, 2),
        k.rows, k.length, k.heads, grad[0].numel(), SOFTPLUS=softplus, ROPE=k.angles > 0,
        VARLEN=k.varlen, Q=k.chunk, **options,
    )  # fmt: skip
    dB, dC = (v.new_empty(v.shape) for v in (t.B, t.C))
    dangles = None if t.angles is None else t.angles.new_empty(t.angles.shape)
    options = k.options("mamba3_sum")
    tokens = k.batch * k.length
    grid = -(-tokens * k.ranks * k.groups // options["ROWS"])
    grid += -(-tokens // options["ROWS"]) if k.angles else 0
    _sum_kernel[(grid,)](
        dB_parts, dC_parts, dturns, made.turns, dB, dC, dangles, tokens, k.length, k.groups,
        k.ranks, k.states, k.angles, k.pairs, k.half, made.B.numel(),
        0 if dturns is None else dturns[0].numel(), PAIRWISE=pairwise and k.angles > 0,
        PARTS=parts, TURNS_PARTS=2 * k.groups * parts, COLUMNS=1 << (k.states - 1).bit_length(),
        **k.columns, **options,
    )  # fmt: skip

    def narrowed(total: Tensor | None, like: Tensor | None) -> Tensor:
        if total is None or like is None:
            return t.x.new_empty(0)
        return total.sum(0).to(like.dtype)

    dentry = dstart = None
    if dinitial is not None and t.entry is not None:
        dentry = dinitial.index_select(-1, _slots(k, pairwise)).to(t.entry.dtype)
    if dphase is not None and t.phase is not None:
        dstart = dphase.sum(0)[..., : k.angles]
        if marks.cu_seqlens is not None:
            # An empty document hands its angle on.
            empty = (marks.cu_seqlens.diff() == 0)[:, None, None]
            dstart = torch.where(empty, 0.0 if dangle is None else dangle.float(), dstart)
        dstart = dstart.to(t.phase.dtype)
    dB_bias, dC_bias = (
        None if b is None else b.sum(0).index_select(-1, _slots(k, pairwise))[None]
        for b in (dB_bias, dC_bias)
    )
    given = (
        dx, ddt, dA, dtrap, dB, dC, dangles, narrowed(dD, t.D), dz, narrowed(dB_bias, t.B_bias),
        narrowed(dC_bias, t.C_bias), *map(narrowed, dmimo, t[11:14]), narrowed(dbias, t.dt_bias),
        dentry, dstart,
    )  # fmt: skip
    return [t.x.new_empty(0) if g is None else g for g in given]


def _of_final(
    k: _Launch,
    made: _Prepared,
    dstate: Tensor | None,
    dangle: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of the final state as the kernels hold it, and what the angles of the row's last
    document get of it: they turn the state that leaves, and are the angle that leaves.
    """
    extra = None
    if dstate is None and dangle is None:
        return None, None
    slots = _slots(k, made.pairwise)
    dfinal = None if dstate is None else _spread(k, dstate, slots)
    if k.angles:
        extra = slots.new_zeros(k.rows, k.heads, k.width, dtype=torch.float32)
        if dangle is not None:
            extra[..., : k.angles] = dangle.float()
        if dfinal is not None:
            assert state is not None
            a, b, _ = _spread(k, state, slots).split([k.width, k.width, k.rest], dim=-1)
            da, db, _ = dfinal.split([k.width, k.width, k.rest], dim=-1)
            turned = (a * db - b * da).sum(dim=2)
            extra[..., : k.angles] += turned[..., : k.angles]
            if made.before is not None:
                dfinal = _turned(k, dfinal, made.before, 1)
    return dfinal, extra


def _states_of_chunks(
    k: _Launch,
    t: _Inputs,
    made: _Prepared,
    dy: Tensor,
    mask: Tensor | None,
    entries: tuple[Tensor | None, Tensor | None],
    outputs: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """Fill the states that enter chunks, the gradients of those that leave, and dinitial."""
    options = k.options("mamba3_states")
    wanted = options.pop("PROGRAMS")
    blocks = -(-k.head_dim // options["BLOCK_P"])
    segments = _segments(k, 2 * k.rows * k.heads * blocks, wanted)
    # Both passes walk a segment: two segments take as long as the whole row at once.
    segments = segments if segments > 2 else 1
    totals = None
    if segments > 1:
        totals = (*_totals(k, segments), *_totals(k, segments))
        none = (None, None, None)
        _states(k, t, made, dy, mask, segments, totals, none, (None, None), options)
    _states(k, t, made, dy, mask, segments, totals, outputs, entries, options)


def _heads_per_program(k: _Launch, most: int) -> int:
    """Largest number of heads that divides a group's, at most `most`, and keeps the GPU full."""
    per_group = k.heads // k.groups
    enough = 2 * processors(k.device)
    fitting = [h for h in range(1, min(most, per_group) + 1) if per_group % h == 0]
    full = [h for h in fitting if k.chunks * k.heads // h >= enough]
    return max(full) if full else 1


@_backward.register_fake
def _(dy, dstate, dangle, state, *inputs):  # pyright: ignore
    return [inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:17]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (*ctx.options, keep_state) = inputs[:23], inputs[23:]
    ctx.save_for_backward(output[1] if keep_state else None, *tensors)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dy: Tensor | None, dstate: Tensor | None, dangle: Tensor | None
) -> tuple[Any, ...]:
    state, *tensors = ctx.saved_tensors
    if dy is None and dstate is None and dangle is None:
        return (None,) * 26
    if state is None:
        dstate = dangle = None
    grads = _backward(dy, dstate, dangle, state, *tensors, *ctx.options)
    given = zip(grads, tensors[:17], strict=True)
    return (*(None if t is None else grad for grad, t in given), *(None,) * 9)


_forward.register_autograd(_gradients, setup_context=_setup)


def mamba3_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor | None,
    B: Tensor,
    C: Tensor,
    angles: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    rope_layout: str,
    initial_state: Mamba3State | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_size: int,
    keep_state: bool = True,
) -> tuple[Tensor, Mamba3State | None]:
    """y and the final state, or None without `keep_state`; arguments as `mamba3_scan` takes them.

    Chunks have 64 tokens divided by the ranks. What enters and leaves with the k and v of the state
    is a matter of one token a row, and done in torch.
    """
    given = {} if initial_state is None else initial_state._asdict()
    check_tensors("mamba3_scan", KERNEL_DTYPES, x=x, dt=dt, A=A, trap=trap, B=B, C=C,
                  angles=angles, D=D, z=z, B_bias=B_bias, C_bias=C_bias, mimo_x=mimo_x,
                  mimo_z=mimo_z, mimo_o=mimo_o, dt_bias=dt_bias, seq_idx=seq_idx,
                  cu_seqlens=cu_seqlens, mask=mask, **given)  # fmt: skip
    doc, last, before, after = seq_idx, None, None, None
    if mask is not None:
        before, after = previous_real(mask), next_real(mask)
        if seq_idx is not None:
            doc = document_numbers(seq_idx, mask)
    if doc is not None and keep_state:
        starts = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0))
        last = (starts * torch.arange(x.shape[1], device=x.device)).amax(dim=1)
    entry = phase = None
    if initial_state is not None:
        entry = _first_input(
            x, dt, trap, mimo_x, dt_bias, dt_softplus, initial_state, cu_seqlens, mask
        )
        phase = initial_state.angle if angles is not None else None
    y, ssm, angle = common.call(
        _forward, x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o,
        dt_bias, entry, phase, doc, last, cu_seqlens, mask, before, after, dt_softplus,
        rope_layout == "pairwise", keep_state,
    )  # fmt: skip
    if not keep_state:
        return y, None
    place, real = _last_token(x, cu_seqlens, mask)
    batch = torch.arange(len(place), device=x.device) * (cu_seqlens is None)
    k = keys(B[batch, place].float(), B_bias, angle, rope_layout).transpose(1, 2).to(x.dtype)
    v = x[batch, place]
    if initial_state is not None:
        k = torch.where(real[:, None, None, None], k, initial_state.k.to(k.dtype))
        v = torch.where(real[:, None, None], v, initial_state.v.to(v.dtype))
    else:
        k = k * real[:, None, None, None]
        v = v * real[:, None, None]
    return y, Mamba3State(angle, ssm, k, v)


def _last_token(x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Place (rows,) of the last real token of each row or document, and whether there is one."""
    batch, length = x.shape[:2]
    if cu_seqlens is not None:
        ends, starts = cu_seqlens[1:].long(), cu_seqlens[:-1].long()
    else:
        ends = torch.full((batch,), length, device=x.device)
        starts = torch.zeros_like(ends)
    place = ends - 1
    if mask is not None:
        # previous_real of the place behind the end
        behind = F.pad(mask, (0, 1))
        rows = torch.arange(len(ends), device=x.device) * (cu_seqlens is None)
        place = previous_real(behind)[rows, ends]
    return place.clamp(min=0), (place >= starts) & (ends > starts)


def _first_input(
    x: Tensor,
    dt: Tensor,
    trap: Tensor | None,
    mimo_x: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state: Mamba3State,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """S + b v ⊗ k with the state's k and v, and b of the first real token of each row."""
    if trap is None:
        return state.ssm
    batch, length = x.shape[:2]
    if cu_seqlens is not None:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    else:
        starts = torch.zeros(batch, dtype=torch.long, device=x.device)
        ends = starts + length
    rows = torch.arange(len(starts), device=x.device) * (cu_seqlens is None)
    place = starts
    if mask is not None:
        place = F.pad(next_real(F.pad(mask, (1, 0))), (0, 1), value=length + 1)[rows, starts] - 1
    real = place < ends
    place = place.clamp(max=length - 1)
    delta = step_size(dt[rows, place], dt_bias, dt_softplus, (0.0, math.inf), None)
    b = torch.where(real[:, None], torch.sigmoid(-trap[rows, place].to(delta.dtype)) * delta, 0.0)
    v = state.v[:, None].to(b.dtype)
    if mimo_x is not None:
        v = v * mimo_x.transpose(0, 1)
    added = torch.einsum("brhp,brhn->bhpn", v * b[:, None, :, None], state.k.to(b.dtype))
    return state.ssm + added
