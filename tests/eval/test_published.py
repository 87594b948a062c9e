"""Published zero-shot scores beside measured ones."""

import math

import pytest

from eval.published import (
    AVERAGES,
    averages,
    check_published,
    compare_published,
    find_published,
    published,
)
from eval.tasks.zero_shot import ZERO_SHOT_TASKS


def _tasks(scores: dict[str, float], stderr: float | None) -> dict:
    tasks: dict = {}
    for key, value in scores.items():
        task, metric = key.split("/")
        scale = 1 if metric == "perplexity" else 100
        metrics = tasks.setdefault(task, {"metrics": {}})["metrics"]
        metrics[metric] = {"value": value / scale, "stderr": None if stderr is None else stderr}
    return tasks


def test_tables_are_whole_and_their_averages_are_means() -> None:
    table = published()
    assert len(table["models"]) == 18
    for name, row in table["models"].items():
        assert table["sources"][row["source"]]["url"].startswith("https://arxiv.org/abs/")
        for key in row["scores"]:
            task, metric = key.split("/")
            assert metric in ZERO_SHOT_TASKS[task].reported
        measured = averages(_tasks(row["scores"], None))
        for average, printed in row["average"].items():
            # Printed with one decimal, of columns with one decimal.
            if abs(100 * measured[average]["value"] - printed) > 0.1:
                assert str(printed) in row["note"], name


def test_averages_are_those_of_the_papers() -> None:
    scores = {f"{task}/{metric}": 10.0 for task, metric in AVERAGES["Mamba-2, 7 tasks"].items()}
    tasks = _tasks({**scores, "openbookqa/acc": 80.0}, None)
    tasks["openbookqa"]["metrics"]["acc_norm"]["value"] = 0.45
    values = {name: score["value"] for name, score in averages(tasks).items()}
    assert values == pytest.approx(
        {"Mamba, 6 tasks": 0.10, "Mamba-2, 7 tasks": 0.15, "Mamba-3, 7 tasks": 0.20}
    )
    assert all(score["stderr"] is None for score in averages(tasks).values())
    del tasks["openbookqa"]
    assert set(averages(tasks)) == {"Mamba, 6 tasks"}
    for task in tasks.values():
        task["metrics"]["acc" if "acc" in task["metrics"] else "acc_norm"]["stderr"] = 0.03
    assert averages(tasks)["Mamba, 6 tasks"]["stderr"] == pytest.approx(0.03 / math.sqrt(6))


@pytest.mark.parametrize(
    ("key", "change", "stderr", "flag"),
    [
        ("piqa/acc", 0.4, 0.0, False),
        ("piqa/acc", -0.6, 0.0, True),
        ("piqa/acc", -0.6, 0.004, False),
        ("piqa/acc", 0.9, 0.004, True),
        ("piqa/acc", 0.6, None, True),
        ("lambada_openai/perplexity", 0.3, 0.1, False),  # 2 % of 16.86 is 0.34
        ("lambada_openai/perplexity", 0.4, 0.1, True),
        ("lambada_openai/perplexity", 0.4, 0.3, False),
    ],
)
def test_a_difference_stands_out_beyond_noise(
    key: str, change: float, stderr: float | None, flag: bool
) -> None:
    expected = published()["models"]["mamba2-130m"]["scores"]
    tasks = _tasks({**expected, key: expected[key] + change}, stderr)
    table = compare_published("mamba2-130m", tasks)
    for score in table["scores"]:
        changed = f"{score['name']}/{score['metric']}" == key
        assert score["difference"] == pytest.approx(change if changed else 0.0)
        assert score["flag"] is (flag if changed else False)
    assert len(table["scores"]) == 8
    assert [mean["name"] for mean in table["averages"]] == ["Mamba-2, 7 tasks"]
    assert table["source"]["url"].endswith("2405.21060")


def test_rows_are_found_by_hub_name_only() -> None:
    assert find_published("state-spaces/mamba2-130m") == "mamba2-130m"
    assert find_published("runs/mamba2-130m") is None
    assert compare_published(None, {}) is None
    assert compare_published("mamba-2.8b", {"boolq": {}})["scores"] == []
    with pytest.raises(ValueError, match="nothing is known of 'mamba-130', the closest is 'mamba-"):
        check_published("mamba-130")
