"""Published zero-shot scores of released models, and how ours differ from them.

The numbers are in `published.json`, each table with its source. Accuracies there are percentages,
as printed; results of the harness are fractions.
"""

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What each paper calls its average: the tasks and metrics that enter it. OpenBookQA is missing in
# the Mamba paper, acc_norm in the Mamba-2 paper and acc in the Mamba-3 paper; BoolQ is in none.
_SIX = {
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
}
AVERAGES = {
    "Mamba, 6 tasks": _SIX,
    "Mamba-2, 7 tasks": {**_SIX, "openbookqa": "acc_norm"},
    "Mamba-3, 7 tasks": {**_SIX, "openbookqa": "acc"},
}


def published() -> dict[str, Any]:
    """Return `published.json`: {"sources": {name: {...}}, "models": {name: {...}}}."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def check_published(name: str | None) -> None:
    """Raise ValueError unless `name` is None or has published scores; names the closest."""
    models = published()["models"]
    if name is not None and name not in models:
        (close,) = difflib.get_close_matches(name, models, n=1, cutoff=0.0)
        raise ValueError(
            f"lm_eval.published: nothing is known of {name!r}, the closest is {close!r}"
        )


def find_published(model: str) -> str | None:
    """Return the table row of a Hub name (`state-spaces/mamba2-130m`), None for any other."""
    rows = published()["models"].items()
    return next((name for name, row in rows if model in row["hub"]), None)


def averages(tasks: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return each paper's average whose tasks are all there, as a fraction.

    Args:
        tasks: task -> {"metrics": {metric: {"value": ..., "stderr": ...}}}.

    Returns:
        Name -> {"value", "stderr"}; the standard error is that of a mean of independent tasks, null
        where one of theirs is not known.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name, members in AVERAGES.items():
        scores = [
            tasks.get(task, {}).get("metrics", {}).get(metric) for task, metric in members.items()
        ]
        if None in scores:
            continue
        errors = [score["stderr"] for score in scores]
        stderr = None if None in errors else math.hypot(*errors) / len(errors)
        value = sum(score["value"] for score in scores) / len(scores)
        found[name] = {"value": value, "stderr": stderr}
    return found


def compare_published(name: str | None, tasks: Mapping[str, Any]) -> dict[str, Any] | None:
    """Put published scores beside measured ones.

    A difference stands out when it is larger than two standard errors and than 0.5 points of
    accuracy, or 2 % of a perplexity. Where no standard error is known, the second rule decides.

    Args:
        name: row of `published.json`, or None.
        tasks: see `averages`, with "stderr" beside "value".

    Returns:
        None without a name, else JSON values: `model`, `source`, `note`, `scores` and `averages`,
        lists of {"name", "metric", "value", "stderr", "published", "difference", "flag"} in
        published units, for what both sides have.
    """
    if name is None:
        return None
    check_published(name)
    table = published()
    row = table["models"][name]
    scores = []
    for key, expected in row["scores"].items():
        task, metric = key.split("/")
        if task in tasks:
            scores.append(_compare(task, metric, tasks[task]["metrics"][metric], expected))
    means = [
        _compare(average, "mean", score, row["average"][average])
        for average, score in averages(tasks).items()
        if average in row["average"]
    ]
    return {
        "model": name,
        "source": table["sources"][row["source"]],
        "note": row.get("note"),
        "scores": scores,
        "averages": means,
    }


def _compare(name: str, metric: str, score: Mapping[str, Any], expected: float) -> dict[str, Any]:
    scale = 1.0 if metric == "perplexity" else 100.0
    value = scale * score["value"]
    stderr = None if score["stderr"] is None else scale * score["stderr"]
    least = 0.02 * expected if metric == "perplexity" else 0.5
    return {
        "name": name,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "published": expected,
        "difference": value - expected,
        "flag": abs(value - expected) > max(least, 2 * (stderr or 0.0)),
    }
