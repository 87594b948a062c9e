"""Experts by torch's own grouped matrix product."""

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops.moe.reference import activate
from ssm_hf.ops.packing import compute_dtype

# (x (S, K), w (E, K, N), offs (E,) int32, the end of each expert's rows) -> (S, N). Public since
# torch 2.10; before, on a CPU, it wants pointers that weights from a file may not have.
_GROUPED_MM: Any = getattr(torch.nn.functional, "grouped_mm", None)


def why_not_grouped(x: Tensor, w_in: Tensor, w_out: Tensor, dtype: torch.dtype) -> str | None:
    """Why torch's grouped product cannot take these; None when it can."""
    if _GROUPED_MM is None:
        return f"torch {torch.__version__} has no grouped_mm: it came with torch 2.10"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"grouped_mm takes float32, float16 and bfloat16, got {dtype}"
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        return f"torch.compile knows grouped_mm in bfloat16 alone, got {dtype}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "grouped_mm needs a GPU of compute capability 8.0 or more"
    strides = (w_in.shape[1], w_in.shape[2], w_out.shape[1], w_out.shape[2])
    unit = 16 // dtype.itemsize
    if any(s % unit for s in strides):
        return f"grouped_mm needs sizes that are multiples of {unit}, got {strides}"
    return None


def experts_grouped(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens sorted by expert, then one grouped product each way; gradients by autograd."""
    (tokens, top_k), num_experts = experts.shape, w_in.shape[0]
    flat, order = experts.flatten().sort(stable=True)
    number = torch.arange(num_experts, device=flat.device)
    ends = torch.searchsorted(flat, number, right=True).to(torch.int32)
    # Rows behind the last expert's, those of pads, are not computed: they hold whatever was there.
    real = (flat < num_experts)[:, None]
    rows = x.to(dtype)[order // top_k]
    rows = torch.where(real, rows, 0)
    pre = _GROUPED_MM(rows, w_in.to(dtype).transpose(1, 2), offs=ends)
    h = activate(torch.where(real, pre, 0), activation, gated)
    out = _GROUPED_MM(h, w_out.to(dtype).transpose(1, 2), offs=ends)
    out = torch.where(real, out, 0)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    out = out[place].view(tokens, top_k, w_out.shape[1])
    wide = compute_dtype(x, weights, w_in)
    return (out.to(wide) * weights.to(wide)[..., None]).sum(dim=1).to(dtype)
