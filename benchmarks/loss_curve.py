"""Does a model train on the kernels as it does on the torch path?

    python -m benchmarks.loss_curve TOKENS [--model mamba2-130m] [--steps 200] [--seconds 100]
    python -m benchmarks.loss_curve --plot

TOKENS is a file of little-endian uint16 token numbers, documents beginning with number 0. The model
is trained from one seed on the same rows twice, in bf16 autocast: `--steps` steps on the torch
path, and as many and then `--seconds` more on the kernels. The losses go to
benchmarks/results/loss_curve.jsonl; `--plot` draws docs/performance/loss_curve.png from it.

The two curves drift apart as any two roundings of one run do; `noise` is how far apart two runs of
the torch path come whose inputs to the first layer differ by rounding alone.
"""

import argparse
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

RESULTS = common.RESULTS / "loss_curve.jsonl"
PLOT = common.ROOT / "docs" / "performance" / "loss_curve.png"
LEARNING_RATE, WARM_UP, CLIP, SEED = 1e-3, 100, 1.0, 0


def batches(path: Path, rows: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Rows of the file in a seeded order, epoch after epoch; positions restart at documents."""
    tokens = np.fromfile(path, dtype="<u2")
    table = tokens[: len(tokens) // length * length].reshape(-1, length).astype(np.int64)
    index = np.arange(length)
    positions = index - np.maximum.accumulate(np.where(table == 0, index, 0), axis=1)
    generator = np.random.default_rng(SEED)
    while True:
        order = generator.permutation(len(table))
        for i in range(0, len(order) - rows + 1, rows):
            chosen = order[i : i + rows]
            ids = torch.from_numpy(table[chosen])
            batch = {"input_ids": ids, "labels": ids}
            batch["position_ids"] = torch.from_numpy(positions[chosen])
            yield {
                name: value.pin_memory().cuda(non_blocking=True) for name, value in batch.items()
            }


def curve(
    arguments: argparse.Namespace, impl: str, steps: int, seconds: float, perturb: bool = False
) -> dict[str, Any]:
    """Train; the losses of all steps, and the speed after the first ones."""
    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(
        common.ROOT / "configs" / "model" / f"{arguments.model}.json"
    )
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    if perturb:
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1 + 2**-12)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(0.1), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
    )

    def one_pass(batch: dict[str, Tensor], share: Tensor) -> Tensor:
        with ssm_hf.implementation(impl), torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch, use_cache=False, return_logits=False).loss
        (loss * share).backward()
        return loss.detach()

    graphed, share = GraphedPass(one_pass, model.parameters()), torch.ones((), device="cuda")
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    began = warm = time.monotonic()
    for batch in batches(arguments.tokens, arguments.batch, arguments.length):
        if len(losses) == 10:
            torch.cuda.synchronize()
            warm = time.monotonic()
        if len(losses) % 100 == 0:
            torch.cuda.synchronize()
            if len(losses) >= steps and time.monotonic() - began > seconds:
                break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (len(losses) + 1) / WARM_UP)
        losses.append(graphed(batch, share, is_first=True))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
    torch.cuda.synchronize()
    tokens = (len(losses) - 10) * arguments.batch * arguments.length
    return {
        "losses": torch.stack(losses).tolist(),
        "largest_norm": float(torch.stack(norms).max()),
        "tokens_per_s": tokens / (time.monotonic() - warm),
    }


def compare(ours: list[float], reference: list[float]) -> dict[str, float]:
    """Distances of two curves in nats: over all steps, and of the means of the last 50."""
    difference = np.array(ours[: len(reference)]) - np.array(reference)
    return {
        "mean_difference": float(np.abs(difference).mean()),
        "largest_difference": float(np.abs(difference).max()),
        "last_50_difference": float(difference[-50:].mean()),
    }


def plot() -> None:
    import matplotlib.pyplot as plt

    runs = {}
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        runs[record["case"]] = record  # the last of each model
    figure, axes = plt.subplots(len(runs), 2, figsize=(10, 3.2 * len(runs)), squeeze=False)
    for row, (case, record) in zip(axes, sorted(runs.items()), strict=True):
        steps = len(record["curves"]["torch"])
        for name, style in (("torch", "-"), ("kernels", "--")):
            row[0].plot(record["curves"][name][:steps], style, lw=1, label=name)
        row[0].set(title=f"{case}: first {steps} steps", xlabel="step", ylabel="loss, nats")
        row[0].legend()
        row[1].plot(*zip(*record["curves"]["later"], strict=True), lw=1, color="C1")
        row[1].set(title=f"{case}: kernels, to the end", xlabel="step", ylabel="loss, nats")
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=Path, nargs="?")
    parser.add_argument("--model", default="mamba2-130m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=100.0, help="on the kernels, in all")
    parser.add_argument("--plot", action="store_true", help="draw the results and end")
    arguments = parser.parse_args()
    if arguments.plot:
        plot()
        return
    ssm_hf.register(override=True)
    print("kernels", flush=True)
    ours = curve(arguments, "triton", arguments.steps, arguments.seconds)
    print("torch", flush=True)
    reference = curve(arguments, "reference", arguments.steps, 0)
    print("torch, perturbed", flush=True)
    perturbed = curve(arguments, "reference", arguments.steps, 0, perturb=True)
    losses = ours["losses"]
    if not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"the loss is not finite from step {losses.index(math.nan)} on")
    distance = compare(losses, reference["losses"])
    noise = compare(perturbed["losses"], reference["losses"])
    if not distance["mean_difference"] <= 2 * noise["mean_difference"] + 1e-3:
        raise RuntimeError(f"the curves differ by {distance}, two torch runs by {noise}")
    width = max(1, len(losses) // 200)
    windows = range(0, len(losses) - width + 1, width)
    curves = {
        "kernels": [round(x, 4) for x in losses[: arguments.steps]],
        "torch": [round(x, 4) for x in reference["losses"]],
        "later": [[i, round(float(np.mean(losses[i : i + width])), 4)] for i in windows],
    }
    values = {
        **distance,
        **{f"noise_{name}": value for name, value in noise.items()},
        "steps": len(losses),
        "last_loss": curves["later"][-1][1],
        "largest_norm": ours["largest_norm"],
        "tokens_per_s": ours["tokens_per_s"],
        "torch_tokens_per_s": reference["tokens_per_s"],
    }
    shape = {"B": arguments.batch, "T": arguments.length}
    result = common.record(
        "loss_curve", arguments.model, "ssm_hf", values, shape=shape, curves=curves
    )
    common.append(RESULTS, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
