"""Perplexity against one direct forward pass per document."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoConfig, AutoModelForCausalLM

import ssm_hf
from eval.documents import Document
from eval.harness import CausalLM
from eval.model import LoadedModel, describe_model, load_model
from eval.perplexity import (
    TokenScores,
    add_curves,
    file_perplexity,
    position_sums,
    ratio_stderr,
    score_tokens,
)

# fp32 sums over the state in another order (chunks, padding): 1e-6 relative of losses near 10.
ATOL = 5e-5
TEXTS = ["a", "né\n", "def f(x):\n    return x\n" * 3, "import os\n" * 5, "xyz" * 11]


@torch.no_grad()
def _direct(loaded: LoadedModel, ids: list[int]) -> np.ndarray:
    """Losses of all tokens but the first, by one forward pass over one sequence."""
    logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].numpy()


@pytest.mark.parametrize("stateful", [True, False], ids=["stateful", "windows"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_documents_within_the_window_equal_direct_computation(
    loaded: LoadedModel, stateful: bool, batch_size: int
) -> None:
    sequences = [loaded.encode(text) for text in TEXTS]
    scores = score_tokens(
        loaded.model, sequences, window=128, stateful=stateful, batch_size=batch_size
    )
    for ids, score in zip(sequences, scores, strict=True):
        np.testing.assert_allclose(score.nats, _direct(loaded, ids), atol=ATOL, rtol=0)
        assert score.position.tolist() == list(range(len(ids) - 1))


@pytest.mark.parametrize("window", [1, 7, 16, 50])
def test_stateful_scoring_does_not_depend_on_the_window(loaded: LoadedModel, window: int) -> None:
    sequences = [loaded.encode(text) for text in TEXTS]
    scores = score_tokens(loaded.model, sequences, window=window, stateful=True, batch_size=2)
    for ids, score in zip(sequences, scores, strict=True):
        np.testing.assert_allclose(score.nats, _direct(loaded, ids), atol=ATOL, rtol=0)


def test_attention_models_are_scored_and_described_too(tmp_path: Path) -> None:
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
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ssm_hf.byte_tokenizer().save_pretrained(tmp_path)
    llama = load_model(str(tmp_path), dtype="float32", device="cpu", prefix="auto")
    sequences = [llama.encode(text) for text in TEXTS]
    scores = score_tokens(llama.model, sequences, window=16, stateful=True, batch_size=2)
    for ids, score in zip(sequences, scores, strict=True):
        np.testing.assert_allclose(score.nats, _direct(llama, ids), atol=ATOL, rtol=0)
    facts = describe_model(str(tmp_path), llama)
    # Keys and values, 2 layers, 2 heads of 8, 4 bytes each.
    assert (facts["state_bytes"], facts["state_bytes_per_token"]) == (0, 2 * 2 * 2 * 8 * 4)


def test_what_a_window_bounds_does_not_count_as_growing(tmp_path: Path) -> None:
    config = ssm_hf.HybridConfig(
        vocab_size=264,
        hidden_size=32,
        blocks=["mamba2", {"type": "sliding_attention", "num_heads": 4, "window": 100}],
        options={"mamba2": {"head_dim": 8}},
    )
    ssm_hf.HybridForCausalLM(config).save_pretrained(tmp_path)
    ssm_hf.byte_tokenizer().save_pretrained(tmp_path)
    hybrid = load_model(str(tmp_path), dtype="float32", device="cpu", prefix="auto")
    facts = describe_model(str(tmp_path), hybrid)
    assert facts["state_bytes_per_token"] == 0
    # Keys and values of the window, 4 heads of 8, 4 bytes each.
    assert facts["state_bytes"] > 100 * 2 * 4 * 8 * 4


def test_windows_forget_what_lies_before_them(loaded: LoadedModel) -> None:
    ids = loaded.encode(TEXTS[2])
    (score,) = score_tokens(loaded.model, [ids], window=20, stateful=False, batch_size=4)
    inputs = len(ids) - 1
    for start in range(0, inputs, 20):
        end = min(start + 20, inputs)
        expected = _direct(loaded, ids[max(end - 20, 0) : end + 1])[-(end - start) :]
        np.testing.assert_allclose(score.nats[start:end], expected, atol=ATOL, rtol=0)
    last = inputs % 20
    assert last, "the text must end inside a window"
    assert score.position[-last:].tolist() == list(range(20 - last, 20))
    assert np.abs(score.nats[20:] - _direct(loaded, ids)[20:]).max() > 0.01


@pytest.mark.parametrize("window", [7, 20, 128])
def test_windows_equal_the_harness_rolling_perplexity(loaded: LoadedModel, window: int) -> None:
    adapter = CausalLM(loaded, batch_size=2, window=window)
    requests = [
        Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=i)
        for i, text in enumerate(TEXTS)
    ]
    theirs = adapter.loglikelihood_rolling(requests, disable_tqdm=True)
    sequences = [loaded.encode(text) for text in TEXTS]
    ours = score_tokens(loaded.model, sequences, window=window, stateful=False, batch_size=2)
    sums = [-score.nats.sum() for score in ours]
    np.testing.assert_allclose(sums, theirs, atol=100 * ATOL, rtol=0)  # sums of up to 100 losses


def test_file_measures_follow_from_the_losses(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("unused here")
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    result = file_perplexity(loaded, str(path), documents, window=16, stateful=True, batch_size=4)
    losses = np.concatenate([_direct(loaded, loaded.encode(text)) for text in TEXTS])
    size = len("".join(TEXTS).encode())
    assert (result["bytes"], result["tokens"], result["documents"]) == (size, size, len(TEXTS))
    assert result["words"] == sum(len(text.split()) for text in TEXTS)
    nats = pytest.approx(losses.sum(), abs=size * ATOL)
    assert result["nats"] == nats
    assert result["bits_per_byte"] * size * math.log(2) == nats
    assert result["nats_per_token"] * size == nats
    assert math.log(result["token_perplexity"]) * size == nats
    assert result["word_perplexity"] is None or (
        math.log(result["word_perplexity"]) * result["words"] == nats
    )
    assert sum(part["tokens"] for part in result["curve"]) == size
    assert sum(part["tokens"] * part["nats"] for part in result["curve"]) == nats


def test_standard_error_of_a_ratio_is_that_of_resampled_documents() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 500, 40)
    nats = sizes * rng.normal(1.5, 0.3, 40)
    draws = rng.integers(0, 40, (4000, 40))
    resampled = nats[draws].sum(1) / sizes[draws].sum(1) / math.log(2)
    # The bootstrap of 4000 draws is itself known to about one percent, the formula is linear.
    assert ratio_stderr(nats.tolist(), sizes.tolist()) == pytest.approx(resampled.std(), rel=0.06)
    assert ratio_stderr([1.0], [2]) is None


def test_without_prefix_the_first_token_is_not_scored(model_dir: Path) -> None:
    bare = load_model(str(model_dir), dtype="float32", device="cpu", prefix="none")
    sequences = [bare.encode(text) for text in TEXTS]
    assert sequences[0] == [ord("a")]
    scores = score_tokens(bare.model, sequences, window=16, stateful=True, batch_size=4)
    assert len(scores[0].nats) == 0
    np.testing.assert_allclose(scores[2].nats, _direct(bare, sequences[2]), atol=ATOL, rtol=0)


def test_losses_are_summed_over_ranges_that_double() -> None:
    position = np.array([0, 0, 1, 2, 3, 8, 15])
    nats = np.array([1.0, 3, 5, 7, 9, 2, 4], np.float32)
    curve = position_sums(TokenScores(nats, position))
    assert curve == [
        {"start": 0, "end": 1, "tokens": 2, "total": 4.0},
        {"start": 1, "end": 2, "tokens": 1, "total": 5.0},
        {"start": 2, "end": 4, "tokens": 2, "total": 16.0},
        {"start": 8, "end": 16, "tokens": 2, "total": 6.0},
    ]
    more = [{"start": 1, "end": 2, "tokens": 3, "total": 1.0}]
    assert add_curves([curve[:2], more]) == [
        {"start": 0, "end": 1, "tokens": 2, "total": 4.0},
        {"start": 1, "end": 2, "tokens": 4, "total": 6.0},
    ]


def test_finished_documents_are_not_scored_again(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("unused here")
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    how = {"window": 16, "stateful": True, "batch_size": 2}
    plain = file_perplexity(loaded, str(path), documents, **how)
    first = file_perplexity(loaded, str(path), documents, samples=tmp_path, **how)
    assert first == plain
    monkeypatch.setattr(loaded.model, "forward", None)  # cannot be called
    assert file_perplexity(loaded, str(path), documents, samples=tmp_path, **how) == plain
    with pytest.raises(TypeError):
        file_perplexity(loaded, str(path), documents[1:], samples=tmp_path, **how)


def test_losses_that_are_not_finite_are_refused(model_dir: Path) -> None:
    broken = load_model(str(model_dir), dtype="float32", device="cpu", prefix="auto")
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[ord("q")] = float("nan")
    sequences = [broken.encode("a quiet"), broken.encode("abc")]
    with pytest.raises(ValueError, match=r"log-likelihoods of sequence \d are not finite"):
        score_tokens(broken.model, sequences, window=16, stateful=True, batch_size=1)


def test_missing_prefix_token_is_named(
    loaded: LoadedModel, model_dir: Path, tmp_path: Path
) -> None:
    loaded.model.save_pretrained(tmp_path)
    tokenizer = load_model(str(model_dir), dtype="auto", device="cpu", prefix="none").tokenizer
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no eos token to put before a document"):
        load_model(str(tmp_path), dtype="auto", device="cpu", prefix="auto")
    bare = load_model(str(tmp_path), dtype="auto", device="cpu", prefix="none")
    with pytest.raises(
        ValueError, match="section lm_eval needs a tokenizer with an end-of-text token"
    ):
        CausalLM(bare, batch_size=1)
