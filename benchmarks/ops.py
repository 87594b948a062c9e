"""Time of our operators beside their peers', on one GPU.

    python -m benchmarks.ops [--only WORD] [--quick] [--output FILE.jsonl]

Every case is first checked: outputs and gradients of the last row of the batch against our torch
path in fp32 (fp64 for fp32 inputs). Nothing wrong is timed. Wall time lies between CUDA events
around one call; device time is a CUDA graph of the call, replayed, so that a slow host does not
count; both are medians. Kernels are compiled by parallel processes beforehand.
"""

import argparse
import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, peers
from benchmarks.operators import GRID, OPERATORS, Inputs, Shape

TARGETS = json.loads((common.ROOT / "benchmarks" / "targets.json").read_text())
# Tolerances guard the timings against wrong results; tests/ops/test_grid.py is the strict check.
# bf16: a few roundings of 4e-3 each, on gradients that cancel; fp32: products of three tf32 parts.
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float32: 1e-4}
OURS = "triton"
# The peers form fp32 products in tf32.
PEER_TOLERANCE = {**TOLERANCE, torch.float32: 1e-2}


@dataclass(frozen=True)
class Case:
    name: str
    operator: str
    shape: Shape
    dtype: torch.dtype
    listed: bool


def cases() -> list[Case]:
    """The shapes of the targets, then shapes that nothing was tuned on."""
    listed = [
        Case(r["id"], r["operator"], r["shape"], getattr(torch, r["dtype"]), True)
        for r in TARGETS["operators"]
        if r["operator"] in OPERATORS
    ]
    return listed + [Case(*row, listed=False) for row in GRID]


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def last_row(case: Case, inputs: Inputs) -> Inputs:
    """The inputs of the last row alone, in the wide precision that is trusted."""
    operator = OPERATORS[case.operator]
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32

    def narrow(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if name in operator.per_row:
            value = value[-1:]
        if value.is_floating_point():
            value = value.to(wide)
        return value.clone().requires_grad_(name in operator.gradients)

    return {name: narrow(name, value) for name, value in inputs.items()}


def gradients(case: Case, run: Callable[[Inputs], Any], inputs: Inputs, dy: list[Tensor]) -> list:
    names = OPERATORS[case.operator].gradients
    return list(torch.autograd.grad(outputs(run(inputs)), [inputs[n] for n in names], dy))


def copied(inputs: Inputs) -> Inputs:
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def relative(value: Tensor, expected: Tensor) -> float:
    # In parts: doubles of the largest gradients would not fit beside all the rest.
    parts = (t.detach().flatten().split(1 << 26) for t in (value, expected))
    error, norm = torch.zeros(2, dtype=torch.float64, device=value.device)
    for one, other in zip(*parts, strict=True):
        error += (one.double() - other.double()).square().sum()
        norm += other.double().square().sum()
    return float((error / norm).sqrt())


class Check:
    """What the last row of a case must give; made once, used for every provider."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        operator = OPERATORS[case.operator]
        narrow = last_row(case, inputs)
        trusted = functools.partial(operator.run, impl="reference")
        self.expected = [y.detach() for y in outputs(trusted(narrow))]
        self.dy = [torch.randn_like(y) for y in self.expected]
        self.gradients: list[Tensor] = []
        if operator.gradients:
            self.gradients = gradients(case, trusted, narrow, self.dy)

    def errors(self, run: Callable[[Inputs], Any], inputs: Inputs) -> dict[str, float]:
        """Relative error of outputs and gradients of a whole batch whose last row alone counts."""
        operator = OPERATORS[self.case.operator]
        if not operator.gradients:  # a step writes its state in place
            inputs = copied(inputs)
        got = outputs(run(inputs))
        found = {
            f"y{i}" if i else "y": relative(y[-1:] if operator.per_row else y, e)
            for i, (y, e) in enumerate(zip(got, self.expected, strict=True))
        }
        if not self.gradients:
            return found
        whole = [torch.zeros_like(y) for y in got]
        for w, d in zip(whole, self.dy, strict=True):
            (w[-1:] if operator.per_row else w).copy_(d)
        made = torch.autograd.grad(got, [inputs[n] for n in operator.gradients], whole)
        for name, value, expected in zip(operator.gradients, made, self.gradients, strict=True):
            found[f"d{name}"] = relative(
                value[-1:] if name in operator.per_row else value, expected
            )
        return found


def measure(
    case: Case, run: Callable[[Inputs], Any], sets: list[Inputs], seconds: float = 0.1
) -> dict[str, Any]:
    """Wall and device time of the forward pass, and of forward and backward pass together."""
    names = OPERATORS[case.operator].gradients
    dys = [[torch.randn_like(y) for y in outputs(run(s))] for s in sets]

    def forward(inputs: Inputs) -> None:
        with torch.no_grad():
            run(inputs)

    def both(inputs: Inputs, dy: list[Tensor]) -> None:
        torch.autograd.grad(outputs(run(inputs)), [inputs[n] for n in names], dy)

    found: dict[str, Any] = {}
    calls = {"fwd": [functools.partial(forward, s) for s in sets]}
    if names:
        calls["fwdbwd"] = [functools.partial(both, s, d) for s, d in zip(sets, dys, strict=True)]
    for key, runs in calls.items():
        found[f"{key}_wall_ms"] = common.wall_ms(runs[0], seconds)
        # What fails in a capture may leave torch's generator there, and nothing draws after it.
        if getattr(getattr(run, "peer", run), "waits", False):
            found[f"{key}_device_ms"] = common.profiled_ms(runs[0])
            found[f"{key}_no_graph"] = "waits for the GPU"
            continue
        try:
            found[f"{key}_device_ms"] = common.device_ms(runs, seconds)
        except RuntimeError as error:  # a peer that waits for the GPU cannot be captured
            torch.cuda.synchronize()
            found[f"{key}_device_ms"] = common.profiled_ms(runs[0])
            found[f"{key}_no_graph"] = str(error).splitlines()[0][:80]
    return found


def accepts(run: Callable[..., Any], inputs: Inputs) -> str | None:
    """Why a peer cannot take these inputs; None when it can."""
    peer = getattr(run, "peer", None)
    if peer is None:
        return None
    parameters = inspect.signature(peer).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    missing = [name for name in inputs if name not in parameters]
    return f"takes no {', '.join(missing)}" if missing else None


def relaid(inputs: Inputs, run: Callable[..., Any]) -> Inputs:
    """The same values in the memory layout that a peer works in, as leaves of their own."""
    names = getattr(getattr(run, "peer", run), "time_last", ())
    if not names:
        return inputs
    moved = {n: inputs[n].detach().transpose(1, 2).contiguous().transpose(1, 2) for n in names}
    return {**inputs, **{n: v.requires_grad_(inputs[n].requires_grad) for n, v in moved.items()}}


def limits(case: Case) -> dict[str, dict[str, float]]:
    """Milliseconds of each resource, per pass."""
    work, item = OPERATORS[case.operator].work, case.dtype.itemsize
    passes = {"fwd": False, **({"fwdbwd": True} if OPERATORS[case.operator].gradients else {})}
    return {
        key: work(case.shape, item, backward).limits(
            common.ceilings(), common.device()["processors"]
        )
        for key, backward in passes.items()
    }


def draw(case: Case, count: int) -> list[Inputs]:
    operator = OPERATORS[case.operator]
    sets = [operator.draw(case.shape, case.dtype) for _ in range(count)]
    for s in sets:
        for name in operator.gradients:
            s[name].requires_grad_()
    return sets


def providers(case: Case) -> dict[str, Callable[[Inputs], Any] | str]:
    found: dict[str, Callable[[Inputs], Any] | str] = {
        "ssm_hf": functools.partial(OPERATORS[case.operator].run, impl=OURS)
    }
    for name, run in peers.load(case.operator).items():
        found[name] = run if isinstance(run, str) else _spread(run)
    return found


def _spread(run: Callable[..., Any]) -> Callable[[Inputs], Any]:
    def call(inputs: Inputs) -> Any:
        return run(**inputs)

    call.peer = run
    return call


def bench(case: Case, only: set[str], output: Path, seconds: float = 0.1) -> None:
    """Check and time one case for every provider; print a line and write a record each."""
    operator = OPERATORS[case.operator]
    item = case.dtype.itemsize
    sets = draw(case, common.rotations(int(operator.work(case.shape, item, False).moved)))
    torch.manual_seed(0)
    check, limit = Check(case, sets[0]), limits(case)
    for name, run in providers(case).items():
        if only and name not in only:
            continue
        values: dict[str, Any] = {}
        details: dict[str, Any] = {"operator": case.operator, "listed": case.listed}
        reason = run if isinstance(run, str) else accepts(run, sets[0])
        if reason is None and not isinstance(run, str):
            try:
                # A step that is timed leaves its states changed: the next one gets its own.
                laid_out = [relaid(s if operator.gradients else copied(s), run) for s in sets]
                errors = check.errors(run, laid_out[0])
                worst = max(errors, key=lambda k: errors[k])
                details["errors"] = {k: float(f"{v:.2g}") for k, v in errors.items()}
                allowed = TOLERANCE if name == "ssm_hf" else PEER_TOLERANCE
                if errors[worst] < allowed[case.dtype]:
                    values = measure(case, run, laid_out, seconds)
                else:
                    reason = f"wrong: relative error of {worst} is {errors[worst]:.2g}"
            except Exception as error:  # a provider that fails must not stop the others
                torch.cuda.synchronize()
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        if reason is not None:
            details["reason"] = reason
        result = common.record(
            "ops", case.name, name, values, shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."), limits_ms=limit, **details,
        )  # fmt: skip
        common.append(output, result)
        print(line(result), flush=True)


def line(result: dict[str, Any]) -> str:
    text = f"{result['case']:<24} {result['provider']:<14}"
    if "reason" in result:
        return f"{text} {result['reason']}"
    v = result["values"]
    for key, limit in result["limits_ms"].items():
        text += f" {key} {v[key + '_device_ms']:8.4f} device {v[key + '_wall_ms']:8.4f} wall"
        text += f" ({max(limit.values()) / v[key + '_device_ms']:4.0%})"
    errors = result["errors"]
    return f"{text}  error {errors['y']:.1e}, worst {max(errors.values()):.1e}"


def _smaller(case: Case) -> Case:
    """Fewer rows and tokens, for kernels that only see whether sizes are 1 or divisible by 16."""
    least = {"B": 2, "T": 512 + case.shape.get("T", 0) % 16}
    shape = {k: min(v, least.get(k, v)) for k, v in case.shape.items()}
    return dataclasses.replace(case, shape=shape)


def compile_part(selected: list[Case], part: int, parts: int, choices: Path) -> None:
    """One of `parts` processes that compile: cases of ours, and candidates of every peer's."""
    loaded = {operator: peers.load(operator) for operator in {c.operator for c in selected}}
    peers.Autotuners(choices).compile_only(part, parts)
    for i, case in enumerate(selected):
        runs: list[tuple[Case, Callable[[Inputs], Any]]] = [
            (_smaller(case), _spread(run))
            for name, run in loaded[case.operator].items()
            if not isinstance(run, str) and not name.startswith("transformers")  # torch alone
        ]
        if i % parts == part:
            runs.append((case, functools.partial(OPERATORS[case.operator].run, impl=OURS)))
        for drawn, run in runs:
            try:
                (inputs,) = draw(drawn, 1)
                if accepts(run, inputs) is not None:
                    continue
                given = relaid(inputs, run)
                y = outputs(run(given))
                if OPERATORS[case.operator].gradients:
                    leaves = [given[n] for n in OPERATORS[case.operator].gradients]
                    torch.autograd.grad(y, leaves, [torch.ones_like(v) for v in y])
            except Exception as error:  # what fails here is tried, and reported, when it is timed
                print(f"{case.name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        # Sixteen processes share the memory.
        inputs = given = y = leaves = None
        torch.cuda.empty_cache()


def compile_all(arguments: list[str], parts: int) -> None:
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.ops", *arguments, "--compile"]
    children = [
        subprocess.Popen([*command, f"{part}/{parts}"], stdout=subprocess.PIPE, text=True)
        for part in range(parts)
    ]
    said = {line for child in children for line in child.communicate()[0].splitlines()}
    print(f"compiled by {parts} processes in {time.perf_counter() - began:.0f} s", *sorted(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name or operator has this word")
    parser.add_argument("--quick", action="store_true", help="the listed shapes alone")
    parser.add_argument("--providers", default="", help="comma-separated; default all")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "ops.jsonl")
    parser.add_argument("--peer-choices", type=Path, default=common.RESULTS / "peer_choices.json")
    parser.add_argument("--seconds", type=float, default=220, help="start no case after this time")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1),
                        help="that compile beforehand; 0 = none")  # fmt: skip
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of each timing")
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    began = time.perf_counter()
    words = args.only.split(",")
    selected = [
        c
        for c in cases()
        if any(w in c.name or w == c.operator for w in words) and (c.listed or not args.quick)
    ]
    if args.compile:
        part, parts = map(int, args.compile.split("/"))
        compile_part(selected, part, parts, args.peer_choices)
        return
    if not torch.cuda.is_available():
        sys.exit("these benchmarks need a GPU")
    if args.processes:
        compile_all(sys.argv[1:], args.processes)
    for operator in {c.operator for c in selected}:
        peers.load(operator)
    tuners = peers.Autotuners(args.peer_choices)
    tuners.measure_briefly()
    print(json.dumps({"device": common.device(), "ceilings": common.ceilings()}))
    left = []
    for case in selected:
        if time.perf_counter() - began > args.seconds:
            left.append(case.name)
            continue
        try:
            only = set(filter(None, args.providers.split(",")))
            bench(case, only, args.output, args.budget)
        except (AttributeError, RuntimeError) as error:  # out of memory, say: the others still run
            left.append(case.name)
            print(f"{case.name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        tuners.save()
        torch.cuda.empty_cache()
    print(f"{time.perf_counter() - began:.0f} s in all; left out: {left or 'nothing'}")


if __name__ == "__main__":
    main()
