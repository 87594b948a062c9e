"""Small odd shapes of every operator, for a tool that watches each access to memory.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m tests.ops.memcheck [OPERATOR ...]

Without torch's caching every tensor is an allocation of its own, so that an access one element
beyond it is seen.
"""

import functools
import sys

import torch

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


def main() -> None:
    device = torch.device("cuda")
    for operator in sys.argv[1:] or grid.OPERATORS:
        op = grid.OPERATORS[operator]
        kernel = functools.partial(grid.call, op.run, impl="triton")
        for row in rows(operator):
            grid.evaluate(kernel, grid.draw(operator, row, device))
        torch.cuda.synchronize()
        print(f"{operator}: {len(rows(operator))} forward and backward passes", flush=True)


if __name__ == "__main__":
    main()
