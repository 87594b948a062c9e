"""What a run reports: held-out bits per byte, model FLOP utilisation, samples, and the log file."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from training.config import SampleConfig, TrainConfig
from training.packing import IGNORED
from training.peaks import peak_flops


@torch.no_grad()
def heldout_loss(
    model: nn.Module, loader: DataLoader, n_bytes: int, accelerator: Accelerator
) -> dict[str, float]:
    """Loss over all rows of a prepared `loader`.

    Taken from the logits, since a model's own loss may hold auxiliary terms. The end of each
    document is predicted too and counts, though it is no byte.

    Returns:
        `heldout_bits_per_byte`: total negative log-likelihood over n_bytes * ln 2, comparable
        across tokenizers; `heldout_nats_per_token`: the same over the number of predicted tokens;
        of models with selective attention `heldout_gate_fraction`, the mean share of the tokens
        that a layer selects without noise, which need not be that of the training.
    """
    model.eval()
    nats, tokens = 0.0, 0
    shares: list[Tensor] = []
    config = getattr(accelerator.unwrap_model(model, keep_torch_compile=False), "config", None)
    options = {"output_gates": True} if hasattr(config, "output_gates") else {}
    for batch in loader:
        labels = batch.pop("labels")[:, 1:]
        output = model(**batch, use_cache=False, **options)
        logits = output.logits[:, :-1].float()
        if options:
            shares.append(output.gate_fractions.mean())
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        # Per row, so that the rows repeated to fill the last batch of a process are dropped.
        row_nats = losses.view(labels.shape).sum(1)
        row_tokens = (labels != IGNORED).sum(1)
        row_nats, row_tokens = accelerator.gather_for_metrics((row_nats, row_tokens))
        nats += row_nats.double().sum().item()
        tokens += int(row_tokens.sum())
    model.train()
    figures = {
        "heldout_bits_per_byte": nats / math.log(2) / n_bytes,
        "heldout_nats_per_token": nats / tokens,
    }
    if shares:
        share = accelerator.reduce(torch.stack(shares).mean(), "mean")
        figures["heldout_gate_fraction"] = float(share)  # pyright: ignore[reportArgumentType]
    return figures


@torch.no_grad()
def write_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sample: SampleConfig,
    seed: int,
    accelerator: Accelerator,
) -> list[str]:
    """Continue each prompt by sampling; the same seed gives the same text on every process, and the
    run's own random state is left as it was."""
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    plain.eval()
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = []
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for prompt in sample.prompts:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            # As in training, a document begins with the start token.
            input_ids = torch.tensor([[start, *ids]], device=accelerator.device)
            output = plain.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=sample.max_new_tokens,
                do_sample=True,
                temperature=sample.temperature,
                top_k=0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
            texts.append(
                tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
            )
    plain.train()
    return texts


def model_figures(output: Any) -> dict[str, Tensor]:
    """What a model's output says beside the loss, () each: of routers of experts their losses,
    before weights, and the loads of the most and the least used expert of any layer, 1 where all
    are used evenly; of gates of selective attention their loss, and the least, mean and largest
    share of tokens that a layer selects."""
    names = ("aux_loss", "z_loss", "capacity_loss")
    figures = {name: getattr(output, name, None) for name in names}
    statistics = getattr(output, "router_statistics", None)
    if statistics is not None:
        load = statistics.load * statistics.load.shape[-1]
        figures |= {"expert_load_max": load.max(), "expert_load_min": load.min()}
        figures["router_entropy"] = statistics.entropy.mean()
    shares = getattr(output, "gate_fractions", None)
    if shares is not None:
        figures |= {"gate_fraction": shares.mean(), "gate_fraction_min": shares.min(),
                    "gate_fraction_max": shares.max()}  # fmt: skip
    return {name: value.detach() for name, value in figures.items() if value is not None}


class Meter:
    """Mean loss, mean of other figures and speed of the steps since they were last taken."""

    def __init__(self, config: TrainConfig, forward_flops: int, accelerator: Accelerator) -> None:
        """`forward_flops`: of one token, forward only; the backward pass costs two forwards."""
        self._tokens_per_step = config.batch_size * config.data.seq_len
        self._flops_per_token = 3 * forward_flops
        peak = peak_flops(accelerator.device, config.precision)
        self._peak = None if peak is None else peak * accelerator.num_processes
        self._figures: list[dict[str, float]] = []
        self._seconds, self._steps = 0.0, 0

    def add(self, seconds: float, figures: dict[str, float] | None) -> None:
        """Count one step; `figures`, the loss and others, are None where the step was skipped."""
        self._seconds += seconds
        self._steps += 1
        if figures is not None:
            self._figures.append(figures)

    @property
    def tokens_per_s(self) -> float:
        """Positions trained on per second inside steps (evaluations and saves do not count)."""
        return self._steps * self._tokens_per_step / self._seconds

    def drain(self) -> dict[str, float]:
        """The figures since the last call; "mfu" only where the device's peak is known."""
        steps = len(self._figures)
        values = {name: sum(f[name] for f in self._figures) / steps for name in self._figures[0]}
        values["tokens_per_s"] = self.tokens_per_s
        if self._peak is not None:
            values["mfu"] = self._flops_per_token * self.tokens_per_s / self._peak
        self._figures, self._seconds, self._steps = [], 0.0, 0
        return values


class RunLog:
    """`<run>/log.jsonl`: one JSON object per event, and its numbers to the trackers; the main
    process alone writes.

    Every line has "event" ("train", "eval", "sample", ...) and "step". A run that `resumes` appends
    to the file; one that starts afresh replaces it.
    """

    def __init__(self, path: Path, accelerator: Accelerator, *, resumes: bool) -> None:
        self._path, self._accelerator = path, accelerator
        if accelerator.is_main_process and not resumes:
            path.unlink(missing_ok=True)

    def write(self, event: str, step: int, **values: Any) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        if event in ("train", "eval"):
            self._accelerator.log(numbers, step=step)
        if self._accelerator.is_main_process:
            line = json.dumps({"event": event, "step": step, **values}, ensure_ascii=False)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def say(self, text: str) -> None:
        """A line for the person who watches, above the progress bar."""
        if self._accelerator.is_main_process:
            tqdm.write(text)
