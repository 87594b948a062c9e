"""Attention against its definition, by every implementation, and its cache beyond the laws."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ssm_hf.cache import KVLayer, RecurrentCache
from ssm_hf.layers import attention
from ssm_hf.layers.attention import AttentionMixer, FusedAttention, SelfAttention
from ssm_hf.layers.attention_functions import _eager
from ssm_hf.ops.dispatch import ImplementationUnavailableError, implementation
from ssm_hf.sequence import SequenceInfo
from tests.helpers import content, kernel_device, randomize_, relative_error

D = 12
OPTIONS = {"hidden_size": D, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": None,
           "rotary_dim": 4, "rope_theta": 100.0, "scaling": None, "dropout": 0.0, "config": None,
           "use_bias": True, "use_out_bias": False, "layer_idx": 0}  # fmt: skip


def _mixer(**changes: Any) -> SelfAttention:
    return randomize_(SelfAttention(**{**OPTIONS, **changes})).double().eval()


def _cache(**options: Any) -> RecurrentCache:
    return RecurrentCache(SimpleNamespace(layer_types=["full_attention"]), **options)


def _x(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64)


def _turned(x: Tensor, position: int, size: int, theta: float) -> Tensor:
    """x (d,) with its first `size` dimensions as complex numbers, turned by the position."""
    half = size // 2
    number = torch.complex(x[:half], x[half:size])
    rate = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    number = number * torch.polar(torch.ones_like(rate), position * rate)
    return torch.cat([number.real, number.imag, x[size:]])


def _definition(mixer: SelfAttention, x: Tensor, real: list[bool], doc: list[int]) -> Tensor:
    """One row (T, D), a query and a key at a time."""
    q, k, v = (
        p(x).unflatten(-1, (-1, mixer.head_dim)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    rank = [sum(r and e == d for r, e in zip(real[:t], doc[:t], strict=True))
            for t, d in enumerate(doc)]  # fmt: skip
    out = torch.zeros_like(q)
    window = mixer.window or math.inf
    for t in range(len(x)):
        seen = [s for s in range(t + 1)
                if real[s] and doc[s] == doc[t] and rank[t] - rank[s] < window]  # fmt: skip
        if not real[t]:
            continue
        for h in range(mixer.num_heads):
            g = h // mixer.num_key_value_groups
            size, theta = mixer.rotary_dim, mixer.rope_theta
            query = _turned(q[t, h], rank[t], size, theta)
            scores = torch.stack([query @ _turned(k[s, g], rank[s], size, theta) for s in seen])
            weights = (scores * mixer.scaling).softmax(0)
            out[t, h] = sum(w * v[s, g] for w, s in zip(weights, seen, strict=True))
    return mixer.o_proj(out.flatten(1))


def _flash(
    module: AttentionMixer, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
    sliding_window: int | None = None, scaling: float | None = None, is_causal: bool = False,
    cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None, max_length_k: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Stands in for flash attention: documents by offsets, windows and causality from the end."""
    assert attention_mask is None
    assert is_causal
    if cu_seq_lens_q is None:
        offsets = [torch.tensor([0, t.shape[2]]) for t in (query, key)]
    else:
        assert query.shape[0] == 1
        assert cu_seq_lens_k is not None
        assert (cu_seq_lens_q.diff().max(), cu_seq_lens_k.diff().max()) == (
            max_length_q, max_length_k)  # fmt: skip
        offsets = [cu_seq_lens_q, cu_seq_lens_k]
    parts = []
    for i in range(len(offsets[0]) - 1):
        q = query[:, :, offsets[0][i] : offsets[0][i + 1]]
        k, v = (t[:, :, offsets[1][i] : offsets[1][i + 1]].repeat_interleave(
            module.num_key_value_groups, 1) for t in (key, value))  # fmt: skip
        behind = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        distance = behind - torch.arange(k.shape[2])
        seen = (distance >= 0) & (distance < (sliding_window or math.inf))
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(~seen, -math.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.fixture(params=["eager", "sdpa", "ssm_hf", "flash_stand_in"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "flash_stand_in":
        mapping = ALL_ATTENTION_FUNCTIONS._local_mapping
        monkeypatch.setitem(mapping, request.param, _flash)
    return request.param


REAL = [[1, 1, 0, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 1, 1, 1], [1] * 9]
DOC = [[0, 0, 0, 0, 1, 1, 2, 2, 2], [0] * 9, [0, 0, 0, 0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("facts", ["plain", "padded", "packed", "both"])
def test_every_implementation_is_the_definition(
    chosen: str, window: int | None, facts: str
) -> None:
    mixer = _mixer(window=window, config=SimpleNamespace(_attn_implementation=chosen))
    x = _x(3, 9)
    real = torch.tensor(REAL).bool() if facts in ("padded", "both") else None
    doc = torch.tensor(DOC) if facts in ("packed", "both") else None
    y = mixer(x, SequenceInfo(mask=real, seq_idx=doc))
    for row in range(3):
        is_real = [True] * 9 if real is None else real[row].tolist()
        expected = _definition(
            mixer, x[row], is_real, [0] * 9 if doc is None else doc[row].tolist()
        )
        at = torch.tensor(is_real)
        assert relative_error(y[row][at], expected[at]) < 1e-12
    assert y.isfinite().all()  # at pads too: what follows may multiply them by 0


@pytest.mark.parametrize("window", [None, 3, 70])
def test_every_implementation_continues_a_cache(chosen: str, window: int | None) -> None:
    mixer = _mixer(window=window, config=SimpleNamespace(_attn_implementation=chosen))
    x, mask = _x(3, 90), torch.rand(3, 90) < 0.8
    mask[0] = True
    whole = mixer(x, SequenceInfo(mask=mask))
    cache = _cache()
    with torch.no_grad():
        parts = [
            mixer(part, SequenceInfo(mask=real), cache)
            for part, real in zip(
                x.split([5, 1, 30, 50, 4], 1), mask.split([5, 1, 30, 50, 4], 1), strict=True
            )
        ]
        for _ in range(3):  # and steps of real tokens
            step = _x(3, 1)
            x, mask = torch.cat([x, step], 1), torch.cat([mask, mask[:1, :1].expand(3, 1)], 1)
            parts.append(mixer(step, SequenceInfo(), cache))
    whole = mixer(x, SequenceInfo(mask=mask))
    assert relative_error(torch.cat(parts, dim=1)[mask], whole[mask]) < 1e-12


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("facts", ["plain", "padded", "packed", "both"])
def test_kernels_of_ours_equal_the_definition(window: int | None, facts: str) -> None:
    """With gradients, in fp32 against a stated `eager` in fp64."""
    device = kernel_device()
    mixer = _mixer(window=window).to(device)
    by_definition = _mixer(window=window, config=SimpleNamespace(_attn_implementation="eager"))
    real = torch.tensor(REAL).bool() if facts in ("padded", "both") else None
    doc = torch.tensor(DOC) if facts in ("packed", "both") else None
    at = torch.ones(3, 9, dtype=torch.bool) if real is None else real
    x, probe = _x(3, 9), _x(3, 9) * at[..., None]
    wide, single = x.requires_grad_(), x.detach().to(device).float().requires_grad_()
    expected = by_definition(wide, SequenceInfo(mask=real, seq_idx=doc))
    seq = SequenceInfo(*(t if t is None else t.to(device) for t in (real, doc)), derived={})
    with implementation("triton"):
        y = mixer.float()(single, seq)
    assert relative_error(y.cpu()[at], expected[at]) < 1e-5
    ours = torch.autograd.grad((y * probe.to(y)).sum(), [single, *mixer.parameters()])
    theirs = torch.autograd.grad((expected * probe).sum(), [wide, *by_definition.parameters()])
    for grad, right in zip(ours, theirs, strict=True):
        assert relative_error(grad.cpu(), right) < 1e-5


@pytest.mark.parametrize("window", [None, 3, 30])
def test_kernels_of_ours_continue_a_cache(window: int | None) -> None:
    """Prompts in pieces with pads, then steps; against the whole row by a stated `sdpa`."""
    device = kernel_device()
    mixer = _mixer(window=window).float().to(device)
    by_torch = _mixer(window=window, config=SimpleNamespace(_attn_implementation="sdpa"))
    x, mask = _x(2, 39), torch.rand(2, 39) < 0.8
    mask[0] = mask[:, 36:] = True
    cache, parts = _cache(), []
    with torch.no_grad(), implementation("triton"):
        for start, end in ((0, 5), (5, 6), (6, 17), (17, 36), (36, 37), (37, 38), (38, 39)):
            real = None if end - start == 1 and start >= 36 else mask[:, start:end].to(device)
            part = x[:, start:end].float().to(device)
            parts.append(mixer(part, SequenceInfo(mask=real), cache))
    whole = by_torch(x, SequenceInfo(mask=mask))
    assert relative_error(torch.cat(parts, dim=1).cpu()[mask], whole[mask]) < 1e-5


@pytest.mark.parametrize("stated", ["eager", "sdpa", "ssm_hf", "interval_attention", None])
def test_a_stated_implementation_is_obeyed(
    stated: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of ours run where `ssm_hf` or nothing is stated, and never in place of another."""
    ran = []
    for name in ("interval_attention", "interval_attention_step"):
        run = getattr(attention, name)
        noted = lambda *a, name=name, run=run, **o: ran.append(name) or run(*a, **o)  # noqa: E731
        monkeypatch.setattr(attention, name, noted)
    config = None if stated is None else SimpleNamespace(_attn_implementation=stated)
    device = kernel_device()
    mixer, cache = _mixer(config=config).float().to(device), _cache()
    with torch.no_grad(), implementation("triton"):
        packed = SequenceInfo(seq_idx=torch.tensor(DOC, device=device))
        mixer(_x(3, 9).float().to(device), packed, cache)
        mixer(_x(3, 1).float().to(device), SequenceInfo(), cache)
    own = ["interval_attention", "interval_attention_step"]
    assert ran == ([] if stated in ("eager", "sdpa") else own)


def test_kernels_of_ours_run_on_request() -> None:
    """By name, without a context around the call; plainly causal rows and steps too."""
    device = kernel_device()
    stated = SimpleNamespace(_attn_implementation="interval_attention")
    mixer, cache = _mixer(config=stated).float().to(device), _cache()
    expected = _mixer()(x := _x(2, 9), SequenceInfo())
    with torch.no_grad():
        parts = [
            mixer(part.float().to(device), SequenceInfo(), cache) for part in x.split([8, 1], 1)
        ]
    assert relative_error(torch.cat(parts, dim=1).cpu(), expected) < 1e-5
    with pytest.raises(ImplementationUnavailableError, match="float64"):
        mixer.double()(x.to(device), SequenceInfo())


def test_steps_with_gradients_run_on_kernels_of_ours_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = kernel_device()
    stated = SimpleNamespace(_attn_implementation="interval_attention")
    mixer, cache = _mixer(config=stated).float().to(device), _cache()
    x = _x(2, 9)
    wide, single = x.requires_grad_(), x.detach().to(device).float().requires_grad_()
    expected = _mixer()(wide, SequenceInfo())
    monkeypatch.setattr(attention, "call_attention", None)
    parts = [mixer(part, SequenceInfo(), cache) for part in single.split([7, 1, 1], dim=1)]
    got = torch.cat(parts, dim=1)
    assert relative_error(got.cpu(), expected) < 1e-5
    expected.square().sum().backward()
    got.square().sum().backward()
    assert wide.grad is not None
    assert single.grad is not None
    assert relative_error(single.grad.cpu(), wide.grad) < 1e-5


def test_kernels_of_ours_are_refused_where_they_cannot_run() -> None:
    seq, x = SequenceInfo(seq_idx=torch.tensor(DOC)), _x(3, 9)
    with implementation("triton"):
        with pytest.raises(ImplementationUnavailableError, match="float64"):
            _mixer()(x, seq)
        with pytest.raises(ImplementationUnavailableError, match="drop"):
            _mixer(dropout=0.5).float().train()(x.float(), seq)


@torch.no_grad()
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["masks", "compiled"]
)
def test_flex_attention_is_the_definition(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def flex(
        module: AttentionMixer, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **options: Any
    ) -> tuple[Tensor, Any]:
        masks.append(mask)
        if compiled:
            return flex_attention_forward(module, q, k, v, mask, **options)
        index = [torch.arange(n) for n in (q.shape[0], q.shape[2], k.shape[2])]
        b, query, key = torch.meshgrid(*index, indexing="ij")
        seen = mask.mask_mod(b, torch.zeros_like(b), query, key)
        return _eager(module, q, k, v, seen[:, None], dropout=0.0, scaling=options["scaling"])

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", flex)
    choice = SimpleNamespace(_attn_implementation="flex_attention")
    for window in (None, 3):
        mixer = _mixer(window=window, config=choice).float()
        seq = SequenceInfo(mask=torch.tensor(REAL).bool(), seq_idx=torch.tensor(DOC), derived={})
        x, cache, other = _x(3, 9).float(), _cache(), _cache()
        parts = [mixer(x, seq, cache), mixer(x, seq), mixer(x, SequenceInfo(mask=seq.mask), cache)]
        choice._attn_implementation = "eager"
        expected = [
            mixer(x, seq, other),
            mixer(x, seq),
            mixer(x, SequenceInfo(mask=seq.mask), other),
        ]
        choice._attn_implementation = "flex_attention"
        for y, right in zip(parts, expected, strict=True):
            assert relative_error(y[seq.mask], right[seq.mask]) < 1e-6
    # Layers with the same facts share one block mask.
    assert masks[0] is masks[1]
    assert masks[3] is masks[4]
    assert masks[3] is not masks[1]


def test_long_windows_go_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = _mixer(window=5), _x(2, 40)
    expected = mixer(x, SequenceInfo())
    monkeypatch.setattr(attention, "_PIECE", 7)
    assert relative_error(mixer(x, SequenceInfo()), expected) < 1e-12


def test_positions_may_be_given() -> None:
    mixer, x = _mixer(), _x(2, 8)
    given = torch.arange(8).expand(2, 8)
    expected = mixer(x, SequenceInfo())
    # Only distances matter.
    assert relative_error(mixer(x, SequenceInfo(position_ids=given + 7)), expected) < 1e-12
    stretched = mixer(x, SequenceInfo(position_ids=2 * given))
    assert relative_error(stretched, expected) > 1e-3
    # What follows goes on from the last one given.
    cache = _cache()
    mixer(x[:, :5], SequenceInfo(position_ids=given[:, :5] + 7), cache)
    assert relative_error(mixer(x[:, 5:], SequenceInfo(), cache), expected[:, 5:]) < 1e-12


def test_keys_of_earlier_documents_leave_the_cache() -> None:
    mixer, x, tail = _mixer(window=6), _x(2, 10), _x(2, 3)
    doc = torch.tensor([[0] * 4 + [1] * 6, [0] * 10])
    cache, clean = _cache(), [_cache(), _cache()]
    before = _x(2, 2)
    mixer(before, SequenceInfo(), cache)
    mixer(x, SequenceInfo(seq_idx=doc), cache)
    mixer(x[:1, 4:], SequenceInfo(), clean[0])
    mixer(torch.cat([before, x], 1)[1:], SequenceInfo(), clean[1])
    assert cache.layers[0].state["length"].tolist() == [6, 12]
    y = mixer(tail, SequenceInfo(), cache)
    for row in range(2):
        alone = mixer(tail[row : row + 1], SequenceInfo(), clean[row])
        assert relative_error(y[row], alone[0]) < 1e-12


@torch.no_grad()
def test_slots_grow_in_powers_of_two_up_to_the_window() -> None:
    x = _x(2, 80)
    for window, expected in ((None, [64, 128]), (70, [64, 70]), (7, [7])):
        mixer, cache = _mixer(window=window), _cache()
        whole, sizes = mixer(x, SequenceInfo()), []
        for t, part in enumerate(x.split(1, dim=1)):
            y = mixer(part, SequenceInfo(), cache)
            assert relative_error(y, whole[:, t : t + 1]) < 1e-12
            sizes.append(cache.layers[0].slots)
        assert sorted(set(sizes)) == expected
        # The same at once.
        at_once = _cache()
        mixer(x, SequenceInfo(), at_once)
        held = content(at_once.layers[0])
        for name, value in content(cache.layers[0]).items():
            assert relative_error(value, held[name]) < 1e-12


@torch.no_grad()
def test_reserved_slots_keep_their_addresses() -> None:
    mixer, cache = _mixer(), _cache()
    cache.reserve(200)
    addresses = set()
    for part in _x(2, 200).split([1, 100, 98, 1], dim=1):
        mixer(part, SequenceInfo(), cache)
        addresses.add(cache.layers[0].state["keys"].data_ptr())
    assert len(addresses) == 1
    assert cache.layers[0].slots == 256


@torch.no_grad()
def test_taking_back_reaches_over_an_overwritten_window() -> None:
    """A window of 5 in a ring that recorded tokens have passed several times."""
    mixer, x = _mixer(window=5), _x(2, 60)
    cache, clean = _cache(record_window=8), _cache()
    mixer(x[:, :20], SequenceInfo(), cache)  # not recorded, and the ring is full
    cache.activate_past_recording()
    for part in x[:, 20:50].split([1, 12, 1, 9, 7], dim=1):
        mixer(part, SequenceInfo(), cache)
    cache.seen_tokens = 50
    cache.crop(-8)
    mixer(x[:, :42], SequenceInfo(), clean)
    y, expected = (mixer(x[:, 42:], SequenceInfo(), c) for c in (cache, clean))
    assert relative_error(y, expected) < 1e-12


@torch.no_grad()
def test_tokens_taken_back_take_no_room() -> None:
    """As drafts are: proposed, and taken back, round after round."""
    mixer, x, cache = _mixer(), _x(2, 20), _cache()
    cache.activate_past_recording()
    mixer(x[:, :10], SequenceInfo(), cache)
    for _ in range(10):
        mixer(x[:, 10:], SequenceInfo(), cache)
        cache.seen_tokens = 20
        cache.crop(-10)
    assert cache.layers[0].slots == 64


def test_a_cache_layer_of_another_kind_is_refused() -> None:
    cache = RecurrentCache(SimpleNamespace(layer_types=["linear_attention"]))
    with pytest.raises(ValueError, match="its layer 0 has no keys and values"):
        _mixer()(_x(1, 3), SequenceInfo(), cache)
    cache = _cache()
    _mixer(num_kv_heads=4)(_x(1, 3), SequenceInfo(), cache)
    with pytest.raises(ValueError, match=r"another model: keys has shape .*\(1, -1, 2, 6\)"):
        _mixer()(_x(1, 3), SequenceInfo(), cache)
    with pytest.raises(ValueError, match="another batch size"):
        _mixer(num_kv_heads=4)(_x(2, 3), SequenceInfo(), cache)
    assert isinstance(cache.layers[0], KVLayer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be at least 1 token, or None for all, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"rotary_dim": 3}, "rotary_dim must be even .* head_dim=6, got 3"),
        ({"rotary_dim": 8}, "rotary_dim must be even .* head_dim=6, got 8"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _mixer(**changes)


def test_flops_count_the_keys_that_are_seen() -> None:
    # q, k, v, o; then 4 operations for each key's number of each head.
    linear = 2 * (2 * D * 24 + 2 * D * 12)
    assert _mixer().flops_per_token(9) == linear + 4 * 24 * 5
    # Of 9 tokens the first three see 1, 2 and 3 keys, the others 3.
    assert _mixer(window=3).flops_per_token(9) == linear + 4 * 24 * 24 // 9
    fused = FusedAttention(conv_kernel=4, use_conv_bias=True, **OPTIONS)
    assert fused.flops_per_token(1) == linear + 2 * 4 * 48 + 4 * 24


@torch.no_grad()
def test_single_convolved_tokens_run_on_the_kernels() -> None:
    mixer = randomize_(FusedAttention(conv_kernel=4, use_conv_bias=True, **OPTIONS))
    x = torch.randn(2, 5, D)
    got = {}
    for impl in ("reference", "triton"):
        cache = _cache()
        with implementation(impl):
            got[impl] = torch.cat([mixer(t, SequenceInfo(), cache) for t in x.split(1, 1)], 1)
    # fp32, in another order
    assert relative_error(got["triton"], got["reference"]) < 1e-6
