"""The adapter over lm-evaluation-harness: exact, whatever the batch, and able to go on."""

import functools
import gzip
import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

import eval.lm_eval
from eval.harness import CausalLM
from eval.model import LoadedModel, load_model
from eval.run import main
from eval.tasks.zero_shot import build_tasks
from tests.eval.test_harness import ROWS, SHARED

ROOT = Path(__file__).parents[2]


def _requests(name: str, file: Path, limit: int) -> list[Instance]:
    """The first requests of a task, as the harness makes them."""
    groups, manager = build_tasks({name: str(file)})
    (task,) = manager.load(groups)["tasks"].values()
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=limit)
    return task.instances[:limit]


def _published_requests(tmp_path: Path, number: int) -> list[Instance]:
    requests = []
    for name in ("lambada_openai", "hellaswag"):
        (source,) = SHARED.glob(f"{name}_*.jsonl.gz")
        with gzip.open(source, "rt", encoding="utf-8") as rows:
            (tmp_path / f"{name}.jsonl").write_text("".join(islice(rows, number)))
        requests += _requests(name, tmp_path / f"{name}.jsonl", number)
    return requests


def _local_requests(tmp_path: Path) -> list[Instance]:
    requests = []
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        requests += _requests(name, tmp_path / f"{name}.jsonl", 4)
    return requests


def _values(model: Any, requests: list[Instance]) -> torch.Tensor:
    answers = model.loglikelihood(requests, disable_tqdm=True)
    return torch.tensor([value for value, _ in answers], dtype=torch.float64)


def _stock(model_dir: Path, loaded: LoadedModel, batch_size: int) -> HFLM:
    """The harness' `hf` model, running transformers' own class on the same files."""
    model = Mamba2ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=batch_size)


# Sums in fp32 of a hundred log-probabilities; the two scans add in another order.
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def test_equals_the_stock_harness_with_transformers_own_class(
    model_dir: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    requests = _local_requests(tmp_path)
    assert len(requests) > 15
    stock = _values(_stock(model_dir, loaded, 4), requests)
    for batch_size in (1, 16):
        ours = _values(CausalLM(loaded, batch_size=batch_size), requests)
        torch.testing.assert_close(ours, stock, **TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_any_causal_model_goes_through(loaded: LoadedModel, tmp_path: Path, kind: str) -> None:
    config = AutoConfig.for_model(
        kind,
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    peer = LoadedModel(model, loaded.tokenizer, loaded.prefix, "")
    requests = _local_requests(tmp_path)
    stock = HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=4)
    adapter = CausalLM(peer, batch_size=16)
    assert adapter.max_length == 512
    torch.testing.assert_close(_values(adapter, requests), _values(stock, requests), **TOLERANCE)
    greedy = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [Instance("generate_until", {}, (c, greedy), 0) for c in ("a", "bcdef", "gh")]
    assert adapter.generate_until(prompts) == CausalLM(peer, batch_size=1).generate_until(prompts)


@pytest.fixture
def neox_dir(tmp_path: Path) -> Path:
    """A tiny model with the GPT-NeoX tokenizer and a padded vocabulary, as released models have."""
    directory = tmp_path / "neox"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED.parent / "tokenizers" / "gpt_neox_20b" / "tokenizer.json"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba2",
        vocab_size=50288,
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=16,
        num_heads=4,
        state_size=16,
        n_groups=1,
        chunk_size=32,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the tasks' data is not at {SHARED}")
def test_equals_the_stock_harness_on_published_data(neox_dir: Path, tmp_path: Path) -> None:
    loaded = load_model(str(neox_dir), dtype="float32", device="cpu", prefix="auto")
    requests = _published_requests(tmp_path, 200)
    assert len(requests) == 400
    stock = _values(_stock(neox_dir, loaded, 8), requests)
    single = _values(CausalLM(loaded, batch_size=1), requests)
    torch.testing.assert_close(single, stock, **TOLERANCE)
    batched = _values(CausalLM(loaded, batch_size=16), requests)
    torch.testing.assert_close(batched, single, **TOLERANCE)


# The datasets that the stock tasks name: repository, configuration, splits.
HUB = {
    "lambada_openai": ("EleutherAI/lambada_openai", "default", ["test"]),
    "hellaswag": ("Rowan/hellaswag", "default", ["train", "validation"]),
    "piqa": ("baber/piqa", "default", ["train", "validation"]),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", ["train", "validation", "test"]),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", ["train", "validation", "test"]),
    "winogrande": ("allenai/winogrande", "winogrande_xl", ["train", "validation"]),
    "openbookqa": ("allenai/openbookqa", "main", ["train", "validation", "test"]),
    "boolq": ("aps/super_glue", "boolq", ["train", "validation"]),
}


def _write_hub_datasets(folder: Path) -> None:
    """Write the tasks' rows the way the Hub keeps datasets: Parquet files and a card."""
    cards: dict[Path, list[dict[str, Any]]] = {}
    for name, (repository, part, splits) in HUB.items():
        home = folder / repository
        files = []
        for split in splits:
            path = f"{part}/{split}-00000-of-00001.parquet"
            (home / part).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([ROWS[name]]), home / path)
            files.append({"split": split, "path": path})
        cards.setdefault(home, []).append({"config_name": part, "data_files": files})
    for home, configs in cards.items():
        (home / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def test_local_files_and_hub_datasets_make_the_same_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # `datasets` takes a folder of a dataset's name before the Hub
    _write_hub_datasets(tmp_path)
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    made = {}
    for origin in ("file", "hub"):
        files = {name: f"{name}.jsonl" if origin == "file" else None for name in ROWS}
        groups, manager = build_tasks(files)
        tasks = manager.load(groups)["tasks"]
        assert set(tasks) == set(ROWS)
        for name, task in tasks.items():
            task.set_config(key="num_fewshot", value=0)
            task.build_all_requests()
            doc = task.instances[0].doc
            made[origin, name] = ([r.args for r in task.instances], task.doc_to_target(doc))
    for name in ROWS:
        assert made["file", name] == made["hub", name], name


def test_bos_policy(loaded: LoadedModel) -> None:
    start = loaded.tokenizer.bos_token_id
    for bos, begins in (("tokenizer", False), ("always", True), ("never", False)):
        adapter = CausalLM(loaded, batch_size=2, bos=bos)
        assert (adapter.tok_encode("ab")[0] == start) is begins
        ids, mask = adapter.tok_batch_encode(["ab", "abcd"])
        assert ids.shape == mask.shape == (2, 5 if begins else 4)
        assert ids[0].tolist() == [loaded.tokenizer.pad_token_id] * 2 + adapter.tok_encode("ab")
        assert mask[0].tolist() == [0, 0] + [1] * (ids.shape[1] - 2)
    with pytest.raises(ValueError, match="bos must be"):
        CausalLM(loaded, bos="yes")


def _some(number: int, task: str = "t") -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (f"{i} is", f" {i * i}"), 0, metadata=(task, i, 1))
        for i in range(number)
    ]


def test_batch_is_halved_when_memory_runs_out(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = CausalLM(loaded, batch_size=2).loglikelihood(_some(7))
    sizes = []
    forward = loaded.model.forward

    def limited(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", limited)
    adapter = CausalLM(loaded, batch_size=8)
    assert adapter.loglikelihood(_some(7)) == expected
    assert adapter.batch_size == 2
    assert sizes == [7, 4, 2, 2, 2, 1]

    def never(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(loaded.model, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        CausalLM(loaded, batch_size=8).loglikelihood(_some(7))


def test_finished_answers_are_not_asked_again(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    kinds = {
        "loglikelihood": _some(5),
        "generate_until": [Instance("generate_until", {}, (c, greedy), 0) for c in "abc"],
        "loglikelihood_rolling": [Instance("", {}, (3 * c,), 0) for c in "abc"],
    }
    first = CausalLM(loaded, batch_size=2, samples=tmp_path)
    half = {kind: getattr(first, kind)(requests[:2]) for kind, requests in kinds.items()}
    second = CausalLM(loaded, batch_size=2, samples=tmp_path)
    whole = {kind: getattr(second, kind)(requests) for kind, requests in kinds.items()}
    plain = CausalLM(loaded, batch_size=2)
    for kind, requests in kinds.items():
        assert whole[kind][:2] == half[kind]
        assert whole[kind] == getattr(plain, kind)(requests)
    monkeypatch.setattr(loaded.model, "forward", None)  # cannot be called
    third = CausalLM(loaded, batch_size=2, samples=tmp_path)
    for kind, requests in kinds.items():
        assert getattr(third, kind)(requests + requests) == 2 * whole[kind]
    with pytest.raises(TypeError):
        third.loglikelihood(_some(6))
    other = CausalLM(loaded, batch_size=2, samples=tmp_path, bos="always")
    with pytest.raises(TypeError):
        other.loglikelihood(_some(1))


def test_sampled_answers_are_always_new(loaded: LoadedModel, tmp_path: Path) -> None:
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    request = Instance("generate_until", {}, ("a", settings), 0)
    answers = []
    for _ in range(2):
        adapter = CausalLM(loaded, batch_size=4, samples=tmp_path)
        answers += adapter.generate_until([request, request])
    assert len(set(answers)) == 4


def test_a_likelihood_that_is_not_finite_is_refused(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.model.lm_head.weight, "data", torch.full((264, 32), torch.nan))
    with pytest.raises(ValueError, match=r"log-likelihood of \('0 is', ' 0'\) is nan"):
        CausalLM(loaded, batch_size=1).loglikelihood(_some(1))


def _suite(tmp_path: Path, rows: int) -> Path:
    lines = "".join(json.dumps({**ROWS["piqa"], "goal": f"boil {i}"}) + "\n" for i in range(rows))
    (tmp_path / "piqa.jsonl").write_text(lines)
    suite = tmp_path / "piqa.yaml"
    suite.write_text(
        f"lm_eval: {{tasks: {{piqa: {tmp_path}/piqa.jsonl}}, batch_size: 1, bootstrap_iters: 0}}\n"
    )
    return suite


def test_a_killed_run_goes_on(model_dir: Path, tmp_path: Path) -> None:
    rows = 100
    suite = _suite(tmp_path, rows)
    output = tmp_path / "out"
    file = output / "samples" / "lm_eval-piqa.jsonl"
    arguments = ["--model", str(model_dir), "--suite", str(suite), "--output", str(output)]
    command = [sys.executable, "-m", "eval.run", *arguments]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not (file.exists() and file.read_bytes().count(b"\n") > 10):
            assert run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        run.kill()
        run.wait()
    assert not (output / "results.json").exists()
    done = file.read_bytes().count(b"\n") - 1
    assert 10 <= done < 2 * rows
    with file.open("ab") as cut:
        cut.write(b'{"key": "cut')
    assert main(arguments) == 0
    text = file.read_text()
    ids = [json.loads(line)["id"] for line in text.splitlines() if '"id"' in line]
    assert len(ids) == len(set(ids)) == 2 * rows
    alone = tmp_path / "alone"
    assert main([*arguments[:-1], str(alone)]) == 0
    results = [json.loads((o / "results.json").read_text())["lm_eval"] for o in (output, alone)]
    assert results[0] == results[1]


def test_processes_share_the_requests(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = _suite(tmp_path, 6)
    outputs = [tmp_path / "one", tmp_path / "two"]
    arguments = ["--model", str(model_dir), "--suite", str(suite), "--output"]
    assert main([*arguments, str(outputs[0])]) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two processes cannot share one GPU
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "eval.run", *arguments, str(outputs[1])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("=== Evaluation of") == 1
    results = []
    for output in outputs:
        results.append(json.loads((output / "results.json").read_text())["lm_eval"])
        lines = (output / "samples" / "lm_eval-piqa.jsonl").read_text().splitlines()
        assert sum('"id"' in line for line in lines) == 12
    assert results[0] == results[1]


def test_the_harness_own_command_line(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _suite(tmp_path, 3)
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "mine",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/piqa.jsonl"}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "Question: {{goal}}\nAnswer:",
                "doc_to_choice": "{{[sol1, sol2]}}",
                "doc_to_target": "label",
            }
        )
    )
    # Indexing the harness' own 14,000 tasks takes half a minute.
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False)
    )
    values = {}
    for model in ("ssm_hf", "hf"):
        command = ["eval.lm_eval", "--model", model, "--batch_size", "2", "--device", "cpu"]
        command += ["--model_args", f"pretrained={model_dir},dtype=float32"]
        command += ["--include_path", str(tmp_path), "--tasks", "mine", "--log_samples"]
        command += ["--output_path", str(tmp_path / model)]
        monkeypatch.setattr(sys, "argv", command)
        eval.lm_eval.main()
        (samples,) = (tmp_path / model).rglob("samples_mine_*.jsonl")
        values[model] = torch.tensor(
            [
                float(answer[0])
                for line in samples.read_text().splitlines()
                for answer in json.loads(line)["filtered_resps"]
            ]
        )
    assert len(values["hf"]) == 6
    torch.testing.assert_close(values["ssm_hf"], values["hf"], **TOLERANCE)
