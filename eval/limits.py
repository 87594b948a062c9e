"""What a model cannot do in the memory or the time there is, as a result and not as a crash."""

import inspect
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers import PreTrainedModel

from eval.model import length_limit

T = TypeVar("T")


class NotPossible(Exception):
    """The reason why something was not measured, for the report."""


def attempt(work: Callable[[], T]) -> T:
    """Run `work`; memory that runs out becomes `NotPossible`, and what it held is freed.

    Raises:
        NotPossible: out of memory, or what `work` itself gives up with.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not should_reduce_batch_size(error):
            raise
    # Outside the handler, whose error keeps the tensors alive.
    clear_device_cache(garbage_collection=True)
    raise NotPossible("out of memory")


class Clock:
    """Gives up when a measurement takes longer than it may."""

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self.start = time.perf_counter()

    def check(self) -> None:
        """Raise NotPossible when the time is over."""
        if time.perf_counter() - self.start > self.max_seconds:
            raise NotPossible(f"took longer than {self.max_seconds:g} s")


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Raise NotPossible where a model has a learned vector for each position, and too few of them.

    On a GPU an index beyond a table stops the whole process, so nobody may try.
    """
    limit = length_limit(model.config)
    if limit is None or tokens <= limit:
        return
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):
        raise NotPossible(f"the model has positions for {limit:,} tokens only")


def arguments(model: PreTrainedModel) -> set[str]:
    """Return the names of the arguments of a model's forward pass."""
    return set(inspect.signature(model.forward).parameters)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
