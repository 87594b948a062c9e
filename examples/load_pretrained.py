"""Checkpoints of transformers and of mamba_ssm in ssm_hf: the same logits from both.

Both checkpoints are written here, with random weights, so that nothing is downloaded.
Run: python examples/load_pretrained.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import ssm_hf


def main(folder: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 16}
    config = transformers.Mamba2Config(
        vocab_size=256, num_hidden_layers=2, tie_word_embeddings=True, **shape
    )
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    theirs.save_pretrained(folder / "transformers")
    ids = torch.randint(256, (1, 50))
    expected = theirs(ids).logits

    # 1. What transformers saved, in our class.
    ours = ssm_hf.Mamba2ForCausalLM.from_pretrained(folder / "transformers")
    print(f"transformers -> ssm_hf: {(ours(ids).logits - expected).abs().max():.1e} apart")

    # 2. What we save, in transformers' class.
    ours.save_pretrained(folder / "ssm_hf")
    back = transformers.Mamba2ForCausalLM.from_pretrained(folder / "ssm_hf")
    print(f"ssm_hf -> transformers: {(back(ids).logits - expected).abs().max():.1e} apart")

    # 3. The same weights as mamba_ssm publishes them, converted by the command.
    weights = {k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()}
    source = folder / "mamba_ssm"
    source.mkdir()
    torch.save(weights, source / "pytorch_model.bin")
    layer = {"layer": "Mamba2", "d_state": 16, "headdim": 32}
    text = json.dumps({"d_model": 64, "n_layer": 2, "vocab_size": 250, "ssm_cfg": layer})
    (source / "config.json").write_text(text)
    command = [sys.executable, "-m", "ssm_hf.convert", str(source), str(folder / "converted")]
    subprocess.run(command, check=True)

    # 4. Through the Auto classes, as scripts do that know no architecture.
    ssm_hf.register(override=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "converted")
    print(f"mamba_ssm -> {type(model).__module__.split('.')[0]}: "
          f"{(model(ids).logits - expected).abs().max():.1e} apart")  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
