"""Which implementation runs, and the errors of an operator's arguments."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import ssm_hf
from ssm_hf.ops import (
    causal_conv1d,
    dispatch,
    linear_scan,
    selective_scan,
    ssd,
)
from ssm_hf.ops.dispatch import OPERATORS, ImplementationUnavailableError, pick
from tests.helpers import kernel_device, relative_error
from tests.ops.cases import CASES, Case

# The operator that has no kernel yet, and those that have one.
WITHOUT = {name: case for name, case in CASES.items() if case.run is linear_scan}
WITH = {name: case for name, case in CASES.items() if name not in WITHOUT}
over_kernels = pytest.mark.parametrize("case", WITH.values(), ids=WITH.keys())


def _draw(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    sequences, weights, _ = case.draw(1, 3)
    drawn = {**sequences, **weights}
    return {name: value.detach().to(device, dtype) for name, value in drawn.items()}


@pytest.mark.parametrize("case", WITHOUT.values(), ids=WITHOUT.keys())
def test_triton_is_refused_where_there_is_no_kernel(case: Case) -> None:
    inputs = _draw(case, torch.complex64 if case.complex else torch.float32, torch.device("cpu"))
    with pytest.raises(ImplementationUnavailableError, match=r"no Triton kernel .* impl=\"auto\""):
        case.run(**inputs, **case.options, impl="triton")
    expected = case.run(**inputs, **case.options)
    assert torch.equal(case.run(**inputs, **case.options, impl="reference"), expected)


def test_kernels_that_no_gpu_has_checked_run_on_request_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_UNPROVEN", ("ssd",))
    cuda, run = torch.device("cuda"), {"reference": lambda: "torch", "triton": lambda: "kernels"}
    with caplog.at_level(logging.WARNING, "ssm_hf"):
        assert pick("ssd", "auto", cuda, **run)() == "torch"
    assert "not been checked on a GPU" in caplog.text
    assert not dispatch.runs_kernels("ssd", cuda)
    assert ssm_hf.implementations("cuda")["ssd"][0] == "reference"
    assert pick("ssd", "triton", cuda, **run)() == "kernels"
    with ssm_hf.implementation("triton"):
        assert pick("ssd", "auto", cuda, **run)() == "kernels"
        assert dispatch.runs_kernels("ssd", cuda)


@over_kernels
def test_triton_runs_on_a_gpu_or_in_the_interpreter(case: Case) -> None:
    inputs = _draw(case, torch.float32, kernel_device())
    got = case.run(**inputs, **case.options, impl="triton")
    expected = case.run(**inputs, **case.options, impl="reference")
    # fp32 on both sides, sums of a few terms
    assert relative_error(got, expected) < 1e-5


@over_kernels
@pytest.mark.parametrize(
    ("setting", "reason"),
    [("HAS_TRITON", "triton is not installed"), ("_INTERPRETED", "need a GPU, .* lie on cpu")],
)
def test_triton_is_refused_without_gpu_or_package(
    case: Case, setting: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, setting, False)
    inputs = _draw(case, torch.float32, torch.device("cpu"))
    with pytest.raises(ImplementationUnavailableError, match=reason + r".* impl=\"auto\""):
        case.run(**inputs, **case.options, impl="triton")
    expected = case.run(**inputs, **case.options, impl="reference")
    assert torch.equal(case.run(**inputs, **case.options), expected)


@over_kernels
def test_kernels_refuse_fp64_and_auto_takes_the_torch_path(case: Case) -> None:
    inputs = _draw(case, torch.float64, kernel_device())
    with pytest.raises(ImplementationUnavailableError, match=r"float32.* got torch.float64.*refer"):
        case.run(**inputs, **case.options, impl="triton")
    expected = case.run(**inputs, **case.options, impl="reference")
    assert torch.equal(case.run(**inputs, **case.options), expected)


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=kernel_device())


@pytest.mark.parametrize(
    ("op", "inputs", "message"),
    [
        (ssd, {"x": _ones(1, 2, 1, 257), "dt": _ones(1, 2, 1), "A": -_ones(1),
               "B": _ones(1, 2, 1, 4), "C": _ones(1, 2, 1, 4)}, "at most 256 .*P=257"),
        (ssd, {"x": _ones(1, 2, 1, 4), "dt": _ones(1, 2, 1), "A": -_ones(1),
               "B": _ones(1, 2, 1, 257), "C": _ones(1, 2, 1, 257)}, "at most .* 256 .*N=257"),
        (selective_scan, {"x": _ones(1, 2, 3), "dt": _ones(1, 2, 3), "A": -_ones(3, 257),
                          "B": _ones(1, 2, 257), "C": _ones(1, 2, 257)}, "256.*257"),
        (causal_conv1d, {"x": _ones(1, 2, 3), "weight": _ones(3, 33)}, "33"),
    ],
)  # fmt: skip
def test_kernels_refuse_sizes_that_they_do_not_support(op: Any, inputs: dict, message: str) -> None:
    with pytest.raises(ImplementationUnavailableError, match=message + r".*\"reference\""):
        op(**inputs, impl="triton")
    assert torch.equal(op(**inputs), op(**inputs, impl="reference"))


def test_auto_steps_down_on_a_gpu_with_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    cuda, run = torch.device("cuda"), {"reference": lambda: "torch", "triton": lambda: "kernels"}
    with caplog.at_level(logging.WARNING, "ssm_hf"):
        for _ in range(2):
            chosen = pick("ssd", "auto", cuda, **run, unsupported="N=999 is too much")
            assert chosen() == "torch"
    assert [r.getMessage() for r in caplog.records] == [
        "ssd runs its torch path on cuda: N=999 is too much"
    ]
    with pytest.raises(ImplementationUnavailableError, match="N=999 is too much"):
        pick("ssd", "triton", cuda, **run, unsupported="N=999 is too much")
    assert pick("ssd", "auto", cuda, **run)() == "kernels"
    # The interpreter must be asked for by name.
    assert pick("ssd", "auto", torch.device("cpu"), **run)() == "torch"


@over_kernels
def test_kernels_refuse_tensors_on_another_device(case: Case) -> None:
    inputs = _draw(case, torch.float32, kernel_device())
    first, *others = inputs
    for name in others:
        moved = {**inputs, name: inputs[name].to("meta")}
        with pytest.raises(ValueError, match=f"{name} lies on meta, expected .*{first} lies"):
            case.run(**moved, **case.options, impl="triton")


@over_kernels
def test_kernels_refuse_integer_inputs(case: Case) -> None:
    inputs = _draw(case, torch.float32, kernel_device())
    first = next(iter(inputs))
    with pytest.raises((ValueError, ImplementationUnavailableError), match=r"got torch.int64"):
        case.run(**{**inputs, first: inputs[first].long()}, **case.options, impl="triton")


def test_unknown_implementation_is_refused() -> None:
    a = torch.rand(1, 3, 2)
    with pytest.raises(ValueError, match=r"impl must be one of .* got 'cuda'"):
        linear_scan(a, a, impl="cuda")


def test_implementation_block_sets_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.rand(1, 3, 2)
    with ssm_hf.implementation("triton"):
        with pytest.raises(ImplementationUnavailableError):
            linear_scan(a, a)
        with ssm_hf.implementation("reference"):
            linear_scan(a, a)
        linear_scan(a, a, impl="reference")
    linear_scan(a, a)
    monkeypatch.setenv("SSM_HF_IMPL", "triton")
    with pytest.raises(ImplementationUnavailableError):
        linear_scan(a, a)
    monkeypatch.setenv("SSM_HF_IMPL", "fast")
    with pytest.raises(ValueError, match="environment variable SSM_HF_IMPL must be one of"):
        linear_scan(a, a)


def test_table_of_implementations_names_every_operator(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(ssm_hf.implementations("cpu")) == set(OPERATORS)
    ssm_hf.print_implementations("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(OPERATORS)
    assert all(line.split()[1] == "reference" for line in lines)

    on_gpu = ssm_hf.implementations("cuda")
    by_itself = set(OPERATORS) - {"linear_scan", *dispatch._UNPROVEN}
    assert {op for op in OPERATORS if on_gpu[op][0] == "triton"} == by_itself
    monkeypatch.setattr(dispatch, "_INTERPRETED", False)
    monkeypatch.setenv("SSM_HF_IMPL", "triton")
    table = ssm_hf.implementations("cpu")
    assert all(impl == "error" for impl, _ in table.values())
    assert "need a GPU" in table["ssd"][1]
    assert "no Triton kernel" in table["linear_scan"][1]
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert "pip install triton" in ssm_hf.implementations("cuda")["ssd"][1]


X, W = torch.ones(2, 5, 6), torch.ones(6, 4)
S6 = {"x": X, "dt": X, "A": torch.ones(6, 3), "B": X[..., :3], "C": X[..., :3]}
SSD = {"x": torch.ones(2, 5, 4, 3), "dt": torch.ones(2, 5, 4), "A": torch.ones(4),
       "B": torch.ones(2, 5, 2, 3), "C": torch.ones(2, 5, 2, 3)}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (causal_conv1d, {"x": X[0], "weight": W}, r"x must have shape \(B, T, C\)"),
        (causal_conv1d, {"x": X, "weight": W[:5]}, r"weight must have .* \(6, K\), got \(5, 4\)"),
        (causal_conv1d, {"x": X, "weight": W, "bias": W}, r"bias must have shape \(6,\)"),
        (causal_conv1d, {"x": X, "weight": W, "activation": "gelu"}, r"activation must be"),
        (causal_conv1d, {"x": X[:, :0], "weight": W}, r"expected T >= 1, got T=0"),
        (causal_conv1d, {"x": X, "weight": W, "initial_state": X},
         r"initial_state must have shape \(2, 3, 6\), got \(2, 5, 6\)"),
        (causal_conv1d, {"x": X, "weight": W, "mask": torch.ones(2, 5)}, r"mask must be a bool"),
        (causal_conv1d, {"x": X, "weight": W, "seq_idx": torch.ones(2, 4, dtype=torch.long)},
         r"seq_idx must be an integer tensor of shape \(2, 5\)"),
        (causal_conv1d, {"x": X, "weight": W, "cu_seqlens": torch.tensor([0, 5])},
         r"expected B=1, got B=2"),
        (causal_conv1d, {"x": X[:1], "weight": W, "cu_seqlens": torch.tensor([0, 5]),
                         "seq_idx": torch.ones(1, 5, dtype=torch.long)}, r"pass one of them"),
        (linear_scan, {"a": torch.ones(2, 4, 6), "b": X}, r"a must broadcast to b's shape"),
        (selective_scan, {**S6, "A": torch.ones(5, 3)}, r"A must have shape \(6, N\)"),
        (selective_scan, {**S6, "C": X}, r"C must have shape \(2, 5, 3\), got \(2, 5, 6\)"),
        (selective_scan, {**S6, "dt_limit": (2.0, 1.0)}, r"dt_limit must be"),
        (ssd, {**SSD, "B": torch.ones(2, 5, 3, 3)}, r"G dividing the 4 heads, got \(2, 5, 3, 3\)"),
        (ssd, {**SSD, "dt": X}, r"dt must have shape \(2, 5, 4\), got \(2, 5, 6\)"),
        (ssd, {**SSD, "D": torch.ones(3)}, r"D must have shape \(4,\) or \(4, 3\), got \(3,\)"),
        (ssd, {**SSD, "chunk_size": 0}, r"chunk_size must be at least 1"),
        (ssd, {**SSD, "initial_state": torch.ones(2, 4, 3)}, r"initial_state must have shape"),
    ],
)  # fmt: skip
def test_op_refuses_arguments_that_do_not_fit(op, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(**arguments)
