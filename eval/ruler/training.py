"""Documents that teach a small model what RULER asks: the exact prompts, each with its answer.

    python -m eval.ruler.training --tokenizer NAME --output needles.jsonl

writes rows {"text"} for `data.files` of a training config, beside the books. Below some hundred
million parameters a model fails RULER because it does not understand the question, whatever it
remembers; with such documents as a tenth to a fifth of the last quarter of training it is a test of
memory. They come from other seeds, their keys from words that no sample's keys have, and with
`--haystack` their texts from other books.
"""

import argparse
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eval.ruler import templates
from eval.ruler.fit import Frame, Sample, TooShortError
from eval.ruler.sources import load_haystack
from eval.ruler.specs import TASKS
from eval.ruler.tasks import Maker
from eval.ruler.tokens import TokenCounter

DEFAULT_TASKS = tuple(name for name, task in TASKS.items() if task.questions is None)


class TrainingDocument(NamedTuple):
    """One document.

    Args:
        text: prompt and answer.
        task, length: what it was made for; its tokens are not more than `length`.
    """

    text: str
    task: str
    length: int


def answer_text(task: str, outputs: Sequence[str]) -> str:
    """Return the words that complete an answer prefix, as the prompts' own examples do."""
    if task == "vt":
        return " " + " ".join(outputs)
    if task == "cwe":
        return " " + templates.numbered(outputs)
    if TASKS[task].metric == "any":
        return f" {outputs[0]}"
    several = f"{', '.join(outputs[:-1])}, and {outputs[-1]}"
    return f" {several if len(outputs) > 1 else outputs[0]}."


def training_documents(
    tokenizer: PreTrainedTokenizerFast,
    *,
    tokens: int,
    lengths: Sequence[int] = (512, 1024, 2048),
    tasks: Sequence[str] = DEFAULT_TASKS,
    seed: int = 0,
    haystack: str | None = None,
    haystack_bytes: int | None = None,
    squad: str = "",
    hotpotqa: str = "",
) -> Iterator[TrainingDocument]:
    """Yield documents in random order, a function of the arguments.

    Args:
        tokenizer: of the model to train.
        tokens: of all documents together, about; every task and length gets the same share. A
            task that a length is too short for has none of that length.
        lengths: most tokens of a document, with one more for its end left free.
        tasks: names; qa_1 and qa_2 need `squad` and `hotpotqa`, which must not be the files that
            the model is evaluated on.
        seed: samples of no seed of an evaluation have the same random numbers.
        haystack, haystack_bytes: file of the running text and how much of it to read; None is the
            novel that samples are made of too.

    Raises:
        ValueError: an unknown task, or no task fits in any length.
        FileNotFoundError: a missing file.
    """
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"unknown RULER task {name!r}, expected some of {list(TASKS)}")
    maker = Maker(
        TokenCounter(tokenizer),
        Frame(prefix_tokens=1),
        seed=f"training/{seed}",
        haystack=load_haystack(haystack, max_bytes=haystack_bytes),
        squad=squad,
        hotpotqa=hotpotqa,
        reserved=True,
    )
    share = tokens / (len(tasks) * len(lengths))
    documents = []
    for name in tasks:
        for length in lengths:
            count = max(round(share / length), 1)
            try:
                samples = list(maker.samples(name, length, count))
            except TooShortError:
                continue
            documents += [_document(name, length, sample) for sample in samples]
    if not documents:
        raise ValueError(f"none of the tasks {list(tasks)} fits in any of {list(lengths)} tokens")
    Random(f"training/{seed}").shuffle(documents)
    yield from documents


def _document(name: str, length: int, sample: Sample) -> TrainingDocument:
    text = sample.input + sample.answer_prefix + answer_text(name, sample.outputs)
    return TrainingDocument(text, name, length)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write training documents from the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.ruler.training", description=__doc__)
    add = parser.add_argument
    add("--tokenizer", required=True, help="tokenizer.json, directory or Hugging Face Hub name")
    add("--output", required=True, type=Path, help=".jsonl, or .jsonl.xz")
    add("--tokens", type=int, default=3_000_000)
    add("--lengths", default="512,1024,2048", help="separated by commas")
    add("--tasks", default=",".join(DEFAULT_TASKS), help="separated by commas")
    add("--seed", type=int, default=0)
    add("--haystack", help="file of running text; default: the project's novel")
    add("--haystack_bytes", type=int, default=4_000_000, help="of the file, from its start")
    add("--squad", default="", help="for qa_1; not the file of the evaluation")
    add("--hotpotqa", default="", help="for qa_2; not the file of the evaluation")
    options = parser.parse_args(arguments)
    if options.tokenizer.endswith(".json"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=options.tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    documents = training_documents(
        tokenizer,
        tokens=options.tokens,
        lengths=[int(length) for length in options.lengths.split(",")],
        tasks=options.tasks.split(","),
        seed=options.seed,
        haystack=options.haystack,
        haystack_bytes=options.haystack_bytes,
        squad=options.squad,
        hotpotqa=options.hotpotqa,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    opener = lzma.open if options.output.suffix == ".xz" else open
    with opener(options.output, "wt", encoding="utf-8") as file:
        for document in tqdm(documents, desc="training documents", unit="document"):
            file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
