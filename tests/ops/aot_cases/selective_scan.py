"""Representative launches of the kernels of Mamba-1's scan."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssm_hf.ops import selective_scan


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    def run(dtype: torch.dtype, length: int, inner: int, states: int, **options: object) -> None:
        wide = leaf(1, length, 2 * inner, dtype=dtype)
        low = leaf(1, length, 2 * states, dtype=dtype)
        x, z = wide.chunk(2, dim=-1)
        B, C = low.chunk(2, dim=-1)
        dt = leaf(1, length, inner, dtype=dtype)
        A, D, bias = leaf(inner, states), leaf(inner), leaf(inner)
        y = selective_scan(
            x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, impl="triton", **options
        )
        y.sum().backward()

    # Long and narrow, so that rows are cut into segments.
    yield "training", lambda: run(torch.bfloat16, 4096, 32, 16)

    def packed() -> None:
        cu_seqlens = torch.tensor([0, 100, 1000])
        run(torch.float32, 1000, 64, 64, cu_seqlens=cu_seqlens, initial_state=leaf(2, 64, 64))

    yield "documents", packed
    # Arguments equal to 1 become constants: one channel, one state, one token.
    yield "ones", lambda: run(torch.float32, 1, 1, 1)
    yield "ones-long", lambda: run(torch.float32, 4096, 1, 1)
