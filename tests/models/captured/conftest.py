"""Small pieces of prompts, captures on every device, and a model of each family."""

import pytest
from transformers import PreTrainedModel

from ssm_hf.generation import prefill
from tests.models.captured.helpers import CLASSES, DEVICE, build, capture_on_cpu


@pytest.fixture(autouse=True)
def _captures_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "SMALL", 4)
    monkeypatch.setattr(prefill, "LARGE", 8)
    if DEVICE.type != "cuda":
        capture_on_cpu(monkeypatch)


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name.startswith("mamba") else pytest.mark.slow)
        for name in CLASSES
    ]
)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)
