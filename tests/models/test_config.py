"""Configs: upstream's fields and files, what is refused, and the initial values they choose."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ssm_hf import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from tests.helpers import randomize_, tiny

CONFIGS = {"mamba": MambaConfig, "mamba2": Mamba2Config}
NATIVE = {"mamba": transformers.MambaConfig, "mamba2": transformers.Mamba2Config}
MODELS = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}
each_type = pytest.mark.parametrize("model_type", CONFIGS)


@each_type
def test_fields_and_defaults_are_upstreams_and_initialization(model_type: str) -> None:
    def fields(config_class: Any) -> dict[str, Any]:
        return {f.name: (f.type, f.default) for f in dataclasses.fields(config_class)}

    ours, theirs = fields(CONFIGS[model_type]), fields(NATIVE[model_type])
    assert ours.pop("initialization")[1] == "mamba_ssm"
    assert ours == theirs
    values = CONFIGS[model_type]().to_dict()
    del values["initialization"]
    assert values == NATIVE[model_type]().to_dict()


@each_type
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"hidden_sise": 64}, "hidden_sise=64; did you mean 'hidden_size'"),
        ({"num_layers": 2}, "num_layers=2"),
        ({"zzz": None}, "zzz=None"),
    ],
)
def test_unknown_argument_is_refused(
    model_type: str, argument: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CONFIGS[model_type](**argument)


INEXPRESSIBLE = [
    ("d_ssm", 32),
    ("D_has_hdim", True),
    ("rmsnorm", False),
    ("d_intermediate", 64),
    ("attn_layer_idx", [1]),
]


@pytest.mark.parametrize(
    ("option", "value"), [*INEXPRESSIBLE, ("norm_before_gate", True), ("rms_norm", False)]
)
def test_option_without_a_place_in_the_format_is_refused_at_construction(
    option: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"{option}=.*'mamba2' format cannot express"):
        Mamba2Config(**{option: value})


@pytest.mark.parametrize(("option", "value"), INEXPRESSIBLE)
def test_option_without_a_place_in_the_format_is_refused_from_a_file(
    option: str, value: Any, tmp_path: Path
) -> None:
    _write_config(tmp_path, "mamba2", **{option: value})
    with pytest.raises(ValueError, match=f"{option}=.*'mamba2' format cannot express"):
        Mamba2Config.from_pretrained(tmp_path)


def _write_config(folder: Path, model_type: str, **changes: Any) -> None:
    values = tiny(model_type).to_dict() | changes
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_files_of_older_transformers_load(
    norm_before_gate: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Both keys were written whatever the model was, and never read.
    old = {"norm_before_gate": norm_before_gate, "rms_norm": True}
    _write_config(tmp_path, "mamba2", **old)
    config = Mamba2Config.from_pretrained(tmp_path)
    assert ("norm_before_gate=True" in caplog.text) == norm_before_gate
    model, same = Mamba2ForCausalLM(config), Mamba2ForCausalLM(tiny("mamba2"))
    same.load_state_dict(model.state_dict())
    ids = torch.arange(13)[None]
    assert torch.equal(model(ids).logits, same(ids).logits)


def test_foreign_keys_of_a_file_are_kept_and_written_again(tmp_path: Path) -> None:
    _write_config(tmp_path, "mamba", some_tool_setting={"a": 1})
    config = MambaConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["some_tool_setting"] == {"a": 1}


@each_type
def test_config_of_mamba_ssm_is_refused_with_the_way_to_convert_it(
    model_type: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 64, "n_layer": 2, "ssm_cfg": {}}))
    for reader in (CONFIGS[model_type], MODELS[model_type]):
        with pytest.raises(ValueError, match=r"python -m ssm_hf\.convert SRC DST"):
            reader.from_pretrained(tmp_path)


CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("mamba2", {"head_dim": 7}, r"hidden_size \* expand \(64\).*num_heads \* head_dim \(56\)"),
    ("mamba2", {"hidden_size": 33}, r"\(66\).*\(64\)"),
    ("mamba2", {"n_groups": 3}, "n_groups=3, num_heads=8"),
    ("mamba2", {"n_groups": 0}, "n_groups must be at least 1, got 0"),
    ("mamba2", {"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ("mamba2", {"time_step_limit": (0.2, 0.1)}, r"time_step_limit.*0\.2, 0\.1"),
    ("mamba2", {"time_step_limit": (0.1,)}, r"time_step_limit.*0\.1"),
    ("mamba2", {"time_step_limit": (-1.0, 1.0)}, "time_step_limit.*-1"),
    ("mamba", {"intermediate_size": 65}, r"intermediate_size=65.*expand \* hidden_size = 64"),
    ("mamba", {"time_step_rank": 0}, "time_step_rank must be at least 1, got 0"),
    ("mamba", {"time_step_init_scheme": "zero"}, "time_step_init_scheme.*'zero'"),
    *(
        (model_type, values, message)
        for model_type in CONFIGS
        for values, message in [
            ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
            ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, got -1"),
            ({"state_size": 0}, "state_size must be at least 1, got 0"),
            ({"conv_kernel": 0}, "conv_kernel must be at least 1, got 0"),
            ({"hidden_act": "gelu"}, "hidden_act.*'gelu'"),
            ({"initialization": "zeros"}, "initialization.*'zeros'"),
            ({"time_step_min": 0.2}, r"time_step_min.*0\.2, 0\.1"),
            ({"time_step_min": 0.0}, r"time_step_min.*0\.0, 0\.1"),
            ({"hidden_size": "32"}, "hidden_size"),
            ({"expand": 1.5}, "expand.*"),
        ]
    ),
]


@pytest.mark.parametrize(("model_type", "values", "message"), CONTRADICTIONS)
@pytest.mark.parametrize("source", ["arguments", "file"])
def test_contradictory_values_are_refused(
    model_type: str, values: dict[str, Any], message: str, source: str, tmp_path: Path
) -> None:
    _write_config(tmp_path, model_type, **values)
    # The library's own error for a wrong type does not derive from ValueError.
    refused = pytest.raises((ValueError, StrictDataclassError), match=message)
    if source == "arguments":
        with refused:
            tiny(model_type, **values)
    else:
        with refused:
            CONFIGS[model_type].from_pretrained(tmp_path)


@each_type
def test_config_round_trips(model_type: str, tmp_path: Path) -> None:
    changes = {"initialization": "transformers", "layer_norm_epsilon": 1e-3, "use_bias": True}
    if model_type == "mamba2":
        changes["time_step_limit"] = (0.01, float("inf"))
    config = tiny(model_type, **changes)
    config.save_pretrained(tmp_path)
    for other in (
        CONFIGS[model_type].from_dict(config.to_dict()),
        CONFIGS[model_type].from_pretrained(tmp_path),
        CONFIGS[model_type].from_json_file(tmp_path / "config.json"),
        copy.deepcopy(config),
    ):
        assert type(other) is type(config)
        expected, values = config.to_dict(), other.to_dict()
        for name, value in changes.items():
            got = getattr(other, name)
            assert (tuple(got) if isinstance(got, list) else got) == value, name
            expected.pop(name), values.pop(name)
        assert values == expected


def _model(model_type: str, initialization: str, **overrides: Any) -> Any:
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "state_size": 16, "vocab_size": 512}
    if model_type == "mamba2":
        sizes |= {"num_heads": 64, "head_dim": 4}
    config = tiny(model_type, **{**sizes, "initialization": initialization, **overrides})
    return MODELS[model_type](config)


def _is_uniform(x: Tensor, bound: float) -> bool:
    """Within ±bound, and of a uniform distribution's standard deviation bound/sqrt(3)."""
    # 5 % is 5 standard errors of the smallest tensor tested.
    return bool(x.abs().max() <= bound) and math.isclose(
        float(x.std()), bound / math.sqrt(3), rel_tol=0.05
    )


def _all(model: Any, name: str) -> Tensor:
    found = [p.detach().flatten() for n, p in model.named_parameters() if n.endswith(name)]
    assert found, name
    return torch.cat(found)


def _check_initial_values(model: Any) -> None:
    """The values that `model.config` asks for, by bounds and moments."""
    config = model.config
    own = config.initialization == "mamba_ssm"
    inner = config.expand * config.hidden_size
    assert math.isclose(_all(model, "embeddings.weight").std(), 0.02 if own else 0.1, rel_tol=0.05)
    in_proj = _all(model, "in_proj.weight")
    if own:
        assert _is_uniform(in_proj, 1 / math.sqrt(config.hidden_size))
    else:
        assert math.isclose(in_proj.std(), config.initializer_range, rel_tol=0.05)
        assert in_proj.abs().max() > 3 * config.initializer_range  # normal, not uniform
    depth = config.num_hidden_layers if own or config.rescale_prenorm_residual else 1
    assert _is_uniform(_all(model, "out_proj.weight"), 1 / math.sqrt(inner * depth))
    assert _is_uniform(_all(model, "conv1d.weight"), 1 / math.sqrt(config.conv_kernel))
    if own:
        assert _is_uniform(_all(model, "conv1d.bias"), 1 / math.sqrt(config.conv_kernel))
    else:
        assert not _all(model, "conv1d.bias").any()
    for norm in ("norm.weight", "norm_f.weight", ".D"):
        assert (_all(model, norm) == 1).all()

    bias = "dt_bias" if config.model_type == "mamba2" else "dt_proj.bias"
    step = F.softplus(_all(model, bias))
    # 1e-3 relative: softplus inverted and applied in fp32 at values near -7.
    assert step.min() > config.time_step_min * 0.999
    assert step.max() < config.time_step_max * 1.001
    # Log-uniform over two decades, standard error below 0.09: the middle is 0.01.
    assert math.isclose(float(step.log().mean()), math.log(0.01), abs_tol=0.4)
    A = _all(model, "A_log").exp()
    if config.model_type == "mamba":
        expected = torch.arange(1.0, config.state_size + 1).repeat(len(A) // config.state_size)
        assert torch.allclose(A, expected)
        bound = config.time_step_rank**-0.5
        assert _is_uniform(_all(model, "dt_proj.weight"), bound)
    elif own:
        assert A.min() >= 0.999
        assert A.max() <= 16.001
        assert math.isclose(A.mean(), 8.5, rel_tol=0.1)
        assert len(A.unique()) > len(A) // 2  # drawn, not counted
    else:
        assert torch.allclose(A, torch.arange(1.0, config.num_heads + 1).repeat(4))


@each_type
@pytest.mark.parametrize("initialization", ["mamba_ssm", "transformers"])
@pytest.mark.parametrize("way", ["constructor", "from_config", "after the meta device"])
def test_initial_values_follow_the_scheme(model_type: str, initialization: str, way: str) -> None:
    if way == "constructor":
        model = _model(model_type, initialization)
    elif way == "from_config":
        config = _model(model_type, initialization).config
        model = MODELS[model_type]._from_config(config)
    else:
        with torch.device("meta"):
            model = _model(model_type, initialization)
        model.to_empty(device="cpu")
        model.init_weights()
    _check_initial_values(model)


@each_type
@pytest.mark.parametrize("way", ["constructor", "after the meta device"])
def test_transformers_scheme_rescales_out_proj_on_request(model_type: str, way: str) -> None:
    with torch.device("cpu" if way == "constructor" else "meta"):
        model = _model(model_type, "transformers", rescale_prenorm_residual=True)
    if way != "constructor":
        model.to_empty(device="cpu")
        model.init_weights()
    _check_initial_values(model)


def test_mamba_step_projection_can_start_constant() -> None:
    model = _model("mamba", "mamba_ssm", time_step_init_scheme="constant", time_step_scale=0.5)
    assert (_all(model, "dt_proj.weight") == 0.5 * 8**-0.5).all()


@each_type
@pytest.mark.parametrize("initialization", ["mamba_ssm", "transformers"])
def test_loading_overwrites_no_weight(model_type: str, initialization: str, tmp_path: Path) -> None:
    model = randomize_(MODELS[model_type](tiny(model_type, initialization=initialization)))
    model.save_pretrained(tmp_path)
    loaded = MODELS[model_type].from_pretrained(tmp_path)
    loaded.init_weights()  # marked as loaded: a second call changes nothing either
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
