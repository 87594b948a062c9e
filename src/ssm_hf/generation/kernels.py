"""Triton kernels that choose the next tokens: scores, truncation and draw, and what is noted."""

import triton
import triton.language as tl

from ssm_hf.ops.kernels_overlap import wait_for_previous

# As many scores are compared with each other, in place of 32 halvings of an interval.
FEW = tl.constexpr(128)


@triton.jit
def ordered(score):
    """fp32 -> uint32 in the same order."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def scores_kernel(
    logits_ptr, noise_ptr, seen_ptr, suppressed_ptr, count_ptr, least_ptr, reals_ptr,
    scores_ptr, best_ptr, at_ptr,
    stride_logits, vocabulary, blocks,
    PENALTY: tl.constexpr,
    SUPPRESS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    DRAW: tl.constexpr,  # draw from all tokens; else the largest score, which a cut needs too
    KEEP: tl.constexpr,  # write the scores down for a cut
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: a part of one row. Leaves its best token, NaN where none can be drawn."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    score = tl.load(logits_ptr + row * stride_logits + token, mask=inside, other=float("-inf"))
    score = score.to(tl.float32)
    at = row * vocabulary + token
    if PENALTY:
        seen = tl.load(seen_ptr + at, mask=inside, other=0) != 0
        factor = tl.where(score < 0, tl.load(reals_ptr), tl.load(reals_ptr + 1))
        score = tl.where(seen, score * factor, score)
    if SUPPRESS:
        early = tl.load(count_ptr) < tl.load(least_ptr)
        suppressed = tl.load(suppressed_ptr + token, mask=inside, other=0) != 0
        score = tl.where(suppressed & early, float("-inf"), score)
    if TEMPERATURE:
        score *= tl.load(reals_ptr + 2)
    if KEEP:
        tl.store(scores_ptr + at, score, mask=inside)
    broken = tl.sum(((score != score) | (score == float("inf"))).to(tl.int32)) > 0
    if DRAW:
        # The largest p / q with q exponential, in logarithms.
        score -= tl.log(tl.load(noise_ptr + at, mask=inside, other=1.0))
    score = tl.where(score != score, float("inf"), score)
    best, place = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_ptr + row * blocks + part, tl.where(broken, float("nan"), best))
    tl.store(at_ptr + row * blocks + part, part * BLOCK + place)


@triton.jit
def mass_above(score_ptr, size, threshold, largest, BLOCK: tl.constexpr):
    """Sum of exp(score - largest) over the scores whose order is above the threshold."""
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        score = tl.load(score_ptr + i, mask=i < size, other=float("-inf"))
        above = (i < size) & (ordered(score) > threshold)
        mass += tl.where(above, tl.exp(score - largest), 0.0)
    return tl.sum(mass)


@triton.jit
def least_within(score_ptr, size, wanted, largest, FEW: tl.constexpr):
    """Order of the least of at most FEW scores that have less than the wanted mass above them."""
    i = tl.arange(0, FEW)
    score = tl.load(score_ptr + i, mask=i < size, other=float("-inf"))
    other = tl.load(score_ptr + i[None, :], mask=i[None, :] < size, other=float("-inf"))
    above = ordered(other) > ordered(score)[:, None]
    mass = tl.sum(tl.where(above, tl.exp(other - largest), 0.0), axis=1)
    within = tl.where((i < size) & (mass < wanted), ordered(score), 0xFFFFFFFF)
    return tl.minimum(tl.min(within), ordered(largest))


@triton.jit
def least_of_best(best_ptr, blocks, wanted, BLOCK_PARTS: tl.constexpr):
    """Order of the wanted-th largest of a row's parts' best scores; 0 where there are fewer."""
    part = tl.arange(0, BLOCK_PARTS)
    best = tl.load(best_ptr + part, mask=part < blocks, other=float("-inf"))
    other = tl.load(best_ptr + part[None, :], mask=part[None, :] < blocks, other=float("-inf"))
    greater = tl.sum((ordered(other) > ordered(best)[:, None]).to(tl.int32), axis=1)
    reached = tl.where((part < blocks) & (greater < wanted), ordered(best), 0xFFFFFFFF)
    return tl.where(wanted <= blocks, tl.min(reached), 0)


@triton.jit
def cut_kernel(
    scores_ptr, noise_ptr, best_ptr, at_ptr, reals_ptr, top_k_ptr, kept_ptr, index_ptr,
    vocabulary, blocks,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: one row. Finds what top-k, top-p and min-p leave, and draws from it."""
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    scores = scores_ptr + row * vocabulary
    part = tl.arange(0, BLOCK_PARTS)
    bests = tl.load(best_ptr + row * blocks + part, mask=part < blocks, other=float("-inf"))
    largest = tl.max(bests, axis=0)
    broken = tl.sum((bests != bests).to(tl.int32)) > 0
    size = vocabulary + 0
    kept = scores

    if TOP_K:
        left = tl.minimum(tl.load(top_k_ptr), vocabulary)
        kept = kept_ptr + row * vocabulary
        index = index_ptr + row * vocabulary
        # As many scores as are wanted reach the parts' best ones: less than these cannot stay.
        bound = least_of_best(best_ptr + row * blocks, blocks, left, BLOCK_PARTS)
        size = 0
        for start in range(0, vocabulary, BLOCK):
            i = start + tl.arange(0, BLOCK)
            score = tl.load(scores + i, mask=i < vocabulary, other=float("-inf"))
            stays = (i < vocabulary) & (ordered(score) >= bound)
            place = size + tl.cumsum(stays.to(tl.int32), axis=0) - 1
            tl.store(kept + place, score, mask=stays)
            tl.store(index + place, i, mask=stays)
            size += tl.sum(stays.to(tl.int32))
        tl.debug_barrier()
        # The k-th largest score, eight bits of its order at a time.
        prefix = tl.zeros([], tl.uint32)
        for digit in tl.static_range(4):
            counts = tl.zeros([256], tl.int32)
            for start in range(0, size, BLOCK_KEPT):
                i = start + tl.arange(0, BLOCK_KEPT)
                inside = i < size
                order = ordered(tl.load(kept + i, mask=inside, other=float("-inf")))
                if digit > 0:
                    inside = inside & ((order >> (32 - 8 * digit)) == (prefix >> (32 - 8 * digit)))
                counts += tl.histogram(
                    ((order >> (24 - 8 * digit)) & 255).to(tl.int32), 256, mask=inside
                )
            at_least = tl.cumsum(counts, axis=0, reverse=True)
            found = tl.sum((at_least >= left).to(tl.int32)) - 1
            value = tl.arange(0, 256)
            left -= tl.sum(tl.where(value == found, at_least - counts, 0))
            prefix = prefix | (found.to(tl.uint32) << (24 - 8 * digit))
        found_before = size
        size = 0
        for start in range(0, found_before, BLOCK_KEPT):
            i = start + tl.arange(0, BLOCK_KEPT)
            score = tl.load(kept + i, mask=i < found_before, other=float("-inf"))
            token = tl.load(index + i, mask=i < found_before, other=0)
            stays = (i < found_before) & (ordered(score) >= prefix)
            place = size + tl.cumsum(stays.to(tl.int32), axis=0) - 1
            # What stays moves towards the front, over what has been read.
            tl.debug_barrier()
            tl.store(kept + place, score, mask=stays)
            tl.store(index + place, token, mask=stays)
            size += tl.sum(stays.to(tl.int32))
        tl.debug_barrier()

    if broken | (largest == float("-inf")):
        size = 0  # nothing can be drawn
        largest = 0.0
    threshold = tl.zeros([], tl.uint32)
    first = 0  # of equal scores at the threshold, those from this token on stay
    if TOP_P:
        zero = tl.zeros([], tl.uint32)
        wanted = tl.load(reals_ptr + 3) * mass_above(kept, size, zero, largest, BLOCK_KEPT)
        if size <= FEW:
            threshold = least_within(kept, size, wanted, largest, FEW)
        else:
            # The largest order with at least the wanted mass above it: the next is the threshold.
            bit = tl.full([], 0x80000000, tl.uint32)
            for _ in range(32):
                trial = threshold | bit
                bit = bit >> 1
                if mass_above(kept, size, trial, largest, BLOCK_KEPT) >= wanted:
                    threshold = trial
            threshold = tl.minimum(threshold, ordered(largest) - 1) + 1
        above = mass_above(kept, size, threshold, largest, BLOCK_KEPT)
        ties = 0
        for start in range(0, size, BLOCK_KEPT):
            i = start + tl.arange(0, BLOCK_KEPT)
            score = tl.load(kept + i, mask=i < size, other=float("-inf"))
            ties += tl.sum(((i < size) & (ordered(score) == threshold)).to(tl.int32))
        bits = tl.where(threshold >> 31 == 1, threshold & 0x7FFFFFFF, ~threshold)
        share = tl.exp(bits.to(tl.float32, bitcast=True) - largest)
        stay = tl.maximum(tl.ceil((wanted - above) / share), 1.0)
        if stay < ties:
            power = tl.full([], 1 << 30, tl.int32)
            for _ in range(31):
                trial = first | power
                power = power >> 1
                later = 0
                for start in range(0, size, BLOCK_KEPT):
                    j = start + tl.arange(0, BLOCK_KEPT)
                    score = tl.load(kept + j, mask=j < size, other=float("-inf"))
                    token = j
                    if TOP_K:
                        token = tl.load(index + j, mask=j < size, other=0)
                    tied = (j < size) & (ordered(score) == threshold) & (token >= trial)
                    later += tl.sum(tied.to(tl.int32))
                if later >= stay:
                    first = trial

    best = float("-inf")
    chosen = 0
    for start in range(0, size, BLOCK_KEPT):
        i = start + tl.arange(0, BLOCK_KEPT)
        score = tl.load(kept + i, mask=i < size, other=float("-inf"))
        token = i
        if TOP_K:
            token = tl.load(index + i, mask=i < size, other=0)
        stays = i < size
        if TOP_P:
            order = ordered(score)
            stays = stays & ((order > threshold) | ((order == threshold) & (token >= first)))
        if MIN_P:
            stays = stays & (tl.exp(score - largest) >= tl.load(reals_ptr + 4))
        noise = tl.load(noise_ptr + row * vocabulary + token, mask=stays, other=1.0)
        score = tl.where(stays, score - tl.log(noise), float("-inf"))
        score = tl.where(score != score, float("-inf"), score)
        here, place = tl.max(score, axis=0, return_indices=True)
        if here > best:
            best = here
            chosen = tl.sum(tl.where(tl.arange(0, BLOCK_KEPT) == place, token, 0))
    # One part is left, the first.
    tl.store(best_ptr + row * blocks, tl.where(broken, float("nan"), best))
    tl.store(at_ptr + row * blocks, chosen)


@triton.jit
def note_kernel(
    best_ptr, at_ptr, eos_ptr, unfinished_ptr, alive_ptr, count_ptr, broken_ptr, seen_ptr,
    tokens_ptr, chosen_ptr,
    batch, vocabulary, blocks, parts, pad, capacity, ends,
    SAMPLE: tl.constexpr,
    EOS: tl.constexpr,
    PENALTY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_EOS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: the best part of every row, and all that depends on it."""
    wait_for_previous(OVERLAP)
    column = tl.load(count_ptr)
    part = tl.arange(0, BLOCK_PARTS)
    alive = 0
    broken = 0
    for start in range(0, batch, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        inside = b < batch
        here = inside[:, None] & (part < parts)[None, :]
        at = b[:, None] * blocks + part[None, :]
        best = tl.load(best_ptr + at, mask=here, other=float("-inf"))
        if SAMPLE:
            broken += tl.sum(((best != best) & here).to(tl.int32))
        best = tl.where(best != best, float("inf"), best)
        nothing = tl.max(best, axis=1) == float("-inf")
        if SAMPLE:
            broken += tl.sum((nothing & inside).to(tl.int32))
        place = tl.argmax(best, axis=1)
        found = tl.load(at_ptr + at, mask=here, other=0)
        token = tl.sum(tl.where(part[None, :] == place[:, None], found, 0), axis=1).to(tl.int64)
        if EOS:
            unfinished = tl.load(unfinished_ptr + b, mask=inside, other=0) != 0
            token = tl.where(unfinished, token, pad)
            e = tl.arange(0, BLOCK_EOS)
            eos = tl.load(eos_ptr + e, mask=e < ends, other=-1)
            ended = tl.sum((token[:, None] == eos[None, :]).to(tl.int32), axis=1) > 0
            unfinished = unfinished & (ended == 0)
            tl.store(unfinished_ptr + b, unfinished, mask=inside)
            alive += tl.sum((unfinished & inside).to(tl.int32))
        if PENALTY:
            tl.store(seen_ptr + b * vocabulary + token, tl.full([BLOCK_B], 1, tl.int1), mask=inside)
        tl.store(tokens_ptr + b, token, mask=inside)
        tl.store(chosen_ptr + b * capacity + column % capacity, token, mask=inside)
    if EOS:
        tl.store(alive_ptr, alive > 0)
    if SAMPLE and broken > 0:
        tl.store(broken_ptr, True)
    tl.store(count_ptr, column + 1)
