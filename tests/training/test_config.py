from pathlib import Path

import pytest
import yaml

from training.config import TrainConfig, leaves, load_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "train").glob("*.yaml"))


def keys_of(recipe: dict, prefix: str = "") -> set[str]:
    keys, known = set(), leaves(TrainConfig)
    for name, value in recipe.items():
        key = prefix + name  # some of them hold a mapping themselves
        is_section = isinstance(value, dict) and key not in known
        keys |= keys_of(value, f"{key}.") if is_section else {key}
    return keys


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_spell_every_value(path):
    assert keys_of(yaml.safe_load(path.read_text())) == set(leaves(TrainConfig))
    config = load_config(["--config", str(path)])
    if config.model.config is not None:
        assert (ROOT / config.model.config).is_file()


def test_command_line_stands_over_the_file(recipe):
    arguments = ["--optimizer.lr", "3e-4", "--max_steps=7", "--sample.prompts", "[a, 'b c']"]
    arguments += ["--max_minutes", "1", "--data.files", "x.txt", "--tracker", "null"]
    config = load_config(["--config", str(recipe), *arguments])
    assert config.optimizer.lr == 3e-4
    assert config.max_steps == 7
    assert config.sample.prompts == ["a", "b c"]
    assert config.max_minutes == 1.0
    assert config.data.files == ["x.txt"]
    assert config.tracker is None
    assert config.batch_size == 4  # from the file
    assert config.optimizer.weight_decay == 0.1  # the default


def test_saved_config_reads_back_equal(recipe, tmp_path):
    config = load_config(["--config", str(recipe), "--run_dir", "123", "--seed", "5"])
    assert config.run_dir == "123"
    config.save(tmp_path / "saved.yaml")
    assert load_config(["--config", str(tmp_path / "saved.yaml")]) == config


@pytest.mark.parametrize(
    ("key", "closest"),
    [
        ("optimiser.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("data.seqlen", "data.seq_len"),
        ("max_step", "max_steps"),
    ],
)
@pytest.mark.parametrize("where", ["file", "command line"])
def test_unknown_key_is_refused_with_the_closest_one(recipe, key, closest, where):
    arguments = ["--config", str(recipe)]
    if where == "file":
        section, _, name = key.rpartition(".")
        extra = {section: {name: 1}} if section and section != "data" else {name: 1}
        content = yaml.safe_load(recipe.read_text())
        if section == "data":
            content["data"][name] = 1
        else:
            content |= extra
        recipe.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=f"unknown key .* in .*{recipe.name}; the closest"):
            load_config(arguments)
    else:
        with pytest.raises(
            ValueError, match=f"unknown key '{key}'.*closest valid key is '{closest}'"
        ):
            load_config([*arguments, f"--{key}", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_steps", "many"], "--max_steps: expected a whole number, got 'many'"),
        (["--max_steps", "1.5"], "--max_steps: expected a whole number, got 1.5"),
        (["--max_steps", "true"], "--max_steps: expected a whole number, got True"),
        (["--optimizer.lr", "fast"], "--optimizer.lr: expected a number, got 'fast'"),
        (
            ["--model.gradient_checkpointing", "1"],
            "--model.gradient_checkpointing: expected true or false, got 1",
        ),
        (["--precision", "fp16"], "--precision: expected one of 'fp32', 'bf16', got 'fp16'"),
        (["--optimizer.betas", "[0.9, x]"], r"betas\[1\]: expected a number, got 'x'"),
        (["--max_steps"], "--max_steps has no value"),
        (["max_steps", "3"], "'max_steps' without a key"),
        (["--max_steps", "0"], "max_steps is 0, expected more than 0"),
        (["--optimizer.betas", "[0.9]"], r"optimizer.betas is \[0.9\], expected two numbers"),
        (["--data.heldout_fraction", "1"], "data.heldout_fraction is 1.0, expected a share"),
        (["--label_smoothing", "1"], "label_smoothing is 1.0, expected a share"),
        (["--schedule.warmup_steps", "6"], r"expected less than max_steps \(6\)"),
        (["--model.checkpoint", "x"], "exactly one: a config.json .* or a checkpoint"),
        (["--model.config", "null"], "exactly one: a config.json .* or a checkpoint"),
        (["--tokenizer.source", "null"], "a model from scratch brings none"),
        (["--data.stdlib", "true"], "exactly one source of data"),
        (["--data.files", "null"], "exactly one source of data"),
        (["--data.streaming", "true"], "only a data.dataset can be streamed"),
    ],
)
def test_bad_values_are_refused_by_name(recipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_config(["--config", str(recipe), *arguments])


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such file"):
        load_config(["--config", str(tmp_path / "none.yaml")])
    for content, message in (
        ("a: [", "is not valid YAML"),
        ("- a", "expected `key: value` lines, got list"),
        ("data: 3\nrun_dir: x", "data is a section"),
        ("seed: 1", "run_dir is missing"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_config(["--config", str(path)])
