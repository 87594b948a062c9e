"""Copying and look-up in text: scoring, resuming, errors, the report."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ssm_hf
from eval.blocks import THIS, Run, Table, to_markdown
from eval.model import LoadedModel
from eval.options import TextTaskOptions, TextTasksOptions
from eval.run import check_inputs
from eval.suite import Suite
from eval.text_tasks import (
    build,
    check_text_tasks,
    run_text_tasks,
    text_task_blocks,
    text_task_glance,
)


class Rigged(torch.nn.Module):
    """Says the next token of its input, except behind a line break: what perfect memory would say,
    for prompts that hold no other answer."""

    def __init__(self, wrong_behind: int | None = None) -> None:
        super().__init__()
        self.wrong_behind, self.calls = wrong_behind, 0
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.config = SimpleNamespace(to_json_string=lambda use_diff: "{}")

    @property
    def base_model(self) -> Any:
        return self

    def forward(self, input_ids, use_cache):
        assert not use_cache
        self.calls += 1
        following = input_ids.roll(-1, 1)
        if self.wrong_behind is not None:
            following = torch.where(input_ids == self.wrong_behind, 0, following)
        return (torch.nn.functional.one_hot(following, 264).float(),)

    def get_output_embeddings(self):
        return torch.nn.Identity()


def rigged(**options) -> LoadedModel:
    return LoadedModel(Rigged(**options), ssm_hf.byte_tokenizer(), (256,), "rigged")  # pyright: ignore[reportArgumentType]


def entries(tmp_path, **changes) -> TextTasksOptions:
    file = tmp_path / "text.txt"
    file.write_text("It was the best of times, it was the worst of times, " * 9)
    book = TextTaskOptions(task="phone_book", lengths=[3, 9], samples=6)
    copy = TextTaskOptions(
        task="text_copy", lengths=[10, 60], options={"file": str(file)}, samples=6
    )
    return TextTasksOptions(**{"tasks": {"book": book, "copy": copy}, **changes})


def test_a_model_that_knows_scores_one_and_one_that_errs_less(tmp_path) -> None:
    results = run_text_tasks(rigged(), entries(tmp_path), tmp_path / "samples")
    for name, sizes in (("book", (3, 9)), ("copy", (10, 60))):
        rows = results["tasks"][name]["lengths"]
        assert [row["length"] for row in rows] == list(sizes)
        assert [row["string"] for row in rows] == [row["token"] for row in rows] == [1, 1]
        assert rows[0]["low"] < 1 == rows[0]["high"]
        assert rows[0]["n"] == 6
        assert rows[0]["tokens"] < rows[1]["tokens"]
    # Prefix, passage twice with a blank line behind each, and the passage.
    assert results["tasks"]["copy"]["lengths"][0]["tokens"] == 1 + 3 * 10 + 2 * 2

    # Wrong behind every "7": numbers without one but at their end stay right.
    erring = run_text_tasks(rigged(wrong_behind=ord("7")), entries(tmp_path), tmp_path / "other")
    (row, _) = erring["tasks"]["book"]["lengths"]
    assert row["string"] < 1
    assert row["string"] < row["token"] < 1
    assert erring["tasks"]["copy"]["lengths"][1]["string"] == 1


def test_finished_samples_are_not_scored_again(tmp_path) -> None:
    options = entries(tmp_path)
    first, second = rigged(), rigged()
    results = run_text_tasks(first, options, tmp_path / "samples")
    assert first.model.calls > 0
    assert run_text_tasks(second, options, tmp_path / "samples") == results
    assert second.model.calls == 0
    # A different batch size is no other task; a different option is.
    assert (
        run_text_tasks(second, entries(tmp_path, batch_tokens=1), tmp_path / "samples") == results
    )
    assert second.model.calls == 0
    shuffled = options.tasks["copy"].options | {"shuffled": True}
    task = TextTaskOptions(task="text_copy", lengths=[10], options=shuffled, samples=6)
    run_text_tasks(second, TextTasksOptions(tasks={"copy": task}), tmp_path / "samples")
    assert second.model.calls > 0


def test_batches_do_not_change_a_score(tmp_path) -> None:
    one = run_text_tasks(
        rigged(wrong_behind=ord("t")), entries(tmp_path, batch_tokens=1), tmp_path / "a"
    )
    many = run_text_tasks(rigged(wrong_behind=ord("t")), entries(tmp_path), tmp_path / "b")
    assert one == many


def test_a_real_model_runs(loaded, tmp_path) -> None:
    results = run_text_tasks(loaded, entries(tmp_path), tmp_path / "samples")
    assert 0 <= results["tasks"]["copy"]["lengths"][0]["token"] <= 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "phonebook", "lengths": [3]}, "closest is 'phone_book'"),
        ({"task": "parity", "lengths": [3]}, "not made of text"),
        ({"task": "phone_book", "lengths": [2]}, "below the smallest possible, 3"),
        ({"task": "text_copy", "lengths": [9]}, r"needs the options \['file'\]"),
        ({"task": "phone_book", "lengths": [3], "options": {"example": 1}}, "no option"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(model_dir, entry, message) -> None:
    suite = Suite(text_tasks=TextTasksOptions(tasks={"x": TextTaskOptions(**entry)}))
    with pytest.raises(ValueError, match=message):
        check_inputs(str(model_dir), suite)


def test_a_missing_text_is_found_too(model_dir) -> None:
    entry = TextTaskOptions(task="text_copy", lengths=[3], options={"file": "nowhere.txt"})
    suite = Suite(text_tasks=TextTasksOptions(tasks={"x": entry}))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        check_inputs(str(model_dir), suite)


def test_empty_options_are_refused() -> None:
    with pytest.raises(ValueError, match="tasks is empty"):
        TextTasksOptions(tasks={})
    with pytest.raises(ValueError, match="lengths is empty"):
        TextTaskOptions(task="phone_book", lengths=[])
    with pytest.raises(ValueError, match="samples must be above 0"):
        TextTaskOptions(task="phone_book", lengths=[3], samples=0)


def test_special_tokens_in_a_text_are_text(tmp_path) -> None:
    entry = TextTaskOptions(task="phone_book", lengths=[3])
    task: Any = build(entry, ssm_hf.byte_tokenizer())
    assert task.encode("<|endoftext|>") == list(b"<|endoftext|>")
    check_text_tasks(TextTasksOptions(tasks={"book": entry}), ssm_hf.byte_tokenizer())


def test_report(tmp_path) -> None:
    options = entries(tmp_path)
    good = {"text_tasks": run_text_tasks(rigged(), options, tmp_path / "a")}
    bad = {"text_tasks": run_text_tasks(rigged(wrong_behind=ord("t")), options, tmp_path / "b")}
    blocks = text_task_blocks([Run("good", good), Run("bad", bad)])
    tables = [block for block in blocks if isinstance(block, Table)]
    assert [len(table.rows) for table in tables] == [2, 2]
    text = to_markdown(blocks, "plots")
    assert "| good | 1.000 | 1.000 |" in text
    assert "(plots/text-book.svg)" in text
    assert "text_copy" in to_markdown(text_task_blocks([Run(THIS, good)]), "plots")
    assert text_task_glance(good) == [
        ("book at 9, exact answers", "100.0% (n = 6)"),
        ("copy at 60, exact answers", "100.0% (n = 6)"),
    ]
