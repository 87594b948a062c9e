"""What every GPU benchmark shares: how a result is written down, and how time is taken.

A result is one JSON line, written by `append(path, record(...))`:

    benchmark  the script: "ops", "generation", "training", "prefill", ...
    case       what was run, as benchmarks/targets.json names it, or any other short name
    provider   "ssm_hf" or the peer: "mamba_ssm", "fla", "transformers", "torch", ...
    values     {measure: number}, the unit last in the name: "fwd_device_ms", "tokens_per_s", ...
    ...        whatever else describes the run: shape, dtype, error, a reason why nothing was run

with the device, the versions, the commit, the command and the ceilings of the same process.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "mamba_ssm",
    "causal_conv1d",
    "flash-linear-attention",
)


@functools.cache
def device() -> dict[str, Any]:
    """Name and size of the GPU (of the CPU where there is none)."""
    if not torch.cuda.is_available():
        return {"name": platform.processor() or platform.machine(), "type": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "type": "cuda",
        "architecture": f"sm{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, CUDA and of the packages that are installed."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    installed = {d.metadata["Name"].replace("_", "-") for d in importlib.metadata.distributions()}
    for name in _PACKAGES:
        if name.replace("_", "-") in installed:
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def commit() -> str:
    """The commit; where the sources differ from it, or without a history, their hash too."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    if head is not None and git("status", "--porcelain", "--", "src") == "":
        return head
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return f"{head or 'no commit'} + sources {digest.hexdigest()[:12]}"


def command() -> str:
    """The command line of this process, without anybody's paths."""
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(ROOT):
        module = script.relative_to(ROOT).with_suffix("")
        return shlex.join(["python", "-m", ".".join(module.parts), *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


def record(
    benchmark: str, case: str, provider: str, values: dict[str, float], **details: Any
) -> dict[str, Any]:
    """A result with everything that is needed to judge and repeat it."""
    return {
        "benchmark": benchmark,
        "case": case,
        "provider": provider,
        "values": values,
        **details,
        "device": device(),
        "ceilings": ceilings(),
        "versions": versions(),
        "commit": commit(),
        "command": command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def append(path: Path | str, result: dict[str, Any]) -> None:
    """Add one line to a results file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        lines.write(json.dumps(result) + "\n")


@functools.cache
def ceilings() -> dict[str, float]:
    """What this GPU reaches in this process: copy in TB/s (read + write), bf16 matmul in TFLOP/s.

    The copy moves 2 GiB in all, far beyond any cache; the product is 8192^3 on random data, which
    draws more power and runs slower than zeros.
    """
    if not torch.cuda.is_available():
        return {}
    a = torch.empty(2**28, device="cuda").normal_()
    b = torch.empty_like(a)
    # As one copy and as a kernel: the faster of the two is what this memory can do.
    copies = (functools.partial(b.copy_, a), functools.partial(torch.mul, a, 1.0, out=b))
    copy = min(wall_ms(run, 0.2) for run in copies)
    m, n = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(m)
    matmul = wall_ms(functools.partial(torch.matmul, m, n, out=out), 0.2)
    return {
        "copy_tb_s": round(2 * 2**30 / copy * 1e-9, 3),
        "bf16_tflop_s": round(2 * 8192**3 / matmul * 1e-9, 1),
    }


def wall_ms(run: Callable[[], object], seconds: float = 0.1) -> float:
    """Median time of a call between CUDA events: kernels, and the host where it is slower."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def one() -> float:
        events[0].record()
        run()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    for _ in range(3):
        one()
    repeats = min(max(int(1e3 * seconds / max(one(), 1e-3)), 5), 100)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def device_ms(runs: Sequence[Callable[[], object]], seconds: float = 0.1) -> float:
    """Median time of one call without the host: a CUDA graph of all `runs`, replayed.

    Several runs over different inputs keep a small problem out of the cache (see `rotations`).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            for _ in range(2):
                run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    milliseconds = wall_ms(graph.replay, seconds) / len(runs)
    graph.reset()
    return milliseconds


def profiled_ms(run: Callable[[], object]) -> float:
    """Sum of the kernels' times of one call: for what cannot be captured in a graph."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 5e3


def rotations(moved: int) -> int:
    """How many input sets to rotate so that the second use of one finds nothing in the cache.

    `moved` is the number of bytes of one set. The GPUs' caches hold at most 60 MB; three times that
    lies between two uses of a set.
    """
    return -(-180_000_000 // max(moved, 1))
