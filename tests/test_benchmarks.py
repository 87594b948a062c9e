"""The benchmarks' own rules, without a GPU: nothing wrong is timed, every target is reported."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common, ops, peers, report
from benchmarks.operators import GRID, OPERATORS

SMALL = {"B": 2, "T": 20, "H": 8, "G": 8, "P": 4, "N": 8, "I": 32, "V": 50, "documents": 3}
HEADER = {
    "device": {"name": "some GPU", "type": "cuda", "processors": 132},
    "ceilings": {"copy_tb_s": 3.0, "bf16_tflop_s": 700.0},
    "versions": {"torch": "2"},
    "commit": "0",
    "command": "python -m benchmarks.ops",
    "date": "2026-01-01",
}


def _small(name: str) -> ops.Case:
    _, operator, shape, dtype = next(row for row in GRID if row[0] == name)
    return ops.Case(
        name, operator, {k: min(v, SMALL.get(k, v)) for k, v in shape.items()}, dtype, False
    )


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every time is one millisecond; what is called runs on the CPU."""
    monkeypatch.setattr(common, "wall_ms", lambda run, seconds=0.1: (run(), 1.0)[1])
    monkeypatch.setattr(
        common, "device_ms", lambda runs, seconds=0.1: ([r() for r in runs], 1.0)[1]
    )
    monkeypatch.setattr(common, "ceilings", lambda: HEADER["ceilings"])
    monkeypatch.setattr(common, "device", lambda: HEADER["device"])
    monkeypatch.setattr(common, "rotations", lambda moved: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


NAMES = [
    "grid-ssd-100-documents",
    "grid-scan-fp32",
    "grid-conv-k3",
    "grid-gated-norm-g8",
    "add-norm-768",
    "attention-packed",
    "attention-selected",
]


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("name", NAMES)
def test_a_case_is_checked_timed_and_recorded(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = _small(name)
    right = functools.partial(OPERATORS[case.operator].run, impl="reference")

    def wrong(**inputs: Any) -> Any:
        result = right(inputs)
        return tuple(1.5 * y for y in result) if isinstance(result, tuple) else 1.5 * result

    def broken(**inputs: Any) -> Any:
        raise RuntimeError("no such kernel")

    def narrow(x: Any) -> Any:
        return right({"x": x})

    found = {"wrong": wrong, "broken": broken, "narrow": narrow, "absent": "not installed"}
    monkeypatch.setattr(peers, "load", lambda operator: found)
    monkeypatch.setattr(ops, "OURS", "reference")
    ops.bench(case, set(), tmp_path / "results.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    by_provider = {line["provider"]: line for line in lines}
    assert by_provider["ssm_hf"]["values"]["fwdbwd_device_ms"] == 1.0
    # The same path in bf16 or fp32 beside fp32 or fp64: rounding of the outputs alone.
    worst = max(by_provider["ssm_hf"]["errors"].values())
    assert worst < (1e-5 if case.dtype == torch.float32 else 1e-2)
    assert by_provider["wrong"]["values"] == {}
    assert "wrong: relative error" in by_provider["wrong"]["reason"]
    assert by_provider["broken"]["reason"] == "RuntimeError: no such kernel"
    assert by_provider["absent"]["reason"] == "not installed"
    assert by_provider["narrow"]["reason"].startswith("takes no ")


def test_targets_name_operators_and_shapes_that_can_be_run() -> None:
    targets = json.loads((common.ROOT / "benchmarks" / "targets.json").read_text())
    listed = [case for case in ops.cases() if case.listed]
    assert [row["id"] for row in targets["operators"]] == [case.name for case in listed]
    names = [case.name for case in ops.cases()] + [row["id"] for row in targets["models"]]
    assert len(set(names)) == len(names)
    for case in ops.cases():
        work = OPERATORS[case.operator].work(case.shape, case.dtype.itemsize, False)
        assert max(work.limits(targets["device"], 132).values()) > 0


def test_page_reports_every_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    targets = json.loads((common.ROOT / "benchmarks" / "targets.json").read_text())
    limits = {key: {"memory": 0.1, "matmul": 0.05, "exp": 0.0} for key in ("fwd", "fwdbwd")}
    for provider, time in (("ssm_hf", 0.2), ("peer", 0.6)):
        values = {f"{k}_{t}_ms": time for k in limits for t in ("device", "wall")}
        for name in ("ssd-130m", "conv-2.7b", "grid-ssd-fp32", "length-ssd-1024"):
            line = {"benchmark": "ops", "case": name, "provider": provider, "values": values,
                    "shape": {"T": 1024}, "dtype": "bfloat16", "limits_ms": limits}  # fmt: skip
            common.append(tmp_path / "ops.jsonl", {**line, **HEADER})
    training = {"benchmark": "training", "case": "train-130m-mamba2", "provider": "ssm_hf"}
    common.append(tmp_path / "t.jsonl", {**training, "values": {"tokens_per_s": 5e5}, **HEADER})
    page = report.page()
    for row in targets["operators"] + targets["models"]:
        assert row["title"] in page
    # 0.07 ms on the targets' GPU, at 4.26 TB/s; here 3.0: 0.0994
    assert "| SSD, 130M | forward | 0.200 | 0.200 | 0.0994 | no | 0.600 (peer) |" in page
    assert "| convolution, K 4, silu | forward + backward | 0.200 | 0.200 | 0.469 | yes |" in page
    assert "| 500,000 | 400,000 | yes |" in page
    assert "Worst ratio to a peer over all 8 comparisons: 3.00×" in page
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"length-ssd.svg", "limits.svg"}
