"""Every example runs as a stranger would run it, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
