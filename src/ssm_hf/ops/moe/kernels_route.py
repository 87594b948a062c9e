"""Triton kernels of the router: scores, the choice of k experts, weights, and their gradients."""

import triton
import triton.language as tl

# Added to a sum of sigmoid scores before it divides them.
_EPSILON = tl.constexpr(1e-20)


@triton.jit
def _scores(logits_ptr, row, inside, experts, e, SIGMOID: tl.constexpr):
    """Logits in fp32, (ROWS, BLOCK_E), and what weights are made of: sigmoids, or themselves."""
    at = row[:, None] * experts + e[None, :]
    real = inside[:, None] & (e < experts)[None, :]
    logits = tl.load(logits_ptr + at, mask=real, other=0.0).to(tl.float32)
    return logits, tl.sigmoid(logits) if SIGMOID else logits


@triton.jit
def _best(choice, taken, e, NONE: tl.constexpr):
    """Number of the largest choice that is not taken, the lowest of equals; NONE where none is."""
    left = tl.where(taken > 0, -float("inf"), choice)
    highest = tl.max(left, axis=1)[:, None]
    return tl.min(tl.where((left == highest) & (taken == 0), e[None, :], NONE), axis=1)


@triton.jit
def _grouped(
    choice, e, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """1 at experts outside the TOP_GROUPS groups whose two best choices sum highest, else 0."""
    members: tl.constexpr = EXPERTS // GROUPS
    group = e // members
    g = tl.arange(0, BLOCK_G)
    sums = tl.zeros((choice.shape[0], BLOCK_G), tl.float32)
    for i in tl.static_range(GROUPS):
        outside = ((group != i) | (e >= EXPERTS)).to(tl.int32)[None, :]
        outside = outside + tl.zeros_like(choice).to(tl.int32)
        first = _best(choice, outside, e, BLOCK_E)
        chosen = e[None, :] == first[:, None]
        total = tl.sum(tl.where(chosen, choice, 0.0), axis=1)
        if members > 1:
            second = _best(choice, outside + chosen.to(tl.int32), e, BLOCK_E)
            total += tl.sum(tl.where(e[None, :] == second[:, None], choice, 0.0), axis=1)
        sums = tl.where(g[None, :] == i, total[:, None], sums)
    left = (g >= GROUPS).to(tl.int32)[None, :] + tl.zeros_like(sums).to(tl.int32)
    kept = tl.zeros_like(choice).to(tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = _best(sums, left, g, BLOCK_G)
        left += (g[None, :] == best[:, None]).to(tl.int32)
        kept += (group[None, :] == best[:, None]).to(tl.int32)
    return (kept == 0).to(tl.int32)


@triton.jit
def moe_route_kernel(
    logits_ptr, bias_ptr, mask_ptr, weights_ptr, experts_ptr, tokens, scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """weights and experts (N, TOP_K) of logits (N, EXPERTS), ROWS tokens a program."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    inside = row < tokens
    logits, scores = _scores(logits_ptr, row, inside, EXPERTS, e, SIGMOID)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + e, mask=e < EXPERTS, other=0.0).to(tl.float32)[None, :]
    taken = (e >= EXPERTS).to(tl.int32)[None, :] + tl.zeros_like(choice).to(tl.int32)
    if TOP_GROUPS < GROUPS:
        taken += _grouped(choice, e, EXPERTS, GROUPS, TOP_GROUPS, BLOCK_E, BLOCK_G)
    experts = tl.zeros((ROWS, BLOCK_K), tl.int32)
    weights = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for i in tl.static_range(TOP_K):
        # Only NaN equals nothing; the weights say so below.
        best = tl.minimum(_best(choice, taken, e, BLOCK_E), EXPERTS - 1)
        chosen = e[None, :] == best[:, None]
        score = tl.sum(tl.where(chosen, scores, 0.0), axis=1)
        experts = tl.where(k[None, :] == i, best[:, None], experts)
        weights = tl.where(k[None, :] == i, score[:, None], weights)
        taken += chosen.to(tl.int32)
    if SIGMOID:
        if RENORMALISE:
            weights /= tl.sum(weights, axis=1)[:, None] + _EPSILON
    else:
        if RENORMALISE:
            among = tl.where((k < TOP_K)[None, :], weights, -float("inf"))
        else:
            among = tl.where((e < EXPERTS)[None, :], logits, -float("inf"))
        highest = tl.max(among, axis=1)[:, None]
        weights = tl.exp(weights - highest) / tl.sum(tl.exp(among - highest), axis=1)[:, None]
    unknown = tl.sum((logits != logits).to(tl.int32), axis=1) > 0
    weights = tl.where(unknown[:, None], float("nan"), weights * scale)
    if HAS_MASK:
        real = tl.load(mask_ptr + row, mask=inside, other=0) != 0
        weights = tl.where(real[:, None], weights, 0.0)
        experts = tl.where(real[:, None], experts, EXPERTS)
    at = row[:, None] * TOP_K + k[None, :]
    stored = inside[:, None] & (k < TOP_K)[None, :]
    tl.store(weights_ptr + at, weights, mask=stored)
    tl.store(experts_ptr + at, experts.to(tl.int64), mask=stored)


@triton.jit
def moe_route_bwd_kernel(
    dweights_ptr, logits_ptr, experts_ptr, dlogits_ptr, tokens, scale,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dlogits (N, EXPERTS); pads, of expert EXPERTS, get 0."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    inside = row < tokens
    logits, scores = _scores(logits_ptr, row, inside, EXPERTS, e, SIGMOID)
    chosen = tl.zeros((ROWS, BLOCK_E), tl.int32)
    grad = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for i in tl.static_range(TOP_K):
        expert = tl.load(experts_ptr + row * TOP_K + i, mask=inside, other=EXPERTS)
        dweight = tl.load(dweights_ptr + row * TOP_K + i, mask=inside, other=0.0).to(tl.float32)
        here = (e[None, :] == expert[:, None]) & (e < EXPERTS)[None, :]
        chosen += here.to(tl.int32)
        grad = tl.where(here, dweight[:, None] * scale, grad)
    if SIGMOID:
        if RENORMALISE:
            among = tl.where(chosen > 0, scores, 0.0)
            total = tl.sum(among, axis=1)[:, None] + _EPSILON
            mean = tl.sum(grad * among, axis=1)[:, None] / total
            grad = tl.where(chosen > 0, (grad - mean) / total, 0.0)
        grad *= scores * (1.0 - scores)
    else:
        if RENORMALISE:
            among = tl.where(chosen > 0, logits, -float("inf"))
        else:
            among = tl.where((e < EXPERTS)[None, :], logits, -float("inf"))
        highest = tl.maximum(tl.max(among, axis=1), -3.0e38)[:, None]
        p = tl.exp(among - highest)
        p /= tl.maximum(tl.sum(p, axis=1), 1.0e-38)[:, None]
        grad = p * (grad - tl.sum(grad * p, axis=1)[:, None])
        any_chosen = tl.sum(chosen, axis=1) > 0
        grad = tl.where(any_chosen[:, None], grad, 0.0)
    at = row[:, None] * EXPERTS + e[None, :]
    tl.store(dlogits_ptr + at, grad, mask=inside[:, None] & (e < EXPERTS)[None, :])
