import json

import pytest
import torch
from accelerate import Accelerator

from training import metrics
from training.config import load_config
from training.metrics import Meter, RunLog, peak_flops


def test_meter_means_over_the_steps_since_it_was_drained(recipe):
    config = load_config(["--config", str(recipe)])  # 4 rows of 32 tokens
    meter = Meter(config, forward_flops=1000, accelerator=Accelerator(cpu=True))
    meter.add(1.0, {"loss": 3.0, "aux_loss": 2.5})
    meter.add(3.0, None)  # a skipped step takes time and has no loss
    assert meter.drain() == {"loss": 3.0, "aux_loss": 2.5, "tokens_per_s": 2 * 128 / 4.0}
    meter.add(2.0, {"loss": 5.0, "aux_loss": 2.0})
    meter.add(2.0, {"loss": 4.0, "aux_loss": 3.0})
    assert meter.drain() == {"loss": 4.5, "aux_loss": 2.5, "tokens_per_s": 64.0}


def test_mfu_is_three_forwards_over_the_peak(recipe, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: 1e6)
    config = load_config(["--config", str(recipe)])
    meter = Meter(config, forward_flops=1000, accelerator=Accelerator(cpu=True))
    meter.add(1.0, {"loss": 3.0})
    assert meter.drain()["mfu"] == pytest.approx(128 * 3 * 1000 / 1e6)


def test_peak_is_never_guessed(monkeypatch):
    assert peak_flops(torch.device("cpu"), "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda"), "bf16") == 989.4e12
    assert peak_flops(torch.device("cuda"), "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other GPU")
    assert peak_flops(torch.device("cuda"), "bf16") is None


def test_log_is_replaced_by_a_new_run_and_continued_by_a_resumed_one(tmp_path):
    accelerator = Accelerator(cpu=True)
    path = tmp_path / "log.jsonl"
    RunLog(path, accelerator, resumes=False).write("eval", 1, value=2.5)
    RunLog(path, accelerator, resumes=True).write("sample", 2, text="é")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"event": "eval", "step": 1, "value": 2.5},
        {"event": "sample", "step": 2, "text": "é"},
    ]
    RunLog(path, accelerator, resumes=False).write("start", 0)
    assert len(path.read_text().splitlines()) == 1
