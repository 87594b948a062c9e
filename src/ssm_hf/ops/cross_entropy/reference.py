"""Linear layer and cross-entropy: the definition, and the loop over chunks of tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.narrow import narrow
from ssm_hf.ops.packing import backward_in_given_precision, compute_dtype
from ssm_hf.ops.product import product_into

# Bytes of logits that exist at a time. The weight's gradient is read and written once a chunk, so
# fewer and larger chunks are faster.
CHUNK_BYTES = 560 << 20
# Chunks hold multiples of so many tokens, a tile of the matrix product.
TILE = 64
# Products of 16-bit matrices with a sum in fp32 came with torch 2.8, for NVIDIA's GPUs.
_HAS_WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.addmm.overloads() and torch.version.hip is None


class Wanted(NamedTuple):
    """Which gradients to form."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def by(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "Wanted":
        """Those of the inputs that require one, where gradients are recorded at all."""
        enabled = torch.is_grad_enabled()
        return cls(*(enabled and t is not None and t.requires_grad for t in (hidden, weight, bias)))


# (h (n, D), weight (V, D), bias (V,) or None) -> logits (n, V), which nobody else holds.
Project = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# (logits (n, V), targets (n,), ignore_index, gradient) -> losses (n,), 0 where the target is
# ignored; with `gradient` the logits become the losses' gradients with respect to them.
Score = Callable[[Tensor, Tensor, int, bool], Tensor]


def linear_cross_entropy_definition(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """All logits in `dtype`, then the loss in fp32 or wider: its sum, and the number of targets."""
    logits = F.linear(
        hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    ).flatten(0, -2)
    wide = logits.to(compute_dtype(logits))
    total = F.cross_entropy(wide, targets.flatten(), ignore_index=ignore_index, reduction="sum")
    return total, (targets != ignore_index).sum()


def score_torch(logits: Tensor, targets: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """A `Score` in plain torch."""
    counted = targets != ignore_index
    index = torch.where(counted, targets, 0)[:, None]
    wide = logits.to(compute_dtype(logits))
    normaliser = wide.logsumexp(dim=1, keepdim=True)
    losses = torch.where(counted, (normaliser - wide.gather(1, index))[:, 0], 0)
    if gradient:
        probabilities = torch.exp(wide - normaliser)
        probabilities.scatter_add_(1, index, probabilities.new_full(index.shape, -1))
        logits.copy_(probabilities.masked_fill_(~counted[:, None], 0))
    return losses


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: Wanted,
    project: Project,
    score: Score,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, number of targets, and the gradients of the former (empty where not wanted).

    The gradient of hidden is in `dtype`, those of weight and bias in fp32 or wider.
    """
    vocabulary, width = weight.shape
    wide = compute_dtype(weight)
    rows, index = hidden.reshape(-1, width).to(dtype), targets.reshape(-1)
    tokens = rows.shape[0]
    narrowed, offset = narrow(weight, dtype), None if bias is None else bias.to(dtype)
    dhidden = rows.new_empty(rows.shape if wanted.hidden else (0,))
    dweight = rows.new_empty(weight.shape if wanted.weight else (0,), dtype=wide)
    if tokens == 0:
        dweight.zero_()
    dbias = rows.new_zeros((vocabulary,) if wanted.bias else (0,), dtype=wide)
    losses = rows.new_empty(tokens, dtype=wide)

    most = max(CHUNK_BYTES // (vocabulary * dtype.itemsize) // TILE, 1) * TILE
    chunks = max(-(-tokens // most), 1)
    size = max(-(-tokens // (chunks * TILE)), 1) * TILE
    for start in range(0, tokens, size):
        chunk = slice(start, min(start + size, tokens))
        h = rows[chunk]
        logits = project(h, narrowed, offset)
        losses[chunk] = score(logits, index[chunk], ignore_index, any(wanted))
        if wanted.hidden:
            dhidden[chunk] = logits @ narrowed
        if wanted.weight:
            (_add_product if start else product_into)(dweight, logits.t(), h)
        if wanted.bias:
            dbias += logits.sum(dim=0, dtype=wide)
        # The next chunk's take their place.
        del logits
    count = (index != ignore_index).sum()
    return losses.sum(), count, dhidden.view(hidden.shape if wanted.hidden else 0), dweight, dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's dtype where torch can."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _HAS_WIDE_PRODUCTS and total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += a @ b


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        dtype: torch.dtype,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor]:
        total, count, *grads = loss_and_gradients(
            hidden, weight, bias, targets, ignore_index, dtype, wanted, F.linear, score_torch
        )
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(count, *grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    @backward_in_given_precision
    def backward(ctx: Any, dtotal: Tensor, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        count, *grads = ctx.saved_tensors
        # A mean over nothing is NaN, but pulls at nothing.
        factor = torch.where(count > 0, dtotal, 0)
        scaled = [
            (grad.to(compute_dtype(grad)) * factor).to(dtype) if needed else None
            for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        ]
        return (*scaled, None, None, None, None)


def linear_cross_entropy_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Summed loss and number of targets, chunk by chunk."""
    wanted = Wanted.by(hidden, weight, bias)
    return _LinearCrossEntropy.apply(  # pyright: ignore[reportReturnType]
        hidden, weight, bias, targets, ignore_index, dtype, wanted
    )
