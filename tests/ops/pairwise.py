"""A short list of combinations in which every pair of values of two factors occurs.

python -m tests.ops.pairwise > tests/ops/grid.json
"""

import json
from itertools import combinations
from typing import Any

FACTORS: dict[str, tuple[Any, ...]] = {
    "T": (1, 2, 63, 64, 65, 1000, 4097),
    "N": (16, 64, 128, 256),
    "B": (1, 3, 8),
    "G": (1, 2, 8),
    "P": (32, 64, 128),
    "packing": ("none", "seq_idx", "cu_seqlens"),
    "dtype": ("float32", "bfloat16"),
    "mask": (False, True),
    "initial_state": (False, True),
    "extras": (False, True),
}
Row = dict[str, Any]


def possible(row: Row) -> bool:
    """`cu_seqlens` describes documents of one row."""
    return row.get("packing") != "cu_seqlens" or row.get("B", 1) == 1


def _pairs(row: Row) -> set[tuple[Any, ...]]:
    names = [n for n in FACTORS if n in row]
    return {(a, row[a], b, row[b]) for a, b in combinations(names, 2)}


def covering_list() -> list[Row]:
    """Row by row: start from a pair that is missing, then take the value that covers most pairs.

    Ties go to the value used least so far, then to the first, so that the list is always the same.
    """
    missing = [
        (a, x, b, y)
        for a, b in combinations(FACTORS, 2)
        for x in FACTORS[a]
        for y in FACTORS[b]
        if possible({a: x, b: y})
    ]
    left, rows = set(missing), []
    used = {(name, value): 0 for name, values in FACTORS.items() for value in values}
    while left:
        a, x, b, y = next(pair for pair in missing if pair in left)
        row: Row = {a: x, b: y}
        for name, values in FACTORS.items():
            if name in row:
                continue
            candidates = [v for v in values if possible({**row, name: v})]
            row[name] = max(
                candidates,
                key=lambda v: (len(_pairs({**row, name: v}) & left), -used[name, v]),
            )
        row = {name: row[name] for name in FACTORS}
        for item in row.items():
            used[item] += 1
        left -= _pairs(row)
        rows.append(row)
    return rows


if __name__ == "__main__":
    print("[\n " + ",\n ".join(json.dumps(row) for row in covering_list()) + "\n]")
