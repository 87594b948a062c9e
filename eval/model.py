"""Loading a model for evaluation, and the facts about it that a report states."""

import hashlib
import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import ssm_hf
from eval.documents import read_rows, sha256
from eval.parallel import processes

LENGTH_FIELDS = ("n_positions", "max_position_embeddings", "n_ctx")


class LoadedModel(NamedTuple):
    """A causal language model in eval mode with its tokenizer.

    `prefix` is the token ids put before each document or prompt (one id, or none); `weights`
    identifies the weight files.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    prefix: tuple[int, ...]
    weights: str

    @property
    def identity(self) -> str:
        """A hash of what makes the outputs: weights, config, class, dtype, tokenizer, prefix."""
        parts = (
            self.weights,
            self.model.config.to_json_string(use_diff=False),
            f"{type(self.model).__module__}.{type(self.model).__name__}",
            str(self.model.dtype),
            tokenizer_hash(self.tokenizer),
            repr(self.prefix),
        )
        return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Return the prefix and the tokens of `text`, in which special tokens are plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` every text, on all processors at once."""
        rows = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # no warning about documents longer than the model's usual context
        )["input_ids"]
        return [[*self.prefix, *ids] for ids in rows]


def load_tokenizer(name: str, prefix: str) -> tuple[PreTrainedTokenizerFast, tuple[int, ...]]:
    """Load a model's tokenizer and find the ids that stand before each document.

    Args:
        name, prefix: see `load_model`.

    Raises:
        ValueError: no tokenizer there, or it lacks the prefix token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name}: its tokenizer cannot be loaded: {error}") from error
    return tokenizer, _prefix_ids(prefix, tokenizer, name)


def require_eos(tokenizer: PreTrainedTokenizerFast, section: str) -> None:
    """Raise ValueError unless the tokenizer has a token that ends a text.

    Args:
        tokenizer: of the model.
        section: of the suite, for the message.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"section {section} needs a tokenizer with an end-of-text token, but eos_token of "
            f"{tokenizer.name_or_path} is not set (tokenizer_config.json)"
        )


def load_model(name: str, *, dtype: str, device: str, prefix: str) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: directory written by `save_pretrained`, or a Hugging Face Hub name.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: "auto" or a torch device.
        prefix: "auto", "bos", "eos" or "none", see `Suite.prefix`.

    Raises:
        ValueError: weights are missing or of a wrong shape, or the tokenizer lacks the prefix
            token.
    """
    tokenizer, prefix_ids = load_tokenizer(name, prefix)
    if device == "auto" and processes().num_processes > 1:
        device = str(processes().device)
    elif device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    model, info = loaded
    # from_pretrained would fill such weights with random numbers, and the scores would be noise.
    bad = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
    if bad:
        raise ValueError(f"model {name}: the checkpoint does not hold all weights, e.g. {bad[:5]}")
    weights = _weights_hash(name, model)
    return LoadedModel(model.to(device).eval(), tokenizer, prefix_ids, weights)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a tokenizer's whole definition."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode("utf-8")).hexdigest()[:16]


def _prefix_ids(prefix: str, tokenizer: PreTrainedTokenizerFast, name: str) -> tuple[int, ...]:
    if prefix == "none":
        return ()
    if prefix == "auto":
        prefix = "eos" if tokenizer.bos_token_id is None else "bos"
    token_id = getattr(tokenizer, f"{prefix}_token_id")
    if token_id is None:
        raise ValueError(
            f"the tokenizer of {name} has no {prefix} token to put before a document; set prefix "
            'to one it has ("bos", "eos") or to "none"'
        )
    return (token_id,)


def describe_model(name: str, loaded: LoadedModel) -> dict[str, Any]:
    """Collect what a report's header says about the model.

    The state size is measured on the cache that the model returns, so it holds for any
    architecture: `state_bytes` is the part that does not depend on the number of tokens,
    `state_bytes_per_token` the part that grows (0 for recurrent models).
    """
    model, config = loaded.model, loaded.model.config
    tokens = _filling(config)
    short, long = _cache_of(model, tokens), _cache_of(model, 2 * tokens)
    few, more = cache_bytes(short), cache_bytes(long)
    per_token = (more - few) // tokens
    return {
        "name": name,
        "weights": loaded.weights,
        "identity": loaded.identity,
        "architecture": config.architectures[0] if config.architectures else type(model).__name__,
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "attention_layers": sum(
            "attention" in kind and "linear" not in kind
            for kind in getattr(config, "layer_types", None) or ()
        ),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "state_dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in _cached(short)}),
        "state_bytes": few - tokens * per_token,
        "state_bytes_per_token": per_token,
        "tokenizer": f"{type(loaded.tokenizer).__name__}, {len(loaded.tokenizer)} tokens, "
        f"sha256 {tokenizer_hash(loaded.tokenizer)}",
        "prefix": loaded.tokenizer.decode(list(loaded.prefix)) if loaded.prefix else None,
    }


def length_limit(config: PreTrainedConfig) -> int | None:
    """Return the longest input that a model's config states, or None.

    Recurrent models have no limit and their configs no such field, for which the harness would
    assume 2048 and cut longer inputs.
    """
    limits = [getattr(config, name, None) for name in LENGTH_FIELDS]
    return next((limit for limit in limits if limit is not None), None)


def describe_training(name: str) -> dict[str, Any] | None:
    """Collect what the training run beside a model's directory says about it.

    Args:
        name: of the model; `<run>/final` and `<run>/checkpoints/<step>` are looked after.

    Returns:
        None where there is no run, else JSON values: `config` (path), `seq_len`, `tokens`, `steps`,
        `train_loss` and `heldout_loss` in nats per token (null where the log has none).
    """
    for folder in list(Path(name).absolute().parents)[:2]:
        config, log = folder / "config.yaml", folder / "log.jsonl"
        if not (config.is_file() and log.is_file()):
            continue
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        events = [row for _, row in read_rows(log)]
        last = {row["event"]: row for row in events}
        end = last.get("end") or last.get("train") or {}
        return {
            "config": str(_from_here(config)),
            "seq_len": settings["data"]["seq_len"],
            "tokens": end.get("tokens", 0),
            "steps": end.get("step", 0),
            "train_loss": last.get("train", {}).get("loss"),
            "heldout_loss": last.get("eval", {}).get("heldout_nats_per_token"),
        }
    return None


def _from_here(path: Path) -> Path:
    """A path as a reader of the report knows it, who has not this machine's folders."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Collect what a report's header says about the machine and the installed versions."""
    packages = ("torch", "transformers", "lm_eval", "datasets", "tokenizers", "numpy")
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "device": machine,
        "commit": _commit(),
        "versions": {
            "ssm_hf": ssm_hf.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def _commit() -> str | None:
    """The commit of this checkout, None where it is no git repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _weights_hash(name: str, model: PreTrainedModel) -> str:
    """Identify the weights: the Hub's commit, or one hash over a directory's weight files."""
    directory = Path(name)
    if not directory.is_dir():
        return f"commit {model.config._commit_hash}"
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    digests = "".join(sha256(file) for file in files)
    return f"sha256 {hashlib.sha256(digests.encode()).hexdigest()[:16]}"


def _filling(config: PreTrainedConfig) -> int:
    """Return a number of tokens that leaves no slot of a cache empty, nor does its double.

    Some caches grow in powers of two from 64 tokens on, and no further than a window.
    """
    window = getattr(config, "sliding_window", None) or 0
    tokens = 1 << (max(64, window) - 1).bit_length()
    limit = length_limit(config)
    return tokens if limit is None or limit >= 2 * tokens else 4


@torch.no_grad()
def _cache_of(model: PreTrainedModel, tokens: int) -> Any:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    return model.base_model(input_ids=ids, use_cache=True).past_key_values


def cache_bytes(cache: Any) -> int:
    """Return the size of all tensors in a cache (transformers' `Cache` or ours)."""
    return sum(tensor.nbytes for tensor in _cached(cache))


def _cached(cache: Any) -> Iterator[torch.Tensor]:
    layers = [] if cache is None else cache.layers  # a model may keep none
    return (tensor for layer in layers for tensor in _tensors(vars(layer)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
