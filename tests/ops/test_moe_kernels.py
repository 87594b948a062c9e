"""The kernels of routers and experts against the definitions in fp64."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_hf.ops.moe import experts_definition, moe_experts, moe_route
from tests.helpers import kernel_device, relative_error
from tests.ops.test_moe import LOADS, ROUTERS, SINGLE, E, K, _route, assert_same, draw

DEVICE = kernel_device()
launch = importlib.import_module("ssm_hf.ops.moe.launch")
route_launch = importlib.import_module("ssm_hf.ops.moe.route_launch")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRACEABLE = ("test_schema", "test_autograd_registration", "test_faketensor")


def _draw(*args: Any, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    return draw(*args, **{"dtype": torch.float32, "device": DEVICE, **options})


@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS.keys())
@pytest.mark.parametrize("masked", [False, True])
def test_route_kernel_equals_torch(options: dict[str, Any], masked: bool) -> None:
    logits = torch.randn(9, E, device=DEVICE, requires_grad=True)
    wide = logits.detach().double().requires_grad_()
    mask = torch.rand(9, device=DEVICE) > 0.3 if masked else None
    got = _route(logits, options, mask=mask, impl="triton")
    right = _route(wide, options, mask=mask, impl="reference")
    assert torch.equal(got.experts, right.experts)
    assert relative_error(got.weights, right.weights) < SINGLE
    probe = torch.randn_like(wide[:, :K])
    (grad,) = torch.autograd.grad(got.weights, logits, probe.float())
    (expected,) = torch.autograd.grad(right.weights, wide, probe)
    assert relative_error(grad, expected) < SINGLE


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (7, 7), (65, 2)])
def test_route_kernel_takes_any_number_of_experts(experts: int, top_k: int) -> None:
    logits = torch.randn(2, 3, experts, device=DEVICE).half()
    got = moe_route(logits, top_k, impl="triton")
    right = moe_route(logits, top_k, impl="reference")
    assert torch.equal(got.experts, right.experts)
    assert relative_error(got.weights, right.weights) < SINGLE


@pytest.mark.parametrize(("slots", "experts"), [(1, 1), (30, 5), (400, 3), (150, 37), (70, 64)])
def test_slots_are_sorted_by_expert(slots: int, experts: int) -> None:
    """Numbers of no expert are left out."""
    chosen = torch.randint(experts + 2, (slots,), device=DEVICE)
    order, totals = launch._sort(chosen, experts)
    assert torch.equal(totals.long(), chosen.bincount(minlength=experts + 2)[:experts])
    expected = chosen.argsort(stable=True)[: int(totals.sum())]
    assert torch.equal(order[: len(expected)].long(), expected)


@pytest.mark.parametrize("load", ["one token", "pads"])
def test_kernels_equal_the_definition(load: str) -> None:
    leaves, experts = _draw(13, 5, 2, out=20)
    experts = LOADS[load](experts)
    experts = torch.where(experts == 2, 1, experts)  # a token may have an expert twice, or none
    leaves = {n: v[: len(experts)].detach().requires_grad_() if n in ("x", "weights") else v
              for n, v in leaves.items()}  # fmt: skip
    assert_same(leaves, experts, SINGLE, impl="triton")


def test_kernels_take_sizes_that_no_block_divides() -> None:
    """All experts chosen, several tiles of columns."""
    leaves, experts = _draw(7, 3, 3, size=37, inner=41, out=35, gated=False)
    assert_same(leaves, experts, SINGLE, gated=False, impl="triton")


def test_kernels_bear_all_tokens_at_one_expert() -> None:
    leaves, experts = _draw(40, 3, 1)
    assert_same(leaves, torch.full_like(experts, 2), SINGLE, impl="triton")


# Rows of pads hold what was in memory; products of theirs are not stored.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("gated", "more", "offset"), [
    (True, 0, 0), (False, 0, 0), (True, 8, 0), (True, 0, 1),
])  # fmt: skip
def test_kernels_read_weights_by_descriptors(
    gated: bool, more: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where addresses and sizes allow it; `more` columns than blocks divide."""
    tuned = launch.tuned
    made = []

    def wanted(kernel: str, *rest: Any) -> dict[str, Any]:
        options = tuned(kernel, *rest)
        return {**options, "DESCRIBED": 1} if "DESCRIBED" in options else options

    def described(matrices: Tensor, block: list[int]) -> Any:
        made.append(matrices.data_ptr() % 16)
        return describe(matrices, block)

    describe = launch.described
    monkeypatch.setattr(launch, "tuned", wanted)
    monkeypatch.setattr(launch, "described", described)
    size = 128 if DEVICE.type == "cuda" else 32
    leaves, experts = _draw(
        20, 2, 2, size=size, inner=size + more, out=size, gated=gated, dtype=torch.float16
    )
    for name in ("w_in", "w_out"):  # as views of one flat tensor
        flat = torch.cat((leaves[name].new_zeros(offset), leaves[name].detach().flatten()))
        leaves[name] = flat[offset:].view(leaves[name].shape).requires_grad_()
    experts[::5] = 2
    # 11 bits of the inputs, the hidden layer and the output
    assert_same(leaves, experts, 2**-9, gated=gated, impl="triton")
    # Each product but those of the weights' gradients has one of weights; two have one of sorted
    # rows as well, which no block divides where there is `more`.
    assert made == [0] * (0 if offset else 2 if more else 6)


def test_compiling_ahead_tells_descriptors_apart() -> None:
    """By what decides the machine code, not by whose matrices they describe."""
    seen = importlib.import_module("ssm_hf.ops.kernels_ahead")._seen_by_compiler
    described = importlib.import_module("ssm_hf.ops.moe.kernels").described
    one, same = (torch.empty(n, 32, 64, dtype=torch.float16, device=DEVICE) for n in (2, 5))
    assert seen(described(one, [32, 64])) == seen(described(same, [32, 64]))
    others = [described(one, [16, 64]), described(one.bfloat16(), [32, 64])]
    assert len({seen(described(one, [32, 64])), *map(seen, others)}) == 3


def test_kernels_form_products_in_bf16_from_wide_weights() -> None:
    leaves, experts = _draw(9, 3, 2)
    y = moe_experts(**leaves, experts=experts, dtype=torch.bfloat16, impl="triton")
    assert y.dtype == torch.bfloat16
    # 8 bits of x, weights, the hidden layer and the output
    assert_same(leaves, experts, 2**-6, dtype=torch.bfloat16, impl="triton")


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_few_tokens_without_gradients_equal_the_definition(tokens: int, gated: bool) -> None:
    leaves, experts = _draw(tokens, 5, 2, size=37, inner=41, out=35, gated=gated)
    experts[-1, 0] = 5
    activation: Any = "silu" if gated else "relu2"
    options = {"experts": experts, "activation": activation, "gated": gated}
    with torch.no_grad():
        y = moe_experts(**leaves, **options, impl="triton")
    wide = {n: v.detach().double() for n, v in leaves.items()}
    assert relative_error(y, experts_definition(**wide, **options)) < SINGLE


@pytest.mark.parametrize("frozen", [("w_in", "w_out"), ("x", "weights")])
def test_kernels_with_frozen_inputs(frozen: tuple[str, ...]) -> None:
    leaves, experts = _draw(6, 4, 2)
    leaves = {n: v.detach() if n in frozen else v for n, v in leaves.items()}
    assert_same(leaves, experts, SINGLE, impl="triton")


def test_kernels_take_rows_of_a_wide_tensor() -> None:
    leaves, experts = _draw(6, 4, 2)
    wide = torch.randn(6, 40, device=DEVICE, requires_grad=True)
    probe = torch.randn(6, 40, device=DEVICE)[:, :16]  # gradients may come with strides too
    grads = []
    for x in (wide[:, 8:24], wide[:, 8:24].contiguous()):
        y = moe_experts(**{**leaves, "x": x}, experts=experts, impl="triton")
        grads.append(torch.autograd.grad(y, [wide, leaves["w_out"]], probe))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_kernels_are_traceable() -> None:
    leaves, experts = _draw(6, 4, 2)
    arguments = (leaves["x"], experts, leaves["weights"], leaves["w_in"], leaves["w_out"],
                 "silu", True)  # fmt: skip
    torch.library.opcheck(launch._forward, (*arguments, torch.float32, True), test_utils=TRACEABLE)
    logits = torch.randn(6, 4, device=DEVICE, requires_grad=True)
    torch.library.opcheck(
        route_launch._forward, (logits, None, None, 2, "softmax", False, 1.0, 1, 1),
        test_utils=TRACEABLE,
    )  # fmt: skip


def test_kernels_compile_without_breaks() -> None:
    leaves, _ = _draw(6, 4, 2)
    logits = torch.randn(6, 4, device=DEVICE, requires_grad=True)

    def run(logits: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        routing = moe_route(logits, 2, impl="triton")
        return moe_experts(x, routing.experts, routing.weights, w_in, w_out, impl="triton")

    inputs = (logits, leaves["x"], leaves["w_in"], leaves["w_out"])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(*inputs).sum(), inputs)
    grads = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    for grad, right in zip(grads, expected, strict=True):
        assert torch.equal(grad, right)


def test_kernels_take_no_tokens() -> None:
    leaves, experts = _draw(6, 4, 2)
    leaves = {n: v[:0].detach().requires_grad_() if n in ("x", "weights") else v
              for n, v in leaves.items()}  # fmt: skip
    for impl in ("reference", "triton"):
        y = moe_experts(**leaves, experts=experts[:0], impl=impl)
        assert y.shape == (0, 16)
        assert not torch.autograd.grad(y.sum(), leaves["w_in"])[0].any()


@needs_gpu
def test_kernels_can_be_captured_and_follow_new_routing() -> None:
    for tokens in (1, 64):
        leaves, experts = _draw(tokens, 8, 2, size=64, inner=128, out=64, dtype=torch.bfloat16)
        leaves = {n: v.detach() for n, v in leaves.items()}
        for _ in range(2):
            moe_experts(**leaves, experts=experts, impl="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moe_experts(**leaves, experts=experts, impl="triton")
        experts.copy_((experts + 3) % 8)
        leaves["x"].normal_()
        graph.replay()
        assert torch.equal(y, moe_experts(**leaves, experts=experts, impl="triton"))


@needs_gpu
# torch says that the mode may miss some waits.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_kernels_do_not_wait_for_the_gpu() -> None:
    leaves, experts = _draw(300, 8, 2, size=64, inner=128, out=64, dtype=torch.bfloat16)
    logits = torch.randn(300, 8, device=DEVICE, requires_grad=True)
    for mode in (0, "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            weights = moe_route(logits, 2).weights
            y = moe_experts(**{**leaves, "weights": weights}, experts=experts)
            y.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode(0)
