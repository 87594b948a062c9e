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

SHAPES = {"B": 2, "N": 16, "G": 2, "P": 32}


def rows() -> list[grid.Row]:
    """Lengths around a block's edge, with every kind of packing, padding and state."""
    found = []
    for T in (1, 63, 65, 130):
        for packing in ("none", "seq_idx", "cu_seqlens"):
            for full in (False, True):
                row = {**SHAPES, "T": T, "packing": packing, "dtype": "bfloat16"}
                row |= dict.fromkeys(("mask", "initial_state", "extras"), full)
                found.append({**row, "B": 1} if packing == "cu_seqlens" else row)
    # Sizes that fill no block, in fp32.
    found.append({**found[-1], "N": 24, "P": 40, "T": 67, "dtype": "float32"})
    return found


def main() -> None:
    device = torch.device("cuda")
    for operator in sys.argv[1:] or grid.OPERATORS:
        op = grid.OPERATORS[operator]
        kernel = functools.partial(grid.call, op.run, impl="triton")
        for row in rows():
            grid.evaluate(kernel, grid.draw(operator, row, device))
        torch.cuda.synchronize()
        print(f"{operator}: {len(rows())} forward and backward passes", flush=True)


if __name__ == "__main__":
    main()
