"""The experts' kernels as torch operators: launches, shapes for tracing, gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssm_hf.ops import launch as common
from ssm_hf.ops.launch import KERNEL_DTYPES, call, check_tensors, on_device, tuned
from ssm_hf.ops.moe.kernels import described, moe_in_kernel, moe_rows_kernel, moe_sum_kernel
from ssm_hf.ops.moe.kernels_bwd import moe_hidden_bwd_kernel, moe_weights_bwd_kernel
from ssm_hf.ops.moe.kernels_sort import moe_count_kernel, moe_place_kernel, moe_scan_kernel
from ssm_hf.ops.moe.kernels_step import moe_in_step_kernel, moe_out_step_kernel
from ssm_hf.ops.moe.reference import needs_gradients

# Triton's annotations do not know that plain values may stand for constants.
_in_kernel: Any = moe_in_kernel
_rows_kernel: Any = moe_rows_kernel
_sum_kernel: Any = moe_sum_kernel
_hidden_bwd_kernel: Any = moe_hidden_bwd_kernel
_weights_bwd_kernel: Any = moe_weights_bwd_kernel
_count_kernel: Any = moe_count_kernel
_scan_kernel: Any = moe_scan_kernel
_place_kernel: Any = moe_place_kernel
_in_step_kernel: Any = moe_in_step_kernel
_out_step_kernel: Any = moe_out_step_kernel

MOST_EXPERTS = 1024
# Up to so many tokens each reads its experts' weights by itself, where no gradients are needed.
STEP_TOKENS = 4
# Experts of fewer rows than this on average get smaller tiles.
_FEW_ROWS = 96


def why_unsupported(w_in: Tensor, w_out: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take these; None when they can."""
    if w_in.shape[0] > MOST_EXPERTS:
        return f"its kernels take at most {MOST_EXPERTS} experts, got {w_in.shape[0]}"
    if dtype not in KERNEL_DTYPES:
        return f"kernels take float32, float16 and bfloat16, got {dtype}"
    if max(w_in[0].numel(), w_out[0].numel()) >= 1 << 31:
        return "its kernels take experts of less than 2^31 weights each"
    return None


def _power(extent: int, least: int) -> int:
    """Smallest power of two that covers `extent`, at least `least`."""
    return max(least, 1 << (extent - 1).bit_length())


class _Sorted(NamedTuple):
    """Slots by expert; see kernels.py."""

    order: Tensor  # (S,) int32
    totals: Tensor  # (E,) int32


def _sort(experts: Tensor, num_experts: int) -> _Sorted:
    """By counting, in one launch where a block holds all slots, else in three."""
    slots, device = experts.numel(), experts.device
    order = experts.new_empty(slots, dtype=torch.int32)
    totals = experts.new_empty(num_experts, dtype=torch.int32)
    options: dict[str, Any] = dict(tuned("moe_sort", "default", device))
    tile, rows = options.pop("TILE"), options.pop("ROWS")
    block_e = _power(num_experts, 16)
    block = max(tile // block_e, 16)
    shape = {"EXPERTS": num_experts, "BLOCK_E": block_e}
    alone = slots <= block
    blocks = -(-slots // block)
    counts = totals if alone else totals.new_empty(blocks, block_e)
    if not alone:
        columns = min(block_e, 16)
        _count_kernel[(blocks,)](experts, counts, slots, **shape, BLOCK=block, **options)
        _scan_kernel[(block_e // columns,)](
            counts, totals, blocks, **shape, COLUMNS=columns, ROWS=rows, **options
        )
    _place_kernel[(blocks,)](
        experts, counts, totals, order, slots, **shape, BLOCK=block, ALONE=alone, **options
    )
    return _Sorted(order, totals)


class _Products(NamedTuple):
    """What the products of one call share."""

    slots: int
    top_k: int
    num_experts: int
    dtype: torch.dtype
    device: torch.device
    activation: str
    gated: bool

    def options(
        self, kernel: str, size_k: int | None, size_n: int, *matrices: Tensor
    ) -> dict[str, Any]:
        """Tuned options and constants of a kernel whose products go over size_k and have size_n
        columns; `matrices` are what it could read by descriptors."""
        few = self.slots <= _FEW_ROWS * self.num_experts
        size = "wide" if self.dtype == torch.float32 else "few" if few else "default"
        options: dict[str, Any] = dict(tuned(kernel, size, self.device))
        precision = "ieee"
        if common.architecture(self.device).startswith("sm"):
            precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        options["EVEN_N"] = size_n % options["BLOCK_N"] == 0
        if size_k is not None:
            options["EVEN_K"] = size_k % options["BLOCK_K"] == 0
            # Blocks behind an expert's last column would reach into the next expert's rows; and
            # descriptors want addresses and rows in multiples of 16 bytes.
            options["DESCRIBED"] = (
                bool(options.get("DESCRIBED"))
                and options["EVEN_K"]
                and self.dtype != torch.float32
                and size_n * self.dtype.itemsize % 16 == 0
                and all(m.data_ptr() % 16 == 0 for m in matrices)
            )
        block_e = _power(self.num_experts, 16)
        return {
            "EXPERTS": self.num_experts, "BLOCK_E": block_e, "PRECISION": precision, **options,
        }  # fmt: skip

    def tiles(self, block_m: int) -> int:
        """The most tiles of rows that there can be, however the slots fall on experts."""
        return min(self.slots, (self.slots + self.num_experts * (block_m - 1)) // block_m)

    @property
    def act(self) -> dict[str, Any]:
        """Constants of the activation."""
        return {"GATED": self.gated, "SILU": self.activation == "silu"}


def _multiply_rows(
    p: _Products,
    a: Tensor,
    w: Tensor,
    weights: Tensor | None,
    where: _Sorted,
    experts: Tensor,
    transposed: bool,
) -> Tensor:
    """a (S, K) sorted times the experts' w, summed over each token's slots: (N, columns)."""
    columns = w.shape[1] if transposed else w.shape[2]
    out = a.new_empty(p.slots, columns)
    options = p.options("moe_rows", a.shape[1], columns, a, w)
    tiles_n = -(-columns // options["BLOCK_N"])
    block_m, block_n, block_k = (options[f"BLOCK_{axis}"] for axis in "MNK")
    rows_in, w_in = a, w
    if options["DESCRIBED"]:
        rows_in = described(a, [block_m, block_k])
        w_in = described(w, [block_n, block_k] if transposed else [block_k, block_n])
    _rows_kernel[(p.tiles(block_m) * tiles_n,)](
        rows_in,
        w_in,
        weights,
        where.order,
        where.totals,
        out,
        columns,
        tiles_n,
        SIZE=a.shape[1],
        TRANSPOSED=transposed,
        WEIGHTED=weights is not None,
        **options,
    )
    tokens = p.slots // p.top_k
    y = a.new_empty(tokens, columns)
    options = dict(tuned("moe_sum", "default", p.device))
    block = min(_power(columns, 16), options.pop("BLOCK"))
    rows = max(options.pop("TILE") // block, 1)
    _sum_kernel[(-(-tokens // rows), -(-columns // block))](
        out, experts, y, tokens, columns,
        TOP_K=p.top_k, EXPERTS=p.num_experts, ROWS=rows, BLOCK=block, **options,
    )  # fmt: skip
    return y


def _step(p: _Products, x: Tensor, experts: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor):
    """y of a few tokens."""
    inner, size = w_out.shape[2], x.shape[1]
    h = x.new_empty(p.slots, inner)
    shape = {"TOP_K": p.top_k, "EXPERTS": p.num_experts}
    options = dict(tuned("moe_in_step", "default", p.device))
    _in_step_kernel[(p.slots, -(-inner // options["BLOCK_N"]))](
        x, experts, w_in, h, x.stride(0), inner, SIZE=size, **shape, **p.act, **options
    )
    y = x.new_empty(x.shape[0], w_out.shape[1])
    options = dict(tuned("moe_out_step", "default", p.device))
    _out_step_kernel[(x.shape[0], -(-y.shape[1] // options["BLOCK_N"]))](
        h, experts, weights, w_out, y, y.shape[1], SIZE=inner, **shape, **options
    )
    return y


def _compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to form products in where `dtype` was asked for."""
    # Triton's interpreter multiplies the bits of bf16 numbers as if they were integers.
    interpreted = common.architecture(device) == "cpu"
    return torch.float32 if interpreted and dtype == torch.bfloat16 else dtype


def _brought(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, rows with any stride between them."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("ssm_hf::moe_experts_fwd", mutates_args=())
def _forward(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    gated: bool,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (N, D'); and for the backward pass, where `keep` says so (else empty): order, totals, pre,
    w_in and w_out in `dtype`, the last two empty where they have it."""
    y, order, totals, pre, in_kept, out_kept = _empty_outputs(x, experts, w_in, w_out, dtype, keep)
    p = _Products(
        experts.numel(), experts.shape[1], w_in.shape[0], pre.dtype, x.device, activation, gated
    )
    if p.slots == 0:
        return y, order, totals.zero_(), pre, in_kept, out_kept
    w_in, w_out = (w.contiguous() if w.dtype == dtype else w.to(dtype) for w in (w_in, w_out))
    if keep:
        in_kept = in_kept if in_kept.numel() == 0 else w_in
        out_kept = out_kept if out_kept.numel() == 0 else w_out
    x, experts, weights = _brought(x.to(dtype), p.dtype), experts.contiguous(), weights.contiguous()
    w_in, w_out = w_in.to(p.dtype), w_out.to(p.dtype)
    with on_device(x):
        if not keep and x.shape[0] <= STEP_TOKENS:
            y = _step(p, x, experts, weights, w_in, w_out).to(dtype)
            return y, order, totals, pre, in_kept, out_kept
        where = _sort(experts, p.num_experts)
        inner, size = w_out.shape[2], x.shape[1]
        h = x.new_empty(p.slots, inner)
        options = p.options("moe_in", size, inner, w_in)
        tiles_n = -(-inner // options["BLOCK_N"])
        block = [options["BLOCK_N"], options["BLOCK_K"]]
        _in_kernel[(p.tiles(options["BLOCK_M"]) * tiles_n,)](
            x,
            described(w_in, block) if options["DESCRIBED"] else w_in,
            where.order,
            where.totals,
            h,
            pre,
            x.stride(0),
            inner,
            tiles_n,
            SIZE=size,
            TOP_K=p.top_k,
            KEEP=keep,
            **p.act,
            **options,
        )
        y = _multiply_rows(p, h, w_out, weights, where, experts, True).to(dtype)
    if keep:
        order, totals = where
    return y, order, totals, pre, in_kept, out_kept


def _empty_outputs(
    x: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    slots = experts.numel() if keep else 0
    return (
        empty(x.shape[0], w_out.shape[1]),
        empty(slots, dtype=torch.int32),
        empty(w_in.shape[0] if keep else 0, dtype=torch.int32),
        empty(slots, w_in.shape[1], dtype=_compute_dtype(dtype, x.device)),
        empty(*(w_in.shape if keep and w_in.dtype != dtype else (0,))),
        empty(*(w_out.shape if keep and w_out.dtype != dtype else (0,))),
    )


@_forward.register_fake
def _(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    gated: bool,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(x, experts, w_in, w_out, dtype, keep)


@torch.library.custom_op("ssm_hf::moe_experts_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    order: Tensor,
    totals: Tensor,
    pre: Tensor,
    activation: str,
    gated: bool,
    in_dtype: torch.dtype,
    out_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, w_in and w_out, of these in `in_dtype` and `out_dtype`; empty where
    not wanted. w_in and w_out are given in the dtype of the products, that of pre.
    """
    grads = _empty_grads(x, weights, w_in, w_out, in_dtype, out_dtype, wanted)
    dx, dweights, dw_in, dw_out = grads
    dtype = pre.dtype
    p = _Products(
        experts.numel(), experts.shape[1], w_in.shape[0], dtype, x.device, activation, gated
    )
    if p.slots == 0:
        for grad in grads:
            grad.zero_()
        return grads
    x, dy, experts = _brought(x, dtype), _brought(dy, dtype), experts.contiguous()
    weights = weights.contiguous()
    w_in, w_out = w_in.to(dtype).contiguous(), w_out.to(dtype).contiguous()
    where = _Sorted(order, totals)
    inner, size = w_out.shape[2], w_out.shape[1]
    with on_device(x):
        options = p.options("moe_hidden_bwd", size, inner, w_out)
        tiles_n = -(-inner // options["BLOCK_N"])
        dpre, h = torch.empty_like(pre), pre.new_empty(p.slots, inner)
        # Slots of no expert are written by nobody.
        parts = weights.new_zeros(tiles_n, p.slots, dtype=torch.float32)
        block = [options["BLOCK_K"], options["BLOCK_N"]]
        _hidden_bwd_kernel[(p.tiles(options["BLOCK_M"]) * tiles_n,)](
            dy,
            described(w_out, block) if options["DESCRIBED"] else w_out,
            weights,
            pre,
            order,
            totals,
            dpre,
            h,
            parts,
            dy.stride(0),
            inner,
            tiles_n,
            p.slots,
            SIZE=size,
            TOP_K=p.top_k,
            **p.act,
            **options,
        )
        if wanted[1]:
            dweights.copy_(parts.sum(dim=0).view_as(dweights))
        if wanted[2]:
            _multiply_columns(p, dpre, x, where, dw_in, False)
        if wanted[3]:
            _multiply_columns(p, dy, h, where, dw_out, True)
        if wanted[0]:
            found = _multiply_rows(p, dpre, w_in, None, where, experts, False)
            dx = found if found.dtype == dx.dtype else dx.copy_(found)
    return dx, dweights, dw_in, dw_out


def _multiply_columns(
    p: _Products, a: Tensor, b: Tensor, where: _Sorted, dw: Tensor, a_gathered: bool
) -> None:
    """dw (E, a's columns, b's columns) = a^T b over each expert's rows."""
    _, size_m, size_n = dw.shape
    options = p.options("moe_weights_bwd", None, size_n)
    options["EVEN_M"] = size_m % options["BLOCK_M"] == 0
    tiles = -(-size_m // options["BLOCK_M"]) * -(-size_n // options["BLOCK_N"])
    _weights_bwd_kernel[(p.num_experts * tiles,)](
        a,
        b,
        where.order,
        where.totals,
        dw,
        a.stride(0),
        b.stride(0),
        size_m,
        size_n,
        TOP_K=p.top_k,
        A_GATHERED=a_gathered,
        **options,
    )


def _empty_grads(
    x: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    in_dtype: torch.dtype,
    out_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtypes = (x.dtype, weights.dtype, in_dtype, out_dtype)
    grads = [
        t.new_empty(t.shape if needed else (0,), dtype=dtype)
        for t, dtype, needed in zip((x, weights, w_in, w_out), dtypes, wanted, strict=True)
    ]
    return grads[0], grads[1], grads[2], grads[3]


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    order: Tensor,
    totals: Tensor,
    pre: Tensor,
    activation: str,
    gated: bool,
    in_dtype: torch.dtype,
    out_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_grads(x, weights, w_in, w_out, in_dtype, out_dtype, wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, experts, weights, w_in, w_out, ctx.activation, ctx.gated, _, _ = inputs
    _, order, totals, pre, in_kept, out_kept = output
    ctx.mark_non_differentiable(order, totals, pre, in_kept, out_kept)
    ctx.set_materialize_grads(False)  # zeros of pre are as much memory as pre itself
    ctx.dtypes = (w_in.dtype, w_out.dtype)
    w_in = in_kept if in_kept.numel() else w_in
    w_out = out_kept if out_kept.numel() else w_out
    ctx.save_for_backward(x, experts, weights, w_in, w_out, order, totals, pre)


def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    needed = ctx.needs_input_grad
    wanted = [needed[0], *needed[2:5]]
    grads = _backward(dy, *ctx.saved_tensors, ctx.activation, ctx.gated, *ctx.dtypes, wanted)
    dx, dweights, dw_in, dw_out = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return dx, None, dweights, dw_in, dw_out, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def experts_triton(
    x: Tensor, experts: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor, *how: Any
) -> Tensor:
    """As `experts_torch`, in grouped products whose programs find their experts on the device."""
    check_tensors(
        "moe_experts", KERNEL_DTYPES, x=x, experts=experts, weights=weights, w_in=w_in, w_out=w_out
    )
    keep = needs_gradients(x, weights, w_in, w_out)
    return call(_forward, x, experts, weights, w_in, w_out, *how, keep)[0]
