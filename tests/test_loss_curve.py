"""benchmarks/loss_curve.py on a tiny model, without a GPU: every figure is written as it comes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import common, loss_curve
from tests.helpers import tiny


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(loss_curve, "PIECE", 2)
    # The CPU's ceilings are not of interest, and take long.
    monkeypatch.setattr(common, "ceilings", lambda: {})
    tiny("mamba2", num_hidden_layers=1).save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 96, 2000).astype("<u2")
    tokens.tofile(tmp_path / "tokens.u16")
    return [
        *(str(tmp_path / "tokens.u16"), "--config", str(tmp_path / "config.json")),
        *("--batch", "2", "--length", "16", "--steps", "4", "--seconds", "0.01"),
        *("--perturbed", "2"),
        *("--output", str(tmp_path / "results" / "loss_curve.jsonl")),
    ]


def _results(arguments: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(arguments[-1]).read_text().splitlines()]


def test_curves_are_written_as_they_come(arguments: list[str]) -> None:
    loss_curve.main(arguments)
    results = _results(arguments)
    assert [len(r["curves"]) for r in results] == [2, 4, 5, 5]
    curves, values = results[-1]["curves"], results[-1]["values"]
    # On a CPU both are the torch path.
    assert curves["kernels"] == curves["torch"]
    assert curves["perturbed 1"] != curves["perturbed 2"]
    assert values["mean_difference"] == 0 < values["noise_mean_difference"] < 0.1
    assert curves["later"][0][1] == curves["kernels"][0]


def test_a_cut_torch_run_is_compared_as_far_as_it_came(arguments: list[str]) -> None:
    loss_curve.main([*arguments[:-2], "--torch-seconds", "0.0001", *arguments[-2:]])
    last = _results(arguments)[-1]
    assert len(last["curves"]["torch"]) == 2
    assert last["values"]["mean_difference"] == 0


def test_noise_is_the_widest_pair_of_runs_over_the_steps_of_the_torch_path() -> None:
    kernels, perturbed = [1.0, 1.0, 1.0], [[1.1, 1.0, 9.0], [0.9, 1.0, 1.0]]
    values = loss_curve.distances(kernels, [1.15, 1.0], perturbed)
    assert values["noise_largest_difference"] == pytest.approx(0.2)
    assert values["noise_mean_difference"] == pytest.approx(0.1)
    assert values["noise_median_largest_difference"] == pytest.approx(0.1)
    assert loss_curve.is_within_noise(values)
    # No further in the mean, but at one step.
    values = loss_curve.distances([1.0] * 4, [1.0, 1.0, 1.0, 1.3], [[1.1] * 4, [0.9] * 4])
    assert values["mean_difference"] < values["noise_mean_difference"]
    assert not loss_curve.is_within_noise(values)


def test_families_of_runs_are_compared(arguments: list[str]) -> None:
    loss_curve.main([*arguments[:-2], "--torch-perturbed", "2", *arguments[-2:]])
    results = _results(arguments)
    assert [len(r["curves"]) for r in results] == [2, 4, 5, 6, 7, 7]
    curves, values = results[-1]["curves"], results[-1]["values"]
    assert curves["torch perturbed 1"] not in (curves["torch"], curves["perturbed 1"])
    assert values["torch_runs"] == 3
    assert 0 < values["family_p"] <= 1


def test_families_apart_are_told_from_one_family() -> None:
    low = [[1.0 + 0.01 * i, 2.0] for i in range(4)]
    high = [[1.5 + 0.01 * i, 2.0] for i in range(4)]
    values = loss_curve.compare_families(low, high)
    # Of the 70 divisions only this one and its mirror lie as far apart.
    assert values["family_p"] == pytest.approx(2 / 70)
    assert values["family_difference"] == pytest.approx(0.25)
    assert not loss_curve.is_within_noise(values)
    mixed = loss_curve.compare_families([low[0], high[3]], [low[1], high[2]])
    assert mixed["family_p"] > 0.5
    assert loss_curve.is_within_noise(mixed)


def test_curves_too_far_apart_are_an_error(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_curve, "is_within_noise", lambda values: False)
    with pytest.raises(RuntimeError, match="too far apart"):
        loss_curve.main(arguments)
    assert len(_results(arguments)) == 3


def test_a_loss_that_is_not_finite_ends_the_run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_curve, "LEARNING_RATE", 1e38)
    with pytest.raises(RuntimeError, match="not finite"):
        loss_curve.main(arguments)


def test_the_last_line_of_each_model_is_drawn(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loss_curve.main(arguments)
    loss_curve.plot(Path(arguments[-1]), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
