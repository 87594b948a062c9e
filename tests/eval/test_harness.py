"""The lm-evaluation-harness adapter and the eight zero-shot tasks."""

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from eval.harness import UNLIMITED, CausalLM, run_lm_eval
from eval.model import LoadedModel, length_limit, load_model
from eval.options import LmEvalOptions
from eval.published import AVERAGES
from eval.tasks.zero_shot import ZERO_SHOT_TASKS, build_tasks

SHARED = Path(__file__).parents[3] / "shared" / "data" / "evals"
CHOICES = {"text": ["a lake", "a stone"], "label": ["A", "B"]}
ROWS = {
    "lambada_openai": {"text": "the cat sat on the mat"},
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man stirs a pot.",
        "ctx_b": "the man",
        "endings": ["tastes the soup.", "flies away.", "sings [loudly].", "reads."],
        "label": "0",
    },
    "piqa": {"goal": "boil water", "sol1": "heat it", "sol2": "cool it", "label": 0},
    "arc_easy": {"question": "What is wet?", "choices": CHOICES, "answerKey": "A"},
    "arc_challenge": {"question": "What is hard?", "choices": CHOICES, "answerKey": "B"},
    "winogrande": {
        "sentence": "Ann thanked Sue because _ had helped.",
        "option1": "Ann",
        "option2": "Sue",
        "answer": "2",
    },
    "openbookqa": {"question_stem": "Fish live in", "choices": CHOICES, "answerKey": "A"},
    "boolq": {"passage": "Water is wet.", "question": "is water wet", "label": 1},
}
STOCK_PROMPTS = {
    "lambada_openai": [("the cat sat on the", " mat")],
    "hellaswag": [
        ("Cooking: A man stirs a pot. The man", " tastes the soup."),
        ("Cooking: A man stirs a pot. The man", " flies away."),
        ("Cooking: A man stirs a pot. The man", " sings ."),
        ("Cooking: A man stirs a pot. The man", " reads."),
    ],
    "piqa": [
        ("Question: boil water\nAnswer:", " heat it"),
        ("Question: boil water\nAnswer:", " cool it"),
    ],
    "arc_easy": [
        ("Question: What is wet?\nAnswer:", " a lake"),
        ("Question: What is wet?\nAnswer:", " a stone"),
    ],
    "arc_challenge": [
        ("Question: What is hard?\nAnswer:", " a lake"),
        ("Question: What is hard?\nAnswer:", " a stone"),
    ],
    "winogrande": [
        ("Ann thanked Sue because Ann", " had helped."),
        ("Ann thanked Sue because Sue", " had helped."),
    ],
    "openbookqa": [("Fish live in", " a lake"), ("Fish live in", " a stone")],
    "boolq": [
        ("Water is wet.\nQuestion: is water wet?\nAnswer:", " no"),
        ("Water is wet.\nQuestion: is water wet?\nAnswer:", " yes"),
    ],
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Three rows per task, named by paths relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    return {name: f"{name}.jsonl" for name in ROWS}


def _requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_loglikelihood_of_a_batch_equals_single_requests(loaded: LoadedModel) -> None:
    pairs = [
        ("def f", "(x):"),
        ("The long beginning of a text, much longer than the others,", " ends"),
        ("", "nothing before"),
        ("one", " two three four"),
    ]
    batched = CausalLM(loaded, batch_size=4).loglikelihood(_requests("loglikelihood", pairs))
    for pair, (value, greedy) in zip(pairs, batched, strict=True):
        ids = loaded.encode(pair[0] + pair[1])[0 if pair[0] == "" else 1 :]
        continuation = len(pair[1].encode())
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        targets = torch.tensor(ids[1:])
        expected = logits[torch.arange(len(targets)), targets][-continuation:].sum().item()
        # Padding changes the order of fp32 sums in the scan, over up to 15 scored tokens.
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == targets)[-continuation:].all())


def test_half_precision_logits_are_normalised_in_fp32(model_dir: Path) -> None:
    half = load_model(str(model_dir), dtype="bfloat16", device="cpu", prefix="auto")
    (request,) = _requests("loglikelihood", [("def f", "(x): return x + 1")])
    ((value, _),) = CausalLM(half, batch_size=1).loglikelihood([request])
    ids = half.encode("def f(x): return x + 1")[1:]
    with torch.no_grad():
        logits = half.model(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    expected = logits[torch.arange(len(ids) - 1), ids[1:]][4:].sum().item()
    # fp32 rounding of 17 terms; bfloat16 would round each to one part in 256.
    assert value == pytest.approx(expected, abs=1e-4)


def test_generation_of_a_left_padded_batch_equals_single_requests(loaded: LoadedModel) -> None:
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = ["a", "def f(x):", "The long beginning of a text, longer than the others"]
    requests = _requests("generate_until", [(prompt, settings) for prompt in prompts])
    batched = CausalLM(loaded, batch_size=3).generate_until(requests)
    single = CausalLM(loaded, batch_size=1).generate_until(requests)
    assert batched == single
    assert all(batched)


def test_input_length_is_unlimited_unless_stated(loaded: LoadedModel) -> None:
    assert length_limit(loaded.model.config) is None
    assert CausalLM(loaded, batch_size=1).max_length == UNLIMITED
    # 3000 bytes: the harness' own default of 2048 tokens would cut the beginning.
    request = _requests("loglikelihood", [("Q" + "x" * 3000, " yes")])
    other = _requests("loglikelihood", [("R" + "y" * 3000, " yes")])
    full = CausalLM(loaded, batch_size=1)
    short = CausalLM(loaded, batch_size=1, max_length=4)
    assert full.loglikelihood(request) != full.loglikelihood(other)
    assert short.loglikelihood(request) == short.loglikelihood(
        _requests("loglikelihood", [("x", " yes")])
    )


def test_local_tasks_make_the_stock_prompts(files: dict[str, str | None]) -> None:
    groups, manager = build_tasks(files)
    tasks = manager.load(groups)["tasks"]
    assert set(tasks) == set(ROWS)
    for name, task in tasks.items():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=1)
        assert [request.args for request in task.instances] == STOCK_PROMPTS[name], name


# The harness resamples in forked processes; from 3.12 on Python warns of forking beside threads.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_tiny_files_run_through_all_tasks(
    loaded: LoadedModel, files: dict[str, str | None]
) -> None:
    result = run_lm_eval(loaded, LmEvalOptions(tasks=files, limit=2), seed=0)
    assert set(result["tasks"]) == set(ZERO_SHOT_TASKS)
    assert result["max_length"] is None
    for name, task in result["tasks"].items():
        assert (task["n"], task["file"]) == (2, files[name])
        score = task["metrics"][task["reported"][0]]
        # All rows are the same, so the answer is right twice or wrong twice.
        assert score["value"] in (0.0, 1.0)
        assert score["stderr"] == 0.0
    lambada = result["tasks"]["lambada_openai"]["metrics"]
    assert lambada["perplexity"]["value"] > 1
    assert set(result["averages"]) == set(AVERAGES)
    assert all(0 <= score["value"] <= 1 for score in result["averages"].values())


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the tasks' data is not at {SHARED}")
def test_published_data_runs_through_all_tasks(loaded: LoadedModel, tmp_path: Path) -> None:
    tasks: dict[str, str | None] = {}
    for name in ZERO_SHOT_TASKS:
        (source,) = SHARED.glob(f"{name}_*.jsonl.gz")
        # The first rows only: the harness reads and prepares a whole file before it limits it.
        with gzip.open(source, "rb") as rows:
            head = b"".join(islice(rows, 2))
        (tmp_path / source.name).write_bytes(gzip.compress(head))
        tasks[name] = str(tmp_path / source.name)
    result = run_lm_eval(loaded, LmEvalOptions(tasks=tasks, bootstrap_iters=0), seed=0)
    assert {name: task["n"] for name, task in result["tasks"].items()} == dict.fromkeys(tasks, 2)
    assert all(
        metric["stderr"] is None
        for task in result["tasks"].values()
        for metric in task["metrics"].values()
    )


def test_missing_file_names_task_and_path(loaded: LoadedModel) -> None:
    with pytest.raises(FileNotFoundError, match=r"lm_eval\.tasks\.piqa: file no\.jsonl does not"):
        run_lm_eval(loaded, LmEvalOptions(tasks={"piqa": "no.jsonl"}), seed=0)


def test_unknown_task_names_the_closest() -> None:
    with pytest.raises(ValueError, match="unknown task 'arc_esy', the closest is 'arc_easy'"):
        build_tasks({"arc_esy": None})


def test_wrong_columns_and_empty_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"goal": "x", "sol1": "a"}\n')
    with pytest.raises(ValueError, match=r"piqa: .*p\.jsonl line 1 lacks \['sol2', 'label'\]"):
        build_tasks({"piqa": str(path)})
    path.write_text("")
    with pytest.raises(ValueError, match=r"lm_eval\.tasks\.piqa: .*p\.jsonl holds no rows"):
        build_tasks({"piqa": str(path)})
