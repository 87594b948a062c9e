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


def _require_positive(section: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{section}.{name} must be above 0, got {value}")


@dataclass(frozen=True)
class PerplexityOptions:
    """Likelihood of held-out files.

    Args:
        files: text files (one document each) or `.jsonl` files (rows with "text"), plain, `.gz`
            or `.xz`.
        max_bytes: read only this many UTF-8 bytes of each file, from its start; None reads all.
        window: tokens per forward pass, and with `stateful: false` the length after which the
            model forgets.
        stateful: carry the model's cache from window to window through each document. False
            starts every window afresh, as lm-evaluation-harness' rolling perplexity does.
        batch_size: documents (stateful) or windows per forward pass.
    """

    files: list[str]
    max_bytes: int | None = None
    window: int = 1024
    stateful: bool = True
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("perplexity.files is empty, expected at least one path")
        _require_positive(
            "perplexity", max_bytes=self.max_bytes, window=self.window, batch_size=self.batch_size
        )


@dataclass(frozen=True)
class NgramOptions:
    """Byte n-gram baselines on the documents of `perplexity`, in the same bits per byte.

    Args:
        seen_tokens: `.bin` file of the token ids that the model was trained on; the `.json` beside
            it says {"dtype": "uint16" or "uint32", "count": N}.
        orders: numbers of context bytes.
        require_better_than_order: the run fails unless the model needs fewer bits per byte than
            this order on every file.
    """

    seen_tokens: str
    orders: list[int] = field(default_factory=lambda: [2, 5])
    require_better_than_order: int | None = None

    def __post_init__(self) -> None:
        if not self.orders or not all(0 <= order <= 7 for order in self.orders):
            raise ValueError(f"ngram.orders must be numbers from 0 to 7, got {self.orders}")
        required = self.require_better_than_order
        if required is not None and required not in self.orders:
            raise ValueError(
                f"ngram.require_better_than_order is {required}, expected one of ngram.orders "
                f"{self.orders}"
            )


@dataclass(frozen=True)
class LmEvalOptions:
    """Zero-shot tasks of lm-evaluation-harness.

    Args:
        tasks: task name -> local JSONL file (plain, `.gz` or `.xz`) in the columns of the task's
            own dataset, or null for that dataset from the Hugging Face Hub.
        limit: questions per task, from the start; None takes all.
        batch_size: requests per forward pass.
        max_length: longest input in tokens, longer ones lose their beginning; None takes the
            limit in the model's config, and no limit where it states none.
        bootstrap_iters: resamples behind the standard error of perplexities; 0 reports no
            standard errors at all.
    """

    tasks: dict[str, str | None]
    limit: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    bootstrap_iters: int = 1000

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("lm_eval.tasks is empty, expected at least one task")
        _require_positive(
            "lm_eval", limit=self.limit, batch_size=self.batch_size, max_length=self.max_length
        )
        if self.bootstrap_iters < 0:
            raise ValueError(f"lm_eval.bootstrap_iters must be >= 0, got {self.bootstrap_iters}")


@dataclass(frozen=True)
class GenerateOptions:
    """Sample texts.

    Args:
        prompts: one continuation is generated for each.
        max_new_tokens: length of each continuation, unless the model ends it earlier.
        do_sample: draw from the model's distribution; False takes the likeliest token.
        temperature, top_k, top_p: used when sampling; top_k 0 and top_p 1 keep every token.
    """

    prompts: list[str]
    max_new_tokens: int = 128
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("generate.prompts is empty, expected at least one prompt")
        _require_positive(
            "generate",
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        if self.top_k < 0 or self.top_p > 1:
            raise ValueError(
                f"generate.top_k must be >= 0 and generate.top_p <= 1, got {self.top_k} and "
                f"{self.top_p}"
            )


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
        perplexity, ngram, lm_eval, generate: the evaluations, each optional.
    """

    variables: dict[str, str] = field(default_factory=dict)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    prefix: Literal["auto", "bos", "eos", "none"] = "auto"
    seed: int = 0
    perplexity: PerplexityOptions | None = None
    ngram: NgramOptions | None = None
    lm_eval: LmEvalOptions | None = None
    generate: GenerateOptions | None = None

    def __post_init__(self) -> None:
        if self.ngram is not None and self.perplexity is None:
            raise ValueError("section ngram needs section perplexity, whose files it scores")
        if not any((self.perplexity, self.lm_eval, self.generate)):
            raise ValueError(
                "the suite evaluates nothing, expected at least one of the sections "
                "perplexity, lm_eval, generate"
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
    data = _read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"suite {path} must be a YAML mapping, got {type(data).__name__}")
    for key, value in overrides:
        _override(data, key, _read_yaml(value, f"--{key}"))
    try:
        return _build(Suite, _substitute(data, data.get("variables") or {}), "")
    except ValueError as error:
        raise ValueError(f"suite {path}: {error}") from error


def _read_yaml(text: str, where: str) -> Any:
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


def _build(cls: type, data: dict[str, Any], where: str) -> Any:
    """Make a dataclass from a mapping, checking names and types."""
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
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _convert(hint, value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        return _build(hint, value, where)
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
