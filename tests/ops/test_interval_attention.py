"""Attention on intervals: torch path and kernels against the definition in fp64."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_hf.ops.dispatch import ImplementationUnavailableError
from ssm_hf.ops.interval_attention import (
    interval_attention,
    interval_attention_definition,
    interval_attention_step,
    put_rows,
    rows_at,
)
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
# The kernels' sums in fp32; a GPU forms fp32 products from three of fewer digits.
SINGLE = 1e-5
# 8 bits of q, k, v, of weights and of the result; the interpreter truncates where a GPU rounds.
HALF = 2**-6
launch = importlib.import_module("ssm_hf.ops.interval_attention.launch")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRACEABLE = ("test_schema", "test_autograd_registration", "test_faketensor")


def _leaves(
    batch: int,
    queries: int,
    keys: int,
    heads: int = 2,
    groups: int = 1,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Any:
    shapes = [(batch, queries, heads, size), *2 * [(batch, keys, groups, size)]]
    return [torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=True) for s in shapes]


def _intervals(kind: str, batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(queries, device=DEVICE)[None] + keys - queries
    if kind == "causal":
        return torch.zeros_like(at), at
    if kind == "window":
        return at - 6, at
    if kind == "all":
        return torch.zeros_like(at), torch.full_like(at, keys + 3)
    if kind == "documents":
        edges = torch.rand(batch, queries, device=DEVICE) < 0.1
        return torch.where(edges, at, 0).cummax(dim=1).values, at.expand(batch, -1)
    if kind == "selected":
        at = torch.rand(batch, keys, device=DEVICE).argsort(dim=1)[:, :queries].sort(dim=1).values
        fillers = torch.arange(queries, device=DEVICE) >= queries - 2
        return at - keys // 2, torch.where(fillers, -1, at)
    low = torch.randint(-3, keys + 3, (batch, queries), device=DEVICE)
    return low, low + torch.randint(-3, keys, low.shape, device=DEVICE)


def attend(leaves: Any, low: Tensor, high: Tensor, **options: Any) -> Tensor:
    q, k, v = leaves
    return interval_attention(q, k, v, low, high, **options)


def assert_same(
    leaves: Any,
    low: Tensor,
    high: Tensor,
    tolerance: float,
    impl: str = "triton",
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Result and all gradients equal those of the definition in fp64."""
    wide: Any = [t.detach().double().requires_grad_() for t in leaves]
    factor = leaves[0].shape[-1] ** -0.5 if scale is None else scale
    q, k, v = wide
    expected = interval_attention_definition(q, k, v, low, high, key_mask, factor)
    y = attend(leaves, low, high, key_mask=key_mask, scale=scale, impl=impl)
    assert y.dtype == leaves[0].dtype
    probe = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, probe)
    right = torch.autograd.grad(expected, wide, probe.double())
    for name, got, wanted in zip("yqkv", (y, *grads), (expected, *right), strict=True):
        assert relative_error(got, wanted) < tolerance, name


KINDS = ["causal", "window", "documents", "selected", "random"]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind: str, masked: bool, impl: str) -> None:
    queries = 20 if kind == "selected" else 43
    leaves = _leaves(2, queries, 53)
    mask = torch.rand(2, 53, device=DEVICE) > 0.3 if masked else None
    assert_same(leaves, *_intervals(kind, 2, queries, 53), SINGLE, impl, mask)


def test_torch_path_equals_the_definition_in_fp64() -> None:
    leaves = _leaves(2, 9, 12, dtype=torch.float64)
    # rounding of fp64 sums
    assert_same(leaves, *_intervals("random", 2, 9, 12), 1e-13, "reference")


@pytest.mark.parametrize(
    ("heads", "groups", "size"), [(1, 1, 1), (3, 3, 8), (6, 2, 40), (2, 1, 64), (1, 1, 130)]
)
def test_kernels_take_any_heads(heads: int, groups: int, size: int) -> None:
    leaves = _leaves(1, 19, 19, heads, groups, size, torch.float16)
    # 11 bits of q, k, v, of weights and of the result
    assert_same(leaves, *_intervals("causal", 1, 19, 19), 2**-9)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (16, 16), (33, 32)])
def test_kernels_take_any_length(queries: int, keys: int) -> None:
    assert_same(_leaves(1, queries, keys), *_intervals("causal", 1, queries, keys), SINGLE)


def test_kernels_take_bf16_and_mixed_dtypes() -> None:
    low, high = _intervals("documents", 2, 21, 21)
    assert_same(_leaves(2, 21, 21, dtype=torch.bfloat16), low, high, HALF)
    q, k, v = _leaves(2, 21, 21)
    # 11 bits of k
    assert_same([q, k.detach().half().requires_grad_(), v], low, high, 2**-10, scale=0.7)


def test_kernels_take_int32_and_large_numbers() -> None:
    leaves = _leaves(1, 20, 20)
    low, high = _intervals("causal", 1, 20, 20)
    expected = attend(leaves, low, high, impl="triton")
    got = attend(leaves, low.int() - 7, high.int(), impl="triton")
    assert torch.equal(got, expected)
    far = torch.where(low == 0, -(1 << 62), low)
    assert torch.equal(attend(leaves, far, high, impl="triton"), expected)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_queries_that_see_nothing_give_nothing(impl: str) -> None:
    leaves = _leaves(1, 18, 18)
    low = torch.full((1, 18), 5, device=DEVICE)
    for high in (low - 1, low - 9):
        y = attend(leaves, low, high, impl=impl)
        assert not y.any()
        for grad in torch.autograd.grad(y.sum(), leaves):
            assert not grad.any()
    mask = torch.zeros(1, 18, dtype=torch.bool, device=DEVICE)
    assert not attend(leaves, low, low + 3, key_mask=mask, impl=impl).any()


def test_kernels_take_views_of_one_projection() -> None:
    """Strides that no power of two divides, of inputs and of the gradient."""
    rows = torch.randn(2, 20, 7 * 12, device=DEVICE, requires_grad=True)
    probe = torch.randn(2, 20, 5, 24, device=DEVICE)[..., :12]
    low, high = _intervals("causal", 2, 20, 20)
    found = []
    for own in (False, True):
        parts = rows.unflatten(-1, (7, 12)).split([5, 1, 1], dim=2)
        q, k, v = (t.contiguous() if own else t for t in parts)
        y = interval_attention(q, k, v, low, high, impl="triton")
        found.append((y, *torch.autograd.grad(y, rows, probe)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_kernels_give_the_gradients_that_are_wanted() -> None:
    leaves = _leaves(1, 20, 20)
    low, high = _intervals("causal", 1, 20, 20)
    expected = torch.autograd.grad(attend(leaves, low, high, impl="triton").sum(), leaves)
    for chosen in ([0], [1], [2], [1, 2]):
        some: Any = [t if i in chosen else t.detach() for i, t in enumerate(leaves)]
        y = attend(some, low, high, impl="triton")
        grads = torch.autograd.grad(y.sum(), [some[i] for i in chosen])
        for i, grad in zip(chosen, grads, strict=True):
            assert torch.equal(grad, expected[i])


def assert_same_in_places(
    rows: int, queries: int, blind: int, size: int, dtype: torch.dtype, tolerance: float, impl: str
) -> None:
    """As gathered queries whose results are put back; the last `blind` of them see nothing."""
    leaves = _leaves(2, rows, rows, 4, 2, size, dtype)
    places = torch.rand(2, rows, device=DEVICE).argsort(dim=1)[:, :queries]
    places[:, : queries - blind] = places[:, : queries - blind].sort(dim=1).values
    low, high = (places - rows // 3).clamp(min=0), places.clone()
    low[:, queries - blind :], high[:, queries - blind :] = 1, 0
    wide: Any = [t.detach().double().requires_grad_() for t in leaves]
    near = rows_at(wide[0], places)
    y = interval_attention_definition(near, *wide[1:], low, high, None, size**-0.5)
    expected = put_rows(y, places, rows)
    y = attend(leaves, low, high, places=places, impl=impl)
    probe = torch.randn_like(expected)
    grads = torch.autograd.grad(y, leaves, probe.to(dtype))
    right = torch.autograd.grad(expected, wide, probe.to(dtype).double())
    for name, got, wanted in zip("yqkv", (y, *grads), (expected, *right), strict=True):
        assert relative_error(got, wanted) < tolerance, name
    hidden = torch.ones(2, rows, dtype=torch.bool, device=DEVICE)
    hidden.scatter_(1, places[:, : queries - blind], False)
    assert not y[hidden].any()
    assert not grads[0][hidden].any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("queries", "blind"), [(37, 20), (21, 0), (37, 37)])
def test_queries_in_their_places(queries: int, blind: int, impl: str) -> None:
    assert_same_in_places(37, queries, blind, 16, torch.float32, SINGLE, impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_queries(impl: str) -> None:
    leaves = _leaves(2, 0, 7)
    none = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    y = attend(leaves, none, none, impl=impl)
    assert y.shape == (2, 0, 2, 16)
    assert not torch.autograd.grad(y.sum(), leaves[1])[0].any()


def test_kernels_are_traceable_and_compile_without_breaks() -> None:
    leaves = _leaves(1, 17, 17)
    low, high = _intervals("window", 1, 17, 17)
    torch.library.opcheck(
        launch._forward, (*leaves, low, high, None, None, 0.25), test_utils=TRACEABLE
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interval_attention(q, k, v, low, high, impl="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    for grad, right in zip(grads, expected, strict=True):
        assert torch.equal(grad, right)


def test_bad_input_is_refused() -> None:
    q, k, v = _leaves(2, 5, 7, 4, 2)
    low, high = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    low, high = low.to(DEVICE), high.to(DEVICE)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"q": q[:, :, :3]}, "divides"),
        ({"k": k[..., :8]}, "shape"),
        ({"v": v[:, :6]}, "v must have"),
        ({"low": low[:, :4]}, "low"),
        ({"high": high.float()}, "high"),
        ({"low": low.bool()}, "low"),
        ({"low": low[:1]}, "one shape"),
        ({"key_mask": torch.ones(2, 7, device=DEVICE)}, "key_mask"),
        ({"scale": 0.0}, "scale"),
        ({"places": low[:, :4]}, "low"),
        ({"places": low.int()}, "places"),
        ({"places": low[:1]}, "places"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            interval_attention(**{"q": q, "k": k, "v": v, "low": low, "high": high, **changed})
    wide: Any = [t.double() for t in (q, k, v)]
    with pytest.raises(ImplementationUnavailableError, match="float64"):
        attend(wide, low, high, impl="triton")
    large: Any = [torch.zeros(1, 5, 1, 300, device=DEVICE)] * 3
    with pytest.raises(ImplementationUnavailableError, match="dimensions"):
        attend(large, low[:1], high[:1], impl="triton")
    # Products of two 16-bit dtypes are formed in fp32.
    q, k, v = (t[..., :256].half() for t in large)
    with pytest.raises(ImplementationUnavailableError, match="dimensions"):
        attend([q.bfloat16(), k, v], low[:1], high[:1], impl="triton")


def test_kernels_refuse_a_triton_that_fails_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    package = sys.modules["ssm_hf.ops.interval_attention"]
    monkeypatch.setattr(package, "compiles_for_tensor_memory", False)
    q, k, v = _leaves(1, 5, 5)
    assert package.why_unsupported(q, k, v) is None
    monkeypatch.setattr(package, "architecture", lambda device: "sm100")
    low, high = _intervals("causal", 1, 5, 5)
    with pytest.raises(ImplementationUnavailableError, match=r"Triton 3\.5 or later"):
        attend([q, k, v], low, high, impl="triton")
    assert attend([q, k, v], low, high).shape == q.shape


STEPS: dict[str, dict[str, Any]] = {
    "empty": {"length": [0, 0, 0]},
    "some": {"length": [5, 0, 22]},
    "full": {"length": [24, 23, 71]},
    "window": {"length": [24, 3, 71], "window": 7},
    "one": {"length": [24, 3, 71], "window": 1},
    "first": {"length": [24, 3, 71], "window": 20, "first": [24, 0, 66]},
    "chosen": {"length": [24, 3, 71], "attend": [True, False, True], "store": [False, True, True]},
}


def _step(
    case: str, heads: int, groups: int, size: int, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Any]]:
    options = {
        name: torch.tensor(value, device=DEVICE) if isinstance(value, list) else value
        for name, value in STEPS[case].items()
    }
    new = [torch.randn(3, n, size, device=DEVICE, dtype=dtype) for n in (heads, groups, groups)]
    cache = [torch.randn(3, 24, groups, size, device=DEVICE, dtype=dtype) for _ in range(2)]
    return [*new, *cache], options


@pytest.mark.parametrize("case", STEPS)
def test_step_equals_the_definition(case: str) -> None:
    """By numbers of tokens: slots are looked up one by one."""
    inputs, options = _step(case, 4, 2, 16, torch.float64)
    q, k, v, keys, values = (t.clone() for t in inputs)
    y = interval_attention_step(*inputs, **options, impl="reference")
    for row, n in enumerate(options["length"].tolist()):
        stores = "store" not in options or bool(options["store"][row])
        attends = "attend" not in options or bool(options["attend"][row])
        first = max(n - options.get("window", 24) + 1, n - 23, 0)
        first = max(first, int(options["first"][row])) if "first" in options else first
        slots = [p % 24 for p in range(first, n)]
        if attends:
            at = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
            expected = interval_attention_definition(
                q[row, None, None],
                torch.cat([keys[row, slots], k[row, None]])[None],
                torch.cat([values[row, slots], v[row, None]])[None],
                at, at + len(slots), None, 0.25,
            )  # fmt: skip
            assert relative_error(y[row], expected[0, 0]) < 1e-13
        else:
            assert not y[row].any()
        if stores:
            keys[row, n % 24], values[row, n % 24] = k[row], v[row]
    assert torch.equal(inputs[3], keys)
    assert torch.equal(inputs[4], values)


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (6, 1, 20), (1, 1, 1)])
@pytest.mark.parametrize("case", STEPS)
def test_step_kernels_equal_torch(case: str, heads: int, groups: int, size: int) -> None:
    inputs, options = _step(case, heads, groups, size, torch.float32)
    wide = [t.double() for t in inputs]
    y = interval_attention_step(*inputs, **options, impl="triton")
    assert relative_error(y, interval_attention_step(*wide, **options)) < SINGLE
    for got, expected in zip(inputs[3:], wide[3:], strict=True):
        assert torch.equal(got.double(), expected)


def test_step_kernels_take_a_cache_of_another_dtype() -> None:
    inputs, options = _step("window", 4, 2, 16, torch.float32)
    inputs[3:] = [t.bfloat16() for t in inputs[3:]]
    copies = [t.clone() for t in inputs]
    y = interval_attention_step(*inputs, **options, impl="triton")
    # The new key is rounded to 8 bits as it is stored; the interpreter truncates it.
    assert relative_error(y, interval_attention_step(*copies, **options)) < HALF


def test_step_kernels_take_views_of_counts() -> None:
    tensors, options = _step("some", 4, 2, 16, torch.float32)
    views = {
        name: torch.stack([t, torch.zeros_like(t)], dim=1)[:, 0] if isinstance(t, Tensor) else t
        for name, t in options.items()
    }
    copies = [t.clone() for t in tensors]
    y = interval_attention_step(*tensors, **views, impl="triton")
    assert torch.equal(y, interval_attention_step(*copies, **options, impl="triton"))


def test_bad_steps_are_refused() -> None:
    (q, k, v, keys, values), options = _step("some", 4, 2, 16, torch.float32)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"k": k[:, :1]}, "k must"),
        ({"keys": keys[..., :8]}, "keys must"),
        ({"values": values[:, :5]}, "values must"),
        ({"q": q[:, :3]}, "divides"),
        ({"window": 0}, "window"),
        ({"scale": -1.0}, "scale"),
        ({"keys": keys.transpose(0, 1).contiguous().transpose(0, 1)}, "contiguous"),
        ({"first": options["length"][:2]}, "first"),
        ({"q": q[0]}, "q must"),
        ({"length": options["length"].int()}, "length must be torch.int64"),
        ({"attend": options["length"]}, "attend must be torch.bool"),
    ]
    given = {"q": q, "k": k, "v": v, "keys": keys, "values": values, **options}
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            interval_attention_step(**{**given, **changed})


@needs_gpu
@pytest.mark.parametrize(
    ("kind", "size", "dtype"),
    [
        *[(kind, size, torch.bfloat16) for size in (64, 128) for kind in KINDS],
        ("documents", 16, torch.bfloat16),
        ("random", 32, torch.bfloat16),
        ("documents", 96, torch.bfloat16),
        ("documents", 192, torch.bfloat16),
        ("documents", 32, torch.float32),
        ("documents", 64, torch.float32),
        ("documents", 128, torch.float32),
    ],
)
def test_kernels_equal_the_definition_on_a_gpu(kind: str, size: int, dtype: torch.dtype) -> None:
    """Several tiles of every kind: seen by all, by some, by none of a tile's queries."""
    queries = 500 if kind == "selected" else 1111
    low, high = (t.expand(2, -1) for t in _intervals(kind, 2, queries, 1234))
    if kind in ("window", "documents"):
        low = low - 300
    # 9 bits of q, k, v, of weights and of the result
    tolerance = SINGLE if dtype == torch.float32 else 2**-7
    assert_same(_leaves(2, queries, 1234, 6, 2, size, dtype), low, high, tolerance)


@needs_gpu
@pytest.mark.parametrize(
    ("size", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32)]
)
@pytest.mark.parametrize(("queries", "blind"), [(1111, 800), (300, 0)])
def test_queries_in_their_places_on_a_gpu(
    queries: int, blind: int, size: int, dtype: torch.dtype
) -> None:
    tolerance = SINGLE if dtype == torch.float32 else 2**-7
    assert_same_in_places(1111, queries, blind, size, dtype, tolerance, "triton")


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_kernels_are_deterministic_captured_and_wait_for_nobody() -> None:
    leaves = _leaves(2, 700, 700, 4, 2, 64, torch.bfloat16)
    low, high = _intervals("documents", 2, 700, 700)

    def run() -> tuple[Tensor, ...]:
        y = attend(leaves, low, high, impl="triton")
        return (y, *torch.autograd.grad(y.square().sum(), leaves))

    expected = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode(0)
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("slots", [64, 4096])
def test_captured_steps_follow_the_length(slots: int) -> None:
    q = torch.randn(2, 8, 64, device=DEVICE).bfloat16()
    k, v = torch.randn(2, 2, 2, 64, device=DEVICE).bfloat16()
    keys, values = torch.randn(2, 2, slots, 2, 64, device=DEVICE).bfloat16()
    length = torch.tensor([3, slots + 5], device=DEVICE)
    copies: Any = [keys.clone(), values.clone()]
    interval_attention_step(q, k, v, keys.clone(), values.clone(), length, window=50, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = interval_attention_step(q, k, v, keys, values, length, window=50, impl="triton")
    for _ in range(3):
        graph.replay()
        expected = interval_attention_step(
            q, k, v, copies[0], copies[1], length, window=50, impl="reference"
        )
        # 9 bits of the result
        assert relative_error(y, expected) < 2**-7
        assert torch.equal(keys, copies[0])
        length += 1
        q.normal_()
        k.normal_()
