"""Perplexity against length."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ssm_hf
from eval.lengths import run_length, tail_nats, window_ends
from eval.limits import Clock, NotPossible
from eval.model import LoadedModel, load_model
from eval.options import LengthOptions
from eval.samples import SampleStore

NEVER = Clock(1e9)


def _text(path: Path, size: int) -> str:
    rng = np.random.default_rng(0)
    path.write_bytes(bytes(rng.integers(97, 123, size, dtype=np.uint8)))
    return str(path)


def _store(folder: Path, name: str = "t") -> SampleStore:
    return SampleStore(folder, model="m", section="length", task=name, settings={})


def _direct(loaded: LoadedModel, ids: list[int], last: int) -> np.ndarray:
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    picked = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return -picked[-last:].numpy()


@pytest.mark.parametrize(("last", "chunk"), [(1, 64), (10, 7), (59, 16), (20, 40)])
def test_tail_equals_one_pass(loaded: LoadedModel, last: int, chunk: int) -> None:
    ids = loaded.encode("the quick brown fox jumps over the lazy dog, and then sleeps.")[:60]
    nats = tail_nats(loaded.model, ids, last, chunk, NEVER)
    # fp32 sums in another order
    np.testing.assert_allclose(nats, _direct(loaded, ids, last), atol=1e-4, rtol=0)


def test_windows_of_all_lengths_end_at_the_same_places() -> None:
    assert window_ends(100, 40, 4) == [40, 60, 80, 100]
    assert window_ends(100, 100, 5) == [100]
    assert window_ends(100, 40, 1) == [100]


def test_both_definitions_are_what_they_say(loaded: LoadedModel, tmp_path: Path) -> None:
    files = [_text(tmp_path / "a.txt", 200)]
    options = LengthOptions(
        files=files, windows=[20, 50, 500], last=5, places=3, block=64, bucket=16, chunk=16
    )
    result = run_length(loaded, options, _store(tmp_path))
    ids = list(Path(files[0]).read_bytes())
    start = list(loaded.prefix)
    for point, window in zip(result["a"], (20, 50), strict=False):
        means = [
            _direct(loaded, start + ids[end - window + 1 : end], 5).mean() for end in (50, 125, 200)
        ]
        assert point["window"] == window
        assert point["nats"] == pytest.approx(np.mean(means), abs=1e-4)
        assert point["stderr"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3), abs=1e-4)
        assert point["perplexity"] == pytest.approx(math.exp(point["nats"]))
        assert point["n"] == 3
    assert result["a"][0]["change"] == result["a"][0]["change_stderr"] == 0
    change = result["a"][1]["nats"] - result["a"][0]["nats"]
    assert result["a"][1]["change"] == pytest.approx(change, abs=1e-6)
    assert result["a"][2]["change"] is None
    assert result["a"][2]["perplexity"] is None
    assert result["a"][2]["reason"] == "no document is that long"
    losses = _direct(loaded, start + ids[:64], 64)
    assert [(p["start"], p["end"]) for p in result["b"]] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    for point, part in zip(result["b"], losses.reshape(4, 16), strict=True):
        assert point["nats"] == pytest.approx(part.mean(), abs=1e-4)


def _fails_beyond(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, tokens: int) -> None:
    forward = loaded.model.forward

    def limited(input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if seen + input_ids.shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(input_ids, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", limited)


def test_memory_that_runs_out_is_a_null_with_its_reason(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LengthOptions(
        files=[_text(tmp_path / "a.txt", 200)],
        windows=[20, 50, 100],
        last=5,
        places=2,
        block=64,
        bucket=16,
        chunk=16,
    )
    with monkeypatch.context() as patch:
        _fails_beyond(patch, loaded, 40)
        # The names that lengths.py looks for are those of the real forward pass.
        result = run_length(loaded, options, _store(tmp_path))
    assert result["a"][0]["n"] == 2
    for point in (*result["a"][1:], *result["b"]):
        assert point["perplexity"] is None
        assert point["reason"].startswith("out of memory at ")
    again = run_length(loaded, options, _store(tmp_path))  # what failed is tried again
    assert [p["n"] for p in again["a"]] == [2, 2, 2]
    assert again["a"][0] == result["a"][0]


def test_time_that_runs_out_is_a_null_with_its_reason(loaded: LoadedModel, tmp_path: Path) -> None:
    options = LengthOptions(
        files=[_text(tmp_path / "a.txt", 200)], windows=[20], last=5, block=0, max_seconds=1e-9
    )
    (point,) = run_length(loaded, options, _store(tmp_path))["a"]
    assert point["reason"] == "took longer than 1e-09 s at 20 tokens"


def test_learned_positions_end_without_a_crash(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=264, n_embd=16, n_layer=1, n_head=2, n_positions=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    ssm_hf.byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    gpt2 = load_model(str(tmp_path / "gpt2"), dtype="float32", device="cpu", prefix="auto")
    options = LengthOptions(
        files=[_text(tmp_path / "a.txt", 200)], windows=[32, 128], last=5, places=2, block=0
    )
    short, long = run_length(gpt2, options, _store(tmp_path))["a"]
    assert short["n"] == 2
    assert long["reason"] == "the model has positions for 64 tokens only at 128 tokens"


def test_a_clock_lets_time_pass() -> None:
    NEVER.check()
    with pytest.raises(NotPossible, match="took longer than 0 s"):
        Clock(0).check()
