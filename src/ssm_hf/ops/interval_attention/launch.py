"""Attention on intervals as torch operators: launches, shapes for tracing, gradients."""

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops import launch as common
from ssm_hf.ops.interval_attention.kernels import interval_attention_fwd_kernel
from ssm_hf.ops.interval_attention.kernels_bwd import (
    interval_attention_delta_kernel,
    interval_attention_dkv_kernel,
    interval_attention_dq_kernel,
)
from ssm_hf.ops.interval_attention.reference import product_dtype
from ssm_hf.ops.launch import KERNEL_DTYPES, call, check_tensors, common_unit, on_device, tuned

# Triton's annotations do not know that plain values may stand for constants.
_fwd_kernel: Any = interval_attention_fwd_kernel
_delta_kernel: Any = interval_attention_delta_kernel
_dq_kernel: Any = interval_attention_dq_kernel
_dkv_kernel: Any = interval_attention_dkv_kernel


def padded_dimensions(head_dim: int, device: torch.device) -> int:
    """The power of two in which kernels hold a head.

    With Triton 3.6 on Hopper, products with a side below 64 lead to invalid memory accesses or to
    wrong results.
    """
    least = 16 if common.architecture(device) == "cpu" else 64
    return max(least, 1 << (head_dim - 1).bit_length())


def _options(kernel: str, like: Tensor) -> dict[str, Any]:
    """Tuned options and constants of a kernel for heads like those of `like`."""
    head_dim = like.shape[-1]
    block_d = padded_dimensions(head_dim, like.device)
    size = f"{'wide' if like.dtype == torch.float32 else 'd'}{block_d}"
    precision = "ieee"
    if common.architecture(like.device).startswith("sm"):
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    return {
        **tuned(f"interval_attention_{kernel}", size, like.device),
        "BLOCK_D": block_d,
        "EVEN_D": block_d == head_dim,
        "PRECISION": precision,
    }


def _compute_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype in which kernels form the products."""
    dtype = product_dtype(q, k, v)
    # Triton's interpreter multiplies the bits of bf16 numbers as if they were integers.
    interpreted = common.architecture(q.device) == "cpu"
    return torch.float32 if interpreted and dtype == torch.bfloat16 else dtype


def _brought(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`, with any strides but the last."""
    t = t.to(dtype)
    return t if t.stride(-1) == 1 else t.contiguous()


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        low: Tensor,
        high: Tensor,
        key_mask: Tensor | None,
        places: Tensor | None,
        dy: Tensor | None = None,
    ) -> None:
        self.batch, self.rows, self.heads, self.head_dim = q.shape
        self.queries = low.shape[1]
        self.keys, self.groups = k.shape[1], k.shape[2]
        dtype = _compute_dtype(q, k, v)
        self.q, self.k, self.v = (_brought(t, dtype) for t in (q, k, v))
        self.dy = None if dy is None else _brought(dy, dtype)
        self.low, self.high = low.contiguous(), high.contiguous()
        self.key_mask = None if key_mask is None else key_mask.contiguous()
        self.places = None if places is None else places.contiguous()
        self._take_strides()

    def _take_strides(self) -> None:
        taken = (self.q, self.k, self.v) if self.dy is None else (self.q, self.k, self.v, self.dy)
        strides = [t.stride()[:3] for t in taken]
        self.unit = common_unit(*(s for of_one in strides for s in of_one))
        self.strides = [s // self.unit for of_one in strides for s in of_one]

    @property
    def intervals(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    @property
    def stride_low(self) -> int:
        return self.queries if self.low.shape[0] > 1 else 0

    @property
    def masks(self) -> tuple[int, int]:
        """Strides of the intervals and of the mask from row to row."""
        return self.stride_low, 0 if self.key_mask is None else self.keys

    def options(self, kernel: str) -> dict[str, Any]:
        return {
            **_options(kernel, self.q), "HAS_KEY_MASK": self.key_mask is not None,
            "UNIT": self.unit,
        }  # fmt: skip

    @property
    def mask_or_any(self) -> Tensor:
        return self.low if self.key_mask is None else self.key_mask

    @property
    def placed(self) -> dict[str, bool]:
        return {"PLACED": self.places is not None}

    @property
    def places_or_any(self) -> Tensor:
        return self.low if self.places is None else self.places

    def bring_near(self, near: Tensor) -> None:
        """Take q and dy from near (2, B, N, H, d), where they lie side by side."""
        self.q, self.dy = near.unbind()
        self._take_strides()


@torch.library.custom_op("ssm_hf::interval_attention_fwd", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    key_mask: Tensor | None,
    places: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, d), and the logarithms (base 2) of the sums of exponentials (B, H, N)."""
    y, lse = _empty_outputs(q, low)
    if lse.numel() < q.shape[0] * q.shape[1] * q.shape[2]:
        y.zero_()  # rows that no query stands for
    if y.numel() == 0 or lse.numel() == 0:
        return y, lse
    c = _Call(q, k, v, low, high, key_mask, places)
    options = c.options("fwd")
    tiles = -(-c.queries // options["BLOCK_M"])
    with on_device(q):
        _fwd_kernel[(tiles * c.heads * c.batch,)](
            c.q, c.k, c.v, *c.intervals, c.mask_or_any, c.places_or_any, y, lse,
            c.queries, c.rows, c.keys, c.heads, c.heads // c.groups, c.head_dim, tiles, scale,
            *c.masks, *c.strides, **options, **c.placed,
        )  # fmt: skip
    return y, lse


def _empty_outputs(q: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    batch, rows, heads, head_dim = q.shape
    return (
        q.new_empty(batch, rows, heads, head_dim),
        q.new_empty(batch, heads, low.shape[1], dtype=torch.float32),
    )


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    key_mask: Tensor | None,
    places: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, low)


@torch.library.custom_op("ssm_hf::interval_attention_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    key_mask: Tensor | None,
    places: Tensor | None,
    y: Tensor,
    lse: Tensor,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, and of k and v; empty where not wanted."""
    dq, dk, dv = grads = _empty_grads(q, k, v, wanted)
    if lse.numel() < q.shape[0] * q.shape[1] * q.shape[2]:
        dq.zero_()
    if q.numel() == 0 or lse.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    c = _Call(q, k, v, low, high, key_mask, places, dy)
    assert c.dy is not None
    delta = torch.empty_like(lse)
    options = c.options("dkv")
    block_m, block_d = options["BLOCK_M"], options["BLOCK_D"]
    tiles = -(-c.queries // block_m)
    bounds = torch.empty(4, c.batch, tiles, dtype=torch.int32, device=q.device)
    near = delta
    if places is not None:
        near = c.q.new_empty(2, c.batch, c.queries, c.heads, c.head_dim)
    with on_device(q):
        _delta_kernel[(tiles * c.heads * c.batch,)](
            y, c.dy, c.q, *c.intervals, c.places_or_any, delta, bounds, near,
            c.queries, c.rows, c.keys, c.heads, c.head_dim, tiles, c.batch * tiles,
            near.numel() // 2, c.stride_low, *c.dy.stride()[:3], *c.q.stride()[:3],
            BLOCK_M=block_m, BLOCK_D=block_d, **c.placed,
            **tuned("interval_attention_delta", "default", q.device),
        )  # fmt: skip
        if places is not None:
            c.bring_near(near)
        if wanted[1]:
            key_tiles = -(-c.keys // options["BLOCK_N"])
            _dkv_kernel[(key_tiles * c.groups * c.batch,)](
                c.q, c.k, c.v, *c.intervals, c.mask_or_any, c.dy, lse, delta, bounds, dk, dv,
                c.queries, c.keys, c.groups, c.heads // c.groups, c.head_dim, key_tiles, tiles,
                c.batch * tiles, scale, *c.masks, *c.strides, **options,
            )  # fmt: skip
        if wanted[0]:
            options = c.options("dq")
            tiles = -(-c.queries // options["BLOCK_M"])
            _dq_kernel[(tiles * c.heads * c.batch,)](
                c.q, c.k, c.v, *c.intervals, c.mask_or_any, c.places_or_any, c.dy, lse, delta, dq,
                c.queries, c.rows, c.keys, c.heads, c.heads // c.groups, c.head_dim, tiles, scale,
                *c.masks, *c.strides, **options, **c.placed,
            )  # fmt: skip
    return grads


def _empty_grads(
    q: Tensor, k: Tensor, v: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    def empty(like: Tensor, needed: bool) -> Tensor:
        return like.new_empty(like.shape if needed else (0,))

    return empty(q, wanted[0]), empty(k, wanted[1]), empty(v, wanted[1])


@_backward.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    key_mask: Tensor | None,
    places: Tensor | None,
    y: Tensor,
    lse: Tensor,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_grads(q, k, v, wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, y, lse)


def _gradients(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1] or needs[2]]
    dq, dk, dv = _backward(dy, *ctx.saved_tensors, ctx.scale, wanted)
    return (
        dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None,
        None, None, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_gradients, setup_context=_setup)


def interval_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    key_mask: Tensor | None,
    places: Tensor | None,
    scale: float,
) -> Tensor:
    """As `interval_attention_torch`, in tiles; those that no query sees are skipped."""
    check_tensors(
        "interval_attention",
        KERNEL_DTYPES,
        q=q,
        k=k,
        v=v,
        low=low,
        high=high,
        key_mask=key_mask,
        places=places,
    )
    return call(_forward, q, k, v, low, high, key_mask, places, scale)[0]
