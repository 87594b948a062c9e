"""Representative launches of the norm's kernels."""

from collections.abc import Callable, Iterator

import torch

from ssm_hf.ops import add_rms_norm, rms_norm


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    wide = torch.empty(64, 3352, dtype=torch.bfloat16, requires_grad=True)
    x, gate = wide[:, :1536], wide[:, 1536:3072]
    weight = torch.empty(1536, requires_grad=True)

    def gated() -> None:
        rms_norm(x, weight, eps=1e-5, gate=gate, group_size=192, impl="triton").sum().backward()

    yield "gated, grouped", gated
    stream = torch.empty(64, 1536, requires_grad=True)

    def added() -> None:
        y, total = add_rms_norm(x, stream, weight, eps=1e-5, impl="triton")
        (y.sum() + total.sum()).backward()

    yield "added", added
    huge = torch.empty(4, 20000, dtype=torch.bfloat16, requires_grad=True)
    one = torch.empty(20000, dtype=torch.bfloat16, requires_grad=True)

    def walked() -> None:
        rms_norm(
            huge, one, eps=1e-5, gate=huge, norm_before_gate=True, impl="triton"
        ).sum().backward()

    yield "wider than a tile", walked
