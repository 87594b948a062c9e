"""Every kernel compiles for GPUs of four architectures, on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.aot import TARGETS

ROOT = Path(__file__).parents[2]
KERNELS = {
    line.split("(")[0].removeprefix("def ")
    for path in (ROOT / "src" / "ssm_hf").rglob("kernels*.py")
    for line in path.read_text().splitlines()
    if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
}


def _compile(architecture: str, *options: str) -> str:
    """Output of a process of its own: here Triton's interpreter may be on."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    # Nobody debugs what is compiled here, and lines take a tenth of the time.
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    command = [sys.executable, "-m", "tests.ops.aot", *options, architecture]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("architecture", TARGETS)
def test_every_kernel_compiles(architecture: str) -> None:
    output = _compile(architecture)
    compiled = {word.strip(",") for word in output.split() if word.strip(",").endswith("_kernel")}
    assert compiled == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
def test_every_specialisation_of_the_cases_compiles(architecture: str) -> None:
    assert "launches compiled" in _compile(architecture, "--all")
