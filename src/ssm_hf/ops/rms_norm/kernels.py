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
def _stream(
    x_ptr,
    residual_ptr,
    gate_ptr,
    total_ptr,
    x_at,
    residual_at,
    gate_at,
    total_at,
    columns,
    inside,
    HAS_RESIDUAL: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    STORE: tl.constexpr,
):
    """What is normalised: x, x + residual (rounded as it is stored), or x silu(gate)."""
    h = tl.load(x_ptr + x_at + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + residual_at + columns, mask=inside, other=0.0).to(tl.float32)
        total = h.to(total_ptr.dtype.element_ty)
        if STORE:
            tl.store(total_ptr + total_at + columns, total, mask=inside)
        h = total.to(tl.float32)
    if GATE_FIRST:
        z = tl.load(gate_ptr + gate_at + columns, mask=inside, other=0.0).to(tl.float32)
        h *= z * _sigmoid(z)
    return h


@triton.jit
def _finish(
    h,
    scale,
    gate_ptr,
    weight_ptr,
    y_ptr,
    gate_at,
    y_at,
    first,
    columns,
    inside,
    size,
    GATE_LAST: tl.constexpr,
):
    weight = tl.load(weight_ptr + first + columns, mask=columns < size, other=0.0).to(tl.float32)
    y = h * scale * weight
    if GATE_LAST:
        z = tl.load(gate_ptr + gate_at + columns, mask=inside, other=0.0).to(tl.float32)
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
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """ROWS rows of one group a program; `scale` is (rows, groups)."""
    group = tl.program_id(1)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    first = group * size
    x_at = row * (stride_x * UNIT) + first
    residual_at = row * (stride_residual * UNIT) + first
    gate_at = row * (stride_gate * UNIT) + first
    y_at = row * (stride_y * UNIT) + first
    columns = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        inside = (row < rows) & (columns < size)
        h = _stream(
            x_ptr, residual_ptr, gate_ptr, total_ptr, x_at, residual_at, gate_at, y_at,
            columns, inside, HAS_RESIDUAL, GATE_FIRST, True,
        )  # fmt: skip
        scale = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / size + eps)
        _finish(
            h, scale, gate_ptr, weight_ptr, y_ptr, gate_at, y_at, first, columns, inside, size,
            GATE_LAST,
        )  # fmt: skip
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, size, BLOCK):
            at = start + columns
            inside = (row < rows) & (at < size)
            h = _stream(
                x_ptr, residual_ptr, gate_ptr, total_ptr, x_at, residual_at, gate_at, y_at,
                at, inside, HAS_RESIDUAL, GATE_FIRST, True,
            )  # fmt: skip
            squares += h * h
        scale = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / size + eps)
        for start in range(0, size, BLOCK):
            at = start + columns
            inside = (row < rows) & (at < size)
            h = _stream(
                x_ptr, residual_ptr, gate_ptr, total_ptr, x_at, residual_at, gate_at, y_at,
                at, inside, HAS_RESIDUAL, GATE_FIRST, False,
            )  # fmt: skip
            _finish(
                h, scale, gate_ptr, weight_ptr, y_ptr, gate_at, y_at, first, at, inside, size,
                GATE_LAST,
            )  # fmt: skip
    tl.store(scale_ptr + row * tl.num_programs(1) + group, scale, mask=row < rows)


@triton.jit
def _load_bwd(
    dy_ptr, h_ptr, gate_ptr, weight_ptr, dy_at, h_at, gate_at, first, columns, inside, size, scale,
    GATE_FIRST: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """x (the stream), its norm n, g = dL/dn, dy times what the weight is multiplied by, z, silu."""
    dy = tl.load(dy_ptr + dy_at + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(h_ptr + h_at + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + first + columns, mask=columns < size, other=0.0).to(tl.float32)
    z = 0.0
    sigmoid = 0.0
    h = x
    dn = dy
    if GATE_FIRST or GATE_LAST:
        z = tl.load(gate_ptr + gate_at + columns, mask=inside, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(z)
        if GATE_FIRST:
            h = x * (z * sigmoid)
        else:
            dn = dy * (z * sigmoid)
    return x, h * scale, dn * weight, dn, dy, weight, z, sigmoid


@triton.jit
def _store_bwd(
    x, n, g, dy, weight, z, sigmoid, along, scale,
    dtotal_ptr, dx_ptr, dresidual_ptr, dgate_ptr, y_ptr, dtotal_at, dx_at, dgate_at, columns,
    inside, HAS_DTOTAL: tl.constexpr, TWO_GRADS: tl.constexpr,
    GATE_FIRST: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    dh = scale * (g - n * along)
    if HAS_DTOTAL:
        dh += tl.load(dtotal_ptr + dtotal_at + columns, mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = n * weight
        if GATE_LAST:
            y *= z * sigmoid
        tl.store(y_ptr + dx_at + columns, y, mask=inside)
    dsilu = sigmoid * (1.0 + z * (1.0 - sigmoid))
    if GATE_FIRST:
        tl.store(dgate_ptr + dgate_at + columns, dh * x * dsilu, mask=inside)
        dh *= z * sigmoid
    if GATE_LAST:
        tl.store(dgate_ptr + dgate_at + columns, dy * weight * n * dsilu, mask=inside)
    tl.store(dx_ptr + dx_at + columns, dh, mask=inside)
    if TWO_GRADS:
        tl.store(dresidual_ptr + dx_at + columns, dh, mask=inside)


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
    WHOLE: tl.constexpr,
):
    """Every num_programs(0)-th tile of one group a program.

    `h` is x, or what forward made of x + residual. Outputs are contiguous, but for dgate; with
    `y_ptr` the output of forward is formed again. `dweight` (programs, D) is to be summed.
    """
    program, group = tl.program_id(0), tl.program_id(1)
    first = group * size
    columns = tl.arange(0, BLOCK)[None, :]
    partial_ptr = dweight_ptr + program.to(tl.int64) * (tl.num_programs(1) * size) + first
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        dy_at = row * (stride_dy * UNIT) + first
        dtotal_at = row * (stride_dtotal * UNIT) + first
        h_at = row * (stride_h * UNIT) + first
        gate_at = row * (stride_gate * UNIT) + first
        dx_at = row * (stride_dx * UNIT) + first
        dgate_at = row * (stride_dgate * UNIT) + first
        scale = tl.load(scale_ptr + row * tl.num_programs(1) + group, mask=row < rows, other=0.0)
        if WHOLE:
            inside = (row < rows) & (columns < size)
            x, n, g, dn, dy, weight, z, sigmoid = _load_bwd(
                dy_ptr, h_ptr, gate_ptr, weight_ptr, dy_at, h_at, gate_at, first, columns, inside,
                size, scale, GATE_FIRST, GATE_LAST,
            )  # fmt: skip
            along = tl.sum(g * n, axis=1, keep_dims=True) / size
            _store_bwd(
                x, n, g, dy, weight, z, sigmoid, along, scale,
                dtotal_ptr, dx_ptr, dresidual_ptr, dgate_ptr, y_ptr, dtotal_at, dx_at, dgate_at,
                columns, inside, HAS_DTOTAL, TWO_GRADS, GATE_FIRST, GATE_LAST,
            )  # fmt: skip
            if WEIGHT_GRAD:
                sums += dn * n
        else:
            products = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, size, BLOCK):
                at = start + columns
                inside = (row < rows) & (at < size)
                x, n, g, dn, dy, weight, z, sigmoid = _load_bwd(
                    dy_ptr, h_ptr, gate_ptr, weight_ptr, dy_at, h_at, gate_at, first, at, inside,
                    size, scale, GATE_FIRST, GATE_LAST,
                )  # fmt: skip
                products += g * n
            along = tl.sum(products, axis=1, keep_dims=True) / size
            for start in range(0, size, BLOCK):
                at = start + columns
                inside = (row < rows) & (at < size)
                x, n, g, dn, dy, weight, z, sigmoid = _load_bwd(
                    dy_ptr, h_ptr, gate_ptr, weight_ptr, dy_at, h_at, gate_at, first, at, inside,
                    size, scale, GATE_FIRST, GATE_LAST,
                )  # fmt: skip
                _store_bwd(
                    x, n, g, dy, weight, z, sigmoid, along, scale,
                    dtotal_ptr, dx_ptr, dresidual_ptr, dgate_ptr, y_ptr, dtotal_at, dx_at, dgate_at,
                    at, inside, HAS_DTOTAL, TWO_GRADS, GATE_FIRST, GATE_LAST,
                )  # fmt: skip
                if WEIGHT_GRAD:
                    # This program's own row of the sums, so no other one writes here.
                    here = start + tl.arange(0, BLOCK)
                    so_far = tl.where(tile > program, size, 0)
                    old = tl.load(partial_ptr + here, mask=here < so_far, other=0.0)
                    tl.store(partial_ptr + here, old + tl.sum(dn * n, axis=0), mask=here < size)
    if WEIGHT_GRAD and WHOLE:
        here = tl.arange(0, BLOCK)
        tl.store(partial_ptr + here, tl.sum(sums, axis=0), mask=here < size)
