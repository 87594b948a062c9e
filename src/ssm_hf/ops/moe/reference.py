"""Routing and experts in plain torch: the definitions, and a loop over the experts that are hit."""

from collections.abc import Generator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.packing import compute_dtype

# Added to a sum of sigmoid scores before it divides them, as in the released models.
EPSILON = 1e-20


def route_torch(
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    kind: str,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    """logits (N, E) -> weights (N, k) in fp32 or wider, experts (N, k); see `moe_route`."""
    logits = logits.to(compute_dtype(logits))
    scores = torch.sigmoid(logits) if kind == "sigmoid" else logits
    choice = scores.detach()
    if bias is not None:
        choice = choice + bias.to(choice.dtype)
    if top_groups < groups:
        choice = _without_weak_groups(choice, groups, top_groups)
    # Stable, so that of equal experts the lower number wins, on every device.
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if kind == "softmax" and not renormalise:
        weights = scores.softmax(dim=-1).gather(1, experts)
    elif kind == "softmax":
        weights = scores.gather(1, experts).softmax(dim=-1)
    else:
        weights = scores.gather(1, experts)
        if renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    if scale != 1:
        weights = weights * scale
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None], 0)
        experts = experts.masked_fill(~mask[:, None], logits.shape[1])
    return weights, experts


def _without_weak_groups(choice: Tensor, groups: int, top_groups: int) -> Tensor:
    """-inf at the experts outside the `top_groups` groups whose two best experts sum highest."""
    members = choice.unflatten(1, (groups, -1))
    score = members.topk(min(2, members.shape[2]), dim=-1).values.sum(dim=-1)
    kept = score.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    allowed = torch.zeros_like(score, dtype=torch.bool).scatter_(1, kept, True)
    return members.masked_fill(~allowed[..., None], -torch.inf).flatten(1)


def activate(pre: Tensor, activation: str, gated: bool) -> Tensor:
    """(..., 2 I) = [gate | up] or (..., I) before the activation -> (..., I)."""
    gate, up = pre.chunk(2, dim=-1) if gated else (pre, None)
    value = F.silu(gate) if activation == "silu" else F.relu(gate).square()
    return value if up is None else value * up


def activation_gradient(pre: Tensor, dh: Tensor, activation: str, gated: bool) -> Tensor:
    """Gradient of `activate` with respect to pre."""
    gate, up = pre.chunk(2, dim=-1) if gated else (pre, None)
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        value, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    else:
        value, slope = F.relu(gate).square(), 2 * F.relu(gate)
    if up is None:
        return dh * slope
    return torch.cat((dh * up * slope, dh * value), dim=-1)


def experts_definition(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """Every expert over every token, in the widest dtype given; differentiable by autograd."""
    y = x.new_zeros(*x.shape[:-1], w_out.shape[1])
    for e in range(w_in.shape[0]):
        h = activate(F.linear(x, w_in[e]), activation, gated)
        share = torch.where(experts == e, weights, 0).sum(dim=-1, keepdim=True)
        y = y + share * F.linear(h, w_out[e])
    return y


def _hit(experts: Tensor, num_experts: int) -> Generator[tuple[int, Any], None, None]:
    """Every expert that is hit, with its slots of experts (N, k) flattened."""
    if experts.shape[0] == 1:
        for slot, e in enumerate(experts[0].tolist()):
            if e < num_experts:
                yield e, slice(slot, slot + 1)
        return
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    start = 0
    for e, count in enumerate(flat.bincount(minlength=num_experts).tolist()[:num_experts]):
        if count:
            yield e, order[start : start + count]
        start += count


def _rows(x: Tensor, slots: Any, top_k: int) -> Tensor:
    """The tokens x (N, D) of slots."""
    return x if isinstance(slots, slice) else x[slots // top_k]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T; a single row as a matrix-vector product."""
    if x.shape[0] == 1:
        return torch.mv(weight, x[0])[None]
    return F.linear(x, weight)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; without a product of its own where dtypes agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


@torch.library.custom_op("ssm_hf::moe_experts_loop", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """y (N, D') in `dtype`, and what stands before the activation (N k, .), or nothing."""
    (tokens, top_k), num_experts = experts.shape, w_in.shape[0]
    wide = compute_dtype(x, weights, w_in)
    x = x.to(dtype)
    out = x.new_zeros(tokens * top_k, w_out.shape[1])
    pre = x.new_zeros(tokens * top_k if keep else 0, w_in.shape[1])
    for e, slots in _hit(experts, num_experts):
        before = _product(_rows(x, slots, top_k), w_in[e].to(dtype))
        h = activate(before.to(wide), activation, gated).to(dtype)
        out[slots] = _product(h, w_out[e].to(dtype))
        if keep:
            pre[slots] = before
    out = out.view(tokens, top_k, w_out.shape[1]).to(wide) * weights.to(wide)[..., None]
    return out.sum(dim=1).to(dtype), pre


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
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], w_out.shape[1], dtype=dtype)
    return y, y.new_empty(experts.numel() if keep else 0, w_in.shape[1])


@torch.library.custom_op("ssm_hf::moe_experts_loop_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    pre: Tensor,
    activation: str,
    gated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, w_in and w_out."""
    (tokens, top_k), num_experts = experts.shape, w_in.shape[0]
    wide = compute_dtype(x, weights, w_in)
    x_given, x, dy = x, x.to(dtype), dy.to(dtype)
    dx = x.new_zeros(tokens * top_k, x.shape[1])
    dweights = weights.new_zeros(tokens * top_k)
    dw_in, dw_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
    flat = weights.flatten().to(wide)
    for e, slots in _hit(experts, num_experts):
        before, weight = pre[slots].to(wide), flat[slots, None]
        h = activate(before, activation, gated)
        dy_here = _rows(dy, slots, top_k)
        dh = (dy_here @ w_out[e].to(dtype)).to(wide)
        dweights[slots] = (h * dh).sum(dim=1).to(weights.dtype)
        dpre = activation_gradient(before, dh * weight, activation, gated).to(dtype)
        _add_product(dw_out[e], dy_here.t(), (h * weight).to(dtype))
        _add_product(dw_in[e], dpre.t(), _rows(x, slots, top_k))
        dx[slots] = dpre @ w_in[e].to(dtype)
    dx = dx.view(tokens, top_k, x.shape[1]).sum(dim=1, dtype=wide).to(x_given.dtype)
    return dx, dweights.view_as(weights), dw_in, dw_out


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    pre: Tensor,
    activation: str,
    gated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = [t.new_empty(t.shape) for t in (x, weights, w_in, w_out)]
    return empty[0], empty[1], empty[2], empty[3]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, experts, weights, w_in, w_out, ctx.activation, ctx.gated, ctx.dtype, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros of pre are as much memory as pre itself
    ctx.save_for_backward(x, experts, weights, w_in, w_out, output[1])


def _gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    dx, dweights, dw_in, dw_out = _backward(
        dy, *ctx.saved_tensors, ctx.activation, ctx.gated, ctx.dtype
    )
    return dx, None, dweights, dw_in, dw_out, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def experts_torch(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens sorted by expert, then one product after another, over the experts that are hit."""
    keep = needs_gradients(x, weights, w_in, w_out)
    return _forward(x, experts, weights, w_in, w_out, activation, gated, dtype, keep)[0]


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
