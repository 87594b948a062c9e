"""Section `ruler` of a suite: checks, answers of the model, results."""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from eval.limits import NotPossible, attempt, check_positions
from eval.model import LoadedModel, require_eos
from eval.parallel import finish, processes
from eval.ruler.fit import Sample
from eval.ruler.options import RulerOptions
from eval.ruler.results import summarise
from eval.ruler.samples import SampleFiles
from eval.ruler.scoring import found, score
from eval.ruler.sources import NOVEL
from eval.ruler.specs import TASKS
from eval.samples import SampleStore

log = logging.getLogger(__name__)


def check_ruler(options: RulerOptions, prefix: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make all samples, which finds whatever is wrong with files, words and lengths.

    Args:
        options: of the section.
        prefix: `Suite.prefix`.
        tokenizer: of the model.
    """
    require_eos(tokenizer, "ruler")
    files = SampleFiles(options, tokenizer, int(prefix != "none"))
    files.check()
    cells = [(task, length) for length in options.lengths for task in options.tasks]
    for task, length in tqdm(cells, desc="ruler samples", unit="cell", disable=_quiet()):
        if (reason := files.make(task, length)) is not None:
            log.warning("left out: %s", reason)


def run_ruler(loaded: LoadedModel, options: RulerOptions, folder: Path) -> dict[str, Any]:
    """Answer all samples and sum up.

    Args:
        loaded: the model.
        options: of the section.
        folder: of the stores of finished samples.

    Returns:
        JSON values, see `summarise`.
    """
    files = SampleFiles(options, loaded.tokenizer, len(loaded.prefix))
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    left_out: dict[tuple[str, int], str] = {}
    failed: dict[str, str] = {}
    for length in sorted(options.lengths):
        try:
            check_positions(loaded.model, length)
        except NotPossible as reason:
            left_out.update({(task, length): str(reason) for task in options.tasks})
            continue
        for task in options.tasks:
            if task in failed:
                left_out[task, length] = failed[task]
                continue
            if (reason := files.make(task, length)) is not None:
                left_out[task, length] = reason
                continue
            samples = _Cell(loaded, files, task, length).finish(folder)
            reasons = [sample["failed"] for sample in samples if "failed" in sample]
            if reasons:
                left_out[task, length] = reasons[0]
                failed[task] = f"{reasons[0]} at {length:,} tokens"
            else:
                cells[task, length] = samples
    return summarise(options, cells, left_out, _texts(options))


def _texts(options: RulerOptions) -> dict[str, str]:
    """Return what the samples of a section are made of."""
    specs = [TASKS[task] for task in options.tasks]
    texts = {}
    if any(spec.needles is not None and spec.needles.haystack == "essay" for spec in specs):
        texts = {"haystack": options.haystack or NOVEL.name, "splitter": options.splitter}
    for spec in specs:
        if spec.questions is not None:
            texts[spec.questions] = getattr(options, spec.questions)
    return texts


class _Cell:
    """One task at one length: its samples, answered and judged."""

    def __init__(self, loaded: LoadedModel, files: SampleFiles, task: str, length: int) -> None:
        self._loaded, self._files, self._options = loaded, files, files.options
        self._task, self._length = task, length
        self._samples = {str(sample.index): sample for sample in files.read(task, length)}

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        """Return all samples, those that are not in the store answered now."""
        store = SampleStore(
            folder,
            model=self._loaded.identity,
            section="ruler",
            task=self._task,
            settings={
                "length": self._length,
                "samples": self._files.key(self._task, self._length),
            },
        )
        return finish(store, list(self._samples), self._work)

    def _work(self, ids: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Answer in batches; one too large for the memory is halved, down to one prompt."""
        options = self._options
        # The longest first: what does not fit in memory shows at once, and batches are even.
        queue = sorted((self._samples[id] for id in ids), key=lambda sample: -sample.tokens)
        size = options.batch_size
        label = f"{self._task} {self._length}"
        with tqdm(total=len(queue), desc=label, unit="sample", disable=_quiet()) as bar:
            while queue:
                batch = queue[: min(size, max(options.batch_tokens // queue[0].length, 1))]
                try:
                    predictions = attempt(functools.partial(self._answer, batch))
                except NotPossible as reason:
                    if len(batch) == 1:
                        yield from ((str(s.index), {"failed": str(reason)}) for s in queue)
                        return
                    size = len(batch) // 2
                    log.warning("%s: %s, going on with batches of %d", label, reason, size)
                    continue
                for sample, prediction in zip(batch, predictions, strict=True):
                    yield str(sample.index), _judged(sample, prediction, self._task)
                bar.update(len(batch))
                queue = queue[len(batch) :]

    def _answer(self, batch: list[Sample]) -> list[str]:
        budget = TASKS[self._task].budget
        return _generate(self._loaded, self._options, batch, self._files, budget)


def _judged(sample: Sample, prediction: str, task: str) -> dict[str, Any]:
    return {
        "prediction": prediction,
        "outputs": sample.outputs,
        "found": found(prediction, sample.outputs),
        "score": score(prediction, sample.outputs, TASKS[task].metric),
        "tokens": sample.tokens,
        "length": sample.length,
        "depths": sample.depths,
    }


def _generate(
    loaded: LoadedModel,
    options: RulerOptions,
    batch: list[Sample],
    files: SampleFiles,
    budget: int,
) -> list[str]:
    """Return the greedy continuations of prompts, padded on the left."""
    tokenizer = loaded.tokenizer
    rows = _encode(loaded, batch, files.frame.chat)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    pieces = {}
    if options.prefill_chunk_size is not None:
        pieces["prefill_chunk_size"] = options.prefill_chunk_size
    output = loaded.model.generate(
        input_ids=ids.to(loaded.model.device),
        attention_mask=mask.to(loaded.model.device),
        max_new_tokens=budget,
        do_sample=False,
        pad_token_id=pad,
        **pieces,
    )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def _encode(loaded: LoadedModel, batch: list[Sample], chat: bool) -> list[list[int]]:
    texts = [sample.input + sample.answer_prefix for sample in batch]
    if chat:
        rows = loaded.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        rows = loaded.encode_batch(texts)
    for sample, ids in zip(batch, rows, strict=True):
        if len(ids) != sample.tokens:
            raise RuntimeError(
                f"sample {sample.index} was counted as {sample.tokens} tokens and has {len(ids)}"
            )
    return rows


def _quiet() -> bool:
    return not processes().is_local_main_process
