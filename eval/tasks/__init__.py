"""Tasks that suites and training configs can name."""

from collections.abc import Mapping
from typing import Any

from eval.tasks.base import IGNORED, Lengths, Samples, Task, build_task, check_fits, pack, seeded
from eval.tasks.copying import (
    CopyMemory,
    Delay,
    InductionHeads,
    NgramLookup,
    SelectiveCopy,
    StringCopy,
)
from eval.tasks.recall import MQAR, Directory, Needles
from eval.tasks.text import Encode, PhoneBook, TextCopy
from eval.tasks.tracking import ModularArithmetic, Parity, WordProblem

__all__ = [
    "IGNORED",
    "TASKS",
    "Lengths",
    "Samples",
    "Task",
    "check_fits",
    "make_task",
    "pack",
    "seeded",
]

TASKS: dict[str, type[Task]] = {
    "string_copy": StringCopy,
    "ngram_lookup": NgramLookup,
    "selective_copy": SelectiveCopy,
    "induction_heads": InductionHeads,
    "copy_memory": CopyMemory,
    "delay": Delay,
    "mqar": MQAR,
    "needles": Needles,
    "directory": Directory,
    "parity": Parity,
    "word_problem": WordProblem,
    "modular_arithmetic": ModularArithmetic,
    "text_copy": TextCopy,
    "phone_book": PhoneBook,
}


def make_task(name: str, options: Mapping[str, Any], encode: Encode | None = None) -> Task:
    """The task `name` with `options`.

    Args:
        name: one of TASKS.
        options: fields of the task's class.
        encode: text -> token ids, for the tasks that are made of text.

    Raises:
        ValueError: an unknown task or option, a value that does not fit, or a task of text without
            a tokenizer.
        FileNotFoundError: the text of a task is not there.
    """
    return build_task(TASKS, name, dict(options), encode)
