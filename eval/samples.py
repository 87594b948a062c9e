"""Finished samples on disk, so that a run that was stopped goes on where it was.

One JSON Lines file a task, `DIR/<section>-<task>.jsonl`. Each line belongs to one key: a hash of
the model, the section, the task and every setting that the result depends on. Lines of other keys
(another checkpoint, another length) may share the file and are left alone, so a changed setting
never takes an old result.

    store = SampleStore(directory, model=loaded.identity, section="ruler", task="vt",
                        settings={"length": 4096, "seed": 0})
    for id in ids:
        if id not in store.done:
            store.add(id, {"prediction": ..., "score": ...})
    scores = [store.done[id]["score"] for id in ids]

Several processes may add to the same store: every line is one append, under a lock. After they have
waited for one another, `reload` shows each what the others have done.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def settings_key(model: str, section: str, task: str, settings: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that identify a model and all settings of a task.

    Args:
        model: identity of weights, tokenizer and precision (`LoadedModel.identity`).
        section, task: names.
        settings: JSON values; their order does not matter.
    """
    text = json.dumps([model, section, task, settings], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class SampleStore:
    """The finished samples of one model on one task with one set of settings.

    Args:
        directory: created if needed.
        model, section, task, settings: see `settings_key`.

    Attributes:
        path: the file.
        key: see `settings_key`.
        done: sample id -> what was stored for it.

    Raises:
        ValueError: section or task has a character that cannot stand in a file name, or the
            settings are no JSON values.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        model: str,
        section: str,
        task: str,
        settings: Mapping[str, Any],
    ) -> None:
        for name in (section, task):
            if not re.fullmatch(r"[\w.+=,-]+", name):
                raise ValueError(f"{name!r} cannot be part of a file name")
        self.path = Path(directory) / f"{section}-{task}.jsonl"
        self.key = settings_key(model, section, task, settings)
        self.done: dict[str, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.reload():
            about = {"model": model, "section": section, "task": task, "settings": settings}
            self._append({"key": self.key, "about": about})

    def reload(self) -> bool:
        """Read the file again; returns whether it has any line of this key."""
        known = False
        broken = 0
        self.done = {}
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else ():
            if not line:
                continue
            try:
                row = json.loads(line)
            except ValueError:  # cut while it was written: that sample is done again
                broken += 1
                continue
            if row["key"] == self.key:
                known = True
                if "id" in row:
                    self.done[row["id"]] = row["sample"]
        if broken:
            log.warning("%s: %d incomplete line(s) ignored", self.path, broken)
        return known

    def add(self, id: str, sample: Mapping[str, Any]) -> None:
        """Store one finished sample; it is on disk when this returns.

        Args:
            id: of the sample, unique within the task and its settings.
            sample: JSON values.

        Raises:
            ValueError: the sample holds what is not JSON (NaN and infinity are not).
        """
        self._append({"key": self.key, "id": id, "sample": sample})
        self.done[id] = dict(sample)

    def _append(self, row: dict[str, Any]) -> None:
        data = json.dumps(row, allow_nan=False).encode() + b"\n"
        with open(self.path, "ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a line that another run left cut
                    data = b"\n" + data
            file.write(data)
