"""Comparisons of ways to compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eval.consistency import run_consistency
from eval.model import LoadedModel
from eval.options import ConsistencyOptions


@pytest.fixture
def options(tmp_path: Path) -> ConsistencyOptions:
    text = "".join(chr(97 + i * i % 23) for i in range(700))
    (tmp_path / "a.txt").write_text(text)
    return ConsistencyOptions(
        files=[str(tmp_path / "a.txt")], samples=7, tokens=48, piece=5, batch_size=4, new_tokens=4
    )


def test_right_models_pass(loaded: LoadedModel, options: ConsistencyOptions) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(config).eval()
    for model in (loaded, LoadedModel(llama, loaded.tokenizer, loaded.prefix, "")):
        result = run_consistency(model, options)
        assert result["samples"] == 7
        assert len(result["comparisons"]) == 4
        for comparison in result["comparisons"]:
            assert comparison["passed"], comparison
        assert result["generation"] == {"equal": 4, "prompts": 4}


@pytest.mark.parametrize(
    ("ignored", "failing"),
    [("attention_mask", "batch padded on the left, with a mask"), ("past_key_values", "in pieces")],
)
def test_wrong_models_are_seen(
    loaded: LoadedModel,
    options: ConsistencyOptions,
    monkeypatch: pytest.MonkeyPatch,
    ignored: str,
    failing: str,
) -> None:
    forward = loaded.model.forward

    def careless(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        # Also what says where a text begins, or the mask could be had from there.
        for name in {ignored, *(["position_ids"] if ignored == "attention_mask" else [])}:
            kwargs.pop(name, None)
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", careless)
    monkeypatch.setattr(loaded.model, "generate", lambda input_ids, **_: input_ids)
    result = run_consistency(loaded, options)
    passed = {c["name"]: c["passed"] for c in result["comparisons"]}
    assert passed["batch padded on the right, no mask"]
    assert not next(ok for name, ok in passed.items() if name.startswith(failing))


def test_short_files_are_refused(loaded: LoadedModel, options: ConsistencyOptions) -> None:
    Path(options.files[0]).write_text("abc")
    with pytest.raises(ValueError, match="hold no text of 48 tokens"):
        run_consistency(loaded, options)
