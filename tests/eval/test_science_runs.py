"""Runs in processes: the toy suite as a whole, and what happens when a run goes wrong."""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eval.science.__main__ import main, run, suite_file
from eval.science.plan import Plan
from eval.science.pool import FORK_POISONED, Pool, _Running
from eval.science.suite import load_science_suite
from eval.science.worker import ERROR, write_json

ROOT = Path(__file__).parents[2]
MAMBA = {
    "model_type": "mamba2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "head_dim": 16,
    "n_groups": 1,
    "state_size": 8,
    "chunk_size": 16,
}


def write_suite(path: Path, **changes) -> Path:
    """Two models on the parity task, a few steps each."""
    values = {
        "title": "test",
        "train": {
            "max_steps": 3,
            "batch_size": 4,
            "micro_batch_size": 4,
            "save_every": 0,
            "tracker": None,
            "schedule": {"warmup_steps": 1},
            "data": {"seq_len": 16},
        },
        "models": {
            "good": {"config": MAMBA},
            "bad": {"like": "good", "train": {"model": {"execution": "graph"}}},
        },
        "experiments": {
            "parity": {
                "task": "parity",
                "lengths": ["2-8"],
                "models": ["good", "bad"],
                "learning_rates": [0.01],
                "seeds": 1,
                "select": 8,
                "measure": [8, 16],
                "samples": 16,
            }
        },
        **changes,
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_run_that_fails_leaves_the_others_alone_and_runs_resume(tmp_path, capsys) -> None:
    """execution: graph is refused where there is no GPU, inside the run's process."""
    file = write_suite(tmp_path / "suite.yaml")
    suite = load_science_suite(file)
    results = run(suite, file, tmp_path / "out", workers=1)
    assert results["header"]["runs"] == {"finished": 1, "failed": 1, "planned": 2}
    (failure,) = results["failures"]
    assert failure["run"] == "parity/bad/lr0.01/seed0"
    assert "needs CUDA devices" in failure["error"]
    folder = tmp_path / "out/runs/parity/good/lr0.01/seed0"
    first = json.loads((folder / "result.json").read_text())
    assert set(first["measure"]) == {"8", "16"}
    assert "Traceback" in (tmp_path / "out/runs/parity/bad/lr0.01/seed0/run.log").read_text()
    shown = capsys.readouterr().out
    assert "[1/2] parity/good/lr0.01/seed0: string@8" in shown
    assert "FAILED: ValueError" in shown

    # Again: what is finished stays, what failed is tried once more; a new length is measured on
    # the trained model; and a report alone runs nothing.
    file = write_suite(tmp_path / "suite.yaml")
    values = yaml.safe_load(file.read_text())
    values["experiments"]["parity"]["measure"] = [8, 16, 24]
    values["experiments"]["parity"]["models"] = ["good"]
    file.write_text(yaml.safe_dump(values))
    suite = load_science_suite(file)
    before = run(suite, file, tmp_path / "out", report_only=True)
    assert before["header"]["runs"]["finished"] == 0
    weights = folder / "train/final/model.safetensors"
    trained_at = weights.stat().st_mtime_ns
    results = run(suite, file, tmp_path / "out", workers=1)
    assert results["header"]["runs"] == {"finished": 1, "failed": 0, "planned": 1}
    assert weights.stat().st_mtime_ns == trained_at
    again = json.loads((folder / "result.json").read_text())
    assert again["measure"]["16"] == first["measure"]["16"]
    assert "24" in again["measure"]
    assert run(suite, file, tmp_path / "out", report_only=True)["header"]["runs"]["finished"] == 1


def test_runs_that_take_too_long_are_ended(tmp_path) -> None:
    file = write_suite(tmp_path / "suite.yaml", timeout_s=0.01)
    results = run(load_science_suite(file), file, tmp_path / "out", workers=2)
    assert results["header"]["runs"] == {"finished": 0, "failed": 2, "planned": 2}
    assert {f["error"] for f in results["failures"]} == {"not done after 0 s"}


def test_when_time_is_up_the_report_says_what_is_missing(tmp_path) -> None:
    file = write_suite(tmp_path / "suite.yaml")
    results = run(load_science_suite(file), file, tmp_path / "out", workers=1, minutes=1e-6)
    assert results["header"]["runs"] == {"finished": 0, "failed": 0, "planned": 2}
    assert len(results["unfinished"]) == 2
    assert "## Not run" in (tmp_path / "out/report.md").read_text()


def test_mistakes_end_before_the_first_run(tmp_path) -> None:
    file = write_suite(
        tmp_path / "suite.yaml", models={"good": {"config": {"model_type": "mamba3x"}}}
    )
    values = yaml.safe_load(file.read_text())
    values["experiments"]["parity"]["models"] = ["good"]
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="parity, model good"):
        run(load_science_suite(file), file, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys) -> None:
    assert suite_file("tiny") == ROOT / "configs/eval/science-tiny.yaml"
    assert suite_file("other.yaml") == Path("other.yaml")
    for wrong in (["--workers", "0"], ["--minutes", "-1"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "must be above 0" in capsys.readouterr().err
    # Nothing has run: exit code 1, and a report all the same.
    assert main(["--suite", "tiny", "--output", str(tmp_path), "--report-only"]) == 1
    assert (tmp_path / "report.md").is_file()


@pytest.mark.slow
def test_who_ends_it_gets_a_report_and_no_run_goes_on(tmp_path) -> None:
    file = write_suite(tmp_path / "suite.yaml")
    values = yaml.safe_load(file.read_text())
    values["train"]["max_steps"] = 10**6
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "eval.science", "--suite", str(file)]
    process = subprocess.Popen([*command, "--output", str(tmp_path / "out")], cwd=ROOT)
    log = tmp_path / "out/runs/parity/good/lr0.01/seed0/train/log.jsonl"
    while not log.is_file():
        assert process.poll() is None
        time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=120) == 1  # no run has finished
    assert "## Not run" in (tmp_path / "out/report.md").read_text()
    steps = log.read_text()
    time.sleep(3)
    assert log.read_text() == steps


def test_the_toy_suite(tmp_path) -> None:
    """The whole path at toy size."""
    assert main(["--suite", "tiny", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "science.json").read_text())
    look_up, parity = (claim["verdict"] for claim in results["claims"])
    assert parity == "confirmed"
    # Of two seeds one may not have learnt the look-up yet, which depends on the machine's rounding.
    assert look_up in ("confirmed", "not decided")
    assert [row["verdict"] for row in results["controls"]] == ["confirmed"] * 3
    assert results["flagged"] == []


def test_what_is_worth_a_second_attempt(tmp_path) -> None:
    """On GPUs a failed run goes once more without a graph; where forked processes cannot use a GPU,
    later ones begin from nothing."""
    file = write_suite(tmp_path / "suite.yaml")
    plan = Plan(load_science_suite(file), tmp_path / "out")
    said: list[str] = []
    pool = Pool(plan, workers=1, timeout_s=9, minutes=None, say=said.append)
    pool.gpus = 1
    group, key = next(plan.open())
    job = plan.job(group, key)

    def failed(execution=None, method="forkserver", error="it fell over"):
        folder = plan.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ERROR, {"hash": job.hash, "error": error, "execution": execution})
        ended = _Running(multiprocessing.Process(), group, key, job, 0.0, execution, method)
        pool._settle(ended, "nothing was left", 1.0)

    failed()
    assert group.errors == {}
    assert [again[2] for again in pool._again] == ["eager"]
    pool._again.clear()
    failed(execution="eager")
    assert group.errors == {key: "it fell over"}
    assert pool._again == []
    assert "FAILED: it fell over" in said[-1]

    group.errors.clear()
    failed(error=f"RuntimeError: {FORK_POISONED}. To use CUDA ...")
    assert pool._method == "spawn"
    assert [again[2] for again in pool._again] == [None]

    pool._again.clear()
    pool.gpus = 0
    failed()
    assert group.errors == {key: "it fell over"}  # a CPU has nothing else to try
