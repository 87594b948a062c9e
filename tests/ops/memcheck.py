"""Small odd shapes of every operator, for a tool that watches each access to memory.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m tests.ops.memcheck [OPERATOR ...]

Without torch's caching every tensor is an allocation of its own, so that an access one element
beyond it is seen.
"""

import functools
import sys

import torch

from ssm_hf.ops.interval_attention import interval_attention, interval_attention_step
from ssm_hf.ops.moe import moe_experts, moe_route
from ssm_hf.ops.norm_linear import MOST_ROWS, norm_linear
from ssm_hf.ops.rows_linear import rows_linear, shares_linear, shares_norm
from ssm_hf.ops.selective_scan.step import mamba1_step
from ssm_hf.ops.ssd.step import mamba2_step, squares_of_rows
from tests.ops import grid
from tests.ops.grid_operators import KERNELS
from tests.ops.pairwise import FACTORS, TRAINING

SHAPES = {"B": 2, "N": 16, "G": 2, "P": 32}


def rows(operator: str) -> list[grid.Row]:
    """Lengths around a block's edge, and one long enough for rows to be cut into segments, with
    every kind of packing, padding and state."""
    factors = FACTORS if operator.removesuffix("_kept") in KERNELS else TRAINING
    flags = [
        name for name, values in factors.items() if isinstance(values[-1], bool) and any(values)
    ]
    found = []
    for T in (1, 63, 65, 130, 1030):
        for packing in factors["packing"]:
            for full in (False, True):
                row = {**SHAPES, "T": T, "packing": packing, "dtype": "bfloat16"}
                row |= {"initial_state": False, **dict.fromkeys(flags, full)}
                found.append({**row, "B": 1} if packing == "cu_seqlens" else row)
    # Sizes that fill no block, in fp32.
    found.append({**found[-1], "N": 24, "P": 40, "T": 67, "dtype": "float32"})
    return found


# tokens, D, I, E, k, dtype: one token, experts without any, sizes that fill no block, many slots.
EXPERTS = (
    (1, 64, 64, 4, 2, torch.bfloat16),
    (3, 64, 64, 40, 1, torch.bfloat16),
    (200, 72, 104, 5, 3, torch.float16),
    (67, 20, 24, 3, 2, torch.float32),
    (3000, 64, 128, 6, 2, torch.bfloat16),
)


def experts(device: torch.device) -> None:
    """Routing and experts, which have no sequence; every third token is a pad."""
    for tokens, size, inner, count, top_k, dtype in EXPERTS:
        for activation, gated in (("silu", True), ("relu2", False)):
            shapes = ((tokens, size), (count, inner * (1 + gated), size), (count, size, inner))
            x, w_in, w_out = (torch.randn(s, device=device, dtype=dtype) / 8 for s in shapes)
            logits = torch.randn(tokens, count, device=device, requires_grad=True)
            mask = torch.arange(tokens, device=device) % 3 != 1
            for grad in (False, True):
                for leaf in (x, w_in, w_out):
                    leaf.requires_grad_(grad)
                with torch.set_grad_enabled(grad):
                    routing = moe_route(logits, top_k, mask=mask, impl="triton")
                    y = moe_experts(x, routing.experts, routing.weights, w_in, w_out,
                                    activation=activation, gated=gated, impl="triton")  # fmt: skip
            y.float().square().sum().backward()
    torch.cuda.synchronize()
    print(f"moe_experts: {2 * len(EXPERTS)} forward and backward passes", flush=True)


# queries, keys, H, G, d, dtype: sizes that fill no block, heads that share keys.
ATTENTION = ((67, 70, 4, 2, 40, torch.bfloat16), (1, 130, 3, 3, 20, torch.float32))
# rows, keys, H, G, d, dtype of a token: one head a group and several, keys shared out and not.
TOKENS = ((1, 1030, 3, 3, 64, torch.bfloat16), (2, 37, 2, 2, 128, torch.bfloat16),
          (3, 300, 5, 5, 72, torch.float32), (2, 515, 6, 2, 64, torch.bfloat16))  # fmt: skip


def attention(device: torch.device) -> None:
    """Intervals that reach beyond the keys, some of them empty; steps at both ends of a cache."""
    for queries, keys, heads, groups, size, dtype in ATTENTION:
        q = torch.randn(2, queries, heads, size, device=device, dtype=dtype, requires_grad=True)
        k, v = torch.randn(2, 2, keys, groups, size, device=device, dtype=dtype)
        low = torch.randint(-5, keys + 5, (2, queries), device=device)
        high = low + torch.randint(-5, keys, low.shape, device=device)
        order = torch.rand(2, queries, device=device).argsort(dim=1)
        mask = torch.rand(2, keys, device=device) > 0.3
        for options in ({}, {"key_mask": mask}, {"places": order}):
            leaves = [q, k.requires_grad_(), v.requires_grad_()]
            interval_attention(*leaves, low, high, **options, impl="triton").sum().backward()
        cache = torch.zeros(2, 2, keys, groups, size, device=device, dtype=dtype)
        length = torch.tensor([keys - 1, 3 * keys], device=device)
        interval_attention_step(q[:, 0].detach(), k[:, 0].detach(), v[:, 0].detach(), *cache,
                                length, impl="triton")  # fmt: skip
    for rows, keys, heads, groups, size, dtype in TOKENS:
        draw = functools.partial(torch.randn, device=device, dtype=dtype)
        k_cache, v_cache = (draw(rows, keys, groups, size) for _ in range(2))
        even = torch.arange(rows, device=device) % 2 == 0
        for seen in (0, 20, keys - 1, keys, 2 * keys + 5):
            length = torch.full((rows,), seen, device=device)
            options = {"first": length // 3, "attend": even, "store": even}
            for more in ({}, {"window": min(keys, 30)}, options):
                new_q, new_k, new_v = (draw(rows, n, size) for n in (heads, groups, groups))
                interval_attention_step(new_q, new_k, new_v, k_cache, v_cache, length, **more,
                                        impl="triton")  # fmt: skip
    torch.cuda.synchronize()
    print(f"interval_attention: {4 * len(ATTENTION) + 15 * len(TOKENS)} calls", flush=True)


# rows, K, O, convolved channels and the first of them, width of groups.
LINEAR = ((1, 300, 37, 21, 9, 75), (3, 300, 37, 21, 9, 75), (37, 192, 150, 100, 30, 64),
          (61, 768, 3352, 1792, 1536, 768), (64, 1536, 80, 16, 0, 512))  # fmt: skip
# rows, heads, channels of a head, states, groups: the last ones walk through tiles of the state.
STEPS = ((3, 3, 40, 24, 1), (64, 24, 64, 128, 1), (61, 24, 64, 100, 2), (64, 20, 48, 70, 4))


def linear_steps(device: torch.device) -> None:
    """The products of a decoding step with their neighbours."""
    for dtype in (torch.bfloat16, torch.float32):
        draw = functools.partial(torch.randn, device=device, dtype=dtype)
        for rows, size, outputs, channels, first, width in LINEAR:
            weight, norm = draw(outputs, size) / 8, draw(size)
            conv = {"conv_state": draw(rows, 3, channels), "conv_weight": draw(channels, 4),
                    "conv_bias": draw(channels), "conv_first": first}  # fmt: skip
            x, residual = draw(rows, size), draw(rows, outputs)
            if rows <= MOST_ROWS:
                norm_linear(x, weight, norm_weight=norm, eps=1e-5, **conv, impl="triton")
                norm_linear(x, weight, norm_weight=norm, eps=1e-5, group_size=width,
                            residual=residual, impl="triton")  # fmt: skip
                norm_linear(draw(rows, 2 * size), weight, draw(outputs), gated=True, impl="triton")
            elif dtype == torch.bfloat16:
                squares = torch.rand(rows, 5, device=device)
                rows_linear(x, weight, draw(outputs), squares=squares, **conv, impl="triton")
                shares = rows_linear(x, weight, squares=squares, shares=True, impl="triton")
                shares_linear(shares, draw(width, min(outputs, 48) - 11), impl="triton")
                shares_norm(shares, residual.float(), draw(outputs), eps=1e-5, dtype=dtype,
                            impl="triton")  # fmt: skip
    torch.cuda.synchronize()
    print(f"linear_steps: {len(LINEAR)} shapes", flush=True)


def mamba_steps(device: torch.device) -> None:
    """What stands between the projections of a decoding step."""
    for state_dtype in (torch.float32, torch.bfloat16):
        draw = functools.partial(torch.randn, device=device)
        for rows, heads, size, states, groups in STEPS:
            width = heads * size
            channels = width + 2 * groups * states
            for per_channel, convolved in ((False, True), (True, True), (False, False)):
                state = draw(rows, heads, size, states, dtype=state_dtype)
                sums = squares_of_rows(state, groups) if convolved and groups == 1 else 0
                squares = torch.empty(rows, sums, device=device) if sums else None
                mamba2_step(
                    draw(rows, width + channels + heads), draw(rows, 3, channels),
                    state, torch.zeros(rows, groups, dtype=torch.int32, device=device),
                    conv_weight=draw(channels, 4), conv_bias=draw(channels), dt_bias=draw(heads),
                    A_log=draw(heads), D=draw(width if per_channel else heads), n_groups=groups,
                    norm_weight=draw(width) if sums or not convolved else None, norm_eps=1e-5,
                    convolved=convolved, squares=squares, impl="triton",
                )  # fmt: skip
            rank = size - 3
            low = draw(rows, rank + 2 * states)
            dt, B, C = low.split([rank, states, states], dim=1)
            x, z = draw(rows, 2 * width).chunk(2, dim=1)
            mamba1_step(x, dt, B, C, z, draw(rows, width, states, dtype=state_dtype),
                        A_log=draw(width, states), D=draw(width), dt_weight=draw(width, rank),
                        dt_bias=draw(width), impl="triton")  # fmt: skip
    torch.cuda.synchronize()
    print(f"mamba_steps: {8 * len(STEPS)} calls", flush=True)


# Operators that are not on the grid.
OTHERS = {
    "moe_experts": experts,
    "interval_attention": attention,
    "linear_steps": linear_steps,
    "mamba_steps": mamba_steps,
}


def main() -> None:
    device = torch.device("cuda")
    names = sys.argv[1:] or [*OTHERS, *grid.OPERATORS]
    for operator in (name for name in names if name in OTHERS):
        OTHERS[operator](device)
    for operator in (name for name in names if name not in OTHERS):
        op = grid.OPERATORS[operator]
        kernel = functools.partial(grid.call, op.run, impl="triton")
        for row in rows(operator):
            grid.evaluate(kernel, grid.draw(operator, row, device))
        torch.cuda.synchronize()
        print(f"{operator}: {len(rows(operator))} forward and backward passes", flush=True)


if __name__ == "__main__":
    main()
