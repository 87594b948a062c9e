"""Section `ruler` from the command line to the report, with a tiny model."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.blocks import Run
from eval.model import LoadedModel
from eval.report import render
from eval.ruler import runner
from eval.ruler.options import RulerOptions
from eval.ruler.results import summarise
from eval.ruler.runner import check_ruler, run_ruler
from eval.ruler.samples import SampleFiles
from eval.run import main
from tests.eval.ruler_inputs import hotpotqa, squad, word_tokenizer

SUITE = Path(__file__).parents[2] / "configs" / "eval" / "ruler.yaml"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name, data in (("squad", squad()), ("hotpotqa", hotpotqa())):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return {
        "squad": str(tmp_path / "squad.json"),
        "hotpotqa": str(tmp_path / "hotpotqa.json"),
        "cache": str(tmp_path / "cache"),
    }


def _run(model: Path, files: dict[str, str], output: Path, **values: Any) -> int:
    values = {**files, "lengths": [1024], "samples": 2, "too_short": "skip", **values}
    arguments = ["--model", str(model), "--suite", str(SUITE), "--output", str(output)]
    arguments += ["--dtype", "float32"]
    for name, value in values.items():
        arguments += [f"--ruler.{name}", json.dumps(value)]
    return main(arguments)


def _results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())["ruler"]


def test_the_suite_runs_and_resumes(
    model_dir: Path,
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = ["niah_single_1", "niah_multiquery", "vt", "cwe", "fwe", "qa_1"]
    generate, batches = runner._generate, []

    def counting(loaded: LoadedModel, options: Any, batch: list[Any], *more: Any) -> list[str]:
        batches.append(len(batch))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generate(loaded, options, batch, *more)

    monkeypatch.setattr(runner, "_generate", counting)
    output = tmp_path / "report"
    how = {"tasks": tasks, "batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        _run(model_dir, files, output, **how)
    assert batches == [1, 1, 1]
    finished = (output / "samples" / "ruler-niah_single_1.jsonl").read_text()
    assert _run(model_dir, files, output, **how) == 0
    # 5 tasks of 2 samples, of which two samples were finished before.
    assert sum(batches) == 3 + 8
    assert (output / "samples" / "ruler-niah_single_1.jsonl").read_text() == finished
    section = _results(output)
    (out,) = section["left_out"]
    assert (out["task"], out["length"]) == ("cwe", 1024)
    assert "does not fit in 1024 tokens" in out["reason"]
    assert [cell["task"] for cell in section["cells"]] == [t for t in tasks if t != "cwe"]
    assert {cell["samples"] for cell in section["cells"]} == {2}
    assert section["averaged"] == [t for t in tasks if t != "cwe"]
    text = (output / "report.md").read_text()
    for expected in (
        "## RULER",
        "| niah_multiquery |",
        "not run",
        "effective length",
        "moby_dick",
    ):
        assert expected in text
    assert "RULER" in capsys.readouterr().out
    # Nothing is left to do: the results are the same without the model being asked.
    monkeypatch.setattr(runner, "_generate", None)
    assert _run(model_dir, files, output, **how) == 0
    assert _results(output) == section


def test_batches_and_pieces_answer_as_single_prompts_do(
    loaded: LoadedModel, files: dict[str, str], tmp_path: Path
) -> None:
    predictions = []
    for number, (size, piece) in enumerate([(1, None), (3, None), (3, 256)]):
        options = RulerOptions(
            tasks=["niah_single_2", "fwe"],
            lengths=[1024],
            samples=3,
            batch_size=size,
            prefill_chunk_size=piece,
            **files,
        )
        run_ruler(loaded, options, tmp_path / str(number))
        rows = [
            json.loads(line)
            for task in options.tasks
            for line in (tmp_path / str(number) / f"ruler-{task}.jsonl").read_text().splitlines()
        ]
        done = [(row["id"], row["sample"]["prediction"]) for row in rows if "id" in row]
        predictions.append(sorted(done))
    assert len(predictions[0]) == 6
    assert predictions[0] == predictions[1] == predictions[2]


def test_a_batch_too_large_for_the_memory_is_halved(
    loaded: LoadedModel, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def small(loaded: Any, options: Any, batch: list[Any], *more: Any) -> list[str]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return ["".join(sample.outputs) for sample in batch]

    monkeypatch.setattr(runner, "_generate", small)
    options = RulerOptions(
        tasks=["niah_single_2"], lengths=[1024], samples=9, batch_tokens=1024 * 6, **files
    )
    results = run_ruler(loaded, options, tmp_path / "samples")
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert results["means"] == [{"length": 1024, "mean": 100.0, "categories": {"retrieval": 100.0}}]
    assert results["cells"][0]["missed"] == []


def test_what_does_not_fit_in_memory_is_left_out(
    loaded: LoadedModel, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def small(loaded: Any, options: Any, batch: list[Any], *more: Any) -> list[str]:
        tried.append(batch[0].length)
        if batch[0].length > 1024:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return ["".join(sample.outputs) for sample in batch]

    monkeypatch.setattr(runner, "_generate", small)
    options = RulerOptions(
        tasks=["niah_single_2"], lengths=[4096, 2048, 1024], samples=2, batch_size=2, **files
    )
    results = run_ruler(loaded, options, tmp_path / "samples")
    assert [cell["length"] for cell in results["cells"]] == [1024]
    reasons = {out["length"]: out["reason"] for out in results["left_out"]}
    assert reasons == {2048: "out of memory", 4096: "out of memory at 2,048 tokens"}
    assert max(tried) <= 2048
    # The mean of what ran is still one.
    assert [(row["length"], row["mean"]) for row in results["means"]] == [(1024, 100.0)]
    assert results["effective"]["absolute"]["length"] == 1024


def test_samples_are_kept_and_found_again(files: dict[str, str]) -> None:
    options = RulerOptions(tasks=["niah_single_1"], lengths=[512], samples=3, **files)
    made = SampleFiles(options, word_tokenizer(), 0)
    path = made.path("niah_single_1", 512)
    assert made.make("niah_single_1", 512) is None
    written = path.read_bytes()
    rows = [json.loads(line) for line in written.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert {"input", "outputs", "answer_prefix", "length", "depths", "tokens"} <= set(rows[0])
    # Fewer come from the same file, more are added after the same ones.
    fewer = dataclasses.replace(options, samples=2)
    assert len(SampleFiles(fewer, word_tokenizer(), 0).read("niah_single_1", 512)) == 2
    more = SampleFiles(dataclasses.replace(options, samples=5), word_tokenizer(), 0)
    assert more.path("niah_single_1", 512) == path
    more.make("niah_single_1", 512)
    assert path.read_bytes().startswith(written)
    # Whatever changes the samples changes the file.
    for change in ({"seed": 1}, {"compat": True}):
        other = SampleFiles(dataclasses.replace(options, **change), word_tokenizer(), 0)
        assert other.path("niah_single_1", 512) != path
    assert SampleFiles(options, word_tokenizer(), 1).path("niah_single_1", 512) != path


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"tasks": ["niah_single_4"]}, ValueError, "unknown task 'niah_single_4', the closest is"),
        ({"tasks": []}, ValueError, "ruler.tasks must be one or more"),
        ({"lengths": [256]}, ValueError, "ruler.lengths must be 512 or more, got 256"),
        ({"samples": 0}, ValueError, "ruler.samples must be above 0"),
        ({"squad": "none.json"}, FileNotFoundError, "none.json does not exist"),
        ({"haystack": "none.txt"}, FileNotFoundError, "none.txt does not exist"),
        ({"too_short": "error"}, ValueError, "ruler task cwe does not fit in 1024 tokens"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_loads(
    values: dict[str, Any],
    error: type[Exception],
    message: str,
    model_dir: Path,
    files: dict[str, str],
    tmp_path: Path,
) -> None:
    # A folder with a tokenizer and without a model.
    no_model = tmp_path / "no_model"
    shutil.copytree(model_dir, no_model)
    (no_model / "model.safetensors").unlink()
    with pytest.raises(error, match=message):
        _run(no_model, files, tmp_path / "report", **values)


def test_an_empty_question_file_and_a_tokenizer_without_end_are_refused(
    files: dict[str, str], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    options = RulerOptions(tasks=["qa_1"], samples=1, **{**files, "squad": str(empty)})
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no question"):
        check_ruler(options, "none", word_tokenizer())
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos"):
        check_ruler(options, "none", tokenizer)


@pytest.fixture
def header(model_dir: Path, files: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    _run(model_dir, files, tmp_path / "one", tasks=["niah_single_2"], samples=1)
    return json.loads((tmp_path / "one" / "results.json").read_text())


def test_report_of_one_run_and_of_two(header: dict[str, Any], tmp_path: Path) -> None:
    def results(share: float) -> dict[str, Any]:
        options = RulerOptions(
            tasks=["niah_multivalue", "niah_single_1", "qa_1"], lengths=[1024, 2048], samples=10
        )
        cells = {}
        for task in options.tasks:
            for length in options.lengths:
                cells[task, length] = [
                    {
                        "score": share,
                        "tokens": length - 100,
                        "length": length - 2,
                        "depths": [i / 10],
                        "found": [i < 10 * share],
                        "prediction": "x",
                    }
                    for i in range(10)
                ]
        del cells["qa_1", 1024]
        left_out = {("qa_1", 1024): "too few tokens"}
        return {**header, "ruler": summarise(options, cells, left_out, {"haystack": "a.txt"})}

    one = tmp_path / "a"
    names = {path.name for path in render([Run("this model", results(0.5))], one)}
    assert {"report.md", "report.html"} <= names
    text = (one / "report.md").read_text()
    assert "| niah_multivalue | 50.0 [24, 76] | 50.0 [24, 76] |" in text
    assert "| qa_1 | not run |" in text
    assert "| qa_1 | 1,024 | too few tokens |" in text
    assert "0.50, 0.60, 0.70, 0.80, 0.90" in text  # depths of what was missed
    both = [Run("first", results(0.5)), Run("second", results(0.9))]
    render(both, tmp_path / "b")
    text = (tmp_path / "b" / "report.md").read_text()
    assert "| 2,048 | 50.0 | 90.0 |" in text
    assert "| effective length, absolute: mean above 85.6 | none | 2,048 |" in text
    assert "RULER: second" in text
