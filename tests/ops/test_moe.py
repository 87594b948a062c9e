"""Routing, experts and losses of a mixture of experts: the torch paths against definitions."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.jamba.modeling_jamba import load_balancing_loss_func

from ssm_hf.ops import ImplementationUnavailableError
from ssm_hf.ops.moe import (
    Routing,
    experts_definition,
    load_balancing_loss,
    moe_experts,
    moe_route,
    reference,
    router_statistics,
    router_z_loss,
)
from tests.helpers import kernel_device, relative_error

# fp64 rounding of sums of at most a hundred products.
DOUBLE = 1e-12
# The same in fp32.
SINGLE = 1e-6
DEVICE = kernel_device()

ROUTERS: dict[str, dict[str, Any]] = {
    "jamba": {},
    "renormalised": {"renormalise": True},
    "scaled": {"renormalise": True, "scale": 2.5},
    "sigmoid": {"kind": "sigmoid"},
    "nemotron": {"kind": "sigmoid", "renormalise": True, "scale": 2.5, "groups": 3,
                 "top_groups": 2, "bias": 0.3},
    "groups-of-one": {"kind": "sigmoid", "groups": 12, "top_groups": 5},
}  # fmt: skip
routers = pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS.keys())
E, K = 12, 3


def _route(logits: Tensor, options: dict[str, Any], top_k: int = K, **more: Any) -> Routing:
    options = dict(options)
    if "bias" in options:
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(logits.shape[-1], generator=generator) * options["bias"]
        options["bias"] = bias.to(logits)
    return moe_route(logits, top_k, **options, **more)


def _by_hand(logits: list[float], options: dict[str, Any], top_k: int) -> dict[int, float]:
    """Experts and weights of one token, in plain Python."""
    size, sigmoid = len(logits), options.get("kind") == "sigmoid"
    if sigmoid:
        score = [1 / (1 + math.exp(-v)) for v in logits]
    else:
        total = sum(math.exp(v) for v in logits)
        score = [math.exp(v) / total for v in logits]
    choice, groups = list(score), options.get("groups", 1)
    if "bias" in options:
        generator = torch.Generator().manual_seed(1)
        bias = torch.randn(size, generator=generator) * options["bias"]
        choice = [c + float(b) for c, b in zip(choice, bias, strict=True)]
    width = size // groups
    best = [
        sum(sorted(choice[g * width : (g + 1) * width], reverse=True)[:2]) for g in range(groups)
    ]
    kept = sorted(range(groups), key=lambda g: -best[g])[: options.get("top_groups", 1)]
    allowed = [e for e in range(size) if e // width in kept]
    chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
    weights = {e: score[e] for e in chosen}
    if options.get("renormalise"):
        weights = {e: w / sum(weights.values()) for e, w in weights.items()}
    return {e: w * options.get("scale", 1.0) for e, w in weights.items()}


@routers
def test_route_equals_a_routing_by_hand(options: dict[str, Any]) -> None:
    logits = torch.randn(7, E, dtype=torch.float64)
    routing = _route(logits, options)
    for i in range(7):
        expected = _by_hand(logits[i].tolist(), options, K)
        assert routing.experts[i].tolist() == list(expected)
        assert routing.weights[i].tolist() == pytest.approx(list(expected.values()), rel=1e-12)


@routers
def test_route_keeps_leading_dimensions_and_precision(options: dict[str, Any]) -> None:
    logits = torch.randn(2, 5, E)
    routing = _route(logits.bfloat16(), options)
    assert routing.weights.shape == routing.experts.shape == (2, 5, K)
    assert routing.weights.dtype == torch.float32
    exact = _route(logits.bfloat16().double(), options)
    assert torch.equal(routing.experts, exact.experts)
    assert relative_error(routing.weights, exact.weights) < SINGLE


@routers
def test_route_gradient(options: dict[str, Any]) -> None:
    logits = torch.randn(4, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: _route(v, options).weights, (logits,))


@pytest.mark.parametrize(
    ("options", "pulls_at_all"),
    [(ROUTERS["jamba"], True), (ROUTERS["renormalised"], False), (ROUTERS["nemotron"], False)],
    ids=["jamba", "granite", "nemotron"],
)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradient_of_experts_that_are_not_chosen(
    options: dict[str, Any], pulls_at_all: bool, impl: str
) -> None:
    """A softmax over all experts pulls at all of them, through its normaliser."""
    logits = torch.randn(6, E, device=DEVICE, requires_grad=True)
    routing = _route(logits, options, impl=impl)
    probe = torch.rand(6, K, device=DEVICE)
    (grad,) = torch.autograd.grad(routing.weights, logits, probe)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, routing.experts, False)
    if pulls_at_all:
        p = logits.detach().softmax(-1)
        expected = -(probe * routing.weights.detach()).sum(1, keepdim=True) * p
        assert relative_error(grad[others], expected[others]) < SINGLE
        assert bool((grad[others] != 0).all())
    else:
        assert not grad[others].any()
    assert bool((grad[~others] != 0).all())


def test_correction_bias_gets_no_gradient() -> None:
    bias = torch.randn(E, requires_grad=True)
    logits = torch.randn(3, E, requires_grad=True)
    weights = moe_route(logits, K, kind="sigmoid", bias=bias).weights
    assert torch.autograd.grad(weights.sum(), (logits, bias), allow_unused=True)[1] is None


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_of_equal_experts_the_lower_number_is_chosen(kind: Any, impl: str) -> None:
    logits = torch.zeros(2, 7, device=DEVICE)
    logits[1, [2, 5]] = 1.0
    routing = moe_route(logits, 4, kind=kind, impl=impl)
    assert routing.experts.tolist() == [[0, 1, 2, 3], [2, 5, 0, 1]]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_unknown_logits_are_not_hidden(impl: str) -> None:
    logits = torch.randn(3, 5, device=DEVICE)
    logits[1, 2] = float("nan")
    routing = moe_route(logits, 2, renormalise=True, impl=impl)
    assert routing.weights[1].isnan().any()
    assert not routing.weights[[0, 2]].isnan().any()
    assert int(routing.experts.max()) < 5


@routers
def test_pads_go_to_no_expert(options: dict[str, Any]) -> None:
    logits = torch.randn(2, 5, E, requires_grad=True)
    mask = torch.tensor([[True, False, True, True, True], [False] * 5])
    routing, whole = _route(logits, options, mask=mask), _route(logits, options)
    assert bool((routing.experts[~mask] == E).all())
    assert not routing.weights[~mask].any()
    assert torch.equal(routing.experts[mask], whole.experts[mask])
    assert torch.equal(routing.weights[mask], whole.weights[mask])
    (grad,) = torch.autograd.grad(routing.weights.square().sum(), logits)
    assert not grad[~mask].any()


def draw(
    tokens: int, experts: int, top_k: int, *, size: int = 16, inner: int = 24, out: int = 16,
    gated: bool = True, dtype: torch.dtype = torch.float64, device: Any = "cpu",
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Leaves x, weights, w_in, w_out, and each token's experts."""
    width = 2 * inner if gated else inner
    leaves = {
        "x": torch.randn(tokens, size),
        "weights": torch.rand(tokens, top_k),
        "w_in": torch.randn(experts, width, size) / 4,
        "w_out": torch.randn(experts, out, inner) / 4,
    }
    chosen = torch.rand(tokens, experts).argsort(1)[:, :top_k]
    leaves = {n: v.to(device, dtype).requires_grad_() for n, v in leaves.items()}
    return leaves, chosen.to(device)


def assert_same(
    leaves: dict[str, Tensor], experts: Tensor, bound: float, *, gated: bool = True, **options: Any
) -> None:
    """Output and all gradients equal the definition's in fp64."""
    activation = "silu" if gated else "relu2"
    y = moe_experts(**leaves, experts=experts, activation=activation, gated=gated, **options)
    wide = {n: v.detach().double().requires_grad_() for n, v in leaves.items()}
    expected = experts_definition(**wide, experts=experts, activation=activation, gated=gated)
    probe = torch.randn_like(expected)
    needed = [n for n, v in leaves.items() if v.requires_grad]
    grads = torch.autograd.grad(y, [leaves[n] for n in needed], probe.to(y.dtype))
    right = torch.autograd.grad(expected, [wide[n] for n in needed], probe)
    assert relative_error(y, expected) < bound
    for name, grad, other in zip(needed, grads, right, strict=True):
        assert grad.dtype == leaves[name].dtype
        assert relative_error(grad, other) < bound, name


LOADS = {
    "even": lambda e: e,
    "one token": lambda e: e[:1],
    "no token at some": lambda e: e % 2,
    "all at one": lambda e: torch.full_like(e, 3),
    "pads": lambda e: e.masked_fill((torch.arange(len(e), device=e.device) % 3 == 1)[:, None], 5),
    "pads alone": lambda e: torch.full_like(e, 5),
    "twice the same": lambda e: e[:, :1].expand_as(e),
}
loads = pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())


@loads
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_loop_equals_the_definition(load: Any, gated: bool) -> None:
    leaves, experts = draw(13, 5, 2, out=20, gated=gated)
    experts = load(experts)
    leaves = {n: v[: len(experts)].detach().requires_grad_() if n in ("x", "weights") else v
              for n, v in leaves.items()}  # fmt: skip
    assert_same(leaves, experts, DOUBLE, gated=gated, impl="reference")


@loads
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_torchs_grouped_product_equals_the_definition(load: Any, gated: bool) -> None:
    leaves, experts = draw(13, 5, 2, out=20, gated=gated, dtype=torch.float32)
    experts = load(experts)
    leaves = {n: v[: len(experts)].detach().requires_grad_() if n in ("x", "weights") else v
              for n, v in leaves.items()}  # fmt: skip
    if not hasattr(F, "grouped_mm"):
        with pytest.raises(ImplementationUnavailableError, match=r"torch 2\.10"):
            moe_experts(**leaves, experts=experts, impl="torch")
        return
    assert_same(leaves, experts, SINGLE, gated=gated, impl="torch")


def test_definition_is_a_sum_over_chosen_experts() -> None:
    leaves, experts = draw(6, 5, 2)
    y = experts_definition(**leaves, experts=experts, activation="silu", gated=True)
    for t in range(6):
        expected = torch.zeros(16, dtype=torch.float64)
        for e, weight in zip(experts[t], leaves["weights"][t], strict=True):
            gate, up = (leaves["w_in"][e] @ leaves["x"][t]).chunk(2)
            expected = expected + weight * (leaves["w_out"][e] @ (F.silu(gate) * up))
        assert relative_error(y[t], expected) < DOUBLE


def test_experts_keep_leading_dimensions() -> None:
    leaves, experts = draw(6, 5, 2)
    flat = moe_experts(**leaves, experts=experts)
    folded = {n: v.view(2, 3, -1) if n in ("x", "weights") else v for n, v in leaves.items()}
    assert torch.equal(moe_experts(**folded, experts=experts.view(2, 3, 2)).view(6, -1), flat)


def test_products_in_bf16_leave_weights_gradients_wide() -> None:
    leaves, experts = draw(13, 5, 2, dtype=torch.float32)
    y = moe_experts(**leaves, experts=experts, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    # 8 bits of x, weights, the hidden layer and the output.
    assert_same(leaves, experts, 2**-6, dtype=torch.bfloat16)


def test_loop_is_traceable() -> None:
    leaves, experts = draw(5, 4, 2, dtype=torch.float32)
    arguments = (leaves["x"], experts, leaves["weights"], leaves["w_in"], leaves["w_out"],
                 "silu", True, torch.float32, True)  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(reference._forward, arguments, test_utils=tests)


def _routings(layers: int, *lead: int, kind: Any = "softmax") -> list[Routing]:
    logits = [torch.randn(*lead, E, dtype=torch.float64) * 2 for _ in range(layers)]
    return [moe_route(v.requires_grad_(), K, kind=kind) for v in logits]


def test_balancing_loss_equals_transformers() -> None:
    routings = _routings(3, 2, 7)
    mask = torch.rand(2, 7) > 0.3
    logits = tuple(r.logits.flatten(0, 1) for r in routings)
    for given in (None, mask):
        loss = load_balancing_loss(routings, mask=given)
        theirs = load_balancing_loss_func(logits, E, K, None if given is None else given.long())
        # transformers counts in fp32
        assert relative_error(loss, theirs) < SINGLE
        leaves = [r.logits for r in routings]
        right = torch.autograd.grad(theirs, leaves)
        for grad, expected in zip(torch.autograd.grad(loss, leaves), right, strict=True):
            assert relative_error(grad, expected) < SINGLE


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_balancing_loss_by_hand(kind: Any) -> None:
    routings = _routings(2, 5, kind=kind)
    f, P = torch.zeros(2, E, dtype=torch.float64), torch.zeros(2, E, dtype=torch.float64)
    for layer, t in itertools.product(range(2), range(5)):
        for e in routings[layer].experts[t]:
            f[layer, e] += 1 / 5
        scores = routings[layer].logits[t].detach()
        scores = scores.exp() if kind == "softmax" else scores.sigmoid()
        P[layer] += scores / scores.sum() / 5
    whole = load_balancing_loss(routings)
    assert relative_error(whole, E * (f.mean(0) * P.mean(0)).sum()) < DOUBLE
    single = load_balancing_loss(routings, scope="per_layer")
    assert relative_error(single, E * (f * P).sum(1).mean()) < DOUBLE
    assert single != whole


def test_opposite_imbalances_cancel_in_the_global_loss_alone() -> None:
    towards = torch.full((4, 4), -9.0, dtype=torch.float64)
    towards[:, :2] = 9.0
    routings = [moe_route(v, 2) for v in (towards, towards.flip(1))]
    # k at perfect balance, E / k times as much when all tokens share k experts
    assert float(load_balancing_loss(routings)) == pytest.approx(2, rel=1e-6)
    assert float(load_balancing_loss(routings, scope="per_layer")) == pytest.approx(4, rel=1e-6)


def test_losses_do_not_see_pads() -> None:
    routings = _routings(2, 2, 6)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    kept = [Routing(r.logits[mask], r.weights[mask], r.experts[mask]) for r in routings]
    for loss in (load_balancing_loss, router_z_loss):
        padded = loss(routings, mask=mask)
        assert relative_error(padded, loss(kept)) < DOUBLE
        for grad in torch.autograd.grad(padded, [r.logits for r in routings]):
            assert not grad[~mask].any()
    statistics = router_statistics(routings, mask=mask)
    for value, expected in zip(statistics, router_statistics(kept), strict=True):
        assert relative_error(value, expected) < DOUBLE


def test_z_loss_by_hand() -> None:
    routings = _routings(2, 5)
    logits = torch.stack([r.logits for r in routings])
    expected = logits.exp().sum(-1).log().square().mean()
    assert relative_error(router_z_loss(routings), expected) < DOUBLE


def test_statistics_by_hand() -> None:
    logits = torch.tensor([[5.0, 0, 0, 0], [5.0, 1, 0, 0], [0, 0, 5.0, 1.0]], dtype=torch.float64)
    (load,), (imbalance,), (unused,), (entropy,) = router_statistics([moe_route(logits, 1)])
    assert load.tolist() == pytest.approx([2 / 3, 0, 1 / 3, 0])
    assert float(imbalance) == pytest.approx(8 / 3)
    assert int(unused) == 2
    p = logits.softmax(-1)
    assert float(entropy) == pytest.approx(float(-(p * p.log()).sum(-1).mean()))


X, CHOSEN, WEIGHTS = torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)
FIT = {"x": X, "experts": CHOSEN, "weights": WEIGHTS, "w_in": torch.ones(4, 12, 8),
       "w_out": torch.ones(4, 8, 6)}  # fmt: skip


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        (moe_route, {"logits": X, "top_k": 9}, r"between 1 and .* experts, 8, got 9"),
        (moe_route, {"logits": X, "top_k": 0}, r"top_k must lie between 1 .* got 0"),
        (moe_route, {"logits": X, "top_k": 2, "kind": "hash"}, r"one of \('softmax', 'sigmoid'\)"),
        (moe_route, {"logits": X, "top_k": 2, "kind": "sigmoid", "groups": 3},
         r"groups must divide the 8 experts, got 3"),
        (moe_route, {"logits": X, "top_k": 2, "kind": "sigmoid", "groups": 4, "top_groups": 5},
         r"top_groups must lie between 1 and groups=4, got 5"),
        (moe_route, {"logits": X, "top_k": 3, "kind": "sigmoid", "groups": 4, "top_groups": 1},
         r"top_k=3 is more than the 2 experts of 1 of 4 groups"),
        (moe_route, {"logits": X, "top_k": 2, "groups": 2}, r'need kind="sigmoid", got \'softmax'),
        (moe_route, {"logits": X, "top_k": 2, "bias": X[0]}, r'need kind="sigmoid"'),
        (moe_route, {"logits": X, "top_k": 2, "kind": "sigmoid", "bias": X},
         r"bias must have shape \(8,\), got \(3, 8\)"),
        (moe_route, {"logits": X.long(), "top_k": 2}, r"logits must be floats .* got torch.int64"),
        (moe_route, {"logits": X, "top_k": 2, "mask": torch.ones(3)}, r"mask must be a bool"),
        (moe_experts, {**FIT, "activation": "gelu"}, r"activation must be one of .* got 'gelu'"),
        (moe_experts, {**FIT, "impl": "cutlass"}, r"impl must be one of .* got 'cutlass'"),
        (moe_experts, {**FIT, "w_in": torch.ones(4, 12, 7)}, r"w_in must have shape \(E, 2 I, D\)"),
        (moe_experts, {**FIT, "w_in": torch.ones(4, 11, 8)}, r"as many rows .* got 11"),
        (moe_experts, {**FIT, "gated": False}, r"w_out must have shape \(4, D', 12\)"),
        (moe_experts, {**FIT, "experts": CHOSEN[:2]}, r"experts must be integers of shape \(3, 'k"),
        (moe_experts, {**FIT, "experts": WEIGHTS}, r"experts must be integers .* torch.float32"),
        (moe_experts, {**FIT, "weights": WEIGHTS[:, :1]}, r"weights must be floats of shape \(3,"),
        (moe_experts, {**FIT, "experts": torch.zeros(3, 5).long(), "weights": torch.ones(3, 5)},
         r"between 1 and 4 experts, the number there is, got 5"),
        (load_balancing_loss, {"routings": []}, r"at least one routing"),
        (router_z_loss, {"routings": [moe_route(X, 2), moe_route(X[:, :5], 2)]},
         r"the same number of experts, got \[5, 8\]"),
        (load_balancing_loss, {"routings": [moe_route(X, 2)], "scope": "layer"},
         r'scope must be "global" or "per_layer", got \'layer\''),
        (load_balancing_loss, {"routings": [moe_route(X, 2)], "mask": torch.ones(2).bool()},
         r"mask must be a bool tensor of shape \(3,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(run: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**arguments)


def test_torchs_grouped_product_refuses_odd_sizes_and_fp64() -> None:
    odd = {**FIT, "w_in": torch.ones(4, 14, 8), "w_out": torch.ones(4, 8, 7)}
    with pytest.raises(ImplementationUnavailableError, match=r"grouped_mm .*reference"):
        moe_experts(**odd, impl="torch")
    wide = {n: v.double() if v.is_floating_point() else v for n, v in FIT.items()}
    with pytest.raises(ImplementationUnavailableError, match=r"grouped_mm .*reference"):
        moe_experts(**wide, impl="torch")


class _Ignored(torch.autograd.Function):
    """The identity, whose input has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_an_output_without_a_gradient_is_no_error(impl: str) -> None:
    x = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    w_in, w_out = (torch.randn(4, *s, device=DEVICE) for s in ((12, 8), (8, 6)))
    routing = moe_route(torch.randn(5, 4, device=DEVICE), 2, impl="reference")
    y = moe_experts(x, routing.experts, routing.weights, w_in, w_out, impl=impl)
    _Ignored.apply(y).sum().backward()  # pyright: ignore[reportOptionalMemberAccess]
    assert x.grad is None
