"""Whole runs of a tiny model, in this process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import ssm_hf
from ssm_hf.models.backbone import CausalLMMixin
from tests.training.conftest import write_jsonl
from training import metrics
from training.train import main

ROOT = Path(__file__).parents[2]


each_model = pytest.mark.parametrize(
    "model_config", ["mamba2", "mamba3", "ssm_hybrid"], indirect=True
)


def run(recipe: Path, *arguments: str) -> Path:
    main(["--config", str(recipe), *arguments])
    return Path(yaml.safe_load(recipe.read_text())["run_dir"])


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final" / "model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_run_learns_and_leaves_everything_behind(recipe):
    arguments = ["--max_steps", "40", "--eval_every", "20", "--save_every", "20"]
    arguments += ["--save_seen_tokens", "true", "--tracker", "tensorboard"]
    run_dir = run(recipe, *arguments, "--sample.prompts", "[doc]", "--sample.max_new_tokens", "5")

    losses = [event["loss"] for event in events(run_dir, "train")]
    assert len(losses) == 40
    # ln 264 = 5.6 nats at the start; the documents are one repeated phrase.
    assert losses[0] > 5
    assert losses[-1] < 2.5
    assert all(
        event["grad_norm"] > 0 and event["tokens_per_s"] > 0 for event in events(run_dir, "train")
    )
    evaluations = events(run_dir, "eval")
    assert [event["step"] for event in evaluations] == [20, 40]
    assert evaluations[-1]["heldout_bits_per_byte"] < evaluations[0]["heldout_bits_per_byte"]
    assert events(run_dir, "sample")[0]["prompt"] == "doc"
    assert [p.name for p in (run_dir / "checkpoints").iterdir()].count("step-00000040") == 1
    assert list((run_dir / "tracking").rglob("events.out.tfevents*"))
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["max_steps"] == 40

    seen = json.loads((run_dir / "seen_tokens.json").read_text())
    assert len(np.fromfile(run_dir / "seen_tokens.bin", dtype=seen["dtype"])) == seen["count"]

    # The model as plain transformers loads it, on the text that the log's last figure is of.
    model = transformers.Mamba2ForCausalLM.from_pretrained(run_dir / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "final")
    bits, n_bytes = 0.0, 0
    for line in (run_dir / "heldout.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = [256, *tokenizer(text)["input_ids"], 256]
        # The log's rows hold 32 tokens, each piece starting with the last token of the one before.
        n_bytes += len(text.encode())
        bits += pieces_nats(model, ids, first=first_room(run_dir, text), room=32) / np.log(2)
    expected = evaluations[-1]["heldout_bits_per_byte"]
    assert bits / n_bytes == pytest.approx(expected, rel=1e-4)  # fp32, two implementations


def first_room(run_dir: Path, text: str) -> int:
    """Tokens left in the row where the document starts, if all are packed one after another."""
    room = 32
    for line in (run_dir / "heldout.jsonl").read_text().splitlines():
        other = json.loads(line)["text"]
        if room <= 1:
            room = 32
        if other == text:
            return room
        left = len(other.encode()) + 2
        while left > room:
            left -= room - 1
            room = 32
        room -= left
    raise AssertionError("not a held-out document")


def pieces_nats(model: torch.nn.Module, ids: list[int], first: int, room: int) -> float:
    nats, at = 0.0, 0
    while at < len(ids) - 1:
        piece = torch.tensor([ids[at : at + first]])
        with torch.no_grad():
            logits = model(piece).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum"))
        at += first - 1
        first = room
    return nats


@pytest.mark.parametrize(
    "model_config", ["mamba2", "mamba3", "ssm_hybrid", "taipan"], indirect=True
)
def test_resumed_run_ends_like_one_without_interruption(recipe, tmp_path):
    whole = weights(run(recipe))
    run_dir = tmp_path / "run"
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")  # as if stopped after step 3
    run(recipe)
    assert [event["step"] for event in events(run_dir, "resume")] == [3]
    assert [event["step"] for event in events(run_dir, "train")] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    first, second = events(run_dir, "train")[3:6], events(run_dir, "train")[6:]
    assert [event["loss"] for event in first] == [event["loss"] for event in second]
    assert largest_difference(whole, weights(run_dir)) == 0.0


def test_finished_run_resumes_to_its_end(recipe, tmp_path):
    whole = weights(run(recipe))
    assert largest_difference(whole, weights(run(recipe))) == 0.0
    assert events(tmp_path / "run", "resume")[0]["step"] == 6


def test_resume_refuses_other_data(recipe):
    run(recipe)
    with pytest.raises(RuntimeError, match="the data differs: seed was 0, is 1"):
        run(recipe, "--seed", "1")


def chats(tmp_path: Path) -> Path:
    """Conversations whose answers differ in length, so micro-batches differ in targets."""
    return write_jsonl(
        tmp_path / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "?" * (1 + i)},
                    {"role": "assistant", "content": "ab" * (1 + i * i)},
                ]
            }
            for i in range(8)
        ],
    )


@each_model
@pytest.mark.parametrize(
    "arguments",
    [
        ["--micro_batch_size", "1"],
        ["--model.gradient_checkpointing", "true"],
    ],
    ids=["accumulated", "checkpointed"],
)
def test_memory_saving_changes_nothing(recipe, tmp_path, arguments):
    common = ["--data.files", str(chats(tmp_path)), "--data.format", "chat", "--data.seq_len", "64"]
    common += ["--save_every", "0", "--max_steps", "3", "--optimizer.grad_clip", "1000"]
    # The same sums in another order: fp32 rounding, grown over three steps.
    run_dir = run(recipe, *common)
    plain = events(run_dir, "train")
    shutil.rmtree(run_dir)
    saved = events(run(recipe, *common, *arguments), "train")
    for key in ("loss", "grad_norm"):
        assert [e[key] for e in saved] == pytest.approx([e[key] for e in plain], rel=1e-4)


@pytest.mark.parametrize("model_config", ["jamba", "ssm_hybrid"], indirect=True)
def test_figures_of_routers_are_logged(recipe, tmp_path):
    """Of a first step; means over micro-batches by their targets."""
    common = ["--save_every", "0", "--eval_every", "0", "--max_steps", "1"]
    common += ["--schedule.warmup_steps", "0"]
    run_dir = run(recipe, *common)
    (first,) = events(run_dir, "train")
    names = ("aux_loss", "z_loss", "expert_load_max", "expert_load_min", "router_entropy")
    assert 1 <= first["expert_load_max"] <= 4  # of four experts
    assert 0 <= first["expert_load_min"] <= 1
    # 2 of 4 experts a token: 2 when even, 4 when all tokens are sure of the same one and have two
    assert 1.9 <= first["aux_loss"] <= 4
    recorded = []
    forward = CausalLMMixin.forward

    def record(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if "labels" in kwargs:  # not of held-out rows
            count = (kwargs["labels"] != -100).sum()
            recorded.append((metrics.model_figures(output), count))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLMMixin, "forward", record)
        shutil.rmtree(run_dir)
        run(recipe, *common, "--micro_batch_size", "1")
    (parts,) = events(run_dir, "train")
    assert len(recorded) == 4
    targets = sum(count for _, count in recorded)
    for name in names:
        mean = sum(figures[name] * count for figures, count in recorded) / targets
        assert parts[name] == pytest.approx(float(mean), rel=1e-5)  # fp32 sums in another order
    # Loads of the parts are at least as uneven as that of the whole.
    assert parts["expert_load_max"] >= first["expert_load_max"] * (1 - 1e-5)


@pytest.mark.parametrize("model_config", ["taipan"], indirect=True)
def test_gates_follow_the_run_and_their_figures_are_logged(recipe):
    seen = []
    tell = ssm_hf.TaipanForCausalLM.set_training_progress

    def record(self, progress):
        changed = tell(self, progress)
        seen.append((progress, float(self.model.progress), changed))
        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssm_hf.TaipanForCausalLM, "set_training_progress", record)
        run_dir = run(recipe)
    steps = [step / 6 for step in range(6)]
    assert [progress for progress, _, _ in seen] == pytest.approx(steps)
    assert [held for _, held, _ in seen] == pytest.approx(steps)
    assert [changed for _, _, changed in seen] == [False, False, False, True, False, False]
    for event in events(run_dir, "train"):
        assert 0 <= event["gate_fraction_min"] <= event["gate_fraction"]
        assert event["gate_fraction"] <= event["gate_fraction_max"] <= 1
        assert event["capacity_loss"] >= 0
    for event in events(run_dir, "eval"):
        assert 0 <= event["heldout_gate_fraction"] <= 1


def test_bf16_autocast_trains_fp32_weights(recipe):
    run_dir = run(recipe, "--precision", "bf16", "--max_steps", "20")
    assert {value.dtype for value in weights(run_dir).values()} == {torch.float32}
    assert events(run_dir, "train")[-1]["loss"] < 4


def test_finetuning_starts_from_a_checkpoint(recipe, tmp_path):
    first = run(recipe, "--max_steps", "40").rename(tmp_path / "pretrained")
    pairs = [{"prompt": "document ", "completion": "abcdefgh abcdefgh"} for _ in range(8)]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    arguments = ["--model.checkpoint", str(first / "final"), "--model.config", "null"]
    arguments += [
        "--tokenizer.source",
        "null",
        "--data.files",
        str(data),
        "--data.format",
        "prompt",
    ]
    run_dir = run(recipe, *arguments, "--max_steps", "3")
    assert events(run_dir, "train")[0]["loss"] < 3  # 5.6 from scratch
    assert largest_difference(weights(first), weights(run_dir)) > 0


def test_wall_time_ends_a_run_fully_decayed(recipe):
    run_dir = run(recipe, "--max_steps", "100000", "--max_minutes", "0.05", "--save_every", "0",
                  "--eval_every", "0", "--schedule.min_lr_ratio", "0")  # fmt: skip
    (end,) = events(run_dir, "end")
    assert 3 <= end["elapsed_s"] < 15  # 0.05 minutes and the last step
    assert end["step"] < 100_000
    rates = [event["lr"] for event in events(run_dir, "train")]
    assert rates[-1] < 0.1 * max(rates)


def test_steps_that_are_not_finite_are_skipped_then_stop_the_run(recipe, tmp_path):
    arguments = [
        "--optimizer.lr",
        "1e30",
        "--max_skipped_steps",
        "2",
        "--schedule.warmup_steps",
        "0",
    ]
    with pytest.raises(
        RuntimeError, match=r"step 3: 2 steps in a row had a loss or gradient .*lower"
    ):
        run(recipe, *arguments)
    run_dir = tmp_path / "run"
    assert [event["step"] for event in events(run_dir, "train")] == [1]
    assert [event["step"] for event in events(run_dir, "skip")] == [2, 3]
    assert not (run_dir / "final").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["--model.config", "none.json"],
            FileNotFoundError,
            "model.config none.json: no such file",
        ),
        (["--batch_size", "6"], ValueError, r"batch_size is 6, expected a multiple of .* \(4\)"),
    ],
)
def test_bad_settings_are_refused(recipe, arguments, error, message):
    with pytest.raises(error, match=message):
        run(recipe, *arguments)


def test_tokenizer_larger_than_the_model_is_refused(recipe, model_config):
    content = json.loads(model_config.read_text())
    model_config.write_text(json.dumps(content | {"vocab_size": 260}))
    with pytest.raises(ValueError, match=r"has 264 tokens, but the model's vocab_size is 260"):
        run(recipe)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mamba-130m", 129_135_360),
        ("mamba-370m", 371_516_416),
        ("mamba-790m", 793_204_224),
        ("mamba-1.4b", 1_372_178_432),
        ("mamba-2.8b", 2_768_345_600),
        ("mamba2-130m", 128_989_632),
        ("mamba2-370m", 368_346_624),
        ("mamba2-780m", 780_161_280),
        ("mamba2-1.3b", 1_343_757_312),
        ("mamba2-2.7b", 2_702_599_680),
    ],
)
def test_shipped_model_configs_have_the_published_sizes(name, count, tmp_path):
    ssm_hf.register(override=True)
    path = ROOT / "configs" / "model" / f"{name}.json"
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == count
    # The file is exactly what save_pretrained of that model writes, but for the version.
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    shipped = json.loads(path.read_text())
    del written["transformers_version"], shipped["transformers_version"]
    assert written == shipped


def test_command_of_the_readme_runs(recipe, tmp_path):
    """The one test through the launcher; the others call main() to save its start-up time."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / "single.yaml")]
    command += ["-m", "training.train", "--config", str(recipe), "--max_steps", "2"]
    command += ["--schedule.warmup_steps", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"model in {tmp_path / 'run' / 'final'}" in done.stdout


def test_tiny_example_runs():
    command = [sys.executable, str(ROOT / "examples" / "train_tiny.py"), "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[3]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[0] > 5 > 3 > losses[1]


@pytest.mark.parametrize(
    "model_config", ["mamba2", pytest.param("mamba3", marks=pytest.mark.slow)], indirect=True
)
def test_two_processes_train_like_one(recipe, tmp_path):
    """Data parallel over gloo: the same rows, targets and clipping, so the same weights."""
    common = ["--save_every", "0", "--eval_every", "0", "--data.files", str(chats(tmp_path))]
    common += ["--data.format", "chat", "--data.seq_len", "64", "--optimizer.grad_clip", "0.5"]
    run_dir = run(recipe, *common)
    alone, alone_events = weights(run_dir), events(run_dir, "train")
    shutil.rmtree(run_dir)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = ["-m", "training.train", "--config", str(recipe), "--micro_batch_size", "1"]
    done = subprocess.run(
        [sys.executable, *launch, *script, *common],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # fp32 sums in another order, and six steps of Adam on top of them.
    assert largest_difference(alone, weights(run_dir)) < 1e-4
    for one, two in zip(alone_events, events(run_dir, "train"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
