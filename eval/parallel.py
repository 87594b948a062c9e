"""Work shared by several processes: `accelerate launch -m eval.run ...` on one or more GPUs.

Each process holds the whole model and takes every n-th sample. Started without a launcher there is
one process and nothing to wait for.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from eval.samples import SampleStore


def processes() -> PartialState:
    """Return the group of processes: `process_index`, `num_processes`, `wait_for_everyone()`."""
    # One process may score for hours after the others are done.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(weeks=4))


def finish(
    store: SampleStore,
    ids: Sequence[str],
    work: Callable[[list[str]], Iterable[tuple[str, dict[str, Any]]]],
) -> list[dict[str, Any]]:
    """Bring every sample of a task to its end, whatever has been done before.

    Args:
        store: of the task; finished samples are taken from it, new ones are added one by one.
        ids: of all samples.
        work: takes the ids that this process has to do, yields (id, sample) as each is done, in
            any order. A sample {"failed": reason} is kept, and tried again by the next run.

    Returns:
        The samples of `ids`, in order, in every process.
    """
    group = processes()
    # A share of all ids and not of those left: a process that starts later sees fewer left.
    share = ids[group.process_index :: group.num_processes]
    todo = [id for id in share if "failed" in store.done.get(id, {"failed": ""})]
    if todo:
        for id, sample in work(todo):
            store.add(id, sample)
    group.wait_for_everyone()
    store.reload()
    return [store.done[id] for id in ids]
