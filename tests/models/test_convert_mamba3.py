"""Mamba-3 in mamba_ssm's and flash-linear-attention's formats, by files written here, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssm_hf import Mamba2ForCausalLM, Mamba3Config, Mamba3ForCausalLM, MambaForCausalLM
from ssm_hf.convert import convert, convert_back, convert_config, main
from tests.helpers import randomize_, tiny
from tests.models.test_convert import write

# Width 32, so E = 64; heads of 16: H = 4; N = 8; V = 90 padded to 96.
OFFICIAL: dict[str, Any] = {
    "d_model": 32,
    "d_intermediate": 100,
    "n_layer": 2,
    "vocab_size": 90,
    "ssm_cfg": {"layer": "Mamba3", "d_state": 8, "headdim": 16, "chunk_size": 64,
                "A_activation": "heavy_tail"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}  # fmt: skip
MIMO = {**OFFICIAL["ssm_cfg"], "is_mimo": True, "mimo_rank": 3, "ngroups": 2, "chunk_size": 16,
        "rope_fraction": 1.0, "is_outproj_norm": True, "A_floor": 1e-3}  # fmt: skip
FLA: dict[str, Any] = {
    "architectures": ["Mamba3ForCausalLM"],
    "model_type": "mamba3",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "head_dim": 16,
    "num_heads": 4,
    "norm_eps": 1e-5,
    "is_mimo": False,
    "is_outproj_norm": False,
    "dt_min": 0.002,
    "fuse_norm": True,
    "fuse_cross_entropy": True,
    "use_l2warp": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "transformers_version": "5.9.0",
}


def mixer_shapes(rank: int, groups: int, angles: int, norm: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (2 * 64 + 2 * 8 * groups * rank + 3 * 4 + angles, 32),
        "dt_bias": (4,),
        "B_bias": (4, rank, 8),
        "C_bias": (4, rank, 8),
        "B_norm.weight": (8,),
        "C_norm.weight": (8,),
        "D": (4,),
        "out_proj.weight": (32, 64),
    }
    if rank > 1:
        shapes |= dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (4, rank, 16))
    if norm:
        shapes["norm.weight"] = (64,)
    return shapes


def official_weights(mixer: dict[str, tuple[int, ...]], mlp: bool = True) -> dict[str, Tensor]:
    """bf16, as released; the head is stored even though it is tied."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (96, 32)}
    for i in range(2):
        layer = f"backbone.layers.{i}."
        shapes |= {f"{layer}mixer.{name}": shape for name, shape in mixer.items()}
        shapes[f"{layer}norm.weight"] = (32,)
        if mlp:  # 100 rounded up to 128, value and gate
            shapes[f"{layer}norm2.weight"] = (32,)
            shapes[f"{layer}mlp.fc1.weight"] = (256, 32)
            shapes[f"{layer}mlp.fc2.weight"] = (32, 128)
    shapes["backbone.norm_f.weight"] = (32,)
    weights = {name: (0.3 * torch.randn(shape)).bfloat16() for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    return weights


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "siso": ({}, mixer_shapes(1, 1, 2, False), True),
    "siso without MLP": ({"d_intermediate": 0}, mixer_shapes(1, 1, 2, False), False),
    "mimo": ({"ssm_cfg": MIMO}, mixer_shapes(3, 2, 4, True), True),
}


@pytest.mark.parametrize("case", CASES)
def test_official_checkpoint_goes_there_and_back_bit_by_bit(case: str, tmp_path: Path) -> None:
    changes, mixer, mlp = CASES[case]
    config, weights = {**OFFICIAL, **changes}, official_weights(mixer, mlp)
    convert(write(tmp_path / "src", config, weights), tmp_path / "dst")
    ours = {name.replace("embeddings", "embedding"): t
            for name, t in load_file(tmp_path / "dst/model.safetensors").items()}  # fmt: skip
    assert_same(ours, {name: t for name, t in weights.items() if name != "lm_head.weight"})
    model, info = Mamba3ForCausalLM.from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()

    main([str(tmp_path / "dst"), str(tmp_path / "back"), "--back"])
    assert_same(torch.load(tmp_path / "back/pytorch_model.bin", weights_only=True), weights)
    again = json.loads((tmp_path / "back/config.json").read_text())
    assert convert_config(again).to_dict() == convert_config(config).to_dict()


def test_options_are_translated() -> None:
    siso = convert_config(OFFICIAL)
    expected: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 100,
        "state_size": 8, "head_dim": 16, "num_heads": 4, "n_groups": 1, "mimo_rank": 1,
        "rope_fraction": 0.5, "num_angles": 2, "rope_layout": "pairwise", "output_norm": False,
        "A_floor": 1e-4, "A_activation": "heavy_tail", "tie_word_embeddings": True,
        "initialization": "mamba_ssm", "bos_token_id": 0,
    }  # fmt: skip
    assert {name: getattr(siso, name) for name in expected} == expected
    mimo = convert_config({**OFFICIAL, "ssm_cfg": MIMO})
    expected = {
        "mimo_rank": 3,
        "n_groups": 2,
        "rope_layout": "half",
        "num_angles": 4,
        "rope_fraction": 1.0,
        "output_norm": True,
        "A_floor": 1e-3,
        "chunk_size": 16,
    }
    assert {name: getattr(mimo, name) for name in expected} == expected
    # The rank of a file with one stream is of no use, and Llama's tokens are known by their number.
    released = {
        "d_model": 768,
        "d_intermediate": 1500,
        "n_layer": 12,
        "vocab_size": 128256,
        "ssm_cfg": {"layer": "Mamba3", "mimo_rank": 4, "A_activation": "softplus"},
    }
    config = convert_config(released)
    assert (config.bos_token_id, config.eos_token_id) == (128000, 128001)
    with torch.device("meta"):
        assert Mamba3ForCausalLM(config).num_parameters() == 186_849_600


def _unstated() -> dict[str, Any]:
    options = {k: v for k, v in OFFICIAL["ssm_cfg"].items() if k != "A_activation"}
    return {**OFFICIAL, "ssm_cfg": options}


def test_unstated_activation_is_assumed_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "src", _unstated(), official_weights(mixer_shapes(1, 1, 2, False)))
    main([str(source), str(tmp_path / "assumed")])
    (record,) = caplog.records
    text = record.getMessage()
    for part in (str(source), "does not state", "'heavy_tail'", "--A_activation softplus"):
        assert part in text
    caplog.clear()
    main([str(source), str(tmp_path / "told"), "--A_activation", "softplus"])
    for folder, activation in (("assumed", "heavy_tail"), ("told", "softplus")):
        assert Mamba3Config.from_pretrained(tmp_path / folder).A_activation == activation
    # Stated: nothing is assumed, and what the caller says stands above the file.
    assert convert_config(OFFICIAL).A_activation == "heavy_tail"  # pyright: ignore
    assert convert_config(OFFICIAL, A_activation="softplus").A_activation == "softplus"  # pyright: ignore
    assert not caplog.records


@pytest.mark.parametrize("left_out", [(), ("hidden_size",)])
def test_config_of_ours_without_an_activation_is_read_with_one_warning(
    left_out: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = tiny("mamba3").to_dict()
    for name in ("A_activation", *left_out):
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert Mamba3Config.from_pretrained(tmp_path).A_activation == "heavy_tail"
    (record,) = caplog.records
    assert "'heavy_tail' is assumed" in record.getMessage()
    assert '"A_activation": "softplus"' in record.getMessage()
    caplog.clear()
    told = Mamba3Config.from_pretrained(tmp_path, A_activation="softplus")
    assert told.A_activation == "softplus"
    assert not caplog.records


@pytest.mark.parametrize("mimo", [False, True], ids=["siso", "mimo"])
def test_checkpoint_of_flash_linear_attention_is_converted(
    mimo: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rank = 4 if mimo else 1
    weights = official_weights(mixer_shapes(rank, 1, 2, False), mlp=False)
    weights["lm_head.weight"] = torch.randn(96, 32).bfloat16()
    weights["backbone.embeddings.weight"] = weights.pop("backbone.embedding.weight")
    source = write(tmp_path / "src", {**FLA, "is_mimo": mimo}, weights, "safetensors")
    with pytest.raises(ValueError, match=r"flash-linear-attention's format.*ssm_hf\.convert"):
        Mamba3ForCausalLM.from_pretrained(source)
    convert(source, tmp_path / "dst")
    assert_same(load_file(tmp_path / "dst/model.safetensors"), weights)
    model, info = Mamba3ForCausalLM.from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert not any(info.values())
    expected = {
        "A_activation": "softplus",
        "intermediate_size": 0,
        "mimo_rank": rank,
        "rope_layout": "half" if mimo else "pairwise",
        "time_step_min": 0.002,
        "layer_norm_epsilon": 1e-5,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert not caplog.records


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**OFFICIAL, "attn_layer_idx": [1]}, "attn_cfg must say num_heads"),
    ({**OFFICIAL, "rms_norm": False}, "rms_norm=False.*cannot express"),
    ({**OFFICIAL, "ssm_cfg": {**MIMO, "mimo_rank": 1}}, "is_mimo with mimo_rank=1.*cannot express"),
    ({**OFFICIAL, "ssm_cfg": {**MIMO, "mimo_rank": 0}}, "mimo_rank must be at least 1, got 0"),
    ({**OFFICIAL, "ssm_cfg": {**MIMO, "d_conv": 4}}, "unknown option d_conv=4 of Mamba3"),
    ({**OFFICIAL, "ssm_cfg": {**MIMO, "headdim": 48}}, "headdim=48 does not divide.*64"),
    ({**OFFICIAL, "ssm_cfg": {**MIMO, "ngroups": 3}}, "n_groups=3"),
    ({**OFFICIAL, "ssm_cfg": {**MIMO, "A_activation": "relu"}}, "A_activation.*'relu'"),
    ({**FLA, "expend": 2}, "unknown option expend=2"),
    ({**FLA, "rope_fraction": 0.3}, r"rope_fraction.*0\.3"),
    ({**OFFICIAL, "attn_layer_idx": 1}, "attn_layer_idx must be a list, got 1"),
    ({**OFFICIAL, "attn_layer_idx": [1], "attn_cfg": None}, "attn_cfg must be an object, got None"),
    (tiny("mamba3").to_dict(), "in our 'mamba3' format already"),
    (tiny("ssm_hybrid").to_dict(), "in our 'ssm_hybrid' format already"),
    (tiny("taipan").to_dict(), "in our 'taipan' format already"),
    (tiny("jamba").to_dict(), "in transformers' 'jamba' format already"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_cannot_be_converted_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        convert_config(config, "there/config.json")
    assert "there/config.json" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"), [(MambaForCausalLM, "mamba"), (Mamba2ForCausalLM, "mamba2")]
)
def test_the_older_models_go_back_too(kind: Any, name: str, tmp_path: Path) -> None:
    model = randomize_(kind(tiny(name)))
    model.save_pretrained(tmp_path / "ours")
    convert_back(tmp_path / "ours", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "again")
    assert_same(*(load_file(tmp_path / f / "model.safetensors") for f in ("again", "ours")))


@pytest.mark.parametrize(
    "changes",
    [{"trapezoid": False}, {"bc_bias": False}, {"use_bias": True}, {"rope_layout": "half"},
     {"layer_norm_epsilon": 1e-6}],
)  # fmt: skip
def test_what_mamba_ssm_cannot_express_does_not_go_back(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    tiny("mamba3", **changes).save_pretrained(tmp_path / "src")
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"mamba_ssm cannot express {name}={value!r}"):
        convert_back(tmp_path / "src", tmp_path / "dst")
    (tmp_path / "src/config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        convert_back(tmp_path / "src", tmp_path / "dst")
    assert [f.name for f in tmp_path.iterdir()] == ["src"]
