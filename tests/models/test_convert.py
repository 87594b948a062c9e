"""Conversion of mamba_ssm's checkpoint format, by files in that format written here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from ssm_hf import Mamba2ForCausalLM, MambaForCausalLM, byte_tokenizer
from ssm_hf.convert import convert, convert_config, convert_state_dict, main
from tests.helpers import tiny

# d_model 32, 2 layers, 90 tokens padded to 96. Older Mamba-1 files have no more fields than these.
MAMBA1: dict[str, Any] = {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 90,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
MAMBA2: dict[str, Any] = {
    **MAMBA1,
    "d_intermediate": 0,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
# Shapes of a layer's mixer with mamba_ssm's default options at width 32.
MIXER_SHAPES = {
    "Mamba1": {
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 2 * 16, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "A_log": (64, 16),
        "D": (64,),
        "out_proj.weight": (32, 64),
    },
    "Mamba2": {
        "in_proj.weight": (2 * 64 + 2 * 128 + 1, 32),
        "conv1d.weight": (64 + 2 * 128, 1, 4),
        "conv1d.bias": (64 + 2 * 128,),
        "dt_bias": (1,),
        "A_log": (1,),
        "D": (1,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    },
}
THEIRS = {"Mamba1": transformers.MambaForCausalLM, "Mamba2": transformers.Mamba2ForCausalLM}
OURS = {"Mamba1": MambaForCausalLM, "Mamba2": Mamba2ForCausalLM}


def config_of(layer: str, **changes: Any) -> dict[str, Any]:
    return {**(MAMBA1 if layer == "Mamba1" else MAMBA2), **changes}


def state_dict_of(layer: str, tied: bool = True) -> dict[str, Tensor]:
    """Random weights under mamba_ssm's names; the head is stored even when it is tied."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (96, 32)}
    for i in range(2):
        shapes[f"backbone.layers.{i}.norm.weight"] = (32,)
        for name, shape in MIXER_SHAPES[layer].items():
            shapes[f"backbone.layers.{i}.mixer.{name}"] = shape
    shapes["backbone.norm_f.weight"] = (32,)
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    embedding = weights["backbone.embedding.weight"]
    weights["lm_head.weight"] = embedding if tied else torch.randn_like(embedding)
    return weights


def write(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], container: str = "pickle"
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    half = len(weights) // 2
    shards = [dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]
    if container == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
    elif container == "safetensors":
        save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors")
    else:
        stem, end = {
            "pickles": ("pytorch_model", "bin"),
            "sharded safetensors": ("model", "safetensors"),
        }[container]
        index: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"{stem}-{number:05}-of-00002.{end}"
            index |= dict.fromkeys(shard, file)
            if end == "bin":
                torch.save(shard, folder / file)
            else:
                save_file({k: v.clone() for k, v in shard.items()}, folder / file)
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


each_layer = pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])


@each_layer
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("container", ["pickle", "pickles", "safetensors", "sharded safetensors"])
def test_converted_checkpoint_is_the_same_model(
    layer: str, tied: bool, container: str, tmp_path: Path
) -> None:
    weights = state_dict_of(layer, tied)
    config = config_of(layer, tie_embeddings=tied)
    convert(write(tmp_path / "src", config, weights, container), tmp_path / "dst")

    written = load_file(tmp_path / "dst/model.safetensors")
    assert ("lm_head.weight" in written) == (not tied)
    for name, tensor in written.items():
        assert torch.equal(tensor, weights[name.replace("embeddings", "embedding")]), name
    ours, info = OURS[layer].from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert not any(info.values())
    # transformers reads mamba_ssm's names by itself: a reading of the source that is not ours.
    theirs = THEIRS[layer].from_pretrained(tmp_path / "dst")
    for p in theirs.parameters():
        p.data.zero_()
    theirs.load_state_dict(weights)
    ids = torch.randint(0, 90, (2, 13))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=0)
    assert sorted(f.name for f in (tmp_path / "dst").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_missing_fields_have_mamba_ssms_defaults() -> None:
    assert convert_config({"d_model": 768, "n_layer": 24}).to_dict() == (
        tiny(
            "mamba", vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16
        ).to_dict()
    )
    config = convert_config(
        MAMBA2 | {"d_model": 768, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    )
    expected = {"vocab_size": 50288, "hidden_size": 768, "num_heads": 24, "head_dim": 64}
    expected |= {"state_size": 128, "n_groups": 1, "conv_kernel": 4, "expand": 2, "chunk_size": 256}
    expected |= {"tie_word_embeddings": True, "residual_in_fp32": True, "layer_norm_epsilon": 1e-5}
    expected |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "use_bias": False}
    assert {name: getattr(config, name) for name in expected} == expected


@each_layer
def test_every_option_is_translated(layer: str) -> None:
    options = {"layer": layer, "d_state": 8, "d_conv": 3, "expand": 4, "bias": True}
    options |= {"conv_bias": False, "dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 1e-3}
    expected = {"state_size": 8, "conv_kernel": 3, "expand": 4, "use_bias": True}
    expected |= {"use_conv_bias": False, "time_step_min": 0.01, "time_step_max": 0.2}
    expected |= {"time_step_floor": 1e-3, "residual_in_fp32": False, "tie_word_embeddings": False}
    if layer == "Mamba1":
        options |= {"dt_rank": 5, "dt_scale": 2.0, "dt_init": "constant"}
        expected |= {"time_step_rank": 5, "time_step_scale": 2.0}
        expected |= {"time_step_init_scheme": "constant"}
    else:
        options |= {"headdim": 16, "ngroups": 2, "chunk_size": 32, "dt_limit": [0.0, 0.5]}
        expected |= {"head_dim": 16, "num_heads": 8, "n_groups": 2, "chunk_size": 32}
        expected |= {"time_step_limit": [0.0, 0.5]}
    options["device"] = "cuda"
    options |= {"use_fast_path": True} if layer == "Mamba1" else {"use_mem_eff_path": False}
    if layer == "Mamba2":  # written out, these say nothing
        options |= {"d_ssm": 128, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
    config = convert_config(
        config_of(layer, ssm_cfg=options, residual_in_fp32=False, tie_embeddings=False)
    )
    assert {name: getattr(config, name) for name in expected} == expected


def test_infinite_step_limit_of_a_file_is_read() -> None:
    content = json.loads(
        json.dumps(MAMBA2 | {"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, float("inf")]}})
    )
    config = convert_config(content)
    assert tuple(config.time_step_limit) == (0.0, float("inf"))  # pyright: ignore[reportAttributeAccessIssue]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Mamba2", {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 128}}, "d_ssm=128 must not exceed"),
    ("Mamba2", {"attn_layer_idx": [1]}, "attn_cfg must say num_heads"),
    ("Mamba1", {"rms_norm": False}, "rms_norm=False.*cannot express"),
    ("Mamba1", {"ssm_cfg": {"layer": "S4"}}, "layer='S4', supported.*Mamba1.*Mamba3"),
    ("Mamba1", {"ssm_cfg": {"ngroups": 2}}, "unknown option ngroups=2 of Mamba1"),
    (
        "Mamba2",
        {"ssm_cfg": {"layer": "Mamba2", "dt_rank": 2}},
        "unknown option dt_rank=2 of Mamba2",
    ),
    ("Mamba1", {"ssm_cfg": []}, r"ssm_cfg must be an object, got \[\]"),
    ("Mamba1", {"norm_epsilon": 1e-6}, "unknown option norm_epsilon=1e-06"),
    ("Mamba2", {"ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, "headdim=48 does not divide.*64"),
    ("Mamba2", {"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "headdim must be a positive.*got 0"),
    ("Mamba1", {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple must be a positive.*got 0"),
    ("Mamba1", {"d_model": "32"}, "d_model must be a positive integer, got '32'"),
    ("Mamba1", {"ssm_cfg": {"dt_min": 1.0}}, r"time_step_min.*1\.0, 0\.1"),
    ("Mamba1", {"ssm_cfg": {"bias": "no"}}, "use_bias.*"),
    ("Mamba1", {"tie_embeddings": 3}, "tie_word_embeddings"),
]


@pytest.mark.parametrize(("layer", "changes", "message"), REFUSED)
def test_config_that_cannot_be_converted_names_option_value_and_file(
    layer: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "src", config_of(layer, **changes), state_dict_of(layer))
    with pytest.raises(ValueError, match=message) as error:
        convert(source, tmp_path / "dst")
    assert str(source / "config.json") in str(error.value)
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


def _renamed(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new if name == old else name: tensor for name, tensor in weights.items()}


def _with(weights: dict[str, Tensor], name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**weights, name: tensor}


D1 = "backbone.layers.1.mixer.D"
WRONG_WEIGHTS: dict[str, tuple[Any, str]] = {
    "missing": (
        lambda w: {name: t for name, t in w.items() if name not in (D1, "backbone.norm_f.weight")},
        f"lacks 2 weights.*{D1}, backbone.norm_f.weight",
    ),
    "missing embedding": (
        lambda w: _renamed(w, "backbone.embedding.weight", "backbone.wte.weight"),
        "lacks 1 weights.*: backbone.embedding.weight",
    ),
    "unexpected": (
        lambda w: _with(w, "backbone.layers.0.mlp.fc1.weight", torch.ones(2)),
        "unexpected 1 weights.*: backbone.layers.0.mlp.fc1.weight",
    ),
    "a layer too many": (
        lambda w: _with(w, "backbone.layers.2.norm.weight", torch.ones(32)),
        "unexpected 1 weights.*layers.2.norm",
    ),
    "shape": (lambda w: _with(w, D1, torch.ones(3)), rf"{D1} has shape \(3,\).*asks for \(64,\)"),
    "rows": (
        lambda w: _with(w, "backbone.embedding.weight", torch.ones(90, 32)),
        r"lm_head.weight differs",
    ),
    "untied though tied": (
        lambda w: _with(w, "lm_head.weight", w["lm_head.weight"] + 1e-3),
        "tie_embeddings is true, but lm_head.weight differs from backbone.embedding.weight",
    ),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    change, message = WRONG_WEIGHTS[case]
    source = write(tmp_path / "src", MAMBA1, change(state_dict_of("Mamba1")))
    with pytest.raises(ValueError, match=message) as error:
        convert(source, tmp_path / "dst")
    assert str(source) in str(error.value)
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


def test_vocabulary_that_is_not_padded_is_refused_and_a_missing_tied_head_is_not() -> None:
    weights, config = state_dict_of("Mamba1"), convert_config(MAMBA1)
    del weights["lm_head.weight"]
    converted = convert_state_dict(weights, config)
    assert converted["backbone.embeddings.weight"] is weights["backbone.embedding.weight"]
    weights["backbone.embedding.weight"] = torch.ones(90, 32)
    with pytest.raises(
        ValueError, match=r"embedding.weight has shape \(90, 32\).*\(96, 32\).*padded"
    ):
        convert_state_dict(weights, config, "checkpoint")


class _Touch:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_damaged_or_unsafe_files_are_refused_by_name(tmp_path: Path) -> None:
    weights = state_dict_of("Mamba1")
    source = write(tmp_path / "pickle", MAMBA1, weights)
    _cut(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is cut off or damaged"):
        convert(source, tmp_path / "dst")
    torch.save({**weights, "x": _Touch(tmp_path / "touched")}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds more than tensors"):
        convert(source, tmp_path / "dst")
    assert not (tmp_path / "touched").exists()
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"neither model\*\.safetensors nor pytorch_model\*\.bin"):
        convert(source, tmp_path / "dst")

    for container, name in (("sharded safetensors", "model-00002-of-00002.safetensors"),
                            ("pickles", "pytorch_model-00002-of-00002.bin")):  # fmt: skip
        source = write(tmp_path / container, MAMBA1, weights, container)
        shard = source / name
        _cut(shard)
        with pytest.raises(ValueError, match=f"{name} is cut off or damaged"):
            convert(source, tmp_path / "dst")
        shard.unlink()
        with pytest.raises(ValueError, match=f"lists {name}, which is missing"):
            convert(source, tmp_path / "dst")
        (source / f"{name.partition('-')[0]}.{name.rpartition('.')[2]}.index.json").unlink()
        with pytest.raises(ValueError, match=r"lacks 1\d weights"):
            convert(source, tmp_path / "dst")
        shutil.copy(source / name.replace("00002-of", "00001-of"), source / name)
        with pytest.raises(ValueError, match=f"{name} holds .*, which another shard holds too"):
            convert(source, tmp_path / "dst")

    (source / "config.json").write_text("{'d_model': 32}")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        convert(source, tmp_path / "dst")
    (source / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got list"):
        convert(source, tmp_path / "dst")
    (source / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config\.json is not a mamba_ssm config"):
        convert(source, tmp_path / "dst")
    with pytest.raises(ValueError, match=r"nowhere/config\.json does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@each_layer
def test_checkpoint_in_transformers_format_needs_no_conversion(layer: str, tmp_path: Path) -> None:
    model = OURS[layer](tiny("mamba" if layer == "Mamba1" else "mamba2"))
    model.save_pretrained(tmp_path / "src")
    with pytest.raises(ValueError, match="format already: there is nothing to convert"):
        convert(tmp_path / "src", tmp_path / "dst")


def test_tokenizer_and_generation_config_are_taken_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("Mamba2", vocab_size=264, pad_vocab_size_multiple=16)
    weights = state_dict_of("Mamba2")
    weights["backbone.embedding.weight"] = weights["lm_head.weight"] = torch.randn(272, 32)
    source = write(tmp_path / "src", config, weights)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(source)
    generation = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[256, 261])
    generation.save_pretrained(source)
    convert(source, tmp_path / "dst")
    model = Mamba2ForCausalLM.from_pretrained(tmp_path / "dst")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (256, 256)
    assert model.config.pad_token_id == 257
    assert model.generation_config.temperature == 0.7
    assert model.generation_config.eos_token_id == [256, 261]
    assert model.generation_config.pad_token_id == 257  # the file says nothing about it
    assert "bos_token_id=256, eos_token_id=256, pad_token_id=257" in capsys.readouterr().out
    loaded = AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("zwölf").input_ids == tokenizer("zwölf").input_ids

    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "defaults")
    generation = GenerationConfig.from_pretrained(tmp_path / "defaults")
    assert (generation.eos_token_id, generation.pad_token_id) == (256, 257)


def test_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "src", MAMBA1, state_dict_of("Mamba1"))
    byte_tokenizer().save_pretrained(source)
    with pytest.raises(ValueError, match="tokenizer has 264 tokens, but the embedding only has 96"):
        convert(source, tmp_path / "dst")
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


def test_assumed_token_ids_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(write(tmp_path / "src", MAMBA1, state_dict_of("Mamba1")), tmp_path / "dst")
    out = capsys.readouterr().out
    assert "no tokenizer: bos, eos and pad token ids are assumed to be 0 (GPT-NeoX)" in out
    assert "MambaForCausalLM, 23,008 parameters" in out
    assert GenerationConfig.from_pretrained(tmp_path / "dst").eos_token_id == 0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_changes_all_but_the_decays(stored: torch.dtype, tmp_path: Path) -> None:
    weights = {name: t.to(stored) for name, t in state_dict_of("Mamba2").items()}
    source = write(tmp_path / "src", MAMBA2, weights)
    convert(source, tmp_path / "same")
    assert {t.dtype for t in load_file(tmp_path / "same/model.safetensors").values()} == {stored}
    main([str(source), str(tmp_path / "half"), "--dtype", "float16"])
    for name, tensor in load_file(tmp_path / "half/model.safetensors").items():
        precise = name.endswith(("A_log", ".D", "dt_bias"))
        assert tensor.dtype == (stored if precise else torch.float16), name
    assert Mamba2ForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_existing_directory_is_replaced_on_request_only(tmp_path: Path) -> None:
    source = write(tmp_path / "src", MAMBA1, state_dict_of("Mamba1"))
    target = tmp_path / "dst"
    target.mkdir()
    convert(source, target)  # an empty directory may be filled
    (target / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="exists and is not empty: pass --overwrite"):
        convert(source, target)
    assert (target / "mine.txt").read_text() == "kept"
    convert(source, target, overwrite=True)
    assert not (target / "mine.txt").exists()
    assert MambaForCausalLM.from_pretrained(target).config.vocab_size == 96

    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("kept")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        convert(source, home, overwrite=True)
    with pytest.raises(ValueError, match="is or contains SRC"):
        convert(source, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is or contains SRC"):
        convert(source, source, overwrite=True)
    with pytest.raises(ValueError, match="is not a directory"):
        convert(source, home / "letter.txt")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dst", "home", "src"]


def test_interrupted_conversion_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "src", MAMBA1, state_dict_of("Mamba1"))
    convert(source, tmp_path / "dst")
    before = {f.name: f.read_bytes() for f in (tmp_path / "dst").iterdir()}

    def full_disk(self: Any, folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MambaForCausalLM, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "dst", overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "new")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dst", "src"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "dst").iterdir()} == before

    monkeypatch.undo()
    rename = Path.rename

    def lost_new_files(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", lost_new_files)
    with pytest.raises(OSError, match="Input/output error"):
        convert(source, tmp_path / "dst", overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dst", "src"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "dst").iterdir()} == before


def test_command_line_ends_with_the_reason(tmp_path: Path) -> None:
    config = config_of("Mamba1", ssm_cfg={"layer": "S4"})
    source = write(tmp_path / "src", config, state_dict_of("Mamba1"))
    with pytest.raises(SystemExit, match=r"ssm_hf\.convert: .*layer='S4'"):
        main([str(source), str(tmp_path / "dst")])


def test_options_without_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "src", config_of("Mamba2"), state_dict_of("Mamba2"))
    names = [str(source), str(tmp_path / "dst")]
    with pytest.raises(SystemExit, match="A_activation='softplus' is not an option of Mamba2"):
        main([*names, "--A_activation", "softplus"])
    for given in (["--dtype", "bfloat16"], ["--A_activation", "softplus"]):
        with pytest.raises(SystemExit):
            main([*names, "--back", *given])
        assert "--back writes what is there" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()
