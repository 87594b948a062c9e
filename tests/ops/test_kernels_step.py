"""One-token kernels against plain torch: outputs and the states left behind."""

import pytest
import torch
from torch import Tensor

from ssm_hf.ops import launch
from ssm_hf.ops.causal_conv1d.step import causal_conv1d_step_
from ssm_hf.ops.dispatch import ImplementationUnavailableError
from ssm_hf.ops.norm_linear import MOST_ROWS, norm_linear
from ssm_hf.ops.norm_linear import launch as linear_launch
from ssm_hf.ops.rows_linear import rows_linear, shares_linear, shares_norm
from ssm_hf.ops.selective_scan.step import mamba1_step
from ssm_hf.ops.ssd import step_launch
from ssm_hf.ops.ssd.step import mamba2_step, squares_of_rows
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
# fp32 sums of up to a few hundred terms, in another order than torch's
FP32 = 2e-6
# One rounding of the result to 8 bits; the interpreter cuts off where a GPU rounds.
BF16 = 5e-3


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def _both(op, tensors: dict[str, Tensor], in_place: tuple[str, ...], **options: object):
    """Results of kernel and reference (the latter in fp64), and the tensors changed in place."""
    results = []
    for impl in ("triton", "reference"):
        given = {name: None if t is None else t.clone() for name, t in tensors.items()}
        if impl == "reference":
            given = {
                n: t if t is None or not t.is_floating_point() else t.double()
                for n, t in given.items()
            }
        y = op(**given, **options, impl=impl)
        results.append([y, *(given[name] for name in in_place)])
    return results


def _check(results: list[list[Tensor]], *tolerances: float) -> None:
    for got, wanted, tolerance in zip(*results, tolerances, strict=True):
        assert relative_error(got, wanted) < tolerance


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_step_equals_torch(taps: int, bias: bool) -> None:
    wide = _draw(3, 90)
    x = wide[:, 7:77]  # a view of a projection
    tensors = {"window": _draw(3, taps - 1, 70), "weight": _draw(70, taps)}
    tensors["bias"] = _draw(70) if bias else None

    def op(impl: str, **given: Tensor) -> Tensor:
        dtype = given["weight"].dtype
        return causal_conv1d_step_(x.to(dtype), **given, impl=impl)

    _check(_both(op, tensors, ("window",)), FP32, 1e-7 if taps > 1 else 1)


CASES = {
    "usual": {},
    "groups": {"groups": 2},
    "every head its group": {"groups": 4},
    "no norm": {"norm": None},
    "norm before gate": {"norm": "before", "groups": 2},
    "D per channel": {"per_channel": True},
    "gated MLP beside": {"mlp": 10},
    "dt bounds": {"dt_limit": (0.5, 0.9)},
    "no conv bias": {"bias": False},
    "two taps": {"taps": 2},
    "odd sizes": {"head_dim": 5, "states": 7, "heads": 3},
    "convolved": {"convolved": True, "norm": None},
    "convolved, norm": {"convolved": True},
}


def _mamba2_case(
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    batch: int = 3,
    heads: int = 4,
    head_dim: int = 8,
    states: int = 16,
    groups: int = 1,
    taps: int = 4,
    mlp: int = 0,
    norm: str | None = "after",
    per_channel: bool = False,
    bias: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    convolved: bool = False,
):
    width = heads * head_dim
    channels = width + 2 * groups * states
    tensors = {
        "proj": _draw(batch, 2 * mlp + width + channels + heads, dtype=dtype),
        "conv_state": _draw(batch, taps - 1, channels, dtype=dtype),
        "ssm_state": _draw(batch, heads, head_dim, states, dtype=state_dtype),
        "tickets": torch.zeros(batch, groups, dtype=torch.int32, device=DEVICE),
        "conv_weight": _draw(channels, taps, dtype=dtype),
        "conv_bias": _draw(channels, dtype=dtype) if bias else None,
        "dt_bias": _draw(heads) - 3,
        "A_log": _draw(heads).abs(),
        "D": _draw(width if per_channel else heads),
        "norm_weight": None if norm is None else _draw(width, dtype=dtype),
    }
    options = {
        "n_groups": groups,
        "dt_limit": dt_limit,
        "norm_eps": 1e-5,
        "norm_before_gate": norm == "before",
        "convolved": convolved,
    }
    return tensors, options


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_mamba2_step_equals_torch(case: dict) -> None:
    tensors, options = _mamba2_case(**case)
    results = _both(mamba2_step, tensors, ("conv_state", "ssm_state", "tickets"), **options)
    assert not results[0][3].any()
    _check([r[:3] for r in results], FP32, 1e-7, FP32)


@pytest.mark.parametrize(
    "name", ["usual", "groups", "gated MLP beside", "no conv bias", "two taps", "odd sizes"]
)
def test_mamba2_step_of_many_heads_convolves_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_launch, "_FEW_PROGRAMS", 1)
    tensors, options = _mamba2_case(**CASES[name])
    results = _both(mamba2_step, tensors, ("conv_state", "ssm_state", "tickets"), **options)
    assert not results[0][3].any()
    _check([r[:3] for r in results], FP32, 1e-7, FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mamba2_step_rounds_only_its_result(dtype: torch.dtype) -> None:
    tensors, options = _mamba2_case(dtype)
    results = _both(mamba2_step, tensors, ("conv_state", "ssm_state"), **options)
    assert results[0][0].dtype == dtype
    _check(results, BF16, 1e-7, FP32)
    tensors, options = _mamba2_case(dtype, state_dtype=torch.bfloat16)
    results = _both(mamba2_step, tensors, ("conv_state", "ssm_state"), **options)
    _check(results, BF16, 1e-7, BF16)


def test_mamba2_step_splits_large_heads_and_finds_views() -> None:
    tensors, options = _mamba2_case(heads=2, head_dim=64, states=32, batch=2)
    wide = _draw(2, tensors["proj"].shape[1] + 9)
    wide[:, 4:-5] = tensors["proj"]
    results = _both(mamba2_step, tensors, ("conv_state", "ssm_state"), **options)
    tensors["proj"] = wide[:, 4:-5]
    view = mamba2_step(**{n: None if t is None else t.clone() if n != "proj" else t
                          for n, t in tensors.items()}, **options, impl="triton")  # fmt: skip
    _check(results, FP32, 1e-7, FP32)
    assert torch.equal(view, results[0][0])


@pytest.mark.parametrize(("low_rank", "bias"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(("inner", "states", "rank"), [(40, 16, 3), (7, 5, 1)])
def test_mamba1_step_equals_torch(
    low_rank: bool, bias: bool, inner: int, states: int, rank: int
) -> None:
    width = rank if low_rank else inner
    row = _draw(2, width + 2 * states)
    wide = _draw(2, 2 * inner)
    tensors = {
        "state": _draw(2, inner, states),
        "A_log": _draw(inner, states).abs(),
        "D": _draw(inner),
        "dt_weight": _draw(inner, rank) if low_rank else None,
        "dt_bias": _draw(inner) - 3 if bias else None,
    }

    def op(impl: str, **given: Tensor) -> Tensor:
        dtype = given["D"].dtype
        x, z = wide.to(dtype).chunk(2, dim=-1)
        dt, B, C = row.to(dtype).split([width, states, states], dim=-1)
        return mamba1_step(x, dt, B, C, z, **given, impl=impl)

    _check(_both(op, tensors, ("state",)), FP32, FP32)


ROWS = {
    "usual": {},
    "groups": {"groups": 2},
    "bf16 states": {"state_dtype": torch.bfloat16},
    "D per channel": {"per_channel": True},
    "a head in parts": {"head_dim": 64, "processors": 12},
    "odd states": {"states": 7, "dt_limit": (0.5, 0.9)},
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_mamba2_step_of_many_rows_equals_torch(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that walk through several tiles of the state, also from within a head."""
    given = {"batch": 5, "head_dim": 32, "norm": None, "convolved": True, **case}
    processors = given.pop("processors", 2)
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    tensors, options = _mamba2_case(**given)
    results = _both(mamba2_step, tensors, ("ssm_state",), **options)
    state = BF16 if "state_dtype" in case else FP32
    _check(results, BF16 if "state_dtype" in case else FP32, state)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_mamba2_step_leaves_the_factor_of_the_norm(
    state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 2)
    case = {"batch": 5, "head_dim": 32, "convolved": True, "state_dtype": state_dtype}
    tensors, options = _mamba2_case(**case)
    sums = squares_of_rows(tensors["ssm_state"], 1)
    assert sums
    tensors["squares"] = torch.empty(5, sums, device=DEVICE)
    (y, state, squares), wanted = _both(mamba2_step, tensors, ("ssm_state", "squares"), **options)
    results = [[y, state, squares.sum(1)], [*wanted[:2], wanted[2].sum(1)]]
    tolerance = BF16 if state_dtype == torch.bfloat16 else FP32
    _check(results, tolerance, tolerance, tolerance)
    # With the factor it is the norm.
    del tensors["squares"]
    normed = _both(mamba2_step, tensors, (), **options)[1][0]
    y *= torch.rsqrt(squares.sum(1, keepdim=True) / y.shape[1] + options["norm_eps"])
    assert relative_error(y, normed) < tolerance


@pytest.mark.parametrize("change", [{"norm": None}, {"groups": 2}, {"convolved": False}])
def test_squares_are_of_one_norm_over_all(change: dict) -> None:
    tensors, options = _mamba2_case(**{"convolved": True, **change})
    tensors["squares"] = torch.empty(3, 1, device=DEVICE)
    with pytest.raises(ValueError, match="squares are of convolved input"):
        mamba2_step(**tensors, **options)


# What kernels on a GPU take; the interpreter has fp32 beside it, where sums are exact to 24 bits.
WIDTHS = (torch.float16,) if DEVICE.type == "cuda" else (torch.float32, torch.float16)
SOME = {
    "plain": {},
    "bias": {"bias": True},
    "norm": {"squares": True},
    "conv": {"conv": True, "bias": True, "squares": True},
    "shares": {"shares": True},
    "shares, norm": {"shares": True, "squares": True},
}


@pytest.mark.parametrize(
    ("rows", "dtype"), [(3, WIDTHS[0]), (37, WIDTHS[0]), (3, WIDTHS[-1]), (64, WIDTHS[-1])]
)
@pytest.mark.parametrize("case", SOME.values(), ids=SOME)
def test_rows_linear_equals_torch(case: dict, rows: int, dtype: torch.dtype) -> None:
    # A GPU's shares are longer than the interpreter's.
    size, outputs, channels = 900 if DEVICE.type == "cuda" else 200, 37, 21
    tensors = {"x": _draw(rows, size, dtype=dtype)}
    tensors["weight"] = 0.1 * _draw(outputs, size, dtype=dtype)
    options = {"eps": 1e-5, "shares": case.get("shares", False)}
    if case.get("bias"):
        tensors["bias"] = _draw(outputs, dtype=dtype)
    if case.get("squares"):
        tensors["squares"] = _draw(rows, 3).square() * 100
    in_place: tuple[str, ...] = ()
    if case.get("conv"):
        tensors |= {"conv_state": _draw(rows, 3, channels, dtype=dtype)}
        tensors |= {"conv_weight": _draw(channels, 4, dtype=dtype)}
        tensors["conv_bias"] = _draw(channels, dtype=dtype)
        options["conv_first"] = 9
        in_place = ("conv_state",)
    results = _both(rows_linear, tensors, in_place, **options)
    if options["shares"]:
        assert results[0][0].shape[0] > 1
        assert results[0][0].dtype == torch.float32
        for result in results:
            result[0] = result[0].sum(0)
    # What is returned in 16 bits is rounded, once; shares are not, but matrix units of a GPU align
    # what they add.
    rounded = BF16 if dtype == torch.float16 else FP32
    _check(results, 1e-5 if options["shares"] else rounded, *(rounded for _ in in_place))


@pytest.mark.parametrize("rows", [3, 50])
def test_sums_of_shares_equal_torch(rows: int) -> None:
    dtype = WIDTHS[0]
    shares = _draw(4, rows, 5 + 9)
    tensors = {"shares": shares, "weight": _draw(37, 5, dtype=dtype)}
    got, wanted = (
        shares_linear(**{n: t.to(d or t.dtype) for n, t in tensors.items()}, impl=impl)
        for impl, d in (("triton", None), ("reference", torch.float64))
    )
    # The sum is rounded to the weight's dtype before the product.
    _check([[*got], [*wanted]], BF16 if dtype == torch.float16 else FP32, FP32)
    tensors = {"shares": _draw(4, rows, 70), "stream": _draw(rows, 70)}
    tensors["weight"] = _draw(70, dtype=dtype)
    got, wanted = (
        shares_norm(**{n: t.to(d or t.dtype) for n, t in tensors.items()}, impl=impl, eps=1e-5,
                    dtype=d or torch.float32)
        for impl, d in (("triton", None), ("reference", torch.float64))
    )  # fmt: skip
    _check([[*got], [*wanted]], FP32, FP32)


def test_rows_linear_says_what_disagrees() -> None:
    x, weight = _draw(3, 8), _draw(4, 8)
    with pytest.raises(ValueError, match=r"weight \(O, K\).*\(3, 8\) and \(4, 7\)"):
        rows_linear(x, weight[:, 1:])
    with pytest.raises(ValueError, match=r"weight's dtype torch.float32, got torch.bfloat16"):
        rows_linear(x.bfloat16(), weight)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(8,\)"):
        rows_linear(x, weight, weight[0])
    with pytest.raises(ValueError, match=r"squares must have shape \(3, Q\), got \(4, 8\)"):
        rows_linear(x, weight, squares=weight)
    window, taps = _draw(3, 2, 4), _draw(4, 3)
    with pytest.raises(ValueError, match=r"conv_state must have shape \(3, 2, 4\)"):
        rows_linear(x, weight, conv_state=window[:2], conv_weight=taps)
    with pytest.raises(ValueError, match=r"conv_bias must have shape \(4,\), got \(8,\)"):
        rows_linear(x, weight, conv_state=window, conv_weight=taps, conv_bias=weight[0])
    with pytest.raises(ValueError, match=r"conv_first=1 and 4 channels exceed the 4 outputs"):
        rows_linear(x, weight, conv_state=window, conv_weight=taps, conv_first=1)
    with pytest.raises(ValueError, match="given together"):
        rows_linear(x, weight, conv_state=window)
    with pytest.raises(ValueError, match="without bias"):
        rows_linear(x, weight, weight[:, 0], shares=True)
    with pytest.raises(ImplementationUnavailableError, match=r"fp64.*reference"):
        rows_linear(x.double(), weight.double(), impl="triton")
    with pytest.raises(ValueError, match=r"shares must have shape \(S, B, K \+ L\)"):
        shares_linear(x, weight)
    with pytest.raises(ValueError, match="disagree"):
        shares_norm(x[None], x, weight, eps=1e-5, dtype=torch.float32)


LINEAR = {
    "plain": {},
    "bias": {"bias": True},
    "norm": {"norm": True},
    "groups": {"norm": True, "group_size": 75},
    "residual": {"norm": True, "residual": True},
    "gated": {"gated": True, "residual": True},
    "conv": {"norm": True, "conv": True, "bias": True},
}


@pytest.mark.parametrize(("rows", "walked"), [(1, False), (2, True)])
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
def test_norm_linear_equals_torch(
    case: dict, rows: int, walked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if walked:
        monkeypatch.setattr(linear_launch, "_WALKED", 1)
    size, outputs, channels = 300, 37, 21
    gated = case.get("gated", False)
    tensors = {"x": _draw(rows, size * (1 + gated)), "weight": _draw(outputs, size)}
    options = {"eps": 1e-5, "group_size": case.get("group_size"), "gated": gated}
    if case.get("bias"):
        tensors["bias"] = _draw(outputs)
    if case.get("norm"):
        tensors["norm_weight"] = _draw(size)
    if case.get("residual"):
        tensors["residual"] = _draw(rows, outputs)
    in_place: tuple[str, ...] = ()
    if case.get("conv"):
        tensors |= {"conv_state": _draw(rows, 3, channels), "conv_weight": _draw(channels, 4)}
        tensors["conv_bias"] = _draw(channels)
        options["conv_first"] = 9
        in_place = ("conv_state",)
    _check(_both(norm_linear, tensors, in_place, **options), FP32, *(FP32 for _ in in_place))


def test_norm_linear_reads_bf16_weights_and_writes_the_asked_dtype() -> None:
    tensors = {
        "x": _draw(2, 64),
        "weight": _draw(20, 64, dtype=torch.bfloat16),
        "norm_weight": _draw(64, dtype=torch.bfloat16),
    }
    (y,), (wanted,) = _both(norm_linear, tensors, (), eps=1e-5)
    assert y.dtype == torch.float32
    assert relative_error(y, wanted) < FP32
    y = norm_linear(**tensors, eps=1e-5, out_dtype=torch.bfloat16, impl="triton")
    assert y.dtype == torch.bfloat16
    assert relative_error(y, wanted) < BF16


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no CUDA device")
@pytest.mark.parametrize("batch", [1, 40, 64])
def test_overlapping_kernels_change_nothing(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of three kernels, each of which may begin before the one in front of it has ended."""
    size, heads, layers = 256, 4, 12
    cases = [
        _mamba2_case(torch.bfloat16, heads=heads, batch=batch, norm=None)[0] for _ in range(layers)
    ]
    width, outputs = heads * 8, cases[0]["proj"].shape[1]
    weights = [
        (_draw(outputs, size, dtype=torch.bfloat16), _draw(size, width, dtype=torch.bfloat16))
        for _ in range(layers)
    ]
    norm = _draw(size)
    options = {"n_groups": 1, "convolved": True, "overlap": True}

    def run(overlap: bool) -> list[Tensor]:
        monkeypatch.setattr(launch, "OVERLAP", overlap)
        torch.manual_seed(0)
        x = _draw(batch, size)
        beginning = torch.empty_like(x)
        states = [{n: c[n].clone() for n in ("conv_state", "ssm_state")} for c in cases]

        def rows_step() -> None:
            # A launch without overlap stands between two steps.
            beginning.copy_(x)
            stream, y = beginning, x.to(torch.bfloat16)
            for case, state, (inner, outer) in zip(cases, states, weights, strict=True):
                given = {n: t for n, t in case.items() if n not in ("proj", "norm_weight")} | state
                proj = rows_linear(
                    y, inner, conv_state=state["conv_state"], conv_weight=case["conv_weight"],
                    conv_bias=case["conv_bias"], conv_first=width, overlap=True,
                )  # fmt: skip
                out = mamba2_step(proj, **given, **options)
                shares = rows_linear(out, outer, shares=True, overlap=True)
                y, stream = shares_norm(shares, stream, norm, eps=1e-5, dtype=torch.bfloat16,
                                        overlap=True)  # fmt: skip
            x.copy_(stream / stream.norm())

        def vector_step() -> None:
            y = x
            for case, state, (inner, outer) in zip(cases, states, weights, strict=True):
                given = {n: t for n, t in case.items() if n not in ("proj", "norm_weight")} | state
                proj = norm_linear(
                    y, inner, norm_weight=norm, eps=1e-5, conv_state=state["conv_state"],
                    conv_weight=case["conv_weight"], conv_bias=case["conv_bias"], conv_first=width,
                    out_dtype=torch.float32, overlap=True,
                )  # fmt: skip
                out = mamba2_step(proj, **given, **options)
                y = norm_linear(out, outer, residual=y, overlap=True)
            x.copy_(y / y.norm())

        step = vector_step if batch <= MOST_ROWS else rows_step
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(300):
            graph.replay()
        return [x, *(t for state in states for t in state.values())]

    for got, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(got, wanted)


def test_unsupported_arguments_name_what_is_supported() -> None:
    tensors, options = _mamba2_case()
    tensors["proj"] = tensors["proj"].double()
    with pytest.raises(ImplementationUnavailableError, match=r"fp64.*reference"):
        mamba2_step(**tensors, **options, impl="triton")
    with pytest.raises(ImplementationUnavailableError, match=f"at most {MOST_ROWS} rows"):
        norm_linear(_draw(MOST_ROWS + 1, 4), _draw(3, 4), impl="triton")
    tensors, options = _mamba2_case()
    tensors["D"] = tensors["D"][1:]
    with pytest.raises(ValueError, match=r"D must have shape \(4,\) or \(32,\), got \(3,\)"):
        mamba2_step(**tensors, **options)
    with pytest.raises(ValueError, match=r"window must have shape \(2, 3, 5\), got \(1, 3, 5\)"):
        causal_conv1d_step_(_draw(2, 5), _draw(1, 3, 5), _draw(5, 4), None)
