"""Everything that a suite's runs have shown, as JSON values: claims, controls, tables."""

from typing import Any

from eval.science.plan import Group, Plan
from eval.science.suite import Check, Claim, Controls, Reference
from eval.science.verdicts import Outcome, Sample, above, all_of, bound, same

Values = dict[str, Any]


def collect(plan: Plan, header: Values) -> Values:
    """Results of a plan, finished or not.

    Returns:
        {"header", "claims", "controls", "experiments", "failures", "flagged", "unfinished"}.
    """
    finished, failed, planned = plan.counts()
    return {
        "header": {**header, "runs": {"finished": finished, "failed": failed, "planned": planned}},
        "claims": [_claim(plan, claim) for claim in plan.suite.claims],
        "controls": [row for control in plan.suite.controls for row in _control(plan, control)],
        "experiments": {name: _experiment(plan, name) for name in plan.suite.experiments},
        "failures": [
            {"run": plan.job(group, key).name, "error": error}
            for group in plan.groups.values()
            for key, error in group.errors.items()
        ],
        "flagged": _flagged(plan),
        "unfinished": [plan.job(group, key).name for group, key in plan.open()],
    }


# --- claims ---------------------------------------------------------------------------------------


def _claim(plan: Plan, claim: Claim) -> Values:
    outcomes = [_check(plan, check) for check in claim.checks]
    return {
        "claim": claim.claim,
        "source": claim.source,
        "shape": claim.shape,
        "verdict": all_of(outcomes),
        "checks": [outcome.as_dict() for outcome in outcomes],
        "why_not": claim.why_not,
    }


def _check(plan: Plan, check: Check) -> Outcome:
    references = check.references()
    samples = [sample_of(plan, reference) for reference in references]
    names = [name_of(reference) for reference in references]
    for name, reference, sample in zip(names, references, samples, strict=True):
        if sample is None:
            return Outcome("not tested", f"{name}: no finished run")
        if _leaks(plan, reference):
            return Outcome(
                "not decided", f"{name}: a run reads what it must not, so nothing counts"
            )
    first, *others = samples
    assert first is not None
    if check.at_least is not None:
        return bound(first, names[0], check.at_least, lower=True)
    if check.at_most is not None:
        return bound(first, names[0], check.at_most, lower=False)
    (second,) = others
    assert second is not None
    pair = (names[0], names[1])
    if check.above is not None:
        return above(first, second, pair, check.by)
    return same(first, second, pair)


def sample_of(plan: Plan, reference: Reference) -> Sample | None:
    """The measured values behind a reference, at the model's best learning rate."""
    group = plan.groups.get((reference.experiment, reference.model))
    found = [] if group is None else group.of_best()
    if not found:
        return None
    measured = [result["measure"][str(reference.at)] for result in found]
    is_scaled = reference.metric.startswith("scaled")
    task, _ = plan.suite.experiments[reference.experiment].measured(reference.at)
    return Sample(
        values=tuple(values[reference.metric] for values in measured),
        tested=measured[0]["samples"],
        choices=task.choices if is_scaled else None,
    )


def name_of(reference: Reference) -> str:
    """Short, for people."""
    experiment, model, metric, at = reference
    return f"{model} on {experiment}, {metric}@{at}"


def _leaks(plan: Plan, reference: Reference) -> bool:
    group = plan.groups[reference.experiment, reference.model]
    return any(result["integrity"]["leaks"] for result in group.of_best())


def _flagged(plan: Plan) -> list[Values]:
    """Runs of which the checks of the rules say something."""
    rows = []
    for group in plan.groups.values():
        for key, result in group.results.items():
            found = result["integrity"]
            if found["leaks"] or found["wiped"]:
                rows.append({"run": plan.job(group, key).name, **found})
    return rows


# --- controls -------------------------------------------------------------------------------------


def _control(plan: Plan, control: Controls) -> list[Values]:
    """One row for each version of the model: did the suite see what it had to?"""
    group = plan.groups.get((control.experiment, control.model))
    found = [] if group is None else [r["controls"] for r in group.results.values()]
    expected = {
        "honest": ("neither flag", lambda c: not c["leaks"] and not c["wiped"]),
        "leaked": ("flagged: reads labels", lambda c: c["leaks"]),
        "wiped": (
            f"flagged: forgets every {control.wipe_every} tokens",
            lambda c: c["wiped"] and c["reach"] < control.wipe_every,
        ),
    }
    rows = []
    for version, (shape, holds) in expected.items():
        cases = [c[version] for c in found]
        right = sum(bool(holds(case)) for case in cases)
        rows.append(
            {
                "control": f"{version} {control.model} on {control.experiment}",
                "expected": shape,
                "runs": len(cases),
                "as_expected": right,
                "verdict": "not tested"
                if not cases
                else ("confirmed" if right == len(cases) else "not confirmed"),
                "cases": cases,
            }
        )
    return rows


# --- tables ---------------------------------------------------------------------------------------


def _experiment(plan: Plan, name: str) -> Values:
    spec = plan.suite.experiments[name]
    groups = [plan.groups[name, m] for m in spec.models if (name, m) in plan.groups]
    return {
        "task": spec.task,
        "options": spec.options,
        "lengths": spec.lengths,
        "metric": spec.metric,
        "measure": spec.measure,
        "vary": spec.vary,
        "trained_to": spec.trained_to,
        "select": spec.select,
        "samples": spec.samples,
        "note": spec.note,
        "models": {group.model: _group(plan, group) for group in groups},
    }


def _group(plan: Plan, group: Group) -> Values:
    best = group.best_learning_rate()
    return {
        "learning_rate": best,
        "tried": {
            f"{rate:g}": [
                r["select"][group.metric] for (of, _), r in group.results.items() if of == rate
            ]
            for rate in group.learning_rates
        },
        "note": plan.suite.model(group.model).note,
        "config": plan.suite.model(group.model).config,
        "seeds": [seed for seed in group.seeds if (best, seed) in group.results],
        "runs": group.of_best(),
    }
