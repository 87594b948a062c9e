"""Which runs a suite needs, which of them are done, and which can go next."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.science.suite import ScienceSuite
from eval.science.worker import ERROR, RESULT, Job

Result = dict[str, Any]


@dataclass
class Group:
    """The runs of one model in one experiment.

    Attributes:
        learning_rates, seeds: all that may be run.
        results, errors: {(learning rate, seed): ...} of what has been.
    """

    experiment: str
    model: str
    learning_rates: list[float]
    seeds: list[int]
    sweep: str
    metric: str
    results: dict[tuple[float, int], Result] = field(default_factory=dict)
    errors: dict[tuple[float, int], str] = field(default_factory=dict)

    def wanted(self) -> list[tuple[float, int]]:
        """Runs that can go now or have gone: the sweep, and after it the seeds at its best."""
        if self.sweep == "all" or len(self.learning_rates) == 1:
            return [(rate, seed) for seed in self.seeds for rate in self.learning_rates]
        sweep = [(rate, self.seeds[0]) for rate in self.learning_rates]
        if any(not self._is_over(key) for key in sweep):
            return sweep
        best = self.best_learning_rate()
        return sweep if best is None else [*sweep, *((best, seed) for seed in self.seeds[1:])]

    def planned(self) -> int:
        """How many runs there will be, with those of other settings that are there."""
        least = len(self.learning_rates) + len(self.seeds) - 1
        if self.sweep == "all":
            least = len(self.learning_rates) * len(self.seeds)
        return max(least, len({*self.results, *self.errors, *self.wanted()}))

    def open(self) -> list[tuple[float, int]]:
        """Runs that can go now and have not gone."""
        return [key for key in self.wanted() if not self._is_over(key)]

    def best_learning_rate(self) -> float | None:
        """The one of the highest selection score, token accuracy decides between equals; with the
        first seed or, where all seeds are swept, in the mean. None where no run has succeeded.

        Later seeds do not turn a choice of the first one: a rate with a single run would win over
        others whose seeds have had their share of bad luck.
        """
        swept = self.seeds if self.sweep == "all" else self.seeds[:1]
        scores = {}
        for rate in self.learning_rates:
            found = [self.results[rate, s]["select"] for s in swept if (rate, s) in self.results]
            if found:
                scores[rate] = tuple(
                    sum(score[metric] for score in found) / len(found)
                    for metric in (self.metric, "token")
                )
        return max(scores, key=lambda rate: scores[rate]) if scores else None

    def of_best(self) -> list[Result]:
        """The results at the best learning rate, by seed."""
        best = self.best_learning_rate()
        return [self.results[best, s] for s in self.seeds if (best, s) in self.results]  # pyright: ignore[reportArgumentType]

    def _is_over(self, key: tuple[float, int]) -> bool:
        return key in self.results or key in self.errors


class Plan:
    """All groups of a suite, with the results that lie in a folder.

    Args:
        suite: what is asked for.
        output: folder of the suite's runs; finished runs there are taken over if nothing that they
            depend on has changed.
        only: names of the experiments that are of interest; None for all.
    """

    def __init__(self, suite: ScienceSuite, output: Path, only: list[str] | None = None) -> None:
        self.suite, self.output = suite, output
        unknown = set(only or ()) - set(suite.experiments)
        if unknown:
            raise ValueError(f"no experiment {sorted(unknown)}; known: {sorted(suite.experiments)}")
        self.groups: dict[tuple[str, str], Group] = {}
        for name, spec in suite.experiments.items():
            for model in spec.models:
                if only is None or name in only:
                    first = suite.model(model).first_seed
                    self.groups[name, model] = Group(
                        experiment=name,
                        model=model,
                        learning_rates=suite.learning_rates(name, model),
                        seeds=list(range(first, first + spec.seeds)),
                        sweep=spec.sweep,
                        metric=spec.metric,
                    )
        for group in self.groups.values():
            for rate in group.learning_rates:
                for seed in group.seeds:
                    self._take_over(group, (rate, seed))

    def job(self, group: Group, key: tuple[float, int]) -> Job:
        """The run of a group at (learning rate, seed)."""
        spec = self.suite.experiments[group.experiment]
        rate, seed = key
        size = spec.training_task().vocab_size
        assert size is not None  # no task of text in a suite
        measured = [spec.measured(at)[0].vocab_size or 0 for at in spec.measure]
        config = {**self.suite.model(group.model).config, "vocab_size": max(size, *measured)}
        control = next(
            (
                c
                for c in self.suite.controls
                if (c.experiment, c.model) == (group.experiment, group.model)
            ),
            None,
        )
        return Job(
            name=f"{group.experiment}/{group.model}/lr{rate:g}/seed{seed}",
            experiment_name=group.experiment,
            experiment=spec,
            config=config,
            recipe=self.suite.recipe(group.experiment, group.model, rate, seed),
            control=control,
        )

    def folder(self, job: Job) -> Path:
        """Where a run's files lie."""
        return self.output / "runs" / job.name

    def open(self) -> Iterator[tuple[Group, tuple[float, int]]]:
        """Runs that can go now, in the suite's order."""
        for group in self.groups.values():
            for key in group.open():
                yield group, key

    def counts(self) -> tuple[int, int, int]:
        """Runs finished, failed, planned."""
        groups = self.groups.values()
        return (
            sum(len(g.results) for g in groups),
            sum(len(g.errors) for g in groups),
            sum(g.planned() for g in groups),
        )

    def settle(self, group: Group, key: tuple[float, int], failure: str) -> None:
        """Take over what a run has left; `failure` says what happened if it has left nothing."""
        job = self.job(group, key)
        self._take_over(group, key)
        if key not in group.results:
            error = _read(self.folder(job) / ERROR, job.hash)
            group.errors[key] = failure if error is None else error["error"]

    def _take_over(self, group: Group, key: tuple[float, int]) -> None:
        job = self.job(group, key)
        result = _read(self.folder(job) / RESULT, job.hash)
        if result is not None:
            group.results[key] = result


def _read(path: Path, of: str) -> Result | None:
    """A run's file, if it is there and its settings are still the same."""
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if value["hash"] == of else None
