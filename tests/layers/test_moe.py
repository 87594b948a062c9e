"""The mixture of experts as a layer: transformers' blocks, checkpoints, options."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GraniteMoeHybridConfig, JambaConfig, NemotronHConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMoE
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from ssm_hf.layers.moe import MoE, fuse_experts, split_experts, take_routings
from ssm_hf.sequence import SequenceInfo
from tests.helpers import relative_error

D, I, E, K = 32, 24, 8, 3
NEMOTRON: dict[str, Any] = {
    "activation": "relu2", "gated": False, "kind": "sigmoid", "renormalise": True, "scale": 2.5,
    "groups": 2, "top_groups": 1, "correction_bias": True, "wide_router": True, "shared_size": 40,
}  # fmt: skip


def _moe(**options: Any) -> MoE:
    sizes = {"hidden_size": D, "intermediate_size": I, "num_experts": E, "top_k": K}
    return _randomized(MoE(**{**sizes, **options}))


@torch.no_grad()
def _randomized(module: nn.Module) -> Any:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.copy_(0.3 * torch.randn(tensor.shape))
    return module


def _jamba() -> tuple[nn.Module, MoE]:
    config = JambaConfig(hidden_size=D, intermediate_size=I, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    return _randomized(JambaSparseMoeBlock(config)), _moe()


def _granite() -> tuple[nn.Module, MoE]:
    config = GraniteMoeHybridConfig(
        hidden_size=D, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K,
        mamba_n_heads=8, mamba_d_head=8,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return _randomized(GraniteMoeHybridMoE(config)), _moe(renormalise=True)


def _nemotron() -> tuple[nn.Module, MoE]:
    config = NemotronHConfig(
        hidden_size=D, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K,
        moe_shared_expert_intermediate_size=40, n_group=2, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=2.5, hybrid_override_pattern="ME",
    )  # fmt: skip
    config._experts_implementation = "eager"
    return _randomized(NemotronHMoE(config)), _moe(**NEMOTRON)


FAMILIES = {"jamba": _jamba, "granite": _granite, "nemotron": _nemotron}
families = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())


def _ours(name: str) -> str:
    """transformers' name of a tensor in our words."""
    return name.replace("gate.", "router.", 1) if name.startswith("gate.") else name


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_equals_transformers(
    make: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = make()
    ours.load_state_dict({_ours(n): t for n, t in theirs.state_dict().items()})
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    if dtype == torch.float64:
        # Its routers cast to fp32 by name.
        monkeypatch.setattr(torch, "float", torch.float64)
        monkeypatch.setattr(modeling_nemotron_h.torch, "float32", torch.float64)
        monkeypatch.setattr(Tensor, "float", Tensor.double)
    x = torch.randn(2, 7, D, dtype=dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(leaf) for module, leaf in zip((theirs, ours), leaves, strict=True)]
    # fp32: two orders of summation
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    assert float((outputs[0] - outputs[1]).detach().abs().max()) < bound
    probe = torch.randn_like(x)
    for output in outputs:
        output.backward(probe)
    assert relative_error(_grad(leaves[1]), _grad(leaves[0])) < bound
    ours_by_name = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        grad = _grad(ours_by_name[_ours(name)])
        assert relative_error(grad, _grad(parameter)) < bound, name


def test_shared_experts_with_a_gate() -> None:
    layer, plain = _moe(shared_size=16, shared_gate=True).double(), _moe().double()
    plain.load_state_dict({n: t for n, t in layer.state_dict().items() if "shared" not in n})
    x = torch.randn(2, 5, D, dtype=torch.float64)
    gate, up, down = (getattr(layer.shared_experts, f"{n}_proj") for n in ("gate", "up", "down"))
    shared = down(nn.functional.silu(gate(x)) * up(x))
    shared = torch.sigmoid(layer.shared_gate(x)) * shared
    assert relative_error(layer(x), plain(x) + shared) < 1e-12


def test_padding_changes_nothing_and_pads_are_no_load() -> None:
    layer = _moe().double()
    x = torch.randn(2, 6, D, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True, True, False], [True] * 6])
    y = layer(x, SequenceInfo(mask=mask))
    (routing,) = take_routings([layer])
    assert relative_error(y[mask], layer(x)[mask]) < 1e-12
    assert bool((routing.experts[~mask] == E).all())
    assert take_routings([layer, layer])[0].experts.max() < E
    assert take_routings(layer.modules()) == []


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_layer_compiles_without_breaks(impl: str) -> None:
    if impl == "torch" and not hasattr(nn.functional, "grouped_mm"):
        pytest.skip("torch has no grouped_mm")
    layer = _moe().bfloat16()
    layer.experts.impl = impl
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, seq = torch.randn(2, 5, D).bfloat16(), SequenceInfo(mask=torch.rand(2, 5) > 0.2)
    grads = []
    for run in (compiled, layer):
        run(x, seq).float().square().sum().backward()
        (routing,) = take_routings([layer])
        assert routing.logits.shape == (2, 5, E)
        grads.append([_grad(p) for p in layer.parameters()])
        layer.zero_grad()
    for grad, expected in zip(*grads, strict=True):
        # the same operations, some of them fused: 8 bits
        assert relative_error(grad, expected) < 2**-7


def test_autocast_computes_in_bf16_and_keeps_gradients_wide() -> None:
    layer = _moe(**NEMOTRON)
    x = torch.randn(2, 5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    (routing,) = take_routings([layer])
    assert y.dtype == torch.bfloat16
    assert routing.logits.dtype == routing.weights.dtype == torch.float32  # a wide router
    y.sum().backward()
    assert _grad(layer.experts.up_proj).dtype == torch.float32
    # 8 bits through three layers of products
    assert relative_error(y, layer(x)) < 2e-2


@pytest.mark.parametrize("gated", [True, False])
def test_weights_of_single_experts_and_fused_ones_are_the_same(gated: bool) -> None:
    layer = _moe(gated=gated, shared_size=16)
    fused = layer.state_dict()
    single = split_experts(fused)
    kinds = ("gate", "up", "down") if gated else ("up", "down")
    shapes = {kind: (D, I) if kind == "down" else (I, D) for kind in kinds}
    for e in range(E):
        for kind, shape in shapes.items():
            assert single[f"experts.{e}.{kind}_proj.weight"].shape == shape
    if gated:
        gate = fused["experts.gate_up_proj"][2, :I]
        assert torch.equal(single["experts.2.gate_proj.weight"], gate)
    again = fuse_experts(single)
    assert again.keys() == fused.keys()
    assert all(torch.equal(again[n], t) for n, t in fused.items())
    other = _moe(gated=gated, shared_size=16)
    other.load_state_dict(single)
    assert all(torch.equal(other.state_dict()[n], t) for n, t in fused.items())


def test_single_experts_that_do_not_fit_are_refused() -> None:
    single = split_experts({f"layers.1.{n}": t for n, t in _moe().state_dict().items()})
    del single["layers.1.experts.3.up_proj.weight"]
    with pytest.raises(ValueError, match=r"layers\.1\.experts\.3\.up_proj\.weight is missing"):
        fuse_experts(single)


@pytest.mark.parametrize("scheme", ["mamba_ssm", "transformers"])
def test_initial_values(scheme: Any) -> None:
    layer = MoE(hidden_size=64, intermediate_size=128, num_experts=4, top_k=2, shared_size=64)
    layer.reset_parameters(scheme, std=0.02, num_residual_layers=16)
    for weight, inputs, scale in (
        (layer.router.weight, 64, 1),
        (layer.experts.gate_up_proj, 64, 1),
        (layer.experts.down_proj, 128, 4),
    ):
        std = 0.02 if scheme == "transformers" else (3 * inputs) ** -0.5
        assert float(weight.detach().std()) == pytest.approx(
            std / scale, rel=0.15
        )  # 256 draws at least
    assert layer.flops_per_token(7) == 2 * 64 * (4 + 2 * 3 * 128 + 3 * 64)


def test_layer_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = MoE(hidden_size=64, intermediate_size=128, num_experts=4, top_k=2,
                    correction_bias=True, kind="sigmoid", wide_router=True)  # fmt: skip
        assert layer(torch.empty(2, 3, 64)).shape == (2, 3, 64)


def test_correction_bias_moves_towards_even_loads() -> None:
    layer = _moe(**NEMOTRON)
    bias = layer.router.e_score_correction_bias.clone()
    layer.router.balance_(torch.tensor([3, 1, 2, 2, 0, 4, 2, 2]), rate=0.5)
    moved = torch.tensor([-1, 1, 0, 0, 1, -1, 0, 0]) * 0.5
    assert torch.allclose(layer.router.e_score_correction_bias, bias + moved)
    assert "router.e_score_correction_bias" in layer.state_dict()
    assert not isinstance(layer.router.e_score_correction_bias, nn.Parameter)
    with pytest.raises(ValueError, match="no correction bias"):
        _moe().router.balance_(torch.ones(E), rate=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, r"top_k must lie between 1 and .* experts, 8, got 9"),
        ({"top_k": 0}, r"top_k must lie between 1"),
        ({"num_experts": 0}, r"number of experts must be at least 1, got 0"),
        ({"kind": "hash"}, r"kind of a router must be one of"),
        ({"activation": "gelu"}, r"activation must be one of .* got 'gelu'"),
        ({"shared_gate": True}, r"shared_gate needs shared experts"),
        ({"correction_bias": True}, r'need kind="sigmoid"'),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _moe(**options)
