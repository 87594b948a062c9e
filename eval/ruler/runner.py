"""Section `ruler` of a suite: checks, answers of the model, results."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from eval.model import LoadedModel, require_eos
from eval.parallel import finish, processes
from eval.ruler.fit import Sample
from eval.ruler.options import RulerOptions
from eval.ruler.results import summarise
from eval.ruler.samples import SampleFiles
from eval.ruler.scoring import found, score
from eval.ruler.sources import NOVEL
from eval.ruler.tasks import TASKS
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
        files.make(task, length)


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
    for length in options.lengths:
        for task in options.tasks:
            if not files.make(task, length):
                continue
            samples = {str(s.index): s for s in files.read(task, length)}
            store = SampleStore(
                folder,
                model=loaded.identity,
                section="ruler",
                task=task,
                settings={"length": length, "samples": files.key(task, length)},
            )

            def work(
                ids: list[str],
                task: str = task,
                length: int = length,
                samples: dict[str, Sample] = samples,
            ) -> Iterator[tuple[str, dict[str, Any]]]:
                todo = [samples[id] for id in ids]
                label = f"{task} {length}"
                for sample, prediction in _answer(loaded, options, todo, files, task, label):
                    yield str(sample.index), _judged(sample, prediction, task)

            cells[task, length] = finish(store, list(samples), work)
    texts = {"haystack": options.haystack or NOVEL.name}
    if any(TASKS[task].needles for task in options.tasks):
        texts["splitter"] = options.splitter
    for task in options.tasks:
        if (kind := TASKS[task].questions) is not None:
            texts[kind] = getattr(options, kind)
    return summarise(options, cells, texts)


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


def _answer(
    loaded: LoadedModel,
    options: RulerOptions,
    samples: list[Sample],
    files: SampleFiles,
    task: str,
    label: str,
) -> Iterator[tuple[Sample, str]]:
    """Generate the answers of samples in batches; a batch too large for the memory is halved."""
    # The longest first: what does not fit in memory shows at once, and batches are even.
    queue = sorted(samples, key=lambda sample: -sample.tokens)
    size = options.batch_size
    with tqdm(total=len(queue), desc=label, unit="sample", disable=_quiet()) as bar:
        while queue:
            fitting = max(options.batch_tokens // queue[0].length, 1)
            batch = queue[: min(size, fitting)]
            try:
                predictions = _generate(loaded, options, batch, files, TASKS[task].budget)
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                size = len(batch) // 2
                log.warning("%s: out of memory, going on with batches of %d", label, size)
                torch.cuda.empty_cache()
                continue
            yield from zip(batch, predictions, strict=True)
            bar.update(len(batch))
            queue = queue[len(batch) :]


def _generate(
    loaded: LoadedModel,
    options: RulerOptions,
    batch: list[Sample],
    files: SampleFiles,
    budget: int,
) -> list[str]:
    """Return the greedy continuations of prompts, padded on the left."""
    tokenizer = loaded.tokenizer
    rows = [_encode(loaded, sample, files.frame.chat) for sample in batch]
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


def _encode(loaded: LoadedModel, sample: Sample, chat: bool) -> list[int]:
    text = sample.input + sample.answer_prefix
    if chat:
        ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = loaded.encode(text)
    if len(ids) != sample.tokens:
        raise RuntimeError(
            f"sample {sample.index} was counted as {sample.tokens} tokens and has {len(ids)}"
        )
    return ids


def _quiet() -> bool:
    return not processes().is_local_main_process
