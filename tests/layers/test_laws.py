"""Laws that hold for every mixer, whatever it computes."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.attention import AttentionMixer, FusedAttention, SelfAttention
from ssm_hf.layers.mamba1 import Mamba1Mixer
from ssm_hf.layers.mamba2 import Mamba2Mixer
from ssm_hf.layers.mamba3 import Mamba3Mixer
from ssm_hf.layers.mixer import Mixer
from ssm_hf.layers.selection import SelectionGate
from ssm_hf.layers.selective_attention import SelectiveAttention
from ssm_hf.sequence import SequenceInfo
from tests.helpers import content, randomize_, relative_error

D = 12
_DT = {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4}


def _mamba1(**changes: object) -> Mixer:
    options = {"hidden_size": D, "inner_size": 16, "state_size": 4, "conv_kernel": 4,
               "time_step_rank": 3, "time_step_scale": 1.0, "time_step_init_scheme": "random",
               "use_bias": False, "use_conv_bias": True, "inner_norm_eps": None,
               "layer_idx": 0, **_DT}  # fmt: skip
    return Mamba1Mixer(**{**options, **changes})


def _mamba2(**changes: object) -> Mixer:
    options = {"hidden_size": D, "inner_size": 16, "num_heads": 4, "head_dim": 4, "state_size": 5,
               "n_groups": 2, "conv_kernel": 4, "chunk_size": 4,
               "time_step_limit": (0.0, float("inf")), "norm_eps": 1e-5, "norm_before_gate": False,
               "D_per_channel": False, "use_bias": False, "use_conv_bias": True, "layer_idx": 0,
               **_DT}  # fmt: skip
    return Mamba2Mixer(**{**options, **changes})


def _mamba3(**changes: object) -> Mixer:
    options = {"hidden_size": D, "num_heads": 4, "head_dim": 4, "state_size": 6, "n_groups": 2,
               "mimo_rank": 1, "num_angles": 1, "rope_layout": "pairwise",
               "A_activation": "heavy_tail", "A_floor": 1e-4, "trapezoid": True, "bc_bias": True,
               "chunk_size": 4, "norm_eps": 1e-5, "output_norm": False, "use_bias": False,
               "layer_idx": 0, **_DT}  # fmt: skip
    return Mamba3Mixer(**{**options, **changes})


def _mamba3_mimo(**changes: object) -> Mixer:
    return _mamba3(**{"mimo_rank": 2, "rope_layout": "half", "num_angles": 3, **changes})


_ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": None, "rotary_dim": 0,
              "rope_theta": 100.0, "scaling": None, "dropout": 0.0, "config": None, "layer_idx": 0,
              "hidden_size": D, "use_bias": False, "use_out_bias": False}  # fmt: skip


def _attention(**changes: object) -> Mixer:
    return SelfAttention(**{**_ATTENTION, **changes})


def _fused_attention(**changes: object) -> Mixer:
    return FusedAttention(**{"conv_kernel": 0, "use_conv_bias": True, **_ATTENTION, **changes})


class _Selective(SelectiveAttention):
    """With a gate of its own, as a block has it."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.gate = SelectionGate(hidden_size=D, inner_size=None, estimator="dense", threshold=0.0)

    def forward(
        self, x: Tensor, seq: SequenceInfo, past_key_values: RecurrentCache | None = None
    ) -> Tensor:
        return super().forward(x, seq, past_key_values, self.gate(x, seq.mask))


_SELECTION = {"kv_source": "all", "window_unit": "position", "budget": None, "combine": "lerp",
              "dense": True, "capacity": 0.5}  # fmt: skip


def _selective(**changes: object) -> Mixer:
    return _Selective(**{**_ATTENTION, **_SELECTION, **changes})


def _selected(**changes: object) -> Mixer:
    return _selective(**{"kv_source": "selected", "budget": 3, "combine": "residual", **changes})


def _by(implementation: str) -> SimpleNamespace:
    return SimpleNamespace(_attn_implementation=implementation)


MIXERS: dict[str, Callable[[], Mixer]] = {
    "mamba1": _mamba1,
    "mamba1-biases": lambda: _mamba1(use_bias=True, use_conv_bias=False, conv_kernel=2),
    "mamba1-norms": lambda: _mamba1(inner_norm_eps=1e-5),
    "mamba2": _mamba2,
    "mamba2-biases": lambda: _mamba2(use_bias=True, use_conv_bias=False, n_groups=4),
    "mamba2-dt-limit": lambda: _mamba2(time_step_limit=(0.02, 0.08)),
    "mamba2-d_ssm": lambda: _mamba2(inner_size=22),
    "mamba2-norm-before-gate": lambda: _mamba2(norm_before_gate=True, D_per_channel=True),
    "mamba2-no-norm": lambda: _mamba2(norm_eps=None),
    "mamba3": _mamba3,
    "mamba3-norm": lambda: _mamba3(output_norm=True, use_bias=True, num_angles=3),
    "mamba3-ablations": lambda: _mamba3(
        num_angles=0, trapezoid=False, bc_bias=False, A_activation="softplus"
    ),
    "mamba3-mimo": _mamba3_mimo,
    "mamba3-mimo-norm": lambda: _mamba3_mimo(output_norm=True, n_groups=1, num_angles=1),
    "attention": _attention,
    "attention-rope": lambda: _attention(rotary_dim=6, use_bias=True, use_out_bias=True),
    "attention-eager": lambda: _attention(rotary_dim=2, num_kv_heads=1, config=_by("eager")),
    "attention-window": lambda: _attention(window=3, num_kv_heads=4, rotary_dim=4),
    "attention-window-1": lambda: _fused_attention(window=1, scaling=0.3),
    "attention-conv": lambda: _fused_attention(conv_kernel=4, rotary_dim=4),
    "attention-conv-window": lambda: _fused_attention(conv_kernel=2, window=5, use_bias=True),
    "selective": _selective,
    "selective-window": lambda: _selective(window=3, rotary_dim=4, combine="residual"),
    "selective-eager": lambda: _selective(window=4, config=_by("eager")),
    "selective-keys": _selected,
    "selective-keys-window": lambda: _selected(window=4, rotary_dim=6, combine="lerp"),
    "selective-keys-counted": lambda: _selected(window=2, window_unit="selected", budget=9),
}
# fp64 rounding; the laws are exact in real arithmetic.
TOLERANCE = 1e-10
ALL = SequenceInfo()


@pytest.fixture(params=MIXERS.values(), ids=MIXERS.keys())
def mixer(request: pytest.FixtureRequest) -> Mixer:
    return randomize_(request.param()).double().eval()


def _cache(mixer: Mixer, **options: int) -> RecurrentCache:
    kind = "full_attention" if isinstance(mixer, AttentionMixer) else "linear_attention"
    if isinstance(mixer, SelectiveAttention) and mixer.budget is not None:
        kind = "selected_attention"
    return RecurrentCache(SimpleNamespace(layer_types=[kind]), **options)


def _x(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64)


def _state(cache: RecurrentCache) -> dict[str, Tensor]:
    return cache.layers[0].state


def _assert_same_state(cache: RecurrentCache, expected: RecurrentCache) -> None:
    got, right = content(cache.layers[0]), content(expected.layers[0])
    assert got.keys() == right.keys()
    for name, value in got.items():
        assert relative_error(value, right[name]) < TOLERANCE, name


@pytest.mark.parametrize("with_grad", [False, True], ids=["in-place", "differentiable"])
def test_mixer_sequence_equals_steps(mixer: Mixer, with_grad: bool) -> None:
    x, cache, stepped = _x(2, 11), _cache(mixer), _cache(mixer)
    with torch.set_grad_enabled(with_grad):
        whole = mixer(x, ALL, cache)
        steps = torch.cat([mixer(x[:, t : t + 1], ALL, stepped) for t in range(11)], dim=1)
    assert relative_error(steps, whole) < TOLERANCE
    _assert_same_state(stepped, cache)


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (6,), (4, 10)])
def test_mixer_one_pass_equals_pieces(mixer: Mixer, cuts: tuple[int, ...]) -> None:
    x, cache, pieced = _x(2, 11), _cache(mixer), _cache(mixer)
    whole = mixer(x, ALL, cache)
    pieces = [mixer(part, ALL, pieced) for part in torch.tensor_split(x, cuts, dim=1)]
    assert relative_error(torch.cat(pieces, dim=1), whole) < TOLERANCE
    _assert_same_state(pieced, cache)


def test_mixer_packed_equals_separate(mixer: Mixer) -> None:
    x = _x(1, 20)
    doc = torch.tensor([[0] * 1 + [1] * 7 + [2] * 2 + [3] * 10])
    packed = mixer(x, SequenceInfo(seq_idx=doc))
    separate = torch.cat([mixer(part, ALL) for part in x.split([1, 7, 2, 10], dim=1)], dim=1)
    assert relative_error(packed, separate) < TOLERANCE


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_mixer_padding_changes_nothing(mixer: Mixer, where: str) -> None:
    x, tail = _x(1, 13), _x(1, 3)
    pads = {"left": [0, 1, 2, 3], "right": [9, 10, 11, 12], "middle": [2, 3, 7, 11]}[where]
    mask = torch.ones(1, 13, dtype=torch.bool)
    mask[0, pads] = False
    padded, clean = _cache(mixer), _cache(mixer)
    y = mixer(x, SequenceInfo(mask=mask), padded)[mask]
    expected = mixer(x[mask][None], ALL, clean)[0]
    assert relative_error(y, expected) < TOLERANCE
    _assert_same_state(padded, clean)
    # and what follows the padding continues as if it had not been there
    assert relative_error(mixer(tail, ALL, padded), mixer(tail, ALL, clean)) < TOLERANCE


def test_mixer_padded_turns_in_a_batch_equal_single_conversations(mixer: Mixer) -> None:
    first, second = _x(2, 6), _x(2, 5)
    masks = (
        torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool(),
        torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool(),
    )
    together = _cache(mixer)
    mixer(first, SequenceInfo(mask=masks[0]), together)
    y = mixer(second, SequenceInfo(mask=masks[1]), together)
    for row in range(2):
        alone = _cache(mixer)
        mixer(first[row][masks[0][row]][None], ALL, alone)
        expected = mixer(second[row][masks[1][row]][None], ALL, alone)
        assert relative_error(y[row][masks[1][row]], expected[0]) < TOLERANCE


def test_mixer_single_pad_step_holds_the_state(mixer: Mixer) -> None:
    x, cache, clean = _x(2, 5), _cache(mixer), _cache(mixer)
    mixer(x, ALL, cache)
    mixer(x, ALL, clean)
    mixer(_x(2, 1), SequenceInfo(mask=torch.zeros(2, 1, dtype=torch.bool)), cache)
    _assert_same_state(cache, clean)


def test_mixer_leaks_nothing_from_the_future(mixer: Mixer) -> None:
    x = _x(1, 10).requires_grad_()
    y = mixer(x, ALL)
    reach = getattr(mixer, "window", None) or 10
    if getattr(mixer, "conv1d", None) is not None:
        reach += mixer.conv1d.kernel_size[0] - 1
    for t in (0, 4, 8):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert grad[:, t + 1 :].abs().max() == 0
        if isinstance(mixer, SelectiveAttention):
            continue  # what is seen of the past depends on what is selected
        first = t + 1 - reach
        assert grad[:, max(first, 0) : t + 1].abs().min() > 0
        assert not grad[:, : max(first, 0)].any()


def test_mixer_gradcheck(mixer: Mixer) -> None:
    x = _x(2, 5).requires_grad_()
    names, values = zip(*mixer.named_parameters(), strict=True)
    seq = SequenceInfo(
        mask=torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]).bool(),
        seq_idx=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]),
    )

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(
            mixer, dict(zip(names, parameters, strict=True)), (x, seq)
        )

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


def test_mixer_gradient_flows_through_the_state(mixer: Mixer) -> None:
    x, cache = _x(1, 8).requires_grad_(), _cache(mixer)
    whole = mixer(x, ALL)[:, 4:].sum()
    (expected,) = torch.autograd.grad(whole, x)
    mixer(x[:, :4], ALL, cache)
    (grad,) = torch.autograd.grad(mixer(x[:, 4:], ALL, cache).sum(), x)
    assert relative_error(grad, expected) < TOLERANCE


def test_mixer_states_have_declared_shapes_and_stay_wide(mixer: Mixer) -> None:
    for batch in (1, 3):
        cache = _cache(mixer)
        mixer(_x(batch, 5), ALL, cache)
        for name, declared in mixer.state_shapes(batch).items():
            held = _state(cache)[name].shape
            assert held == tuple(n if m == -1 else m for n, m in zip(held, declared, strict=True))
        assert _state(cache).keys() == mixer.state_shapes(batch).keys()
    half, cache = mixer.bfloat16(), _cache(mixer)
    half(_x(2, 5).bfloat16(), ALL, cache)
    narrow = {"conv_state", "k_state", "v_state", "keys", "values"}
    dtypes = {
        **dict.fromkeys(narrow, torch.bfloat16),
        **dict.fromkeys(("length", "position", "tokens", "places"), torch.int64),
    }
    for name, stored in _state(cache).items():
        assert stored.dtype == dtypes.get(name, torch.float32), name


def test_mixer_state_size_does_not_grow(mixer: Mixer) -> None:
    cache, sizes, addresses = _cache(mixer), set(), set()
    for length in (1, 40, 1, 7):
        with torch.no_grad():
            mixer(_x(2, length), ALL, cache)
        sizes.add(cache.nbytes)
        addresses.add(tuple(t.data_ptr() for t in _state(cache).values()))
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in _state(cache).values())
    assert len(sizes) == 1
    assert len(addresses) == 1


@pytest.mark.parametrize("window", [4, 256])
@pytest.mark.parametrize("take_back", [0, 1, 3, 4])
def test_mixer_cropped_cache_equals_one_that_never_saw_the_tokens(
    mixer: Mixer, take_back: int, window: int
) -> None:
    prompt, call, step = _x(1, 30), _x(1, 4), _x(1, 1)
    cache = _cache(mixer, record_window=window)
    clean = _cache(mixer)
    cache.activate_past_recording()
    for part in (prompt, call):
        mixer(part, ALL, cache)
        cache.seen_tokens += part.shape[1]
    cache.crop(-take_back)
    assert cache.get_seq_length() == 34 - take_back
    for part in (prompt, call[:, : 4 - take_back]):
        if part.shape[1]:
            mixer(part, ALL, clean)
    _assert_same_state(cache, clean)
    assert relative_error(mixer(step, ALL, cache), mixer(step, ALL, clean)) < TOLERANCE
    cache.seen_tokens += 1
    cache.crop(-torch.ones((), dtype=torch.long))  # again, as transformers 5.17 says it


def test_mixer_crop_reaches_into_a_padded_prompt_and_over_many_steps(mixer: Mixer) -> None:
    x = _x(1, 12)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, :3] = False
    cache, clean = _cache(mixer), _cache(mixer)
    cache.activate_past_recording()
    mixer(x, SequenceInfo(mask=mask), cache)
    for _ in range(5):
        mixer(_x(1, 1), ALL, cache)
    cache.seen_tokens = 17
    cache.crop(-7)
    mixer(x[:, 3:10], ALL, clean)
    _assert_same_state(cache, clean)


def test_mixer_crop_forgets_what_was_recorded_before_a_gap(mixer: Mixer) -> None:
    parts, cache, clean = [_x(1, n) for n in (9, 1, 3)], _cache(mixer), _cache(mixer)
    cache.activate_past_recording()
    for part, records in zip(parts, (True, False, True), strict=True):
        if records:
            cache.activate_past_recording()
        else:
            cache.layers[0].record_past = False
        mixer(part, ALL, cache)
        cache.seen_tokens += part.shape[1]
    cache.crop(-2)
    for part in (*parts[:2], parts[2][:, :1]):
        mixer(part, ALL, clean)
    _assert_same_state(cache, clean)
    with pytest.raises(RuntimeError, match="only 0 were recorded"):
        cache.crop(-2)


def test_mixer_step_without_gradient_leaves_the_graph_of_its_state_alone(mixer: Mixer) -> None:
    x, cache = _x(1, 5).requires_grad_(), _cache(mixer)
    loss = mixer(x, ALL, cache).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    carried = sum(t.sum() for t in _state(cache).values())
    with torch.no_grad():
        mixer(_x(1, 1), ALL, cache)
    (grad,) = torch.autograd.grad(loss + 0 * carried, x)
    assert torch.equal(grad, expected)


def test_mixer_parameters_that_must_not_decay_exist(mixer: Mixer) -> None:
    own = {name for name, _ in mixer.named_parameters(recurse=False)}
    # An option that is off leaves None in the parameter's place.
    assert {name for name in mixer.no_decay if getattr(mixer, name) is not None} == own


def test_mixer_without_model_has_usable_initial_values() -> None:
    for make in (_mamba1, _mamba2, _mamba3, _mamba3_mimo, _attention, _fused_attention, _selected):
        mixer = make()
        for name, p in mixer.named_parameters():
            assert torch.isfinite(p).all(), name
        for name, p in mixer.named_parameters(recurse=False):
            if name == "A_log":
                assert (p >= 0).all()
            elif name in ("D", "B_bias", "C_bias", "mimo_z"):
                assert (p == 1).all(), name
            elif name in ("mimo_x", "mimo_o"):
                assert (p == 1 / 2).all(), name
