"""What several test files share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

from ssm_hf import (
    HybridConfig,
    JambaConfig,
    Mamba2Config,
    Mamba3Config,
    MambaConfig,
    TaipanConfig,
)
from ssm_hf.cache import KVLayer, RecurrentLayer
from ssm_hf.layers.selection import SelectionGate

_TINY = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 16}


def tiny(model_type: str, **overrides: object) -> PreTrainedConfig:
    """A config of a few thousand parameters, with short chunks and several groups.

    `"mamba3-mimo"` is Mamba-3 with two streams and a norm of the outputs, `"taipan-selected"` is
    Taipan with keys of selected tokens, and rotation.
    """
    if model_type == "mamba":
        return MambaConfig(**{**_TINY, "state_size": 4, **overrides})
    if model_type.startswith("mamba3"):
        own = {"intermediate_size": 64, "head_dim": 8, "state_size": 8, "n_groups": 2,
               "chunk_size": 4}  # fmt: skip
        if model_type == "mamba3-mimo":
            own |= {"mimo_rank": 2, "output_norm": True}
        return Mamba3Config(**{**_TINY, **own, **overrides})
    if model_type == "ssm_hybrid":
        given = dict(overrides)
        mamba2 = {"head_dim": 8, "state_size": given.pop("state_size", 16), "n_groups": 2,
                  "chunk_size": 4}  # fmt: skip
        attention = {"num_heads": 4, "num_kv_heads": 2, "rotary_dim": 4, "conv_kernel": 4}
        window = {"num_heads": 4, "window": 5}
        options = {"mamba2": mamba2, "attention": attention, "sliding_attention": window}
        if given.pop("use_bias", False):
            for of_kind in options.values():
                of_kind["use_bias"] = True
        options["moe"] = {"num_experts": 4, "intermediate_size": 24}
        blocks = ["mamba2", "attention", "sliding_attention"][: given.pop("num_hidden_layers", 3)]
        sizes = {"vocab_size": 96, "hidden_size": 32, "blocks": blocks, "options": options}
        return HybridConfig(**{**sizes, **given})
    if model_type == "jamba":
        own = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
               "num_experts": 4, "expert_layer_offset": 0, "attn_layer_period": 3,
               "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 3}  # fmt: skip
        renamed = {"state_size": "mamba_d_state", "use_bias": "mamba_proj_bias"}
        given = {renamed.get(name, name): value for name, value in overrides.items()}
        sizes = {name: value for name, value in _TINY.items() if name != "state_size"}
        return JambaConfig(**{**sizes, **own, **given})
    if model_type.startswith("taipan"):
        # Noise and budget are functions of the batch, not of the tokens: switched off, so that
        # what holds for every model can be said of this one too. At least one layer attends.
        own = {"mamba_d_head": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4, "mamba_d_state": 16,
               "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
               "intermediate_size": 48, "sliding_window": 5, "gumbel_noise": 0.0,
               "capacity_loss_coef": 0.0, "capacity_loss_coef_start": 0.0}  # fmt: skip
        if model_type == "taipan-selected":
            own |= {"sal_kv_source": "selected", "sal_kv_budget": 3, "use_rope": True}
        renamed = {"state_size": "mamba_d_state", "use_bias": "mamba_proj_bias"}
        given = {renamed.get(name, name): value for name, value in overrides.items()}
        layers = max(given.pop("num_hidden_layers", 3), 2)
        sizes = {"vocab_size": 96, "hidden_size": 32, "num_mamba_layers": layers - 1,
                 "sal_period": layers - 1}  # fmt: skip
        return TaipanConfig(**{**sizes, **own, **given})
    heads = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
    return Mamba2Config(**{**_TINY, **heads, **overrides})


class Names(NamedTuple):
    """What a family calls its parts."""

    backbone: str = "backbone"
    embeddings: str = "embeddings"
    last_norm: str = "norm_f"
    mixer: str = "mixer"  # of the first layer


def names_of(model_type: str) -> Names:
    if model_type == "jamba" or model_type.startswith("taipan"):
        return Names("model", "embed_tokens", "final_layernorm", "mamba")
    return Names()


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter away from its default, so that no D = 1 or norm = 1 hides a mistake."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            value = 2 * torch.rand(p.shape, generator=generator)
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            value = draw(p.shape) - 3
        elif name.endswith(("norm.weight", "norm_f.weight")):
            value = 1 + 0.2 * draw(p.shape)
        elif name.endswith(".D"):
            value = draw(p.shape)
        else:
            value = 0.2 * draw(p.shape)
        p.copy_(value)
    return model


@torch.no_grad()
def decide_(model: nn.Module) -> nn.Module:
    """Let gates select every token by far: where they choose between two level scores, a rounding
    turns the choice, and another model runs."""
    for module in model.modules():
        if isinstance(module, SelectionGate):
            module.weight.mul_(0.1)
            module.bias.copy_(torch.tensor([-1.0, 1.0]))
    return model


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value - expected‖ / ‖expected‖, absolute where nothing is expected."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    value, expected = value.detach().to(wide), expected.detach().to(wide)
    return float((value - expected).norm()) / (float(expected.norm()) or 1.0)


def content(layer: RecurrentLayer) -> dict[str, Tensor]:
    """What a cache layer holds, the same for equal content: keys and values in order, by row."""
    if not isinstance(layer, KVLayer) or not layer.state:
        return layer.state
    held = {name: t for name, t in layer.state.items() if name not in layer.slotted}
    for row, length in enumerate(layer.state["length"].tolist()):
        first = 0 if layer.window is None else max(length - layer.window, 0)
        slots = torch.arange(first, length) % layer.slots
        for name in layer.slotted:
            held[f"{name} of row {row}"] = layer.state[name][row, slots]
    return held


def kernel_device() -> torch.device:
    """Where kernels run in tests: a GPU, or CPU tensors in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def auto_classes_restored() -> Iterator[None]:
    """Give later tests the Auto classes as they are now."""
    mappings = (
        configuration_auto.CONFIG_MAPPING,
        modeling_auto.MODEL_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    )
    before = [dict(mapping._extra_content) for mapping in mappings]
    yield
    for mapping, content in zip(mappings, before, strict=True):
        mapping._extra_content = content
