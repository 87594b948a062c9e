"""The inside of a Mamba-1 mixer as one torch operator, whose gradients share a tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.causal_conv1d import launch as conv
from ssm_hf.ops.dispatch import keeps_activations
from ssm_hf.ops.launch import KERNEL_DTYPES, check_tensors
from ssm_hf.ops.narrow import is_kept, narrow
from ssm_hf.ops.product import product_into
from ssm_hf.ops.selective_scan import launch as scan

# Softplus, and bounds of the step size that bound nothing.
_STEP = (True, 0.0, float("inf"))


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    doc: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    return conv._forward(x, weight, bias, None, doc, None, order, counts, True, False)[0]


def _split(low: Tensor, rank: int) -> tuple[Tensor, ...]:
    """The low-rank step size, B and C: views of what the inner projection gave."""
    states = (low.shape[-1] - rank) // 2
    return low.split([rank, states, states], dim=-1)


@torch.library.custom_op("ssm_hf::mamba1_mix_fwd", mutates_args=())
def _forward(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    save: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result; what the inner projection gave; with `save` what the scan gave before its gate
    and the scan's states; with `keep` what the convolution gave, dt, and the three projections'
    weights in proj's dtype if they are in another one (else empty)."""
    hidden, z = proj.chunk(2, dim=-1)
    x = _convolved(hidden, conv_weight, conv_bias, doc, order, counts)
    narrow_x, narrow_dt = narrow(x_weight, x.dtype), narrow(dt_weight, x.dtype)
    narrow_out = None if out_weight is None else narrow(out_weight, x.dtype)
    inner_proj = F.linear(x, narrow_x)
    low, B, C = _split(inner_proj, dt_weight.shape[1])
    dt = F.linear(low, narrow_dt)
    y, _, states, ungated = scan._forward(
        x, dt, A, B, C, D, z, dt_bias, None, doc, None, mask, *_STEP, save, keep
    )
    result = y
    if narrow_out is not None:
        result = F.linear(y, narrow_out, None if out_bias is None else out_bias.to(y.dtype))
    if not keep:
        x, dt = y.new_empty(0), y.new_empty(0)
    weights = ((narrow_x, x_weight), (narrow_dt, dt_weight), (narrow_out, out_weight))
    kept = [
        y.new_empty(0) if w is None or not keep or is_kept(of, y.dtype) else w for w, of in weights
    ]
    return result, inner_proj, ungated, states, x, dt, kept[0], kept[1], kept[2]


@_forward.register_fake
def _(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    save: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, inner = proj.shape[:2], A.shape[0]
    y, _, states, ungated = scan._outputs(proj.new_empty(*rows, inner), A, None, save, keep, True)
    inner_proj = proj.new_empty(*rows, x_weight.shape[0])
    x, dt = (proj.new_empty((*rows, inner) if keep else (0,)) for _ in range(2))
    kept = [
        proj.new_empty(w.shape if w is not None and keep and w.dtype != proj.dtype else (0,))
        for w in (x_weight, dt_weight, out_weight)
    ]
    result = y
    if out_weight is not None:
        result = proj.new_empty(*rows, out_weight.shape[0])
    return result, inner_proj, ungated, states, x, dt, kept[0], kept[1], kept[2]


@torch.library.custom_op("ssm_hf::mamba1_mix_bwd", mutates_args=())
def _backward(
    dout: Tensor,
    inner_proj: Tensor,
    ungated: Tensor,
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    narrow_x: Tensor,
    narrow_dt: Tensor,
    narrow_out: Tensor,
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    out_grad: bool,
) -> list[Tensor]:
    """Gradients of the ten tensors from proj to out_bias, empty ones for what is None; of the
    output projection only with `out_grad`."""
    given = (proj, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, out_weight, out_bias)
    grads = _empty_grads(given, out_grad)
    dproj, dconv_weight, dconv_bias, dx_weight, ddt_weight = grads[:5]
    (hidden, z), (dhidden, dz) = proj.chunk(2, dim=-1), dproj.chunk(2, dim=-1)
    empty, rank = proj.new_empty(0), dt_weight.shape[1]

    narrow_x, narrow_dt = (
        kept if kept.numel() else narrow(weight, proj.dtype)
        for kept, weight in ((narrow_x, x_weight), (narrow_dt, dt_weight))
    )

    dy = dout.contiguous()
    rows = dy.flatten(0, 1)
    if out_weight is not None:
        dy = dy @ (narrow_out if narrow_out.numel() else narrow(out_weight, dy.dtype))
    if not x.numel():
        x = _convolved(hidden, conv_weight, conv_bias, doc, order, counts)
    low, B, C = _split(inner_proj, rank)
    if not dt.numel():
        dt = F.linear(low, narrow_dt)
    dx, ddt, dinner_proj = (torch.empty_like(v) for v in (x, dt, inner_proj))
    dlow, dB, dC = _split(dinner_proj, rank)
    dbias, dA, dD = grads[5:8]
    y = torch.empty_like(dy) if out_grad else None
    scan.gradients_into(
        dx, ddt, dA, dB, dC, dD, dz, dbias, empty, dy, None, x, dt, A, B, C, D, z, dt_bias, None,
        doc, None, mask, states, ungated, *_STEP, y,
    )  # fmt: skip
    del dt, dy
    if y is not None:
        product_into(grads[8], rows.t(), y.flatten(0, 1))
        if out_bias is not None:
            grads[9].copy_(rows.sum(dim=0, dtype=torch.float32))
        del y

    steps = ddt.flatten(0, 1)
    torch.mm(steps, narrow_dt, out=dlow.flatten(0, 1))
    product_into(ddt_weight, steps.t(), low.flatten(0, 1))
    del ddt, steps
    flat = dinner_proj.flatten(0, 1)
    product_into(dx_weight, flat.t(), x.flatten(0, 1))
    dx.flatten(0, 1).addmm_(flat, narrow_x)
    conv.gradients_into(
        dhidden, dconv_weight, dconv_bias, empty, dx, None, hidden, conv_weight, conv_bias, None,
        doc, None, order, counts, True,
    )  # fmt: skip
    return grads


def _empty_grads(given: tuple[Tensor | None, ...], out_grad: bool) -> list[Tensor]:
    proj = given[0]
    assert proj is not None
    grads = [proj.new_empty(0) if t is None else t.new_empty(t.shape) for t in given]
    if not out_grad:
        grads[-2:] = [proj.new_empty(0), proj.new_empty(0)]
    return grads


@_backward.register_fake
def _(dout: Tensor, *inputs: Any) -> list[Tensor]:
    return _empty_grads(inputs[8:18], inputs[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:14])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 16
    grads = _backward(dout, *ctx.saved_tensors, any(ctx.needs_input_grad[8:10]))
    wanted = zip(grads, ctx.needs_input_grad, strict=False)
    return (*(grad if needed else None for grad, needed in wanted), *(None,) * 6)


_forward.register_autograd(_gradients, setup_context=_setup)


def mamba1_mix_triton(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    real_first: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """As the operators one after another."""
    inputs = (
        proj,
        conv_weight,
        conv_bias,
        x_weight,
        dt_weight,
        dt_bias,
        A,
        D,
        out_weight,
        out_bias,
    )
    names = ("proj", "conv_weight", "conv_bias", "x_weight", "dt_weight", "dt_bias", "A", "D",
             "out_weight", "out_bias")  # fmt: skip
    check_tensors("mamba1_mix", KERNEL_DTYPES, **dict(zip(names, inputs, strict=True)),
                  seq_idx=seq_idx, mask=mask)  # fmt: skip
    order, counts = real_first or (None, None)
    if mask is not None and order is None:
        order, counts = conv.real_first_triton(mask)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    options = order, counts, save, keeps_activations()
    return _forward(proj.contiguous(), *inputs[1:], seq_idx, mask, *options)[0]
