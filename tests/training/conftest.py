"""A tiny recipe that trains in seconds, and isolation from the state Accelerate and Auto keep."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState

import ssm_hf
from tests.helpers import auto_classes_restored


@pytest.fixture(autouse=True)
def fresh_process_state():
    """Accelerate keeps state per process; `register(override=True)` changes the Auto classes."""
    with auto_classes_restored():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def texts(tmp_path):
    """Twelve short documents."""
    records = [{"text": f"document {i}: " + "abcdefgh " * (3 + i)} for i in range(12)]
    return write_jsonl(tmp_path / "texts.jsonl", records)


@pytest.fixture
def model_config(request, tmp_path):
    """A Mamba-2 or, by an indirect parameter, a Mamba-3 ("mamba3"), a hybrid ("ssm_hybrid"), a
    Jamba ("jamba") or a Taipan ("taipan")."""
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 264,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    kind = getattr(request, "param", "mamba2")
    if kind == "ssm_hybrid":
        of_mamba2 = {name: common.pop(name) for name in ("head_dim", "state_size", "chunk_size")}
        del common["num_hidden_layers"], common["n_groups"]
        config = ssm_hf.HybridConfig(
            **common,
            blocks="mamba2 attention moe sliding_attention",
            options={"mamba2": of_mamba2, "attention": {"num_heads": 4, "rotary_dim": 4},
                     "sliding_attention": {"num_heads": 4, "window": 9},
                     "moe": {"num_experts": 4, "intermediate_size": 32}},
            output_router_logits=True,
            # A loss of the experts' loads is not the same over parts of a batch.
            router_aux_loss_coef=1e-4,
        )  # fmt: skip
    elif kind == "jamba":
        for name in ("head_dim", "state_size", "n_groups", "chunk_size"):
            del common[name]
        config = ssm_hf.JambaConfig(
            **common, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
            attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0,
            num_experts=4, num_experts_per_tok=2, mamba_dt_rank=4, output_router_logits=True,
        )  # fmt: skip
    elif kind == "taipan":
        for name in ("head_dim", "state_size", "n_groups", "chunk_size", "num_hidden_layers"):
            del common[name]
        config = ssm_hf.TaipanConfig(
            **common, intermediate_size=64, num_mamba_layers=2, sal_period=1, mamba_d_head=16,
            mamba_d_state=16, mamba_chunk_size=16, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, sliding_window=9, gate_estimator="sparse", gate_dense_until=0.4,
        )  # fmt: skip
    elif kind == "mamba3":
        config = ssm_hf.Mamba3Config(**common, intermediate_size=64, mimo_rank=2)
    else:
        config = ssm_hf.Mamba2Config(**common, num_heads=4)
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model" / "config.json"


@pytest.fixture
def recipe(tmp_path, texts, model_config):
    """The path of a recipe that trains a tiny model on `texts`."""
    content = {
        "run_dir": str(tmp_path / "run"),
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_steps": 6,
        "log_every": 1,
        "eval_every": 3,
        "save_every": 3,
        "tracker": None,
        "model": {"config": str(model_config)},
        "tokenizer": {"source": "byte"},
        "data": {"files": [str(texts)], "seq_len": 32, "heldout_fraction": 0.1},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
