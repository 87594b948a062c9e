"""The command line from end to end."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import ssm_hf
from eval import report
from eval.model import load_model
from eval.run import main, parse_overrides

DEMO = Path(__file__).parents[2] / "configs" / "eval" / "demo.yaml"
FILES = {"results.json", "report.md", "report.html"}
PLOTS = {"bits_per_byte.svg", "loss_by_position.svg"}


def _demo(model: Path, run: Path, output: Path, *overrides: str) -> int:
    arguments = ["--model", str(model), "--suite", str(DEMO), "--output", str(output)]
    arguments += ["--variables.run", str(run), "--generate.max_new_tokens", "8"]
    arguments += ["--length", "null", "--efficiency", "null", *overrides]  # tested below
    return main(arguments)


def test_demo_suite_reports_model_and_baselines(
    model_dir: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    # An untrained model loses against any n-gram, and the suite asks for better.
    assert _demo(model_dir, run_dir, output) == 1
    assert {path.name for path in output.iterdir()} == {*FILES, "plots", "samples"}
    assert {path.name for path in (output / "plots").iterdir()} == PLOTS
    results = json.loads((output / "results.json").read_text())
    (score,) = results["perplexity"]["files"]
    (baseline,) = results["ngram"]["files"]
    assert score["documents"] == 3
    assert score["bits_per_byte"] > baseline["bits_per_byte"]["2"]
    assert [check["passed"] for check in results["checks"]] == [False]
    assert results["ngram"]["bytes"] == results["ngram"]["tokens"] - 2
    model = results["header"]["model"]
    parameters = sum(
        t.numel()
        for t in load_model(
            str(model_dir), dtype="auto", device="cpu", prefix="auto"
        ).model.parameters()
    )
    assert model["parameters"] == parameters
    # Two layers of 4 heads x 16 x 8 states and, of 64 + 2 * 8 channels, the convolution's inputs;
    # 3 inputs or the whole kernel of 4, all fp32.
    assert model["state_bytes"] in [2 * 4 * (4 * 16 * 8 + 80 * kept) for kept in (3, 4)]
    assert model["state_bytes_per_token"] == 0

    shown = capsys.readouterr().out
    assert f"{score['bits_per_byte']:.4f}" in shown
    assert "byte n-gram, order 2" in shown
    assert "byte n-gram, order 5" in shown
    assert "  | def " in shown
    assert "FAILED" in shown
    for name in FILES:
        assert str(output / name) in shown
    text = (output / "report.md").read_text()
    page = (output / "report.html").read_text()
    for expected in ("Witten-Bell", "SHA-256", model["weights"], "FAILED", "loss_by_position"):
        assert expected in text
    for expected in ("Witten-Bell", "SHA-256", model["weights"], "FAILED", "<svg role="):
        assert expected in page


def test_report_is_the_same_from_the_json(model_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    _demo(model_dir, run_dir, output)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(output / "results.json", copy)
    report.main([str(copy / "results.json")])
    for name in (*FILES, *(f"plots/{name}" for name in PLOTS)):
        assert (copy / name).read_bytes() == (output / name).read_bytes(), name


def test_all_sections_run_together_and_stand_side_by_side(
    model_dir: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"goal": "boil | water", "sol1": "heat it", "sol2": "cool it", "label": 0}
    (run_dir / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    suite = tmp_path / "all.yaml"
    suite.write_text(
        f"""
training_length: 64
perplexity: {{files: [{run_dir}/heldout.jsonl], window: 32, stateful: false}}
length: {{files: [{run_dir}/heldout.jsonl], windows: [16, 32, 512], last: 8, places: 2, block: 64,
  bucket: 16, chunk: 16}}
lm_eval: {{tasks: {{piqa: {run_dir}/piqa.jsonl}}}}
consistency: {{files: [{run_dir}/heldout.jsonl], samples: 3, tokens: 16}}
efficiency: {{lengths: [8, 32], batch_sizes: [1, 2], new_tokens: 2, warmup: 1, repeats: 2}}
generate: {{prompts: ["x"], max_new_tokens: 4, do_sample: false}}
"""
    )
    copy = tmp_path / "other" / "final"
    shutil.copytree(model_dir, copy)
    outputs = []
    for i, model in enumerate((model_dir, copy)):
        outputs.append(tmp_path / f"report{i}")
        arguments = ["--model", str(model), "--suite", str(suite), "--output", str(outputs[-1])]
        assert main(arguments) == 0
    results = json.loads((outputs[0] / "results.json").read_text())
    assert {"perplexity", "length", "lm_eval", "consistency", "efficiency", "generate"} < set(
        results
    )
    assert "ngram" not in results
    assert results["header"]["training_length"] == 64
    assert results["header"]["command"].startswith("python -m eval.run --model")
    assert results["lm_eval"]["tasks"]["piqa"]["n"] == 1
    assert results["lm_eval"]["averages"] == {}
    assert results["lm_eval"]["published"] is None
    windows = results["length"]["a"]
    assert [w["n"] for w in windows] == [6, 6, 0]
    assert windows[2]["reason"] == "no document is that long"
    text = (outputs[0] / "report.md").read_text()
    for expected in (
        "| piqa | acc |",
        "state is reset every 32",
        "unlimited",
        "no document is that",
    ):
        assert expected in text
    capsys.readouterr()
    both = tmp_path / "both"
    report.main([str(outputs[0]), str(outputs[1] / "results.json"), "--output", str(both)])
    shown = capsys.readouterr().out
    page = (both / "report.html").read_text()
    for name in ("other", model_dir.parent.name):
        assert name in shown
        assert f"<th>{name}</th>" in page
    assert page.count("<svg role=") == 4
    assert "src=" not in page
    with pytest.raises(SystemExit, match="2"):
        report.main([str(outputs[0]), str(outputs[1])])
    assert "several runs need --output" in capsys.readouterr().err


def test_samples_follow_from_the_seed(model_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    texts = []
    for i, seed in enumerate(["0", "0", "1"]):
        _demo(model_dir, run_dir, tmp_path / str(i), "--seed", seed)
        results = json.loads((tmp_path / str(i) / "results.json").read_text())
        texts.append([sample["text"] for sample in results["generate"]["samples"]])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_missing_input_file_fails_before_the_model_loads(run_dir: Path, tmp_path: Path) -> None:
    no_weights = tmp_path / "no_weights"
    ssm_hf.byte_tokenizer().save_pretrained(no_weights)
    (run_dir / "seen_tokens.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"seen_tokens\.bin does not exist"):
        _demo(no_weights, run_dir, tmp_path / "report")
    (run_dir / "heldout.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"heldout\.jsonl holds no text"):
        _demo(no_weights, run_dir, tmp_path / "report")


def test_tokenizer_without_eos_fails_before_the_model_loads(tmp_path: Path, run_dir: Path) -> None:
    tokenizer = ssm_hf.byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="section generate needs a tokenizer with an end-of-text"):
        _demo(tmp_path / "no_eos", run_dir, tmp_path / "report")
    with pytest.raises(ValueError, match="has no eos token to put before a document"):
        _demo(tmp_path / "no_eos", run_dir, tmp_path / "report", "--prefix", "eos")
    with pytest.raises(ValueError, match="no_model: its tokenizer cannot be loaded"):
        _demo(tmp_path / "no_model", run_dir, tmp_path / "report")


def test_missing_weights_are_refused(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("A_log"))
    del weights[name]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="A_log"):
        load_model(str(broken), dtype="auto", device="cpu", prefix="auto")


def test_overrides_take_both_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_overrides(["--a.b", "1", "--c=x=y", "--d", "--e"]) == [
        ("a.b", "1"),
        ("c", "x=y"),
        ("d", "--e"),
    ]
    for rest in (["--seed"], ["seed", "3"]):
        with pytest.raises(SystemExit, match="2"):
            main(["--model", "m", "--suite", str(DEMO), *rest])
        assert f"expected --section.key VALUE, got '{rest[0]}'" in capsys.readouterr().err


def test_ngrams_need_a_byte_tokenizer(model_dir: Path, run_dir: Path, tmp_path: Path) -> None:
    shifted = tmp_path / "shifted"
    shutil.copytree(model_dir, shifted)
    tokenizer = json.loads((shifted / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (shifted / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"token ids 0\.\.255 are the bytes"):
        _demo(shifted, run_dir, tmp_path / "report")
