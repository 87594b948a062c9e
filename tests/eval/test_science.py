"""The science suite without training: files, plans and reports."""

import json
from pathlib import Path

import pytest

from eval.blocks import to_markdown
from eval.science.plan import Plan
from eval.science.report import mean_and_spread, render, report_blocks, summary, write_report
from eval.science.results import collect
from eval.science.suite import Reference, ScienceSuite, load_science_suite, merged
from eval.science.worker import RESULT, check_job, write_json
from eval.suite import build

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "eval").glob("science-*.yaml"))


pytestmark = pytest.mark.usefixtures("science_classes")


def suite_values(**changes):
    values = {
        "title": "test",
        "train": {"max_steps": 4, "schedule": {"warmup_steps": 1}, "data": {"seq_len": 32}},
        "models": {
            "small": {
                "config": {
                    "model_type": "mamba2",
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_heads": 2,
                    "head_dim": 16,
                    "n_groups": 1,
                    "state_size": 8,
                }
            },
            "again": {"like": "small", "first_seed": 10},
            "wide": {"like": "small", "config": {"state_size": 32}, "learning_rates": [0.5]},
        },
        "experiments": {
            "copy": {
                "task": "string_copy",
                "lengths": ["2-8"],
                "models": ["small", "again", "wide"],
                "learning_rates": [0.1, 0.2],
                "select": 8,
                "measure": [8, 16],
                "samples": 100,
            }
        },
        "claims": [
            {
                "claim": "it copies",
                "source": "nobody",
                "shape": "much",
                "checks": [{"value": "copy/small string@8", "at_least": 0.5}],
            },
            {
                "claim": "seeds do not matter",
                "source": "control",
                "shape": "no difference",
                "checks": [{"value": "copy/small string@8", "same_as": "copy/again string@8"}],
            },
            {"claim": "the moon", "source": "x", "shape": "y", "why_not": "not here"},
        ],
        "controls": [{"experiment": "copy", "model": "small"}],
    }
    return merged(values, changes)


def suite_of(**changes) -> ScienceSuite:
    return build(ScienceSuite, suite_values(**changes), "")


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_suites_are_whole(path, tmp_path) -> None:
    """Every recipe and every model config of every suite is one that training takes."""
    plan = Plan(load_science_suite(path), tmp_path)
    assert plan.counts()[2] > 0
    for group in plan.groups.values():
        check_job(plan.job(group, (group.learning_rates[0], group.seeds[0])))


def test_models_take_from_one_another() -> None:
    suite = suite_of()
    wide = suite.model("wide")
    assert wide.config["state_size"] == 32
    assert wide.config["hidden_size"] == 16
    assert suite.learning_rates("copy", "wide") == [0.5]
    assert suite.learning_rates("copy", "again") == [0.1, 0.2]


def test_a_model_may_come_from_a_file(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "mamba2", "hidden_size": 64}))
    suite = suite_of(models={"filed": {"file": str(file)}})
    assert suite.model("filed").config["hidden_size"] == 64


def test_recipes_are_layered() -> None:
    suite = suite_of(
        models={"again": {"train": {"precision": "bf16", "data": {"task": {"pack": False}}}}},
        experiments={"copy": {"train": {"max_steps": 9}}},
    )
    recipe = suite.recipe("copy", "again", 0.3, 10)
    assert recipe["max_steps"] == 9
    assert recipe["precision"] == "bf16"
    assert recipe["seed"] == 10
    assert recipe["optimizer"] == {"lr": 0.3}
    assert recipe["data"]["seq_len"] == 32
    assert recipe["data"]["task"]["pack"] is False
    assert recipe["data"]["task"]["name"] == "string_copy"
    assert suite.recipe("copy", "small", 0.3, 0)["data"]["task"]["pack"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiments": {"copy": {"models": ["big"]}}}, "model 'big' is unknown"),
        ({"experiments": {"copy": {"task": "copying"}}}, "unknown task 'copying'"),
        ({"experiments": {"copy": {"lengths": ["2-20"]}}}, "43 tokens, a row 32"),
        ({"experiments": {"copy": {"measure": [0]}}}, "below the smallest"),
        ({"experiments": {"copy": {"measure": []}}}, "measure is empty"),
        ({"experiments": {"copy": {"sweep": "none"}}}, "sweep must be"),
        ({"experiments": {"copy": {"metric": "f1"}}}, "metric must be"),
        ({"experiments": {"copy": {"seeds": 0}}}, "seeds must be"),
        ({"experiments": {"copy": {"samples": 0}}}, "samples must be"),
        ({"experiments": {"copy": {"task": "phone_book", "lengths": ["3"]}}}, "needs a tokenizer"),
        ({"experiments": {"copy": {"colour": 1}}}, "closest is"),
        ({"models": {"small": {"config": {"model_type": "x"}, "file": "y"}}}, "exactly one"),
        ({"models": {"new": {"file": "nowhere.json"}}}, "does not exist"),
        ({"models": {"new": {"config": {"hidden_size": 3}}}}, "no model_type"),
        ({"models": {"new": {"like": "new"}}}, "like itself"),
        ({"models": {"new": {"like": "old"}}}, "'old' is unknown"),
        ({"train": {"data": {"seq_len": None}}}, "seq_len is missing"),
        ({"controls": [{"experiment": "copy", "model": "big"}]}, "no model 'big'"),
        ({"controls": [{"experiment": "x", "model": "small"}]}, "no experiment 'x'"),
        (
            {"controls": [{"experiment": "copy", "model": "small", "wipe_every": 0}]},
            "wipe_every",
        ),
        (
            {"controls": [{"experiment": "copy", "model": "small", "leaked_share": 0.0}]},
            "leaked_share",
        ),
    ],
)
def test_mistakes_are_found_before_any_run(changes, message) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        suite_of(**changes)


def claim_with(**check):
    return {"claims": [{"claim": "c", "source": "s", "shape": "e", "checks": [check]}]}


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"value": "copy/small string@8"}, "exactly one of"),
        ({"value": "copy/small string@8", "at_least": 1.0, "at_most": 1.0}, "exactly one of"),
        ({"value": "copy small", "at_least": 1.0}, "expected 'experiment/model"),
        ({"value": "copy/small string@9", "at_least": 1.0}, "not 9"),
        ({"value": "copy/small f1@8", "at_least": 1.0}, "no metric"),
        ({"value": "copy/small selected@8", "at_least": 1.0}, "small selects no tokens"),
        ({"value": "copy/small string@8", "above": "copy/big string@8"}, "no model 'big'"),
    ],
)
def test_claims_refer_to_what_is_measured(check, message) -> None:
    with pytest.raises(ValueError, match=message):
        suite_of(**claim_with(**check))


def test_a_claim_is_checked_or_says_why_not() -> None:
    with pytest.raises(ValueError, match="checks or why_not"):
        suite_of(claims=[{"claim": "c", "source": "s", "shape": "e"}])


def test_files_that_are_no_suites(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_science_suite(tmp_path / "none.yaml")
    file = tmp_path / "bad.yaml"
    for text, message in (("[1, 2]", "must be a YAML mapping"), ("a: [", "not valid YAML")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_science_suite(file)


def test_training_recipes_are_checked_too(tmp_path) -> None:
    plan = Plan(suite_of(train={"max_stepz": 3}), tmp_path)
    group = plan.groups["copy", "small"]
    with pytest.raises(ValueError, match="closest valid key is 'max_steps'"):
        check_job(plan.job(group, (0.1, 0)))


# --- plan and report ------------------------------------------------------------------------------


def fake_result(plan, group, key, *, string=1.0, select=1.0, leaks=False):
    job = plan.job(group, key)
    values = {"samples": 100, "token": string, "string": string, "last": string}
    values |= {"scaled": string, "scaled_last": string}
    rules = {
        "follows_labels": 0.3 if leaks else 0.0,
        "sees_ahead": 0.0,
        "reach": 17,
        "needed": 17,
        "edge": 1.0,
        "wiped": False,
        "leaks": leaks,
    }
    result = {
        "hash": job.hash,
        "name": job.name,
        "parameters": 1,
        "seconds": {"training": 1.0, "measuring": 1.0},
        "select": {**values, "string": select, "token": select},
        "measure": {"8": values, "16": values},
        "integrity": rules,
    }
    if job.control is not None:
        result["controls"] = {
            "honest": rules,
            "leaked": {**rules, "leaks": True},
            "wiped": {**rules, "wiped": True, "reach": 63},
        }
    folder = plan.folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT, result)
    plan.settle(group, key, "nothing was left")


def test_the_sweep_comes_first_and_its_best_goes_on(tmp_path) -> None:
    plan = Plan(suite_of(), tmp_path)
    group = plan.groups["copy", "small"]
    assert group.open() == [(0.1, 0), (0.2, 0)]
    assert group.planned() == 4
    fake_result(plan, group, (0.1, 0), select=0.3)
    assert group.open() == [(0.2, 0)]
    fake_result(plan, group, (0.2, 0), select=0.6)
    assert group.best_learning_rate() == 0.2
    assert group.open() == [(0.2, 1), (0.2, 2)]
    fake_result(plan, group, (0.2, 1))
    plan.settle(group, (0.2, 2), "it fell over")
    assert group.open() == []
    assert group.errors == {(0.2, 2): "it fell over"}
    assert len(group.of_best()) == 2


def test_later_seeds_do_not_turn_the_choice(tmp_path) -> None:
    plan = Plan(suite_of(), tmp_path)
    group = plan.groups["copy", "small"]
    fake_result(plan, group, (0.1, 0), select=0.5)
    fake_result(plan, group, (0.2, 0), select=0.6)
    fake_result(plan, group, (0.2, 1), select=0.2)
    assert group.best_learning_rate() == 0.2
    assert group.open() == [(0.2, 2)]
    # Counted, though it is not wanted any more.
    fake_result(plan, group, (0.1, 1))
    assert group.planned() == 5


def test_a_sweep_of_all_seeds(tmp_path) -> None:
    plan = Plan(suite_of(experiments={"copy": {"sweep": "all"}}), tmp_path)
    group = plan.groups["copy", "small"]
    assert len(group.open()) == group.planned() == 6


def test_a_failed_sweep_ends_the_group(tmp_path) -> None:
    plan = Plan(suite_of(), tmp_path)
    group = plan.groups["copy", "small"]
    for rate in (0.1, 0.2):
        plan.settle(group, (rate, 0), "no")
    assert group.open() == []
    assert group.best_learning_rate() is None


def test_token_accuracy_decides_between_equal_learning_rates(tmp_path) -> None:
    plan = Plan(suite_of(), tmp_path)
    group = plan.groups["copy", "small"]
    for rate, token in ((0.1, 0.2), (0.2, 0.7)):
        fake_result(plan, group, (rate, 0), select=0.0)
        group.results[rate, 0]["select"]["token"] = token
    assert group.best_learning_rate() == 0.2


def test_finished_runs_are_taken_over_unless_something_changed(tmp_path) -> None:
    plan = Plan(suite_of(), tmp_path)
    fake_result(plan, plan.groups["copy", "small"], (0.1, 0))
    assert Plan(suite_of(), tmp_path).counts()[0] == 1
    # Another model, seed or claim leaves them alone; another step count or length does not.
    more = suite_of(experiments={"copy": {"models": ["small"], "seeds": 5}}, claims=[])
    assert Plan(more, tmp_path).counts()[0] == 1
    for change in ({"train": {"max_steps": 5}}, {"measure": [8]}, {"samples": 7}):
        assert Plan(suite_of(experiments={"copy": change}, claims=[]), tmp_path).counts()[0] == 0
    only = Plan(suite_of(), tmp_path, only=["copy"])
    assert only.counts()[0] == 1
    with pytest.raises(ValueError, match="no experiment"):
        Plan(suite_of(), tmp_path, only=["copi"])


def test_the_vocabulary_is_the_tasks(tmp_path) -> None:
    plan = Plan(suite_of(), tmp_path)
    job = plan.job(plan.groups["copy", "small"], (0.1, 0))
    assert job.config["vocab_size"] == 30
    assert job.control is not None
    assert plan.job(plan.groups["copy", "wide"], (0.5, 0)).control is None


HEADER = {
    "title": "test",
    "suite": "x.yaml",
    "suite_sha256": "0" * 64,
    "budget": "",
    "workers": 1,
    "minutes": 1.0,
    "run_minutes": 2.0,
    "date": "today",
    "device": "cpu",
    "versions": {"torch": "2"},
}


def markdown(results) -> str:
    return to_markdown(report_blocks(results), "plots")


def filled(tmp_path, **changes):
    plan = Plan(suite_of(**changes), tmp_path)
    for name in ("small", "again"):
        group = plan.groups["copy", name]
        while group.open():
            fake_result(plan, group, group.open()[0])
    return plan


def test_results_and_report(tmp_path) -> None:
    results = collect(filled(tmp_path), HEADER)
    verdicts = [claim["verdict"] for claim in results["claims"]]
    assert verdicts == ["confirmed", "confirmed", "not tested"]
    assert [row["verdict"] for row in results["controls"]] == ["confirmed"] * 3
    assert len(results["unfinished"]) == 3  # of the model "wide", its one learning rate
    files = write_report(results, tmp_path / "report")
    names = [file.name for file in files]
    assert names == ["science.json", "report.html", "report.md", "copy.svg"]
    stored = json.loads(files[0].read_text())
    assert render(stored, tmp_path / "again")[1].read_text() == files[2].read_text()
    assert "smallest to be seen" in files[1].read_text()
    text = files[2].read_text()
    for part in (
        "| it copies (nobody) | much |",
        "smallest to be seen",
        "**confirmed**",
        "not here",
        "(plots/copy.svg)",
        "1.000 ± 0.000",
        "## Not run",
        "copy/wide/lr0.5/seed0",
        "flagged: forgets every 64 tokens",
    ):
        assert part in text
    shown = summary(results)
    assert "CONFIRMED" in shown
    assert "NOT TESTED" in shown


def test_what_has_not_run_is_not_tested(tmp_path) -> None:
    results = collect(Plan(suite_of(), tmp_path), HEADER)
    assert {claim["verdict"] for claim in results["claims"]} == {"not tested"}
    assert {row["verdict"] for row in results["controls"]} == {"not tested"}
    assert "no finished run" in markdown(results)


def test_a_leak_voids_what_it_touches(tmp_path) -> None:
    plan = Plan(suite_of(), tmp_path)
    for name in ("small", "again"):
        group = plan.groups["copy", name]
        while group.open():
            fake_result(plan, group, group.open()[0], leaks=name == "again")
    results = collect(plan, HEADER)
    assert [claim["verdict"] for claim in results["claims"]] == [
        "confirmed",
        "not decided",
        "not tested",
    ]
    assert "reads what it must not" in results["claims"][1]["checks"][0]["text"]
    assert len(results["flagged"]) == 4
    assert "30% of its answers change" in markdown(results)


def test_a_control_that_is_not_seen_fails(tmp_path) -> None:
    plan = filled(tmp_path)
    for result in plan.groups["copy", "small"].results.values():
        result["controls"]["wiped"]["wiped"] = False
    rows = collect(plan, HEADER)["controls"]
    assert [row["verdict"] for row in rows] == ["confirmed", "confirmed", "not confirmed"]


def test_failures_are_reported(tmp_path) -> None:
    plan = Plan(suite_of(), tmp_path)
    plan.settle(plan.groups["copy", "small"], (0.1, 0), "RuntimeError: it fell over\nat line 3")
    text = markdown(collect(plan, HEADER))
    assert "| copy/small/lr0.1/seed0 | RuntimeError: it fell over |" in text


def test_mean_and_spread() -> None:
    assert mean_and_spread([0.5]) == "0.500"
    assert mean_and_spread([0.4, 0.6]) == "0.500 ± 0.141"


def test_references() -> None:
    assert Reference.parse("a/b-1.2 string@40") == ("a", "b-1.2", "string", 40)
