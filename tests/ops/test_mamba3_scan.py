"""What is special to Mamba-3's scan; the laws that it shares are in test_laws.py."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssm_hf.ops import Mamba3State, mamba3_scan
from ssm_hf.ops.mamba3_scan import mamba3_scan_recurrent, rope_permutation
from ssm_hf.ops.mamba3_scan.reference import wrap
from tests.helpers import relative_error
from tests.ops.golden import mamba3 as golden

H, P = 4, 3
Inputs = dict[str, Any]


def draw(
    length: int,
    *,
    batch: int = 2,
    ranks: int = 1,
    groups: int = 2,
    n: int = 8,
    pairs: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Inputs, Mamba3State]:
    """Leaves: inputs of mamba3_scan with every option in use, and a state."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    tokens = (batch, length)
    inputs: Inputs = {
        "x": leaf(*tokens, H, P),
        "dt": leaf(*tokens, H),
        "A": -2 * torch.rand(*tokens, H, dtype=torch.float64),
        "trap": leaf(*tokens, H),
        "B": leaf(*tokens, ranks, groups, n),
        "C": leaf(*tokens, ranks, groups, n),
        "angles": leaf(*tokens, pairs) if pairs else None,
        "D": leaf(H),
        "z": leaf(*tokens, H, P),
        "B_bias": leaf(H, ranks, n),
        "C_bias": leaf(H, ranks, n),
        "dt_bias": leaf(H),
    }
    if ranks > 1:
        inputs |= {name: leaf(H, ranks, P) for name in ("mimo_x", "mimo_z", "mimo_o")}
    parts = (leaf(batch, H, pairs).abs(), leaf(batch, H, P, n), leaf(batch, ranks, H, n))
    state = Mamba3State(*parts, leaf(batch, H, P))
    inputs = {k: None if v is None else v.to(dtype).requires_grad_() for k, v in inputs.items()}
    return inputs, Mamba3State(*(v.to(dtype).requires_grad_() for v in state))


def run(inputs: Inputs, state: Mamba3State | None, **options) -> tuple[Tensor, Mamba3State]:
    out = mamba3_scan(
        **inputs, dt_softplus=True, initial_state=state, return_final_state=True, **options
    )
    assert isinstance(out, tuple)
    return out


def define(inputs: Inputs, state: Mamba3State | None, **options) -> tuple[Tensor, Mamba3State]:
    return mamba3_scan_recurrent(**inputs, dt_softplus=True, initial_state=state, **options)


def everything(result: tuple[Tensor, Mamba3State], leaves: list[Tensor]) -> list[Tensor]:
    """y, the four states, and gradients of all leaves for one random weighting of the outputs."""
    y, state = result
    generator = torch.Generator().manual_seed(1)
    outputs = [y, *state]
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in outputs]
    loss = torch.stack([(v * w).sum() for v, w in zip(outputs, weights, strict=True)]).sum()
    return outputs + list(torch.autograd.grad(loss, leaves, materialize_grads=True))


CONFIGS = {
    "siso": ({}, {}),
    "siso-half-full": ({"n": 6, "pairs": 3, "groups": 1}, {"rope_layout": "half"}),
    "no-rotation": ({"n": 5, "pairs": 0}, {}),
    "mimo2-full": ({"ranks": 2, "pairs": 4, "groups": 4}, {}),
    "mimo4-half": ({"ranks": 4, "groups": 1}, {"rope_layout": "half", "chunk_size": 16}),
}


@pytest.mark.parametrize(("shape", "options"), CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("trap", [True, False])
def test_chunks_equal_the_definition(shape: dict, options: dict, trap: bool) -> None:
    """Output, each of the four states and each of up to 19 gradients, over several chunks."""
    inputs, state = draw(70, **shape)
    if not trap:
        inputs["trap"] = None
    leaves = [v for v in (*inputs.values(), *state) if v is not None and v.numel()]
    layout = {k: v for k, v in options.items() if k == "rope_layout"}
    got = everything(run(inputs, state, **options), leaves)
    expected = everything(define(inputs, state, **layout), leaves)
    for value, right in zip(got, expected, strict=True):
        assert value.shape == right.shape
        # fp64 rounding over 70 additions, gradients of angles over 70 more
        assert relative_error(value, right) < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 33, 1000])
def test_chunk_size_does_not_matter(chunk_size: int) -> None:
    inputs, state = draw(70, ranks=2)
    seq_idx = (torch.rand(2, 70) < 0.1).cumsum(1)
    mask = torch.rand(2, 70) < 0.8
    leaves = [*inputs.values(), *state]
    got, expected = (
        everything(run(inputs, state, seq_idx=seq_idx, mask=mask, chunk_size=size), leaves)
        for size in (chunk_size, 64)
    )
    for value, right in zip(got, expected, strict=True):
        assert relative_error(value, right) < 1e-12


@pytest.mark.parametrize("per_rank", [False, True])
def test_one_rank_with_unit_projections_is_siso(per_rank: bool) -> None:
    inputs, state = draw(20)
    ones = torch.ones(H, 1, P, dtype=torch.float64)
    projections = dict.fromkeys(("mimo_x",) if per_rank else ("mimo_x", "mimo_z", "mimo_o"), ones)
    for f in (run, define):
        got, expected = f({**inputs, **projections}, state), f(inputs, state)
        for value, right in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
            # multiplications by 1 and sums of one term
            assert torch.equal(value, right)


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2])
def test_split_anywhere_equals_whole(ranks: int) -> None:
    inputs, state = draw(13, ranks=ranks)
    whole = {f: f(inputs, state) for f in (run, define)}
    for cut in range(1, 13):
        pieces = [
            {k: v[:, part] if v is not None and v.shape[:2] == (2, 13) else v
             for k, v in inputs.items()}
            for part in (slice(0, cut), slice(cut, 13))
        ]  # fmt: skip
        for f, (y, final) in whole.items():
            first, between = f(pieces[0], state)
            second, last = f(pieces[1], between)
            got, right = (torch.cat([first, second], dim=1), *last), (y, *final)
            for value, expected in zip(got, right, strict=True):
                if f is define:
                    assert torch.equal(value, expected)
                # chunks are cut elsewhere and add up in another order
                assert relative_error(value, expected) < 1e-14


@torch.no_grad()
@pytest.mark.parametrize("shape", [{"pairs": 2}, {"pairs": 3, "n": 6}, {"ranks": 2, "pairs": 3}])
def test_layouts_are_equal_after_permutation(shape: dict) -> None:
    inputs, state = draw(20, **shape)
    n, pairs = state.k.shape[-1], state.angle.shape[-1]
    order = rope_permutation(n, pairs)
    assert order.sort().values.tolist() == list(range(n))
    moved = {k: v[..., order] if k[:2] in ("B", "C", "B_", "C_") else v
             for k, v in inputs.items()}  # fmt: skip
    moved_state = state._replace(ssm=state.ssm[..., order], k=state.k[..., order])
    for f in (run, define):
        y, final = f(inputs, state)
        moved_y, moved_final = f(moved, moved_state, rope_layout="half")
        # sums over states run in another order
        assert relative_error(moved_y, y) < 1e-14
        assert torch.equal(moved_final.angle, final.angle)
        assert relative_error(moved_final.ssm, final.ssm[..., order]) < 1e-14
        assert torch.equal(moved_final.k, final.k[..., order])


def test_rope_permutation_says_what_it_takes() -> None:
    assert rope_permutation(8, 2).tolist() == [0, 2, 4, 5, 1, 3, 6, 7]
    for n, s in ((5, 1), (4, 3), (4, -1)):
        with pytest.raises(ValueError, match=rf"even n and 0 <= 2 s <= n, got n={n}, s={s}"):
            rope_permutation(n, s)


def _solution(steps: int, rule: str) -> float:
    """Error at time 3 of S' = A S + sin(t) k(t) with a turning k, read out by the same q = k."""
    A, turn, end = -0.7, 1.3, 3.0
    t = torch.linspace(0, end, steps + 1, dtype=torch.float64)
    tokens = (1, steps + 1)
    ones = torch.ones(*tokens, 1, dtype=torch.float64)
    axis = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(*tokens, 1, 1, 2)
    y = mamba3_scan(
        t.sin().view(*tokens, 1, 1),
        ones * end / steps,
        ones * A,
        0 * ones if rule == "trapezoid" else None,
        axis,
        axis,
        torch.full((*tokens, 1), math.atanh(turn / math.pi), dtype=torch.float64),
    )
    assert isinstance(y, Tensor)
    # y(t) = Re of the integral of exp((A + i turn) (t - s)) sin(s) from 0 to t
    p = complex(A, turn)
    exact = (np.exp(p * end) - p * math.sin(end) - math.cos(end)) / (1 + p * p)
    return abs(float(y[0, -1, 0, 0]) - exact.real)


@pytest.mark.parametrize(("rule", "order"), [("trapezoid", 2), ("euler", 1)])
def test_order_of_convergence(rule: str, order: int) -> None:
    errors = [_solution(steps, rule) for steps in (200, 400, 800)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.02)


@pytest.mark.parametrize("name", golden.CASES)
def test_golden_arrays(name: str) -> None:
    arrays, expected = golden.load()[name]
    inputs: Inputs = {k: torch.from_numpy(v) for k, v in arrays.items()}
    state = Mamba3State(*(inputs.pop(k) for k in Mamba3State._fields))
    for f in (run, define):
        y, final = f(inputs, state, rope_layout=golden.CASES[name][4])
        for key, value in {"y": y, **final._asdict()}.items():
            assert relative_error(value, torch.from_numpy(expected[key])) < 1e-14


def test_golden_arrays_are_what_their_script_computes() -> None:
    found = golden.load()
    for name in golden.CASES:
        inputs, expected = found[name]
        drawn = golden.draw(name)
        assert drawn.keys() == inputs.keys()
        assert all(np.array_equal(drawn[key], inputs[key]) for key in drawn)
        for key, value in golden.scan(name, inputs).items():
            # exp and cos of another machine may differ in their last bit
            np.testing.assert_allclose(value, expected[key], rtol=1e-13, atol=1e-13)


@torch.no_grad()
def test_angles_stay_exact_over_long_rows() -> None:
    inputs, _ = draw(4000, batch=1, ranks=1, groups=1)
    single = {k: v.float() for k, v in inputs.items() if v is not None}
    wide = {k: v.double() for k, v in single.items()}
    y, state = run(single, None)
    expected, expected_state = run(wide, None)
    assert state.angle.dtype == torch.float32
    off = torch.remainder(state.angle.double() - expected_state.angle + math.pi, 2 * math.pi)
    # the rounding of 4000 turns; angles kept in bf16 would be 0.015 off
    assert (off - math.pi).abs().max() < 5e-5
    assert relative_error(y, expected) < 2e-5


def test_half_precision_gradients() -> None:
    inputs, state = draw(70, ranks=2, dtype=torch.float32)
    for name in ("x", "B", "C", "z", "trap", "angles"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    half = state._replace(k=state.k.bfloat16(), v=state.v.bfloat16())
    wide_inputs: Inputs = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    wide_state = Mamba3State(*(v.detach().double().requires_grad_() for v in half))
    y, final = run(inputs, half)
    dtypes = [v.dtype for v in (y, *final)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    # the definition rounds k and v after every token, so fp64 of the chunked path stands for it
    expected = run(wide_inputs, wide_state)[0]
    assert relative_error(y, expected) < 2**-8
    dy = torch.randn_like(expected)
    got = torch.autograd.grad((y * dy).sum(), list(inputs.values()))
    right = torch.autograd.grad((expected * dy).sum(), list(wide_inputs.values()))
    for name, value, exact in zip(inputs, got, right, strict=True):
        assert value.dtype == inputs[name].dtype
        # dy and the gradients of 16-bit tensors are rounded once to 8 bits
        assert relative_error(value, exact) < 2**-7


def test_products_of_all_chunks_are_not_kept() -> None:
    inputs, state = draw(512, n=8, ranks=2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        run(inputs, state, chunk_size=32)
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in kept}
    given = sum(v.nbytes for v in inputs.values() if v is not None)
    states = 512 // 32 * state.ssm.nbytes
    # permuted B and C, a dozen tensors (B, T, H), the states entering chunks; y alone is x's size
    assert sum(storages.values()) < 2.5 * given + states
    assert not any(v.ndim >= 3 and v.shape[-1] == v.shape[-2] == 64 for v in kept)


def test_wrapped_angles_lie_in_one_turn() -> None:
    for dtype in (torch.float32, torch.float64):
        values = [0.0, -1e-12, 2 * math.pi, -2 * math.pi, 1e4, -3.0]
        angle = torch.tensor(values, dtype=dtype, requires_grad=True)
        wrapped = wrap(angle)
        assert wrapped.dtype == dtype
        assert ((wrapped >= 0) & (wrapped < 2 * math.pi)).all()
        assert torch.allclose(wrapped.cos(), angle.double().cos().to(dtype), atol=1e-6)
        (gradient,) = torch.autograd.grad(wrapped.sum(), angle)
        assert gradient.tolist() == [1.0] * len(values)


X = torch.ones(2, 5, H, P)
GOOD: Inputs = {
    "x": X,
    "dt": X[..., 0],
    "A": -X[..., 0],
    "trap": X[..., 0],
    "angles": X[:, :, 0, :2],
} | {name: torch.ones(2, 5, 1, 2, 6) for name in ("B", "C")}
TWO = {name: torch.ones(2, 5, 2, 2, 6) for name in ("B", "C")}
STATE = Mamba3State(
    torch.ones(2, H, 2), torch.ones(2, H, P, 6), torch.ones(2, 1, H, 6), torch.ones(2, H, P)
)
RANKS = torch.ones(H, 2, P)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": X[0]}, r"x must have shape \(B, T, H, P\), got \(5, 4, 3\)"),
        ({"dt": X}, r"dt must have shape \(2, 5, 4\), got \(2, 5, 4, 3\)"),
        ({"A": X[0, 0, :, 0]}, r"A must have shape \(2, 5, 4\), got \(4,\)"),
        ({"trap": X}, r"trap must have shape \(2, 5, 4\)"),
        ({"B": torch.ones(2, 5, 0, 2, 6)}, r"B .* R at least 1 .* got \(2, 5, 0, 2, 6\)"),
        ({"B": torch.ones(2, 5, 1, 3, 6)}, r"G dividing the 4 heads, got \(2, 5, 1, 3, 6\)"),
        ({"B": torch.ones(2, 5, 2, 6)}, r"B must have shape \(2, 5, R, G, N\)"),
        ({"C": TWO["C"]}, r"C must have shape \(2, 5, 1, 2, 6\), got \(2, 5, 2, 2, 6\)"),
        ({"D": torch.ones(H, P)}, r"D must have shape \(4,\), got \(4, 3\)"),
        ({"z": X[..., :2]}, r"z must have shape \(2, 5, 4, 3\)"),
        ({"B_bias": torch.ones(H, 6)}, r"B_bias must have shape \(4, 1, 6\), got \(4, 6\)"),
        ({"C_bias": torch.ones(1, H, 6)}, r"C_bias must have shape \(4, 1, 6\)"),
        ({"dt_bias": torch.ones(3)}, r"dt_bias must have shape \(4,\), got \(3,\)"),
        ({"mimo_x": RANKS}, r"mimo_x must have shape \(4, 1, 3\), got \(4, 2, 3\)"),
        (TWO, r"mimo_x of shape \(4, 2, 3\) is needed where B has 2 ranks"),
        ({**TWO, "mimo_x": RANKS, "mimo_o": RANKS[0]}, r"mimo_o must have shape \(4, 2, 3\)"),
        ({**TWO, "mimo_x": RANKS, "z": X}, r"without mimo_o .* z must be None"),
        ({"mimo_z": RANKS[:, :1]}, r"mimo_z scales the gate z, and z is None"),
        ({"angles": X[:, :, 0, :0]}, r"S from 1 to half the 6 states, got \(2, 5, 0\); without"),
        ({"angles": torch.ones(2, 5, 4)}, r"S from 1 to half the 6 states, got \(2, 5, 4\)"),
        ({"angles": torch.ones(2, 5, H, 2)}, r"angles must have .* got \(2, 5, 4, 2\)"),
        ({"rope_layout": "interleaved"}, r'must be "pairwise" or "half", got \'interleaved\''),
        ({"rope_layout": "half", "B": torch.ones(2, 5, 1, 2, 5), "C": torch.ones(2, 5, 1, 2, 5)},
         r'rope_layout="half" needs an even number of states, got 5'),
        ({"chunk_size": 0}, r"chunk_size must be at least 1, got 0"),
        ({"mask": torch.ones(2, 5)}, r"mask must be a bool tensor"),
        ({"seq_idx": torch.ones(2, 4, dtype=torch.long)}, r"seq_idx must be an integer tensor"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"expected B=1, got B=2"),
        ({"initial_state": STATE.ssm}, r"initial_state must be a Mamba3State, got Tensor"),
        ({"initial_state": STATE._replace(angle=STATE.angle[..., :1])},
         r"initial_state\.angle must have shape \(2, 4, 2\), got \(2, 4, 1\)"),
        ({"initial_state": STATE._replace(ssm=STATE.ssm[..., :5])}, r"initial_state\.ssm must"),
        ({"initial_state": STATE._replace(k=torch.ones(2, 4, H, 6))},
         r"initial_state\.k must have shape \(2, 1, 4, 6\), got \(2, 4, 4, 6\)"),
        ({"initial_state": STATE._replace(v=STATE.v[:1])}, r"initial_state\.v must have shape"),
        ({"x": X[:, :0], "dt": X[:, :0, :, 0], "A": X[:, :0, :, 0], "trap": None, "angles": None,
          "B": GOOD["B"][:, :0], "C": GOOD["C"][:, :0]}, r"expected T >= 1, got T=0"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(wrong: dict, message: str) -> None:
    mamba3_scan(**GOOD, initial_state=STATE)
    with pytest.raises(ValueError, match=message):
        mamba3_scan(**{**GOOD, **wrong})
