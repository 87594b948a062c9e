"""Finds the fastest launch options of one kernel and writes them to ops/tuned.json.

    python -m benchmarks.tune KERNEL --cases ssd-130m,ssd-2.7b --size default \\
        --set num_warps=4,8 BLOCK_P=32,64 [--pass fwdbwd] [--write]

Every combination of the given values (others stay as they are) is compiled by parallel processes,
checked against the torch path, and timed on each case as a replayed CUDA graph. The winner has the
lowest geometric mean of its times. With `--write` it becomes the entry of this GPU's architecture
for the size class; nothing is ever tuned while a user's program runs.
"""

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks import common, ops
from benchmarks.operators import OPERATORS
from ssm_hf.ops import launch

Options = dict[str, int]
TABLE = common.ROOT / "src" / "ssm_hf" / "ops" / "tuned.json"


def candidates(kernel: str, size: str, settings: list[str]) -> list[Options]:
    """Products of the values of `NAME=1,2,4` settings, over the options in use now."""
    present = dict(launch.tuned(kernel, size, torch.device("cuda", 0)))
    present.pop("enable_fp_fusion")
    names, values = [], []
    for setting in settings:
        name, _, listed = setting.partition("=")
        names.append(name)
        values.append([int(v) for v in listed.split(",")])
    found = [{**present, **dict(zip(names, v, strict=True))} for v in itertools.product(*values)]
    return [present, *(f for f in found if f != present)]


def use(kernel: str, size: str, options: Options) -> None:
    """Let launches of the kernel take these options, in this process."""
    architecture = launch.architecture(torch.device("cuda", 0))
    by_architecture = launch.TUNED[kernel]
    by_size = by_architecture.setdefault(architecture, dict(by_architecture["default"]))
    by_size[size] = options
    launch.tuned.cache_clear()


def run_once(case: ops.Case, inputs: dict[str, Any], backward: bool) -> None:
    operator = OPERATORS[case.operator]
    y = ops.outputs(operator.run(inputs, "triton"))
    if backward:
        leaves = [inputs[n] for n in operator.gradients]
        torch.autograd.grad(y, leaves, [torch.ones_like(v) for v in y])


def measure(case: ops.Case, check: ops.Check, sets: list[dict], key: str) -> float:
    """Device time in ms; infinite where the result is wrong."""
    run = functools.partial(OPERATORS[case.operator].run, impl="triton")
    if max(check.errors(run, sets[0]).values()) > ops.TOLERANCE[case.dtype]:
        return math.inf
    return ops.measure(case, run, sets)[f"{key}_device_ms"]


def one_line_per_kernel(table: dict[str, Any]) -> str:
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(v)}" for name, v in table.items())
    return "{\n" + lines + "\n}\n"


def write(kernel: str, size: str, options: Options) -> None:
    """Enter the options into the table; an architecture starts as a copy of the default."""
    table = json.loads(TABLE.read_text())
    architecture = launch.architecture(torch.device("cuda", 0))
    by_size = table[kernel].setdefault(architecture, dict(table[kernel]["default"]))
    by_size[size] = options
    TABLE.write_text(one_line_per_kernel(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=sorted(launch.TUNED))
    parser.add_argument("--cases", required=True, help="names of benchmarks.ops, comma-separated")
    parser.add_argument("--size", default="default", help="size class of tuned.json")
    parser.add_argument("--set", nargs="+", required=True, metavar="NAME=1,2,4")
    parser.add_argument("--pass", dest="key", choices=("fwd", "fwdbwd"), default="fwd")
    parser.add_argument("--write", action="store_true", help="enter the winner into tuned.json")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.cases.split(",")
    cases = [c for c in ops.cases() if c.name in names]
    if missing := set(names) - {c.name for c in cases}:
        parser.error(f"unknown cases: {', '.join(sorted(missing))}")
    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU")
    tried = candidates(args.kernel, args.size, args.set)

    if args.compile:
        part, parts = map(int, args.compile.split("/"))
        for options in tried[part::parts]:
            use(args.kernel, args.size, options)
            for case in cases:
                try:
                    run_once(case, ops.draw(case, 1)[0], args.key == "fwdbwd")
                except Exception as error:  # too large for this GPU: reported when it is timed
                    print(f"{options}: {type(error).__name__}", file=sys.stderr)
        return

    command = [sys.executable, "-m", "benchmarks.tune", *sys.argv[1:], "--compile"]
    children = [
        subprocess.Popen([*command, f"{i}/{args.processes}"], stderr=subprocess.DEVNULL)
        for i in range(args.processes)
    ]
    for child in children:
        child.wait()
    prepared = []
    for case in cases:
        sets = ops.draw(case, 1)
        prepared.append((case, ops.Check(case, sets[0]), sets))
    results: list[tuple[float, Options, list[float]]] = []
    for options in tried:
        use(args.kernel, args.size, options)
        times = []
        for case, check, sets in prepared:
            try:
                times.append(measure(case, check, sets, args.key))
            except Exception as error:  # out of shared memory or registers: not a candidate
                print(f"{options}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
                times.append(math.inf)
        mean = math.exp(sum(map(math.log, times)) / len(times))
        results.append((mean, options, times))
        print(f"{mean:8.4f} ms", *(f"{t:8.4f}" for t in times), json.dumps(options), flush=True)
    best = min(results, key=lambda r: r[0])
    print(f"now  {results[0][0]:.4f} ms {json.dumps(results[0][1])}")
    print(f"best {best[0]:.4f} ms {json.dumps(best[1])}")
    if args.write and math.isfinite(best[0]):
        write(args.kernel, args.size, best[1])


if __name__ == "__main__":
    main()
