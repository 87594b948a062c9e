"""The scan's kernels as torch operators: launches, shapes for tracing, gradients."""

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
from ssm_hf.ops.packing import document_numbers
from ssm_hf.ops.ssd.kernels import (
    ssd_decay_bwd_kernel,
    ssd_decay_kernel,
    ssd_fwd_kernel,
    ssd_states_kernel,
)
from ssm_hf.ops.ssd.kernels_bwd import ssd_bwd_kernel
from ssm_hf.ops.ssd.kernels_sum import ssd_sum_kernel

# Triton's annotations do not know that plain values may stand for constants.
_decay_kernel: Any = ssd_decay_kernel
_decay_bwd_kernel: Any = ssd_decay_bwd_kernel
_states_kernel: Any = ssd_states_kernel
_fwd_kernel: Any = ssd_fwd_kernel
_bwd_kernel: Any = ssd_bwd_kernel
_sum_kernel: Any = ssd_sum_kernel

LARGEST = 256
CHUNK = 64
# A segment of fewer chunks would cost more to enter than it saves.
SHORTEST_SEGMENT = 4


def why_unsupported(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Tensor | None
) -> str | None:
    """Why the kernels cannot take these inputs; None when they can."""
    head_dim, states = x.shape[-1], B.shape[-1]
    if head_dim > LARGEST or states > LARGEST:
        return (
            f"its kernels take heads of at most {LARGEST} channels and {LARGEST} states, "
            f"got P={head_dim}, N={states}"
        )
    return unsupported_dtypes(x, dt, A, B, *others)


class _Launch(NamedTuple):
    """What all launches of one call share."""

    batch: int
    length: int
    heads: int
    groups: int
    head_dim: int
    states: int
    rows: int  # batch rows, or documents of one row
    chunks: int  # of all rows; with cu_seqlens an upper bound
    longest: int  # chunks of the longest row; with cu_seqlens an upper bound
    tables: tuple[
        Tensor | None, Tensor | None, Tensor | None
    ]  # cu_seqlens, first chunk, row of chunk
    wide: bool  # products in fp32, not in the inputs' 16 bits
    precision: str
    device: torch.device

    @property
    def shape(self) -> dict[str, int | bool]:
        """What kernels are compiled for."""
        ragged = self.tables[0] is not None or self.length % CHUNK != 0
        return {"STATES": self.states, "HEAD_DIM": self.head_dim, "RAGGED": ragged}

    def blocks(self) -> tuple[int, int]:
        """Channels and states of a tile that holds a whole head, powers of two.

        With Triton 3.6 on Hopper, products with a side below 64 lead to invalid memory accesses or
        to wrong results.
        """
        least = 16 if common.architecture(self.device) == "cpu" else 64
        return max(_block(self.head_dim), least), max(_block(self.states), least)

    def options(self, kernel: str) -> dict[str, Any]:
        """Tuned options, with blocks no larger than a head."""
        size = "wide" if self.wide else f"n{_block(self.states)}"
        options: dict[str, Any] = dict(tuned(kernel, size, self.device))
        for name, extent in zip(("BLOCK_P", "BLOCK_N"), self.blocks(), strict=True):
            if name in options:
                options[name] = min(options[name], extent)
        return options


def _block(extent: int) -> int:
    """Smallest power of two that covers `extent`, at least 16: the least side of a product."""
    return max(16, 1 << (extent - 1).bit_length())


def _describe(x: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None, length: int) -> _Launch:
    batch, _, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    rows, chunks = batch, batch * -(-length // CHUNK)
    tables: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if cu_seqlens is not None:
        rows = cu_seqlens.numel() - 1
        chunks = length // CHUNK + rows
        counts = (cu_seqlens.diff() + (CHUNK - 1)) // CHUNK
        first = F.pad(counts.cumsum(0), (1, 0))
        numbers = torch.arange(chunks, device=x.device)
        tables = (cu_seqlens, first, torch.searchsorted(first[1:], numbers, right=True))
    precision, where = "ieee", common.architecture(x.device)
    if where.startswith("sm"):
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    # Triton's interpreter multiplies the bits of bf16 numbers as if they were integers.
    interpreted = where == "cpu"
    return _Launch(
        batch=batch,
        length=length,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        states=states,
        rows=rows,
        chunks=chunks,
        longest=-(-length // CHUNK),
        tables=tables,
        wide=interpreted or x.dtype == torch.float32 or not x.dtype == B.dtype == C.dtype,
        precision=precision,
        device=x.device,
    )


def _rows(x: Tensor) -> Tensor:
    """x with channels side by side and a chunk's offsets below 2^31; any other strides stay."""
    plain = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if plain and x.stride(1) < 2**31 // CHUNK else x.contiguous()


def _strides(x: Tensor | None, count: int = 3) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


def _decay_arguments(
    k: _Launch,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    pointers = (dt, A, dt_bias, mask, doc, *k.tables)
    return pointers, (*_strides(dt), *_strides(mask, 2), *_strides(doc, 2))


def _decays(
    k: _Launch,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
    step: tuple[bool, float, float],
) -> Tensor:
    """(chunks, H, Q, 4): running sums of exponents and Δ; see `ssd_decay_kernel`."""
    decay = dt.new_empty(k.chunks, k.heads, CHUNK, 4, dtype=torch.float32)
    pointers, strides = _decay_arguments(k, dt, A, dt_bias, doc, mask)
    options = k.options("ssd_decay")
    softplus, lowest, highest = step
    _decay_kernel[(k.chunks * -(-k.heads // options["BLOCK_H"]),)](
        *pointers, decay, *strides, k.rows, k.length, k.heads, lowest, highest,
        SOFTPLUS=softplus, LIMIT=_limited(step), VARLEN=k.tables[0] is not None, WIDE=k.wide,
        Q=CHUNK,
        **options,
    )  # fmt: skip
    return decay


def _limited(step: tuple[bool, float, float]) -> bool:
    return step[1] > 0 or not math.isinf(step[2])


def _segments(k: _Launch, programs: int, wanted: int) -> int:
    """Pieces of a row that are walked at once, so that up to `wanted` programs run per processor.

    Not more: those that wait for a place gain nothing from being shorter.
    """
    segments = wanted * processors(k.device) // programs
    return max(1, min(segments, k.longest // SHORTEST_SEGMENT))


def _states(
    k: _Launch,
    x: Tensor,
    B: Tensor,
    backward: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None,
    decay: Tensor,
    segments: int,
    totals: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    entries: tuple[Tensor | None, Tensor | None],
    options: dict[str, Any],
) -> None:
    """Launch `ssd_states_kernel`: totals of segments if `outputs` is empty, else exact states."""
    dy, C, z, mask = backward or (None, None, None, None)
    find_totals = outputs[0] is None
    walked = segments - 1 if find_totals else segments
    blocks = -(-k.head_dim // options["BLOCK_P"]) * -(-k.states // options["BLOCK_N"])
    grid = k.heads * blocks * walked * k.rows * (1 if backward is None else 2)
    state, carry, dstate, dcarry = totals or (None,) * 4
    cu_seqlens, first, _ = k.tables
    _states_kernel[(grid,)](
        x, B, dy, C, z, mask, decay, outputs[0], outputs[1], entries[0], entries[1], outputs[2],
        state, carry, dstate, dcarry, cu_seqlens, first,
        *_strides(x), *_strides(B), *_strides(dy), *_strides(C), *_strides(z), *_strides(mask, 2),
        k.rows, k.length, k.heads, k.heads // k.groups, walked, **k.shape,
        TOTALS=find_totals, SEGMENTS=segments, VARLEN=cu_seqlens is not None, WIDE=k.wide,
        PRECISION=k.precision, Q=CHUNK, **options,
    )  # fmt: skip


def _totals(k: _Launch, segments: int) -> tuple[Tensor, Tensor]:
    """Where segments leave their state and their decay."""
    like = torch.empty(0, dtype=torch.float32, device=k.device)
    shape = (k.rows, segments, k.heads)
    return like.new_empty(*shape, k.head_dim, k.states), like.new_empty(shape)


@torch.library.custom_op("ssm_hf::ssd_fwd", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    doc: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, P), final state (rows, H, P, N) fp32, and with z also y before the gate."""
    x, B, C = _rows(x), _rows(B), _rows(C)
    z = None if z is None else _rows(z)
    k = _describe(x, B, C, cu_seqlens, x.shape[1])
    y = x.new_empty(x.shape)
    ungated = x.new_empty(0) if z is None else x.new_empty(x.shape)
    final = x.new_empty(k.rows, k.heads, k.head_dim, k.states, dtype=torch.float32)
    with on_device(x):
        decay = _decays(k, dt, A, dt_bias, doc, mask, (dt_softplus, dt_min, dt_max))
        options = k.options("ssd_fwd")
        wanted = options.pop("PROGRAMS")
        blocks = -(-k.states // options["BLOCK_N"])
        programs = k.rows * k.heads * -(-k.head_dim // options["BLOCK_P"]) * blocks
        segments = _segments(k, programs, wanted)
        # What each block of states adds to y.
        parts = [y, ungated]
        if blocks > 1:
            parts = [t.new_empty(blocks, *t.shape, dtype=torch.float32) for t in parts]
        totals, carry = None, None
        if segments > 1:
            totals, carry = _totals(k, segments)
            # The forward pass's half of `ssd_states_kernel` likes other options than the whole.
            light = k.options("ssd_totals")
            _states(
                k, x, B, None, decay, segments, (totals, carry, totals, carry),
                (None, None, None), (None, None), light,
            )  # fmt: skip
        _fwd_kernel[(programs * segments,)](
            x, B, C, D, z, mask, decay, initial_state, totals, carry, *parts, final,
            *k.tables[:2],
            *_strides(x), *_strides(B), *_strides(C), *_strides(z), *_strides(mask, 2),
            k.rows, k.length, k.heads, k.heads // k.groups, y.numel(), **k.shape,
            D_PER_CHANNEL=D is not None and D.ndim == 2, SEGMENTS=segments,
            VARLEN=cu_seqlens is not None, WIDE=k.wide, PRECISION=k.precision, Q=CHUNK, **options,
        )  # fmt: skip
        if blocks > 1:
            for whole, part in zip((y, ungated), parts, strict=True):
                for added in part[1:-1]:
                    part[0] += added
                torch.add(part[0], part[-1], out=whole)
    return y, final, ungated


@_forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_state, doc, cu_seqlens, mask, *step):  # pyright: ignore
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty(rows, *x.shape[2:], B.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape), final, x.new_empty(0 if z is None else x.shape)


@torch.library.custom_op("ssm_hf::ssd_bwd", mutates_args=())
def _backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    ungated: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    doc: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state; empty ones for what is None."""
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    grads = [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in given]
    gradients_into(
        grads, dy, dfinal, ungated, *given, doc, cu_seqlens, mask, (dt_softplus, dt_min, dt_max)
    )
    return grads


def gradients_into(
    grads: list[Tensor],
    dy: Tensor | None,
    dfinal: Tensor | None,
    ungated: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    doc: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    step: tuple[bool, float, float],
) -> None:
    """Write the gradients of the nine tensors from x to initial_state into `grads`, in this order.

    Those of x, dt, B, C and z may have any strides of batch and time; what lies within a token (of
    dt: any) is dense.
    """
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = grads
    dt_softplus, dt_min, dt_max = step
    dy = x.new_zeros(x.shape) if dy is None else dy
    x, B, C, dy = _rows(x), _rows(B), _rows(C), _rows(dy)
    z = None if z is None else _rows(z)
    dfinal = None if dfinal is None else dfinal.contiguous()
    k = _describe(x, B, C, cu_seqlens, x.shape[1])
    narrow = torch.float32 if k.wide else x.dtype
    shape = (k.chunks, k.heads, k.head_dim, k.states)
    states, dstates = (x.new_empty(shape, dtype=narrow) for _ in range(2))
    wide_dinitial = None
    if initial_state is not None:
        wide_dinitial = dinitial if dinitial.dtype == torch.float32 else dinitial.float()
    grad = x.new_empty(4, k.chunks, k.heads, CHUNK, dtype=torch.float32)
    sums = x.new_empty(2, k.chunks, k.heads, dtype=torch.float32)
    per_channel = D is not None and D.ndim == 2
    last = k.head_dim if per_channel else CHUNK
    dD_parts = None
    if D is not None:
        dD_parts = x.new_empty(k.chunks, k.heads, last, dtype=torch.float32)
    with on_device(x):
        decay = _decays(k, dt, A, dt_bias, doc, mask, step)
        _states_of_chunks(k, x, B, dy, C, z, mask, decay, initial_state, dfinal, wide_dinitial,
                          states, dstates)  # fmt: skip
        options = k.options("ssd_bwd")
        heads = _heads_per_program(k, options.pop("HEADS"))
        p_blocks = -(-k.head_dim // options["BLOCK_P"])
        # Every block of channels has buffers of its own, and so has z: two programs should still
        # fit a multiprocessor.
        options["STAGES"] = max(1, (options["STAGES"] - (z is not None)) // p_blocks)
        blocks = k.heads // k.groups // heads
        most = options.pop("SHARE")
        split = next(s for s in range(1, heads + 1) if heads % s == 0 and heads // s <= most)
        parts = blocks * (split + 1)
        part_type, scales = torch.float32, (None, None)
        if x.dtype == B.dtype == C.dtype != torch.float32:
            part_type = torch.float16
            scales = x.new_empty(2, parts, *B.shape[:3], dtype=torch.float32).unbind()
        dB_parts, dC_parts = (x.new_empty(parts, *B.shape, dtype=part_type) for _ in range(2))
        _bwd_kernel[((split + 2) * k.chunks * k.groups * blocks,)](
            x, B, C, D, z, ungated, mask, dy, decay, states, dstates, dx, dz, dB_parts, dC_parts,
            *scales, grad, dD_parts, *k.tables,
            *_strides(x), *_strides(B), *_strides(C), *_strides(z), *_strides(mask, 2),
            *_strides(dy), *_strides(dx, 2), *_strides(None if z is None else dz, 2),
            k.rows, k.length, k.heads, k.groups, grad[0].numel(),
            B.numel(), **k.shape, D_PER_CHANNEL=per_channel,
            VARLEN=cu_seqlens is not None, WIDE=k.wide, PRECISION=k.precision, Q=CHUNK,
            HEADS=heads, HEAD_BLOCKS=blocks, SPLIT=split,
            P_BLOCKS=p_blocks, BLOCK_N=k.blocks()[1], **options,
        )  # fmt: skip
        pointers, strides = _decay_arguments(k, dt, A, dt_bias, doc, mask)
        options = k.options("ssd_decay_bwd")
        _decay_bwd_kernel[(k.chunks * -(-k.heads // options["BLOCK_H"]),)](
            *pointers, grad, ddt, sums, *strides, *_strides(ddt), k.rows, k.length, k.heads,
            grad[0].numel(), k.chunks * k.heads, dt_min, dt_max, SOFTPLUS=dt_softplus,
            LIMIT=_limited(step), VARLEN=cu_seqlens is not None, Q=CHUNK, **options,
        )  # fmt: skip
        options = k.options("ssd_sum")
        tokens = k.batch * k.length
        options["COLUMNS"] = min(options["COLUMNS"], _block(k.states))
        programs = -(-tokens // options["ROWS"]) * -(-k.states // options["COLUMNS"]) * k.groups
        _sum_kernel[(programs + k.heads,)](
            dB_parts, dC_parts, *scales, sums, dD_parts, dB, dC, dA,
            None if dt_bias is None else dbias, None if D is None else dD,
            *_strides(dB, 2), *_strides(dC, 2), tokens, k.length, B.numel(), k.chunks, k.heads,
            k.groups, STATES=k.states, B_PARTS=parts, C_PARTS=parts, LAST=last,
            D_PER_CHANNEL=per_channel, BLOCK_L=_block(last), **options,
        )  # fmt: skip
    if wide_dinitial is not None and wide_dinitial is not dinitial:
        dinitial.copy_(wide_dinitial)


def _states_of_chunks(
    k: _Launch,
    x: Tensor,
    B: Tensor,
    dy: Tensor,
    C: Tensor,
    z: Tensor | None,
    mask: Tensor | None,
    decay: Tensor,
    initial_state: Tensor | None,
    dfinal: Tensor | None,
    dinitial: Tensor | None,
    states: Tensor,
    dstates: Tensor,
) -> None:
    """Fill the states that enter chunks, the gradients of those that leave, and dinitial."""
    options = k.options("ssd_states")
    wanted = options.pop("PROGRAMS")
    blocks = -(-k.head_dim // options["BLOCK_P"]) * -(-k.states // options["BLOCK_N"])
    segments = _segments(k, 2 * k.rows * k.heads * blocks, wanted)
    # Both passes walk a segment: two segments take as long as the whole row at once.
    segments = segments if segments > 2 else 1
    backward, totals = (dy, C, z, mask), None
    if segments > 1:
        totals = (*_totals(k, segments), *_totals(k, segments))
        none = (None, None, None)
        _states(k, x, B, backward, decay, segments, totals, none, (None, None), options)
    _states(
        k, x, B, backward, decay, segments, totals, (states, dstates, dinitial),
        (initial_state, dfinal), options,
    )  # fmt: skip


def _heads_per_program(k: _Launch, most: int) -> int:
    """Largest number of heads that divides a group's, at most `most`, and keeps the GPU full."""
    per_group = k.heads // k.groups
    enough = 2 * processors(k.device)
    fitting = [h for h in range(1, min(most, per_group) + 1) if per_group % h == 0]
    full = [h for h in fitting if k.chunks * k.heads // h >= enough]
    return max(full) if full else 1


@_backward.register_fake
def _(dy, dfinal, ungated, *inputs):  # pyright: ignore
    return [inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:9]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.step = inputs[:12], inputs[12:]
    ctx.save_for_backward(output[2], *tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    ungated, *tensors = ctx.saved_tensors
    if dy is None and dfinal is None:
        return (None,) * 15
    grads = _backward(dy, dfinal, ungated, *tensors, *ctx.step)
    given = zip(grads, tensors[:9], strict=True)
    return (*(None if t is None else grad for grad, t in given), *(None,) * 6)


_forward.register_autograd(_gradients, setup_context=_setup)


def ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y and the final state; arguments as `ssd` takes them. Chunks always have 64 tokens."""
    check_tensors("ssd", KERNEL_DTYPES, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
                  initial_state=initial_state, seq_idx=seq_idx, cu_seqlens=cu_seqlens,
                  mask=mask)  # fmt: skip
    doc = seq_idx
    if seq_idx is not None and mask is not None:
        doc = document_numbers(seq_idx, mask)
    D, dt_bias, initial_state = (
        None if t is None else t.contiguous() for t in (D, dt_bias, initial_state)
    )
    y, state, _ = common.call(
        _forward, x, dt, A.contiguous(), B, C, D, z, dt_bias, initial_state, doc, cu_seqlens, mask,
        dt_softplus, float(dt_limit[0]), float(dt_limit[1]),
    )  # fmt: skip
    return y, state
