"""Model cards: numbers are filled in, judgement stays."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from eval.blocks import THIS, Run
from eval.card import TEMPLATE, fill, main, write_card
from eval.report import FORMAT

RESULTS: dict[str, Any] = {
    "format": FORMAT,
    "header": {
        "model": {
            "name": "org/tiny",
            "weights": "sha256 1234",
            "identity": "abcd",
            "architecture": "Mamba2ForCausalLM",
            "model_type": "mamba2",
            "layers": 2,
            "hidden_size": 32,
            "vocabulary": 264,
            "attention_layers": 0,
            "parameters": 31512,
            "dtype": "float32",
            "state_dtypes": ["float32"],
            "state_bytes": 6016,
            "state_bytes_per_token": 0,
            "tokenizer": "bytes",
            "prefix": "<|endoftext|>",
        },
        "training": None,
        "training_length": 64,
        "suite_file": "s.yaml",
        "seed": 0,
        "device": "cpu",
        "commit": None,
        "processes": 1,
        "versions": {"torch": "2"},
        "command": "python -m eval.run --model org/tiny --suite s.yaml",
        "date": "2026-01-01T00:00:00",
        "seconds": {"total": 1.0},
    },
    "checks": [{"name": "better than order 2", "passed": False, "detail": "3.0 against 2.0"}],
    "lm_eval": {
        "max_length": None,
        "bos": "tokenizer",
        "batch_size": 4,
        "limit": None,
        "tasks": {
            "piqa": {
                "file": "piqa.jsonl",
                "sha256": "00",
                "n": 10,
                "reported": ["acc"],
                "metrics": {
                    "acc": {"value": 0.6, "stderr": 0.01},
                    "acc_norm": {"value": 0.5, "stderr": None},
                },
            }
        },
        "averages": {},
        "published": None,
    },
    "length": {
        "last": 100,
        "places": 10,
        "block": 0,
        "bucket": 2048,
        "files": [{"file": "data/book.txt", "sha256": "00"}],
        "a": [
            {
                "window": 1024,
                "perplexity": 9.0,
                "nats": 2.2,
                "stderr": 0.1,
                "n": 7,
                "reason": None,
                "change": 0.0,
                "change_stderr": 0.0,
            },
            {
                "window": 2048,
                "perplexity": None,
                "nats": None,
                "stderr": None,
                "n": 0,
                "change": None,
                "change_stderr": None,
                "reason": "out of memory at 2,048 tokens",
            },
        ],
        "b": [],
    },
}
RUN = Run(THIS, RESULTS)


def test_a_new_card_has_the_numbers_with_their_command() -> None:
    text = fill(TEMPLATE.read_text(), "tiny", [RUN])
    for expected in (
        "# tiny\n",
        "| parameters | 31,512 in float32 |",
        "`python -m eval.run --model org/tiny --suite s.yaml`",
        "| piqa | acc | 0.6000 ± 0.0100 | 10 | yes |",
        "- Trained on rows of 64 tokens.",
        "lowest at 1,024 tokens of context (9.00)",
        "Perplexity at 2,048 tokens was not measured: out of memory at 2,048 tokens.",
        "- Failed: better than order 2 (3.0 against 2.0).",
        "{One sentence: what it is",
    ):
        assert expected in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == (
        "transformers",
        "text-generation",
        "tiny",
    )
    values = [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results]
    assert values == [
        ("piqa", "acc", 0.6),
        ("book.txt", "perplexity at 1024 tokens", 9.0),
    ]
    assert data.eval_results[0].metric_args == {"command": RESULTS["header"]["command"]}


def test_what_people_wrote_stays(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    results = copy.deepcopy(RESULTS)
    results["header"]["model"]["name"] = str(model)
    paths = write_card([Run(THIS, results)], "tiny", tmp_path / "cards")
    assert paths == [tmp_path / "cards" / "tiny.md", model / "README.md"]
    first = paths[0].read_text()
    assert write_card([Run(THIS, results)], "tiny", tmp_path / "cards") == paths
    assert paths[0].read_text() == first
    written = first.replace("{One sentence: what it is", "A judgement. {One sentence: what it is")
    written = written.replace("library_name:", "license: apache-2.0\nlibrary_name:")
    paths[0].write_text(written)
    results["lm_eval"]["tasks"]["piqa"]["metrics"]["acc"]["value"] = 0.7
    write_card([Run(THIS, results)], "tiny", tmp_path / "cards")
    again = paths[0].read_text()
    assert again == paths[1].read_text()
    assert "A judgement. " in again
    assert "license: apache-2.0" in again
    assert "0.7000 ± 0.0100" in again
    assert "0.6000" not in again


def test_bad_cards_and_mixed_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have <!-- begin: model -->"):
        fill("# A card without markers\n", "tiny", [RUN])
    other = copy.deepcopy(RESULTS)
    other["header"]["model"]["weights"] = "sha256 5678"
    with pytest.raises(ValueError, match="a card is of one model"):
        fill(TEMPLATE.read_text(), "tiny", [RUN, Run(THIS, other)])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main([str(tmp_path / "results.json"), "--name", "tiny"])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    main([str(tmp_path), "--name", "tiny", "--cards", str(tmp_path / "cards")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "cards" / "tiny.md")
    assert (tmp_path / "cards" / "tiny.md").is_file()
