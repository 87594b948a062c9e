"""Triton kernels of the causal convolution, forward and backward.

A program walks through SEGMENTS pieces of a row side by side, ROWS x STEPS tokens each, and BLOCK_C
channels; a tile (SEGMENTS, BLOCK_C) holds one token of each piece. The last K-1 inputs stay in
registers, so each input is read once; STAGES - 1 sets of ROWS tokens are fetched ahead. Behind the
pieces of a row come the programs of its states.

Tokens are counted by rank: real tokens first, pads behind them. `order` (B, T) gives the position
of each rank (None: there are no pads), `counts` (B,) the number of real tokens. `numbers` (B, T)
are the documents' numbers by position. With `offsets` (n+1,), the documents' first ranks, numbers
count from 0 and each document has a state of its own; without, a row has one, which its first
document continues. Strides come in units of UNIT elements, see `ssm_hf.ops.launch.common_unit`.
"""

import triton
import triton.language as tl


@triton.jit
def _position(order_ptr, rank, length):
    position = rank
    if order_ptr is not None:
        position = tl.load(order_ptr + rank, mask=(rank >= 0) & (rank < length), other=0)
    return position.to(tl.int64)


@triton.jit
def _number(numbers_ptr, order_ptr, rank, length):
    """Document numbers; before the row's first token stands the number of the first."""
    rank = tl.maximum(rank, 0)
    position = _position(order_ptr, rank, length)
    return tl.load(numbers_ptr + position, mask=rank < length, other=0)


@triton.jit
def _state_row(state_ptr, at, row, channels, channel, mask, like_ptr):
    """Row of a state as it is among the inputs: rounded to their dtype."""
    row = tl.load(state_ptr + at + row * channels + channel, mask=mask, other=0.0)
    return row.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _window(
    x_ptr, stride_x, order_ptr, numbers_ptr, state_ptr, state_at, rank, start, length,
    channels, channel, inside, PER_DOCUMENT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The K-1 inputs before `rank` (S, 1), oldest first; what lies before `start` is the state."""
    window = ()
    kept = rank >= 0
    for j in tl.static_range(1, TAPS):
        v = rank - j
        if numbers_ptr is not None and not PER_DOCUMENT and j > 1:
            kept = kept & (
                _number(numbers_ptr, order_ptr, v, length)
                == _number(numbers_ptr, order_ptr, v + 1, length)
            )
        at = _position(order_ptr, v, length) * stride_x
        mask = inside & kept & (v >= start) & (v < length)
        x = tl.load(x_ptr + at + channel, mask=mask, other=0.0).to(tl.float32)
        if state_ptr is not None:
            mask = inside & kept & (v < start)
            row = TAPS - 1 + v - start
            x += _state_row(state_ptr, state_at, row, channels, channel, mask, x_ptr)
        window = (x,) + window
    return window


@triton.jit
def _restart(
    window, fresh, number, x_ptr, state_ptr, channels, channel, inside,
    PER_DOCUMENT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Where a document begins, its state replaces the window, or zeros do."""
    new = ()
    for i in tl.static_range(TAPS - 1):
        row = 0.0
        if PER_DOCUMENT and state_ptr is not None:
            at = number.to(tl.int64) * ((TAPS - 1) * channels)
            row = _state_row(state_ptr, at, i, channels, channel, inside & fresh, x_ptr)
        new = new + (tl.where(fresh, row, window[i]),)
    return new


@triton.jit
def _fresh(number, before, rank, PER_DOCUMENT: tl.constexpr):
    fresh = number != before
    return (fresh | (rank == 0)) if PER_DOCUMENT else (fresh & (rank > 0))


@triton.jit
def _taps(weight_ptr, bias_ptr, channel, channels, TAPS: tl.constexpr):
    weights = ()
    for k in tl.static_range(TAPS):
        w = tl.load(weight_ptr + channel * TAPS + k, mask=channel < channels, other=0.0)
        weights = weights + (w.to(tl.float32),)
    bias = tl.zeros(channel.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return weights, bias


@triton.jit
def _convolved(window, weights, bias, TAPS: tl.constexpr):
    total = bias + window[0] * weights[0]
    for k in tl.static_range(1, TAPS):
        total += window[k] * weights[k]
    return total


@triton.jit
def _fetch(
    x_ptr, stride_x, numbers_ptr, order_ptr, rank, end, length, channel, inside,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Positions, inputs (0 from `end` on) and document numbers of ROWS tokens of each piece.

    They are asked for together, so that the memory's delay is paid once.
    """
    places = ()
    inputs = ()
    numbers = ()
    for u in tl.static_range(ROWS):
        place = _position(order_ptr, rank + u, length)
        mask = inside & (rank + u < end)
        x = tl.load(x_ptr + place * stride_x + channel, mask=mask, other=0.0)
        places = places + (place,)
        inputs = inputs + (x,)
        if numbers_ptr is not None:
            number = tl.load(numbers_ptr + place, mask=rank + u < length, other=0)
            numbers = numbers + (number,)
    return places, inputs, numbers


@triton.jit
def _sigmoid(x):
    # exp of a large positive number is inf, and 1 / inf the 0 that belongs there
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _bounds(offsets_ptr, counts_ptr, batch, document, documents, length):
    """First rank and end of documents (S, 1); without offsets a row is one."""
    start = tl.zeros(document.shape, tl.int32)
    if offsets_ptr is not None:
        there = document < documents
        start = tl.load(offsets_ptr + document, mask=there, other=0).to(tl.int32)
        end = tl.load(offsets_ptr + document + 1, mask=there, other=0).to(tl.int32)
    elif counts_ptr is not None:
        end = start + tl.load(counts_ptr + batch)
    else:
        end = start + length
    return start, end


@triton.jit
def causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, numbers_ptr, offsets_ptr, order_ptr, counts_ptr,
    y_ptr, final_ptr,
    stride_xb, stride_xt, length, channels, programs, documents,
    SILU: tl.constexpr, TAPS: tl.constexpr, UNIT: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y, and the final states: (B or n, K-1, C)."""
    blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    channel = ((pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = channel < channels
    piece = (pid // blocks) % programs
    batch = (pid // (blocks * programs)).to(tl.int64)
    PER_DOCUMENT: tl.constexpr = offsets_ptr is not None
    stride_x = stride_xt * UNIT
    x_ptr += batch * stride_xb * UNIT
    y_ptr += batch * length * channels
    if numbers_ptr is not None:
        numbers_ptr += batch * length
    if order_ptr is not None:
        order_ptr += batch * length
    pieces = tl.cdiv(length, SEGMENTS * ROWS * STEPS)
    part = tl.arange(0, SEGMENTS)[:, None]
    state_at = batch * ((TAPS - 1) * channels) + tl.zeros(part.shape, tl.int64)

    if piece >= pieces:
        document = (piece - pieces) * SEGMENTS + part
        mask = inside & (document < documents)
        start, end = _bounds(offsets_ptr, counts_ptr, batch, document, documents, length)
        if PER_DOCUMENT:
            state_at = document.to(tl.int64) * ((TAPS - 1) * channels)
        window = _window(
            x_ptr, stride_x, order_ptr, numbers_ptr, state_ptr, state_at, end, start, length,
            channels, channel, mask, PER_DOCUMENT, TAPS,
        )  # fmt: skip
        for i in tl.static_range(TAPS - 1):
            tl.store(final_ptr + state_at + i * channels + channel, window[i], mask=mask)
    else:
        weights, bias = _taps(weight_ptr, bias_ptr, channel, channels, TAPS)
        first = (piece * SEGMENTS + part) * (ROWS * STEPS)
        start = tl.zeros(part.shape, tl.int32)
        end = start + length
        if counts_ptr is not None:
            end = start + tl.load(counts_ptr + batch)
        if numbers_ptr is not None:
            before = _number(numbers_ptr, order_ptr, first - 1, length)
            if PER_DOCUMENT:
                start = tl.load(offsets_ptr + before).to(tl.int32)
                state_at = before.to(tl.int64) * ((TAPS - 1) * channels)
        window = _window(
            x_ptr, stride_x, order_ptr, numbers_ptr, state_ptr, state_at, first, start, length,
            channels, channel, inside, PER_DOCUMENT, TAPS,
        )  # fmt: skip
        for step in tl.range(0, STEPS, num_stages=STAGES):
            rank = first + step * ROWS
            places, inputs, numbers = _fetch(
                x_ptr, stride_x, numbers_ptr, order_ptr, rank, length, length, channel, inside, ROWS
            )
            for u in tl.static_range(ROWS):
                t = rank + u
                if numbers_ptr is not None:
                    number = numbers[u]
                    window = _restart(
                        window, _fresh(number, before, t, PER_DOCUMENT), number, x_ptr, state_ptr,
                        channels, channel, inside, PER_DOCUMENT, TAPS,
                    )  # fmt: skip
                    before = number
                window = window + (inputs[u].to(tl.float32),)
                y = _convolved(window, weights, bias, TAPS)
                if SILU:
                    y *= _sigmoid(y)
                if counts_ptr is not None:
                    y = tl.where(t < end, y, 0.0)
                tl.store(y_ptr + places[u] * channels + channel, y, mask=inside & (t < length))
                window = window[1:]


@triton.jit
def _before_silu(dy, before_silu, SILU: tl.constexpr):
    """Gradient with respect to what silu is applied to."""
    dy = dy.to(tl.float32)
    if SILU:
        sigmoid = _sigmoid(before_silu)
        dy *= sigmoid * (1.0 + before_silu * (1.0 - sigmoid))
    return dy


@triton.jit
def _spread(pending, q, weights, age, HAS_NUMBERS: tl.constexpr, TAPS: tl.constexpr):
    """Add a token's q to the gradients of the last K inputs of its own document, oldest first."""
    new = ()
    for i in tl.static_range(TAPS):
        part = q * weights[i]
        if HAS_NUMBERS and i < TAPS - 1:
            part = tl.where(age >= TAPS - 1 - i, part, 0.0)
        new = new + (pending[i] + part,)
    return new


@triton.jit
def _step_bwd(
    t, x, dy, number, window, pending, grad, before, age, weights, bias,
    x_ptr, state_ptr, channels, channel, inside,
    HAS_NUMBERS: tl.constexpr, PER_DOCUMENT: tl.constexpr, SILU: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One token: its window with itself, q, gradients of the window's inputs, and its document."""
    if HAS_NUMBERS:
        fresh = _fresh(number, before, t, PER_DOCUMENT)
        window = _restart(
            window, fresh, number, x_ptr, state_ptr, channels, channel, inside, PER_DOCUMENT, TAPS
        )
        before = number
        age = tl.where(fresh, 0, age + 1)
    window = window + (x.to(tl.float32),)
    q = _before_silu(dy, _convolved(window, weights, bias, TAPS), SILU)
    pending = _spread(pending + (grad,), q, weights, age, HAS_NUMBERS, TAPS)
    return window, q, pending, before, age


@triton.jit
def causal_conv1d_bwd_kernel(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr, numbers_ptr, offsets_ptr,
    order_ptr, counts_ptr, dx_ptr, dstate_ptr, partial_ptr,
    stride_dyb, stride_dyt, stride_xb, stride_xt, stride_dxb, stride_dxt, length, channels,
    programs, documents,
    SILU: tl.constexpr, TAPS: tl.constexpr, UNIT: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx, dstate (B or n, K-1, C), and per program the sums (K+1, C) for dweight and dbias.

    A token's input meets the outputs of the next K-1 tokens, so a piece reads that much further.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    channel = ((pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = channel < channels
    piece = (pid // blocks) % programs
    batch = (pid // (blocks * programs)).to(tl.int64)
    PER_DOCUMENT: tl.constexpr = offsets_ptr is not None
    HAS_NUMBERS: tl.constexpr = numbers_ptr is not None
    stride_x = stride_xt * UNIT
    stride_dy = stride_dyt * UNIT
    x_ptr += batch * stride_xb * UNIT
    dy_ptr += batch * stride_dyb * UNIT
    stride_dx = stride_dxt * UNIT
    dx_ptr += batch * stride_dxb * UNIT
    if HAS_NUMBERS:
        numbers_ptr += batch * length
    if order_ptr is not None:
        order_ptr += batch * length
    pieces = tl.cdiv(length, SEGMENTS * ROWS * STEPS)
    part = tl.arange(0, SEGMENTS)[:, None]
    state_at = batch * ((TAPS - 1) * channels) + tl.zeros(part.shape, tl.int64)
    weights, bias = _taps(weight_ptr, bias_ptr, channel, channels, TAPS)

    if piece >= pieces:
        if state_ptr is not None:
            document = (piece - pieces) * SEGMENTS + part
            mask = inside & (document < documents)
            start, end = _bounds(offsets_ptr, counts_ptr, batch, document, documents, length)
            if PER_DOCUMENT:
                state_at = document.to(tl.int64) * ((TAPS - 1) * channels)
            window = ()
            grads = ()
            for i in tl.static_range(TAPS - 1):
                row = _state_row(state_ptr, state_at, i, channels, channel, mask, x_ptr)
                window = window + (row,)
                grads = grads + (tl.zeros(row.shape, tl.float32),)
            unbroken = start <= end
            for a in tl.static_range(TAPS - 1):
                t = start + a
                if HAS_NUMBERS and not PER_DOCUMENT and a > 0:
                    same = _number(numbers_ptr, order_ptr, t, length) == _number(
                        numbers_ptr, order_ptr, t - 1, length
                    )
                    unbroken = unbroken & (same | (t >= end))
                at = _position(order_ptr, t, length) * stride_x
                x = tl.load(x_ptr + at + channel, mask=mask & (t < end), other=0.0)
                window = window + (x.to(tl.float32),)
                at = _position(order_ptr, t, length) * stride_dy
                dy = tl.load(dy_ptr + at + channel, mask=mask & unbroken & (t < end), other=0.0)
                q = _before_silu(dy, _convolved(window, weights, bias, TAPS), SILU)
                new = ()
                for i in tl.static_range(TAPS - 1):
                    grad = grads[i]
                    if i >= a:
                        grad += q * weights[i - a]
                    new = new + (grad,)
                grads = new
                window = window[1:]
            for i in tl.static_range(TAPS - 1):
                grad = grads[i]
                if dfinal_ptr is not None:
                    # What a short document leaves of its state is part of its final state.
                    row = i - (end - start)
                    at = state_at + row * channels
                    grad += tl.load(
                        dfinal_ptr + at + channel, mask=mask & unbroken & (row >= 0), other=0.0
                    ).to(tl.float32)
                tl.store(dstate_ptr + state_at + i * channels + channel, grad, mask=mask)
    else:
        first = (piece * SEGMENTS + part) * (ROWS * STEPS)
        start = tl.zeros(part.shape, tl.int32)
        end = start + length
        if counts_ptr is not None:
            end = start + tl.load(counts_ptr + batch)
        before = start
        if HAS_NUMBERS:
            before = _number(numbers_ptr, order_ptr, first - 1, length)
            if PER_DOCUMENT:
                start = tl.load(offsets_ptr + before).to(tl.int32)
                state_at = before.to(tl.int64) * ((TAPS - 1) * channels)
        window = _window(
            x_ptr, stride_x, order_ptr, numbers_ptr, state_ptr, state_at, first, start, length,
            channels, channel, inside, PER_DOCUMENT, TAPS,
        )  # fmt: skip
        # The first rank whose input is in its row's final state.
        kept = end - (TAPS - 1)
        if HAS_NUMBERS and not PER_DOCUMENT and dfinal_ptr is not None:
            for j in tl.static_range(TAPS - 2, 0, -1):
                v = end - 1 - j
                same = _number(numbers_ptr, order_ptr, v, length) == _number(
                    numbers_ptr, order_ptr, v + 1, length
                )
                kept = tl.where(same, kept, tl.maximum(kept, v + 1))
        zeros = tl.zeros((SEGMENTS, BLOCK_C), tl.float32)
        pending = ()
        sums = (zeros,)
        for _i in tl.static_range(TAPS - 1):
            pending = pending + (zeros,)
        for _i in tl.static_range(TAPS):
            sums = sums + (zeros,)
        age = tl.zeros(part.shape, tl.int32)

        for step in tl.range(0, STEPS, num_stages=STAGES):
            rank = first + step * ROWS
            _places, inputs, numbers = _fetch(
                x_ptr, stride_x, numbers_ptr, order_ptr, rank, end, length, channel, inside, ROWS
            )
            _places, dys, _numbers = _fetch(
                dy_ptr, stride_dy, None, order_ptr, rank, end, length, channel, inside, ROWS
            )
            for u in tl.static_range(ROWS):
                t = rank + u
                number = numbers[u] if HAS_NUMBERS else t
                grad = zeros
                if dfinal_ptr is not None:
                    at, row = state_at, t - end + (TAPS - 1)
                    mask = inside & (t >= kept) & (t < end)
                    if PER_DOCUMENT:
                        at = number.to(tl.int64) * ((TAPS - 1) * channels)
                        row = t - tl.load(offsets_ptr + number + 1).to(tl.int32) + (TAPS - 1)
                        mask = inside & (row >= 0) & (t < end)
                    at += row * channels
                    grad = tl.load(dfinal_ptr + at + channel, mask=mask, other=0.0).to(tl.float32)
                window, q, pending, before, age = _step_bwd(
                    t, inputs[u], dys[u], number, window, pending, grad, before, age, weights, bias,
                    x_ptr, state_ptr, channels, channel, inside,
                    HAS_NUMBERS, PER_DOCUMENT, SILU, TAPS,
                )  # fmt: skip
                if partial_ptr is not None:
                    new = ()
                    for k in tl.static_range(TAPS):
                        new = new + (sums[k] + q * window[k],)
                    sums = new + (sums[TAPS] + q,)
                v = t - (TAPS - 1)
                at = _position(order_ptr, v, length) * stride_dx
                mask = inside & (v >= first) & (v < length)
                tl.store(dx_ptr + at + channel, pending[0], mask=mask)
                pending = pending[1:]
                window = window[1:]

        rank = first + ROWS * STEPS
        _places, inputs, numbers = _fetch(
            x_ptr, stride_x, numbers_ptr, order_ptr, rank, end, length, channel, inside, TAPS - 1
        )
        _places, dys, _numbers = _fetch(
            dy_ptr, stride_dy, None, order_ptr, rank, end, length, channel, inside, TAPS - 1
        )
        for u in tl.static_range(TAPS - 1):
            number = numbers[u] if HAS_NUMBERS else rank
            window, q, pending, before, age = _step_bwd(
                rank + u, inputs[u], dys[u], number, window, pending, zeros, before, age, weights,
                bias, x_ptr, state_ptr, channels, channel, inside,
                HAS_NUMBERS, PER_DOCUMENT, SILU, TAPS,
            )  # fmt: skip
            v = rank + u - (TAPS - 1)
            at = _position(order_ptr, v, length) * stride_dx
            mask = inside & (v >= first) & (v < length)
            tl.store(dx_ptr + at + channel, pending[0], mask=mask)
            pending = pending[1:]
            window = window[1:]

        if partial_ptr is not None:
            flat = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
            to = partial_ptr + (batch * pieces + piece) * ((TAPS + 1) * channels) + flat
            for k in tl.static_range(TAPS + 1):
                tl.store(to + k * channels, tl.sum(sums[k], axis=0), mask=flat < channels)


@triton.jit
def causal_conv1d_bwd_sum_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, rows, channels,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums (rows, K+1, C) over rows in a fixed order -> dweight (C, K), dbias (C,)."""
    k = tl.program_id(1)
    flat = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = flat[None, :]
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, rows, ROWS):
        at = ((start + row).to(tl.int64) * (TAPS + 1) + k) * channels
        mask = (start + row < rows) & (channel < channels)
        total += tl.load(partial_ptr + at + channel, mask=mask, other=0.0)
    total = tl.sum(total, axis=0)
    if k < TAPS:
        tl.store(dweight_ptr + flat * TAPS + k, total, mask=flat < channels)
    elif dbias_ptr is not None:
        tl.store(dbias_ptr + flat, total, mask=flat < channels)


@triton.jit
def real_first_kernel(mask_ptr, order_ptr, counts_ptr, length, BLOCK: tl.constexpr):
    """One row of a padding mask -> positions of its real tokens, then of its pads; their number."""
    row = tl.program_id(0).to(tl.int64)
    mask_ptr += row * length
    order_ptr += row * length
    count = 0
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        real = tl.load(mask_ptr + t, mask=t < length, other=0).to(tl.int32)
        rank = count + tl.cumsum(real, axis=0) - real
        tl.store(order_ptr + rank, t, mask=real > 0)
        count += tl.sum(real, axis=0)
    tl.store(counts_ptr + row, count)
    pads = count
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        pad = (tl.load(mask_ptr + t, mask=t < length, other=1) == 0).to(tl.int32)
        rank = pads + tl.cumsum(pad, axis=0) - pad
        tl.store(order_ptr + rank, t, mask=pad > 0)
        pads += tl.sum(pad, axis=0)
