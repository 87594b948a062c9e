"""Checkpoints that are either whole or not there.

`<run>/checkpoints/step-00000100/` holds a loadable model with its tokenizer, and in `state/` the
optimiser, the random states of every process and `trainer.json`. It is written under a temporary
name, synced, renamed, and the folder synced; only then are older ones deleted. Whatever interrupts
that (a crash, a full disk) leaves the last good checkpoint as it was.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

INCOMPLETE = ".incomplete-"
REPLACED = ".replaced-"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or cannot be resumed from."""


@dataclass
class TrainerState:
    """Where a run stands. The data order is a pure function of (seed, samples).

    step: optimiser steps done. samples, tokens: rows, and positions in them, consumed.
    elapsed_seconds: time spent in the training loop, over all resumptions.
    skipped: steps dropped because loss or gradient was not finite.
    data: what must be equal for the order to continue: seed and fingerprint of the rows.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    elapsed_seconds: float = 0.0
    skipped: int = 0
    data: dict[str, Any] | None = None


def keep_weights_out_of_state(accelerator: Accelerator) -> None:
    """Let `save_state` leave the weights to `save_pretrained`, which writes them beside it in the
    form everybody loads, instead of writing them twice. Sharded strategies (FSDP, DeepSpeed) pass
    nothing here and keep their own shards in the state."""
    accelerator.register_save_state_pre_hook(lambda models, weights, path: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, path: models.clear())


def save_model(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
) -> None:
    """Write `path` with `save_pretrained`; every process calls it, the main one writes."""
    state_dict = accelerator.get_state_dict(model)  # gathers shards, so on every process
    # torch.compile wraps modules, and its name for the module inside gets into the keys.
    state_dict = {name.replace("_orig_mod.", ""): value for name, value in state_dict.items()}
    if accelerator.is_main_process:
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        plain.save_pretrained(path, state_dict=state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)


def save_checkpoint(
    run_dir: Path,
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    state: TrainerState,
    keep_last: int,
) -> Path:
    """Write the checkpoint of `state.step`, then delete all but the newest `keep_last`.

    Raises:
        CheckpointError: it could not be written (for example no space left on the disk). Older
            checkpoints are untouched.
    """
    path = _folder(run_dir) / f"step-{state.step:08d}"
    with whole_directory(path, accelerator) as temporary:
        save_model(accelerator, model, tokenizer, temporary)
        accelerator.save_state(str(temporary / "state"))
        if accelerator.is_main_process:
            text = json.dumps(asdict(state), indent=2)
            (temporary / "state" / "trainer.json").write_text(text + "\n", encoding="utf-8")
    if accelerator.is_main_process:
        for old in checkpoints(run_dir)[:-keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


@contextlib.contextmanager
def whole_directory(path: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A temporary sibling of `path` to write into, which becomes `path` when the block ends well.

    Raises:
        CheckpointError: writing failed; what had been written is removed.
    """
    temporary = path.with_name(INCOMPLETE + path.name)
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield temporary
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _sync_tree(temporary)
            _rename(temporary, path)
        accelerator.wait_for_everyone()
    # safetensors and torch.save report a failed write as errors of their own.
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not write {path}: {error}. Checkpoints written before it are untouched: with "
            "the cause removed (a full disk?), resume: auto continues from the newest"
        ) from error


def _rename(temporary: Path, path: Path) -> None:
    replaced = path.with_name(REPLACED + path.name)
    if path.exists():
        os.rename(path, replaced)
    os.rename(temporary, path)
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(_folder(run_dir).glob("step-" + "[0-9]" * 8))


def remove_leftovers(run_dir: Path) -> None:
    """Delete what interrupted saves left behind; a directory whose replacement was not renamed in
    time is the good one and gets its name back."""
    for folder in (run_dir, _folder(run_dir)):
        for leftover in folder.glob(INCOMPLETE + "*"):
            shutil.rmtree(leftover)
        for leftover in folder.glob(REPLACED + "*"):
            path = folder / leftover.name.removeprefix(REPLACED)
            if path.exists():
                shutil.rmtree(leftover)
            else:
                os.rename(leftover, path)


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to continue from by the `resume` setting, None to start afresh.

    Raises:
        CheckpointError: `resume` is a path without a checkpoint, or `run_dir` holds checkpoints
            that the run would mix with.
    """
    present = checkpoints(run_dir)
    if resume == "auto":
        return present[-1] if present else None
    if resume == "never":
        if present:
            raise CheckpointError(
                f"resume is 'never', but run_dir {run_dir} holds {present[-1].name}; "
                "choose another run_dir, remove this one, or set resume: auto"
            )
        return None
    path = Path(resume)
    state = load_trainer_state(path)
    later = [found for found in present if int(found.name.removeprefix("step-")) > state.step]
    if later:
        raise CheckpointError(
            f"resume {path} is of step {state.step}, but run_dir {run_dir} holds {later[-1].name}; "
            "choose another run_dir"
        )
    return path


def load_trainer_state(checkpoint: Path) -> TrainerState:
    """Read `state/trainer.json` of a checkpoint."""
    file = checkpoint / "state" / "trainer.json"
    if not file.is_file():
        raise CheckpointError(f"resume {checkpoint}: no checkpoint there ({file} is missing)")
    return TrainerState(**json.loads(file.read_text(encoding="utf-8")))


def check_same_data(state: TrainerState, now: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue on other data: the order would silently be a different one."""
    before = state.data or {}
    changed = [
        f"{key} was {before.get(key)!r}, is {now[key]!r}"
        for key in now
        if before.get(key) != now[key]
    ]
    if changed:
        raise CheckpointError(
            f"cannot resume {checkpoint}, the data differs: " + "; ".join(changed)
        )
