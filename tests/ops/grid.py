"""Correctness of the kernels on a GPU, over lists of shapes, against fp64.

    python -m tests.ops.grid [--only OPERATOR] [--processes 16] [--output FILE.jsonl]

The expected values are the sequential definition in fp64 up to T = 1000 and the chunked torch path
in fp64 above; tests/ops/test_grid.py ties the two together. Bounds, relative to the norm of what is
expected:

fp32 (tf32 off): 1e-5, or twice the torch path's own error in fp32 where that is larger than 5e-6:
    a gradient that is the small difference of large terms has no more digits in fp32.
bf16, values stored in bf16: twice the error of the torch path fed the same bf16 inputs (of fewer
    than 64 values, at least twice what rounding them is expected to cost).
bf16, values stored in fp32 (weight gradients, states): the torch path computes in fp32, so its
    error says nothing; matrix units multiply bf16 operands. The bound is twice what the value
    moves when every operand is rounded to bf16 once more: expected values of inputs and output
    gradients that are each changed by a random half unit in the last place. Of several such draws
    the largest counts: of a handful of values, a gradient of a bias say, each draw is luck.
bf16, operators that form operands themselves (grid_mamba3.FORM_OPERANDS): the larger of the two,
    for all values. The torch path multiplies rotated queries and keys in fp32 and rounds once, at
    the end. Matrix units want them in 16 bits, so that even with nothing else rounded three errors
    of the same size precede the last, and twice the torch path's error is just what they add up to.
bf16, rows of a few tokens: so for every operator, over eight draws. One score, rounded to multiply
    a token's values, is in all of a gradient there; in longer rows the scores' errors average.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_hf.ops import keep_activations
from tests.helpers import relative_error
from tests.ops.grid_mamba3 import FORM_OPERANDS, MAMBA3
from tests.ops.grid_mamba3 import FP32_INPUTS as MAMBA3_FP32_INPUTS
from tests.ops.grid_operators import (
    KERNELS,
    WEIGHTS,
    Inputs,
    Operator,
    per_document,
    randn,
)
from tests.ops.grid_training import TRAINING
from tests.ops.pairwise import FACTORS, LISTS, Row

# Operators whose kernels for 16 bits are others where activations are kept, up to 16 states.
KEPT, KEPT_STATES = ("selective_scan", "mamba1_mix"), 16


def _kept(operator: Operator) -> Operator:
    def run(**inputs: Any) -> Any:
        with keep_activations():
            return operator.run(**inputs)

    return dataclasses.replace(operator, run=run)


OPERATORS = {**KERNELS, **MAMBA3, **TRAINING}
OPERATORS |= {f"{name}_kept": _kept(OPERATORS[name]) for name in KEPT}
ROWS, TRAINING_ROWS = (json.loads(Path(__file__).with_name(name).read_text()) for name in LISTS)
LONG: Row = {
    "T": 70000, "N": 128, "B": 1, "G": 1, "P": 64, "packing": "none", "dtype": "bfloat16",
    "mask": False, "initial_state": True, "extras": True,
}  # fmt: skip
SEQUENTIAL_UP_TO = 1000
# Inputs without a time dimension are fp32 in every model, but for the convolution's.
FP32_INPUTS = ("A", "D", "dt_bias", "initial_state", *MAMBA3_FP32_INPUTS)
DRAWS = 3
FEW_TOKENS, DRAWS_OF_FEW = 16, 8
# What rounding to bf16 is expected to cost, relative, over many values.
ROUNDING = 1.66e-3
INTEGERS = ("seq_idx", "cu_seqlens", "mask", "targets", "n_groups", "norm_before_gate")


def draw(operator: str, row: Row, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs of one row in its dtype, whose values fp64 copies can hold exactly."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, row["dtype"])
    inputs = OPERATORS[operator].draw(row, generator)
    for name, value in inputs.items():
        if name not in INTEGERS:
            wide = name in FP32_INPUTS and operator != "causal_conv1d"
            wide = wide or (row.get("wide", False) and name in WEIGHTS)
            inputs[name] = value.to(torch.float32 if wide else dtype)
    return inputs


def evaluate(
    run: Callable[[Inputs], Any],
    inputs: Inputs,
    cotangents: list[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and all gradients by name, and the output gradients that were used."""
    leaves = {
        name: (v.to(dtype) if dtype else v).detach().requires_grad_()
        for name, v in inputs.items()
        if name not in INTEGERS
    }
    result = run({**inputs, **leaves})
    outputs = list(result) if isinstance(result, tuple) else [result]
    if cotangents is None:
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        cotangents = [randn(generator, *y.shape).to(y.dtype) for y in outputs]
    used = [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
    made = torch.autograd.grad(outputs, list(leaves.values()), used, allow_unused=True)
    named = {"y": outputs[0], **({"state": outputs[1]} if len(outputs) > 1 else {})}
    for (name, leaf), gradient in zip(leaves.items(), made, strict=True):
        named[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: value.detach() for name, value in named.items()}, cotangents


def expect(operator: str, row: Row, inputs: Inputs, cotangents: list[Tensor]) -> dict[str, Tensor]:
    """fp64 outputs and gradients: token by token for short rows, else by the chunked torch path."""
    op = OPERATORS[operator]
    if op.sequential is None or row["T"] > SEQUENTIAL_UP_TO:
        run = functools.partial(call, op.run, impl="reference")
        return evaluate(run, inputs, cotangents, torch.float64)[0]
    run = op.sequential
    if "cu_seqlens" in inputs:
        run = functools.partial(per_document, op.sequential)
        return evaluate(run, inputs, cotangents, torch.float64)[0]
    # Row by row: a thousand steps of all rows would keep tens of gigabytes for their gradients.
    total: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for b in range(row["B"]):
        one = {n: v if n in WEIGHTS else v[b : b + 1] for n, v in inputs.items()}
        values, _ = evaluate(run, one, [c[b : b + 1] for c in cotangents], torch.float64)
        for name, value in values.items():
            if name.removeprefix("d") in WEIGHTS:
                total[name] = total[name] + value if name in total else value
            else:
                parts.setdefault(name, []).append(value)
    return {**{name: torch.cat(values) for name, values in parts.items()}, **total}


def call(op: Callable[..., Any], inputs: Inputs, impl: str) -> Any:
    return op(**inputs, impl=impl)


def _rounded_again(value: Tensor, generator: torch.Generator) -> Tensor:
    """Every entry changed as rounding to bf16 does, at random.

    Units in the last place lie between 2^-8 and 2^-7 of the value; 0.72 * 2^-7 is their root mean
    square where the logarithm of the value is spread evenly.
    """
    noise = torch.rand(value.shape, generator=generator, device=value.device) - 0.5
    return value.double() * (1 + 0.72 * 2.0**-7 * noise)


def _errors(
    operator: str, row: Row, device: torch.device, impl: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Of one draw of inputs: errors of `impl` and of the torch path, and of inputs that moved.

    Raises:
        AssertionError: two runs on the same inputs differ in a bit, or a dtype is another.
    """
    op = OPERATORS[operator]
    inputs = draw(operator, row, device, seed)
    kernel = functools.partial(call, op.run, impl=impl)
    torch_path = functools.partial(call, op.run, impl="reference")
    got, cotangents = evaluate(kernel, inputs)
    again, _ = evaluate(kernel, inputs, cotangents)
    for name, value in got.items():
        assert torch.equal(value, again[name]), f"{name} differs between two equal runs"
    expected = expect(operator, row, inputs, cotangents)
    reference, _ = evaluate(torch_path, inputs, cotangents)
    moved: dict[str, float] = {}
    if row["dtype"] == "bfloat16":
        generator = torch.Generator(device).manual_seed(2 + seed)
        for _ in range(DRAWS):
            noisy = {
                n: v if n in INTEGERS else _rounded_again(v, generator) for n, v in inputs.items()
            }
            noisy_cotangents = [_rounded_again(c, generator) for c in cotangents]
            values, _ = evaluate(torch_path, noisy, noisy_cotangents, torch.float64)
            for name, value in values.items():
                error = relative_error(value, expected[name])
                moved[name] = max(moved.get(name, 0.0), error)
    found = {}
    for name, value in got.items():
        assert value.dtype == reference[name].dtype, f"{name} is {value.dtype}"
        theirs = relative_error(reference[name], expected[name])
        if value.dtype == torch.bfloat16 and value.numel() < 64:
            theirs = max(theirs, ROUNDING)  # of a handful of values the error is luck
        found[name] = {
            "error": relative_error(value, expected[name]),
            "torch": theirs,
            "moved": moved.get(name, 0.0),
            "dtype": value.dtype,
        }
    return found


def check(
    operator: str, row: Row, device: torch.device, impl: str = "triton"
) -> dict[str, dict[str, float]]:
    """Error of `impl` and its bound, for every output and gradient; repeated runs are equal.

    Rows of a few tokens are drawn several times: of a handful of values one error is luck, their
    root mean square is not.

    Raises:
        AssertionError: two runs on the same inputs differ in a bit, or a dtype is another.
    """
    few = row["B"] * row["T"] <= FEW_TOKENS
    seeds = DRAWS_OF_FEW if few else 1
    draws = [_errors(operator, row, device, impl, seed) for seed in range(seeds)]
    found = {}
    for name, first in draws[0].items():
        error, theirs, moved = (
            math.sqrt(sum(d[name][key] ** 2 for d in draws) / seeds)
            for key in ("error", "torch", "moved")
        )
        if row["dtype"] == "float32":
            bound = max(1e-5, 2 * theirs)
        elif first["dtype"] == torch.float32 or operator in FORM_OPERANDS or few:
            bound = 2 * max(theirs, moved)
        else:
            bound = 2 * theirs
        found[name] = {"error": error, "torch": theirs, "bound": bound}
    return found


def name_of(row: Row) -> str:
    flags = [k for k, value in row.items() if value is True]
    sizes = [f"{k}{row[k]}" for k in "BTGNP"]
    return "-".join([*sizes, row["dtype"], row["packing"], *flags])


def rows_of(operator: str) -> list[Row]:
    """The rows of an operator's list, the two dtypes in turn."""
    name = operator.removesuffix("_kept")
    rows = TRAINING_ROWS if name in TRAINING else ROWS
    by_dtype = [[r for r in rows if r["dtype"] == d] for d in FACTORS["dtype"]]
    rows = [r for pair in zip_longest(*by_dtype) for r in pair if r is not None]
    if name not in TRAINING:
        rows.append(LONG)
    if name == operator:
        return rows
    few = [{**r, "N": KEPT_STATES} for r in rows if r["dtype"] == "bfloat16"]
    return list({name_of(r): r for r in few}.values())


def _jobs(only: str) -> list[tuple[str, Row]]:
    """Every row of every operator asked for, operators in turn."""
    words = only.split(",")
    lists = [[(o, r) for r in rows_of(o)] for o in OPERATORS if "" in words or o in words]
    return [job for jobs in zip_longest(*lists) for job in jobs if job is not None]


def _work(args: argparse.Namespace) -> None:
    """Check rows that no other process has claimed, until time is up; print one JSON line each.

    A CUDA error leaves a process that can do nothing more: it ends with status 3.
    """
    device, began = torch.device("cuda"), time.perf_counter()
    for number, (operator, row) in enumerate(_jobs(args.only)):
        if time.perf_counter() - began > args.seconds:
            return
        try:
            (args.claims / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        start = time.perf_counter()
        result: dict[str, Any] = {"operator": operator, "row": row}
        try:
            result["values"] = check(operator, row, device)
            torch.cuda.synchronize()
        except Exception as error:  # whatever a kernel does, the other rows are checked
            result["failure"] = f"{type(error).__name__}: {str(error)[-300:]}"
        result["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps(result), flush=True)
        if "CUDA error" in result.get("failure", "") or "[CUDA]" in result.get("failure", ""):
            os._exit(3)
        torch.cuda.empty_cache()


def _run_worker(args: argparse.Namespace, claims: str) -> list[dict[str, Any]]:
    """Results of one process; after a CUDA error a new one goes on."""
    results: list[dict[str, Any]] = []
    began = time.perf_counter()
    while True:
        left = args.seconds - (time.perf_counter() - began)
        command = [sys.executable, "-m", "tests.ops.grid", f"--only={args.only}"]
        command += [f"--seconds={left}", f"--claims={claims}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                results.append(json.loads(line))
                print(_told(results[-1]), flush=True)
        if process.returncode != 3:
            return results


def _bad(result: dict[str, Any]) -> list[str]:
    """What is wrong with a row; NaN is."""
    if "failure" in result:
        return [result["failure"]]
    return [
        f"{name} {v['error']:.2e} > {v['bound']:.2e}"
        for name, v in result["values"].items()
        if not v["error"] <= v["bound"]
    ]


def _told(result: dict[str, Any]) -> str:
    said = "; ".join(_bad(result))
    if not said:
        values = result["values"].items()
        name, v = max(values, key=lambda item: item[1]["error"] / (item[1]["bound"] or 1.0))
        said = f"ok, {name} {v['error']:.1e} of {v['bound']:.1e}"
    return f"{result['operator']} {name_of(result['row'])} {result['seconds']:.0f} s: {said}"


def summary(operator: str, results: list[dict[str, Any]], jobs: list[tuple[str, Row]]) -> Inputs:
    """Rows, failures, rows not reached, and the largest errors of one operator."""
    mine = [r for r in results if r["operator"] == operator]
    done = {name_of(r["row"]) for r in mine}
    checked = [(r["row"]["dtype"], v) for r in mine for v in r.get("values", {}).values()]
    return {
        "rows": len(mine),
        "failures": [f"{name_of(r['row'])}: {'; '.join(_bad(r))}" for r in mine if _bad(r)],
        "not_run": [name_of(row) for o, row in jobs if o == operator and name_of(row) not in done],
        "largest_error_over_bound": {
            dtype: max((round(v["error"] / (v["bound"] or 1.0), 3) for d, v in checked
                        if d == dtype), default=0.0)
            for dtype in FACTORS["dtype"]
        },
        "largest_fp32_error": max((v["error"] for d, v in checked if d == "float32"), default=0.0),
    }  # fmt: skip


def main() -> None:
    from benchmarks import common

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="operators, comma-separated")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "correctness.jsonl")
    parser.add_argument("--seconds", type=float, default=600, help="start no row after this time")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.claims is not None:
        _work(args)
        return
    began, jobs = time.perf_counter(), _jobs(args.only)
    with tempfile.TemporaryDirectory() as claims, ThreadPoolExecutor(args.processes) as pool:
        run = functools.partial(_run_worker, args)
        results = [r for part in pool.map(run, [claims] * args.processes) for r in part]
    print(f"{len(results)} of {len(jobs)} rows in {time.perf_counter() - began:.0f} s")
    failed = len(results) < len(jobs)
    for operator in dict(jobs):
        values = summary(operator, results, jobs)
        common.append(args.output, common.record("correctness", operator, "ssm_hf", values))
        failed = failed or bool(values["failures"])
        print(f"{operator}: {json.dumps(values)}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
