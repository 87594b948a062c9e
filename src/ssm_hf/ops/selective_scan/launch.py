"""The selective scan's kernels as torch operators: launches, shapes for tracing, gradients."""

import math
from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops import launch as common
from ssm_hf.ops.dispatch import keeps_activations
from ssm_hf.ops.launch import (
    KERNEL_DTYPES,
    call,
    check_tensors,
    on_device,
    processors,
    tuned,
    unsupported_dtypes,
)
from ssm_hf.ops.packing import document_numbers
from ssm_hf.ops.selective_scan.kernels import (
    selective_scan_carry_kernel,
    selective_scan_fwd_kernel,
)
from ssm_hf.ops.selective_scan.kernels_bwd import (
    selective_scan_bwd_kernel,
    selective_scan_sum_kernel,
)

# Triton's annotations do not know that plain values may stand for constants.
_fwd_kernel: Any = selective_scan_fwd_kernel
_carry_kernel: Any = selective_scan_carry_kernel
_bwd_kernel: Any = selective_scan_bwd_kernel
_sum_kernel: Any = selective_scan_sum_kernel

LARGEST_STATE = 256
CHUNK = 64  # tokens between two saved states
LARGEST_KEPT_STATE = 16


def why_unsupported(A: Tensor, *others: Tensor | None) -> str | None:
    """Reason why the kernels cannot take these tensors; None when they can."""
    if A.shape[1] > LARGEST_STATE:
        return f"its kernels take state sizes up to {LARGEST_STATE}, got N={A.shape[1]}"
    return unsupported_dtypes(A, *others)


def _options(kernel: str, rows: int, x: Tensor, states: int) -> dict[str, Any]:
    """Launch options and block sizes, for "few" or "many" channels to a multiprocessor, or "wide"
    channels of more than 32 states.

    STATES is what a program owns at N = 16. With more states a program has more warps, up to 8, and
    only then fewer channels: the shares of B's gradient are as many as there are channel blocks.
    """
    channels = x.shape[2]
    a_processor = rows * channels // processors(x.device)
    size = "few" if a_processor < 24 else "many" if a_processor >= 192 else "default"
    if states > 32:
        size = "wide"
    options: dict[str, Any] = dict(tuned(kernel, size, x.device))
    owned = options.pop("STATES")
    a_warp = owned // options["num_warps"]
    block_n = 1 << (states - 1).bit_length()
    block_e = max(owned // 16, a_warp // block_n)
    warps = min(max(block_e * block_n // a_warp, 1), 8)
    block_e = max(min(warps * a_warp // block_n, 1 << (channels - 1).bit_length()), 1)
    warps = max(block_e * block_n // a_warp, 1)
    # Instructions of NVIDIA's GPUs; with them ptxas orders the rest worse for wide channels.
    fast = size != "wide" and common.architecture(x.device).startswith("sm")
    return {**options, "BLOCK_N": block_n, "BLOCK_E": block_e, "FAST": fast, "num_warps": warps}


def _rows(*tensors: Tensor | None) -> list[Any]:
    """Tensors whose last axis is contiguous; views of a wide projection stay as they are."""
    return [v if v is None or v.stride(-1) == 1 else v.contiguous() for v in tensors]


def _flat(*tensors: Tensor | None) -> list[Any]:
    return [None if v is None else v.contiguous() for v in tensors]


def _strides(*tensors: Tensor | None) -> list[int]:
    return [s for v in tensors for s in ((0, 0) if v is None else v.stride()[:2])]


def _number_of_rows(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Sequences with a state of their own."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _every(x: Tensor, A: Tensor, keep: bool) -> int:
    """Tokens between two saved states: with `keep` a tile of the backward pass, which then needs
    not form them again, as long as they take no more room than four activations of 16 bits."""
    if keep and x.dtype == torch.bfloat16 and A.shape[1] <= LARGEST_KEPT_STATE:
        return tuned("selective_scan_bwd", "default", x.device)["BLOCK_T"]
    return CHUNK


def _outputs(
    x: Tensor, A: Tensor, cu_seqlens: Tensor | None, save: bool, keep: bool, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, final state, and room for the state before every chunk of tokens (with `keep` before every
    tile, in x's dtype) and for y before the gate, if wanted."""
    batch, length, inner = x.shape
    rows, places, every = _number_of_rows(x, cu_seqlens), 0, _every(x, A, keep)
    if save:
        places = batch * -(-length // every) if cu_seqlens is None else length // every + rows
    final = x.new_empty(rows, inner, A.shape[1], dtype=torch.float32)
    dtype = torch.float32 if every == CHUNK else x.dtype
    saved = x.new_empty(places, inner, A.shape[1], dtype=dtype)
    ungated = x.new_empty(x.shape if save and gated else 0)
    return x.new_empty(x.shape), final, saved, ungated


def _segments(rows: int, x: Tensor, warps: int, full: int, fill: int) -> int:
    """Pieces to cut every row into, so that a small batch of long rows fills the GPU.

    Segments cost a pass of their own, so there are none where `full` warps for each multiprocessor
    are at work already; else there are as many as make it `fill` warps.
    """
    if warps >= full * processors(x.device):
        return 1
    length = x.shape[0] * x.shape[1] // rows
    return max(1, min(-(-fill * processors(x.device) // warps), length // (4 * CHUNK)))


def _plan(
    kernel: str, x: Tensor, states: int, cu_seqlens: Tensor | None
) -> tuple[int, int, int, dict[str, Any]]:
    """Rows, segments of a row, blocks of channels, and the launch options that make them so."""
    rows = _number_of_rows(x, cu_seqlens)
    options = _options(kernel, rows, x, states)
    full, fill = options.pop("FULL"), options.pop("FILL")
    blocks = -(-x.shape[2] // options["BLOCK_E"])
    segments = _segments(rows, x, rows * blocks * options["num_warps"], full, fill)
    return rows, segments, blocks, options


def _carries(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    W: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    packing: list[Tensor | None],
    rows: int,
    segments: int,
    limits: dict[str, Any],
    reverse: bool,
) -> Tensor | None:
    """What each segment of a row hands on (rows, segments, 2, I, N); None where there is but one.

    Arguments as `selective_scan_carry_kernel` takes them.
    """
    if segments == 1:
        return None
    inner, states = A.shape
    options = _options("selective_scan_carry", rows, v, states)
    carry = A.new_empty(rows, segments, 2, inner, states, dtype=torch.float32)
    _carry_kernel[(rows * (segments - 1) * -(-inner // options["BLOCK_E"]),)](
        v,
        dt,
        A,
        W,
        z,
        dt_bias,
        *packing,
        carry,
        *_strides(v, dt, W, z),
        v.shape[1],
        inner,
        states,
        segments,
        **limits,
        REVERSE=reverse,
        CHUNK=CHUNK,
        **options,
    )
    return carry


def _limits(dt_softplus: bool, lowest: float, highest: float) -> dict[str, Any]:
    clamp = lowest > 0 or not math.isinf(highest)
    return {"lowest": lowest, "highest": highest, "SOFTPLUS": dt_softplus, "CLAMP": clamp}


@torch.library.custom_op("ssm_hf::selective_scan_fwd", mutates_args=())
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
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    dt_softplus: bool,
    lowest: float,
    highest: float,
    save: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y, final state (rows, I, N) and, with `save`, the states that `_outputs` makes room for
    and y before the gate, if there is one."""
    y, final, saved, ungated = _outputs(x, A, cu_seqlens, save, keep, z is not None)
    inner, states = A.shape
    rows, segments, blocks, options = _plan("selective_scan_fwd", x, states, cu_seqlens)
    limits = _limits(dt_softplus, lowest, highest)
    x, dt, B, C, z = _rows(x, dt, B, C, z)
    A, D, dt_bias, initial_state = _flat(A, D, dt_bias, initial_state)
    packing = _flat(seq_idx, cu_seqlens, mask)
    with on_device(x):
        carry = _carries(x, dt, A, B, None, dt_bias, packing, rows, segments, limits, False)
        _fwd_kernel[(rows * segments * blocks,)](
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            initial_state,
            *packing,
            carry,
            y,
            final,
            saved if save else None,
            ungated if save and z is not None else None,
            *_strides(x, dt, B, C, z),
            x.shape[1],
            inner,
            states,
            segments,
            **limits,
            CHUNK=CHUNK,
            EVERY=_every(x, A, keep),
            **options,
        )
    return y, final, saved, ungated


@_forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, cu_seqlens, mask, dt_softplus, lowest,
      highest, save, keep):  # pyright: ignore  # fmt: skip
    return _outputs(x, A, cu_seqlens, save, keep, z is not None)


@torch.library.custom_op("ssm_hf::selective_scan_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    ungated: Tensor,
    dt_softplus: bool,
    lowest: float,
    highest: float,
) -> list[Tensor]:
    """-> gradients of x, dt, A, B, C, D, z, dt_bias and initial_state; empty where None came in."""
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    grads = [x.new_empty(0) if v is None else v.new_empty(v.shape) for v in given]
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = grads
    gradients_into(
        dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial, dy, dfinal, *given, seq_idx, cu_seqlens, mask,
        saved, ungated, dt_softplus, lowest, highest,
    )  # fmt: skip
    return grads


def gradients_into(
    dx: Tensor,
    ddt: Tensor,
    dA: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor,
    dz: Tensor,
    dbias: Tensor,
    dinitial: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    ungated: Tensor,
    dt_softplus: bool,
    lowest: float,
    highest: float,
    y: Tensor | None = None,
) -> None:
    """Write the gradients, where there is something that they belong to, and into `y`, if given
    with z, what the forward pass gave.

    dB and dC may have any strides of batch and time, dz may be some of the columns of a contiguous
    tensor; the others are contiguous.
    """
    batch, length, inner = x.shape
    states = A.shape[1]
    rows, segments, blocks, options = _plan("selective_scan_bwd", x, states, cu_seqlens)
    limits = _limits(dt_softplus, lowest, highest)
    dy, x, dt, B, C, z = _rows(dy, x, dt, B, C, z)
    A, D, dt_bias, dfinal = _flat(A, D, dt_bias, dfinal)
    packing = _flat(seq_idx, cu_seqlens, mask)
    programs = rows * segments * blocks
    wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    # Shares of 16-bit gradients have 16 bits: half the traffic, one rounding more than the sum's.
    dB_shares, dC_shares = (v.new_empty(blocks, batch, length, states) for v in (B, C))
    dA_shares = torch.empty(rows * segments, inner, states, **wide)
    dD_shares, dbias_shares = (
        None if v is None else torch.empty(rows * segments, inner, **wide) for v in (D, dt_bias)
    )
    has_initial = initial_state is not None
    every, tiles = CHUNK, CHUNK // options["BLOCK_T"]
    if saved.dtype != torch.float32:
        every, tiles = options["BLOCK_T"], 0
    scratch = torch.empty(programs, tiles, options["BLOCK_E"], options["BLOCK_N"], **wide)
    with on_device(x):
        carry = _carries(dy, dt, A, C, z, dt_bias, packing, rows, segments, limits, True)
        _bwd_kernel[(programs,)](
            dy,
            dfinal,
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            *packing,
            saved,
            None if z is None else ungated,
            carry,
            scratch,
            dx,
            ddt,
            None if z is None else dz,
            None if z is None else y,
            dB_shares,
            dC_shares,
            dA_shares,
            dD_shares,
            dbias_shares,
            dinitial if has_initial else None,
            *_strides(dy, x, dt, B, C, z),
            0 if z is None else dz.stride(1),
            batch * length,
            length,
            inner,
            states,
            segments,
            **limits,
            CHUNK=CHUNK,
            EVERY=every,
            **options,
        )
        _add_up(
            (dB_shares, dC_shares, dA_shares, dD_shares, dbias_shares),
            (dB, dC, dA, dD, dbias),
        )


def _add_up(
    shares: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], sums: tuple[Tensor, ...]
) -> None:
    """Sums of B's, C's, A's, D's and the bias's gradient over the first dimension."""
    dB, dC, dA, dD, dbias = sums
    tokens, (inner, states) = dB.shape[0] * dB.shape[1], dA.shape
    options = dict(tuned("selective_scan_sum", "default", dB.device))
    block_n = 1 << (states - 1).bit_length()
    a_program = max(options.pop("TILE") // block_n, 1)
    _sum_kernel[(-(-max(tokens, inner) // a_program), 4)](
        *shares,
        dB,
        dC,
        dA,
        *(None if of is None else v for of, v in zip(shares[3:], (dD, dbias), strict=True)),
        *_strides(dB, dC),
        tokens,
        dB.shape[1],
        inner,
        states,
        len(shares[0]),
        len(shares[2]),
        ROWS=a_program,
        BLOCK_N=block_n,
        **options,
    )


@_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, cu_seqlens, mask, saved,
      ungated, dt_softplus, lowest, highest):  # pyright: ignore  # fmt: skip
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return [x.new_empty(0) if v is None else v.new_empty(v.shape) for v in inputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.dt_softplus, ctx.lowest, ctx.highest, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(
    ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, saved, ungated = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    grads = torch.ops.ssm_hf.selective_scan_bwd(
        dy, dfinal, *inputs, saved, ungated, ctx.dt_softplus, ctx.lowest, ctx.highest
    )
    given = [None if v is None else g for v, g in zip(inputs[:9], grads, strict=True)]
    return *given, *(None,) * 8


_forward.register_autograd(_gradients, setup_context=_setup)


def selective_scan_triton(
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
) -> tuple[Tensor, Tensor]:
    """The scan on a GPU: y in x's dtype and the final state in fp32; see `selective_scan`."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    check_tensors(
        "selective_scan",
        KERNEL_DTYPES,
        **dict(zip(names, inputs, strict=True)),
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        mask=mask,
    )
    if seq_idx is not None and mask is not None:
        # Between two tokens of a document there may be pads with any number.
        seq_idx = document_numbers(seq_idx, mask)
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    lowest, highest = dt_limit
    y, state, *_ = call(
        _forward,
        *inputs,
        seq_idx,
        cu_seqlens,
        mask,
        dt_softplus,
        float(lowest),
        float(highest),
        save,
        keeps_activations(),
    )
    return y, state
