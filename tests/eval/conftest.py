"""A tiny byte-level model on disk, as a training run leaves it."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ssm_hf
from eval.model import LoadedModel, load_model
from eval.science import controls
from tests.helpers import auto_classes_restored


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tables that the harness prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(autouse=True, scope="package")
def _our_classes() -> Iterator[None]:
    """Register our classes, and give other tests transformers' own back."""
    with auto_classes_restored():
        ssm_hf.register(override=True)
        yield


@pytest.fixture(scope="package")
def model_dir(_our_classes: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "final"
    tokenizer = ssm_hf.byte_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba2",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        expand=2,
        head_dim=16,
        num_heads=4,
        state_size=8,
        n_groups=1,
        chunk_size=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    # Freshly initialised logits hardly differ; wide embeddings make every prediction distinct.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="package")
def loaded(model_dir: Path) -> LoadedModel:
    return load_model(str(model_dir), dtype="float32", device="cpu", prefix="auto")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a training run writes beside the model: held-out rows and the token ids seen."""
    rows = [
        {"name": f"file {i}", "text": f"def f{i}(x):\n    return x + {i}\n" * 4} for i in range(3)
    ]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = b"def g(x):\n    return 2 * x\n" * 50
    ids = np.array([256, *seen, 256, *seen[:100]], dtype="<u2")
    ids.tofile(tmp_path / "seen_tokens.bin")
    description = {"dtype": "uint16", "count": len(ids)}
    (tmp_path / "seen_tokens.json").write_text(json.dumps(description))
    return tmp_path


@pytest.fixture
def science_classes() -> Iterator[None]:
    """The science suite's controls are registered for a test alone."""
    with auto_classes_restored():
        controls.register()
        yield
