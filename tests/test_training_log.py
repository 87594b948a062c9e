"""benchmarks/training_log.py: curves of runs from their logs."""

import json
from pathlib import Path

import pytest

from benchmarks import training_log


def _log(folder: Path, losses: list[float], ended: bool) -> Path:
    folder.mkdir()
    events: list[dict[str, object]] = [{"event": "start", "step": 0}]
    for i, loss in enumerate(losses, 1):
        step = {"step": i, "loss": loss, "tokens": 100 * i, "elapsed_s": 2.0 * i, "skipped": 0}
        events.append({"event": "train", "tokens_per_s": 50.0 + i, **step})
    if ended:
        events += [{"event": "eval", "heldout_nats_per_token": 3.25}, {"event": "end"}]
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in events))
    return path


def test_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    logs = [_log(tmp_path / "one", [5.0, 4.0, 3.5], True), _log(tmp_path / "two", [6.0], False)]
    picture = tmp_path / "out" / "loss.svg"
    training_log.main([*map(str, logs), "--plot", str(picture)])
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| one | 300 | 6 | 52 | 3.500 | 3.250 | 0 |"
    assert rows[3] == "| two | 100 (stopped) | 2 | 51 | 6.000 | – | 0 |"
    assert picture.read_text().count("<path") > 2


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite at step 2"):
        training_log.read(_log(tmp_path / "one", [5.0, float("nan")], True))


def test_a_log_without_steps_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training step"):
        training_log.read(_log(tmp_path / "one", [], False))
