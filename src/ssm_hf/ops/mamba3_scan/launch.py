"""Mamba-3's scan kernels as torch operators: launches, shapes for tracing, gradients."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops import launch as common
from ssm_hf.ops.launch import (
    KERNEL_DTYPES,
    check_tensors,
    on_device,
    processors,
    unsupported_dtypes,
)
from ssm_hf.ops.mamba3_scan.kernels import (
    CAN_KEEP_IN_LOOPS,
    mamba3_fwd_kernel,
    mamba3_states_kernel,
)
from ssm_hf.ops.mamba3_scan.kernels_sum import mamba3_prepare_bwd_kernel
from ssm_hf.ops.mamba3_scan.launch_grads import Found, of_chunks, sum_parts
from ssm_hf.ops.mamba3_scan.launch_parts import (
    TURN,
    Inputs,
    Marks,
    Prepared,
    Sizes,
    describe,
    gradient_strides,
    in_rows,
    plain,
    prepare,
    slots_of,
    spread,
    strides_of,
    turned,
)
from ssm_hf.ops.mamba3_scan.reference import Mamba3State, keys
from ssm_hf.ops.packing import document_numbers, next_real, previous_real
from ssm_hf.ops.step_size import step_size

# Triton's annotations do not know that plain values may stand for constants.
_states_kernel: Any = mamba3_states_kernel
_fwd_kernel: Any = mamba3_fwd_kernel
_prepare_bwd_kernel: Any = mamba3_prepare_bwd_kernel

LARGEST = 256
MOST_RANKS = 8
# A segment of fewer chunks would cost more to enter than it saves.
SHORTEST_SEGMENT = 4


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


def _segments(k: Sizes, programs: int, wanted: int) -> int:
    """Pieces of a row that are walked at once, so that up to `wanted` programs run per processor.

    Not more: those that wait for a place gain nothing from being shorter.
    """
    segments = wanted * processors(k.device) // programs
    return max(1, min(segments, k.longest // SHORTEST_SEGMENT))


def _states(
    k: Sizes,
    t: Inputs,
    made: Prepared,
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
        made.token, made.scale, made.angle, outputs[0], outputs[1], *entries,
        outputs[2], state, carry, dstate, dcarry, *k.tables[:2],
        *strides_of(t.x), *gradient_strides(k, dy), *strides_of(t.z), *strides_of(mask, 2),
        k.rows, k.length, k.heads, k.groups, k.ranks, walked,
        TOTALS=find_totals, SEGMENTS=segments, **k.shape, **options,
    )  # fmt: skip


def _totals(k: Sizes, segments: int) -> tuple[Tensor, Tensor]:
    """Where segments leave their state and their decay."""
    like = torch.empty(0, dtype=torch.float32, device=k.device)
    shape = (k.rows, segments, k.heads)
    return like.new_empty(*shape, k.head_dim, k.pitch), like.new_empty(shape)


def _leave(k: Sizes, made: Prepared, state: Tensor) -> tuple[Tensor, Tensor]:
    """Final state and angle in the caller's columns, as of the last document."""
    angle = state.new_empty(k.rows, k.heads, 0)
    if made.final is not None:
        turns = made.final
        if made.before is not None:
            state = turned(k, state, made.before, -1)
            turns = turns - made.before
        angle = (turns - turns.floor())[..., : k.angles] * TURN
        angle = torch.where(angle < TURN, angle, 0.0)
    return state.index_select(-1, slots_of(k, made.pairwise)), angle


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
    t = plain(
        Inputs(x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o,
                dt_bias, entry, phase)
    )  # fmt: skip
    marks = Marks(doc, last, cu_seqlens, mask, before, after)
    k = describe(t.x, B, C, angles, mimo_o, cu_seqlens)
    y = x.new_empty(_y_shape(x, B, mimo_o))
    final = x.new_empty(k.rows, k.heads, k.head_dim, k.pitch, dtype=torch.float32)
    with on_device(x):
        made = prepare(k, t, marks, softplus, pairwise)
        initial = None if entry is None else spread(k, entry, slots_of(k, pairwise))
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
            mask, made.token, made.scale, made.angle, initial, totals, carry, y, final,
            *k.tables[:2], *strides_of(t.x), *strides_of(t.z), *strides_of(mask, 2),
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
    t = plain(
        Inputs(x, dt, A, trap, B, C, angles, D, z, B_bias, C_bias, mimo_x, mimo_z, mimo_o,
                dt_bias, entry, phase)
    )  # fmt: skip
    marks = Marks(doc, last, cu_seqlens, mask, before, after)
    k = describe(t.x, B, C, angles, mimo_o, cu_seqlens)
    dy = x.new_zeros(_y_shape(x, B, mimo_o)) if dy is None else in_rows(dy)
    with on_device(x):
        made = prepare(k, t, marks, softplus, pairwise)
        return _gradients_of(k, t, marks, made, dy, dstate, dangle, state, softplus, pairwise)


def _gradients_of(
    k: Sizes,
    t: Inputs,
    marks: Marks,
    made: Prepared,
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
    initial = None if t.entry is None else spread(k, t.entry, slots_of(k, pairwise))
    _states_of_chunks(k, t, made, dy, marks.mask, (initial, dfinal), (states, dstates, dinitial))

    of_chunk = (k.chunks, k.heads, k.ranks)
    dx, dz = t.x.new_empty(t.x.shape), None if t.z is None else t.z.new_empty(t.z.shape)
    dmimo = [None if m is None else new(*of_chunk, k.head_dim) for m in t[11:14]]
    dD = None if t.D is None else new(k.chunks, k.heads)
    grad = new(5, k.chunks, k.heads, k.chunk)
    found = Found(dx, dz, dmimo[0], dmimo[1], dmimo[2], dD, grad)
    sums = of_chunks(k, t, marks, made, dy, states, dstates, extra, found)
    del states, dstates

    ddt, dA = (v.new_empty(v.shape) for v in (t.dt, t.A))
    dtrap = None if t.trap is None else t.trap.new_empty(t.trap.shape)
    dbias = None if t.dt_bias is None else new(k.chunks, k.heads)
    options = k.options("mamba3_prepare_bwd")
    _prepare_bwd_kernel[(k.chunks * -(-k.heads // options["BLOCK_H"]),)](
        t.dt, t.A, t.trap, t.dt_bias, marks.mask, marks.before, marks.doc, *k.tables,
        grad, ddt, dA, dtrap, dbias, *strides_of(t.dt), *strides_of(t.A), *strides_of(t.trap),
        *strides_of(marks.mask, 2), *strides_of(marks.before, 2), *strides_of(marks.doc, 2),
        k.rows, k.length, k.heads, grad[0].numel(), SOFTPLUS=softplus, TURNS=sums.turns,
        VARLEN=k.varlen, Q=k.chunk, **options,
    )  # fmt: skip
    dB, dC, dangles = sum_parts(k, t, made, sums, pairwise)

    def narrowed(total: Tensor | None, like: Tensor | None) -> Tensor:
        if total is None or like is None:
            return t.x.new_empty(0)
        return total.sum(0).to(like.dtype)

    dentry = dstart = None
    if dinitial is not None and t.entry is not None:
        dentry = dinitial.index_select(-1, slots_of(k, pairwise)).to(t.entry.dtype)
    if sums.dphase is not None and t.phase is not None:
        dstart = sums.dphase.sum(0)[..., : k.angles]
        if marks.cu_seqlens is not None:
            # An empty document hands its angle on.
            empty = (marks.cu_seqlens.diff() == 0)[:, None, None]
            dstart = torch.where(empty, 0.0 if dangle is None else dangle.float(), dstart)
        dstart = dstart.to(t.phase.dtype)
    dB_bias, dC_bias = (
        None if b is None else b.sum(0).index_select(-1, slots_of(k, pairwise))[None]
        for b in (sums.dB_bias, sums.dC_bias)
    )
    given = (
        dx, ddt, dA, dtrap, dB, dC, dangles, narrowed(dD, t.D), dz, narrowed(dB_bias, t.B_bias),
        narrowed(dC_bias, t.C_bias), *map(narrowed, dmimo, t[11:14]), narrowed(dbias, t.dt_bias),
        dentry, dstart,
    )  # fmt: skip
    return [t.x.new_empty(0) if g is None else g for g in given]


def _of_final(
    k: Sizes,
    made: Prepared,
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
    slots = slots_of(k, made.pairwise)
    dfinal = None if dstate is None else spread(k, dstate, slots)
    if k.angles:
        extra = slots.new_zeros(k.rows, k.heads, k.width, dtype=torch.float32)
        if dangle is not None:
            extra[..., : k.angles] = dangle.float()
        if dfinal is not None:
            assert state is not None
            a, b, _ = spread(k, state, slots).split([k.width, k.width, k.rest], dim=-1)
            da, db, _ = dfinal.split([k.width, k.width, k.rest], dim=-1)
            extra[..., : k.angles] += (a * db - b * da).sum(dim=2)[..., : k.angles]
            if made.before is not None:
                dfinal = turned(k, dfinal, made.before, 1)
    return dfinal, extra


def _states_of_chunks(
    k: Sizes,
    t: Inputs,
    made: Prepared,
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
