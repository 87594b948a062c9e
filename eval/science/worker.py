"""One run: train through training's own entry point, measure, write down what came out.

Runs in a process of its own, so that whatever happens to it happens to nothing else.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import training.train
from eval.science import controls
from eval.science.measure import (
    LeakedLabels,
    ModelPredictor,
    Predictor,
    WipedState,
    accuracy,
    integrity,
)
from eval.science.suite import Controls, Experiment, digest
from eval.tasks import seeded
from training.config import load_config

RESULT, ERROR, LOG = "result.json", "error.json", "run.log"
CONTROL_TOKENS = 1024  # the control's samples are not longer


@dataclass(frozen=True)
class Job:
    """One run, complete.

    Args:
        name: experiment/model/learning rate/seed.
        experiment_name: names the test samples, which are the same for all models.
        experiment: what is measured.
        config: of the model, its vocabulary set.
        recipe: of training, without places.
        control: measure this run's model once more as controls.
    """

    name: str
    experiment_name: str
    experiment: Experiment
    config: dict[str, Any]
    recipe: dict[str, Any]
    control: Controls | None

    @property
    def training_hash(self) -> str:
        """Of all that the weights depend on."""
        return digest([self.config, self.recipe])

    @property
    def hash(self) -> str:
        """Of all that the result depends on."""
        spec = self.experiment
        measured = [spec.measure, spec.select, spec.samples, spec.vary, spec.measure_options]
        return digest([self.training_hash, self.experiment_name, measured, self.control])


def run_job(job: Job, folder: str, threads: int, device: int | None, execution: str | None) -> None:
    """Train and measure; leave result.json or error.json in `folder`.

    Args:
        job: what to do.
        folder: all that the run writes lies here. A model that an earlier run with the same
            training settings left there is measured without training it again.
        threads: of the CPU.
        device: number of the GPU among those that there are, None for the first.
        execution: stands over the recipe's `model.execution`.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / LOG, "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    if device is not None:
        # The number counts among those that this process was given.
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = given.split(",")[device] if given else str(device)
    torch.set_num_threads(threads)
    try:
        result = perform(job, path, execution)
    except BaseException as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        write_json(path / ERROR, {"hash": job.hash, "error": message, "execution": execution})
        sys.exit(1)
    write_json(path / RESULT, result)


def check_job(job: Job) -> None:
    """Read a job's recipe and model config as its run will.

    Raises:
        ValueError: a key or value of one of them is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = _write_recipe(job, Path(folder), None)
        load_config(["--config", str(recipe)])
        AutoConfig.from_pretrained(Path(folder) / "config.json")


def perform(job: Job, path: Path, execution: str | None = None) -> dict[str, Any]:
    """Train, unless the trained model is there, and measure."""
    controls.register()
    begin = time.monotonic()
    marker, final = path / "trained.json", path / "train" / "final"
    trained = json.loads(marker.read_text()) if marker.is_file() else {}
    if trained.get("hash") != job.training_hash or not final.is_dir():
        seconds = _train(job, path, execution)
        trained = {"hash": job.training_hash, "seconds": seconds, "execution": execution}
        trained |= _last_losses(path / "train" / "log.jsonl")
        write_json(marker, trained)
    after = time.monotonic()
    model: Any = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    result = measure(job, model)
    return {
        "hash": job.hash,
        "name": job.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": trained,
        "seconds": {"training": after - begin, "measuring": time.monotonic() - after},
        **result,
    }


def _train(job: Job, path: Path, execution: str | None) -> float:
    recipe = _write_recipe(job, path, execution)
    begin = time.monotonic()
    training.train.main(["--config", str(recipe)])
    return time.monotonic() - begin


def _write_recipe(job: Job, path: Path, execution: str | None) -> Path:
    write_json(path / "config.json", job.config)
    # No file of an interrupted attempt is continued: runs are short.
    recipe = {**job.recipe, "run_dir": str(path / "train"), "resume": "never"}
    recipe["model"] = {**recipe.get("model", {}), "config": str(path / "config.json")}
    if execution is not None:
        recipe["model"]["execution"] = execution
    file = path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file


def _last_losses(log: Path) -> dict[str, Any]:
    """Loss and speed at the end of training, and how many steps were dropped."""
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "train"]
    (end,) = [event for event in events if event["event"] == "end"]
    facts = {"steps": end["step"], "skipped": end["skipped"], "loop_seconds": end["elapsed_s"]}
    if steps:
        facts |= {"loss": steps[-1]["loss"], "tokens_per_s": steps[-1]["tokens_per_s"]}
    return facts


def measure(job: Job, model: PreTrainedModel) -> dict[str, Any]:
    """Accuracies at all places, the one that learning rates are chosen by, and the rules."""
    spec, name = job.experiment, job.experiment_name
    is_bf16 = job.recipe.get("precision") == "bf16"
    predictor = ModelPredictor(model, torch.bfloat16 if is_bf16 else None)

    def at(place: int, purpose: str) -> dict[str, Any]:
        task, length = spec.measured(place)
        return accuracy(predictor, task, length, spec.samples, seeded(0, purpose, name, place))

    # In full precision: faint influences count.
    exact = ModelPredictor(model)
    task, length = spec.measured(spec.select)
    result: dict[str, Any] = {
        "select": at(spec.select, "selection"),
        "measure": {str(place): at(place, "measure") for place in spec.measure},
        "integrity": integrity(exact, task, length, seeded(0, "integrity", name)).as_dict(),
    }
    if job.control is not None:
        result["controls"] = _controls(job.control, spec, name, exact)
    return result


def _controls(
    control: Controls, spec: Experiment, name: str, exact: Predictor
) -> dict[str, dict[str, Any]]:
    """Integrity and accuracy of the model itself and of its two spoilt versions."""
    places = [
        p for p in spec.measure if spec.measured(p)[0].tokens(spec.measured(p)[1]) <= CONTROL_TOKENS
    ]
    place = max(places or [min(spec.measure)])
    task, length = spec.measured(place)
    versions = {
        "honest": exact,
        "leaked": LeakedLabels(exact, control.leaked_share),
        "wiped": WipedState(exact, control.wipe_every),
    }
    return {
        version: {
            "at": place,
            **integrity(predictor, task, length, seeded(0, "control", name)).as_dict(),
            "accuracy": accuracy(predictor, task, length, 64, seeded(0, "measure", name, place)),
        }
        for version, predictor in versions.items()
    }


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
