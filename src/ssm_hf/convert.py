"""Convert checkpoints of mamba_ssm (state-spaces/mamba-*, mamba2-*) to transformers' format.

    python -m ssm_hf.convert SRC DST [--dtype bfloat16] [--overwrite]

SRC is a directory with mamba_ssm's config.json (d_model, n_layer, ssm_cfg, ...) and its weights,
pickled or safetensors, sharded or not. DST gets config.json, safetensors, generation_config.json
and SRC's tokenizer. An option that the target format cannot express is an error that names it.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from ssm_hf.models.checkpoint import check_checkpoint, load_pickle
from ssm_hf.models.configuration import INEXPRESSIBLE
from ssm_hf.models.mamba import MambaConfig, MambaForCausalLM
from ssm_hf.models.mamba2 import Mamba2Config, Mamba2ForCausalLM

# Top level of mamba_ssm's config.json and its defaults; older files lack some fields.
_FIELDS: dict[str, Any] = {
    "d_model": None,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
_FIELDS_WITHOUT_EFFECT = ("architectures", "model_type", "torch_dtype", "dtype")

# mamba_ssm's name of a mixer option -> (field of our config, mamba_ssm's default).
_SHARED_OPTIONS: dict[str, tuple[str, Any]] = {
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
}
_OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "Mamba1": {
        **_SHARED_OPTIONS,
        "d_state": ("state_size", 16),
        "dt_rank": ("time_step_rank", "auto"),
        "dt_scale": ("time_step_scale", 1.0),
        "dt_init": ("time_step_init_scheme", "random"),
    },
    "Mamba2": {
        **_SHARED_OPTIONS,
        "d_state": ("state_size", 128),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 1),
        "chunk_size": ("chunk_size", 256),
        "dt_limit": ("time_step_limit", (0.0, float("inf"))),
    },
}
# Choice of kernel, placement, or initial values that the checkpoint's own weights replace.
_OPTIONS_WITHOUT_EFFECT = {
    *("use_fast_path", "use_mem_eff_path", "process_group", "sequence_parallel"),
    *("device", "dtype", "layer_idx", "conv_init", "A_init_range"),
}
_MODELS = {MambaConfig: MambaForCausalLM, Mamba2Config: Mamba2ForCausalLM}
_RENAMED = {"backbone.embedding.weight": "backbone.embeddings.weight"}
_EMBEDDING, _HEAD = "backbone.embeddings.weight", "lm_head.weight"

# Any of the first makes a tokenizer; the others describe it further.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of GPT-NeoX's tokenizer, which all released mamba_ssm checkpoints were trained with.
_END_OF_TEXT = 0
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_config(
    source: Mapping[str, Any], origin: str = "config.json"
) -> MambaConfig | Mamba2Config:
    """Our config of the model that a mamba_ssm config.json describes.

    Args:
        source: content of the file; missing fields have mamba_ssm's defaults.
        origin: path of the file, for messages.

    Returns:
        A `MambaConfig` or `Mamba2Config`; its vocab_size is the padded one, its token ids are 0.

    Raises:
        ValueError: not mamba_ssm's format, an unknown option, or one that transformers' format
            cannot express.
    """
    if "d_model" not in source:
        if source.get("model_type") in ("mamba", "mamba2") and "hidden_size" in source:
            raise ValueError(
                f"{origin} is in transformers' {source['model_type']!r} format already: there is "
                "nothing to convert, load the directory with from_pretrained"
            )
        raise ValueError(f"{origin} is not a mamba_ssm config: it has no d_model")
    known = {*_FIELDS, *_FIELDS_WITHOUT_EFFECT}
    for key, value in source.items():
        if key not in known and key[:1] != "_":
            raise ValueError(f"{origin}: unknown option {key}={value!r}; known are {list(_FIELDS)}")
    fields = {**_FIELDS, **source}
    for key in ("rms_norm", "d_intermediate", "attn_layer_idx"):
        _refuse_inexpressible(key, fields[key], origin)
    options = fields["ssm_cfg"]
    if not isinstance(options, Mapping):
        raise ValueError(f"{origin}: ssm_cfg must be an object, got {options!r}")
    layer = options.get("layer", "Mamba1")
    if layer not in _OPTIONS:
        raise ValueError(f"{origin}: ssm_cfg has layer={layer!r}, supported are {list(_OPTIONS)}")

    table = _OPTIONS[layer]
    for key, value in options.items():
        if key in table or key in _OPTIONS_WITHOUT_EFFECT or key == "layer":
            continue
        if layer == "Mamba2" and key in INEXPRESSIBLE:
            # All inner channels by another name.
            if key == "d_ssm" and value == options.get("expand", 2) * fields["d_model"]:
                continue
            _refuse_inexpressible(key, value, origin)
            continue
        raise ValueError(
            f"{origin}: ssm_cfg has an unknown option {key}={value!r} of {layer}; "
            f"known are {sorted(table)}"
        )
    values = {ours: options.get(key, default) for key, (ours, default) in table.items()}
    sizes = {key: fields[key] for key in ("d_model", "n_layer", "vocab_size")}
    sizes["pad_vocab_size_multiple"] = multiple = fields["pad_vocab_size_multiple"]
    sizes |= {key: values[table[key][0]] for key in ("expand", "headdim") if key in table}
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{origin}: {key} must be a positive integer, got {value!r}")
    values |= {
        "vocab_size": -(-fields["vocab_size"] // multiple) * multiple,
        "hidden_size": fields["d_model"],
        "num_hidden_layers": fields["n_layer"],
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": fields["residual_in_fp32"],
        "tie_word_embeddings": fields["tie_embeddings"],
        "bos_token_id": _END_OF_TEXT,
        "eos_token_id": _END_OF_TEXT,
        "pad_token_id": _END_OF_TEXT,
    }
    try:
        if layer == "Mamba1":
            return MambaConfig(**values)
        inner, head_dim = values["expand"] * fields["d_model"], values["head_dim"]
        if inner % head_dim:
            raise ValueError(f"headdim={head_dim} does not divide expand * d_model = {inner}")
        return Mamba2Config(num_heads=inner // head_dim, **values)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{origin}: {error}") from error


def _refuse_inexpressible(key: str, value: Any, origin: str) -> None:
    if value not in INEXPRESSIBLE[key]:
        raise ValueError(
            f"{origin} asks for {key}={value!r}, which transformers' mamba formats cannot express"
        )


def convert_state_dict(
    source: Mapping[str, Tensor], config: MambaConfig | Mamba2Config, origin: str = "checkpoint"
) -> dict[str, Tensor]:
    """Weights under our names; the tensors themselves are the same objects.

    Args:
        source: mamba_ssm's state dict.
        config: from `convert_config`.
        origin: where the weights come from, for messages.

    Returns:
        All weights of the model, without lm_head.weight where it is tied to the embedding.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; or lm_head.weight should be
            tied and differs from the embedding.
    """
    with torch.device("meta"):
        model = _MODELS[type(config)](config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {_RENAMED.get(name, name): tensor for name, tensor in source.items()}
    if config.tie_word_embeddings:
        del expected[_HEAD]
        head = weights.pop(_HEAD, None)
        if head is not None and _EMBEDDING in weights and not _same(head, weights[_EMBEDDING]):
            raise ValueError(
                f"{origin}: tie_embeddings is true, but {_HEAD} differs from "
                "backbone.embedding.weight"
            )
    old_names = {new: old for old, new in _RENAMED.items()}
    for what, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("has unexpected", weights.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(old_names.get(name, name) for name in names))
            raise ValueError(f"{origin} {what} {len(names)} weights for its config.json: {listed}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            padded = " (vocab_size padded to pad_vocab_size_multiple rows)"
            raise ValueError(
                f"{origin}: {old_names.get(name, name)} has shape {tuple(weights[name].shape)}, "
                f"but config.json asks for {shape}{padded if name in (_EMBEDDING, _HEAD) else ''}"
            )
    return weights


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: expected a directory of mamba_ssm's format")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    check_checkpoint(folder)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} has neither model*.safetensors nor pytorch_model*.bin")
    weights: dict[str, Tensor] = {}
    for file in files:
        shard = load_file(file) if file.suffix == ".safetensors" else load_pickle(file)
        twice = sorted(weights.keys() & shard.keys())
        if twice:
            raise ValueError(f"{file} holds {', '.join(twice)}, which another shard holds too")
        weights |= shard
    return weights


def _token_ids(staging: Path, config: MambaConfig | Mamba2Config) -> str:
    """Set the config's token ids from the tokenizer beside it; says what was done."""
    if not any((staging / name).is_file() for name in _VOCABULARIES):
        return (
            f"no tokenizer: bos, eos and pad token ids are assumed to be {_END_OF_TEXT} (GPT-NeoX)"
        )
    config.save_pretrained(staging)  # says which tokenizer class where nothing else does
    tokenizer = AutoTokenizer.from_pretrained(staging, trust_remote_code=False)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the embedding only has "
            f"{config.vocab_size} rows"
        )
    for name in _TOKEN_IDS:
        setattr(config, name, getattr(tokenizer, name))
    return "from the tokenizer: " + ", ".join(f"{n}={getattr(config, n)}" for n in _TOKEN_IDS)


def _check_destination(source: Path, target: Path, overwrite: bool) -> None:
    inside, outside = target.resolve(), source.resolve()
    if inside == outside or inside in outside.parents:
        raise ValueError(f"DST {target} is or contains SRC {source}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"DST {target} exists and is not a directory")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(
                f"DST {target} exists and is not empty: pass --overwrite to replace it"
            )
        if not (target / "config.json").is_file():
            raise ValueError(f"DST {target} is not a checkpoint (no config.json): not replaced")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write the mamba_ssm checkpoint `source` to the new directory `target` in our format.

    The directory appears complete or not at all. What was assumed is printed.

    Args:
        source: directory of mamba_ssm's format; its tokenizer and generation_config.json are taken
            along, and the tokenizer gives the token ids.
        target: directory to create.
        dtype: of the written weights; A_log, D and dt_bias keep theirs. None keeps all.
        overwrite: replace a checkpoint at `target`.

    Raises:
        ValueError: what cannot be converted, naming file, option and value; `target` exists.
    """
    source, target = Path(source), Path(target)
    _check_destination(source, target, overwrite)
    config = convert_config(_read_config(source / "config.json"), str(source / "config.json"))
    weights = convert_state_dict(_read_weights(source), config, str(source))
    with torch.device("meta"):
        model = _MODELS[type(config)](config)
    if dtype is not None:
        precise = model._keep_in_fp32_modules_strict
        weights = {
            name: tensor if name.rpartition(".")[2] in precise else tensor.to(dtype)
            for name, tensor in weights.items()
        }
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()

    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    try:
        staging.mkdir()
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        ids = _token_ids(staging, model.config)
        generation = GenerationConfig()
        if (source / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(source)
        for name in _TOKEN_IDS:
            if getattr(generation, name) is None:
                setattr(generation, name, getattr(model.config, name))
        model.generation_config = generation
        model.save_pretrained(staging)
        if target.is_dir() and any(target.iterdir()):
            target.rename(replaced)
        staging.rename(target)
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    print(f"{source} -> {target}: {type(model).__name__}, {model.num_parameters():,} parameters")
    print(ids)


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m ssm_hf.convert",
        description="Convert a mamba_ssm checkpoint (Mamba-1, Mamba-2) to transformers' format.",
    )
    parser.add_argument("src", help="directory with mamba_ssm's config.json and weights")
    parser.add_argument("dst", help="directory to create")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the written weights (default: as they are; A_log, D, dt_bias always so)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    given = parser.parse_args(arguments)
    try:
        convert(given.src, given.dst, dtype=_DTYPES.get(given.dtype), overwrite=given.overwrite)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
