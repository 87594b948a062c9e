"""Which implementation runs, and the errors of an operator's arguments."""

import pytest
import torch

import ssm_hf
from ssm_hf.ops import causal_conv1d, linear_scan, selective_scan, ssd
from ssm_hf.ops.dispatch import OPERATORS, ImplementationUnavailableError
from tests.ops.cases import CASES, Case


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_triton_is_refused_with_the_reason_until_it_exists(case: Case) -> None:
    sequences, weights, _ = case.draw(1, 3)
    with pytest.raises(ImplementationUnavailableError, match=r"no Triton kernel .* impl=\"auto\""):
        case.run(**sequences, **weights, **case.options, impl="triton")
    expected = case.run(**sequences, **weights, **case.options)
    assert torch.equal(case.run(**sequences, **weights, **case.options, impl="reference"), expected)


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


def test_table_of_implementations_names_every_operator(capsys: pytest.CaptureFixture) -> None:
    assert set(ssm_hf.implementations("cpu")) == set(OPERATORS)
    ssm_hf.print_implementations("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(OPERATORS)
    assert all("reference" in line and "no Triton kernel" in line for line in lines)


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
