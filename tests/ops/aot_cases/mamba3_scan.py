"""Representative launches of the kernels of Mamba-3's scan."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops import mamba3_scan
from ssm_hf.ops.mamba3_scan import Mamba3State
from ssm_hf.ops.mamba3_scan.step import mamba3_mix_step


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    def run(
        dtype: torch.dtype,
        batch: int,
        length: int,
        heads: int,
        ranks: int = 1,
        states: int = 128,
        documents: int = 0,
        **options: Any,
    ) -> None:
        x, z = (_leaf(batch, length, heads, 64, dtype=dtype) for _ in range(2))
        dt, trap = (_leaf(batch, length, heads, dtype=dtype) for _ in range(2))
        B, C = (_leaf(batch, length, ranks, 1, states, dtype=dtype) for _ in range(2))
        angles = _leaf(batch, length, states // 4, dtype=dtype)
        weights: dict[str, Any] = {
            name: _leaf(heads, ranks, states) for name in ("B_bias", "C_bias")
        }
        if ranks > 1:
            weights |= {name: _leaf(heads, ranks, 64) for name in ("mimo_x", "mimo_z", "mimo_o")}
        state = None
        if documents:
            state = Mamba3State(
                _leaf(documents, heads, states // 4), _leaf(documents, heads, 64, states),
                _leaf(documents, ranks, heads, states), _leaf(documents, heads, 64),
            )  # fmt: skip
        y: Any = mamba3_scan(
            x, dt, _leaf(batch, length, heads), trap, B, C, angles, _leaf(heads), z, **weights,
            dt_bias=_leaf(heads), dt_softplus=True, initial_state=state, impl="triton", **options,
        )  # fmt: skip
        y.sum().backward()

    bf16, fp32 = torch.bfloat16, torch.float32
    yield "training", lambda: run(bf16, 8, 2048, 64)
    yield "mimo", lambda: run(bf16, 8, 2048, 64, 4)

    def packed() -> None:
        cu_seqlens = torch.tensor([0, 100, 1000])
        run(bf16, 1, 1000, 4, cu_seqlens=cu_seqlens, documents=2)

    yield "documents", packed
    yield "segments", lambda: run(bf16, 1, 8192, 4)
    # One row, chunk and head: launches take such numbers for constants.
    yield "ones", lambda: run(bf16, 1, 1, 1)
    yield "fp32", lambda: run(fp32, 1, 300, 2, states=64)

    def step(ranks: int) -> None:
        def bf16(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.bfloat16)

        states = (torch.empty(8, 64, 32), torch.empty(8, 64, 64, 128), bf16(8, ranks, 64, 128),
                  bf16(8, 64, 64))  # fmt: skip
        weights: dict[str, Any] = {"B_norm_weight": bf16(128), "C_norm_weight": bf16(128)}
        weights |= {name: torch.empty(64, ranks, 128) for name in ("B_bias", "C_bias")}
        if ranks > 1:
            names = ("mimo_x", "mimo_z", "mimo_o")
            weights |= {name: torch.empty(64, ranks, 64) for name in names}
        proj = bf16(8, 2 * 4096 + 2 * ranks * 128 + 3 * 64 + 32)
        mamba3_mix_step(
            proj, *states, torch.zeros(8, 64, dtype=torch.int32), **weights, norm_eps=1e-5,
            dt_bias=torch.empty(64), D=torch.empty(64), n_groups=1, overlap=True, impl="triton",
        )  # fmt: skip

    yield "step", lambda: step(1)
    yield "step-mimo", lambda: step(4)
