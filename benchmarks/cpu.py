"""CPU speed and memory of our torch paths beside transformers' own, in one run.

    python -m benchmarks.cpu [--repeats N] [--output FILE.jsonl]

Every measurement runs in a process of its own, ours and theirs in turn: two layers, hidden 512,
vocabulary 512, head_dim 64, n_groups 1, state 128 (Mamba-1: 16), batch 2, fp32, 2 threads. Logits
of the two sides are compared before anything is timed. Memory is the growth of the process's peak
resident size over the first steps.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

import ssm_hf

THREADS, BATCH, LAYERS, HIDDEN, VOCAB = 2, 2, 2, 512, 512
PROMPT, NEW_TOKENS = 16, 128
FORMATS = {
    "mamba": {"state_size": 16},
    "mamba2": {"state_size": 128, "num_heads": 16, "head_dim": 64, "n_groups": 1},
}
# (job, model, tokens, transformers is timed too, least ratio asked for)
JOBS = [
    ("train", "mamba2", 1024, True, 5.0),
    ("train", "mamba", 256, True, 10.0),
    ("train", "mamba", 1024, False, None),
    ("decode", "mamba2", NEW_TOKENS, True, 2.0),
    ("decode", "mamba", NEW_TOKENS, True, 2.0),
]


def build(side: str, model: str):
    """The model of one side, with weights that depend on the seed alone."""
    library = ssm_hf if side == "ssm_hf" else transformers
    name = {"mamba": "Mamba", "mamba2": "Mamba2"}[model]
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    config = getattr(library, f"{name}Config")(**shape, **FORMATS[model])
    net = getattr(library, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in sorted(net.named_parameters()):
            value = torch.rand(p.shape, generator=generator)
            if key.endswith(("norm.weight", "norm_f.weight", ".D")):
                value += 0.5
            elif key.endswith(("dt_bias", "dt_proj.bias")):
                value -= 4
            elif not key.endswith("A_log"):
                value = (value - 0.5) / 10
            p.copy_(value)
    return net


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(side: str, job: str, model: str, tokens: int, repeats: int) -> dict:
    """Time one side's job; runs in a child process."""
    torch.set_num_threads(THREADS)
    net = build(side, model)
    length = tokens if job == "train" else PROMPT
    ids = torch.randint(3, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        check = net.eval()(ids[:, :64]).logits[:, -1, :8].flatten().tolist()
    times, before = [], peak_mib()
    if job == "train":
        net.train()
        for _ in range(repeats + 1):
            start = time.perf_counter()
            net(ids, labels=ids).loss.backward()
            times.append(time.perf_counter() - start)
            net.zero_grad(set_to_none=True)
    else:
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        for _ in range(repeats + 1):
            lap = []
            for new in (1, tokens + 1):  # the difference leaves the prompt out
                start = time.perf_counter()
                net.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
                lap.append(time.perf_counter() - start)
            times.append((lap[1] - lap[0]) / tokens)
    # The first lap warms caches and allocators up.
    return {
        "seconds": statistics.median(times[1:]),
        "spread": [min(times[1:]), max(times[1:])],
        "added_mib": peak_mib() - before,
        "check": check,
    }


def child(arguments: list[str]) -> dict:
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu", "--child", *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


def commit() -> str:
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu.jsonl"))
    parser.add_argument("--child", nargs=4, metavar=("SIDE", "JOB", "MODEL", "TOKENS"))
    args = parser.parse_args()
    if args.child:
        side, job, model, tokens = args.child
        print(json.dumps(measure(side, job, model, int(tokens), args.repeats)))
        return

    header = {
        "device": f"{cpu_name()}, {THREADS} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }
    print(json.dumps(header))
    print(
        f"{'job':<22} {'ssm_hf':>12} {'transformers':>14} {'ratio':>7} {'asked':>6} {'memory':>16}"
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a") as results:
        for job, model, tokens, peer, asked in JOBS:
            sides = ["ssm_hf", *(["transformers"] if peer else [])]
            got = {
                side: child([side, job, model, str(tokens), "--repeats", str(args.repeats)])
                for side in sides
            }
            ours, row = got["ssm_hf"], {"job": job, "model": model, "tokens": tokens}
            line = f"{job + ' ' + model + ' ' + str(tokens):<22} {1e3 * ours['seconds']:9.2f} ms"
            if peer:
                theirs = got["transformers"]
                error = max(abs(a - b) for a, b in zip(ours["check"], theirs["check"], strict=True))
                if not error < 1e-4:
                    raise SystemExit(
                        f"{job} {model}: logits differ by {error}; nothing is reported"
                    )
                ratio = theirs["seconds"] / ours["seconds"]
                row |= {"ratio": ratio, "asked": asked, "logit_difference": error}
                line += f" {1e3 * theirs['seconds']:11.2f} ms {ratio:6.1f}x {asked:5.0f}x"
                line += f" {ours['added_mib']:6.0f}/{theirs['added_mib']:.0f} MiB"
            print(line, flush=True)
            for value in got.values():
                value.pop("check")
            results.write(json.dumps({**header, **row, "measured": got}) + "\n")


if __name__ == "__main__":
    main()
