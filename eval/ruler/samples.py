"""Samples in files: made once for a tokenizer and settings, then read."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from eval.documents import sha256
from eval.parallel import processes
from eval.ruler.fit import Frame, Sample, TooShortError, make_frame
from eval.ruler.options import RulerOptions
from eval.ruler.sources import WONDERWORDS, read_lines, wonderwords
from eval.ruler.specs import TASKS
from eval.ruler.tasks import Maker
from eval.ruler.tokens import TokenCounter

# Of the generators: another number wherever the same settings make other samples.
VERSION = 1


class SampleFiles:
    """The samples of a suite for one tokenizer, one JSON Lines file a task and length.

    A file holds `Sample`s in order, is a function of its name's hash, and can be read by anyone who
    wants the prompts alone. It may hold more samples than are asked for.

    Args:
        options: of the section.
        tokenizer: of the model.
        prefix_tokens: tokens that the model is given before a text.

    Raises:
        FileNotFoundError: a haystack or question file is missing.
        ValueError: one is broken, wonderwords is missing, or there is no chat template.
    """

    def __init__(
        self, options: RulerOptions, tokenizer: PreTrainedTokenizerFast, prefix_tokens: int
    ) -> None:
        self.options = options
        self.frame: Frame = make_frame(options.template, tokenizer, prefix_tokens)
        self.maker = Maker(
            TokenCounter(tokenizer, parse_special=self.frame.chat),
            self.frame,
            seed=options.seed,
            haystack=options.haystack,
            splitter=options.splitter,
            squad=options.squad,
            hotpotqa=options.hotpotqa,
            compat=options.compat,
            english_words=options.english_words,
        )

    def check(self) -> None:
        """Read everything that samples are made of, before the first is made.

        Raises:
            FileNotFoundError, ValueError: see the class.
        """
        options = self.options
        tasks = [TASKS[name] for name in options.tasks]
        if any(task.needles is not None and task.needles.haystack == "essay" for task in tasks):
            _ = self.maker.haystack
        for kind in dict.fromkeys(task.questions for task in tasks if task.questions is not None):
            self.maker.questions(kind)
        if options.compat:
            wonderwords("noun")
        if options.english_words is not None:
            read_lines(options.english_words)

    def key(self, task: str, length: int) -> str:
        """Return 16 hexadecimal digits that identify everything that makes the samples."""
        options, spec = self.options, TASKS[task]
        uses: dict[str, str | None] = {}
        if spec.needles is not None and spec.needles.haystack == "essay":
            uses = {"haystack": self.maker.haystack.sha256, "splitter": options.splitter}
        if spec.questions is not None:
            source = getattr(options, spec.questions)
            uses["questions"] = sha256(source) if Path(source).is_file() else source
        if options.compat:
            uses["wonderwords"] = WONDERWORDS
            if task == "cwe" and options.english_words is not None:
                uses["english_words"] = sha256(options.english_words)
        settings = {
            "version": VERSION,
            "task": task,
            "length": length,
            "seed": options.seed,
            "compat": options.compat,
            "tokenizer": self.maker.counter.hash,
            "frame": self.frame,
            **uses,
        }
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def path(self, task: str, length: int) -> Path:
        """Return where the samples of a task and length are kept."""
        return Path(self.options.cache) / f"{task}-{length}-{self.key(task, length)}.jsonl"

    def make(self, task: str, length: int) -> str | None:
        """Write the samples of a task and length, unless they are there.

        Returns:
            None, or why there are none: the length is too short and `options.too_short` is "skip".

        Raises:
            TooShortError: the length is too short, and that is an error.
        """
        path = self.path(task, length)
        # The other processes find what the first has written.
        with processes().main_process_first():
            if path.exists() and sum(1 for _ in _lines(path)) >= self.options.samples:
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}")
            try:
                with open(part, "w", encoding="utf-8") as file:
                    for sample in self.maker.samples(task, length, self.options.samples):
                        file.write(json.dumps(sample.as_dict(), ensure_ascii=False) + "\n")
                part.replace(path)
            except TooShortError as error:
                if self.options.too_short == "error":
                    raise
                return str(error)
            finally:
                part.unlink(missing_ok=True)
        return None

    def read(self, task: str, length: int) -> list[Sample]:
        """Return the samples of a task and length that `make` has written."""
        lines = list(_lines(self.path(task, length)))[: self.options.samples]
        return [Sample(**json.loads(line)) for line in lines]


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from file
