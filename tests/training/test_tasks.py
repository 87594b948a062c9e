"""Synthetic tasks as training data: the loader's batches, the curriculum, and runs of any model."""

import itertools
import json

import pytest
import torch
import transformers

import ssm_hf
from eval.tasks import IGNORED
from training.config import DataConfig, TaskConfig, load_config
from training.data import prepare_data
from training.peers import flops_per_token, loss_options, parameter_groups, smoothing_loss
from training.tasks import TaskRows
from training.train import main


def data_config(**task):
    task = {"name": "parity", "lengths": ["3-8", "3-20"], **task}
    return DataConfig(seq_len=24, task=TaskConfig(**task))


def rows_of(seed=0, total_rows=80, **task):
    return TaskRows(data_config(**task), None, seed, total_rows)


def test_batches_are_functions_of_seed_and_place() -> None:
    first = rows_of().__getitems__([8, 9, 10, 11])
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        "input_ids": (4, 24),
        "labels": (4, 24),
        "position_ids": (4, 24),
    }
    again = rows_of().__getitems__([8, 9, 10, 11])
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (
        rows_of(seed=1).__getitems__([8, 9, 10, 11]),
        rows_of().__getitems__([12, 13, 14, 15]),
    ):
        assert not torch.equal(first["input_ids"], other["input_ids"])


def test_stages_share_the_run_equally() -> None:
    rows = rows_of(total_rows=80)

    def longest(first):
        return int(rows.__getitems__(list(range(first, first + 20)))["position_ids"].max())

    assert longest(0) == longest(20) == 8
    assert longest(40) > 8
    assert longest(400) > 8  # past the planned end the last stage goes on


def test_one_sample_to_a_row_on_request() -> None:
    packed = rows_of().__getitems__([0, 1])
    alone = rows_of(pack=False).__getitems__([0, 1])
    for row in alone["labels"] != IGNORED:
        (asked,) = row.nonzero(as_tuple=True)
        assert 3 <= len(asked) <= 8
    assert (packed["labels"] != IGNORED).sum() > (alone["labels"] != IGNORED).sum()


def test_rows_without_borders_on_request() -> None:
    rows = rows_of(borders=False).__getitems__([0, 1])
    assert torch.equal(rows["position_ids"], torch.arange(24).repeat(2, 1))
    assert torch.equal(rows["input_ids"], rows_of().__getitems__([0, 1])["input_ids"])


def test_the_loader_goes_on_where_it_stopped() -> None:
    data = prepare_data(data_config(), None, seed=0, total_rows=80)
    loader, evaluation = data.loaders(seed=0, batch_size=4, start=0)
    assert evaluation is None
    stream = iter(loader)
    batches = [next(stream) for _ in range(4)]
    later = next(iter(data.loaders(seed=0, batch_size=4, start=12)[0]))
    assert all(torch.equal(batches[3][name], later[name]) for name in later)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "parrity"}, "closest is 'parity'"),
        ({"options": {"modulus": 3}}, "no option 'modulus'"),
        ({"lengths": ["3-30"]}, "longest sample has 31 tokens, a row 24"),
        ({"lengths": ["three"]}, "expected a range"),
        ({"name": "phone_book", "lengths": ["3"]}, "needs a tokenizer"),
    ],
)
def test_bad_tasks_end_before_there_is_a_model(task, message) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_data(data_config(**task), None, seed=0, total_rows=80)


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe of 8 steps on the parity task for a model config; gives its path."""

    def write(model, **changes):
        folder = tmp_path / "config"
        model.save_pretrained(folder)
        settings = {
            "run_dir": str(tmp_path / "run"),
            "batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": 8,
            "log_every": 1,
            "save_every": 0,
            "tracker": None,
            "model": {"config": str(folder / "config.json")},
            "data": {
                "seq_len": 24,
                "task": {"name": "parity", "lengths": ["3-8"], "options": {}},
            },
            "optimizer": {"lr": 1e-2},
            "schedule": {"warmup_steps": 2},
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        return path

    return write


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
ATTENTION = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
MODELS = {
    "mamba2": lambda: ssm_hf.Mamba2Config(
        **SMALL, num_heads=2, head_dim=16, state_size=8, n_groups=1, chunk_size=8
    ),
    "llama": lambda: transformers.LlamaConfig(**ATTENTION),
    "nope": lambda: transformers.SmolLM3Config(**ATTENTION, no_rope_layers=[0], pad_token_id=0),
}


@pytest.mark.parametrize("kind", MODELS)
def test_any_model_trains_on_a_task(recipe, tmp_path, kind) -> None:
    main(["--config", str(recipe(MODELS[kind]()))])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    assert model.config.eos_token_id is None


def test_a_task_of_text_trains_through_a_tokenizer(recipe, tmp_path) -> None:
    config = ssm_hf.Mamba2Config(**{**MODELS["mamba2"]().to_dict(), "vocab_size": 264})
    data = {
        "seq_len": 512,
        "task": {"name": "phone_book", "lengths": ["3-6"], "options": {"examples": 1}},
    }
    main(["--config", str(recipe(config, data=data, tokenizer={"source": "byte"}))])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/final")
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == [97]


@pytest.mark.parametrize("kind", MODELS)
def test_packed_samples_do_not_see_one_another(kind) -> None:
    """Also in transformers' models, which take positions that restart for document borders."""
    ssm_hf.register(override=True)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[kind]()).eval()
    batch = rows_of().__getitems__([0, 1])
    ids, positions = batch["input_ids"], batch["position_ids"]
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), ids.shape[1]]
    assert len(starts) > 2
    for begin, end in itertools.pairwise(starts):
        alone = model(input_ids=ids[:1, begin:end], use_cache=False).logits
        # Sums in another order, in fp32.
        assert torch.allclose(logits[:1, begin:end], alone, atol=1e-5)


def test_a_model_with_too_few_ids_is_refused(recipe) -> None:
    task = ["--data.task.name", "string_copy", "--data.task.lengths", "[5-5]"]
    arguments = ["--config", str(recipe(MODELS["mamba2"]())), *task]
    with pytest.raises(ValueError, match="task string_copy has 30 tokens"):
        main(arguments)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.task.lengths", "[]", "at least one"),
        ("data.task.options", "3", "expected a mapping"),
        ("data.stdlib", "true", "exactly one source"),
        ("data.format", "chat", '"text" with data.task'),
        ("save_seen_tokens", "true", "a task has no end"),
        ("sample.prompts", "[a]", "none without a tokenizer"),
    ],
)
def test_contradictions_are_refused(recipe, key, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(["--config", str(recipe(MODELS["mamba2"]())), f"--{key}", value])


def test_options_of_a_task_come_from_the_command_line_too(recipe) -> None:
    path = recipe(MODELS["mamba2"]())
    config = load_config(["--config", str(path), "--data.task.options", "{running: false}"])
    assert config.data.task.options == {"running": False}


def test_peers_are_asked_what_they_do_not_say() -> None:
    llama = transformers.LlamaForCausalLM(MODELS["llama"]())
    decayed, spared = parameter_groups(llama, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(spared["params"]) == 3  # two norms of the layer and the last one
    assert loss_options(llama) == {"use_cache": False}
    every = sum(p.numel() for p in llama.parameters())
    assert flops_per_token(llama, 24) == 2 * (every - 8 * 16)
    tied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**ATTENTION, tie_word_embeddings=True)
    )
    assert flops_per_token(tied, 24) == 2 * every - 2 * 8 * 16

    own = ssm_hf.Mamba2ForCausalLM(MODELS["mamba2"]())
    assert loss_options(own) == {"use_cache": False, "return_logits": False}
    assert flops_per_token(own, 24) == own.flops_per_token(24)
    assert [g["weight_decay"] for g in parameter_groups(own, 0.1)] == [0.1, 0]


def test_smoothed_targets_add_what_torch_adds() -> None:
    logits = torch.randn(3, 7, 5, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 7))
    labels[0, 2:4] = labels[2, :3] = IGNORED
    given = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    plain = torch.nn.functional.cross_entropy(*given, ignore_index=IGNORED)
    smooth = torch.nn.functional.cross_entropy(*given, ignore_index=IGNORED, label_smoothing=0.2)
    # Logits are read in fp32.
    torch.testing.assert_close(
        plain + 0.2 * smoothing_loss(logits, labels).double(), smooth, atol=1e-6, rtol=0
    )


def test_smoothing_reaches_the_loss(recipe) -> None:
    path = recipe(MODELS["mamba2"]())
    losses = []
    for share in ("0", "0.5"):
        folder = path.parent / f"smoothed-{share}"
        arguments = ["--label_smoothing", share, "--run_dir", str(folder), "--log_every", "1"]
        main(["--config", str(path), *arguments])
        lines = (folder / "log.jsonl").read_text().splitlines()
        losses.append([e["loss"] for e in map(json.loads, lines) if e["event"] == "train"])
    assert losses[0][0] != losses[1][0]
    assert losses[1][-1] > 0
