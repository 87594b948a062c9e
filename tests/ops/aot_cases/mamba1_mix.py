"""Representative launches of what lies between the outer projections of a Mamba-1 mixer."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssm_hf.ops.dispatch import keep_activations
from ssm_hf.ops.mamba1_mix import mamba1_mix


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    def run(batch: int, length: int, inner: int, states: int, rank: int) -> None:
        y = mamba1_mix(
            _leaf(batch, length, 2 * inner, dtype=torch.bfloat16),
            _leaf(inner, 4),
            _leaf(inner),
            _leaf(rank + 2 * states, inner),
            _leaf(inner, rank),
            _leaf(inner),
            _leaf(inner, states),
            _leaf(inner),
            _leaf(8, inner),
            impl="triton",
        )
        y.sum().backward()

    def kept() -> None:
        with keep_activations():
            run(8, 256, 1536, 16, 48)

    yield "training", lambda: run(8, 256, 1536, 16, 48)
    yield "training, kept", kept
