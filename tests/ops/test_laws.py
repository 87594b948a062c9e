"""Every scan and convolution against its definition: outputs, states and all gradients, in fp64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ssm_hf.ops.packing import document_numbers
from ssm_hf.ops.selective_scan import reference as s6_reference
from ssm_hf.ops.ssd import reference as ssd_reference
from tests.helpers import relative_error
from tests.ops.cases import CASES, Case, document_by_document

# fp64 rounding over at most 200 additions, with decays below 1.
TOLERANCE = 1e-12
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def _grads(y: Tensor, state: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for out in (y, state):
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        loss = loss + ((out.abs() if out.is_complex() else out) * weight).sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def _assert_equals_definition(
    case: Case, batch: int, length: int, *, seq_idx=None, mask=None, with_state=True
) -> None:
    sequences, weights, state = case.draw(batch, length)
    given = state if with_state else None
    y, final = case.run(
        **sequences,
        **weights,
        **case.options,
        initial_state=given,
        seq_idx=seq_idx,
        mask=mask,
        return_final_state=True,
    )
    expected_y, expected_final = document_by_document(
        case, sequences, weights, given, seq_idx, mask
    )
    leaves = [*sequences.values(), *weights.values(), *([state] if with_state else [])]
    got = [y, final, *_grads(y, final, leaves)]
    expected = [expected_y, expected_final, *_grads(expected_y, expected_final, leaves)]
    for value, right in zip(got, expected, strict=True):
        assert value.shape == right.shape
        assert relative_error(value, right) < TOLERANCE


@cases
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130])
def test_op_equals_definition(case: Case, length: int) -> None:
    _assert_equals_definition(case, 2, length)


@cases
def test_op_without_initial_state_starts_from_zero(case: Case) -> None:
    _assert_equals_definition(case, 2, 9, with_state=False)


def _padding(kind: str, length: int) -> Tensor:
    mask = torch.ones(4, length, dtype=torch.bool)
    for row in range(4):
        pads = (0, 1, length // 2, length)[row]  # none, one, half, and a row of pads alone
        if kind == "left":
            mask[row, :pads] = False
        elif kind == "right":
            mask[row, length - pads :] = False
        else:
            mask[row, torch.randperm(length)[:pads]] = False
    return mask


@cases
@pytest.mark.parametrize("kind", ["left", "right", "middle"])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_op_padding_equals_removal(case: Case, kind: str, length: int) -> None:
    _assert_equals_definition(case, 4, length, mask=_padding(kind, length))


@cases
@pytest.mark.parametrize("length", [5, 40])
def test_op_packed_equals_separate(case: Case, length: int) -> None:
    seq_idx = (torch.rand(3, length) < 0.2).cumsum(1) * 3 + 7
    _assert_equals_definition(case, 3, length, seq_idx=seq_idx)


@cases
@pytest.mark.parametrize("kind", ["left", "right", "middle"])
def test_op_packed_and_padded_equals_separate(case: Case, kind: str) -> None:
    seq_idx = (torch.rand(4, 40) < 0.2).cumsum(1)
    _assert_equals_definition(case, 4, 40, seq_idx=seq_idx, mask=_padding(kind, 40))


@cases
def test_op_cu_seqlens_gives_a_state_per_document(case: Case) -> None:
    offsets = [0, 3, 3, 4, 20, 37, 39, 55]  # an empty document among them
    cu_seqlens = torch.tensor(offsets)
    sequences, weights, state = case.draw(1, offsets[-1], states=len(offsets) - 1)
    y, final = case.run(
        **sequences,
        **weights,
        **case.options,
        initial_state=state,
        cu_seqlens=cu_seqlens,
        return_final_state=True,
    )
    ys, finals = [], []
    for d, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            finals.append(state[d : d + 1])
            continue
        part = {n: s[:, start:end] for n, s in sequences.items()}
        one_y, one_final = case.definition(
            **part, **weights, **case.options, state=state[d : d + 1]
        )
        ys.append(one_y)
        finals.append(one_final)
    expected_y, expected_final = torch.cat(ys, 1), torch.cat(finals)
    leaves = [*sequences.values(), *weights.values(), state]
    got = [y, final, *_grads(y, final, leaves)]
    expected = [expected_y, expected_final, *_grads(expected_y, expected_final, leaves)]
    for value, right in zip(got, expected, strict=True):
        assert value.shape == right.shape
        assert relative_error(value, right) < TOLERANCE


@cases
@pytest.mark.parametrize("cuts", [(1,), (20,), (1, 2, 39), (3, 17)])
def test_op_one_pass_equals_pieces_with_state(case: Case, cuts: tuple[int, ...]) -> None:
    sequences, weights, state = case.draw(2, 40)
    whole, final = case.run(
        **sequences, **weights, **case.options, initial_state=state, return_final_state=True
    )
    ys, current, edges = [], state, (0, *cuts, 40)
    for start, end in pairwise(edges):
        part = {n: s[:, start:end] for n, s in sequences.items()}
        y, current = case.run(
            **part, **weights, **case.options, initial_state=current, return_final_state=True
        )
        ys.append(y)
    assert relative_error(torch.cat(ys, dim=1), whole) < TOLERANCE
    assert relative_error(current, final) < TOLERANCE


@cases
def test_op_gradcheck(case: Case) -> None:
    sequences, weights, state = case.draw(2, 6)
    names = [*sequences, *weights]
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1]]).bool()

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, initial_state = values
        return case.run(
            **dict(zip(names, inputs, strict=True)),
            **case.options,
            initial_state=initial_state,
            seq_idx=seq_idx,
            mask=mask,
            return_final_state=True,
        )

    # against finite differences along random directions
    leaves = (*sequences.values(), *weights.values(), state)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@cases
def test_op_half_precision_keeps_wide_states(case: Case) -> None:
    if case.complex:
        pytest.skip("there is no half-precision complex dtype")
    sequences, weights, _ = case.draw(2, 50)
    half = {n: s.detach().bfloat16() for n, s in sequences.items()}
    wide = {n: s.double() for n, s in half.items()}
    weights = {n: w.detach().float() for n, w in weights.items()}
    y, final = case.run(**half, **weights, **case.options, return_final_state=True)
    expected, expected_final = case.run(
        **wide,
        **{n: w.double() for n, w in weights.items()},
        **case.options,
        return_final_state=True,
    )
    assert y.dtype == torch.bfloat16
    is_conv = "weight" in weights
    assert final.dtype == (torch.bfloat16 if is_conv else torch.float32)
    # y is rounded once, to 8 bits; states are formed in fp32 from the same inputs.
    assert relative_error(y, expected) < 2**-8
    assert relative_error(final, expected_final) < case.state_rounding


@cases
def test_op_is_left_alone_by_autocast(case: Case) -> None:
    if case.complex:
        pytest.skip("there is no half-precision complex dtype")
    sequences, weights, _ = case.draw(2, 20, dtype=torch.float32)
    half = {n: s.detach().bfloat16().requires_grad_() for n, s in sequences.items()}
    leaves = [*half.values(), *weights.values()]
    results = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, final = case.run(**half, **weights, **case.options, return_final_state=True)
        results.append([y, final, *_grads(y, final, leaves)])
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


@cases
def test_op_accepts_strided_and_expanded_inputs(case: Case) -> None:
    sequences, weights, _ = case.draw(1, 9)
    strided = {
        n: torch.stack([s.detach(), s.detach()], dim=-1)[..., 0].expand(3, *s.shape[1:])
        for n, s in sequences.items()
    }
    y = case.run(**strided, **weights, **case.options)
    expected = case.run(**sequences, **weights, **case.options)
    for row in range(3):
        assert relative_error(y[row], expected[0]) < TOLERANCE


def test_selective_scan_does_not_depend_on_block_length(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["selective_scan-all"]
    for block in (1, 2, 7, 64):
        monkeypatch.setattr(s6_reference, "_tokens_per_block", lambda x, n, block=block: block)
        _assert_equals_definition(case, 2, 65, seq_idx=(torch.rand(2, 65) < 0.1).cumsum(1))


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 1000])
def test_ssd_does_not_depend_on_chunk_size(chunk_size: int) -> None:
    case = CASES["ssd-all"]
    case.options["chunk_size"], before = chunk_size, case.options["chunk_size"]
    try:
        _assert_equals_definition(case, 2, 65, seq_idx=(torch.rand(2, 65) < 0.1).cumsum(1))
    finally:
        case.options["chunk_size"] = before


def test_ssd_keeps_fp32_accuracy_behind_a_huge_decay() -> None:
    # One token with an exponent of -3e4 in the chunk: fp32 differences of a running sum would
    # lose the decays of all tokens after it.
    x, B, C = (torch.randn(1, 64, *s, dtype=torch.float64) for s in ((1, 4), (1, 8), (1, 8)))
    dt = torch.full((1, 64, 1), 1e-2, dtype=torch.float64)
    dt[0, 3] = 3e3
    A = torch.tensor([-10.0], dtype=torch.float64)
    expected, _ = ssd_reference.ssd_recurrent(x, dt, A, B, C, x.new_zeros(1, 1, 4, 8), None)
    single = [v.float() for v in (x, dt, A, B, C)]
    y, _ = ssd_reference.ssd_chunked(*single, single[0].new_zeros(1, 1, 4, 8), None, 64)
    assert relative_error(y, expected) < 1e-5


def test_ssd_and_selective_scan_stay_finite_where_decays_underflow() -> None:
    for name in ("ssd", "selective_scan"):
        case = CASES[name]
        sequences, weights, state = case.draw(1, 20, dtype=torch.float32)
        sequences["dt"] = (sequences["dt"].detach() * 100).requires_grad_()
        y, final = case.run(
            **sequences, **weights, **case.options, initial_state=state, return_final_state=True
        )
        for value in (y, final, *_grads(y, final, [*sequences.values(), *weights.values(), state])):
            assert torch.isfinite(value).all()


def test_document_numbers_skip_pads_and_ignore_values() -> None:
    seq_idx = torch.tensor([[9, 9, 4, 4, 4, 9], [5, 5, 5, 1, 1, 1]])
    assert document_numbers(seq_idx, None).tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1]]
    mask = torch.tensor([[0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0]]).bool()
    assert document_numbers(seq_idx, mask).tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]]
