"""Our models against transformers' own `mamba` and `mamba2` on equal weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor, nn

import ssm_hf
from tests.helpers import randomize_, relative_error, tiny

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="parity is with 5.23; earlier torch paths assign Mamba-2's groups to other heads",
)

OURS = {
    "mamba": ssm_hf.MambaForCausalLM,
    "mamba2": ssm_hf.Mamba2ForCausalLM,
    "jamba": ssm_hf.JambaForCausalLM,
}
THEIRS = {
    "mamba": transformers.MambaForCausalLM,
    "mamba2": transformers.Mamba2ForCausalLM,
    "jamba": transformers.JambaForCausalLM,
}

# tiny() already has 2 groups and chunks of 4, so that 13 tokens are 3 chunks and a ragged tail.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "mamba-biases": ("mamba", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}),
    "mamba-untied": (
        "mamba",
        {"tie_word_embeddings": False, "residual_in_fp32": False, "time_step_rank": 3, "expand": 3},
    ),
    "mamba2": ("mamba2", {}),
    "mamba2-biases": ("mamba2", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 2}),
    "mamba2-tied": (
        "mamba2",
        {"tie_word_embeddings": True, "residual_in_fp32": False, "n_groups": 1, "head_dim": 16,
         "num_heads": 4, "layer_norm_epsilon": 1e-3},
    ),
    # Between the two bounds lie some of the randomised step sizes (around 0.05) and not all.
    "mamba2-limit": ("mamba2", {"time_step_limit": (0.02, 0.06)}),
    "jamba": ("jamba", {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2,
                        "expert_layer_offset": 1}),
    "jamba-dense": ("jamba", {"num_experts": 1, "mamba_proj_bias": True}),
    "jamba-tied": (
        "jamba",
        {"num_experts_per_tok": 3, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)
# transformers feeds the bias of in_proj at pads into the convolution's window, and does not apply
# time_step_limit in a one-token step; ours do neither, so these cases are not comparable there.
without_biases = pytest.mark.parametrize(
    "case", [c for c in CASES if "biases" not in c and c != "jamba-dense"]
)
decodable = pytest.mark.parametrize(
    "case", ["mamba", "mamba-untied", "mamba2", "mamba2-tied", "jamba"]
)


def pair(case: str) -> tuple[Any, Any]:
    """(ours, theirs) with the same random weights, in eval mode."""
    model_type, overrides = CASES[case]
    ours = randomize_(OURS[model_type](tiny(model_type, **overrides)))
    values = ours.config.to_dict()
    del values["initialization"]  # our one field of our own
    theirs = THEIRS[model_type](THEIRS[model_type].config_class.from_dict(values))  # pyright: ignore[reportOptionalMemberAccess]
    theirs.load_state_dict(ours.state_dict())
    theirs.tie_weights()
    if model_type == "jamba":
        theirs.set_attn_implementation("eager")
        theirs.set_experts_implementation("eager")  # the one that knows fp64
    return ours.eval(), theirs.eval()


def some_ids(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, 96, (batch, length))


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@each_case
@torch.no_grad()
def test_logits_and_every_layer_equal_transformers(case: str) -> None:
    ours, theirs = pair(case)
    ids = some_ids()
    a, b = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
    assert b.logits.abs().max() > 1  # the tolerance is absolute: it must mean something
    assert largest_difference(a.logits, b.logits) < 2e-5
    assert len(a.hidden_states) == len(b.hidden_states) == ours.config.num_hidden_layers + 1
    theirs_first = b.hidden_states
    if CASES[case][0] == "jamba":  # theirs are each layer's inputs, and the normalised last output
        theirs_first = (*b.hidden_states[1:-1], a.hidden_states[-2], b.hidden_states[-1])
    for layer, (x, y) in enumerate(zip(a.hidden_states, theirs_first, strict=True)):
        assert largest_difference(x, y) < 2e-5, f"layer {layer}"


@each_case
def test_loss_and_gradients_equal_transformers(case: str) -> None:
    ours, theirs = (model.train() for model in pair(case))
    ids = some_ids()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    losses = [model(ids, labels=labels).loss for model in (ours, theirs)]
    # Mean of some 20 logs of order 5, each good to fp32's 6e-7.
    assert largest_difference(*losses) < 5e-6
    for loss in losses:
        loss.backward()
    expected = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == expected.keys()
    for name, p in ours.named_parameters():
        assert p.grad is not None, name
        assert expected[name].grad.norm() > 0, name
        assert relative_error(p.grad, expected[name].grad) < 1e-4, name


@each_case
def test_fp64_equals_transformers_without_its_casts_to_fp32(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their norms and scans cast to fp32 by name, in any dtype: here the name means fp64."""
    ours, theirs = (model.double() for model in pair(case))
    ids = some_ids()
    weight = torch.randn(2, 13, 96, dtype=torch.float64)
    logits = ours(ids).logits
    (logits * weight).sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        reference = theirs(ids).logits
    (reference * weight).sum().backward()
    assert logits.dtype == reference.dtype == torch.float64
    assert largest_difference(logits, reference) < 1e-10
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, expected[name].grad) < 1e-10, name


@each_case
@torch.no_grad()
def test_bf16_equals_transformers(case: str, tmp_path: Path) -> None:
    ours, _ = pair(case)
    for p in ours.parameters():
        p.copy_(p.bfloat16())  # ours keeps A_log, D, dt_bias in fp32: same numbers in both
    ours.save_pretrained(tmp_path)
    model_type = CASES[case][0]
    a = OURS[model_type].from_pretrained(tmp_path, dtype=torch.bfloat16)
    b = THEIRS[model_type].from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = some_ids()
    exact, a, b = (model(ids).logits.float() for model in (ours, a, b))
    if getattr(ours.config, "num_experts", 1) > 1:
        # Where two experts are level within a rounding, either may be chosen: such a token differs
        # wholly, and how many there are is luck. All others stand for it.
        chosen = sorted(range(ids.numel()), key=lambda t: float((a - b).flatten(0, 1)[t].norm()))
        exact, a, b = (v.flatten(0, 1)[chosen[: 3 * len(chosen) // 4]] for v in (exact, a, b))
    # Relative: the rounding of bf16 (4e-3) in each of 3 layers, seen by logits up to 5.
    assert relative_error(a, b) < 3e-2
    # Computing more in fp32 than they do must not make it worse.
    assert relative_error(a, exact) < 1.2 * relative_error(b, exact)


@without_biases
@torch.no_grad()
def test_left_padded_batch_equals_transformers_at_real_tokens(case: str) -> None:
    ours, theirs = pair(case)
    ids = some_ids(3)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0
    real = mask.bool()
    a, b = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    assert largest_difference(a[real], b[real]) < 2e-5


@decodable
@pytest.mark.parametrize("num_beams", [1, 3])
def test_greedy_and_beam_tokens_equal_transformers(case: str, num_beams: int) -> None:
    ids = some_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :2], mask[2, :5] = 0, 0
    ids[mask == 0] = 0
    tokens = []
    for model in pair(case):
        model.generation_config.eos_token_id = None  # so that all 20 tokens are compared
        model.generation_config.pad_token_id = 0
        tokens.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=20, do_sample=False, num_beams=num_beams
            )
        )
    assert tokens[0].shape == (3, 29)
    assert torch.equal(tokens[0], tokens[1])


def written(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, config) of a saved model, without the version that wrote it."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    return tensors, config


@each_case
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_saved_files_survive_the_other_library(
    case: str, max_shard_size: str, first: str, tmp_path: Path
) -> None:
    ours, theirs = pair(case)
    model, other = (ours, type(theirs)) if first == "ours" else (theirs, type(ours))
    model.save_pretrained(tmp_path / "a", max_shard_size=max_shard_size)
    shards = list((tmp_path / "a").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size == "20KB")
    loaded, info = other.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values())
    loaded.save_pretrained(tmp_path / "b", max_shard_size=max_shard_size)

    (a, config_a), (b, config_b) = written(tmp_path / "a"), written(tmp_path / "b")
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name
    assert ("lm_head.weight" in a) == (not model.config.tie_word_embeddings)
    assert config_a["architectures"] == [THEIRS[CASES[case][0]].__name__]
    if first == "theirs":
        assert config_b.pop("initialization") == "mamba_ssm"
    assert config_a == config_b


_AUTO_CLASSES = """
import sys, transformers, ssm_hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

def chosen(folder):
    auto = (AutoConfig, AutoModel, AutoModelForCausalLM)
    return [type(a.from_pretrained(folder)).__module__.split(".")[0] for a in auto]

for folder in sys.argv[1:]:
    assert chosen(folder) == ["transformers"] * 3, chosen(folder)
ssm_hf.register()
for folder in sys.argv[1:]:
    assert chosen(folder) == ["transformers"] * 3, chosen(folder)
ssm_hf.register(override=True)
ssm_hf.register(override=True)
for folder in sys.argv[1:]:
    assert chosen(folder) == ["ssm_hf"] * 3, chosen(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert type(model).__module__.startswith("ssm_hf"), type(model)
print("all chosen as promised")
"""


def test_auto_classes_change_only_on_request(tmp_path: Path) -> None:
    folders = []
    for model_type in OURS:
        folders.append(str(tmp_path / model_type))
        pair(model_type)[1].save_pretrained(folders[-1])
    # In a process of its own: the registration lasts as long as the process.
    result = subprocess.run(
        [sys.executable, "-c", _AUTO_CLASSES, *folders], capture_output=True, text=True, check=False
    )
    assert "all chosen as promised" in result.stdout, result.stderr


# Layers, width and parameters of the released models (vocabulary 50280 and 50288, tied).
SIZES = {
    "mamba-130m": ("mamba", 24, 768, 129_135_360),
    "mamba-370m": ("mamba", 48, 1024, 371_516_416),
    "mamba-790m": ("mamba", 48, 1536, 793_204_224),
    "mamba-1.4b": ("mamba", 48, 2048, 1_372_178_432),
    "mamba-2.8b": ("mamba", 64, 2560, 2_768_345_600),
    "mamba2-130m": ("mamba2", 24, 768, 128_989_632),
    "mamba2-370m": ("mamba2", 48, 1024, 368_346_624),
    "mamba2-780m": ("mamba2", 48, 1536, 780_161_280),
    "mamba2-1.3b": ("mamba2", 48, 2048, 1_343_757_312),
    "mamba2-2.7b": ("mamba2", 64, 2560, 2_702_599_680),
    "jamba-v0.1": ("jamba", 32, 4096, 51_570_323_328),
    "jamba-1.5-large": ("jamba", 72, 8192, 398_555_145_696),
}


@pytest.mark.parametrize("name", SIZES)
def test_released_sizes_have_the_published_parameter_counts(name: str) -> None:
    model_type, layers, width, count = SIZES[name]
    sizes = {"num_hidden_layers": layers, "hidden_size": width}
    if model_type == "mamba":
        config = ssm_hf.MambaConfig(**sizes)
    elif model_type == "jamba":
        larger = {"intermediate_size": 24576, "num_attention_heads": 64} if layers == 72 else {}
        config = ssm_hf.JambaConfig(**sizes, **larger)
    else:
        config = ssm_hf.Mamba2Config(
            **sizes, vocab_size=50288, n_groups=1, num_heads=width // 32, tie_word_embeddings=True
        )
    with torch.device("meta"):
        model: nn.Module = OURS[model_type](config)
    assert sum(p.numel() for p in model.parameters()) == count
