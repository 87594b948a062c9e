"""What the science suite measures of a model, its rules against leaks, and its verdicts."""

import math

import pytest
import torch
import transformers

from eval.science.measure import (
    LeakedLabels,
    ModelPredictor,
    WipedState,
    accuracy,
    integrity,
    scaled,
    targets,
)
from eval.science.verdicts import (
    Sample,
    above,
    all_of,
    bound,
    resolution_of_difference,
    resolution_of_mean,
    same,
    t_quantile,
)
from eval.tasks import IGNORED, Samples, make_task, seeded
from ssm_hf import TaipanForCausalLM
from tests.helpers import randomize_, tiny

pytestmark = pytest.mark.usefixtures("science_classes")


# --- measuring ------------------------------------------------------------------------------------


class Copier:
    """Answers string_copy by the rule; from each sample's own separator, so at any length."""

    def __init__(self, vocab_size=30, wrong_after=10**9) -> None:
        self.vocab_size, self.wrong_after = vocab_size, wrong_after

    def __call__(self, samples: Samples) -> torch.Tensor:
        rows, slots = (samples.labels != IGNORED).nonzero(as_tuple=True)
        separator = (samples.input_ids == 2).float().argmax(1)[rows]
        source = slots - separator
        answer = samples.input_ids[rows, source.clamp(max=samples.input_ids.shape[1] - 1)]
        answer = torch.where(source == separator, 3, answer)
        answer = torch.where(source > self.wrong_after, 0, answer)
        return torch.nn.functional.one_hot(answer, self.vocab_size).float()


@torch.no_grad()
def test_shares_of_selected_tokens_are_those_of_the_gates() -> None:
    task = make_task("mqar", {"vocabulary": 32, "min_context": 32})
    config = tiny("taipan", vocab_size=task.vocab_size, num_mamba_layers=4, sal_period=2)
    model = randomize_(TaipanForCausalLM(config)).eval()
    found = accuracy(ModelPredictor(model), task, 4, 20, seeded(0))
    batch = task.sample([4] * 20, seeded(0))
    first, second = (g.selected for g in model(batch.input_ids, output_gates=True).gates)
    asked = torch.nn.functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
    assert found["selected"] == pytest.approx(float((first.float() + second).mean() / 2))
    assert found["selected_asked"] == pytest.approx(float((first | second)[asked].float().mean()))
    assert "selected" not in accuracy(Copier(), make_task("string_copy", {}), 5, 5, seeded(0))


def test_accuracies_of_a_known_predictor() -> None:
    task = make_task("string_copy", {})
    right = accuracy(Copier(), task, 10, 50, seeded(0))
    assert right == {
        "samples": 50,
        "string": 1,
        "token": 1,
        "last": 1,
        "scaled": 1,
        "scaled_last": 1,
    }
    # Eleven labels a sample, the first four of them right.
    partly = accuracy(Copier(wrong_after=4), task, 10, 50, seeded(0))
    assert partly["string"] == partly["last"] == 0
    assert partly["token"] == pytest.approx(4 / 11)
    assert partly["scaled_last"] == pytest.approx(-1 / 25)


def test_batches_do_not_change_an_accuracy(monkeypatch) -> None:
    task = make_task("string_copy", {})
    monkeypatch.setattr("eval.science.measure.BATCH_TOKENS", 7 * task.tokens(10))
    assert accuracy(Copier(wrong_after=4), task, 10, 50, seeded(0))["token"] == pytest.approx(
        4 / 11
    )


def test_scaled_accuracy() -> None:
    assert scaled(0.5, 2) == 0
    assert scaled(1.0, 5) == 1
    assert scaled(0.6, 5) == pytest.approx(0.5)


def small_model(kind="mamba2", **changes):
    config = {
        "mamba2": {
            "num_heads": 2,
            "head_dim": 16,
            "n_groups": 1,
            "state_size": 8,
            "chunk_size": 16,
        },
        "mamba_time_invariant": {"state_size": 4},
        "lstm": {},
        "llama": {"num_attention_heads": 2, "intermediate_size": 32},
    }[kind]
    common = {"model_type": kind, "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30}
    made = transformers.AutoConfig.for_model(**{**common, **config, **changes})
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["mamba2", "llama", "lstm", "mamba_time_invariant"])
def test_logits_are_those_of_the_model(kind) -> None:
    model = small_model(kind)
    samples = make_task("string_copy", {}).sample([5, 9, 7], seeded(0))
    got = ModelPredictor(model)(samples)
    with torch.no_grad():
        logits = model(input_ids=samples.input_ids, use_cache=False).logits
    want = logits[:, :-1][samples.labels[:, 1:] != IGNORED]
    assert torch.allclose(got, want, atol=1e-5)  # sums in another order, in fp32
    assert len(got) == len(targets(samples))


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba2", "llama"])
def test_honest_models_are_not_flagged_and_controls_are(kind) -> None:
    honest = ModelPredictor(small_model(kind))
    task = make_task("string_copy", {})
    found = integrity(honest, task, 60, seeded(0))
    assert (found.leaks, found.wiped, found.reach) == (False, False, found.needed)
    assert found.follows_labels == found.sees_ahead == 0

    leaked = integrity(LeakedLabels(honest, 0.25), task, 60, seeded(0))
    assert leaked.leaks
    assert leaked.follows_labels == pytest.approx(0.25, abs=0.05)

    wiped = integrity(WipedState(honest, 64), task, 60, seeded(0))
    assert wiped.wiped
    assert wiped.reach == 63
    assert not wiped.leaks


class Peeking:
    """Reads the token that it is to predict: what a scan that is not causal would do."""

    def __call__(self, samples: Samples) -> torch.Tensor:
        answer = samples.input_ids[samples.labels != IGNORED]
        return torch.nn.functional.one_hot(answer, 30).float()


def test_a_model_that_sees_ahead_is_flagged() -> None:
    found = integrity(Peeking(), make_task("string_copy", {}), 20, seeded(0))
    assert found.leaks
    assert found.follows_labels == 0
    assert found.sees_ahead > 0.02


class Fading:
    """A memory whose content halves with every token."""

    def __call__(self, samples: Samples) -> torch.Tensor:
        ids = samples.input_ids.float()
        state, states = torch.zeros(len(ids)), []
        for token in ids.T:
            state = 0.5 * state + token
            states.append(state)
        hidden = torch.stack(states, 1)[:, :-1][samples.labels[:, 1:] != IGNORED]
        return torch.stack([hidden, -hidden], 1)


def test_a_memory_that_fades_is_not_called_wiped() -> None:
    found = integrity(Fading(), make_task("string_copy", {}), 60, seeded(0))
    assert found.reach < found.needed  # beyond, it is below a rounding of fp32
    assert not found.wiped


def test_wiping_is_reading_each_window_afresh() -> None:
    honest = ModelPredictor(small_model())
    samples = make_task("string_copy", {}).sample([20, 15, 20], seeded(0))
    long = WipedState(honest, samples.input_ids.shape[1])(samples)
    assert torch.allclose(long, honest(samples), atol=1e-5)  # sums in another order
    short = WipedState(honest, 8)(samples)
    # The label at slot 33 is predicted behind token 32, the first of a window.
    labelled = (samples.labels[0] != IGNORED).nonzero()[:, 0].tolist()
    alone = honest(
        Samples(
            samples.input_ids[:1, 32:34],
            torch.tensor([[IGNORED, int(samples.labels[0, 33])]]),
            torch.tensor([2]),
        )
    )
    assert torch.allclose(short[labelled.index(33)], alone[0], atol=1e-5)


def test_time_invariant_mixer_has_constant_steps_and_projections() -> None:
    """Its scan commutes with shifts: the same input later gives the same output later."""
    model = small_model("mamba_time_invariant")
    (projection,) = [m.x_proj for m in model.modules() if hasattr(m, "x_proj")]
    a, b = projection(torch.randn(2, 5, 32)), projection(torch.randn(2, 5, 32))
    assert torch.equal(a, b)
    assert torch.equal(a[0, 0], a[1, 4])
    loss = model(input_ids=torch.randint(30, (2, 9)), labels=torch.randint(30, (2, 9))).loss
    loss.backward()
    assert projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["lstm", "mamba_time_invariant"])
def test_controls_are_saved_and_loaded(kind, tmp_path) -> None:
    model = small_model(kind)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(30, (2, 7))
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


# --- verdicts -------------------------------------------------------------------------------------


def test_t_quantiles() -> None:
    assert t_quantile(1) == 12.706
    assert t_quantile(2.9) == 4.303
    assert t_quantile(0.5) == math.inf
    assert t_quantile(20) == pytest.approx(2.086, abs=0.002)
    assert t_quantile(1000) == pytest.approx(1.962, abs=0.002)


def test_one_seed_decides_nothing() -> None:
    one = Sample((1.0,), 1000)
    assert resolution_of_mean(one) == math.inf
    assert bound(one, "x", 0.5, lower=True).verdict == "not decided"
    assert bound(one, "x", 0.5, lower=True).resolution is None
    assert above(one, Sample((0.0, 0.0), 1000), ("a", "b"), 0.0).verdict == "not decided"


def test_resolution_holds_spread_and_sampling() -> None:
    sample = Sample((0.8, 0.9, 1.0), 500)
    by_seed = 4.303 * 0.1 / math.sqrt(3)
    assert resolution_of_mean(sample) == pytest.approx(math.hypot(by_seed, sample.sampling))
    # Seeds that agree still leave the finite number of test samples.
    exact = Sample((1.0, 1.0, 1.0), 500)
    assert 0 < resolution_of_mean(exact) < 0.005
    assert Sample((1.0, 1.0), 10).sampling > Sample((1.0, 1.0), 1000).sampling
    # A scaled accuracy of two classes is twice as uncertain as the share behind it.
    assert Sample((0.0, 0.0), 500, choices=2).sampling == pytest.approx(
        2 * Sample((0.5, 0.5), 500).sampling
    )


def test_welch() -> None:
    a, b = Sample((0.9, 1.0, 0.8), 10**9), Sample((0.5, 0.5, 0.5), 10**9)
    # All spread is in one group: two degrees of freedom.
    assert resolution_of_difference(a, b) == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize(
    ("values", "limit", "lower", "verdict"),
    [
        ((0.99, 1.0, 1.0), 0.95, True, "confirmed"),
        ((0.1, 0.2, 0.1), 0.95, True, "not confirmed"),
        ((1.0, 1.0, 0.2), 0.95, True, "not decided"),
        ((0.96, 0.94, 0.95), 0.95, True, "not decided"),
        ((0.0, 0.01, 0.0), 0.1, False, "confirmed"),
        ((0.9, 0.9, 0.9), 0.1, False, "not confirmed"),
    ],
)
def test_bounds(values, limit, lower, verdict) -> None:
    outcome = bound(Sample(values, 512), "x", limit, lower=lower)
    assert outcome.verdict == verdict
    assert f"{limit:g}" in outcome.text


def test_differences() -> None:
    high, low = Sample((0.9, 0.92, 0.91), 512), Sample((0.4, 0.45, 0.42), 512)
    names = ("a", "b")
    assert above(high, low, names, 0.3).verdict == "confirmed"
    assert above(high, low, names, 0.6).verdict == "not confirmed"
    assert above(high, low, names, 0.48).verdict == "not decided"
    assert same(high, low, names).verdict == "not confirmed"
    assert same(high, Sample((0.91, 0.9, 0.93), 512), names).verdict == "confirmed"
    coarse = Sample((0.1, 0.9, 0.5), 512)
    assert same(coarse, coarse, names).verdict == "not decided"


def test_the_same_model_under_other_seeds_is_no_difference() -> None:
    """False alarms of `same` and `above` on equal groups stay near the 5 % they are made for."""
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for _ in range(500):
        draws = (0.5 + 0.05 * torch.randn(6, generator=generator)).tolist()
        a, b = Sample(tuple(draws[:3]), 512), Sample(tuple(draws[3:]), 512)
        alarms += same(a, b, ("a", "b")).verdict == "not confirmed"
    assert alarms / 500 < 0.08


def test_claims_need_all_checks() -> None:
    def outcomes(*verdicts):
        sample = Sample((1.0, 1.0, 1.0), 512)
        limit = {"confirmed": 0.5, "not confirmed": 1.5, "not decided": 1.0}
        return [bound(sample, "x", limit[v], lower=True) for v in verdicts]

    assert all_of(outcomes("confirmed", "confirmed")) == "confirmed"
    assert all_of(outcomes("confirmed", "not decided")) == "not decided"
    assert all_of(outcomes("not decided", "not confirmed")) == "not confirmed"
    assert all_of([]) == "not tested"
