"""The one-token kernels as a torch operator."""

from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops import launch as common
from ssm_hf.ops.interval_attention.kernels_step import (
    interval_attention_step_kernel,
    interval_attention_step_sum_kernel,
)
from ssm_hf.ops.launch import KERNEL_DTYPES, call, check_tensors, on_device, power_of_two, tuned

# Triton's annotations do not know that plain values may stand for constants.
_step_kernel: Any = interval_attention_step_kernel
_sum_kernel: Any = interval_attention_step_sum_kernel

_MOST_SPLITS = 128


@torch.library.custom_op("ssm_hf::interval_attention_step", mutates_args=("keys", "values"))
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    first: Tensor | None,
    attend: Tensor | None,
    store: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    batch, slots, groups, head_dim = keys.shape
    heads = q.shape[1]
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    length = length.contiguous()
    first, attend, store = (None if t is None else t.contiguous() for t in (first, attend, store))
    y = q.new_empty(q.shape)
    if q.numel() == 0:
        return y
    per_group, block_d = heads // groups, max(16, power_of_two(head_dim))
    # A group's only head has little to do for each key: many small programs read faster.
    size = "alone" if per_group == 1 else "grouped"
    options: dict[str, Any] = dict(tuned("interval_attention_step", size, q.device))
    at_once = min(options.pop("HEADS"), power_of_two(per_group))
    # One head leaves room for more keys at a time.
    block_n = max(options.pop("TILE") // (block_d * at_once), 4)
    programs = batch * groups * -(-per_group // at_once)
    wanted = options.pop("PROGRAMS") * common.processors(q.device) // programs
    splits = min(
        power_of_two(max(wanted, 1) + 1) // 2, power_of_two(-(-window // block_n)), _MOST_SPLITS
    )
    parts = tops = totals = None
    if splits > 1:
        parts = q.new_empty(batch, heads, splits, head_dim, dtype=torch.float32)
        tops = q.new_empty(batch, heads, splits, dtype=torch.float32)
        totals = torch.empty_like(tops)
    with on_device(q):
        _step_kernel[(programs * splits,)](
            q, k, v, keys, values, length, first, attend, store, y, parts, tops, totals,
            slots, heads, groups, per_group, head_dim, window, scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            HAS_FIRST=first is not None, HAS_ATTEND=attend is not None,
            HAS_STORE=store is not None, SPLITS=splits, HEADS=at_once, BLOCK_N=block_n,
            BLOCK_D=block_d, **options,
        )  # fmt: skip
        if splits > 1:
            _sum_kernel[(batch * heads,)](
                parts, tops, totals, attend, y, heads, head_dim,
                HAS_ATTEND=attend is not None, SPLITS=splits, BLOCK_D=block_d,
                **tuned("interval_attention_step_sum", "default", q.device),
            )  # fmt: skip
    return y


@_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    first: Tensor | None,
    attend: Tensor | None,
    store: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.no_grad()
def interval_attention_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    first: Tensor | None,
    attend: Tensor | None,
    store: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """As `interval_attention_step_torch`, in one launch, or two where the keys are shared out."""
    check_tensors(
        "interval_attention_step",
        KERNEL_DTYPES,
        q=q,
        k=k,
        v=v,
        keys=keys,
        values=values,
        length=length,
        first=first,
        attend=attend,
        store=store,
    )
    return call(_step, q, k, v, keys, values, length, first, attend, store, window, scale)
