"""Speed and memory at every length."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eval.efficiency import run_efficiency
from eval.model import LoadedModel, cache_bytes
from eval.options import EfficiencyOptions
from eval.samples import SampleStore

SMALL = {"batch_sizes": [1, 3], "new_tokens": 3, "warmup": 1, "repeats": 3}


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    return open_store(tmp_path)


def open_store(folder: Path) -> SampleStore:
    return SampleStore(folder, model="m", section="efficiency", task="speed", settings={})


def test_every_number_has_its_runs(loaded: LoadedModel, store: SampleStore) -> None:
    result = run_efficiency(loaded, EfficiencyOptions(lengths=[32, 8], **SMALL), 0, store)
    assert [point["length"] for point in result["lengths"]] == [8, 32]
    caches = set()
    for point in result["lengths"]:
        parts = [point["prefill"], point["first_token"], *point["decode"].values()]
        for part in parts:
            value = part.get("tokens_per_s", part.get("seconds"))
            assert part["range"][0] <= value <= part["range"][1]
            assert part["n"] == 3
            assert value > 0
        assert point["prefill"]["peak_bytes"] is None  # a CPU does not say
        caches.add(point["prefill"]["cache_bytes"])
    # A recurrent model's state: two layers, as the report's header states.
    assert len(caches) == 1


def test_attention_models_and_chunks_are_measured_too(
    loaded: LoadedModel, store: SampleStore
) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llama = LoadedModel(AutoModelForCausalLM.from_config(config).eval(), loaded.tokenizer, (), "")
    options = EfficiencyOptions(lengths=[8, 16], chunk=5, **SMALL)
    result = run_efficiency(llama, options, 0, store)
    sizes = [point["prefill"]["cache_bytes"] for point in result["lengths"]]
    assert sizes == [n * 2 * 2 * 2 * 8 * 4 for n in (8, 16)]  # keys and values, 2 layers, 2 heads
    for point in result["lengths"]:
        assert point["decode"]["3"]["tokens_per_s"] > 0
    with torch.no_grad():
        ids = torch.zeros(1, 4, dtype=torch.long)
        assert cache_bytes(llama.model(ids, use_cache=True).past_key_values) == sizes[0] // 2


def test_memory_that_runs_out_is_a_null_with_its_reason(
    loaded: LoadedModel, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = loaded.model.forward

    def limited(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > 1 or input_ids.shape[1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", limited)
    options = EfficiencyOptions(lengths=[8, 32, 64], **SMALL)
    short, middle, long = run_efficiency(loaded, options, 0, store)["lengths"]
    assert short["prefill"]["tokens_per_s"] > 0
    assert short["decode"]["1"]["tokens_per_s"] > 0
    assert short["decode"]["3"] == {"reason": "out of memory at 8 tokens"}
    assert middle["prefill"] == long["prefill"] == {"reason": "out of memory at 32 tokens"}


def test_a_measurement_that_takes_too_long_is_given_up(
    loaded: LoadedModel, store: SampleStore
) -> None:
    options = EfficiencyOptions(lengths=[8], max_seconds=1e-9, **SMALL)
    (point,) = run_efficiency(loaded, options, 0, store)["lengths"]
    assert point["first_token"] == {"reason": "took longer than 1e-09 s at 8 tokens"}


def test_a_length_that_is_done_is_not_measured_again(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EfficiencyOptions(lengths=[8, 16], **SMALL)
    forward, lengths = loaded.model.forward, []

    def limited(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        lengths.append(input_ids.shape[1])
        if input_ids.shape[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", limited)
    short = EfficiencyOptions(lengths=[8], **SMALL)
    first = run_efficiency(loaded, short, 0, open_store(tmp_path))["lengths"][0]
    lengths.clear()
    again, longer = run_efficiency(loaded, options, 0, open_store(tmp_path))["lengths"]
    assert again == first
    assert 8 not in lengths
    assert 16 in lengths
    # What was not possible in the earlier run is not tried at a greater length.
    assert longer["decode"]["3"] == {"reason": "out of memory at 8 tokens"}
