"""Models of any pattern of blocks: patterns, options, sharing, and mamba2attn's checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ssm_hf import HybridConfig, HybridForCausalLM, JambaForCausalLM, RecurrentCache
from ssm_hf.convert import convert, convert_back, convert_config, convert_state_dict
from ssm_hf.models.hybrid import expand_pattern
from tests.helpers import randomize_, relative_error, tiny

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {
    "mamba1": {"state_size": 4},
    "mamba2": {"head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 4},
    "mamba3": {"head_dim": 8, "state_size": 8, "chunk_size": 4},
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "sliding_attention": {"num_heads": 4, "window": 5, "rotary_dim": 8},
    "moe": {"num_experts": 4, "intermediate_size": 24},
}


def build(blocks: Any, **changes: Any) -> HybridForCausalLM:
    options = {**OPTIONS, **changes.pop("options", {})}
    config = HybridConfig(vocab_size=96, hidden_size=32, blocks=blocks, options=options, **changes)
    return randomize_(HybridForCausalLM(config)).eval()


def ids(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, 96, (batch, length))


def test_patterns_expand_to_lists() -> None:
    assert expand_pattern("mamba2") == ["mamba2"]
    assert expand_pattern("2*(3*a b) c") == ["a", "a", "a", "b"] * 2 + ["c"]
    assert expand_pattern(" 2 * ( a 2*(b) )a ") == ["a", "b", "b", "a", "b", "b", "a"]
    assert expand_pattern("M-M*E") == ["mamba2", "mlp", "mamba2", "attention", "moe"]


@pytest.mark.parametrize(
    "pattern", ["", "0*a", "2*", "(a", "a)", "()", "2*3*a", "a, b", "a 3b", "-M?"]
)
def test_patterns_that_are_none_are_refused(pattern: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match="blocks"):
        HybridConfig(blocks=pattern)


# Blocks of each kind in the patterns that the documentation names.
PATTERNS = {
    "mamba2attn": (
        "9*mamba2 4*(attention 8*mamba2) attention 10*mamba2 attention 7*mamba2",
        {"mamba2": 58, "attention": 6},
    ),
    "mamba2-mlp-attention": (
        "4*(4*(mamba2 mlp) attention mlp 3*(mamba2 mlp))",
        {"mamba2": 28, "attention": 4, "mlp": 32},
    ),
    "samba": (
        "12*(mamba1 mlp sliding_attention mlp)",
        {"mamba1": 12, "sliding_attention": 12, "mlp": 24},
    ),
    "mamba3": ("4*(5*(mamba3 mlp) attention mlp)", {"mamba3": 20, "attention": 4, "mlp": 24}),
    "jamba": (
        "4*(2*(mamba2 mlp mamba2 moe) attention mlp mamba2 moe mamba2 mlp mamba2 moe)",
        {"mamba2": 28, "attention": 4, "mlp": 16, "moe": 16},
    ),
    "nemotron-h-8b": (
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        {"mamba2": 24, "attention": 4, "mlp": 24},
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_published_patterns(name: str) -> None:
    pattern, counts = PATTERNS[name]
    blocks = expand_pattern(pattern)
    assert {kind: blocks.count(kind) for kind in set(blocks)} == counts
    if name == "mamba2attn":
        assert [i for i, b in enumerate(blocks) if b == "attention"] == [9, 18, 27, 36, 45, 56]


# Small models of the same shape, one group of each.
SMALL = {
    "mamba2-attention": "2*mamba2 attention mamba2",
    "mamba2-mlp-attention": "mamba2 mlp attention mlp",
    "samba": "mamba1 mlp sliding_attention mlp",
    "mamba3": "2*(mamba3 mlp) attention mlp",
    "jamba-mamba2": "mamba2 moe attention mlp",
    "nemotron-h": ["mamba2", {"type": "mlp", "gated": False, "activation": "relu2"}, "attention",
                   {"type": "moe", "gated": False, "activation": "relu2", "kind": "sigmoid",
                    "correction_bias": True, "wide_router": True, "shared_size": 16}],
    "zamba2": ["mamba2", {"type": "attention", "shared": "a"}, {"type": "mlp", "shared": "m"},
               "mamba2", {"type": "attention", "shared": "a"}, {"type": "mlp", "shared": "m"}],
    "options": [{"type": "mamba2", "d_ssm": 32, "norm_before_gate": True, "D_per_channel": True},
                {"type": "mamba2", "norm": False, "time_step_limit": [0.01, 0.1]},
                {"type": "mamba1", "inner_norms": True},
                {"type": "attention", "conv_kernel": 4, "rotary_dim": 4, "use_bias": True}],
    "only attention": "2*(attention mlp)",
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_every_pattern_continues_packs_pads_and_reloads(name: str, tmp_path: Path) -> None:
    model, batch = build(SMALL[name]), ids()
    whole = model(batch).logits
    assert whole.abs().max() > 1
    cache = RecurrentCache(model.config)
    parts = [model(p, past_key_values=cache).logits for p in batch.split([5, 1, 6, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=0)

    seq_idx = torch.tensor([[0] * 4 + [1] * 9, [0] * 12 + [1]])
    packed = model(batch, seq_idx=seq_idx).logits
    for row, cut in enumerate((4, 12)):
        for span in (slice(0, cut), slice(cut, 13)):
            alone = model(batch[row : row + 1, span]).logits[0]
            torch.testing.assert_close(packed[row, span], alone, atol=2e-5, rtol=0)

    mask = torch.ones_like(batch)
    mask[0, :3], mask[1, 2:9] = 0, 0
    padded = model(batch, attention_mask=mask).logits
    for row in range(2):
        real = mask[row].bool()
        alone = model(batch[row : row + 1, real]).logits[0]
        torch.testing.assert_close(padded[row, real], alone, atol=2e-5, rtol=0)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is HybridForCausalLM
    assert torch.equal(loaded(batch).logits, whole)
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    tokens = model.generate(batch, max_new_tokens=6, do_sample=False)
    expected = model.generate(batch, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(tokens, expected)


def test_a_pattern_equals_jamba() -> None:
    """The same weights in Jamba's wiring, and in blocks of one sublayer each."""
    jamba = randomize_(JambaForCausalLM(tiny("jamba", num_experts=1))).eval()
    c = jamba.config
    dense = {"type": "mlp", "intermediate_size": 128}
    hybrid = build(
        ["mamba1", dense, "attention", dense, "mamba1", dense],
        options={"mamba1": {"state_size": c.mamba_d_state, "time_step_rank": c.mamba_dt_rank,
                            "inner_norms": True}},
        layer_norm_epsilon=c.rms_norm_eps, tie_word_embeddings=False,
    )  # fmt: skip
    theirs, ours = jamba.model, hybrid.backbone
    state = {"embeddings.weight": theirs.embed_tokens.weight}
    state["norm_f.weight"] = theirs.final_layernorm.weight
    for i, layer in enumerate(theirs.layers):
        state[f"layers.{2 * i}.norm.weight"] = layer.input_layernorm.weight
        state[f"layers.{2 * i + 1}.norm.weight"] = layer.pre_ff_layernorm.weight
        if layer.is_attention:
            a = layer.self_attn
            qkv = [a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]
            state[f"layers.{2 * i}.mixer.in_proj.weight"] = torch.cat(qkv)
            state[f"layers.{2 * i}.mixer.out_proj.weight"] = a.o_proj.weight
        else:
            own = layer.mamba.state_dict()
            state |= {f"layers.{2 * i}.mixer.{name}": value for name, value in own.items()}
        f = layer.feed_forward
        wide = [F.pad(p.weight, (0, 0, 0, 80)) for p in (f.up_proj, f.gate_proj)]
        state[f"layers.{2 * i + 1}.mixer.fc1.weight"] = torch.cat(wide)
        state[f"layers.{2 * i + 1}.mixer.fc2.weight"] = F.pad(f.down_proj.weight, (0, 80))
    ours.load_state_dict(state)
    hybrid.lm_head.load_state_dict(jamba.lm_head.state_dict())
    batch = ids()
    # The order of sums differs.
    torch.testing.assert_close(hybrid(batch).logits, jamba(batch).logits, atol=2e-5, rtol=0)


def test_shared_blocks_have_one_set_of_weights_and_states_of_their_own() -> None:
    model = build(SMALL["zamba2"])
    separate = build("2*(mamba2 attention mlp)")
    mixer = sum(p.numel() for i in (4, 5) for p in separate.backbone.layers[i].mixer.parameters())
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, separate)]
    assert counts[1] - counts[0] == mixer
    # The same numbers, used twice: gradients add up.
    state = model.state_dict()
    twice = {**state, **{f"backbone.layers.{i + 3}.{n}": state[f"backbone.layers.{i}.{n}"]
                         for i in (1, 2) for n in separate.backbone.layers[i].state_dict()
                         if n != "norm.weight"}}  # fmt: skip
    separate.load_state_dict(twice)
    batch = ids()
    for m in (model, separate):
        m.zero_grad()
        m(batch, labels=batch).loss.backward()
    got, parts = (dict(m.named_parameters()) for m in (model, separate))
    for name in ("1.mixer.in_proj.weight", "2.mixer.fc2.weight"):
        expected = sum(parts[f"backbone.layers.{int(name[0]) + i}{name[1:]}"].grad for i in (0, 3))
        assert relative_error(got[f"backbone.layers.{name}"].grad, expected) < 1e-5
    assert model.flops_per_token(64) == separate.flops_per_token(64)
    cache = model(batch, use_cache=True).past_key_values
    keys = [cache.layers[i].state["keys"] for i in (1, 4)]
    assert not torch.equal(*keys)


def test_router_losses_weigh_in() -> None:
    model, batch = build("mamba2 moe attention moe", router_z_loss_coef=0.01), ids()
    plain = model(batch, labels=batch)
    out = model(batch, labels=batch, output_router_logits=True)
    assert plain.z_loss is None
    expected = plain.loss + 0.001 * out.aux_loss + 0.01 * out.z_loss
    torch.testing.assert_close(out.loss, expected)
    # A third of an accumulated batch's 72 targets weighs a third in these losses too.
    part = model(batch, labels=batch, output_router_logits=True, num_items_in_batch=72)
    torch.testing.assert_close(part.loss, out.loss / 3)


@torch.no_grad()
def test_a_turn_of_pads_alone_moves_no_position() -> None:
    """With positions given by the caller, as `generate` gives them."""
    model, batch = (
        build("attention", options={"attention": {"num_heads": 4, "rotary_dim": 8}}),
        ids(),
    )
    cache = model(batch[:, :5], use_cache=True).past_key_values
    mask = torch.tensor([[0, 0], [1, 1]])
    positions = torch.tensor([[4, 4], [5, 6]])
    model(batch[:, 5:7], attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits = model(batch[:, 7:9], past_key_values=cache).logits
    for row, text in ((0, torch.cat([batch[:1, :5], batch[:1, 7:9]], dim=1)), (1, batch[1:, :9])):
        # fp32 rounding
        assert relative_error(logits[row], model(text).logits[0, -2:]) < 1e-5


def test_parameter_groups_spare_norms_biases_and_decays() -> None:
    model = build([*SMALL["options"], *SMALL["nemotron-h"]])
    decayed, spared = (set(group["names"]) for group in model.parameter_groups(0.1))
    names = {name for name, _ in model.named_parameters()}
    assert decayed | spared == names
    assert not decayed & spared
    ends = ("bias", "norm.weight", "norm_f.weight", "A_log", ".D", "dt_bias")
    assert spared == {name for name in names if name.endswith(ends)}


def test_bf16_keeps_in_fp32_what_the_mixers_own_models_keep(tmp_path: Path) -> None:
    streams = {"type": "mamba3", "mimo_rank": 2}
    experts = {"type": "moe", "kind": "sigmoid", "correction_bias": True}
    build([streams, experts, "mamba2"]).save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {n for n, t in loaded.state_dict().items() if t.dtype == torch.float32}
    names = ("D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")
    expected = {f"backbone.layers.0.mixer.{name}" for name in names}
    expected |= {f"backbone.layers.2.mixer.{name}" for name in ("A_log", "D", "dt_bias")}
    assert wide == expected | {"backbone.layers.1.mixer.router.e_score_correction_bias"}
    ids = torch.randint(3, 96, (2, 7))
    assert loaded(ids).logits.isfinite().all()
    assert loaded.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (2, 10)


def test_flops_per_token_equal_a_count_by_hand() -> None:
    head = 2 * 32 * 96
    # q, k, v and out: 4 heads of 8, 2 of keys and values; then 4 operations for each number of the
    # keys seen: (64 + 1) / 2 on the mean, or 5 but for the first four tokens.
    attention = 2 * 32 * (32 + 2 * 16 + 32) + 4 * 32 * (64 + 1) // 2
    assert build("attention").flops_per_token(64) == attention + head
    seen = 64 * 5 - (4 + 3 + 2 + 1)
    sliding = 2 * 32 * 4 * 32 + 4 * 32 * seen // 64
    assert build("sliding_attention").flops_per_token(64) == sliding + head
    # A gated MLP of 128; the router and two experts of 24 with a gate.
    rest = 2 * 3 * 32 * 128 + 2 * (4 * 32 + 2 * 3 * 24 * 32)
    mlp = {"type": "mlp", "intermediate_size": 100}
    assert build(["attention", mlp, "moe"]).flops_per_token(64) == attention + rest + head
    # Shared experts of 40 with a gate count once.
    shared = build(["attention", mlp, {"type": "moe", "shared_size": 40}])
    assert shared.flops_per_token(64) == attention + rest + 2 * 3 * 32 * 40 + head


BAD: list[tuple[dict[str, Any], str]] = [
    ({"blocks": []}, "blocks must list at least one block"),
    ({"blocks": "2*mlp moe"}, "no token would see another one"),
    ({"blocks": ["mamba4"]}, "unknown kind of block 'mamba4'.*did you mean 'mamba"),
    ({"blocks": [{"num_heads": 4}]}, "unknown kind of block None"),
    ({"blocks": [3]}, "unknown kind of block 3"),
    ({"blocks": [{"type": "attention", "heads": 4}]},
     r"blocks\[0\]: attention has no option 'heads'"),
    ({"options": {"mamba": {}}}, "unknown kind of block 'mamba'"),
    ({"options": {"mamba2": {"statesize": 4}}}, "no option 'statesize'; did you mean 'state_size'"),
    ({"options": {"mamba2": 4}}, "must hold options by name, got 4"),
    ({"blocks": [{"type": "sliding_attention", "window": 0}]},
     r"blocks\[0\], sliding_attention: window must be at least 1 token"),
    ({"blocks": [{"type": "sliding_attention", "window": None}]},
     r"blocks\[0\]: window must be a whole number, got None"),
    ({"blocks": [["mamba2"]]}, r"unknown kind of block \['mamba2'\]"),
    ({"options": {"mamba2": {"expand": 1.5}}}, r"\['mamba2'\]: expand must be a whole number"),
    ({"options": {"mamba2": {"state_size": "16"}}}, "state_size must be a whole number, got '16'"),
    ({"options": {"mamba2": {"use_bias": "no"}}}, "use_bias must be true or false, got 'no'"),
    ({"options": {"mamba2": {"time_step_limit": [0.1]}}}, r"must be two numbers, got \[0.1\]"),
    ({"options": {"attention": {"num_heads": True}}}, "num_heads must be a whole number, got True"),
    ({"options": {"attention": {"scaling": float("nan")}}}, "scaling must be a finite number"),
    ({"options": {"moe": {"kind": None}}}, "kind must be a word, got None"),
    ({"blocks": [{"type": "attention", "num_heads": 7}]}, "num_heads=7 does not divide hidden"),
    ({"blocks": [{"type": "attention", "num_heads": 0}]}, "num_heads must be at least 1, got 0"),
    ({"blocks": [{"type": "attention", "rope_theta": 0}]}, "rope_theta must be greater than 0"),
    ({"blocks": [{"type": "attention", "scaling": 0.0}]}, "scaling must be greater than 0"),
    ({"blocks": [{"type": "attention", "num_kv_heads": 5}]}, "num_kv_heads must divide num_heads"),
    ({"blocks": [{"type": "attention", "rotary_dim": 7}]}, "rotary_dim must be even"),
    ({"blocks": [{"type": "attention", "conv_kernel": 1}]}, "conv_kernel must be 0"),
    ({"blocks": [{"type": "attention", "dropout": 1.0}]}, r"dropout must lie in \[0, 1\)"),
    ({"blocks": [{"type": "mamba2", "d_ssm": 4096}]}, "d_ssm=4096 must not exceed .* = 1536"),
    ({"blocks": [{"type": "mamba2", "head_dim": 7}]}, "head_dim=7 must divide d_ssm = 1536"),
    ({"blocks": [{"type": "mamba2", "n_groups": 7}]}, "n_groups=7 must divide the number of heads"),
    ({"blocks": [{"type": "mamba2", "time_step_limit": [1.0, 0.5]}]}, "time_step_limit must be"),
    ({"blocks": [{"type": "mamba2", "norm": False, "norm_before_gate": True}]}, "needs norm=True"),
    ({"blocks": [{"type": "mamba1", "state_size": 0}]}, "state_size must be at least 1"),
    ({"blocks": [{"type": "mamba3", "rope_fraction": 0.3}]}, "rope_fraction must be 0 or 0.5 or 1"),
    ({"blocks": [{"type": "mamba3", "A_floor": -1.0}]}, "A_floor must be 0 or more"),
    ({"blocks": [{"type": "mamba3", "A_floor": float("nan")}]}, "A_floor must be a finite number"),
    ({"blocks": [{"type": "mamba3", "state_size": 5, "rope_layout": "half"}]}, "an even state"),
    ({"blocks": [{"type": "mamba3", "n_groups": 7}]}, "n_groups=7 does not divide num_heads=24"),
    ({"blocks": ["mamba2", {"type": "moe", "top_k": 17}]}, "number of experts, 16, got 17"),
    ({"blocks": ["mamba2", {"type": "moe", "shared_gate": True}]}, "needs shared_size"),
    ({"blocks": ["mamba2", {"type": "mlp", "activation": "relu2"}]}, "'silu' with gated=True"),
    ({"blocks": ["mamba2", {"type": "mlp", "intermediate_size": 0}]}, "intermediate_size must be"),
    ({"blocks": [{"type": "attention", "shared": "a"}, {"type": "mamba2", "shared": "a"}]},
     r"blocks\[1\] shares weights with blocks\[0\], but is another"),
    ({"blocks": ["mamba2", "moe", {"type": "moe", "num_experts": 4}], "output_router_logits": True},
     "same number of them"),
    ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be 0 or more"),
    ({"num_layers": 4}, "unknown argument num_layers=4"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        HybridConfig(**changes)


CONFIGS = [f for family in ("hybrid", "jamba") for f in ROOT.glob(f"configs/model/{family}-*.json")]
# Published; or, as the names say, by our own measure.
COUNTS = {
    "hybrid-mamba2attn-2.7b": 2_697_590_880,
    "hybrid-nemotron-h-8b": 8_100_852_736,
    "jamba-v0.1": 51_570_323_328,
    "jamba-1.5-large": 398_555_145_696,
}


@pytest.mark.parametrize("file", sorted(CONFIGS), ids=lambda f: f.stem)
def test_shipped_configs_build_and_are_written_in_full(file: Path, tmp_path: Path) -> None:
    model_type = json.loads(file.read_text())["model_type"]
    ours = {"ssm_hybrid": HybridForCausalLM, "jamba": JambaForCausalLM}[model_type]
    config = ours.config_class.from_pretrained(file)
    with torch.device("meta"):
        model = ours(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == COUNTS.get(file.stem, count)
    if "130m" in file.stem:
        assert count == pytest.approx(130e6, rel=0.1)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == json.loads(file.read_text()) | {
        "transformers_version": transformers.__version__
    }


# state-spaces/mamba2attn in small: 4 layers, attention at 1 and 3.
MAMBA2ATTN: dict[str, Any] = {
    "d_model": 32, "d_intermediate": 0, "n_layer": 4, "vocab_size": 90,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16},
    "attn_layer_idx": [1, 3],
    "attn_cfg": {"causal": True, "d_conv": 4, "head_dim": 8, "num_heads": 3, "out_proj_bias": False,
                 "qkv_proj_bias": False, "rotary_emb_dim": 4},
    "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip


def mamba2attn_weights(mlp: int = 0) -> dict[str, Tensor]:
    """Random weights under mamba_ssm's names and in its shapes."""
    mamba2 = {"in_proj.weight": (2 * 64 + 32 + 8, 32), "conv1d.weight": (96, 1, 4),
              "conv1d.bias": (96,), "dt_bias": (8,), "A_log": (8,), "D": (8,),
              "norm.weight": (64,), "out_proj.weight": (32, 64)}  # fmt: skip
    attention = {"in_proj.weight": (72, 32), "conv1d.weight": (72, 1, 4), "conv1d.bias": (72,),
                 "out_proj.weight": (32, 24)}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (96, 32)}
    for i in range(4):
        at = f"backbone.layers.{i}."
        shapes[at + "norm.weight"] = (32,)
        mixer = attention if i in (1, 3) else mamba2
        shapes |= {f"{at}mixer.{name}": shape for name, shape in mixer.items()}
        if mlp:
            shapes |= {at + "norm2.weight": (32,), at + "mlp.fc1.weight": (2 * mlp, 32)}
            shapes[at + "mlp.fc2.weight"] = (32, mlp)
    shapes["backbone.norm_f.weight"] = (32,)
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    weights["backbone.layers.1.mixer.rotary_emb.inv_freq"] = torch.ones(2)
    return {**weights, "lm_head.weight": weights["backbone.embedding.weight"].clone()}


def attention_by_hand(w: dict[str, Tensor], u: Tensor) -> Tensor:
    """mamba_ssm's attention layer on one row (T, D): convolution, rotation, softmax, in loops."""
    raw = u @ w["in_proj.weight"].T
    taps = w["conv1d.weight"][:, 0]
    qkv = torch.stack([
        w["conv1d.bias"] + sum(taps[:, 3 - k] * raw[t - k] for k in range(4) if t >= k)
        for t in range(len(u))
    ])  # fmt: skip
    q, k, v = (part.view(len(u), 3, 8) for part in qkv.split(24, dim=1))

    def turn(x: Tensor, position: int) -> Tensor:
        number = torch.complex(x[:, :2], x[:, 2:4])
        rate = 10000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)
        number = number * torch.polar(torch.ones(2, dtype=torch.float64), position * rate)
        return torch.cat([number.real, number.imag, x[:, 4:]], dim=1)

    q, k = (torch.stack([turn(x[t], t) for t in range(len(u))]) for x in (q, k))
    out = torch.zeros_like(q)
    for t in range(len(u)):
        for h in range(3):
            weights = (k[: t + 1, h] @ q[t, h] / math.sqrt(8)).softmax(0)
            out[t, h] = weights @ v[: t + 1, h]
    return out.flatten(1) @ w["out_proj.weight"].T


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="earlier torch paths assign Mamba-2's groups to other heads",
)
@torch.no_grad()
@pytest.mark.parametrize("mlp", [0, 128])
def test_mamba2attn_equals_its_layers_one_by_one(mlp: int) -> None:
    source = {**MAMBA2ATTN, "d_intermediate": mlp}
    weights = {name: w.double() for name, w in mamba2attn_weights(mlp).items()}
    config = convert_config(source)
    model = HybridForCausalLM(config).double().eval()
    ours = convert_state_dict(weights, config)
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[f"backbone.{name}"]

    native = transformers.Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=16, n_groups=1, vocab_size=96,
        num_hidden_layers=1, chunk_size=256, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    batch = ids(1, 11).clamp(max=89)
    x = weights["backbone.embedding.weight"][batch[0]]
    for i in range(4):
        prefix = f"backbone.layers.{i}.mixer."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        u = norm(x, f"layers.{i}.norm.weight")
        if i in (1, 3):
            x = x + attention_by_hand(own, u)
        else:
            mixer: nn.Module = transformers.Mamba2Model(native).layers[0].mixer.double()
            mixer.load_state_dict(own)
            x = x + mixer(u[None])[0]
        if mlp:
            u = norm(x, f"layers.{i}.norm2.weight")
            value, gate = (u @ weights[f"backbone.layers.{i}.mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (value * F.silu(gate)) @ weights[f"backbone.layers.{i}.mlp.fc2.weight"].T
    expected = norm(x, "norm_f.weight") @ weights["lm_head.weight"].T
    # transformers' Mamba-2 casts its scan to fp32.
    assert relative_error(model(batch).logits[0], expected) < 1e-5
    # Upstream keeps convolved inputs and decodes something else; the whole pass is the measure.
    cache = RecurrentCache(config)
    parts = [model(p, past_key_values=cache).logits for p in batch.split([6, 1, 3, 1], dim=1)]
    assert relative_error(torch.cat(parts, dim=1), model(batch).logits) < 1e-10


def test_mamba2attn_checkpoint_is_converted(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/config.json").write_text(json.dumps(MAMBA2ATTN))
    weights = mamba2attn_weights()
    torch.save(weights, tmp_path / "src/pytorch_model.bin")
    convert(tmp_path / "src", tmp_path / "dst")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert type(model) is HybridForCausalLM
    assert not any(info.values())
    for name, value in model.state_dict().items():
        their = name.replace("embeddings", "embedding")
        assert torch.equal(value, weights[their]), name
    assert model.config.blocks == ["mamba2", "attention"] * 2


def test_released_mamba2attn_has_the_published_size() -> None:
    released = {
        **MAMBA2ATTN, "d_model": 2560, "n_layer": 64, "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [9, 18, 27, 36, 45, 56],
        "attn_cfg": {"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30,
                     "out_proj_bias": False, "qkv_proj_bias": False, "rotary_emb_dim": 64},
    }  # fmt: skip
    config = convert_config(released)
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 2_697_590_880
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    at = "backbone.layers.9.mixer."
    assert shapes[at + "in_proj.weight"] == (11520, 2560)
    assert shapes[at + "conv1d.weight"] == (11520, 1, 4)
    assert shapes[at + "out_proj.weight"] == (2560, 3840)
    assert shapes["backbone.layers.8.mixer.in_proj.weight"] == (10576, 2560)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_idx": [1, 4]}, r"attn_layer_idx must name layers from 0 to 3 .*\[1, 4\]"),
        ({"attn_layer_idx": [1, 1]}, "attn_layer_idx must name layers from 0 to 3 once each"),
        ({"attn_cfg": {"causal": True}}, "attn_cfg must say num_heads"),
        ({"attn_cfg": {"num_heads": 4}}, "must have causal=true"),
        ({"attn_cfg": {"causal": True, "num_heads": 4, "mlp_dim": 8}}, "mlp_dim=8 in attn_cfg"),
        (
            {"attn_cfg": {"causal": True, "num_heads": 4, "rotary_emb_interleaved": True}},
            "rotary_emb_interleaved=True in attn_cfg",
        ),
        (
            {"attn_cfg": {"causal": True, "num_heads": 4, "num_heads_kv": 3}},
            "must divide num_heads",
        ),
        ({"rms_norm": False}, "rms_norm=False.*cannot express"),
    ],
)
def test_what_cannot_be_converted_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_config({**MAMBA2ATTN, **changes})


def test_the_way_back_to_mamba_ssm_is_refused(tmp_path: Path) -> None:
    build("mamba2 attention").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="the way back to mamba_ssm is not made for 'ssm_hybrid'"):
        convert_back(tmp_path / "ours", tmp_path / "theirs")


def test_options_that_mamba2s_format_refuses_make_a_hybrid() -> None:
    plain = {**MAMBA2ATTN, "attn_layer_idx": [], "attn_cfg": {}}
    assert convert_config(plain).model_type == "mamba2"
    for key, value, name in (
        ("d_ssm", 32, "d_ssm"),
        ("D_has_hdim", True, "D_per_channel"),
        ("norm_before_gate", True, "norm_before_gate"),
        ("rmsnorm", False, "norm"),
    ):
        config = convert_config({**plain, "ssm_cfg": {**plain["ssm_cfg"], key: value}})
        assert config.model_type == "ssm_hybrid"
        assert config.block_options(0)[1][name] == value
    mamba1 = {**plain, "ssm_cfg": {}, "d_intermediate": 100}
    config = convert_config(mamba1)
    assert config.blocks == ["mamba1", "mlp"] * 4
    assert config.block_options(0)[1]["time_step_rank"] == 2
