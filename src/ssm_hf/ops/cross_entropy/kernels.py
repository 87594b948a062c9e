"""Triton kernels of the cross-entropy."""

import triton
import triton.language as tl

# Below every logit that is not -inf, and finite: differences with it are never NaN.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, stride, vocabulary, ignore_index,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Loss of one token a program; its logits become their gradient.

    Rows are `stride` apart and at least as wide as the vocabulary. What lies behind it is read and
    written too, without effect: a vocabulary that is no multiple of 16 would be read element by
    element. The second pass finds a row in the L2 cache if the programs that run at a time are few:
    large ones.
    """
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * stride
    target = tl.load(targets_ptr + token)
    column = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(losses_ptr + token, 0.0)
        if GRADIENT:
            zero = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
            for start in range(0, vocabulary, BLOCK):
                tl.store(row_ptr + start + column, zero, mask=start + column < stride)
    else:
        # Every lane has a maximum and a sum of its own, so that the loop waits for no other one.
        high = tl.full((BLOCK,), _LOWEST, tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
            at = start + column
            logits = tl.load(row_ptr + at, mask=at < stride, other=0.0).to(tl.float32)
            logits = tl.where(at < vocabulary, logits, -float("inf"))
            # The old sum's factor and the new term: one of the two is 1, the other one `small`.
            above = logits - high
            small = tl.exp(-tl.abs(above))
            sums = tl.where(above > 0, sums * small + 1.0, sums + small)
            high = tl.maximum(high, logits)
        highest = tl.max(high, axis=0)
        total = tl.sum(sums * tl.exp(high - highest), axis=0)
        normaliser = highest + tl.log(total)
        there = (target >= 0) & (target < vocabulary)
        logit = tl.load(row_ptr + target, mask=there, other=float("nan")).to(tl.float32)
        tl.store(losses_ptr + token, normaliser - logit)
        if GRADIENT:
            for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
                at = start + column
                logits = tl.load(row_ptr + at, mask=at < stride, other=0.0).to(tl.float32)
                logits = tl.where(at < vocabulary, logits, -float("inf"))
                grad = tl.exp(logits - normaliser) - tl.where(at == target, 1.0, 0.0)
                tl.store(row_ptr + at, grad, mask=at < stride)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, count_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = x * factor, 0 where nothing was counted."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr).to(tl.float32)
    factor = tl.where(tl.load(count_ptr) > 0, factor, 0.0)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, x * factor, mask=at < size)
