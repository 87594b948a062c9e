"""The thirteen tasks: what each hides, asks and allows. Nothing here needs more than Python."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["numbers", "words", "uuids"]
Metric = Literal["all", "any"]


class NeedleSpec(NamedTuple):
    """What a needle task hides and asks.

    Args:
        haystack: "noise", "essay" (running text) or "needle".
        key, value: kinds of both.
        keys, values, queries: how many keys are hidden, values for each, and keys asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Kind
    value: Kind
    keys: int = 1
    values: int = 1
    queries: int = 1


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        category: "retrieval", "tracking", "aggregation" or "questions".
        budget: most tokens of an answer.
        needles: what a needle task hides; None for others.
        questions: "squad" or "hotpotqa"; None for others.
        metric: "all" scores the share of the references found, "any" whether one was.
    """

    category: str
    budget: int
    needles: NeedleSpec | None = None
    questions: str | None = None
    metric: Metric = "all"


def _needles(*spec: str, keys: int = 1, values: int = 1, queries: int = 1) -> Task:
    needles = NeedleSpec(*spec, keys=keys, values=values, queries=queries)  # pyright: ignore
    return Task("retrieval", 128, needles=needles)


TASKS = {
    "niah_single_1": _needles("noise", "words", "numbers"),
    "niah_single_2": _needles("essay", "words", "numbers"),
    "niah_single_3": _needles("essay", "words", "uuids"),
    "niah_multikey_1": _needles("essay", "words", "numbers", keys=4),
    "niah_multikey_2": _needles("needle", "words", "numbers"),
    "niah_multikey_3": _needles("needle", "uuids", "uuids"),
    "niah_multivalue": _needles("essay", "words", "numbers", values=4),
    "niah_multiquery": _needles("essay", "words", "numbers", keys=4, queries=4),
    "vt": Task("tracking", 30),
    "cwe": Task("aggregation", 120),
    "fwe": Task("aggregation", 50),
    "qa_1": Task("questions", 32, questions="squad", metric="any"),
    "qa_2": Task("questions", 32, questions="hotpotqa", metric="any"),
}
CATEGORIES = tuple(dict.fromkeys(task.category for task in TASKS.values()))
