"""Selective attention against its definition, and the gate that selects."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ssm_hf
from ssm_hf.cache import RecurrentCache
from ssm_hf.layers import selective_attention
from ssm_hf.layers.attention import SelfAttention
from ssm_hf.layers.attention_functions import _eager
from ssm_hf.layers.selection import Gate, SelectionGate, capacity_loss, gumbel_difference
from ssm_hf.layers.selective_attention import SelectiveAttention, choose
from ssm_hf.sequence import SequenceInfo
from tests.helpers import kernel_device, randomize_, relative_error

D = 12
OPTIONS = {"hidden_size": D, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": None,
           "rotary_dim": 0, "rope_theta": 100.0, "scaling": None, "dropout": 0.0, "config": None,
           "use_bias": True, "use_out_bias": False, "layer_idx": 0, "kv_source": "all",
           "window_unit": "position", "budget": None, "combine": "lerp", "dense": True,
           "capacity": 0.3}  # fmt: skip
SOURCES: dict[str, dict[str, Any]] = {
    "all": {},
    "all, window": {"window": 4},
    "selected": {"kv_source": "selected", "budget": 3},
    "selected, window": {"kv_source": "selected", "budget": 4, "window": 6, "combine": "residual"},
    "selected, counted": {
        "kv_source": "selected", "budget": 9, "window": 2, "window_unit": "selected",
    },
}  # fmt: skip
each_source = pytest.mark.parametrize("source", SOURCES)
B, T = 3, 15


def _layer(**changes: Any) -> SelectiveAttention:
    return randomize_(SelectiveAttention(**{**OPTIONS, **changes})).double()


def _gate(selected: Tensor, seq: SequenceInfo | None = None) -> Gate:
    """Of given choices, with some alpha."""
    if seq is not None and seq.mask is not None:
        selected = selected & seq.mask
    generator = torch.Generator().manual_seed(5)
    alpha = torch.rand(selected.shape, generator=generator, dtype=torch.float64)
    return Gate(selected, selected.double(), alpha, alpha)


def _selected(batch: int = B, length: int = T) -> Tensor:
    """Of the first row all, of the second none, of others some."""
    selected = torch.rand(batch, length) < 0.4
    selected[0] = True
    selected[1:2] = False
    return selected


def _definition(layer: SelectiveAttention, x: Tensor, gate: Gate, seq: SequenceInfo) -> Tensor:
    """A query and a key at a time."""
    heads = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in
             (layer.q_proj, layer.k_proj, layer.v_proj))  # fmt: skip
    q, k, v = heads
    out = torch.zeros_like(x)
    for row in range(len(x)):
        real = [True] * x.shape[1] if seq.mask is None else seq.mask[row].tolist()
        doc = [0] * x.shape[1] if seq.seq_idx is None else seq.seq_idx[row].tolist()
        chosen = gate.selected[row].tolist()
        for t in range(x.shape[1]):
            if not chosen[t]:
                continue
            before = [s for s in range(t + 1) if real[s] and doc[s] == doc[t]]
            seen = before[-(layer.window or 99) :]
            if layer.budget is not None:
                seen = [s for s in seen if chosen[s]][-layer.budget :]
            y = []
            for h in range(layer.num_heads):
                g = h // layer.num_key_value_groups
                scores = torch.stack([q[row, t, h] @ k[row, s, g] for s in seen])
                weights = (scores / math.sqrt(layer.head_dim)).softmax(0)
                y.append(sum(w * v[row, s, g] for w, s in zip(weights, seen, strict=True)))
            o = layer.o_proj(torch.cat(y))
            change = o - x[row, t] if layer.combine == "lerp" else o
            out[row, t] = gate.alpha[row, t] * change
    return out


def _facts(name: str) -> SequenceInfo:
    mask = doc = None
    if name in ("padded", "both"):
        mask = torch.rand(B, T) < 0.8
        mask[0, :3], mask[-1, -2:] = False, False
    if name in ("packed", "both"):
        doc = (torch.rand(B, T) < 0.2).cumsum(dim=1)
    return SequenceInfo(mask=mask, seq_idx=doc, derived={})


def _flex(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **options: Any
) -> tuple[Tensor, Any]:
    """Flex attention by its mask; a query that sees nothing gives what it may, but numbers."""
    index = [torch.arange(n) for n in (q.shape[0], q.shape[2], k.shape[2])]
    b, query, key = torch.meshgrid(*index, indexing="ij")
    seen = mask.mask_mod(b, torch.zeros_like(b), query, key)
    seen = seen | ~seen.any(dim=-1, keepdim=True)
    return _eager(module, q, k, v, seen[:, None], dropout=0.0, scaling=options["scaling"])


@each_source
@pytest.mark.parametrize("name", ["plain", "padded", "packed", "both"])
@pytest.mark.parametrize("how", ["sdpa", "eager", "flex_attention", "ssm_hf", "dense", "static"])
def test_every_way_is_the_definition(
    source: str, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", _flex)
    stated = "ssm_hf" if how in ("dense", "static") else how
    config = SimpleNamespace(_attn_implementation=stated)
    layer = _layer(config=config, **SOURCES[source]).train(how == "dense")
    if how == "static":  # as in a capture: the host does not know how many are selected
        monkeypatch.setattr(selective_attention, "host_may_read", lambda values: False)
    seq, x = _facts(name), torch.randn(B, T, D, dtype=torch.float64)
    gate = _gate(_selected(), seq)
    y = layer(x, seq, None, gate)
    assert relative_error(y, _definition(layer, x, gate, seq)) < 1e-12
    assert not y[~gate.selected].any()


@torch.no_grad()
@pytest.mark.parametrize("source", ["all, window", "selected, window"])
def test_kernels_are_the_definition(source: str) -> None:
    device = kernel_device()
    layer = _layer(**SOURCES[source]).float().eval().to(device)
    seq, x = _facts("plain"), torch.randn(B, T, D)
    gate = _gate(_selected())
    expected = _definition(layer.cpu().double(), x.double(), gate, seq)
    layer.float().to(device)
    moved = Gate(*(t.to(device) for t in gate))
    with ssm_hf.implementation("triton"):
        y = layer(x.to(device), seq, None, moved)
    assert relative_error(y.cpu(), expected) < 1e-5


@each_source
def test_dense_and_sparse_estimators_agree_where_they_must(source: str) -> None:
    """Equal outputs and gradients of the projections; the dense one tells more to the gate."""
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    layer, seq = _layer(**SOURCES[source]).train(), SequenceInfo()
    gate = _gate(_selected())
    results = []
    for dense in (True, False):
        layer.dense = dense
        weight = gate.weight.clone().requires_grad_()
        y = layer(x, seq, None, gate._replace(weight=weight))
        target = torch.linspace(-1, 1, D, dtype=torch.float64)
        grads = torch.autograd.grad((y @ target).sin().sum(), [*layer.parameters(), weight])
        results.append((y, grads[:-1], grads[-1]))
    (y, grads, of_gate), (other, other_grads, other_of_gate) = results
    assert relative_error(other, y) < 1e-14
    for grad, right in zip(other_grads, grads, strict=True):
        # Absolute: a bias of the keys shifts all scores alike, its gradient is 0.
        torch.testing.assert_close(grad, right, atol=1e-12, rtol=1e-12)
    assert relative_error(other_of_gate[gate.selected], of_gate[gate.selected]) < 1e-12
    assert not other_of_gate[~gate.selected].any()
    assert (of_gate[~gate.selected] != 0).all()


def test_all_selected_is_sliding_window_attention_and_none_is_nothing() -> None:
    layer = _layer(window=4).eval()
    own = ("kv_source", "window_unit", "budget", "combine", "dense", "capacity")
    options = {name: value for name, value in OPTIONS.items() if name not in own}
    plain = SelfAttention(**{**options, "window": 4})
    plain.double().load_state_dict(layer.state_dict())
    x, h = torch.randn(2, B, T, D, dtype=torch.float64)
    seq = _facts("packed")
    assert relative_error(h + layer(x, seq, stream=h), plain(x, seq)) < 1e-12
    assert not layer(x, seq, None, _gate(torch.zeros(B, T).bool()), h).any()
    # A window that hides nothing, and the residual combination: an ordinary attention layer.
    wide = _layer(window=T + 1, combine="residual").eval()
    plain.window = None
    assert relative_error(wide(x, seq, stream=h), plain(x, seq)) < 1e-12


@torch.no_grad()
@each_source
@pytest.mark.parametrize("rotary", [0, 8])
def test_prompts_in_pieces_and_steps_equal_one_pass(source: str, rotary: int) -> None:
    """Lengths below, at and far beyond windows and budgets; the second row selects nothing."""
    layer = _layer(**SOURCES[source], rotary_dim=rotary).eval()
    kind = "full_attention" if layer.budget is None else "selected_attention"
    config = SimpleNamespace(layer_types=[kind])
    x, selected = torch.randn(B, 40, D, dtype=torch.float64), _selected(B, 40)
    whole = layer(x, SequenceInfo(), None, _gate(selected))
    gate = _gate(selected)
    for sizes in ([4, 4, 8, 24], [1] * 40, [3, 1, 30, 1, 5], [40], [6, 34]):
        cache, parts, start = RecurrentCache(config), [], 0
        for size in sizes:
            span = slice(start, start + size)
            part = Gate(*(t[:, span] for t in gate))
            parts.append(layer(x[:, span], SequenceInfo(), cache, part))
            cache.seen_tokens = start = start + size
        assert relative_error(torch.cat(parts, dim=1), whole) < 1e-12, sizes
    held = cache.layers[0].state
    if layer.budget is not None:
        assert held["length"].tolist() == selected.sum(dim=1).tolist()
        assert held["tokens"].tolist() == [40] * B
        assert held["keys"].shape[1] == layer.budget


@torch.no_grad()
@each_source
def test_pieces_with_pads_and_documents_are_the_definition(source: str) -> None:
    """Rows differ in pads and in what they select; documents begin inside of pieces."""
    layer = _layer(**SOURCES[source]).eval()
    kind = "full_attention" if layer.budget is None else "selected_attention"
    cache = RecurrentCache(SimpleNamespace(layer_types=[kind]))
    x, mask = torch.randn(B, 40, D, dtype=torch.float64), torch.rand(B, 40) < 0.8
    mask[1, :6], mask[:, 8], mask[:, 20] = False, True, True
    documents = torch.zeros(B, 40, dtype=torch.long)
    documents[:, 9:] += 1
    documents[:, 21:] += 1
    gate = _gate(torch.rand(B, 40) < 0.5, SequenceInfo(mask=mask))
    parts, start = [], 0
    for size in (7, 8, 1, 10, 1, 1, 12):
        span = slice(start, start + size)
        real, doc = mask[:, span], documents[:, span]
        seq = SequenceInfo(None if real.all() else real, doc if size > 1 else None, derived={})
        parts.append(layer(x[:, span], seq, cache, Gate(*(t[:, span] for t in gate))))
        cache.seen_tokens = start = start + size
    expected = _definition(layer, x, gate, SequenceInfo(mask=mask, seq_idx=documents))
    assert relative_error(torch.cat(parts, dim=1), expected) < 1e-12


@torch.no_grad()
@each_source
def test_rows_of_a_batch_equal_single_rows(source: str) -> None:
    layer, x = _layer(**SOURCES[source]).eval(), torch.randn(5, T, D, dtype=torch.float64)
    gate = _gate(_selected(5))
    y = layer(x, SequenceInfo(), None, gate)
    for row in range(5):
        alone = Gate(*(t[row : row + 1] for t in gate))
        single = layer(x[row : row + 1], SequenceInfo(), None, alone)
        assert relative_error(y[row], single[0]) < 1e-12


def test_chosen_tokens_come_first_and_in_order() -> None:
    selected = torch.rand(4, 50) < 0.3
    selected[0], selected[1] = False, True
    chosen = choose(selected)
    for row in range(4):
        index = chosen.index[row][chosen.valid[row]]
        assert index.tolist() == selected[row].nonzero()[:, 0].tolist()
        assert sorted(chosen.index[row].tolist()) == sorted(set(chosen.index[row].tolist()))
    assert choose(selected[2:]).index.shape[1] == 16 * math.ceil(
        int(selected[2:].sum(1).max()) / 16
    )
    assert choose(torch.zeros(2, 50).bool()).index.shape == (2, 16)


# --- the gate ---------------------------------------------------------------------------------


def _selection(**changes: Any) -> SelectionGate:
    options = {"hidden_size": D, "inner_size": None, "estimator": "dense", "threshold": 0.0}
    return randomize_(SelectionGate(**{**options, **changes})).double()


@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("inner", [None, 7])
def test_choices_are_hard_and_their_gradient_is_the_probabilitys(
    tau: float, inner: int | None
) -> None:
    gate, x = _selection(inner_size=inner).train(), torch.randn(B, T, D, dtype=torch.float64)
    noise = gumbel_difference((B, T), x.device)
    decided = gate(x, None, noise, tau)
    assert set(decided.weight.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(decided.weight == 1, decided.selected)
    z = (decided.margin + noise) / tau
    assert torch.equal(decided.selected, z > 0)
    (grad,) = torch.autograd.grad(decided.weight.sum(), decided.margin)
    p = torch.sigmoid(z)
    assert relative_error(grad, p * (1 - p) / tau) < 1e-12


def test_the_papers_estimator_turns_the_sign_for_unselected_tokens() -> None:
    gate, x = _selection(estimator="paper").train(), torch.randn(B, T, D, dtype=torch.float64)
    decided = gate(x, None, torch.zeros(B, T))
    (grad,) = torch.autograd.grad(decided.weight.sum(), decided.margin)
    assert torch.equal(grad > 0, decided.selected)


@pytest.mark.parametrize("reduction", ["sequence", "batch"])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_of_the_budget_equals_differences_of_the_soft_choice(
    reduction: Any, padded: bool
) -> None:
    gate, x = _selection().train(), torch.randn(B, T, D, dtype=torch.float64)
    mask = torch.rand(B, T) < 0.7 if padded else None
    if mask is not None:
        mask[1] = False  # a row without a token
    noise = gumbel_difference((B, T), x.device).double()
    decided = gate(x, mask, noise)
    loss = capacity_loss([decided, decided], mask, 0.2, reduction)
    real = torch.ones(B, T).bool() if mask is None else mask
    rows = [0, 2] if padded else [0, 1, 2]
    shares = [decided.selected[r][real[r]].double().mean() for r in rows]
    if reduction == "sequence":
        expected = 2 * sum((0.2 - s) ** 2 for s in shares) / len(rows)
    else:
        expected = 2 * (0.2 - decided.selected[real].double().mean()) ** 2
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-9)
    (grad,) = torch.autograd.grad(loss, decided.margin)

    def soft(margin: Tensor) -> Tensor:
        """The loss where each choice moves as its probability does."""
        weight = torch.sigmoid(margin + noise) * real
        weight = decided.weight.detach() + weight - (torch.sigmoid(z) * real)
        moved = decided._replace(weight=weight)
        return capacity_loss([moved, moved], mask, 0.2, reduction)

    z = decided.margin.detach() + noise
    step = 1e-6
    for row, token in ((0, 3), (2, 7), (1, 1)):
        shift = torch.zeros(B, T, dtype=torch.float64)
        shift[row, token] = step
        margin = decided.margin.detach()
        slope = (soft(margin + shift) - soft(margin - shift)) / (2 * step)
        assert float(grad[row, token]) == pytest.approx(float(slope), abs=1e-8)


def test_noise_is_the_difference_of_two_gumbel_variables() -> None:
    """It is logistic: P(noise > -margin) = sigmoid(margin)."""
    noise = gumbel_difference((400_000,), torch.device("cpu"))
    for margin in (-1.5, 0.0, 0.7):
        share = float((noise > -margin).float().mean())
        # Four standard deviations of a share of 400,000.
        assert share == pytest.approx(1 / (1 + math.exp(-margin)), abs=0.0032)


def test_without_training_there_is_no_noise_and_a_threshold() -> None:
    gate, x = _selection(threshold=0.5).eval(), torch.randn(B, T, D, dtype=torch.float64)
    before = torch.get_rng_state()
    decided = gate(x, None, torch.full((B, T), 100.0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(decided.selected, decided.margin > 0.5)
    assert 0 < decided.selected.sum() < B * T
    tie = torch.zeros(1, 1, D, dtype=torch.float64)
    gate.bias.data.zero_()
    gate.threshold.zero_()
    assert not gate(tie).selected.any()
