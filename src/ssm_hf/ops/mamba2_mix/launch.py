"""The inside of a Mamba-2 mixer as one torch operator, whose gradients share a tensor."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops.causal_conv1d import launch as conv
from ssm_hf.ops.dispatch import keeps_activations
from ssm_hf.ops.launch import KERNEL_DTYPES, check_tensors
from ssm_hf.ops.narrow import is_kept, narrow
from ssm_hf.ops.product import empty_rows, product_into
from ssm_hf.ops.rms_norm import launch as norm
from ssm_hf.ops.ssd import launch as scan


class _Parts(NamedTuple):
    """Views of proj, or of its gradient."""

    z: Tensor
    conv_in: Tensor
    dt: Tensor


def _split(proj: Tensor, conv_weight: Tensor, dt_bias: Tensor) -> _Parts:
    sizes = conv_weight.shape[0], dt_bias.shape[0]
    return _Parts(*proj.split([proj.shape[-1] - sum(sizes), *sizes], dim=-1))


def _split_conv(conv_out: Tensor, inner: int, heads: int, groups: int) -> list[Tensor]:
    """x (B, T, H, P), B and C (B, T, G, N): views of the convolution's output or its gradient."""
    grouped = (conv_out.shape[-1] - inner) // 2
    x, B, C = conv_out.split([inner, grouped, grouped], dim=-1)
    return [x.unflatten(-1, (heads, -1)), *(v.unflatten(-1, (groups, -1)) for v in (B, C))]


def _convolved(
    parts: _Parts,
    weight: Tensor,
    bias: Tensor | None,
    doc: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    return conv._forward(parts.conv_in, weight, bias, None, doc, None, order, counts, True, False)[
        0
    ]


@torch.library.custom_op("ssm_hf::mamba2_mix_fwd", mutates_args=())
def _forward(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    groups: int,
    dt_min: float,
    dt_max: float,
    eps: float,
    norm_before_gate: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result; what the scan gave (B, T, H, P); that before its gate; the norm's 1/rms; with
    `keep` what the convolution gave, the norm, and the output projection's weight in proj's dtype,
    where these are tensors of their own (else empty)."""
    heads = dt_bias.shape[0]
    parts = _split(proj, conv_weight, dt_bias)
    z, inner = parts.z, parts.z.shape[-1]
    conv_out = _convolved(parts, conv_weight, conv_bias, doc, order, counts)
    x, B, C = _split_conv(conv_out, inner, heads, groups)
    gate = z.unflatten(-1, (heads, -1)) if norm_weight is None else None
    y, _, ungated = scan._forward(
        x, parts.dt, A, B, C, D, gate, dt_bias, None, doc, None, mask, True, dt_min, dt_max
    )
    kept_conv, normed, kept_weight = (y.new_empty(0) for _ in range(3))
    if keep:
        kept_conv = conv_out
    del conv_out, x, B, C
    mixed, scale = y.flatten(2), y.new_empty(0, dtype=torch.float32)
    if norm_weight is not None:
        mixed, _, scale = norm._forward(
            mixed, None, z, norm_weight, eps, inner // groups, norm_before_gate, y.dtype
        )
    if out_weight is not None:
        narrowed = narrow(out_weight, mixed.dtype)
        if keep and norm_weight is not None:
            normed = mixed
        if keep and not is_kept(out_weight, mixed.dtype):
            kept_weight = narrowed
        mixed = F.linear(mixed, narrowed, None if out_bias is None else out_bias.to(mixed.dtype))
    elif norm_weight is None:
        mixed = mixed.clone()
    return mixed, y, ungated, scale, kept_conv, normed, kept_weight


@_forward.register_fake
def _(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    groups: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, _width = proj.shape
    heads = dt_bias.shape[0]
    inner = _split(proj, conv_weight, dt_bias).z.shape[-1]
    y = proj.new_empty(batch, length, heads, inner // heads)
    rows = 0 if norm_weight is None else batch * length
    conv_out, normed, narrowed = (proj.new_empty(0) for _ in range(3))
    if options[-1]:
        conv_out = proj.new_empty(batch, length, conv_weight.shape[0])
        if out_weight is not None and norm_weight is not None:
            normed = proj.new_empty(batch, length, inner)
        if out_weight is not None and out_weight.dtype != proj.dtype:
            narrowed = proj.new_empty(out_weight.shape)
    return (
        proj.new_empty(batch, length, inner if out_weight is None else out_weight.shape[0]),
        y,
        y.new_empty(y.shape if norm_weight is None else (0,)),
        proj.new_empty((rows, groups) if rows else (0,), dtype=torch.float32),
        conv_out,
        normed,
        narrowed,
    )


@torch.library.custom_op("ssm_hf::mamba2_mix_bwd", mutates_args=())
def _backward(
    dout: Tensor,
    y: Tensor,
    ungated: Tensor,
    scale: Tensor,
    conv_out: Tensor,
    normed: Tensor,
    narrowed: Tensor,
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    doc: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    counts: Tensor | None,
    groups: int,
    dt_min: float,
    dt_max: float,
    norm_before_gate: bool,
    out_grad: bool,
) -> list[Tensor]:
    """Gradients of the nine tensors from proj to out_bias, empty ones for what is None; of the
    output projection only with `out_grad`."""
    given = (proj, conv_weight, conv_bias, A, D, dt_bias, norm_weight, out_weight, out_bias)
    grads = _empty_grads(given, out_grad)
    dproj, dconv_weight, dconv_bias, dA, dD, ddt_bias, dnorm_weight, dout_weight, dout_bias = grads
    parts, dparts = (_split(t, conv_weight, dt_bias) for t in (proj, dproj))
    heads, inner = dt_bias.shape[0], parts.z.shape[-1]
    empty = proj.new_empty(0)

    dmixed = dout.contiguous()
    rows = dmixed.flatten(0, 1)
    if out_weight is not None:
        dmixed = dmixed @ (narrowed if narrowed.numel() else narrow(out_weight, dmixed.dtype))
    mixed, dy, gate, dgate = y.flatten(2), dmixed, None, empty
    if norm_weight is None:
        gate, dgate = (v.unflatten(-1, (heads, -1)) for v in (parts.z, dparts.z))
    else:
        again = torch.empty_like(mixed) if out_grad and not normed.numel() else None
        dy = torch.empty_like(mixed)
        norm.gradients_into(
            dy, empty, dparts.z, dnorm_weight, again, dmixed, None, mixed, parts.z, norm_weight,
            scale, inner // groups, norm_before_gate,
        )  # fmt: skip
        mixed = normed if again is None else again
        del again
    del dmixed
    if out_grad:
        product_into(dout_weight, rows.t(), mixed.flatten(0, 1))
        if out_bias is not None:
            dout_bias.copy_(rows.sum(dim=0, dtype=torch.float32))
    del mixed

    if not conv_out.numel():
        conv_out = _convolved(parts, conv_weight, conv_bias, doc, order, counts)
    dconv_out = torch.empty_like(conv_out)
    x, B, C = _split_conv(conv_out, inner, heads, groups)
    dx, dB, dC = _split_conv(dconv_out, inner, heads, groups)
    scan.gradients_into(
        [dx, dparts.dt, dA, dB, dC, dD, dgate, ddt_bias, empty],
        dy.view(y.shape), None, ungated, x, parts.dt, A, B, C, D, gate, dt_bias, None, doc, None,
        mask, (True, dt_min, dt_max),
    )  # fmt: skip
    conv.gradients_into(
        dparts.conv_in, dconv_weight, dconv_bias, empty, dconv_out, None, parts.conv_in,
        conv_weight, conv_bias, None, doc, None, order, counts, True,
    )  # fmt: skip
    return grads


def _empty_grads(given: tuple[Tensor | None, ...], out_grad: bool) -> list[Tensor]:
    proj = given[0]
    assert proj is not None
    grads = [proj.new_empty(0) if t is None else t.new_empty(t.shape) for t in given]
    grads[0] = empty_rows(proj, *proj.shape)
    if not out_grad:
        grads[-2:] = [proj.new_empty(0), proj.new_empty(0)]
    return grads


@_backward.register_fake
def _(dout: Tensor, *inputs: Any) -> list[Tensor]:
    return _empty_grads(inputs[6:15], inputs[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (ctx.groups, *ctx.step, _, ctx.norm_before_gate, _) = inputs[:13], inputs[13:]
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 19
    saved = ctx.saved_tensors
    out_grad = any(ctx.needs_input_grad[7:9])
    grads = _backward(dout, *saved, ctx.groups, *ctx.step, ctx.norm_before_gate, out_grad)
    wanted = zip(grads, ctx.needs_input_grad, strict=False)
    return (*(grad if needed else None for grad, needed in wanted), *(None,) * 10)


_forward.register_autograd(_gradients, setup_context=_setup)


def mamba2_mix_triton(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    n_groups: int,
    chunk_size: int,
    dt_limit: tuple[float, float],
    norm_eps: float,
    norm_before_gate: bool,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    real_first: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """As the operators one after another."""
    check_tensors("mamba2_mix", KERNEL_DTYPES, proj=proj, conv_weight=conv_weight,
                  conv_bias=conv_bias, A=A, D=D, dt_bias=dt_bias, norm_weight=norm_weight,
                  out_weight=out_weight, out_bias=out_bias, seq_idx=seq_idx,
                  mask=mask)  # fmt: skip
    order, counts = real_first or (None, None)
    if mask is not None and order is None:
        order, counts = conv.real_first_triton(mask)
    if proj.stride(-1) != 1:
        proj = proj.contiguous()
    return _forward(
        proj, conv_weight, conv_bias, A.contiguous(), D.contiguous(), dt_bias.contiguous(),
        norm_weight, out_weight, out_bias, seq_idx, mask, order, counts, n_groups,
        float(dt_limit[0]), float(dt_limit[1]), norm_eps, norm_before_gate, keeps_activations(),
    )[0]  # fmt: skip
