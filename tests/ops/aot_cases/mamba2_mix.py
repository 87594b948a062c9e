"""Representative launches of what lies between the projections of a Mamba-2 mixer."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssm_hf.ops.mamba2_mix import mamba2_mix


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    def run(batch: int, length: int, heads: int, head_dim: int, states: int, norm: bool) -> None:
        inner = heads * head_dim
        channels = inner + 2 * states
        y = mamba2_mix(
            _leaf(batch, length, inner + channels + heads, dtype=torch.bfloat16),
            _leaf(channels, 4),
            _leaf(channels),
            _leaf(heads),
            _leaf(heads),
            _leaf(heads),
            _leaf(inner) if norm else None,
            _leaf(8, inner),
            n_groups=1,
            impl="triton",
        )
        y.sum().backward()

    yield "training", lambda: run(1, 128, 24, 64, 128, True)
    yield "no norm", lambda: run(1, 100, 2, 64, 64, False)
