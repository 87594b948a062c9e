"""Sums over the judged samples: cells, means, effective lengths, depths."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from eval.ruler.options import RulerOptions
from eval.ruler.scoring import clean, wilson
from eval.ruler.specs import CATEGORIES, TASKS

# Of Llama-2-7B-chat at 4096 tokens; a model is effective at lengths where its mean is above it.
THRESHOLD = 85.6
# Of the mean at the shortest length, for models that the threshold is out of reach for.
SHARE = 0.9
DEPTH_BINS = 5

Judged = Mapping[str, Any]
Cells = Mapping[tuple[str, int], Sequence[Judged]]


def summarise(
    options: RulerOptions,
    cells: Cells,
    left_out: Mapping[tuple[str, int], str],
    texts: Mapping[str, str],
) -> dict[str, Any]:
    """Sum up a run.

    Args:
        options: of the section.
        cells: (task, length) -> judged samples.
        left_out: (task, length) of all others -> why they did not run.
        texts: what the samples were made of, for the record.

    Returns:
        JSON values:
        `options` and `texts`, as given;
        `cells`: one per task and length: score in percent with its 95 % interval, samples, share of
        empty outputs, tokens of the prompts, fill of the length, for needle tasks the scores by
        depth and the depths of what was missed;
        `left_out`: task, length and reason of the cells that did not run;
        `means`: per length the mean of the tasks that ran at every length, and of each category
        (lengths at which nothing ran have none);
        `averaged`: these tasks;
        `effective`: see `effective_lengths`; `weighted`: see `weighted_means`.
    """
    lengths = [n for n in sorted(options.lengths) if any(length == n for _, length in cells)]
    done = [_cell(task, length, samples) for (task, length), samples in cells.items()]
    averaged = [t for t in options.tasks if all((t, length) in cells for length in lengths)]
    score = {(cell["task"], cell["length"]): cell["score"] for cell in done}
    means = []
    for length in lengths:
        groups = {
            category: [score[t, length] for t in averaged if TASKS[t].category == category]
            for category in CATEGORIES
        }
        every = [value for values in groups.values() for value in values]
        means.append(
            {
                "length": length,
                "mean": fmean(every) if every else None,
                "categories": {name: fmean(v) for name, v in groups.items() if v},
            }
        )
    curve = [(row["length"], row["mean"]) for row in means if row["mean"] is not None]
    return {
        "options": asdict(options),
        "texts": dict(texts),
        "cells": done,
        "left_out": [
            {"task": task, "length": length, "reason": reason}
            for (task, length), reason in left_out.items()
        ],
        "averaged": averaged,
        "means": means,
        "effective": effective_lengths(curve),
        "weighted": weighted_means([mean for _, mean in curve]),
    }


def _cell(task: str, length: int, samples: Sequence[Judged]) -> dict[str, Any]:
    scores = [sample["score"] for sample in samples]
    mean = fmean(scores)
    low, high = wilson(mean, len(scores))
    tokens = [sample["tokens"] for sample in samples]
    fill = [sample["length"] / length for sample in samples]
    cell: dict[str, Any] = {
        "task": task,
        "length": length,
        "samples": len(samples),
        "score": round(100 * mean, 2),
        "interval": [round(100 * low, 2), round(100 * high, 2)],
        "nulls": fmean(not clean(sample["prediction"]) for sample in samples),
        "tokens": {"min": min(tokens), "mean": fmean(tokens), "max": max(tokens)},
        "fill": {"min": min(fill), "mean": fmean(fill), "max": max(fill)},
    }
    if TASKS[task].needles is not None:
        cell["depths"] = by_depth(samples)
        cell["missed"] = sorted(
            depth
            for sample in samples
            for depth, found in zip(sample["depths"], sample["found"], strict=True)
            if not found
        )
    return cell


def by_depth(samples: Sequence[Judged], bins: int = DEPTH_BINS) -> list[dict[str, Any]]:
    """Return score and number of the needles in each of `bins` equal parts of the depth."""
    hits: list[list[bool]] = [[] for _ in range(bins)]
    for sample in samples:
        for depth, found in zip(sample["depths"], sample["found"], strict=True):
            hits[min(int(depth * bins), bins - 1)].append(found)
    return [
        {
            "from": round(i / bins, 4),
            "to": round((i + 1) / bins, 4),
            "needles": len(part),
            "score": round(100 * fmean(part), 2) if part else None,
        }
        for i, part in enumerate(hits)
    ]


def effective_lengths(curve: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return the longest length whose mean is high enough, by two measures.

    Args:
        curve: (length, mean in percent), shortest first.

    Returns:
        `absolute`: above 85.6 percent, and `relative`: at least 0.9 of the mean at the shortest
        length; each with its `threshold` and the `length`, None where there is none (a model that
        finds nothing at the shortest length has no relative one).
    """
    absolute = [length for length, mean in curve if mean > THRESHOLD]
    bar = SHARE * curve[0][1] if curve else 0.0
    relative = [length for length, mean in curve if mean >= bar] if bar > 0 else []
    return {
        "absolute": {"threshold": THRESHOLD, "length": max(absolute, default=None)},
        "relative": {
            "threshold": bar if curve else None,
            "share": SHARE,
            "length": max(relative, default=None),
        },
    }


def weighted_means(means: Sequence[float]) -> dict[str, float | None]:
    """Return the means over lengths with weights 1, 2, ... for longer (increasing) or shorter."""
    if not means:
        return {"increasing": None, "decreasing": None}
    weights = range(1, len(means) + 1)
    total = sum(weights)
    rising = sum(w * m for w, m in zip(weights, means, strict=True)) / total
    falling = sum(w * m for w, m in zip(reversed(weights), means, strict=True)) / total
    return {"increasing": rising, "decreasing": falling}
