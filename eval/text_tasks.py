"""Copying and look-up in text by a pretrained model: exact answers against length.

Source: Jelassi et al. 2024, section 4.2. Answers are scored with the right tokens before them
(teacher forcing): that all of them are the likeliest is the same as greedy generation giving them
all.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from eval.blocks import Block, Cell, Heading, Plot, Results, Run, Table, Text
from eval.documents import sha256
from eval.model import LoadedModel
from eval.options import TextTaskOptions, TextTasksOptions
from eval.parallel import finish as finish_samples
from eval.plots import finish, line, new_figure
from eval.ruler.scoring import wilson
from eval.samples import SampleStore
from eval.tasks import IGNORED, Samples, Task, make_task, seeded


def check_text_tasks(options: TextTasksOptions, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise for an unknown task, a wrong option, a missing file, or lengths out of range."""
    for name, entry in options.tasks.items():
        try:
            task = build(entry, tokenizer)
            for length in entry.lengths:
                task.check_length(length)
        except ValueError as error:
            raise ValueError(f"text_tasks.tasks.{name}: {error}") from error


def build(entry: TextTaskOptions, tokenizer: PreTrainedTokenizerFast) -> Task:
    """The task of one entry.

    Raises:
        ValueError: unknown, not made of text, or with a wrong option.
    """

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return ids["input_ids"]

    task = make_task(entry.task, entry.options, encode)
    if not task.needs_tokenizer:
        raise ValueError(f"{entry.task} is not made of text; eval.science trains models on it")
    return task


def run_text_tasks(loaded: LoadedModel, options: TextTasksOptions, samples: Path) -> Results:
    """Score all tasks at all lengths; finished samples are kept in the folder `samples`.

    Returns:
        {"tasks": {name: {"task", "options", "sha256", "lengths": [{"length", "tokens", "n",
        "string", "low", "high", "token"}]}}}: exact answers with a 95 % interval, right tokens,
        and the mean number of tokens of a prompt with its answer.
    """
    section: Results = {"tasks": {}}
    for name, entry in options.tasks.items():
        task = build(entry, loaded.tokenizer)
        file = entry.options.get("file")
        digest = None if file is None else sha256(file)
        settings = {"task": entry.task, "options": {**entry.options, "file": digest}}
        rows = []
        for length in entry.lengths:
            store = SampleStore(
                samples,
                model=loaded.identity,
                section="text_tasks",
                task=name,
                settings={**settings, "length": length},
            )
            score = partial(_score, loaded, task, length, options.batch_tokens)
            done = finish_samples(store, [str(i) for i in range(entry.samples)], score)
            rows.append(_row(length, done))
        section["tasks"][name] = {
            "task": entry.task,
            "options": entry.options,
            "sha256": digest,
            "lengths": rows,
        }
    return section


def _score(
    loaded: LoadedModel, task: Task, length: int, batch_tokens: int, numbers: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Score samples, each of which is a function of its own number."""
    size = max(1, batch_tokens // task.tokens(length))
    for begin in range(0, len(numbers), size):
        some = numbers[begin : begin + size]
        drawn = [task.sample([length], seeded(0, "text task", length, i)) for i in some]
        batch = _batch(drawn, loaded.prefix)
        right, asked = _right(loaded, batch), batch.labels != IGNORED
        for row, number in enumerate(some):
            counts = {"asked": int(asked[row].sum()), "right": int(right[row].sum())}
            yield number, {"tokens": int(batch.lengths[row]), **counts}


def _batch(samples: Iterable[Samples], prefix: Sequence[int]) -> Samples:
    """Samples of one row each as one batch, behind the prefix and padded on the right."""
    samples = list(samples)
    width = len(prefix) + max(s.input_ids.shape[1] for s in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    ids[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    for row, sample in enumerate(samples):
        here = slice(len(prefix), len(prefix) + sample.input_ids.shape[1])
        ids[row, here], labels[row, here] = sample.input_ids[0], sample.labels[0]
    lengths = torch.tensor([len(prefix) + int(s.lengths) for s in samples])
    return Samples(ids, labels, lengths)


@torch.no_grad()
def _right(loaded: LoadedModel, batch: Samples) -> torch.Tensor:
    """(N, T) bool: labels that the model holds to be likeliest."""
    model: Any = loaded.model
    ids = batch.input_ids.to(model.device)
    asked = batch.labels[:, 1:] != IGNORED
    hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    # Positions are gathered before the head: logits of whole contexts would not fit.
    predicted = model.get_output_embeddings()(hidden[:, :-1][asked.to(ids.device)]).argmax(-1)
    right = torch.zeros_like(batch.labels, dtype=torch.bool)
    right[:, 1:][asked] = predicted.cpu() == batch.labels[:, 1:][asked]
    return right


def _row(length: int, done: Sequence[dict[str, int]]) -> dict[str, Any]:
    exact = sum(s["right"] == s["asked"] for s in done) / len(done)
    low, high = wilson(exact, len(done))
    return {
        "length": length,
        "tokens": sum(s["tokens"] for s in done) / len(done),
        "n": len(done),
        "string": exact,
        "low": low,
        "high": high,
        "token": sum(s["right"] for s in done) / sum(s["asked"] for s in done),
    }


# --- report ---------------------------------------------------------------------------------------


def text_task_glance(results: Results) -> list[tuple[str, str]]:
    """The longest length of each task."""
    return [
        (
            f"{name} at {task['lengths'][-1]['length']}, exact answers",
            f"{task['lengths'][-1]['string']:.1%} (n = {task['lengths'][-1]['n']})",
        )
        for name, task in results["text_tasks"]["tasks"].items()
    ]


def text_task_blocks(runs: Sequence[Run]) -> list[Block]:
    """A table and a plot for each task, with a curve for each run."""
    blocks: list[Block] = [Heading("Copying and look-up in text")]
    names = list(dict.fromkeys(name for r in runs for name in r.results["text_tasks"]["tasks"]))
    for name in names:
        having = [r for r in runs if name in r.results["text_tasks"]["tasks"]]
        tasks = [r.results["text_tasks"]["tasks"][name] for r in having]
        options = ", ".join(f"{k} {v}" for k, v in tasks[0]["options"].items() if k != "file")
        detail = f" ({options})" if options else ""
        blocks += [Heading(name, 3), Text(f"Task `{tasks[0]['task']}`{detail}.")]
        lengths = sorted({row["length"] for task in tasks for row in task["lengths"]})
        rows = []
        figure, (axes,) = new_figure()
        for index, (run, task) in enumerate(zip(having, tasks, strict=True)):
            by_length = {row["length"]: row for row in task["lengths"]}
            cells = [_cell(by_length.get(length)) for length in lengths]
            rows.append((run.name, *cells))
            found = task["lengths"]
            x, y = [row["length"] for row in found], [row["string"] for row in found]
            low, high = [row["low"] for row in found], [row["high"] for row in found]
            line(axes, index, run.name, x, y, low, high)
        axes.set_ylim(-0.03, 1.03)
        finish(axes, "length", "exact answers", log_x=True)
        n = tasks[0]["lengths"][0]["n"]
        caption = f"Exact answers by length, n = {n}; in the cells' notes 95 % intervals."
        blocks.append(Table(("", *(str(length) for length in lengths)), rows, caption))
        blocks.append(Plot(f"text-{name}", figure, f"{name}: exact answers by length."))
    return blocks


def _cell(row: dict[str, Any] | None) -> str | Cell:
    if row is None:
        return "-"
    note = (
        f"95 %: {row['low']:.3f} to {row['high']:.3f}; tokens right {row['token']:.3f}; "
        f"{row['tokens']:.0f} tokens"
    )
    return Cell(f"{row['string']:.3f}", row["string"], note)
