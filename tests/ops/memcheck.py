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
from tests.ops import grid
from tests.ops.grid_operators import KERNELS
from tests.ops.pairwise import FACTORS, TRAINING

SHAPES = {"B": 2, "N": 16, "G": 2, "P": 32}


def rows(operator: str) -> list[grid.Row]:
    """Lengths around a block's edge, with every kind of packing, padding and state."""
    factors = FACTORS if operator in KERNELS else TRAINING
    flags = [
        name for name, values in factors.items() if isinstance(values[-1], bool) and any(values)
    ]
    found = []
    for T in (1, 63, 65, 130):
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
    torch.cuda.synchronize()
    print(f"interval_attention: {4 * len(ATTENTION)} calls", flush=True)


# Operators that are not on the grid.
OTHERS = {"moe_experts": experts, "interval_attention": attention}


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
