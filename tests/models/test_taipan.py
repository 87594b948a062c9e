"""Taipan beyond what holds for every model: gates, budget, schedules, its config."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ssm_hf import RecurrentCache, TaipanConfig, TaipanForCausalLM, TaipanModel
from ssm_hf.layers.selection import SelectionGate
from tests.helpers import randomize_, relative_error, tiny

ROOT = Path(__file__).parents[2]
each_kind = pytest.mark.parametrize("kind", ["taipan", "taipan-selected"])


def _model(kind: str = "taipan", **changes: Any) -> TaipanForCausalLM:
    return randomize_(TaipanForCausalLM(tiny(kind, **changes)))


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 96, (batch, length))


@each_kind
@torch.no_grad()
def test_later_tokens_change_neither_outputs_nor_choices(kind: str) -> None:
    model, ids = _model(kind).double().eval(), _ids(2, 24)
    before = model(ids, output_gates=True)
    for t in (1, 9, 23):
        changed = ids.clone()
        changed[:, t:] = (ids[:, t:] + 17) % 90 + 3
        after = model(changed, output_gates=True)
        assert torch.equal(after.logits[:, :t], before.logits[:, :t])
        for gate, other in zip(after.gates, before.gates, strict=True):
            assert torch.equal(gate.selected[:, :t], other.selected[:, :t])
    assert 0.1 < float(before.gate_fractions[0]) < 0.9


@each_kind
@torch.no_grad()
def test_unselected_tokens_keep_their_stream_to_the_bit(kind: str) -> None:
    model, ids = _model(kind).eval(), _ids(2, 24)
    block, seen = model.model.layers[-1], {}
    block.input_layernorm.register_forward_hook(lambda m, a, out: seen.update(before=out[1]))
    block.pre_ff_layernorm.register_forward_hook(lambda m, a, out: seen.update(after=out[1]))
    (gate,) = model(ids, output_gates=True).gates
    assert torch.equal(seen["after"][~gate.selected], seen["before"][~gate.selected])
    assert (seen["after"] != seen["before"])[gate.selected].any(dim=-1).all()


@each_kind
def test_pads_are_never_selected_and_do_not_count(kind: str) -> None:
    model = _model(kind, capacity_loss_coef_start=1.0).double().train()
    rows = [_ids(1, n) for n in (20, 7)]
    alone = [model(row) for row in rows]
    loss = sum(out.capacity_loss for out in alone) / 2
    share = sum(out.gate_fractions * n for out, n in zip(alone, (20, 7), strict=True)) / 27
    for side in ("left", "right"):
        pads = (13, 0) if side == "left" else (0, 13)
        short = torch.nn.functional.pad(rows[1], pads)
        ids, mask = torch.cat([rows[0], short]), torch.ones(2, 20, dtype=torch.long)
        mask[1] = torch.nn.functional.pad(torch.ones(7, dtype=torch.long), pads)
        out = model(ids, attention_mask=mask)
        assert not out.gates[0].selected[mask == 0].any()
        assert relative_error(out.capacity_loss, loss) < 1e-12
        assert relative_error(out.gate_fractions, share) < 1e-6


@each_kind
@pytest.mark.parametrize("estimator", ["dense", "sparse", "paper"])
def test_gradient_checkpointing_replays_the_noise(kind: str, estimator: str) -> None:
    changes = {"gumbel_noise": 1.0, "capacity_loss_coef_start": 1.0, "gate_estimator": estimator}
    model, ids = _model(kind, **changes).train(), _ids(2, 24)
    results = []
    for options in (None, *({"use_reentrant": r, "preserve_rng_state": p}
                            for r in (False, True) for p in (False, True))):  # fmt: skip
        if options is not None:
            # Renamed between the transformers releases that are supported.
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)(options)
        torch.manual_seed(7)
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    torch.manual_seed(8)
    assert model(ids, labels=ids).loss != results[0][0]  # there is noise


@each_kind
@torch.no_grad()
def test_evaluation_is_deterministic_and_draws_nothing(kind: str) -> None:
    model, ids = _model(kind, gumbel_noise=1.0).eval(), _ids(2, 24)
    before = torch.get_rng_state()
    first, second = model(ids, labels=ids), model(ids, labels=ids)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.logits, second.logits)
    assert generated.shape == (2, 29)
    # The loss is the language model's alone, and gates are silent unless they are asked for.
    assert first.capacity_loss is None
    assert model(ids, labels=ids, output_gates=True).loss == first.loss
    model.config.output_gates = True
    assert model(ids).gate_fractions.shape == (1,)


def test_loss_holds_the_budget_by_its_schedule() -> None:
    changes = {"capacity_loss_coef_start": 0.25, "capacity_loss_coef": 2.0}
    model, ids = _model(**changes).train(), _ids(2, 24)
    plain = model.eval()(ids, labels=ids).loss.detach()
    for progress, weight in ((0.0, 0.25), (0.4, 0.25), (0.5, 1.125), (0.6, 2.0), (1.0, 2.0)):
        model.train().set_training_progress(progress)
        out = model(ids, labels=ids)
        language = out.loss - weight * out.capacity_loss
        assert float(language.detach()) == pytest.approx(float(plain), abs=1e-5)
    # And by a call's share of an accumulated batch.
    shared = model(ids, labels=ids, num_items_in_batch=92)
    assert float(shared.loss.detach()) == pytest.approx(float(out.loss.detach()) / 2, abs=1e-5)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\]"):
            model.set_training_progress(wrong)


def test_noise_and_temperature_fall_at_the_end_of_the_training() -> None:
    model = _model(gumbel_noise=1.0, gumbel_tau=2.0).train()
    calls: list[Any] = []
    gate = model.model.layers[-1].gate
    gate.register_forward_pre_hook(lambda module, args: calls.append(args[2:]))
    spreads = []
    for progress in (0.0, 0.8, 0.9, 1.0):
        model.set_training_progress(progress)
        model(_ids(8, 200))
        noise, tau = calls[-1]
        spreads.append((float(noise.std()), float(tau)))
    pi = 3.14159
    for (spread, tau), left in zip(spreads, (1.0, 1.0, 0.5, 0.05), strict=True):
        assert tau == pytest.approx(2 * left, rel=1e-5)
        # A logistic variable's deviation is pi / sqrt(3); of 1600 draws it is known to 3 %.
        assert spread == pytest.approx(left * pi / 3**0.5, rel=0.1)


def test_sparse_estimator_may_begin_dense() -> None:
    model = _model(gate_estimator="sparse", gate_dense_until=0.2)
    attention = model.model.layers[-1].self_attn
    assert attention.dense
    assert [model.set_training_progress(p) for p in (0.0, 0.1, 0.2, 0.5)] == [
        False, False, True, False,
    ]  # fmt: skip
    assert not attention.dense


def test_gates_may_begin_open() -> None:
    """All real tokens are selected then, and alpha alone hears from the loss."""
    model, ids = _model(gate_open_until=0.3, gumbel_noise=1.0).train(), _ids(2, 24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    assert not model.set_training_progress(0.1)
    out = model(ids, attention_mask=mask, labels=ids)
    assert torch.equal(out.gates[0].selected, mask.bool())
    assert not out.gates[0].weight.requires_grad
    out.loss.backward()
    assert model.model.layers[-1].gate.weight.grad.abs().max() > 0
    assert 0 < float(model.eval()(ids, output_gates=True).gate_fractions) < 1
    assert model.train().set_training_progress(0.3)
    assert 0 < float(model(ids).gate_fractions) < 1


def test_training_meets_the_budget_and_so_does_evaluation_once_calibrated() -> None:
    """Tokens are to be copied from 5 places before, in one of 6 positions; 300 steps."""
    torch.manual_seed(0)
    budget = {"gumbel_noise": 1.0, "capacity_loss_coef_start": 1.0, "capacity_loss_coef": 5.0}
    config = tiny("taipan", vocab_size=16, num_hidden_layers=2, sliding_window=16, **budget)
    model = TaipanForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    shares = []
    for step in range(300):
        ids = torch.randint(3, 16, (8, 48))
        ids[:, 5::6] = ids[:, ::6]
        model.set_training_progress(step / 300)
        out = model(ids, labels=ids, use_cache=False)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        shares.append(float(out.gate_fractions.mean()))
    capacity = config.attention_capacity
    assert abs(sum(shares[-20:]) / 20 - capacity) <= 0.03
    batches = [{"input_ids": torch.randint(3, 16, (8, 48))} for _ in range(4)]
    thresholds = model.calibrate_threshold(batches)
    assert model.training
    assert thresholds == model.config.gate_eval_threshold
    fresh = model.eval()(torch.randint(3, 16, (32, 48)), output_gates=True)
    assert capacity / 2 <= float(fresh.gate_fractions.mean()) <= 2 * capacity


@torch.no_grad()
def test_calibration_is_exact_on_its_own_tokens_and_is_saved(tmp_path: Path) -> None:
    model = _model(num_mamba_layers=4, sal_period=2).eval()
    ids, mask = _ids(3, 50), torch.ones(3, 50, dtype=torch.long)
    mask[0, :13] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    thresholds = model.calibrate_threshold([batch], capacity=0.3)
    assert len(thresholds) == 2
    assert not model.training
    fractions = model(**batch, output_gates=True).gate_fractions
    assert fractions.tolist() == pytest.approx([0.3, 0.3], abs=1 / 137)
    model.save_pretrained(tmp_path)
    loaded = TaipanForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.gate_eval_threshold == thresholds
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    for given, message in ((([batch], 0.0), "capacity must lie in"), (([],), "batches is empty")):
        with pytest.raises(ValueError, match=message):
            model.calibrate_threshold(*given)


@torch.no_grad()
def test_thresholds_are_exact_in_models_of_16_bits(tmp_path: Path) -> None:
    threshold = 0.123456789
    model = _model(gate_eval_threshold=threshold)
    model.save_pretrained(tmp_path)
    loaded = TaipanForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for cast in (loaded, copy.deepcopy(model).bfloat16(), copy.deepcopy(model).half()):
        gate = cast.model.layers[-1].gate
        assert gate.threshold.dtype == torch.float32
        assert torch.equal(gate.threshold, torch.tensor(threshold))
    assert model.double().model.layers[-1].gate.threshold.dtype == torch.float64
    loaded.set_training_progress(0.999)
    assert float(loaded.model.progress) == pytest.approx(0.999)
    # And what was calibrated in 16 bits selects the same there after a way through a file.
    batch = {"input_ids": _ids(4, 200)}
    thresholds = loaded.eval().calibrate_threshold([batch], capacity=0.3)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    reloaded = TaipanForCausalLM.from_pretrained(again, dtype=torch.bfloat16)
    assert float(reloaded.model.layers[-1].gate.threshold) == thresholds[0]
    fractions = [m(**batch, output_gates=True).gate_fractions for m in (loaded, reloaded)]
    assert torch.equal(*fractions)
    assert float(fractions[0]) == pytest.approx(0.3, abs=1 / 800)


@torch.no_grad()
def test_calibration_leaves_pads_out_and_undoes_itself_where_it_fails() -> None:
    model, ids = _model(num_mamba_layers=4, sal_period=2).train(), _ids(3, 50)
    documents = torch.arange(50).expand(3, -1).clone() // 10
    documents[:, 35:] = -1
    batch = {"input_ids": ids, "seq_idx": documents}
    before = model.calibrate_threshold([batch], capacity=0.4)
    fractions = model.eval()(**batch, output_gates=True).gate_fractions
    assert fractions.tolist() == pytest.approx([0.4, 0.4], abs=1 / 105)
    pads = {"input_ids": ids, "attention_mask": torch.zeros(3, 50, dtype=torch.long)}
    gates = [block.gate for block in model.model.layers if block.is_attention]
    model.train()
    with pytest.raises(ValueError, match="batches hold pads alone"):
        model.calibrate_threshold([pads])
    gates[1].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="gate of attention layer 1 are not finite"):
        model.calibrate_threshold([batch], capacity=0.1)
    assert model.training
    assert [float(gate.threshold) for gate in gates] == before
    assert model.config.gate_eval_threshold == before


@each_kind
@torch.no_grad()
def test_reordered_rows_equal_recomputed_ones(kind: str) -> None:
    model, ids, more = _model(kind).double().eval(), _ids(3, 11), _ids(3, 9)
    cache = model(ids, use_cache=True).past_key_values
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    got = torch.cat([model(t, past_key_values=cache).logits for t in more.split(1, dim=1)], dim=1)
    expected = model(torch.cat([ids[order], more], dim=1)).logits[:, 11:]
    assert relative_error(got, expected) < 1e-12


@each_kind
@torch.no_grad()
def test_memory_does_not_grow_and_addresses_stay(kind: str) -> None:
    model, cache = _model(kind).eval(), None
    cache, facts = RecurrentCache(model.config), set()
    for length in (1, 60, 1, 7, 1):
        model(_ids(2, length), past_key_values=cache)
        addresses = [t.data_ptr() for layer in cache.layers for t in layer.state.values()]
        facts.add((cache.nbytes, *addresses))
    assert len(facts) == 1


@each_kind
@torch.no_grad()
def test_a_decoding_step_compiles_once(kind: str) -> None:
    """As one graph, on the fixed addresses that captured steps use."""
    model = _model(kind).eval()
    ids = _ids(2, 61)
    begun = model(ids[:, :10], use_cache=True).past_key_values
    cache = RecurrentCache.like(begun)
    for mine, layer in zip(cache.layers, begun.layers, strict=True):
        mine.state = {name: t.clone() for name, t in layer.state.items()}
    torch._dynamo.reset()
    step = torch.compile(model._next_logits, fullgraph=True, backend="eager")
    logits = [model._next_logits(ids[:, 10:11].clone(), cache)]  # makes what lives on in the cache
    step(ids[:, 10:11].clone(), copy.deepcopy(cache))
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits += [step(ids[:, t : t + 1].clone(), cache) for t in range(11, 61)]
    expected = model(ids).logits[:, 10:]
    assert relative_error(torch.stack(logits, dim=1), expected) < 1e-5


def test_gates_begin_near_a_half_and_are_not_decayed() -> None:
    model = TaipanForCausalLM(tiny("taipan", gumbel_noise=1.0)).train()
    share = float(model(_ids(8, 100)).gate_fractions.mean())
    assert 0.45 < share < 0.55
    names = {group["weight_decay"]: group["names"] for group in model.parameter_groups(0.1)}
    block = "model.layers.2"
    assert f"{block}.gate.weight" in names[0.1]
    assert f"{block}.gate.bias" in names[0.0]
    assert f"{block}.pre_ff_layernorm.weight" in names[0.0]
    assert sorted(names[0.1] + names[0.0]) == sorted(n for n, _ in model.named_parameters())


def test_parameter_names_are_those_of_the_format() -> None:
    model = TaipanForCausalLM(tiny("taipan", sal_gate_hidden=8, use_bias=True))
    mamba = ["A_log", "D", "conv1d.bias", "conv1d.weight", "dt_bias", "in_proj.bias",
             "in_proj.weight", "norm.weight", "out_proj.bias", "out_proj.weight"]  # fmt: skip
    attention = ["feed_forward.down_proj.weight", "feed_forward.gate_proj.weight",
                 "feed_forward.up_proj.weight", "gate.bias", "gate.hidden.bias",
                 "gate.hidden.weight", "gate.weight", "input_layernorm.weight",
                 "pre_ff_layernorm.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight",
                 "self_attn.q_proj.weight", "self_attn.v_proj.weight"]  # fmt: skip
    expected = {"model.embed_tokens.weight", "model.final_layernorm.weight", "lm_head.weight"}
    for layer in (0, 1):
        expected.add(f"model.layers.{layer}.input_layernorm.weight")
        expected |= {f"model.layers.{layer}.mamba.{name}" for name in mamba}
    expected |= {f"model.layers.2.{name}" for name in attention}
    assert set(model.state_dict()) == expected
    assert model.model.layers[2].gate.weight.shape == (2, 8)


def test_flops_equal_a_count_by_hand() -> None:
    model = TaipanModel(tiny("taipan"))
    # D=32: two Mamba-2 blocks as in the test of Mamba-2; gate; keys and values of all tokens,
    # queries, outputs and scores of 15 %; the MLP.
    scan = 4 * 2 * 16 + 4 * 64 + 64 * 16 + 64 * 16
    mamba = 2 * (32 * (64 + 64 + 2 * 2 * 16 + 8) + 64 * 32 + 4 * (64 + 2 * 2 * 16) + scan)
    scores = 4 * 32 * (5 * 10 - 10) // 10  # of 10 tokens with a window of 5
    attention = int(0.15 * (2 * 2 * 32 * 32 + scores) + 2 * 2 * 32 * 16)
    expected = 2 * mamba + 2 * 2 * 32 + attention + 2 * 3 * 32 * 48
    assert model.flops_per_token(10) == expected


def test_auto_classes_know_the_type(tmp_path: Path) -> None:
    model, ids = _model().eval(), _ids(1, 9)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TaipanConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, TaipanForCausalLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_thresholds_reach_captured_steps_and_loaded_models() -> None:
    """A gate's threshold is a tensor at a fixed address, not a number of the program."""
    model = _model(gate_eval_threshold=0.5).eval()
    gate = next(m for m in model.modules() if isinstance(m, SelectionGate))
    assert float(gate.threshold) == 0.5
    address = gate.threshold.data_ptr()
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.calibrate_threshold([{"input_ids": _ids(2, 30)}])
    assert gate.threshold.data_ptr() == address
    assert not any("threshold" in name for name in model.state_dict())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sal_period": 0}, "sal_period must be at least 1, got 0"),
    ({"sal_period": 31}, "sal_period=31 leaves num_mamba_layers=30 blocks without any attention"),
    ({"sliding_window": 0}, "sliding_window must be at least 1 token, or None, got 0"),
    ({"sal_kv_source": "selected", "sal_kv_budget": 0}, "sal_kv_budget must be at least 1"),
    ({"sal_kv_budget": 7}, 'sal_kv_budget=7 needs sal_kv_source="selected"'),
    ({"sal_window_unit": "selected"}, "sal_window_unit='selected' needs sal_kv_source"),
    ({"sal_kv_source": "selected", "sliding_window": None}, "needs a sal_kv_budget"),
    ({"sal_kv_source": "some"}, "sal_kv_source must be 'all' or 'selected', got 'some'"),
    ({"sal_combine": "add"}, "sal_combine must be 'lerp' or 'residual'"),
    ({"gate_estimator": "soft"}, "gate_estimator must be 'dense' or 'sparse' or 'paper'"),
    ({"attention_capacity": 0.0}, r"attention_capacity must lie in \(0, 1\], got 0.0"),
    ({"attention_capacity": 1.5}, r"attention_capacity must lie in \(0, 1\], got 1.5"),
    ({"capacity_loss_coef": -1.0}, "capacity_loss_coef must be 0 or more"),
    ({"capacity_ramp_start": 0.7}, "capacity_ramp_end must lie between capacity_ramp_start=0.7"),
    ({"capacity_loss_reduction": "token"}, "capacity_loss_reduction must be"),
    ({"gumbel_tau": 0.0}, "gumbel_tau must be positive and finite, got 0.0"),
    ({"gumbel_noise": -0.5}, "gumbel_noise must be 0 or more"),
    ({"gate_dense_until": 2.0}, r"gate_dense_until must lie in \[0, 1\]"),
    ({"gate_open_until": -0.5}, r"gate_open_until must lie in \[0, 1\]"),
    ({"gumbel_tau": math.inf}, "gumbel_tau must be positive and finite, got inf"),
    ({"capacity_loss_coef": math.inf}, "capacity_loss_coef must be 0 or more, and finite, got inf"),
    ({"gate_eval_threshold": math.nan}, "gate_eval_threshold must be numbers, got nan"),
    ({"gate_eval_threshold": [0.1, 0.2]}, "one for each of the 5 attention layers, got 2"),
    ({"sal_gate_hidden": 0}, "sal_gate_hidden must be at least 1"),
    ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_kv_heads must divide num_heads"),
    ({"use_rope": True, "head_dim": 63}, "rotary_dim must be even"),
    ({"mamba_d_head": 48}, "mamba_d_head=48 must divide mamba_expand"),
    ({"mamba_n_groups": 5}, "mamba_n_groups=5 must divide the number of heads = 64"),
    ({"time_step_limit": [1.0, 0.5]}, "time_step_limit must be"),
    ({"num_hidden_layers": 4}, "unknown argument num_hidden_layers=4"),
    ({"sal_periods": 4}, "unknown argument sal_periods=4; did you mean 'sal_period'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        TaipanConfig(**changes)


def test_layers_stand_after_every_period() -> None:
    config = TaipanConfig(num_mamba_layers=5, sal_period=2)
    kinds = ["linear_attention"] * 2 + ["sliding_attention"]
    assert config.layer_types == [*kinds, *kinds, "linear_attention"]
    assert config.num_hidden_layers == 7
    config = TaipanConfig(sal_kv_source="selected", sal_period=30)
    assert config.layer_types[-1] == "selected_attention"
    assert config.kv_budget == 615  # 2 * 0.15 * 2048, rounded up
    # A window of selected tokens is as long as it says.
    config = TaipanConfig(sal_kv_source="selected", sal_window_unit="selected")
    assert config.kv_budget == 2048
    with torch.device("meta"):
        small = TaipanModel(tiny("taipan", sal_kv_source="selected", sal_window_unit="selected"))
    assert small.layers[-1].self_attn.ring == 5


def test_a_model_without_flash_attention_says_so() -> None:
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        TaipanForCausalLM._from_config(tiny("taipan"), attn_implementation="flash_attention_2")


CONFIGS = sorted(ROOT.glob("configs/model/taipan-*.json"))
# The sizes that the paper names, in millions.
SIZES = {"taipan-190m": 187.5, "taipan-450m": 446.1, "taipan-1.3b": 1291.2, "taipan-130m": 127.6}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_shipped_configs_build_and_are_written_in_full(file: Path, tmp_path: Path) -> None:
    config = TaipanConfig.from_pretrained(file)
    with torch.device("meta"):
        model = TaipanForCausalLM(config)
    if file.stem in SIZES:
        count = sum(p.numel() for p in model.parameters())
        assert count == pytest.approx(SIZES[file.stem] * 1e6, rel=5e-4)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == json.loads(file.read_text()) | {
        "transformers_version": transformers.__version__
    }
