"""Fixtures of the whole suite."""

import os

import pytest
import torch

# No test may reach for the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
