"""Mamba-3's config: what is refused, parameter counts, and the initial values it chooses."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import ssm_hf
from ssm_hf import Mamba3Config, Mamba3ForCausalLM, Mamba3Model
from ssm_hf.ops.mamba3_scan.step import decay_rates
from tests.helpers import auto_classes_restored, randomize_, tiny

ROOT = Path(__file__).parents[2]
# Layers, width, width of the MLP, streams, parameters: four sizes of the paper and those for the
# comparison at 130M, which have GPT-NeoX's vocabulary.
SIZES = {
    "mamba3-180m": (12, 768, 1500, 1, 186_849_600),
    "mamba3-mimo-180m": (12, 768, 1264, 4, 187_291_968),
    "mamba3-440m": (24, 1024, 2048, 1, 443_015_680),
    "mamba3-mimo-440m": (24, 1024, 1792, 4, 444_195_328),
    "mamba3-880m": (24, 1536, 3072, 1, 892_782_336),
    "mamba3-mimo-880m": (24, 1536, 2800, 4, 894_551_808),
    "mamba3-1.5b": (24, 2048, 4096, 1, 1_494_723_584),
    "mamba3-mimo-1.5b": (24, 2048, 3824, 4, 1_497_082_880),
    "mamba3-130m": (12, 768, 1500, 1, 126_970_176),
    "mamba3-130m-n64": (12, 768, 1500, 1, 125_604_672),
    "mamba3-mimo-130m": (12, 768, 1264, 4, 127_412_544),
}


@pytest.mark.parametrize("name", SIZES)
def test_shipped_configs_have_the_papers_numbers_of_parameters(name: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(ROOT / f"configs/model/{name}.json")
    assert isinstance(config, Mamba3Config)
    layers, width, mlp, rank, count = SIZES[name]
    assert (config.num_hidden_layers, config.hidden_size) == (layers, width)
    assert (config.intermediate_size, config.mimo_rank) == (mlp, rank)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == count
    # The file is exactly what save_pretrained of that model writes, but for the version.
    model.config.save_pretrained(tmp_path)
    written, shipped = (
        json.loads(file.read_text())
        for file in (tmp_path / "config.json", ROOT / f"configs/model/{name}.json")
    )
    del written["transformers_version"], shipped["transformers_version"]
    assert written == shipped


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"mimo_rank": 0}, "mimo_rank must be at least 1, got 0"),
    ({"mimo_rank": -2}, "mimo_rank must be at least 1, got -2"),
    ({"rope_fraction": 0.25}, r"rope_fraction must be 0 or 0\.5 or 1, got 0\.25"),
    ({"state_size": 3}, "rope_fraction=0.5 of state_size=3 leaves no pair"),
    (
        {"state_size": 7, "rope_layout": "half"},
        'rope_layout="half" needs an even state_size, got 7',
    ),
    ({"state_size": 5, "mimo_rank": 2}, 'rope_layout="half" needs an even state_size, got 5'),
    ({"rope_layout": "interleaved"}, "rope_layout must be 'pairwise' or 'half', got 'interleaved'"),
    ({"A_activation": "relu"}, "A_activation must be 'heavy_tail' or 'softplus', got 'relu'"),
    ({"A_floor": -1e-4}, "A_floor must be 0 or more"),
    ({"A_floor": math.nan}, "A_floor must be 0 or more, and finite, got nan"),
    ({"head_dim": 7}, r"head_dim=7 does not divide expand \* hidden_size = 64"),
    ({"n_groups": 3}, "n_groups=3 does not divide num_heads=8"),
    ({"n_groups": 0}, "n_groups must be at least 1, got 0"),
    ({"intermediate_size": -1}, r"intermediate_size must be 0 \(no MLP\) or more, got -1"),
    ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ({"hidden_act": "gelu"}, "hidden_act.*'gelu'"),
    ({"initialization": "zeros"}, "initialization.*'zeros'"),
    ({"time_step_min": 0.2}, r"time_step_min.*0\.2, 0\.1"),
    ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    ({"trapezoid": "yes"}, "trapezoid"),
    ({"hidden_size": "32"}, "hidden_size"),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
@pytest.mark.parametrize("source", ["arguments", "file"])
def test_contradictory_values_are_refused(
    values: dict[str, Any], message: str, source: str, tmp_path: Path
) -> None:
    # rope_layout as None is the default that follows the number of streams.
    written = {**tiny("mamba3").to_dict(), "rope_layout": None, **values}
    (tmp_path / "config.json").write_text(json.dumps(written))
    # The library's own error for a wrong type does not derive from ValueError.
    refused = pytest.raises((ValueError, StrictDataclassError), match=message)
    if source == "arguments":
        with refused:
            tiny("mamba3", **values)
    else:
        with refused:
            Mamba3Config.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"mimo_ranks": 4}, "unknown argument mimo_ranks=4; did you mean 'mimo_rank'"),
        ({"conv_kernel": 4}, "unknown argument conv_kernel=4"),
        ({"d_intermediate": 64}, "unknown argument d_intermediate=64"),
    ],
)
def test_unknown_argument_is_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba3Config(**argument)


def test_config_round_trips(tmp_path: Path) -> None:
    config = tiny("mamba3-mimo", rope_fraction=1, A_activation="softplus", trapezoid=False,
                  A_floor=1e-3, residuals_per_layer=2)  # fmt: skip
    assert config.rope_layout == "half"  # pyright: ignore[reportAttributeAccessIssue]
    config.save_pretrained(tmp_path)
    for other in (
        Mamba3Config.from_dict(config.to_dict()),
        AutoConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
    ):
        assert type(other) is Mamba3Config
        got, expected = other.to_dict(), config.to_dict()
        assert {**got, "_name_or_path": ""} == {**expected, "_name_or_path": ""}
    with pytest.raises(ValueError, match=r"python -m ssm_hf\.convert SRC DST"):
        Mamba3Config.from_dict({"d_model": 64, "n_layer": 2, "ssm_cfg": {"layer": "Mamba3"}})


def test_auto_classes_know_mamba3_unless_somebody_else_took_the_name(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny("mamba3"))
    assert type(model) is Mamba3ForCausalLM
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is Mamba3Model

    class Theirs(Mamba3Config):
        pass

    with auto_classes_restored():
        AutoConfig.register("mamba3", Theirs, exist_ok=True)
        ssm_hf.register()
        assert CONFIG_MAPPING["mamba3"] is Theirs
        ssm_hf.register(override=True)
        assert CONFIG_MAPPING["mamba3"] is Mamba3Config


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


@pytest.mark.parametrize("scheme", ["mamba_ssm", "transformers"])
@pytest.mark.parametrize("way", ["constructor", "after the meta device"])
def test_initial_values_follow_the_scheme(scheme: str, way: str) -> None:
    config = tiny("mamba3-mimo", hidden_size=128, num_hidden_layers=4, head_dim=4, vocab_size=512,
                  intermediate_size=200, residuals_per_layer=2, initialization=scheme,
                  initializer_range=0.1)  # fmt: skip
    with torch.device("cpu" if way == "constructor" else "meta"):
        model = Mamba3ForCausalLM(config)  # pyright: ignore[reportArgumentType]
    if way != "constructor":
        model.to_empty(device="cpu")
        model.init_weights()
    own = scheme == "mamba_ssm"
    assert math.isclose(_all(model, "embeddings.weight").std(), 0.02 if own else 0.1, rel_tol=0.05)
    for name in ("in_proj.weight", "fc1.weight"):
        weight = _all(model, name)
        if own:
            assert _is_uniform(weight, 1 / math.sqrt(128))
        else:
            assert math.isclose(weight.std(), 0.1, rel_tol=0.05)
            assert weight.abs().max() > 0.3  # normal, not uniform
    depth = 8 if own else 1
    assert _is_uniform(_all(model, "out_proj.weight"), 1 / math.sqrt(256 * depth))
    assert _is_uniform(_all(model, "fc2.weight"), 1 / math.sqrt(256 * depth))
    for name in ("norm.weight", "norm2.weight", "norm_f.weight", ".D", "B_bias", "C_bias",
                 "mimo_z"):  # fmt: skip
        assert (_all(model, name) == 1).all(), name
    for name in ("mimo_x", "mimo_o"):
        assert (_all(model, name) == 1 / 2).all(), name
    step = F.softplus(_all(model, "dt_bias"))
    # 1e-3 relative: softplus inverted and applied in fp32 at values near -7.
    assert step.min() > 0.001 * 0.999
    assert step.max() < 0.1 * 1.001
    # Log-uniform over two decades, standard error below 0.09: the middle is 0.01.
    assert math.isclose(float(step.log().mean()), math.log(0.01), abs_tol=0.4)


def test_loading_overwrites_no_weight(tmp_path: Path) -> None:
    model = randomize_(Mamba3ForCausalLM(tiny("mamba3-mimo")))  # pyright: ignore[reportArgumentType]
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    loaded = Mamba3ForCausalLM.from_pretrained(tmp_path)
    loaded.init_weights()  # marked as loaded: a second call changes nothing either
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_decay_rates_are_those_of_the_formulas() -> None:
    a = torch.tensor([-1e6, -3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64).requires_grad_()
    heavy = decay_rates(a, "heavy_tail", 1e-4)
    expected = torch.tensor([-1e-4, -1 / 4, -1 / 1.5, -1, -1.5, -4], dtype=torch.float64)
    assert torch.allclose(heavy, expected, rtol=1e-15)
    (slope,) = torch.autograd.grad(heavy.sum(), a)
    # 1 on both sides of 0, 1 / (1 - a)^2 below, and none at the floor.
    right = -torch.tensor([0, 1 / 16, 1 / 2.25, 1, 1, 1], dtype=torch.float64)
    assert torch.allclose(slope, right, rtol=1e-15)
    soft = decay_rates(a.detach().float(), "softplus", 1e-4)
    assert torch.allclose(soft[1:], -F.softplus(a.detach().float())[1:], rtol=1e-6)
    assert soft[0] == -1e-4
    assert decay_rates(a.detach().bfloat16(), "softplus", 0.0).dtype == torch.float32


@pytest.mark.parametrize("dropped", ["trapezoid", "bc_bias", "rope_fraction"])
def test_ablations_leave_out_their_weights_and_change_the_model(dropped: str) -> None:
    whole, less = tiny("mamba3"), tiny("mamba3", **{dropped: 0 if "rope" in dropped else False})
    models = [randomize_(Mamba3ForCausalLM(c)) for c in (whole, less)]  # pyright: ignore
    counts = [m.backbone.layers[0].mixer.in_proj.out_features for m in models]  # pyright: ignore
    fewer = {"trapezoid": 8, "bc_bias": 0, "rope_fraction": 2}[dropped]
    assert counts[0] - counts[1] == fewer
    names = [{name for name, _ in m.named_parameters()} for m in models]
    gone = {name.rpartition(".")[2] for name in names[0] - names[1]}
    assert gone == ({"B_bias", "C_bias"} if dropped == "bc_bias" else set())
