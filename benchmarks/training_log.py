"""Loss curves of whole training runs from their logs, as a table and a plot.

    python -m benchmarks.training_log runs/130m/*/log.jsonl --plot docs/results/lm-130m/loss.svg

A run is named after its folder. A loss that is not finite ends the command with an error.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any


def read(log: Path) -> dict[str, Any]:
    """Steps, losses, tokens, seconds and held-out loss of one run.

    Raises:
        ValueError: the log has no training step, or a loss that is not finite.
    """
    events = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [e for e in events if e["event"] == "train"]
    if not steps:
        raise ValueError(f"{log} has no training step")
    bad = [e["step"] for e in steps if not math.isfinite(e["loss"])]
    if bad:
        raise ValueError(f"{log}: the loss is not finite at step {bad[0]}")
    heldout = [e["heldout_nats_per_token"] for e in events if e["event"] == "eval"]
    return {
        "name": log.resolve().parent.name if log.name == "log.jsonl" else log.stem,
        "tokens": [e["tokens"] for e in steps],
        "losses": [e["loss"] for e in steps],
        "seconds": steps[-1]["elapsed_s"],
        "tokens_per_s": sorted(e["tokens_per_s"] for e in steps)[len(steps) // 2],
        "skipped": steps[-1]["skipped"],
        "heldout": heldout[-1] if heldout else None,
        "ended": events[-1]["event"] == "end",
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, a row for each run."""
    lines = [
        "| run | tokens | seconds | tokens/s, median | last loss | held-out | skipped steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        tokens = f"{run['tokens'][-1]:,}" + ("" if run["ended"] else " (stopped)")
        heldout = "–" if run["heldout"] is None else f"{run['heldout']:.3f}"
        lines.append(
            f"| {run['name']} | {tokens} | {run['seconds']:.0f} | {run['tokens_per_s']:,.0f} | "
            f"{run['losses'][-1]:.3f} | {heldout} | {run['skipped']} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], picture: Path) -> None:
    """Loss against tokens."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for run in runs:
        axes.plot([n / 1e6 for n in run["tokens"]], run["losses"], lw=1, label=run["name"])
    axes.set(xlabel="million tokens", ylabel="training loss, nats per token")
    axes.legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Loss curves of whole training runs.")
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args(argv)
    runs = [read(log) for log in arguments.logs]
    print(table(runs))
    if arguments.plot is not None:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
