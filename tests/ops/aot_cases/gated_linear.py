"""Representative launches of the gated product with the projection behind it."""

from collections.abc import Callable, Iterator

import torch

from ssm_hf.ops.gated_linear import gated_linear


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    def run() -> None:
        u = torch.empty(2, 64, 3072, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(768, 1536, requires_grad=True)
        gated_linear(u, weight, impl="triton").float().sum().backward()

    yield "training", run
