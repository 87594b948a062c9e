"""Jamba where it differs from the Mamba models: experts and their losses, files, bad configs.

`test_compat.py` holds it against transformers; here are the calls that transformers gets wrong, for
which the separate, unpadded run is the measure.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssm_hf import JambaConfig, JambaForCausalLM, Mamba2ForCausalLM, RecurrentCache
from ssm_hf.layers.moe import MoE
from tests.helpers import randomize_, relative_error, tiny


def build(**overrides: Any) -> JambaForCausalLM:
    return randomize_(JambaForCausalLM(tiny("jamba", **overrides))).eval()


def ids(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, 96, (batch, length))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="parity is with 5.23"
)
@pytest.mark.parametrize("padded", [False, True])
def test_router_losses_and_gradients_equal_transformers(padded: bool) -> None:
    ours = build().train()
    values = ours.config.to_dict()
    del values["initialization"]
    theirs = transformers.JambaForCausalLM(transformers.JambaConfig.from_dict(values)).train()
    theirs.load_state_dict(ours.state_dict())
    theirs.config.router_aux_loss_coef = ours.config.router_aux_loss_coef = 0.3
    theirs.router_aux_loss_coef = 0.3
    batch: dict[str, Any] = {"input_ids": ids(), "output_router_logits": True}
    batch["labels"] = batch["input_ids"]
    if padded:
        batch["attention_mask"] = torch.ones(2, 13, dtype=torch.long)
        batch["attention_mask"][1, :4] = 0
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
        # They count the first real token, which no pad predicts here, as a target.
        batch["labels"][1, 4] = -100
    a, b = ours(**batch), theirs(**batch)
    # Sums of 26 probabilities, and means of logs of order 5, in fp32.
    assert float((a.aux_loss - b.aux_loss).detach().abs()) < 2e-6
    assert float((a.loss - b.loss).detach().abs()) < 5e-6
    real = batch["attention_mask"].bool().flatten() if padded else slice(None)
    assert len(a.router_logits) == len(b.router_logits) == 2
    for mine, their in zip(a.router_logits, b.router_logits, strict=True):
        torch.testing.assert_close(mine[real], their[real], atol=2e-5, rtol=0)
    a.loss.backward()
    b.loss.backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, expected[name].grad) < 1e-4, name


def test_router_logits_and_losses_come_on_request() -> None:
    model, batch = build(), ids()
    plain = model(batch, labels=batch)
    assert plain.aux_loss is plain.router_logits is plain.router_statistics is None
    asked = model(batch, labels=batch, output_router_logits=True)
    weighted = model.config.router_aux_loss_coef * asked.aux_loss
    torch.testing.assert_close(asked.loss, plain.loss + weighted)
    assert [tuple(t.shape) for t in asked.router_logits] == [(26, 4)] * 2
    load = asked.router_statistics.load
    torch.testing.assert_close(load.sum(dim=1), torch.ones(2))
    model.config.output_router_logits = True
    fused = model(batch, labels=batch, return_logits=False)
    torch.testing.assert_close(fused.loss, asked.loss)
    assert torch.equal(model.model(batch).router_logits[0], asked.router_logits[0])
    dense = build(num_experts=1, output_router_logits=True)(batch, labels=batch)
    assert dense.aux_loss is dense.router_logits is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_router_losses_have_gradients_under_checkpointing(use_reentrant: bool) -> None:
    model, batch = build(router_aux_loss_coef=1.0).train(), ids()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(batch, labels=batch, output_router_logits=True).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    without = build(router_aux_loss_coef=0.0).train()
    without(batch, labels=batch, output_router_logits=True).loss.backward()
    router = "model.layers.0.feed_forward.router.weight"
    assert relative_error(dict(without.named_parameters())[router].grad, expected[router]) > 1e-2
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        assert torch.equal(gradient, expected[name]), name


def test_no_router_keeps_the_tokens_of_a_call() -> None:
    model = build()
    model(ids())
    model.generate(ids(1, 3), max_new_tokens=3, do_sample=False)
    assert all(m.routing is None for m in model.modules() if isinstance(m, MoE))


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(6,), (1,), (5, 6)])
def test_prompt_in_pieces_equals_one_pass(cuts: tuple[int, ...]) -> None:
    model, batch = build(), ids()
    cache = RecurrentCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in batch.tensor_split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(batch).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_right_padded_rows_decode_like_rows_alone() -> None:
    model, batch, more = build(mamba_proj_bias=True), ids(2, 9), ids(2, 4)
    mask = torch.ones_like(batch)
    mask[1, 5:] = 0
    cache = model(batch, attention_mask=mask, use_cache=True).past_key_values
    stepped = [model(t, past_key_values=cache).logits for t in more.split(1, dim=1)]
    for row, length in ((0, 9), (1, 5)):
        alone = torch.cat([batch[row, :length], more[row]])[None]
        expected = model(alone).logits[0, length:]
        got = torch.cat(stepped, dim=1)[row]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("how", ["position_ids", "seq_idx", "cu_seqlens"])
def test_packed_documents_equal_separate_ones(how: str) -> None:
    model, lengths = build(), (5, 1, 7)
    documents = [ids(1, n) for n in lengths]
    packing = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
        "cu_seqlens": torch.tensor([0, 5, 6, 13]),
    }
    got = model(torch.cat(documents, 1), **{how: packing[how]}).logits
    expected = torch.cat([model(d).logits for d in documents], 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_can_be_chosen(implementation: str, tmp_path: Path) -> None:
    model, batch = build(), ids()
    model.save_pretrained(tmp_path)
    chosen = JambaForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert chosen.model.layers[1].self_attn._implementation() == implementation
    torch.testing.assert_close(chosen(batch).logits, model(batch).logits, atol=2e-5, rtol=0)
    with pytest.raises(ImportError, match=r"flash_attn|FlashAttention"):
        JambaForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


_BEFORE_AND_AFTER = """
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from transformers import JambaConfig, JambaForCausalLM

folder = Path(sys.argv[1])
ids = torch.arange(3, 16)[None]
model = JambaForCausalLM.from_pretrained(folder / "start")
logits = model(ids).logits
model.save_pretrained(folder / "before")
import ssm_hf
assert type(model).__module__.startswith("transformers")
again, info = JambaForCausalLM.from_pretrained(folder / "before", output_loading_info=True)
assert not any(info.values()), info
assert torch.equal(again(ids).logits, logits)
again.save_pretrained(folder / "after")
first, second = (load_file(folder / name / "model.safetensors") for name in ("before", "after"))
assert first.keys() == second.keys()
assert all(torch.equal(first[name], second[name]) for name in first)
print("the same before and after", len(first))
"""


def test_transformers_own_jamba_is_left_alone(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "start")
    config = json.loads((tmp_path / "start/config.json").read_text())
    del config["initialization"]
    (tmp_path / "start/config.json").write_text(json.dumps(config))
    result = subprocess.run(
        [sys.executable, "-c", _BEFORE_AND_AFTER, str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = load_file(tmp_path / "start/model.safetensors")
    assert f"the same before and after {len(names)}" in result.stdout, result.stderr
    # A matrix for each expert, as released checkpoints have it.
    experts = [n for n in names if ".experts." in n]
    assert len(experts) == 2 * 4 * 3
    assert "model.layers.2.feed_forward.experts.3.gate_proj.weight" in experts


def test_a_file_without_an_expert_is_refused(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for kind in ("gate", "up", "down"):
        del weights[f"model.layers.2.feed_forward.experts.1.{kind}_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)):
        JambaForCausalLM.from_pretrained(tmp_path)


def test_initial_values_are_upstreams_on_request() -> None:
    config = tiny("jamba", hidden_size=64, initialization="transformers", initializer_range=0.1)
    for name, p in JambaForCausalLM(config).named_parameters():
        if p.ndim > 1 and "conv1d" not in name and not name.endswith(("A_log", "dt_proj.weight")):
            # The standard deviation of at least 192 draws is good to 10 %.
            assert float(p.detach().std()) == pytest.approx(0.1, rel=0.3), name


def test_keys_of_released_files_are_accepted() -> None:
    values = tiny("jamba").to_dict()
    old = {"mamba_inner_layernorms": True, "sliding_window": None, "num_logits_to_keep": 1,
           "calc_logits_for_entire_prompt": False, "n_ctx": 262144}  # fmt: skip
    config = JambaConfig.from_dict({**values, **old})
    assert config.num_logits_to_keep == 1
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    for key, value in (("mamba_inner_layernorms", False), ("sliding_window", 512)):
        with pytest.raises(ValueError, match=f"asks for {key}={value}"):
            JambaConfig.from_dict({**values, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_offset": 3}, r"offset \(3\) must be smaller than .* period \(3\)"),
        ({"attn_layer_offset": -1}, "attn_layer_offset must be 0 or more, got -1"),
        ({"expert_layer_offset": 2}, r"offset \(2\) must be smaller than .* period \(2\)"),
        ({"attn_layer_period": 0}, "attn_layer_period must be at least 1, got 0"),
        ({"num_experts_per_tok": 5}, "number of experts, 4, got 5"),
        ({"num_experts_per_tok": 0}, "number of experts, 4, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size, got 5 and 32"),
        ({"num_key_value_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"mamba_d_state": 0}, "mamba_d_state must be at least 1, got 0"),
        ({"mamba_dt_rank": 0}, "mamba_dt_rank must be at least 1, got 0"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"attention_dropout": 1.5}, r"attention_dropout must lie in \[0, 1\), got 1.5"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef must be 0 or more, got -0.1"),
        ({"expert_period": 2}, "unknown argument expert_period=2; did you mean"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny("jamba", **changes)


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    Mamba2ForCausalLM(tiny("mamba2")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of a model of type 'mamba2', not 'jamba'"):
        JambaForCausalLM.from_pretrained(tmp_path)
