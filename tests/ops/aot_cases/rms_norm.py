"""Representative launches of the norm's kernels."""

from collections.abc import Callable, Iterator

import torch

from ssm_hf.ops import rms_norm


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    x = torch.empty(64, 768, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(768, requires_grad=True)

    def plain() -> None:
        rms_norm(x, weight, eps=1e-5, impl="triton").sum().backward()

    yield "plain", plain
