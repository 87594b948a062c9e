"""Checks of checkpoint files before they are loaded, so that errors name the file."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def check_checkpoint(directory: str | os.PathLike[str], subfolder: str = "") -> None:
    """Raise `ValueError` where a weight file of a local checkpoint is missing, cut off or unsafe.

    Args:
        directory: folder that holds config.json and weights.
        subfolder: folder inside it.
    """
    folder = Path(directory) / subfolder
    for name in _INDEXES:
        index = folder / name
        if not index.is_file():
            continue
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a shard index: {error!r}") from error
        for shard in shards:
            if not (folder / shard).is_file():
                raise ValueError(f"{index} lists {shard}, which is missing from {folder}")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is cut off or damaged: {error}") from error
    if not any(folder.glob("*.safetensors")):
        for file in sorted(folder.glob("pytorch_model*.bin")):
            load_pickle(file)


def load_pickle(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a torch.save file, read with `weights_only`.

    Raises:
        ValueError: the file is damaged, or holds more than tensors; nothing in it is executed.
    """
    try:
        try:
            content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # The format before torch 1.6 cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and is refused (it could run code): {error}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is cut off or damaged: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} must hold a dict of tensors, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{file} must hold tensors only, but {name!r} is a {type(value).__name__}"
            )
    return dict(content)
