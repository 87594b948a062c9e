"""Fused linear layer and cross-entropy against F.cross_entropy over all logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_hf.ops import linear_cross_entropy
from ssm_hf.ops.cross_entropy import launch, reference
from tests.helpers import kernel_device, relative_error

DEVICE = kernel_device()
IGNORED = -100
# fp32 rounding of sums over a hundred products.
SINGLE = 1e-6
kernels_and_torch = pytest.mark.parametrize("impl", ["reference", "triton"])


@pytest.fixture(autouse=True)
def _small_chunks_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 tokens, and blocks of 16 logits."""
    monkeypatch.setattr(reference, "TILE", 4)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 4 * 100 * 4)
    tuned = launch.tuned
    monkeypatch.setattr(launch, "tuned", lambda *a: {**tuned(*a), "BLOCK": 16})


def _inputs(
    *tokens: int, vocabulary: int = 99, width: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor]:
    leaves = {
        "hidden": torch.randn(*tokens, width),
        "weight": torch.randn(vocabulary, width),
        "bias": torch.randn(vocabulary),
    }
    targets = torch.randint(vocabulary, tokens)
    targets.view(-1)[::3] = IGNORED
    on_device = {n: v.to(DEVICE, dtype).requires_grad_() for n, v in leaves.items()}
    return on_device, targets.to(DEVICE)


def _plain(leaves: dict[str, Tensor], targets: Tensor, num_items: Any = None) -> Tensor:
    logits = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
    return loss if num_items is None else loss / num_items


def _assert_same(
    leaves: dict[str, Tensor], loss: Tensor, expected: Tensor, wide: dict[str, Tensor], bound: float
) -> None:
    needed = [n for n, v in leaves.items() if v.requires_grad]
    grads = torch.autograd.grad(3 * loss, [leaves[n] for n in needed])
    right = torch.autograd.grad(3 * expected, [wide[n] for n in needed])
    assert relative_error(loss, expected) < bound
    for name, a, b in zip(needed, grads, right, strict=True):
        assert a.dtype == leaves[name].dtype
        assert relative_error(a, b) < bound, name


def _double(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.detach().double().requires_grad_() for n, v in leaves.items()}


@kernels_and_torch
@pytest.mark.parametrize("tokens", [(1,), (2, 3), (13,)])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_equals_cross_entropy_of_all_logits(
    impl: str, tokens: tuple[int, ...], bias: bool
) -> None:
    leaves, targets = _inputs(*tokens)
    targets.view(-1)[-1] = 98
    if not bias:
        del leaves["bias"]
    wide = _double(leaves)
    loss = linear_cross_entropy(**leaves, targets=targets, impl=impl)
    assert loss.dtype == torch.float32
    _assert_same(leaves, loss, _plain(wide, targets), wide, SINGLE)


@kernels_and_torch
@pytest.mark.parametrize("num_items", [7, torch.tensor(7)])
def test_loss_is_divided_by_the_given_number(impl: str, num_items: Any) -> None:
    leaves, targets = _inputs(9)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(DEVICE)
    wide = _double(leaves)
    loss = linear_cross_entropy(**leaves, targets=targets, num_items=num_items, impl=impl)
    _assert_same(leaves, loss, _plain(wide, targets, num_items), wide, SINGLE)
    total = linear_cross_entropy(**leaves, targets=targets, reduction="sum", impl=impl)
    assert relative_error(total / 7, loss) < SINGLE


def test_torch_path_is_exact_in_doubles() -> None:
    leaves, targets = _inputs(9, dtype=torch.float64)
    wide = _double(leaves)
    loss = linear_cross_entropy(**leaves, targets=targets)
    assert loss.dtype == torch.float64
    _assert_same(leaves, loss, _plain(wide, targets), wide, 1e-13)
    total, count = reference.linear_cross_entropy_definition(
        *leaves.values(), targets, IGNORED, torch.float64
    )
    assert relative_error(total / count, loss) < 1e-13


@kernels_and_torch
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_loss_with_a_frozen_input(impl: str, frozen: str) -> None:
    leaves, targets = _inputs(9)
    wide = _double(leaves)
    leaves[frozen] = leaves[frozen].detach()
    loss = linear_cross_entropy(**leaves, targets=targets, impl=impl)
    _assert_same(leaves, loss, _plain(wide, targets), wide, SINGLE)


@kernels_and_torch
def test_loss_alone_forms_no_gradients(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, targets = _inputs(9)
    expected = linear_cross_entropy(**leaves, targets=targets, impl=impl)

    def forbidden(*_: Any) -> None:
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(reference, "_add_product", forbidden)
    with torch.no_grad():
        loss = linear_cross_entropy(**leaves, targets=targets, impl=impl)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad


@kernels_and_torch
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_logits_as_a_linear_layer_does(
    impl: str, weight_dtype: torch.dtype
) -> None:
    leaves, targets = _inputs(9)
    leaves["weight"] = leaves["weight"].detach().to(weight_dtype).requires_grad_()
    wide = _double({n: v.bfloat16() for n, v in leaves.items()})
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = linear_cross_entropy(**leaves, targets=targets, impl=impl)
        logits = F.linear(leaves["hidden"], leaves["weight"], leaves["bias"]).float()
    assert loss.dtype == torch.float32
    # Both round logits to 8 bits; sums inside the products may differ.
    assert relative_error(loss, F.cross_entropy(logits, targets)) < 2**-9
    # The gradients of the logits are rounded once more; the interpreter cuts off.
    _assert_same(leaves, loss, _plain(wide, targets), wide, 2**-6)


@kernels_and_torch
def test_mean_over_nothing_is_nan_and_pulls_at_nothing(impl: str) -> None:
    leaves, targets = _inputs(5)
    loss = linear_cross_entropy(**leaves, targets=targets.fill_(IGNORED), impl=impl)
    assert loss.isnan()
    assert all(not g.any() for g in torch.autograd.grad(loss, list(leaves.values())))
    leaves, targets = _inputs(0)
    assert linear_cross_entropy(**leaves, targets=targets, impl=impl).isnan()


def test_kernel_bears_logits_of_any_size() -> None:
    logits = torch.randn(3, 40, device=DEVICE) * 1e4
    logits[:, :20] = -float("inf")  # a whole block and more
    targets = torch.tensor([20, 30, 39], device=DEVICE)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    (grad,) = torch.autograd.grad(expected.sum(), wide)
    losses = launch._score(logits, targets, IGNORED, True)
    assert relative_error(losses, expected) < SINGLE
    assert relative_error(logits, grad) < SINGLE


def test_chunks_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, targets = _inputs(30)
    whole = None
    for chunk_bytes in (1 << 30, 1, 4000):
        monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
        loss = linear_cross_entropy(**leaves, targets=targets)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        whole = whole or (loss, *grads)
        for a, b in zip((loss, *grads), whole, strict=True):
            assert relative_error(a, b) < SINGLE


@kernels_and_torch
def test_loss_compiles_without_breaks(impl: str) -> None:
    leaves, targets = _inputs(2, 5)
    inputs = list(leaves.values())

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias=bias, impl=impl)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for grad, right in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert relative_error(grad, right) < SINGLE


def test_kernels_are_traceable() -> None:
    leaves, targets = _inputs(2, 5)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for wanted in ([True, True, True], [True, False, False]):
        arguments = (*leaves.values(), targets, IGNORED, torch.float32, wanted)
        torch.library.opcheck(launch._forward, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(9, 5)}, r"weight must have shape \(V, 8\), got \(9, 5\)"),
        ({"targets": torch.ones(4)}, r"targets must be integers of shape \(4,\), got .*float32"),
        ({"targets": torch.ones(3).long()}, r"targets must be .* of shape \(3,\)"),
        ({"bias": torch.ones(8)}, r"bias must have shape \(9,\), got \(8,\)"),
        ({"reduction": "none"}, r'reduction must be "mean" or "sum"'),
        ({"reduction": "sum", "num_items": 3}, r"num_items divides the sum"),
        ({"weight": torch.ones(9, 8, device="meta"), "impl": "triton"}, r"weight lies on meta"),
    ],
)
def test_loss_refuses(changes: dict, message: str) -> None:
    arguments = {"hidden": torch.ones(4, 8), "weight": torch.ones(9, 8),
                 "targets": torch.zeros(4).long()}  # fmt: skip
    arguments = {**arguments, **changes}
    arguments = {n: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type != "meta" else v
                 for n, v in arguments.items()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
