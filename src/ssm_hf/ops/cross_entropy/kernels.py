"""Triton kernels of the cross-entropy."""

import triton
import triton.language as tl

# Below every logit that is not -inf, and finite: differences with it are never NaN.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _highest_and_sum(
    row_ptr, first, last, stride, vocabulary, highest, total, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Goes on with the running maximum and the sum of exp(logit - maximum) over some columns."""
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if TAIL:
            logits = tl.load(row_ptr + at, mask=at < stride, other=0.0).to(tl.float32)
            logits = tl.where(at < vocabulary, logits, -float("inf"))
        else:
            logits = tl.load(row_ptr + at).to(tl.float32)
        new = tl.maximum(highest, tl.max(logits, axis=0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(logits - new), axis=0)
        highest = new
    return highest, total


@triton.jit
def _to_gradients(
    row_ptr, first, last, stride, vocabulary, normaliser, target, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """exp(logit - normaliser), less 1 at the target, in place."""
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if TAIL:
            logits = tl.load(row_ptr + at, mask=at < stride, other=0.0).to(tl.float32)
            logits = tl.where(at < vocabulary, logits, -float("inf"))
        else:
            logits = tl.load(row_ptr + at).to(tl.float32)
        grad = tl.exp(logits - normaliser) - tl.where(at == target, 1.0, 0.0)
        if TAIL:
            tl.store(row_ptr + at, grad, mask=at < stride)
        else:
            tl.store(row_ptr + at, grad)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, stride, vocabulary, ignore_index,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Loss of one token a program; its logits become their gradient.

    Rows are `stride` apart and at least as wide as the vocabulary. What lies behind it is read and
    written too, without effect: a vocabulary that is no multiple of 16 would be read element by
    element. What is left of whole BLOCKs goes in blocks of TAIL. The second pass finds a row in the
    L2 cache if the programs that run at a time are few: large ones.
    """
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * stride
    target = tl.load(targets_ptr + token)
    whole = vocabulary // BLOCK * BLOCK
    if target == ignore_index:
        tl.store(losses_ptr + token, 0.0)
        if GRADIENT:
            zero = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
            for start in range(0, vocabulary, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(row_ptr + at, zero, mask=at < stride)
    else:
        highest = tl.full((), _LOWEST, tl.float32)
        total = tl.zeros((), tl.float32)
        highest, total = _highest_and_sum(
            row_ptr, 0, whole, stride, vocabulary, highest, total, BLOCK, False
        )
        highest, total = _highest_and_sum(
            row_ptr, whole, vocabulary, stride, vocabulary, highest, total, TAIL, True
        )
        normaliser = highest + tl.log(total)
        there = (target >= 0) & (target < vocabulary)
        logit = tl.load(row_ptr + target, mask=there, other=float("nan")).to(tl.float32)
        tl.store(losses_ptr + token, normaliser - logit)
        if GRADIENT:
            column = target.to(tl.int32)
            _to_gradients(row_ptr, 0, whole, stride, vocabulary, normaliser, column, BLOCK, False)
            _to_gradients(
                row_ptr, whole, vocabulary, stride, vocabulary, normaliser, column, TAIL, True
            )


@triton.jit
def scale_kernel(x_ptr, factor_ptr, count_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = x * factor, 0 where nothing was counted."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr).to(tl.float32)
    factor = tl.where(tl.load(count_ptr) > 0, factor, 0.0)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, x * factor, mask=at < size)
