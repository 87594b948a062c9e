"""Judging outputs as NVIDIA's RULER does, and how sure a mean is."""

import re
from collections.abc import Sequence
from math import sqrt

from eval.ruler.specs import Metric

CONTROL = re.compile(r"[\x00-\x1f]")
Z_95 = 1.959964


def clean(prediction: str) -> str:
    """Return a prediction without space around it, control characters turned into newlines."""
    return CONTROL.sub("\n", prediction.strip()).strip()


def found(prediction: str, references: Sequence[str]) -> list[bool]:
    """Return for each reference whether the cleaned prediction contains it, in any case."""
    text = clean(prediction).lower()
    return [reference.lower() in text for reference in references]


def score(prediction: str, references: Sequence[str], metric: Metric) -> float:
    """Return the score of one sample, 0 to 1: share of the references found, or whether any was.

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("a sample without references cannot be scored")
    hits = found(prediction, references)
    return float(any(hits)) if metric == "any" else sum(hits) / len(hits)


def task_score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metric: Metric
) -> float:
    """Return the score of a task: the mean of its samples in percent, two decimals."""
    scores = [score(p, r, metric) for p, r in zip(predictions, references, strict=True)]
    return round(sum(scores) / len(scores) * 100, 2)


def wilson(mean: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean of `count` scores from 0 to 1 (Wilson 1927).

    Exact scores of 0 and 1 are what it is made for; for scores between, whose variance is less, it
    is wider than need be.
    """
    square = Z_95**2 / count
    middle = (mean + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * sqrt(mean * (1 - mean) / count + square / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)
