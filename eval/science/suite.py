"""The file of a science suite: models, experiments, claims and their checks, typed.

A model is a config.json, given in place or by its path: a new one is a new entry, never new code.
Every reference from a check to a measurement is resolved when the file is read.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from eval.suite import build, read_yaml
from eval.tasks import Lengths, Task, check_fits, make_task

METRICS = ("string", "token", "last", "scaled", "scaled_last")
# Of models that select tokens: shares, which claims may be about.
SHARES = ("selected", "selected_asked")
REFERENCE = re.compile(r"(?P<experiment>[^/\s]+)/(?P<model>\S+)\s+(?P<metric>\w+)@(?P<at>\d+)")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True)
class ModelSpec:
    """One model. Exactly one of `config`, `file` and `like` names its architecture.

    Args:
        config: the content of a config.json; the vocabulary is set to the task's.
        file: path of a config.json instead.
        like: another model of the suite, whose entries stand where this one has none; `config`
            then lists what differs.
        train: keys of the training recipe in which this model differs, nested.
        learning_rates: instead of the experiment's.
        first_seed: its runs have the seeds from this one on.
        note: a line for the report.
    """

    config: dict[str, Any] = field(default_factory=dict)
    file: str | None = None
    like: str | None = None
    train: dict[str, Any] = field(default_factory=dict)
    learning_rates: list[float] = field(default_factory=list)
    first_seed: int = 0
    note: str = ""


@dataclass(frozen=True)
class Experiment:
    """One task that models are trained on, and where they are measured.

    Args:
        task, options: what is learnt, see eval.tasks.
        lengths: the curriculum, see `TaskConfig` in training/config.py.
        models: names.
        learning_rates: tried with the first seed (`sweep: first`) or with all; the best by
            `metric` at `select` counts.
        seeds: runs of each model at its learning rate.
        sweep: see above.
        measure: lengths, or values of the option `vary`, at which accuracy is taken.
        vary: option of the task that `measure` goes through instead of the length; the length is
            then `select`.
        measure_options: options that differ when measuring.
        samples: drawn anew for each measurement, of seeds that training never has.
        select: the length (or value of `vary`) that learning rates are chosen at, on samples of
            their own.
        metric: "string" (all labels of a sample right), "token", "last" (the last label), or
            "scaled" and "scaled_last" (the same two with 0 = chance).
        train: keys of the training recipe, nested, over the suite's `train`.
        pack: fill rows with several samples.
        note: a line for the report.
    """

    task: str
    lengths: list[str]
    models: list[str]
    learning_rates: list[float]
    measure: list[int]
    select: int
    options: dict[str, Any] = field(default_factory=dict)
    seeds: int = 3
    sweep: str = "first"
    vary: str | None = None
    measure_options: dict[str, Any] = field(default_factory=dict)
    samples: int = 512
    metric: str = "string"
    train: dict[str, Any] = field(default_factory=dict)
    pack: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("lengths", "models", "learning_rates", "measure"):
            _require(bool(getattr(self, name)), f"{name} is empty, expected at least one")
        _require(
            self.sweep in ("first", "all"), f'sweep must be "first" or "all", got {self.sweep!r}'
        )
        _require(self.metric in METRICS, f"metric must be one of {METRICS}, got {self.metric!r}")
        _require(self.seeds >= 1, f"seeds must be 1 or more, got {self.seeds}")
        _require(self.samples >= 1, f"samples must be 1 or more, got {self.samples}")

    def training_task(self) -> Task:
        """What is learnt."""
        return make_task(self.task, self.options)

    def measured(self, at: int) -> tuple[Task, int]:
        """The task and the length of the measurement named `at`."""
        options = {**self.options, **self.measure_options}
        if self.vary is None:
            return make_task(self.task, options), at
        length = max(Lengths.parse(self.lengths[-1]).values)
        return make_task(self.task, {**options, self.vary: at}), length

    @property
    def trained_to(self) -> int:
        """The largest length, or value of `vary`, in training."""
        if self.vary is not None:
            return self.options[self.vary]
        return max(max(Lengths.parse(text).values) for text in self.lengths)


class Reference(NamedTuple):
    """One measured number: `experiment/model metric@at`."""

    experiment: str
    model: str
    metric: str
    at: int

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read the text form.

        Raises:
            ValueError: not of that form.
        """
        match = REFERENCE.fullmatch(text.strip())
        _require(match is not None, f"{text!r}: expected 'experiment/model metric@length'")
        assert match is not None
        return cls(match["experiment"], match["model"], match["metric"], int(match["at"]))


@dataclass(frozen=True)
class Check:
    """One comparison that a claim makes; `value` and exactly one of the others.

    Args:
        value: a reference, see `Reference`.
        at_least, at_most: bounds of the mean over seeds.
        above: another reference, which `value` exceeds by more than `by`.
        by: see `above`.
        same_as: another reference, from which `value` must not be told apart.
    """

    value: str
    at_least: float | None = None
    at_most: float | None = None
    above: str | None = None
    by: float = 0.0
    same_as: str | None = None

    def __post_init__(self) -> None:
        kinds = (self.at_least, self.at_most, self.above, self.same_as)
        _require(
            sum(kind is not None for kind in kinds) == 1,
            f"a check of {self.value!r} needs exactly one of at_least, at_most, above, same_as",
        )

    def references(self) -> list[Reference]:
        """All numbers that the check reads, `value` first."""
        texts = [self.value, self.above, self.same_as]
        return [Reference.parse(text) for text in texts if text is not None]


@dataclass(frozen=True)
class Claim:
    """A published statement.

    Args:
        claim: what is said.
        source: by whom.
        shape: what would be seen here if it holds.
        checks: all must hold; an empty list means that this suite does not test it.
        why_not: with no checks, why.
    """

    claim: str
    source: str
    shape: str
    checks: list[Check] = field(default_factory=list)
    why_not: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.checks) != bool(self.why_not), f"{self.claim}: checks or why_not")


@dataclass(frozen=True)
class Controls:
    """Runs whose models are measured once more with their labels leaked and their state wiped.

    Args:
        experiment, model: which runs.
        wipe_every: tokens after which the wiped model forgets everything.
        leaked_share: of the answers that the leaked model is told.
    """

    experiment: str
    model: str
    wipe_every: int = 64
    leaked_share: float = 0.25


@dataclass(frozen=True)
class ScienceSuite:
    """See the classes of its parts.

    Args:
        title: of the report.
        train: the training recipe that all experiments start from, nested.
        timeout_s: after which a run counts as failed.
        minutes: after which no more time is spent; what is not done is reported so. Null: none.
        workers: runs at once, null for what the machine suggests.
        budget: what the suite is expected to cost and how that was reckoned, for the report.
    """

    title: str
    models: dict[str, ModelSpec]
    experiments: dict[str, Experiment]
    claims: list[Claim] = field(default_factory=list)
    controls: list[Controls] = field(default_factory=list)
    train: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 300.0
    minutes: float | None = None
    workers: int | None = None
    budget: str = ""

    def __post_init__(self) -> None:
        for name in self.models:
            self.model(name)
        for name, experiment in self.experiments.items():
            try:
                self._check_experiment(experiment)
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"experiments.{name}: {error}") from error
        for claim in self.claims:
            for check in claim.checks:
                for reference in check.references():
                    self._check_reference(reference, claim.claim)
        for control in self.controls:
            self._check_pair(control.experiment, control.model, "controls")
            _require(control.wipe_every >= 1, "controls: wipe_every must be 1 or more")
            _require(0 < control.leaked_share <= 1, "controls: leaked_share must lie in (0, 1]")

    def model(self, name: str) -> ModelSpec:
        """A model with what it takes from others filled in.

        Raises:
            ValueError: unknown, `like` in a circle, or not exactly one architecture.
        """
        chain = []
        at: str | None = name
        while at is not None:
            _require(at in self.models, f"models: {at!r} is unknown; known: {sorted(self.models)}")
            _require(at not in chain, f"models: {name} is like itself")
            chain.append(at)
            at = self.models[at].like
        root = self.models[chain[-1]]
        _require(
            bool(root.config) != (root.file is not None),
            f"models.{chain[-1]}: expected exactly one of config, file and like",
        )
        config = dict(root.config)
        if root.file is not None:
            path = Path(root.file)
            if not path.is_file():
                raise FileNotFoundError(f"models.{chain[-1]}: {path} does not exist")
            config = json.loads(path.read_text(encoding="utf-8"))
        _require("model_type" in config, f"models.{chain[-1]}: the config has no model_type")
        train: dict[str, Any] = {}
        for ancestor in reversed(chain):
            config |= self.models[ancestor].config
            train = merged(train, self.models[ancestor].train)
        rates = next(
            (self.models[a].learning_rates for a in chain if self.models[a].learning_rates), []
        )
        return replace(
            self.models[name], config=config, file=None, train=train, learning_rates=rates
        )

    def learning_rates(self, experiment: str, model: str) -> list[float]:
        """Those tried for a model."""
        return self.model(model).learning_rates or self.experiments[experiment].learning_rates

    def recipe(
        self, experiment: str, model: str, learning_rate: float, seed: int
    ) -> dict[str, Any]:
        """The training recipe of a run, without its files' places."""
        spec = self.experiments[experiment]
        recipe = merged(merged(self.train, spec.train), self.model(model).train)
        task = {
            "name": spec.task,
            "options": spec.options,
            "lengths": spec.lengths,
            "pack": spec.pack,
        }
        # A model that cannot forget inside a row says so among its own differences.
        own = recipe.get("data", {}).get("task", {})
        given = {
            "data": {"task": {**task, **own}},
            "optimizer": {"lr": learning_rate},
            "seed": seed,
        }
        return merged(recipe, given)

    def _check_experiment(self, spec: Experiment) -> None:
        for name in spec.models:
            _require(
                name in self.models, f"model {name!r} is unknown; known: {sorted(self.models)}"
            )
        task = spec.training_task()
        _require(not task.needs_tokenizer, f"task {spec.task} is made of text, which a suite lacks")
        row = merged(self.train, spec.train).get("data", {}).get("seq_len")
        _require(isinstance(row, int), "train.data.seq_len is missing: the tokens of a row")
        for text in spec.lengths:
            check_fits(task, Lengths.parse(text), row)
        for at in [*spec.measure, spec.select]:
            measured, length = spec.measured(at)
            measured.check_length(length)
            measured.tokens(length)

    def _selects(self, model: str) -> bool:
        return self.model(model).config["model_type"] == "taipan"

    def _check_pair(self, experiment: str, model: str, where: str) -> None:
        _require(experiment in self.experiments, f"{where}: no experiment {experiment!r}")
        _require(
            model in self.experiments[experiment].models,
            f"{where}: experiment {experiment} has no model {model!r}",
        )

    def _check_reference(self, reference: Reference, where: str) -> None:
        self._check_pair(reference.experiment, reference.model, where)
        spec = self.experiments[reference.experiment]
        known = (*METRICS, *SHARES)
        _require(reference.metric in known, f"{where}: no metric {reference.metric!r}")
        _require(
            reference.metric not in SHARES or self._selects(reference.model),
            f"{where}: model {reference.model} selects no tokens",
        )
        _require(
            reference.at in spec.measure,
            f"{where}: {reference.experiment} is measured at {spec.measure}, not {reference.at}",
        )
        scaled = reference.metric.startswith("scaled")
        _require(
            not scaled or spec.training_task().choices is not None,
            f"{where}: {reference.experiment} has no chance level to scale by",
        )


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def load_science_suite(path: str | Path) -> ScienceSuite:
    """Read a suite file.

    Raises:
        FileNotFoundError: no such file, or a model's file is missing.
        ValueError: not YAML, an unknown key, a wrong value, or a reference to nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"suite {path} does not exist")
    data = read_yaml(path.read_text(encoding="utf-8"), str(path))
    _require(isinstance(data, dict), f"suite {path} must be a YAML mapping")
    try:
        return build(ScienceSuite, data, "")
    except ValueError as error:
        raise ValueError(f"suite {path}: {error}") from error


def digest(value: Any) -> str:
    """16 hexadecimal digits that identify JSON values."""
    text = json.dumps(value, sort_keys=True, default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
