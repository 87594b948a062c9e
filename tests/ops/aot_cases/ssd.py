"""Representative launches of the kernels of Mamba-2's scan."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssm_hf.ops import ssd


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    def run(
        dtype: torch.dtype,
        batch: int,
        length: int,
        heads: int,
        head_dim: int,
        states: int,
        **options: object,
    ) -> None:
        x = _leaf(batch, length, heads, head_dim, dtype=dtype)
        dt = _leaf(batch, length, heads, dtype=dtype)
        B, C = (_leaf(batch, length, 1, states, dtype=dtype) for _ in range(2))
        A, D, bias = (_leaf(heads) for _ in range(3))
        y = ssd(x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, impl="triton", **options)
        y.sum().backward()

    bf16, fp32 = torch.bfloat16, torch.float32
    yield "training", lambda: run(bf16, 8, 2048, 24, 64, 128)

    def packed() -> None:
        cu_seqlens = torch.tensor([0, 100, 1000])
        run(bf16, 1, 1000, 4, 64, 128, cu_seqlens=cu_seqlens, initial_state=_leaf(2, 4, 64, 128))

    yield "documents", packed
    # More states than a program of the forward pass takes.
    yield "states", lambda: run(bf16, 2, 300, 4, 32, 256)
    # One row, chunk and head: launches take such numbers for constants.
    yield "ones", lambda: run(bf16, 1, 1, 1, 64, 128)
    yield "fp32", lambda: run(fp32, 1, 300, 2, 64, 64)
