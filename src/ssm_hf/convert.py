"""Convert other libraries' checkpoints to transformers' format, and ours back to mamba_ssm's.

    python -m ssm_hf.convert SRC DST [--dtype bfloat16] [--A_activation softplus] [--overwrite]
    python -m ssm_hf.convert SRC DST --back

SRC is a directory with mamba_ssm's config.json (d_model, n_layer, ssm_cfg, ...), as in
state-spaces/mamba-*, mamba2-* and mamba3-*, or that of flash-linear-attention's Mamba-3, and its
weights, pickled or safetensors, sharded or not. DST gets config.json, safetensors,
generation_config.json and SRC's tokenizer. An option that the target format cannot express is an
error that names it.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from ssm_hf.formats import (
    END_OF_TEXT,
    LAYERS,
    LLAMA_END,
    MODELS,
    OurConfig,
    convert_config,
    convert_state_dict,
    state_dict_of_mamba_ssm,
    to_mamba_ssm,
)
from ssm_hf.models.checkpoint import check_checkpoint, load_pickle

__all__ = ["convert", "convert_back", "convert_config", "convert_state_dict", "main"]

# Any of the first makes a tokenizer; the others describe it further.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


def _token_ids(staging: Path, config: OurConfig) -> str:
    """Set the config's token ids from the tokenizer beside it; says what was done."""
    if not any((staging / name).is_file() for name in _VOCABULARIES):
        ids = [getattr(config, name) for name in _TOKEN_IDS]
        known = {(END_OF_TEXT,) * 3: f"{END_OF_TEXT} (GPT-NeoX)"}
        if config.eos_token_id == LLAMA_END:
            known[tuple(ids)] = f"{', '.join(map(str, ids))} (Llama 3)"
        listed = known.get(tuple(ids), f"{', '.join(map(str, ids))} (config.json)")
        return f"no tokenizer: bos, eos and pad token ids are assumed to be {listed}"
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


@contextmanager
def _appearing(source: Path, target: Path, overwrite: bool) -> Generator[Path, None, None]:
    """A folder to write to, which becomes `target` at the end of the block, or nothing does."""
    _check_destination(source, target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    try:
        staging.mkdir()
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        yield staging
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


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    A_activation: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write another library's checkpoint `source` to the new directory `target` in our format.

    The directory appears complete or not at all. What was assumed is printed.

    Args:
        source: directory of mamba_ssm's format, or of flash-linear-attention's Mamba-3; its
            tokenizer and generation_config.json are taken along, and the tokenizer gives the token
            ids.
        target: directory to create.
        dtype: of the written weights; those that `from_pretrained` keeps in fp32 (A_log, D,
            dt_bias, ...) keep theirs. None keeps all.
        A_activation: of Mamba-3's rates, `"heavy_tail"` or `"softplus"`, in place of what the files
            say or what is assumed; of no other model.
        overwrite: replace a checkpoint at `target`.

    Raises:
        ValueError: what cannot be converted, naming file, option and value; `target` exists.
    """
    source, target = Path(source), Path(target)
    _check_destination(source, target, overwrite)
    file = source / "config.json"
    config = convert_config(_read_config(file), str(file), A_activation)
    weights = convert_state_dict(_read_weights(source), config, str(source))
    with torch.device("meta"):
        model = MODELS[type(config)](config)
    if dtype is not None:
        precise = model._keep_in_fp32_modules_strict
        weights = {
            name: tensor if name.rpartition(".")[2] in precise else tensor.to(dtype)
            for name, tensor in weights.items()
        }
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    with _appearing(source, target, overwrite) as staging:
        ids = _token_ids(staging, model.config)
        generation = GenerationConfig()
        if (source / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(source)
        for name in _TOKEN_IDS:
            if getattr(generation, name) is None:
                setattr(generation, name, getattr(model.config, name))
        model.generation_config = generation
        model.save_pretrained(staging)
    print(f"{source} -> {target}: {type(model).__name__}, {model.num_parameters():,} parameters")
    print(ids)


def convert_back(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a checkpoint of ours to the new directory `target` in mamba_ssm's format.

    Args:
        source: directory of a Mamba-1, Mamba-2 or Mamba-3 language model in transformers' format.
        target: directory to create: config.json, pytorch_model.bin, SRC's tokenizer.
        overwrite: replace a checkpoint at `target`.

    Raises:
        ValueError: an option that mamba_ssm cannot express, or damaged files; `target` exists.
    """
    source, target = Path(source), Path(target)
    _check_destination(source, target, overwrite)
    file = source / "config.json"
    kind = _read_config(file).get("model_type")
    classes = [config for config in MODELS if config.model_type == kind]
    if not classes:
        known = [config.model_type for config in LAYERS]
        raise ValueError(f"{file} has model_type={kind!r}, mamba_ssm has models like {known}")
    config = classes[0].from_pretrained(source)
    written = to_mamba_ssm(config, str(file))
    weights = convert_state_dict(_read_weights(source), config, str(source))
    with _appearing(source, target, overwrite) as staging:
        (staging / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        torch.save(state_dict_of_mamba_ssm(weights), staging / "pytorch_model.bin")
    print(f"{source} -> {target}: mamba_ssm's format")


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m ssm_hf.convert",
        description="Convert a checkpoint of mamba_ssm (Mamba-1, -2, -3) or of "
        "flash-linear-attention (Mamba-3) to transformers' format.",
    )
    parser.add_argument("src", help="directory with config.json and weights")
    parser.add_argument("dst", help="directory to create")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the written weights (default: as they are; A_log, D, dt_bias always so)",
    )
    parser.add_argument(
        "--A_activation",
        choices=("heavy_tail", "softplus"),
        help="activation of Mamba-3's rates, which checkpoints do not always state",
    )
    parser.add_argument(
        "--back", action="store_true", help="SRC is in transformers' format, DST in mamba_ssm's"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    given = parser.parse_args(arguments)
    if given.back and (given.dtype or given.A_activation):
        parser.error("--back writes what is there: it takes no --dtype and no --A_activation")
    try:
        if given.back:
            convert_back(given.src, given.dst, overwrite=given.overwrite)
        else:
            convert(
                given.src,
                given.dst,
                dtype=_DTYPES.get(given.dtype),
                A_activation=given.A_activation,
                overwrite=given.overwrite,
            )
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
