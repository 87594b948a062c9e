"""Representative launches of the one-token kernels."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssm_hf.generation.fused import FusedSelection
from ssm_hf.generation.select import Recipe
from ssm_hf.ops.causal_conv1d.step import causal_conv1d_step_
from ssm_hf.ops.norm_linear import norm_linear
from ssm_hf.ops.rows_linear import rows_linear, shares_linear, shares_norm
from ssm_hf.ops.selective_scan.step import mamba1_step
from ssm_hf.ops.ssd.step import mamba2_step


def _bf16(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    channels = 24 * 64 + 256
    mamba2 = {
        "conv_state": _bf16(32, 3, channels),
        "ssm_state": torch.empty(32, 24, 64, 128),
        "tickets": torch.zeros(32, 1, dtype=torch.int32),
        "conv_weight": _bf16(channels, 4),
        "conv_bias": _bf16(channels),
        "dt_bias": torch.empty(24),
        "A_log": torch.empty(24),
        "D": torch.empty(24),
        "n_groups": 1,
        "impl": "triton",
    }
    proj = _bf16(32, 1536 + channels + 24)
    yield "mamba2", lambda: mamba2_step(proj, **mamba2, norm_weight=_bf16(1536), norm_eps=1e-5)
    wide = _bf16(32, 64 + 1536 + channels + 24)
    late = {"norm_weight": _bf16(1536), "norm_eps": 1e-5, "norm_before_gate": True}
    yield "mamba2-gated-mlp", lambda: mamba2_step(wide, **mamba2, **late)
    normed = {**mamba2, "norm_weight": _bf16(1536), "norm_eps": 1e-5, "convolved": True}
    yield "mamba2-convolved", lambda: mamba2_step(proj.float(), **normed)

    after = {**mamba2, "convolved": True, "overlap": True}
    yield "mamba2-overlapping", lambda: mamba2_step(proj.float(), **after)

    many = {n: t for n, t in after.items() if n not in ("conv_state", "ssm_state", "tickets")}
    many |= {"conv_state": _bf16(256, 3, channels), "ssm_state": _bf16(256, 24, 64, 128)}
    many["tickets"] = torch.zeros(256, 1, dtype=torch.int32)
    rows = torch.empty(256, proj.shape[1])
    yield "mamba2-many-rows", lambda: mamba2_step(rows, **many)

    x, z = _bf16(8, 2 * 1536).chunk(2, dim=1)
    dt, B, C = _bf16(8, 80).split([48, 16, 16], dim=1)
    mamba1 = {"A_log": torch.empty(1536, 16), "D": torch.empty(1536), "impl": "triton"}
    state, low_rank = torch.empty(8, 1536, 16), {"dt_weight": _bf16(1536, 48)}
    low_rank["dt_bias"] = _bf16(1536)
    yield "mamba1-low-rank", lambda: mamba1_step(x, dt, B, C, z, state, **mamba1, **low_rank)
    yield "mamba1", lambda: mamba1_step(x, torch.empty(8, 1536), B, C, z, state, **mamba1)

    window, taps = _bf16(8, 3, 1536), _bf16(1536, 4)
    yield "conv", lambda: causal_conv1d_step_(x, window, taps, None, impl="triton")

    def linear(rows: int) -> None:
        conv = {"conv_state": _bf16(rows, 3, 1792), "conv_weight": _bf16(1792, 4)}
        norm = {"norm_weight": _bf16(768), "eps": 1e-5, "impl": "triton"}
        norm_linear(torch.empty(rows, 768), _bf16(3352, 768), **conv, **norm, conv_first=1536)
        norm_linear(torch.empty(rows, 768), _bf16(768, 768), residual=torch.empty(rows, 768),
                    **norm)  # fmt: skip
        norm_linear(torch.empty(rows, 3072), _bf16(768, 1536), gated=True,
                    residual=torch.empty(rows, 768), impl="triton")  # fmt: skip

    yield "norm_linear-1", lambda: linear(1)
    row, head = torch.empty(1, 1024), _bf16(10000, 1024)
    yield "norm_linear-walked", lambda: norm_linear(row, head, impl="triton")
    recipe = Recipe(True, 1.2, 0.9, 50, 0.9, 0.1, (1, 2), 0, (1,))
    logits = torch.empty(8, 50288)

    def choose(recipe: Recipe) -> None:
        FusedSelection(recipe, 8, 50288, logits.device).choose(logits)

    yield "choose-greedy", lambda: choose(Recipe())
    yield "choose-all", lambda: choose(recipe)
    yield "choose-top-p", lambda: choose(Recipe(sample=True, top_p=0.9))

    def some_rows() -> None:
        conv = {"conv_state": _bf16(64, 3, 1792), "conv_weight": _bf16(1792, 4)}
        x, squares = _bf16(64, 1536), torch.empty(64, 8)
        rows_linear(_bf16(64, 768), _bf16(3352, 768), **conv, conv_first=1536, impl="triton")
        shares = rows_linear(x, _bf16(768, 1536), squares=squares, shares=True, impl="triton")
        shares_norm(shares, torch.empty(64, 768), _bf16(768), eps=1e-5, dtype=torch.bfloat16,
                    impl="triton")  # fmt: skip
        shares = rows_linear(x, _bf16(80, 1536), shares=True, impl="triton")
        shares_linear(shares, _bf16(1536, 48), impl="triton")

    yield "rows_linear", some_rows
