"""Synthetic tasks (eval/tasks) as training data: fresh samples throughout, a curriculum."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from eval.tasks import Lengths, check_fits, make_task, pack, seeded
from training.config import DataConfig


class TaskRows(Dataset):
    """Rows drawn when they are asked for, batch by batch; no sample is ever seen twice.

    A batch is a pure function of (seed, number of its first row, number of rows), so a resumed run
    goes on with the samples that the interrupted one would have seen.

    Args:
        config: `task` and `seq_len` are used.
        tokenizer: for tasks that are made of text, else None.
        seed: of all draws.
        total_rows: rows in the whole run, which the stages of the curriculum share equally.

    Raises:
        ValueError: an unknown task or option, lengths that the task or a row cannot hold, or a
            tokenizer that is missing.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
        total_rows: int,
    ) -> None:
        self.config, self.seed, self.total_rows = config, seed, total_rows

        def encode(text: str) -> list[int]:
            assert tokenizer is not None  # make_task has asked
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            return ids["input_ids"]

        name = str(config.task.name)
        self.task = make_task(name, config.task.options, None if tokenizer is None else encode)
        self.stages = [Lengths.parse(text) for text in config.task.lengths]
        for lengths in self.stages:
            check_fits(self.task, lengths, config.seq_len)

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch at once, (len(rows), seq_len) each."""
        first = rows[0]
        stage = min(len(self.stages) - 1, len(self.stages) * first // self.total_rows)
        return pack(
            self.task,
            self.stages[stage],
            rows=len(rows),
            row_tokens=self.config.seq_len,
            generator=seeded(self.seed, "training", first, len(rows)),
            several=self.config.task.pack,
            borders=self.config.task.borders,
        )

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([row]).items()}

    def vocab_size(self, tokenizer: PreTrainedTokenizerBase | None) -> int:
        """Ids that the model must know."""
        own = 0 if self.task.vocab_size is None else self.task.vocab_size
        return max(own, 0 if tokenizer is None else len(tokenizer))

    def fingerprint(self) -> str:
        """A short hash of what decides the rows besides the seed."""
        settings = [asdict(self.config.task), self.config.seq_len, self.total_rows]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def summary(self) -> str:
        lengths = ", then ".join(self.config.task.lengths)
        return f"task {self.config.task.name} of lengths {lengths}"


class Onwards(Sampler[int]):
    """Row numbers for ever, from `start` on."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1


def as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loader's last step, for batches that are made whole."""
    return batch
