"""Representative launches of the residual norm with the projection behind it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssm_hf.ops.norm_proj import norm_proj


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    def run() -> None:
        y, total = norm_proj(
            _leaf(2, 64, 768, dtype=torch.bfloat16),
            _leaf(2, 64, 768),
            _leaf(768),
            _leaf(16, 768),
            eps=1e-5,
            dtype=torch.bfloat16,
            impl="triton",
        )
        (y.float().sum() + total.sum()).backward()

    yield "training", run
