"""The eight zero-shot tasks that state-space papers report, on local files or from the Hub.

Prompts, answer choices and metrics are lm-evaluation-harness' own; only the place of the data
changes. A local file has the columns of the task's dataset on the Hub.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
from lm_eval.tasks import TaskManager

from eval.documents import read_rows


class ZeroShotTask(NamedTuple):
    """folder: of the task's YAML in lm_eval/tasks. reported: metrics in the papers' tables, first
    the main one. columns: that a local file must have."""

    folder: str
    reported: tuple[str, ...]
    columns: tuple[str, ...]


ZERO_SHOT_TASKS = {
    "lambada_openai": ZeroShotTask("lambada", ("acc", "perplexity"), ("text",)),
    "hellaswag": ZeroShotTask(
        "hellaswag", ("acc_norm",), ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    "piqa": ZeroShotTask("piqa", ("acc",), ("goal", "sol1", "sol2", "label")),
    "arc_easy": ZeroShotTask("arc", ("acc",), ("question", "choices", "answerKey")),
    "arc_challenge": ZeroShotTask("arc", ("acc_norm",), ("question", "choices", "answerKey")),
    "winogrande": ZeroShotTask(
        "winogrande", ("acc",), ("sentence", "option1", "option2", "answer")
    ),
    "openbookqa": ZeroShotTask(
        "openbookqa", ("acc_norm", "acc"), ("question_stem", "choices", "answerKey")
    ),
    "boolq": ZeroShotTask("super_glue/boolq", ("acc",), ("passage", "question", "label")),
}


def check_tasks(files: Mapping[str, str | None]) -> None:
    """Raise unless every task is known and every local file can be used.

    Raises:
        ValueError: unknown task (the message names the closest one), or a file without rows or
            with a row that lacks a column.
        FileNotFoundError: missing file; the message names task and path.
    """
    for name, file in files.items():
        if name not in ZERO_SHOT_TASKS:
            (close,) = difflib.get_close_matches(name, ZERO_SHOT_TASKS, n=1, cutoff=0.0)
            raise ValueError(f"lm_eval.tasks: unknown task {name!r}, the closest is {close!r}")
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"lm_eval.tasks.{name}: file {file} does not exist")
        if file is not None:
            _check_columns(name, file)


def build_tasks(files: Mapping[str, str | None]) -> tuple[list[dict[str, Any]], TaskManager]:
    """Build the arguments `tasks` and `task_manager` of `lm_eval.simple_evaluate`.

    Args:
        files: task name -> local JSONL file (plain, `.gz` or `.xz`), or None for the Hub's dataset.

    Raises:
        ValueError, FileNotFoundError: see `check_tasks`.
    """
    check_tasks(files)
    members: list[dict[str, Any]] = []
    for name, file in files.items():
        if file is None:
            # Not the bare name: the harness does not take a group whose members are all names.
            members.append({"task": name})
            continue
        # Absolute: `datasets` resolves a relative path against the working directory.
        data_files = {"test": str(Path(file).resolve())}
        members.append(
            {
                "task": name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": data_files},
                "training_split": None,
                "validation_split": None,
                "test_split": "test",
            }
        )
    # A member of a group inherits all other settings of the registered task of its name. Indexing
    # only the eight folders saves the seconds that reading every task of the harness would take.
    root = Path(lm_eval.__file__).parent / "tasks"
    folders: list[str | Path] = sorted({root / ZERO_SHOT_TASKS[name].folder for name in files})
    manager = TaskManager(include_path=folders, include_defaults=False)
    return [{"group": "zero_shot", "task": members}], manager


def _check_columns(name: str, file: str) -> None:
    empty = True
    for number, row in read_rows(Path(file)):
        empty = False
        missing = [column for column in ZERO_SHOT_TASKS[name].columns if column not in row]
        if missing:
            raise ValueError(
                f"lm_eval.tasks.{name}: {file} line {number} lacks {missing}, has {sorted(row)}"
            )
    if empty:
        raise ValueError(f"lm_eval.tasks.{name}: {file} holds no rows")
