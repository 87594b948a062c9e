"""Triton kernels of the RMS norm: with a residual added before, gated, in groups.

A tile holds ROWS rows of one group. Strides come in units of UNIT elements, see
`ssm_hf.ops.launch.common_unit`. `WHOLE` means that a group fits into one tile, so that memory is
read once; wider groups are walked twice.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    # exp of a large positive number is inf, and 1 / inf the 0 that belongs there
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load(
    x_ptr, residual_ptr, gate_ptr, x_at, residual_at, gate_at, columns, inside,
    HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """x, residual and gate as they are stored."""
    x = tl.load(x_ptr + x_at + columns, mask=inside, other=0.0)
    residual = 0.0
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + residual_at + columns, mask=inside, other=0.0)
    gate = 0.0
    if GATED:
        gate = tl.load(gate_ptr + gate_at + columns, mask=inside, other=0.0)
    return x, residual, gate


@triton.jit
def _stream(
    x, residual, gate, total_ptr, total_at, columns, inside,
    HAS_RESIDUAL: tl.constexpr, GATE_FIRST: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """What is normalised: x, x + residual (rounded as it is stored), or x silu(gate)."""
    h = x.to(tl.float32)
    if HAS_RESIDUAL:
        total = (h + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        if STORE:
            tl.store(total_ptr + total_at + columns, total, mask=inside)
        h = total.to(tl.float32)
    if GATE_FIRST:
        z = gate.to(tl.float32)
        h *= z * _sigmoid(z)
    return h


@triton.jit
def _load_weight(weight_ptr, first, columns, size):
    return tl.load(weight_ptr + first + columns, mask=columns < size, other=0.0)


@triton.jit
def _finish(h, scale, gate, weight, y_ptr, y_at, columns, inside, GATE_LAST: tl.constexpr):
    y = h * scale * weight.to(tl.float32)
    if GATE_LAST:
        z = gate.to(tl.float32)
        y *= z * _sigmoid(z)
    tl.store(y_ptr + y_at + columns, y, mask=inside)


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    scale_ptr,
    stride_x,
    stride_residual,
    stride_gate,
    stride_y,
    rows,
    groups,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS rows of one group a program; `scale` is (rows, groups).

    Programs one after another take the groups of the same rows, which lie side by side in memory.
    With EARLY the weight is asked for together with the rows, so that nothing waits for it later.
    """
    group = tl.program_id(0) % groups
    row = ((tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    first = group * size
    x_at = row * (stride_x * UNIT) + first
    residual_at = row * (stride_residual * UNIT) + first
    gate_at = row * (stride_gate * UNIT) + first
    y_at = row * (stride_y * UNIT) + first
    columns = tl.arange(0, BLOCK)[None, :]
    GATED: tl.constexpr = GATE_FIRST or GATE_LAST
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    if WHOLE:
        loaded = ()
        weights = ()
        for i in tl.static_range(PARTS):
            at = i * BLOCK + columns
            inside = (row < rows) & (at < size)
            one = _load(
                x_ptr, residual_ptr, gate_ptr, x_at, residual_at, gate_at, at, inside,
                HAS_RESIDUAL, GATED,
            )  # fmt: skip
            loaded = loaded + (one,)
            if EARLY:
                weights = weights + (_load_weight(weight_ptr, first, at, size),)
        hs = ()
        for i in tl.static_range(PARTS):
            at = i * BLOCK + columns
            inside = (row < rows) & (at < size)
            h = _stream(
                loaded[i][0], loaded[i][1], loaded[i][2], total_ptr, y_at, at, inside,
                HAS_RESIDUAL, GATE_FIRST, True,
            )  # fmt: skip
            squares += h * h
            hs = hs + (h,)
        scale = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / size + eps)
        for i in tl.static_range(PARTS):
            at = i * BLOCK + columns
            inside = (row < rows) & (at < size)
            weight = weights[i] if EARLY else _load_weight(weight_ptr, first, at, size)
            _finish(hs[i], scale, loaded[i][2], weight, y_ptr, y_at, at, inside, GATE_LAST)
    else:
        for start in range(0, size, BLOCK):
            at = start + columns
            inside = (row < rows) & (at < size)
            x, residual, gate = _load(
                x_ptr, residual_ptr, gate_ptr, x_at, residual_at, gate_at, at, inside,
                HAS_RESIDUAL, GATE_FIRST,
            )  # fmt: skip
            h = _stream(
                x, residual, gate, total_ptr, y_at, at, inside, HAS_RESIDUAL, GATE_FIRST, True
            )
            squares += h * h
        scale = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / size + eps)
        for start in range(0, size, BLOCK):
            at = start + columns
            inside = (row < rows) & (at < size)
            x, residual, gate = _load(
                x_ptr, residual_ptr, gate_ptr, x_at, residual_at, gate_at, at, inside,
                HAS_RESIDUAL, GATED,
            )  # fmt: skip
            h = _stream(
                x, residual, gate, total_ptr, y_at, at, inside, HAS_RESIDUAL, GATE_FIRST, False
            )
            weight = _load_weight(weight_ptr, first, at, size)
            _finish(h, scale, gate, weight, y_ptr, y_at, at, inside, GATE_LAST)
    tl.store(scale_ptr + row * groups + group, scale, mask=row < rows)


@triton.jit
def _load_bwd(
    dy_ptr, h_ptr, gate_ptr, dy_at, h_at, gate_at, columns, inside, GATED: tl.constexpr,
):  # fmt: skip
    """dy, x (the stream) and z as they are stored."""
    dy = tl.load(dy_ptr + dy_at + columns, mask=inside, other=0.0)
    x = tl.load(h_ptr + h_at + columns, mask=inside, other=0.0)
    z = 0.0
    if GATED:
        z = tl.load(gate_ptr + gate_at + columns, mask=inside, other=0.0)
    return dy, x, z


@triton.jit
def _form_bwd(
    dy, x, z, scale, GATE_FIRST: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """In fp32: the norm n, dy times what the weight is multiplied by, silu, its slope."""
    n = x.to(tl.float32) * scale
    dn = dy.to(tl.float32)
    silu = 1.0
    slope = 0.0
    if GATE_FIRST or GATE_LAST:
        z = z.to(tl.float32)
        sigmoid = _sigmoid(z)
        silu = z * sigmoid
        slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
        if GATE_FIRST:
            n *= silu
        else:
            dn *= silu
    return n, dn, silu, slope


@triton.jit
def _store_bwd(
    dy, x, z, along, scale, weight, dtotal_ptr, dx_ptr, dresidual_ptr, dgate_ptr, y_ptr,
    dtotal_at, dx_at, dgate_at, columns, inside, HAS_DTOTAL: tl.constexpr, TWO_GRADS: tl.constexpr,
    GATE_FIRST: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Write what belongs to a tile; return the rows' shares of the weight's gradient."""
    weight = weight.to(tl.float32)
    n, dn, silu, slope = _form_bwd(dy, x, z, scale, GATE_FIRST, GATE_LAST)
    dh = scale * (dn * weight - n * along)
    if HAS_DTOTAL:
        dh += tl.load(dtotal_ptr + dtotal_at + columns, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = n * weight
        if GATE_LAST:
            y *= silu
        tl.store(y_ptr + dx_at + columns, y, mask=inside)
    if GATE_FIRST:
        tl.store(dgate_ptr + dgate_at + columns, dh * x.to(tl.float32) * slope, mask=inside)
        dh *= silu
    if GATE_LAST:
        dgate = dy.to(tl.float32) * weight * n * slope
        tl.store(dgate_ptr + dgate_at + columns, dgate, mask=inside)
    tl.store(dx_ptr + dx_at + columns, dh, mask=inside)
    if TWO_GRADS:
        tl.store(dresidual_ptr + dx_at + columns, dh, mask=inside)
    return dn * n


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr,
    dtotal_ptr,
    h_ptr,
    gate_ptr,
    weight_ptr,
    scale_ptr,
    dx_ptr,
    dresidual_ptr,
    dgate_ptr,
    y_ptr,
    dweight_ptr,
    stride_dy,
    stride_dtotal,
    stride_h,
    stride_gate,
    stride_dx,
    stride_dgate,
    rows,
    size,
    HAS_DTOTAL: tl.constexpr,
    TWO_GRADS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE_LAST: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Every num_programs(0)-th tile of one group a program; STAGES tiles are under way at a time.

    `h` is x, or what forward made of x + residual. Outputs are contiguous, but for dgate; with
    `y_ptr` the output of forward is formed again. `dweight` (programs, D) is to be summed.
    With KEEP the weight stays in registers.
    """
    program, group = tl.program_id(0), tl.program_id(1)
    first = group * size
    columns = tl.arange(0, BLOCK)[None, :]
    partial_ptr = dweight_ptr + program.to(tl.int64) * (tl.num_programs(1) * size) + first
    GATED: tl.constexpr = GATE_FIRST or GATE_LAST
    sums = ()
    kept = ()
    for i in tl.static_range(PARTS):
        sums = sums + (tl.zeros((ROWS, BLOCK), tl.float32),)
        if KEEP and WHOLE:
            kept = kept + (_load_weight(weight_ptr, first, i * BLOCK + columns, size),)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        dy_at = row * (stride_dy * UNIT) + first
        dtotal_at = row * (stride_dtotal * UNIT) + first
        h_at = row * (stride_h * UNIT) + first
        gate_at = row * (stride_gate * UNIT) + first
        dx_at = row * (stride_dx * UNIT) + first
        dgate_at = row * (stride_dgate * UNIT) + first
        scale = tl.load(scale_ptr + row * tl.num_programs(1) + group, mask=row < rows, other=0.0)
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        if WHOLE:
            dys = ()
            xs = ()
            zs = ()
            for i in tl.static_range(PARTS):
                at = i * BLOCK + columns
                inside = (row < rows) & (at < size)
                dy, x, z = _load_bwd(
                    dy_ptr, h_ptr, gate_ptr, dy_at, h_at, gate_at, at, inside, GATED
                )
                dys = dys + (dy,)
                xs = xs + (x,)
                zs = zs + (z,)
            for i in tl.static_range(PARTS):
                at = i * BLOCK + columns
                weight = kept[i] if KEEP else _load_weight(weight_ptr, first, at, size)
                n, dn, _silu, _slope = _form_bwd(dys[i], xs[i], zs[i], scale, GATE_FIRST, GATE_LAST)
                products += dn * weight.to(tl.float32) * n
            along = tl.sum(products, axis=1, keep_dims=True) / size
            new = ()
            for i in tl.static_range(PARTS):
                at = i * BLOCK + columns
                inside = (row < rows) & (at < size)
                weight = kept[i] if KEEP else _load_weight(weight_ptr, first, at, size)
                dweight = _store_bwd(
                    dys[i], xs[i], zs[i], along, scale, weight,
                    dtotal_ptr, dx_ptr, dresidual_ptr, dgate_ptr, y_ptr, dtotal_at, dx_at, dgate_at,
                    at, inside, HAS_DTOTAL, TWO_GRADS, GATE_FIRST, GATE_LAST,
                )  # fmt: skip
                new = new + (sums[i] + dweight,)
            sums = new
        else:
            for start in range(0, size, BLOCK):
                at = start + columns
                inside = (row < rows) & (at < size)
                dy, x, z = _load_bwd(
                    dy_ptr, h_ptr, gate_ptr, dy_at, h_at, gate_at, at, inside, GATED
                )
                weight = _load_weight(weight_ptr, first, at, size).to(tl.float32)
                n, dn, _silu, _slope = _form_bwd(dy, x, z, scale, GATE_FIRST, GATE_LAST)
                products += dn * weight * n
            along = tl.sum(products, axis=1, keep_dims=True) / size
            for start in range(0, size, BLOCK):
                at = start + columns
                inside = (row < rows) & (at < size)
                dy, x, z = _load_bwd(
                    dy_ptr, h_ptr, gate_ptr, dy_at, h_at, gate_at, at, inside, GATED
                )
                weight = _load_weight(weight_ptr, first, at, size)
                dweight = _store_bwd(
                    dy, x, z, along, scale, weight,
                    dtotal_ptr, dx_ptr, dresidual_ptr, dgate_ptr, y_ptr, dtotal_at, dx_at, dgate_at,
                    at, inside, HAS_DTOTAL, TWO_GRADS, GATE_FIRST, GATE_LAST,
                )  # fmt: skip
                if WEIGHT_GRAD:
                    # This program's own row of the sums, so no other one writes here.
                    here = start + tl.arange(0, BLOCK)
                    so_far = tl.where(tile > program, size, 0)
                    old = tl.load(partial_ptr + here, mask=here < so_far, other=0.0)
                    tl.store(partial_ptr + here, old + tl.sum(dweight, axis=0), mask=here < size)
    if WEIGHT_GRAD and WHOLE:
        for i in tl.static_range(PARTS):
            here = i * BLOCK + tl.arange(0, BLOCK)
            tl.store(partial_ptr + here, tl.sum(sums[i], axis=0), mask=here < size)


@triton.jit
def sum_rows_kernel(
    x_ptr, y_ptr, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(rows, columns) fp32 -> (columns,), in a fixed order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rows, ROWS):
        at = (start + row).to(tl.int64) * columns + column[None, :]
        inside = (start + row < rows) & (column < columns)[None, :]
        total += tl.load(x_ptr + at, mask=inside, other=0.0)
    tl.store(y_ptr + column, tl.sum(total, axis=0), mask=column < columns)
