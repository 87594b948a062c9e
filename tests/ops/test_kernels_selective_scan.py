"""The kernels of Mamba-1's scan against the torch path in fp64: outputs, states, all gradients."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_hf.ops import keep_activations, selective_scan
from tests.helpers import kernel_device, relative_error

# The package's name for this module is taken by the function.
launch = sys.modules["ssm_hf.ops.selective_scan.launch"]

DEVICE = kernel_device()
# fp32 rounding over at most a few hundred tokens; sums that cancel cost a digit. A GPU's
# exponentials and logarithms are approximations: the grid's bound there, of which it takes 0.42.
SINGLE = 1e-5 if DEVICE.type == "cuda" else 2e-6
# Chunks as short as tiles allow, and rows of three chunks.
CHUNK = 16 if DEVICE.type == "cuda" else 4
LENGTH = 2 * CHUNK + 3
LEAVES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def _draw(batch: int, length: int, inner: int, states: int, rows: int | None = None):
    """Every input, in fp64."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=DEVICE)

    return {
        "x": normal(batch, length, inner),
        "dt": normal(batch, length, inner),
        "A": -4 * torch.rand(inner, states, dtype=torch.float64, device=DEVICE),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(inner),
        "z": normal(batch, length, inner),
        "dt_bias": normal(inner) - 1,
        "initial_state": normal(rows or batch, inner, states),
    }


def _results(
    inputs: dict[str, Tensor], impl: str, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, Tensor]:
    """y, final state and the gradient of every input, for a fixed loss of both outputs."""
    leaves = {n: v.to(dtype).requires_grad_() for n, v in inputs.items()}
    y, final = selective_scan(
        **leaves, dt_softplus=True, **options, return_final_state=True, impl=impl
    )
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (out.double() * torch.randn(out.shape, generator=generator).to(DEVICE)).sum()
        for out in (y, final)
    )
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert grad.dtype == leaf.dtype
    return {"y": y, "final": final, **dict(zip(leaves, grads, strict=True))}


def _assert_equal_to_torch(
    inputs: dict[str, Tensor],
    tolerance: float = SINGLE,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    # The torch path starts from what the kernels are given, not from digits they never saw.
    given = {n: v.to(dtype).double() for n, v in inputs.items()}
    expected = _results(given, "reference", torch.float64, options)
    found = _results(inputs, "triton", dtype, options)
    for name, value in found.items():
        assert value.shape == expected[name].shape
        assert relative_error(value, expected[name]) < tolerance, name


@pytest.mark.parametrize(
    ("batch", "length", "states"), [(1, 1, 3), (2, 1, 3), (2, 8, 16), (2, 13, 5)]
)
def test_kernels_equal_torch(batch: int, length: int, states: int) -> None:
    _assert_equal_to_torch(_draw(batch, length, 5, states))


def test_kernels_keep_states_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", CHUNK)
    _assert_equal_to_torch(_draw(1, 2 * LENGTH, 2, 2))


PADDED = torch.arange(2 * 13).reshape(2, 13) % 5 != 3
PACKED = torch.tensor([[0] * 5 + [1] * 8, [0] * 12 + [1]])


@pytest.mark.parametrize(
    ("rows", "segments", "options"),
    [
        (2, 1, {}),
        (2, 2, {"mask": PADDED, "seq_idx": PACKED}),
        (4, 2, {"cu_seqlens": torch.tensor([0, 0, 1, 2, 13])}),
    ],
    ids=["plain", "padded and packed", "documents"],
)
def test_kernels_with_kept_states(
    rows: int, segments: int, options: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two tiles and more, so that states are kept within chunks, and rows end in the second.
    monkeypatch.setattr(launch, "CHUNK", 2 * CHUNK)
    monkeypatch.setattr(launch, "_segments", lambda *_: segments)
    inputs = _draw(1 if "cu_seqlens" in options else 2, 13, 5, 4, rows)
    options = {name: v.to(DEVICE) for name, v in options.items()}
    expected = _results(
        {n: v.bfloat16().double() for n, v in inputs.items()}, "reference", torch.float64, options
    )
    formed = _results(inputs, "triton", torch.bfloat16, options)
    with keep_activations():
        kept = _results(inputs, "triton", torch.bfloat16, options)
    for name in ("y", "final", "x", "B", "D", "z", "initial_state"):
        # The state between two tiles is none of theirs.
        assert torch.equal(kept[name], formed[name]), name
    for name in ("dt", "A", "C", "dt_bias"):
        # bf16, which the interpreter cuts off: a bit of the result, and one of the states that
        # it is formed from.
        assert relative_error(kept[name], expected[name]) < 2**-7, name


def test_states_are_kept_only_where_they_take_little_room() -> None:
    def saved(states: int, dtype: torch.dtype, keep: bool) -> Tensor:
        v = {n: t.to(dtype) for n, t in _draw(1, 8, 3, states).items()}
        options = (True, 0.0, float("inf"), True, keep)
        given = tuple(v[n] for n in LEAVES)
        return torch.ops.ssm_hf.selective_scan_fwd(*given, None, None, None, *options)[2]

    kept = saved(4, torch.bfloat16, True)
    assert kept.dtype == torch.bfloat16
    assert len(kept) > 1
    cases = ((4, torch.bfloat16, False), (4, torch.float32, True), (17, torch.bfloat16, True))
    for states, dtype, keep in cases:
        formed = saved(states, dtype, keep)
        assert formed.dtype == torch.float32
        assert len(formed) == 1, "of one chunk"


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
def test_kernels_without_an_optional_input(absent: str) -> None:
    inputs = _draw(1, 3, 3, 4)
    del inputs[absent]
    _assert_equal_to_torch(inputs)


def test_kernels_take_step_sizes_as_they_are() -> None:
    inputs = _draw(1, 3, 3, 4)
    leaves = ("x", "A", "B", "C")
    plain = {n: inputs[n] for n in leaves} | {"dt": inputs["dt"].abs()}
    results = []
    for dtype, impl in ((torch.float64, "reference"), (torch.float32, "triton")):
        given = {n: v.to(dtype).requires_grad_() for n, v in plain.items()}
        y = selective_scan(**given, impl=impl)
        results.append([y, *torch.autograd.grad(y.sum(), list(given.values()))])
    for value, expected in zip(results[1], results[0], strict=True):
        assert relative_error(value, expected) < SINGLE


def test_kernels_limit_step_sizes() -> None:
    _assert_equal_to_torch(_draw(1, 5, 6, 4), dt_limit=(0.3, 1.5))
    mask = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    mask[0, :3] = mask[1, 4] = False
    _assert_equal_to_torch(_draw(2, 7, 3, 4), dt_limit=(0.3, 1.5), mask=mask)


@pytest.mark.parametrize("shift", [-4, -9])
def test_gradients_of_small_step_sizes_keep_their_digits(shift: int) -> None:
    # The slope of the softplus is about the step size itself: 0.02 or 0.0001.
    inputs = _draw(1, 5, 6, 4)
    inputs["dt_bias"] += shift
    _assert_equal_to_torch(inputs)


@pytest.mark.parametrize(
    ("packed", "padded", "segments"),
    [(False, False, 3), (True, False, 1), (False, True, 1), (True, True, 3)],
)
def test_kernels_with_padding_and_packing(
    packed: bool, padded: bool, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CHUNK", CHUNK)
    monkeypatch.setattr(launch, "_segments", lambda *_: segments)
    options = {}
    if packed:
        options["seq_idx"] = (torch.rand(2, LENGTH, device=DEVICE) < 0.2).cumsum(1) * 3 + 7
    if padded:
        options["mask"] = torch.rand(2, LENGTH, device=DEVICE) > 0.3
        options["mask"][1] = False  # a row of pads alone
    _assert_equal_to_torch(_draw(2, LENGTH, 3, 4), **options)


def test_kernels_keep_a_state_per_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", CHUNK)
    monkeypatch.setattr(launch, "_segments", lambda *_: 2)
    offsets = [0, 1, 1, LENGTH, LENGTH + 2]  # an empty document among them
    cu_seqlens = torch.tensor(offsets, device=DEVICE, dtype=torch.int32)
    inputs = _draw(1, offsets[-1], 3, 4, rows=len(offsets) - 1)
    mask = torch.rand(1, offsets[-1], device=DEVICE) > 0.3
    _assert_equal_to_torch(inputs, cu_seqlens=cu_seqlens, mask=mask)


@pytest.mark.parametrize("channels", [8, 16])
def test_kernels_add_up_over_channels(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = launch.tuned

    def larger(kernel: str, size: str, device: torch.device) -> dict[str, int]:
        options = tuned(kernel, size, device)
        wanted = {"STATES": 16 * channels} if kernel == "selective_scan_bwd" else {}
        return {**options, **wanted}

    monkeypatch.setattr(launch, "tuned", larger)
    _assert_equal_to_torch(_draw(1, 5, channels + 3, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_round_half_precision_once(dtype: torch.dtype) -> None:
    # y's gradient and every result are rounded once: half a unit in the last place each, or a whole
    # one in the interpreter, which truncates to bf16.
    unit = torch.finfo(dtype).eps
    _assert_equal_to_torch(_draw(1, 4, 3, 4), tolerance=2 * unit, dtype=dtype)


def test_kernels_take_views_and_mixed_dtypes() -> None:
    inputs = _draw(2, 3, 4, 3)
    wide = torch.cat([inputs["x"], inputs["z"]], dim=-1).float().requires_grad_()
    low = torch.cat([inputs["dt"], inputs["B"], inputs["C"]], dim=-1).half().requires_grad_()
    A = inputs["A"].float()

    def run(wide: Tensor, low: Tensor, A: Tensor, impl: str) -> Tensor:
        x, z = wide.chunk(2, dim=-1)
        dt, B, C = low.split([4, 3, 3], dim=-1)
        return selective_scan(x, dt, A, B, C, z=z, dt_softplus=True, impl=impl)

    y = run(wide, low, A, "triton")
    leaves = [v.detach().double().requires_grad_() for v in (wide, low)]
    expected = run(leaves[0], leaves[1], A.double(), "reference")
    assert relative_error(y, expected) < SINGLE
    grads = torch.autograd.grad(y.sum(), [wide, low])
    rights = torch.autograd.grad(expected.sum(), leaves)
    assert relative_error(grads[0], rights[0]) < SINGLE
    assert relative_error(grads[1], rights[1]) < 1e-3  # stored in fp16


def test_kernels_repeat_exactly() -> None:
    inputs = _draw(1, 4, 5, 4)
    first, second = (_results(inputs, "triton", torch.float32, {}) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_kernels_compile_without_graph_breaks() -> None:
    inputs = {n: v.float().requires_grad_() for n, v in _draw(1, 3, 3, 4).items()}

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return selective_scan(**inputs, dt_softplus=True, return_final_state=True, impl="triton")

    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y, final = call(inputs)
        results.append(torch.autograd.grad((y.sum() + final.sum()), list(inputs.values())))
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


def test_operators_describe_themselves_rightly() -> None:
    v = {n: t.float() for n, t in _draw(1, 3, 2, 2).items()}
    given = tuple(v[n] for n in LEAVES)
    options = (True, 0.0, float("inf"))
    torch.library.opcheck(
        torch.ops.ssm_hf.selective_scan_fwd.default,
        (*given, None, None, None, *options, True, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    y, final, *saved = torch.ops.ssm_hf.selective_scan_fwd(
        *given, None, None, None, *options, True, False
    )
    torch.library.opcheck(
        torch.ops.ssm_hf.selective_scan_bwd.default,
        (y, final, *given, None, None, None, *saved, *options),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_kernels_refuse_what_they_cannot_take() -> None:
    inputs = {n: v.float() for n, v in _draw(1, 2, 1, 257).items()}
    with pytest.raises(RuntimeError, match="state sizes up to 256, got N=257"):
        selective_scan(**inputs, impl="triton")
    wide = _draw(1, 2, 2, 3)
    with pytest.raises(RuntimeError, match="float64"):
        selective_scan(**wide, impl="triton")
    assert selective_scan(**wide).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="thousands of tokens take hours interpreted")
@pytest.mark.parametrize(
    ("batch", "length", "inner", "states"),
    [(1, 5000, 200, 16), (3, 1000, 97, 64), (2, 300, 33, 256), (8, 1500, 768, 1)],
)
def test_kernels_equal_torch_at_full_size(batch: int, length: int, inner: int, states: int) -> None:
    # fp32 over thousands of tokens.
    _assert_equal_to_torch(_draw(batch, length, inner, states), tolerance=1e-5)
