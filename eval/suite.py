"""Suite files: typed YAML, variables, and overrides from the command line.

A suite is a YAML mapping with one section per kind of evaluation; a section that is absent does
not run. `${name}` in any text is replaced by `variables.name`. Any value can be overridden with
`--section.key VALUE`, where VALUE is read as YAML: `--variables.run runs/mine`,
`--perplexity.files '[a.txt, b.jsonl.gz]'`.
"""

import difflib
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from eval.options import (
    ConsistencyOptions,
    EfficiencyOptions,
    GenerateOptions,
    LengthOptions,
    LmEvalOptions,
    NgramOptions,
    PerplexityOptions,
    TextTasksOptions,
    require_positive,
)
from eval.ruler.options import RulerOptions


@dataclass(frozen=True)
class Suite:
    """What to evaluate, and how the model is loaded.

    Args:
        variables: values of `${name}`.
        dtype: of the weights; "auto" keeps the checkpoint's.
        device: "auto" takes the GPU if there is one.
        prefix: token that `perplexity` and `generate` put before each document or prompt, so that
            its first token is predicted too: "auto" is bos, or eos where there is none. With
            "none" the first token is not scored.
        seed: of every sampled generation.
        training_length: tokens of a row in training, for marks in plots; None takes it from the
            config.yaml of the run that the model is part of, else the limit in the model's config.
        perplexity, ngram, length, lm_eval, text_tasks, ruler, consistency, efficiency, generate:
            the evaluations, each optional.
    """

    variables: dict[str, str] = field(default_factory=dict)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    prefix: Literal["auto", "bos", "eos", "none"] = "auto"
    seed: int = 0
    training_length: int | None = None
    perplexity: PerplexityOptions | None = None
    ngram: NgramOptions | None = None
    length: LengthOptions | None = None
    lm_eval: LmEvalOptions | None = None
    text_tasks: TextTasksOptions | None = None
    ruler: RulerOptions | None = None
    consistency: ConsistencyOptions | None = None
    efficiency: EfficiencyOptions | None = None
    generate: GenerateOptions | None = None

    def __post_init__(self) -> None:
        if self.ngram is not None and self.perplexity is None:
            raise ValueError("section ngram needs section perplexity, whose files it scores")
        require_positive("suite", training_length=self.training_length)
        names = [item.name for item in fields(self) if item.default is None]
        names.remove("training_length")
        if all(getattr(self, name) is None for name in names):
            raise ValueError(
                f"the suite evaluates nothing, expected at least one of the sections {names}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the suite as plain JSON values."""
        return asdict(self)


def load_suite(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Suite:
    """Read a suite file.

    Args:
        path: YAML file.
        overrides: (dotted key, YAML text) pairs that replace values of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or an unknown key, a value of a wrong type or out of range, or a
            variable without a value; the message names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"suite {path} does not exist")
    data = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"suite {path} must be a YAML mapping, got {type(data).__name__}")
    for key, value in overrides:
        _override(data, key, read_yaml(value, f"--{key}"))
    try:
        return build(Suite, _substitute(data, data.get("variables") or {}), "")
    except ValueError as error:
        raise ValueError(f"suite {path}: {error}") from error


def read_yaml(text: str, where: str) -> Any:
    """YAML -> values; ValueError that says where for text that is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from error


def _override(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise ValueError(f"--{key}: {section} is a plain value and has no keys")
    data[last] = value


def _substitute(value: Any, variables: dict[str, Any]) -> Any:
    """Replace `${name}` in every text of a nested value."""

    def lookup(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in variables:
            raise ValueError(
                f"variable ${{{name}}} has no value; known variables: {sorted(variables)}"
            )
        return str(variables[name])

    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)\}", lookup, value)
    if isinstance(value, list):
        return [_substitute(item, variables) for item in value]
    if isinstance(value, dict):
        return {key: _substitute(item, variables) for key, item in value.items()}
    return value


def build(cls: type, data: dict[str, Any], where: str) -> Any:
    """Make a dataclass from a mapping, checking names and types.

    Raises:
        ValueError: an unknown or missing key or a value of a wrong type, by its dotted name, which
            begins with `where`; or what the dataclass itself raises.
    """
    hints = get_type_hints(cls)
    for key in data:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise ValueError(f"unknown key {_join(where, key)!r}, the closest is {close[0]!r}")
    for item in fields(cls):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in data:
            raise ValueError(f"{_join(where, item.name)} is missing")
    return cls(**{key: _convert(hints[key], data[key], _join(where, key)) for key in data})


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type annotation; integers are accepted where floats are expected."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _convert(hint, value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        return build(hint, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} must be one of {list(arguments)}, got {value!r}")
        return value
    if origin is list and isinstance(value, (list, str)):
        # `--perplexity.files a.txt` means a list of one.
        value = [value] if isinstance(value, str) else value
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {
            _convert(arguments[0], key, f"a key of {where}"): _convert(
                arguments[1], item, _join(where, key)
            )
            for key, item in value.items()
        }
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is str and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-3, without a point, as text
    # `type` and not `isinstance`: True is an int to Python, but not to the writer of a suite.
    if type(value) is not hint:
        expected: Any = origin or hint
        raise ValueError(f"{where} must be of type {expected.__name__}, got {value!r}")
    return value
