"""Every example runs as a stranger would run it, and the documentation's code does what it says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import relative_error

ROOT = Path(__file__).parents[1]
# What the output must hold, in this order. Arguments keep a run short.
EXPECTED: dict[str, tuple[list[str], list[str]]] = {
    "generate.py": (
        [],
        [
            r"greedy:  A recurrent model reads a text once and keeps a sta\n",
            r"sampled: A recurrent .+\n",
            r"batch:   A recurrent model reads a text once a\n",
            r"batch:   keeps a state of fixed si\n",
            r"37,376 bytes of state: A recurrent model reads a t\n",
            r"37,376 bytes of state: A recurrent state of fixed \n",
            r"speculative decoding gives the greedy text: True",
        ],
    ),
    "load_pretrained.py": (
        [],
        [
            r"transformers -> ssm_hf: \d\.\de-(0[6-9]|[1-9]\d) apart",
            r"ssm_hf -> transformers: 0\.0e\+00 apart",
            r"mamba_ssm -> ssm_hf: \d\.\de-(0[6-9]|[1-9]\d) apart",
        ],
    ),
    "train_tiny.py": (
        ["20"],
        [r"parameters", r"step +1 +loss 5\.", r"step +20 +loss [12]\.", r"\ndef "],
    ),
}


def test_every_example_is_listed() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example_prints_what_it_promises(name: str, tmp_path: Path) -> None:
    arguments, patterns = EXPECTED[name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    position = 0
    for pattern in patterns:
        found = re.compile(pattern).search(result.stdout, position)
        assert found, f"{pattern!r} does not follow in:\n{result.stdout}"
        position = found.end()
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize("name", EXPECTED)
def test_example_is_short(name: str) -> None:
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 60


def load_documented_modules(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules that a page shows, each a python block that starts with its path."""
    blocks = re.findall(
        r"```python\n# src/(\S+)\.py\n(.*?)```", (ROOT / page).read_text(), re.DOTALL
    )
    modules = []
    for path, code in blocks:
        name = path.replace("/", ".")
        file = folder / f"{name}.py"
        file.write_text(code)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        modules.append(module)
    return modules


@torch.no_grad()
def test_documented_mixer_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, configuration, modeling = load_documented_modules(
        "docs/adding_a_mixer.md", tmp_path, monkeypatch
    )
    with pytest.raises(ValueError, match="hidden_sise=3; did you mean 'hidden_size'"):
        configuration.GatedConfig(hidden_sise=3)
    config = configuration.GatedConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)
    model = modeling.GatedForCausalLM(config).double().eval()
    ids = torch.randint(3, 96, (1, 20))

    # fp64 rounding, as in the laws
    separate = torch.cat([model(part).logits for part in ids.split([7, 13], dim=1)], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    assert relative_error(model(ids, position_ids=positions).logits, separate) < 1e-10
    mask = torch.ones_like(ids)
    mask[0, [0, 1, 9]] = 0
    padded = model(ids, attention_mask=mask).logits[mask.bool()]
    assert relative_error(padded, model(ids[mask.bool()][None]).logits[0]) < 1e-10

    greedy = model.generate(ids, max_new_tokens=12, use_cache=False)
    assert model.generate(ids, max_new_tokens=12).tolist() == greedy.tolist()
    looked_up = model.generate(ids, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert looked_up.tolist() == greedy.tolist()

    spared = model.parameter_groups(0.1)[1]["names"]
    assert "backbone.layers.1.mixer.decay" in spared
    model.float().save_pretrained(tmp_path / "saved")
    half = modeling.GatedForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.backbone.layers[0].mixer.decay.dtype == torch.float32
    assert half.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
