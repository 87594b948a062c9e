"""Fixtures of the whole suite."""

import os

import pytest
import torch

# No test may reach for the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Without a GPU the kernels run in Triton's interpreter; it must be on before they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
