"""Models that the suite was not written for pass through all of it: eval/ names no class."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ssm_hf
from eval.run import main

MODELS = Path(__file__).parents[2] / "configs" / "model"


def _save(toy: str, directory: Path) -> None:
    """A toy of configs/model with a byte tokenizer, random weights and predictions that differ."""
    tokenizer = ssm_hf.byte_tokenizer()
    config = AutoConfig.from_pretrained(MODELS / f"{toy}.json", vocab_size=len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(("toy", "attention_layers"), [("mamba3-toy", 0), ("hybrid-toy", 1)])
def test_every_section(toy: str, attention_layers: int, run_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / toy / "final"
    _save(toy, model)
    row = {"goal": "boil | water", "sol1": "heat it", "sol2": "cool it", "label": 0}
    (run_dir / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"""
perplexity: {{files: [{run_dir}/heldout.jsonl], window: 32, stateful: true}}
length: {{files: [{run_dir}/heldout.jsonl], windows: [16, 64], last: 8, places: 2, block: 64,
  bucket: 16, chunk: 24}}
lm_eval: {{tasks: {{piqa: {run_dir}/piqa.jsonl}}}}
ruler: {{tasks: [niah_single_1], lengths: [1024], samples: 1, cache: {tmp_path}/ruler}}
consistency: {{files: [{run_dir}/heldout.jsonl], samples: 4, tokens: 48, piece: 7, batch_size: 3,
  new_tokens: 4}}
efficiency: {{lengths: [32], batch_sizes: [1, 2], new_tokens: 2, warmup: 1, repeats: 2}}
generate: {{prompts: ["x"], max_new_tokens: 4, do_sample: false}}
"""
    )
    output = tmp_path / "report"
    arguments = ["--model", str(model), "--suite", str(suite), "--output", str(output)]
    assert main(arguments) == 0
    results = json.loads((output / "results.json").read_text())
    # The same answers in batches padded on either side, in pieces and token by token.
    comparisons = results["consistency"]["comparisons"]
    assert {c["name"]: c["passed"] for c in comparisons} == {c["name"]: True for c in comparisons}
    assert len(comparisons) == 4
    generation = results["consistency"]["generation"]
    assert generation["equal"] == generation["prompts"] > 0
    assert results["header"]["model"]["attention_layers"] == attention_layers
    (length,) = results["efficiency"]["lengths"]
    # A key-value cache grows with the text, a state does not.
    assert (results["header"]["model"]["state_bytes_per_token"] > 0) == (attention_layers > 0)
    for measured in (length["prefill"], length["first_token"], *length["decode"].values()):
        assert "reason" not in measured
    assert [w["n"] for w in results["length"]["a"]] == [6, 6]
    (cell,) = results["ruler"]["cells"]
    assert cell["samples"] == 1
    assert "RULER" in (output / "report.md").read_text()
