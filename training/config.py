"""The recipe of a run: dataclasses, the YAML file over them, and `--key value` over that."""

import argparse
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(kw_only=True)
class ModelConfig:
    """What is trained. Exactly one of `config` and `checkpoint` is set.

    config: config.json of a model built from scratch.
    checkpoint: directory (or Hub name) of a model to finetune.
    gradient_checkpointing: recompute each block in the backward pass to save memory.
    execution: how a training pass runs. "graph" captures it in a CUDA graph once and replays it,
        which spares the host all launches; "compile" is torch.compile of the repeated blocks;
        "eager" neither; "auto" is "graph" on GPUs that each hold the whole model, else "eager".
    keep_activations: keep more for the backward pass than it needs, so that it forms less again. At
        130M a pass takes 3 % less time for half as much memory again, of Mamba-1 16 % less for
        twice the memory (see `ssm_hf.keep_activations`).
    """

    config: str | None = None
    checkpoint: str | None = None
    gradient_checkpointing: bool = False
    execution: Literal["auto", "eager", "compile", "graph"] = "auto"
    keep_activations: bool = False


@dataclass(kw_only=True)
class TokenizerConfig:
    """How text becomes ids.

    source: "byte" (built in), a tokenizer directory or Hub name, a tokenizer.json, or null for
        the tokenizer saved with `model.checkpoint` (with `data.task`: for none, ids are the
        task's).
    eos_token: end-of-document token; needed for a bare tokenizer.json, which does not name one.
    """

    source: str | None = None
    eos_token: str | None = None


@dataclass(kw_only=True)
class TaskConfig:
    """A synthetic task of eval/tasks in place of documents; fresh samples are drawn throughout.

    name: one of eval.tasks.TASKS, or null.
    options: those of the task's class.
    lengths: the curriculum: each entry takes an equal share of `max_steps` and says which lengths
        are drawn, uniformly: "3-40" all from 3 to 40, "4,8,16" those three.
    pack: fill rows with as many samples as fit, each a document of its own; false puts one sample
        into a row, for models that cannot forget in the middle of one.
    borders: false makes a packed row one document: each sample is read with those before it in
        mind, so that states as old as the row occur in training, and the model learns by itself
        where to forget.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lengths: list[str] = field(default_factory=list)
    pack: bool = True
    borders: bool = True


@dataclass(kw_only=True)
class DataConfig:
    """What is learnt. Exactly one of `stdlib`, `files`, `dataset` and `task.name` is set.

    stdlib: the running interpreter's own standard library (`*.py`, without its tests).
    files: paths or globs of .txt-like files (one document each) and .jsonl files (one per line);
        either may end in .gz or .xz.
    dataset, dataset_config, dataset_split: a Hugging Face dataset, read by `datasets`.
    streaming: read `dataset` while training instead of downloading and tokenising it first.
    shuffle_buffer: documents held back for shuffling a stream (1 keeps the stream's order).
    format: "text" ({text_field}), "prompt" ({"prompt", "completion"}: loss on the completion) or
        "chat" ({"messages": [{"role", "content"}]}: loss on the assistant's turns).
    seq_len: tokens in a row. Rows are packed with whole documents or pieces of them.
    heldout_fraction: share of the documents never trained on (0 for none).
    eval_max_bytes: the held-out loss during training is taken of whole held-out documents up to
        this many bytes together; null takes all of them.
    """

    stdlib: bool = False
    files: list[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    streaming: bool = False
    shuffle_buffer: int = 1000
    format: Literal["text", "prompt", "chat"] = "text"
    text_field: str = "text"
    seq_len: int = 1024
    heldout_fraction: float = 0.02
    eval_max_bytes: int | None = None
    task: TaskConfig = field(default_factory=TaskConfig)


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019). `grad_clip` is the largest allowed global gradient norm."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate over the run (see training/schedule.py).

    name: "cosine", or "wsd" (warm-up, stable, decay).
    warmup_steps: steps of the linear rise to `optimizer.lr`.
    decay_fraction: share of the run that "wsd" spends decaying; "cosine" has no use for it.
    min_lr_ratio: learning rate at the end, as a share of `optimizer.lr`.
    """

    name: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.1


@dataclass(kw_only=True)
class SampleConfig:
    """Texts written by the model at every evaluation; no prompts, no samples."""

    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 100
    temperature: float = 0.8


@dataclass(kw_only=True)
class TrainConfig:
    """One run.

    run_dir: everything the run writes lies here.
    seed: of initialisation, data order and samples.
    precision: "fp32", or "bf16" autocast over fp32 parameters.
    batch_size: rows in one optimiser step, over all processes.
    micro_batch_size: rows in one forward of one process; the rest of the batch is accumulated.
    label_smoothing: share of each target that is spread evenly over all ids. Small models of tasks
        without noise reach a loss of exactly 0, after which nothing more is learnt; with it the
        best logits are finite.
    max_steps: optimiser steps of the run.
    max_minutes: end after this much wall time inside the loop if `max_steps` has not been reached;
        the schedule then follows whichever limit is nearer, so it always ends fully decayed.
        null for no limit (two runs of the same recipe are equal only without one).
    log_every, eval_every, save_every: in steps; 0 means only at the end (for checkpoints: never).
    keep_last: checkpoints kept.
    resume: "auto" continues from the newest checkpoint in `run_dir` if there is one, "never"
        starts afresh and refuses a `run_dir` with checkpoints, else a checkpoint directory.
    max_skipped_steps: stop when this many steps in a row had a loss or gradient that is not finite.
    save_seen_tokens: write the ids trained on, in order, to `run_dir`/seen_tokens.bin.
    tracker: an Accelerate tracker ("tensorboard", "wandb", ...), or null.
    """

    run_dir: str
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 8
    micro_batch_size: int = 8
    label_smoothing: float = 0.0
    max_steps: int = 1000
    max_minutes: float | None = None
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    keep_last: int = 2
    resume: str = "auto"
    max_skipped_steps: int = 5
    save_seen_tokens: bool = False
    tracker: str | None = "tensorboard"
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def save(self, path: str | Path) -> None:
        """Write the whole recipe as YAML, in the form that `load_config` reads."""
        Path(path).write_text(
            yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


def leaves(config_type: type, prefix: str = "") -> dict[str, Any]:
    """Every settable key with its type, nested ones dotted: {"data.seq_len": int, ...}."""
    found = {}
    for name, annotation in typing.get_type_hints(config_type).items():
        if is_dataclass(annotation):
            found |= leaves(typing.cast(type, annotation), f"{prefix}{name}.")
        else:
            found[prefix + name] = annotation
    return found


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys, with lists and None as text: the table of settings that trackers take."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str)) else str(value)
    return flat


def load_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """Read `--config FILE` and the `--key value` (or `--key=value`) pairs after it.

    Keys of sections are dotted (`--optimizer.lr 3e-4`); lists are written as in YAML (`"[a, b]"`);
    `null` is None. The command line stands over the file, the file over the defaults.

    Raises:
        ValueError: unknown key (naming the closest valid one), a value of the wrong type, or
            settings that contradict each other.
        FileNotFoundError: no such file.
    """
    parser = argparse.ArgumentParser(
        prog="training.train",
        description=__doc__,
        epilog="keys: " + ", ".join(leaves(TrainConfig)),
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a recipe, e.g. configs/train/demo.yaml")
    arguments, rest = parser.parse_known_args(argv)
    path = Path(arguments.config)
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(recipe).__name__}")

    types_by_key = leaves(TrainConfig)
    values = {
        key: _convert(value, types_by_key[key], f"{path}: {key}")
        for key, value in _known_keys(recipe, types_by_key, str(path)).items()
    }
    for key, text in _pairs(rest):
        if key not in types_by_key:
            raise _unknown(key, types_by_key, "the command line")
        values[key] = _convert(_parse(text, types_by_key[key]), types_by_key[key], f"--{key}")
    config = _build(TrainConfig, values, "", str(path))
    _validate(config)
    return config


def _known_keys(recipe: dict, types_by_key: dict[str, Any], source: str, prefix: str = "") -> dict:
    """Nested mapping -> {dotted key: value}; an unknown key is an error."""
    flat = {}
    for name, value in recipe.items():
        key = f"{prefix}{name}"
        if key in types_by_key:
            flat[key] = value
        elif not any(known.startswith(f"{key}.") for known in types_by_key):
            raise _unknown(key, types_by_key, source)
        elif isinstance(value, dict):
            flat |= _known_keys(value, types_by_key, source, f"{key}.")
        else:
            raise ValueError(f"{source}: {key} is a section, expected keys below it, got {value!r}")
    return flat


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """["--a", "1", "--b=2"] -> [("a", "1"), ("b", "2")]."""
    pairs = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ValueError(f"expected --key value, got {argument!r} without a key")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            try:
                value = next(rest)
            except StopIteration:
                raise ValueError(f"--{key} has no value") from None
        pairs.append((key, value))
    return pairs


def _unknown(key: str, types_by_key: dict[str, Any], source: str) -> ValueError:
    # The last part decides where it is itself a key name: `lr` is meant as `optimizer.lr`.
    same_leaf = [known for known in types_by_key if known.split(".")[-1] == key.split(".")[-1]]
    closest = difflib.get_close_matches(key, same_leaf or types_by_key, n=1, cutoff=0.0)[0]
    return ValueError(f"unknown key {key!r} in {source}; the closest valid key is {closest!r}")


def _options(annotation: Any) -> tuple:
    """The members of `X | None`, or the type alone."""
    if isinstance(annotation, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _parse(text: str, annotation: Any) -> Any:
    """Command-line text -> value; text for a text key stays as typed, the rest is read as YAML."""
    options = _options(annotation)
    is_text = str in options or any(typing.get_origin(option) is Literal for option in options)
    if is_text and not (text == "null" and types.NoneType in options):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """Check `value` against `annotation`, taking 1 and "1e-3" as floats (YAML 1.1 reads the
    latter as text) and a single text where a list of texts is expected."""
    options = _options(annotation)
    if value is None and types.NoneType in options:
        return None
    (kind,) = [option for option in options if option is not types.NoneType]
    expected = f"{where}: expected {_describe(annotation)}, got {value!r}"
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind) or isinstance(value, bool):
            raise ValueError(expected)
        return value
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        items = [value] if item is str and isinstance(value, str) else value
        if not isinstance(items, list):
            raise ValueError(expected)
        return [_convert(entry, item, f"{where}[{i}]") for i, entry in enumerate(items)]
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(expected)
        return value
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(expected) from None
    # bool is an int to Python, never to a recipe.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(expected)
    return value


def _describe(annotation: Any) -> str:
    names = {types.NoneType: "null", str: "text", bool: "true or false", float: "a number"}
    parts = []
    for option in _options(annotation):
        if typing.get_origin(option) is Literal:
            parts.append("one of " + ", ".join(map(repr, typing.get_args(option))))
        elif typing.get_origin(option) is list:
            parts.append("a list of " + _describe(typing.get_args(option)[0]))
        elif typing.get_origin(option) is dict:
            parts.append("a mapping")
        else:
            parts.append(names.get(option, "a whole number"))
    return " or ".join(parts)


def _build(config_type: type, values: dict[str, Any], prefix: str, source: str) -> Any:
    arguments = {}
    hints = typing.get_type_hints(config_type)
    for entry in fields(config_type):
        key = prefix + entry.name
        if is_dataclass(hints[entry.name]):
            arguments[entry.name] = _build(hints[entry.name], values, f"{key}.", source)
        elif key in values:
            arguments[entry.name] = values[key]
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{source}: {key} is missing, and it has no default")
    return config_type(**arguments)


def _validate(config: TrainConfig) -> None:
    """Refuse values out of range and settings that contradict each other."""
    model, data, optimizer, schedule = config.model, config.data, config.optimizer, config.schedule

    def require(holds: bool, key: str, value: Any, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key} is {value!r}, expected {expected}")

    require(
        (model.config is None) != (model.checkpoint is None),
        "model.config, model.checkpoint",
        (model.config, model.checkpoint),
        "exactly one: a config.json to train from scratch, or a checkpoint to finetune",
    )
    require(
        model.config is None or config.tokenizer.source is not None or data.task.name is not None,
        "tokenizer.source",
        None,
        '"byte" or a tokenizer, since a model from scratch brings none',
    )
    sources = (data.stdlib or None, data.files, data.dataset, data.task.name)
    require(
        sum(source is not None for source in sources) == 1,
        "data.stdlib, data.files, data.dataset, data.task.name",
        sources,
        "exactly one source of data",
    )
    require(data.files != [], "data.files", data.files, "at least one path")
    if data.task.name is not None:
        require(data.task.lengths != [], "data.task.lengths", [], "at least one entry")
        require(data.format == "text", "data.format", data.format, '"text" with data.task')
        require(not config.save_seen_tokens, "save_seen_tokens", True, "false: a task has no end")
        require(
            config.tokenizer.source is not None or not config.sample.prompts,
            "sample.prompts",
            config.sample.prompts,
            "none without a tokenizer",
        )
    require(
        data.dataset is not None or not data.streaming,
        "data.streaming",
        True,
        "false, since only a data.dataset can be streamed",
    )
    require(
        not data.stdlib or data.format == "text",
        "data.format",
        data.format,
        '"text", since the standard library holds plain text',
    )
    require(
        not (data.streaming and config.save_seen_tokens),
        "save_seen_tokens",
        True,
        "false with data.streaming: a stream is not kept",
    )
    positive = {
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size,
        "max_steps": config.max_steps,
        "log_every": config.log_every,
        "keep_last": config.keep_last,
        "max_skipped_steps": config.max_skipped_steps,
        "data.shuffle_buffer": data.shuffle_buffer,
        "optimizer.lr": optimizer.lr,
        "optimizer.eps": optimizer.eps,
        "optimizer.grad_clip": optimizer.grad_clip,
        "sample.max_new_tokens": config.sample.max_new_tokens,
        "sample.temperature": config.sample.temperature,
    }
    for key, value in positive.items():
        require(value > 0, key, value, "more than 0")
    for key, value in (
        ("max_minutes", config.max_minutes),
        ("eval_max_bytes", data.eval_max_bytes),
    ):
        require(value is None or value > 0, key, value, "more than 0, or null")
    not_negative = {
        "eval_every": config.eval_every,
        "save_every": config.save_every,
        "optimizer.weight_decay": optimizer.weight_decay,
        "schedule.warmup_steps": schedule.warmup_steps,
    }
    for key, value in not_negative.items():
        require(value >= 0, key, value, "0 or more")
    require(
        data.seq_len >= 2, "data.seq_len", data.seq_len, "2 or more: one token predicts the next"
    )
    require(
        0 <= data.heldout_fraction < 1,
        "data.heldout_fraction",
        data.heldout_fraction,
        "a share in [0, 1)",
    )
    require(
        len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas),
        "optimizer.betas",
        optimizer.betas,
        "two numbers in [0, 1)",
    )
    require(
        0 <= config.label_smoothing < 1,
        "label_smoothing",
        config.label_smoothing,
        "a share in [0, 1)",
    )
    require(
        0 <= schedule.min_lr_ratio <= 1,
        "schedule.min_lr_ratio",
        schedule.min_lr_ratio,
        "a share in [0, 1]",
    )
    require(
        0 < schedule.decay_fraction <= 1,
        "schedule.decay_fraction",
        schedule.decay_fraction,
        "a share in (0, 1]",
    )
    require(
        schedule.warmup_steps < config.max_steps,
        "schedule.warmup_steps",
        schedule.warmup_steps,
        f"less than max_steps ({config.max_steps})",
    )
