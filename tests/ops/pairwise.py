"""A short list of combinations in which every pair of values of two factors occurs.

python -m tests.ops.pairwise   writes the lists beside this file
"""

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
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
# Of the operators that are made of several kernels, which have none for documents' states.
TRAINING: dict[str, tuple[Any, ...]] = {
    "T": (1, 2, 63, 65, 300, 1030),
    "N": (16, 64, 128),
    "B": (1, 3),
    "G": (1, 2),
    "P": (32, 64),
    "packing": ("none", "seq_idx"),
    "dtype": ("float32", "bfloat16"),
    "mask": (False, True),
    "initial_state": (False,),
    "extras": (False, True),
    "norm": (True, False),
    "out": (True, False),
    "wide": (False, True),
}
LISTS = {"grid.json": FACTORS, "grid_training.json": TRAINING}
Row = dict[str, Any]


def possible(row: Row) -> bool:
    """`cu_seqlens` describes documents of one row."""
    return row.get("packing") != "cu_seqlens" or row.get("B", 1) == 1


def _pairs(row: Row, names: Mapping[str, object]) -> set[tuple[Any, ...]]:
    return {(a, row[a], b, row[b]) for a, b in combinations([n for n in names if n in row], 2)}


def covering_list(factors: Mapping[str, tuple[Any, ...]]) -> list[Row]:
    """Row by row: start from a pair that is missing, then take the value that covers most pairs.

    Ties go to the value used least so far, then to the first, so that the list is always the same.
    """
    missing = [
        (a, x, b, y)
        for a, b in combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
        if possible({a: x, b: y})
    ]
    left, rows = set(missing), []
    used = {(name, value): 0 for name, values in factors.items() for value in values}
    while left:
        a, x, b, y = next(pair for pair in missing if pair in left)
        row: Row = {a: x, b: y}
        for name, values in factors.items():
            if name in row:
                continue
            candidates = [v for v in values if possible({**row, name: v})]
            row[name] = max(
                candidates,
                key=lambda v: (len(_pairs({**row, name: v}, factors) & left), -used[name, v]),
            )
        row = {name: row[name] for name in factors}
        for item in row.items():
            used[item] += 1
        left -= _pairs(row, factors)
        rows.append(row)
    return rows


if __name__ == "__main__":
    for name, factors in LISTS.items():
        rows = ",\n ".join(json.dumps(row) for row in covering_list(factors))
        Path(__file__).with_name(name).write_text(f"[\n {rows}\n]\n")
