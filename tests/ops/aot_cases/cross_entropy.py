"""Representative launches of the cross-entropy's kernels."""

from collections.abc import Callable, Iterator

import torch

from ssm_hf.ops import linear_cross_entropy


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    hidden = torch.empty(4, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(50288, 64, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(4, dtype=torch.int64)
    yield "loss", lambda: linear_cross_entropy(hidden, weight, targets, impl="triton").backward()
