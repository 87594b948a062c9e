"""Does a model train on the kernels as it does on the torch path?

    python -m benchmarks.loss_curve TOKENS [--model mamba2-130m] [--steps 200] [--seconds 100]
    python -m benchmarks.loss_curve --plot

TOKENS is a file of little-endian uint16 token numbers, documents beginning with number 0. From one
seed and on the same rows a model is trained in bf16 autocast: `--steps` steps on the kernels,
`--perturbed` times as many on the kernels from weights that differ by half a rounding to bf16 at
most, as many on the torch path (as far as it gets in `--torch-seconds`), and then the first run
goes on until it has had `--seconds`. After each of these a line is added to
benchmarks/results/loss_curve.jsonl; of several lines the last one counts. `--plot` draws
docs/performance/loss_curve.png from them.

Curves drift apart as any two roundings of one run do. That of the torch path may lie no further
from that of the kernels, in the mean and at the worst step, than those two of the runs on the
kernels that lie furthest apart: of seven perturbed runs there are 28 pairs, so that a torch path
that rounds as they do would be found outside by chance about once in thirty times.

One curve of the torch path is one draw. With `--torch-perturbed` there are as many more of it, and
the two families are compared in place of the two curves: a permutation test on the mean distance of
their mean curves. If where a run was computed made no difference, every division of all runs into
two families would be as likely as this one; fewer than one in twenty may lie as far apart.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ssm_hf
from benchmarks import common
from training.graph import GraphedPass

PLOT = common.ROOT / "docs" / "performance" / "loss_curve.png"
LEARNING_RATE, WARM_UP, CLIP, SEED = 1e-3, 100, 1.0, 0
# Steps between two looks at the losses, for which the host waits.
PIECE = 50
# Of weights, relatively: the largest error of rounding to bf16 is 2^-9 to 2^-8 of the number.
NOISE = 2**-9


def rows(path: Path, count: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Rows of the file in a seeded order, epoch after epoch; positions restart at documents."""
    tokens = np.fromfile(path, dtype="<u2")
    table = tokens[: len(tokens) // length * length].reshape(-1, length).astype(np.int64)
    index = np.arange(length)
    positions = index - np.maximum.accumulate(np.where(table == 0, index, 0), axis=1)
    generator = np.random.default_rng(SEED)
    if len(table) < count:
        raise ValueError(f"{path} holds {len(table)} rows of {length} tokens, expected {count}")
    while True:
        order = generator.permutation(len(table))
        for i in range(0, len(order) - count + 1, count):
            chosen = order[i : i + count]
            ids = torch.from_numpy(table[chosen])
            yield {
                "input_ids": ids,
                "labels": ids,
                "position_ids": torch.from_numpy(positions[chosen]),
            }


class Training:
    """One run, which can be continued: its losses, gradient norms and the time they took.

    `noise` is the seed of its weights' perturbation, 0 for none.
    """

    def __init__(self, arguments: argparse.Namespace, name: str, impl: str, noise: int = 0) -> None:
        self.name = name
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds = 0.0
        self._first_piece = 0.0
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._on_gpu = self._device.type == "cuda"
        self._batches = rows(arguments.tokens, arguments.batch, arguments.length)
        self._tokens = arguments.batch * arguments.length
        torch.manual_seed(SEED)
        config = AutoConfig.from_pretrained(arguments.config)
        with self._device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        if noise:
            generator = torch.Generator(self._device).manual_seed(noise)
            with torch.no_grad():
                # Those that products round to bf16; the others are used in fp32.
                for weight in (p for p in model.parameters() if p.ndim > 1):
                    amount = torch.empty_like(weight).uniform_(-NOISE, NOISE, generator=generator)
                    weight.mul_(1 + amount)
        self._model = model
        self._optimizer = torch.optim.AdamW(
            model.parameter_groups(0.1), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
        )

        keep = arguments.keep_activations and impl != "reference"

        def one_pass(batch: dict[str, Tensor], share: Tensor) -> Tensor:
            cast = torch.autocast(self._device.type, torch.bfloat16)
            forced = ssm_hf.implementation(impl)  # pyright: ignore[reportArgumentType]
            with ssm_hf.keep_activations(keep):
                with forced, cast:
                    loss = model(**batch, use_cache=False, return_logits=False).loss
                (loss * share).backward()
            return loss.detach()

        self._pass = one_pass
        self._graphed = GraphedPass(one_pass, model.parameters()) if self._on_gpu else None

    def _step(self) -> tuple[Tensor, Tensor]:
        """Launch one step; its loss and gradient norm."""
        step = len(self.losses) + 1
        for group in self._optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARM_UP)
        batch, share = next(self._batches), torch.ones((), device=self._device)
        if self._graphed is None:
            self._optimizer.zero_grad()
            loss = self._pass(batch, share)
        else:
            batch = {k: v.pin_memory().cuda(non_blocking=True) for k, v in batch.items()}
            loss = self._graphed(batch, share, is_first=True)
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        return loss, norm

    def advance(self, steps: float, seconds: float) -> None:
        """Go on until it has had so many steps, or so many seconds in all."""
        while len(self.losses) < steps and self.seconds < seconds:
            began = time.monotonic()
            count = min(PIECE, int(min(steps, 1e9)) - len(self.losses))
            figures = [torch.stack(self._step()) for _ in range(count)]
            losses, norms = torch.stack(figures).T.tolist()
            took = time.monotonic() - began
            self._first_piece = self._first_piece or took
            self.seconds += took
            self.losses += losses
            self.norms += norms
            if not all(map(math.isfinite, (*losses, *norms))):
                raise RuntimeError(f"{self.name}: a loss or gradient is not finite: {losses}")
            print(
                f"{self.name}: step {len(self.losses)}, loss {np.mean(losses):.4f}, largest norm "
                f"{max(norms):.2f}, {took / count * 1e3:.1f} ms a step",
                flush=True,
            )

    @property
    def tokens_per_s(self) -> float:
        """After the first piece, which compiles."""
        steps = len(self.losses) - PIECE
        return steps * self._tokens / (self.seconds - self._first_piece) if steps > 0 else 0.0


def compare(one: list[float], other: list[float]) -> dict[str, float]:
    """Distances of two curves in nats: over all steps they share, and of the last 50 means."""
    shared = min(len(one), len(other))
    difference = np.array(one[:shared]) - np.array(other[:shared])
    return {
        "mean_difference": float(np.abs(difference).mean()),
        "largest_difference": float(np.abs(difference).max()),
        "last_50_difference": float(difference[-50:].mean()),
    }


def distances(
    kernels: list[float], torch_path: list[float], perturbed: list[list[float]]
) -> dict[str, float]:
    """Of kernels and torch path; `noise_`: the largest of any two runs on the kernels, over the
    steps that the torch path has had; `noise_median_`: the median of those pairs."""
    values = compare(kernels, torch_path)
    family = [losses[: len(torch_path)] for losses in (kernels, *perturbed)]
    pairs = [compare(one, other) for one, other in itertools.combinations(family, 2)]
    for measure in list(values) if pairs else ():
        found = [abs(pair[measure]) for pair in pairs]
        values[f"noise_{measure}"] = max(found)
        values[f"noise_median_{measure}"] = float(np.median(found))
    return values | {"perturbed_runs": len(perturbed)}


def is_within_noise(values: dict[str, float]) -> bool:
    """Whether the torch path lies no further off than runs on the kernels from one another, or its
    family no further from theirs than families that chance divides."""
    if "family_p" in values:
        return values["family_p"] >= 0.05
    measures = ("mean_difference", "largest_difference")
    return all(values[measure] <= values[f"noise_{measure}"] for measure in measures)


def compare_families(kernels: list[list[float]], torch_path: list[list[float]]) -> dict[str, float]:
    """A permutation test on the mean distance of two families' mean curves, over shared steps."""
    shared = min(map(len, (*kernels, *torch_path)))
    runs = np.array([losses[:shared] for losses in (*kernels, *torch_path)])
    ours = np.array(list(itertools.combinations(range(len(runs)), len(kernels))))
    chosen = np.zeros((len(ours), len(runs)))
    np.put_along_axis(chosen, ours, 1, axis=1)
    means = chosen @ runs / len(kernels), (1 - chosen) @ runs / len(torch_path)
    found = np.abs(means[0] - means[1]).mean(axis=1)
    # The first division is the real one. Equal sums may differ in their last bits.
    return {
        "family_difference": float(found[0]),
        "family_difference_by_chance": float(np.median(found)),
        "family_p": float((found >= found[0] - 1e-12).mean()),
        "torch_runs": len(torch_path),
    }


def write(
    arguments: argparse.Namespace,
    kernels: Training,
    torch_path: Training | None,
    perturbed: list[list[float]],
    torch_perturbed: list[list[float]] | None = None,
) -> dict[str, float]:
    """Add what is known so far to the results."""
    losses = kernels.losses
    values: dict[str, float] = {
        "steps": len(losses),
        "last_loss": float(np.mean(losses[-50:])),
        "largest_norm": max(kernels.norms),
        "tokens_per_s": kernels.tokens_per_s,
    }
    curves = {"kernels": [round(x, 4) for x in losses[: arguments.steps]]}
    if torch_path is not None:
        values |= distances(losses[: arguments.steps], torch_path.losses, perturbed)
        values["torch_tokens_per_s"] = torch_path.tokens_per_s
        curves["torch"] = [round(x, 4) for x in torch_path.losses]
    for number, other in enumerate(perturbed, 1):
        curves[f"perturbed {number}"] = [round(x, 4) for x in other]
    if torch_path is not None and torch_perturbed:
        ours = [losses[: arguments.steps], *perturbed]
        values |= compare_families(ours, [torch_path.losses, *torch_perturbed])
        for number, other in enumerate(torch_perturbed, 1):
            curves[f"torch perturbed {number}"] = [round(x, 4) for x in other]
    width = max(1, len(losses) // 200)
    windows = range(0, len(losses) - width + 1, width)
    later = [[i, round(float(np.mean(losses[i : i + width])), 4)] for i in windows]
    shape = {"B": arguments.batch, "T": arguments.length}
    result = common.record(
        "loss_curve",
        arguments.model,
        "ssm_hf",
        values,
        shape=shape,
        curves={**curves, "later": later},
    )
    common.append(arguments.output, result)
    print(json.dumps(result), flush=True)
    return values


def plot(results: Path, picture: Path) -> None:
    """Draw the last line of each model."""
    import matplotlib.pyplot as plt

    runs = {}
    for line in results.read_text().splitlines():
        record = json.loads(line)
        runs[record["case"]] = record
    figure, axes = plt.subplots(len(runs), 2, figsize=(10, 3.2 * len(runs)), squeeze=False)
    for row, (case, record) in zip(axes, sorted(runs.items()), strict=True):
        curves = record["curves"]
        for family, label, color in (
            ("perturbed", "kernels, perturbed", "0.7"),
            ("torch perturbed", "torch, perturbed", "C9"),
        ):
            others = [name for name in curves if name.startswith(family)]
            for name in others:
                legend = label if name == others[0] else None
                row[0].plot(curves[name], lw=0.5, color=color, label=legend)
        for name, style in (("torch", "-"), ("kernels", "--")):
            if name in curves:
                row[0].plot(curves[name], style, lw=1, label=name)
        row[0].set(title=f"{case}: first {len(curves['kernels'])} steps")
        row[0].legend()
        row[1].plot(*zip(*curves["later"], strict=True), lw=1, color="C1")
        row[1].set(title=f"{case}: kernels, {record['values']['steps']:.0f} steps")
        for axis in row:
            axis.set(xlabel="step", ylabel="loss, nats")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=Path, nargs="?")
    parser.add_argument("--model", default="mamba2-130m")
    parser.add_argument("--config", type=Path, help="default: configs/model/MODEL.json")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=100.0, help="of the run on the kernels")
    parser.add_argument("--torch-seconds", type=float, default=60.0)
    parser.add_argument("--perturbed", type=int, default=7, help="runs, at least 1")
    parser.add_argument(
        "--torch-perturbed", type=int, default=0, help="runs on the torch path, of --torch-seconds"
    )
    parser.add_argument("--keep-activations", action="store_true", help="on the kernels")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "loss_curve.jsonl")
    parser.add_argument("--plot", action="store_true", help="draw the results and end")
    arguments = parser.parse_args(argv)
    if arguments.config is None:
        arguments.config = common.ROOT / "configs" / "model" / f"{arguments.model}.json"
    if arguments.tokens is None and not arguments.plot:
        parser.error("TOKENS is missing")
    if arguments.perturbed < 1:
        parser.error("--perturbed is at least 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.plot:
        plot(arguments.output, PLOT)
        return
    ssm_hf.register(override=True)
    on_kernels = "triton" if torch.cuda.is_available() else "auto"
    kernels = Training(arguments, "kernels", on_kernels)
    kernels.advance(arguments.steps, math.inf)
    write(arguments, kernels, None, [])
    perturbed: list[list[float]] = []
    for number in range(1, arguments.perturbed + 1):
        other = Training(arguments, f"perturbed {number}", on_kernels, noise=number)
        other.advance(arguments.steps, math.inf)
        perturbed.append(other.losses)
    write(arguments, kernels, None, perturbed)
    torch_path = Training(arguments, "torch", "reference")
    torch_path.advance(arguments.steps, arguments.torch_seconds)
    values = write(arguments, kernels, torch_path, perturbed)
    torch_perturbed: list[list[float]] = []
    for number in range(1, arguments.torch_perturbed + 1):
        # Other perturbations than those of the runs on the kernels: draws of their own.
        noise = arguments.perturbed + number
        other = Training(arguments, f"torch perturbed {number}", "reference", noise=noise)
        other.advance(arguments.steps, arguments.torch_seconds)
        torch_perturbed.append(other.losses)
        values = write(arguments, kernels, torch_path, perturbed, torch_perturbed)
    if not is_within_noise(values):
        raise RuntimeError(f"the curves of kernels and torch lie too far apart: {values}")
    kernels.advance(math.inf, arguments.seconds)
    write(arguments, kernels, torch_path, perturbed, torch_perturbed)


if __name__ == "__main__":
    main()
