"""Padding and packing facts shared by every scan and convolution.

All torch paths work on one canonical form: `doc` (B, T), the number of the document that a token
belongs to, counted from 0 within its row (pads carry the number of the real token before them), and
`mask` (B, T), True at real tokens. Document 0 of a row is the one that continues `initial_state`.
"""

import functools
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_State = TypeVar("_State", bound=Tensor | tuple[Tensor, ...])


def in_given_precision(
    op: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """Keep autocast out of an operator: it chooses its own precision by `compute_dtype`.

    Autocast would turn single products inside into bf16, and the gradients of decays, which are
    differences that cancel, would lose most of their digits.
    """

    @functools.wraps(op)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        values = (*args, *kwargs.values())
        device = next(v for v in values if isinstance(v, Tensor)).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return run


def backward_in_given_precision(
    backward: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """`in_given_precision` for the backward pass of an autograd function.

    A compiler looks at it where autocast is off, inside the operator, and traces it later in the
    autocast around the model: autocast has to be switched off in so many words.
    """

    @functools.wraps(backward)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        device = next(v for v in args if isinstance(v, Tensor)).device.type
        if device == "meta":
            return backward(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return backward(*args, **kwargs)

    return run


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Widest dtype of the inputs, but at least fp32: states and accumulation never go lower."""
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def host_may_read(values: Tensor) -> bool:
    """Whether the host may look at values and choose by them what to run.

    On a CPU that costs nothing. On a GPU the host would wait for everything launched before: a
    training step does not, it keeps masks of ones and leaves checks to the device (`check_later`);
    inference may wait once a call. What is being traced or captured has no values yet.
    """
    if torch.compiler.is_compiling():
        return False
    if values.device.type == "cpu":
        return True
    return not (torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing())


def check_later(holds: Tensor, message: str) -> None:
    """Stop the program with `message` where `holds` () is False, without making the host wait.

    What is traced goes unchecked, and so does a device that has no such assertion.
    """
    if not torch.compiler.is_compiling() and holds.device.type == "cuda":
        torch._assert_async(holds, message)  # pyright: ignore[reportPrivateImportUsage]


def check_packing(
    batch: int,
    length: int,
    initial_state: Tensor | None,
    state_shape: tuple[int, ...],
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raise `ValueError` where the packing arguments do not fit (B, T) inputs or one another.

    `state_shape` is the shape of one state, without the batch (or document) dimension.
    """
    if length < 1:
        raise ValueError(f"the sequence is empty: expected T >= 1, got T={length}")
    if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be a bool tensor of shape {(batch, length)} (True = real token), "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("seq_idx and cu_seqlens were both given: pass one of them")
    if seq_idx is not None and (
        seq_idx.shape != (batch, length) or seq_idx.is_floating_point() or seq_idx.is_complex()
    ):
        raise ValueError(
            f"seq_idx must be an integer tensor of shape {(batch, length)}, "
            f"got {seq_idx.dtype} of shape {tuple(seq_idx.shape)}"
        )
    states = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        states = cu_seqlens.numel() - 1
    if initial_state is not None and initial_state.shape != (states, *state_shape):
        raise ValueError(
            f"initial_state must have shape {(states, *state_shape)}, "
            f"got {tuple(initial_state.shape)}"
        )


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raise `ValueError` unless `cu_seqlens` runs from 0 to T without falling, for one row."""
    if batch != 1:
        raise ValueError(f"cu_seqlens needs all documents in one row: expected B=1, got B={batch}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens must be a 1-D integer tensor of at least 2 offsets, "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if not host_may_read(cu_seqlens):
        ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length)
        rising = (cu_seqlens.diff() >= 0).all()
        check_later(ends & rising, f"cu_seqlens must rise from 0 to the row's length {length}")
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the row's length {length}, got {offsets[:8]}"
            f"{'...' if len(offsets) > 8 else ''} ending in {offsets[-1]}"
        )


def previous_real(mask: Tensor) -> Tensor:
    """Index (B, T) of the last real token strictly before each position; -1 where there is none."""
    position = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    last = torch.where(mask, position, -1).cummax(dim=1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)


def next_real(mask: Tensor) -> Tensor:
    """Index (B, T) of the first real token strictly after each position; T where there is none."""
    return mask.shape[1] - 1 - previous_real(mask.flip(1)).flip(1)


def document_numbers(seq_idx: Tensor, mask: Tensor | None) -> Tensor:
    """Canonical document numbers (B, T) int64: a real token starts a new document where its
    `seq_idx` differs from that of the real token before it; the row's first one starts none.
    """
    if mask is None:
        new = seq_idx[:, 1:] != seq_idx[:, :-1]
        return torch.nn.functional.pad(new, (1, 0)).cumsum(dim=1)
    previous = previous_real(mask)
    differs = seq_idx != seq_idx.gather(1, previous.clamp(min=0))
    return (mask & (previous >= 0) & differs).cumsum(dim=1)


def document_starts(doc: Tensor) -> Tensor:
    """True (B, T) at tokens whose state before them is dropped."""
    return torch.nn.functional.pad(doc[:, 1:] != doc[:, :-1], (1, 0))


def _each(change: Callable[..., Any], *states: _State) -> _State:
    """`change` of the tensors of states, which are a tensor or a named tuple of tensors each."""
    kind: Any = type(states[0])
    return change(*states) if isinstance(states[0], Tensor) else kind(*map(change, *states))


def run_per_document(
    run: Callable[..., tuple[Tensor, _State]],
    sequences: Mapping[str, Tensor | None],
    cu_seqlens: Tensor,
    initial_state: _State | None,
    mask: Tensor | None,
) -> tuple[Tensor, _State]:
    """Run an operator on each document of one packed row, with a state per document.

    Documents of similar length (within a factor of two) run together as one right-padded batch, so
    at most log2(T) calls are made and at most half of their tokens are padding.

    Args:
        run: `run(**sequences, initial_state=, mask=) -> (y, final_state)` over a padded batch.
        sequences: inputs with a time dimension, (1, T, ...) each; None is passed through.
        cu_seqlens: (n + 1,) document offsets.
        initial_state: (n, ...), or a named tuple of such tensors, or None.
        mask: (1, T) or None.

    Returns:
        y (1, T, ...) and final states (n, ...).
    """
    offsets = cu_seqlens.tolist()
    device = cu_seqlens.device
    buckets: dict[int, list[int]] = {}
    for document, (start, end) in enumerate(pairwise(offsets)):
        buckets.setdefault((end - start).bit_length(), []).append(document)

    outputs: list[Tensor] = []
    positions: list[Tensor] = []
    states: list[_State] = []
    order: list[int] = []
    for documents in buckets.values():
        starts = torch.tensor([offsets[d] for d in documents], device=device)
        lengths = torch.tensor([offsets[d + 1] - offsets[d] for d in documents], device=device)
        # An empty document still needs one (masked) token, so that its state passes through.
        step = torch.arange(max(int(lengths.max()), 1), device=device)
        index = (starts[:, None] + step).clamp(max=offsets[-1] - 1)
        real = step < lengths[:, None]
        y, state = run(
            **{name: None if s is None else s[0][index] for name, s in sequences.items()},
            initial_state=None
            if initial_state is None
            else _each(lambda s, rows=documents: s[rows], initial_state),
            mask=real if mask is None else real & mask[0][index],
        )
        outputs.append(y[real])
        positions.append(index[real])
        states.append(state)
        order += documents
    y = torch.cat(outputs)[torch.argsort(torch.cat(positions))]
    back = torch.argsort(torch.tensor(order, device=device))
    return y[None], _each(lambda *parts: torch.cat(parts)[back], *states)
