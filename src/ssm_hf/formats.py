"""Configs and weight names of other libraries' checkpoints, and ours for them.

mamba_ssm (state-spaces/mamba-*, mamba2-*, mamba3-*) has a format of its own; flash-linear-attention
has another reading of `mamba3`. Parameters inside the mixers have the same names everywhere.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ssm_hf.models.configuration import INEXPRESSIBLE
from ssm_hf.models.hybrid import HybridConfig, HybridForCausalLM
from ssm_hf.models.mamba import MambaConfig, MambaForCausalLM
from ssm_hf.models.mamba2 import Mamba2Config, Mamba2ForCausalLM
from ssm_hf.models.mamba3 import ASSUMED_ACTIVATION, Mamba3Config, Mamba3ForCausalLM

logger = logging.getLogger("ssm_hf")

OurConfig = MambaConfig | Mamba2Config | Mamba3Config | HybridConfig
MODELS: dict[type[OurConfig], Any] = {
    MambaConfig: MambaForCausalLM,
    Mamba2Config: Mamba2ForCausalLM,
    Mamba3Config: Mamba3ForCausalLM,
    HybridConfig: HybridForCausalLM,
}

# Top level of mamba_ssm's config.json and its defaults; older files lack some fields.
_FIELDS: dict[str, Any] = {
    "d_model": None,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
_FIELDS_WITHOUT_EFFECT = ("architectures", "model_type", "torch_dtype", "dtype")

# mamba_ssm's name of a mixer option -> (field of our config, mamba_ssm's default).
_Options = dict[str, tuple[str, Any]]
_STEP_SIZES: _Options = {
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
}
_CONVOLUTION: _Options = {
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    **_STEP_SIZES,
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
}
_OPTIONS: dict[str, _Options] = {
    "Mamba1": {
        **_CONVOLUTION,
        "d_state": ("state_size", 16),
        "dt_rank": ("time_step_rank", "auto"),
        "dt_scale": ("time_step_scale", 1.0),
        "dt_init": ("time_step_init_scheme", "random"),
    },
    "Mamba2": {
        **_CONVOLUTION,
        "d_state": ("state_size", 128),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 1),
        "chunk_size": ("chunk_size", 256),
        "dt_limit": ("time_step_limit", (0.0, float("inf"))),
    },
    "Mamba3": {
        "expand": ("expand", 2),
        **_STEP_SIZES,
        "d_state": ("state_size", 128),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 1),
        "chunk_size": ("chunk_size", 64),
        "rope_fraction": ("rope_fraction", 0.5),
        "A_floor": ("A_floor", 1e-4),
        "A_activation": ("A_activation", None),
        "is_outproj_norm": ("output_norm", False),
        "is_mimo": ("is_mimo", False),
        "mimo_rank": ("mimo_rank", 4),
    },
}
# Of Mamba-2, only as blocks of a hybrid.
_MAMBA2_AS_BLOCK: _Options = {
    "d_ssm": ("d_ssm", None),
    "D_has_hdim": ("D_per_channel", False),
    "rmsnorm": ("norm", True),
    "norm_before_gate": ("norm_before_gate", False),
}
# Of the attention layers among them, attn_cfg.
_ATTENTION: _Options = {
    "num_heads": ("num_heads", None),
    "num_heads_kv": ("num_kv_heads", None),
    "head_dim": ("head_dim", None),
    "softmax_scale": ("scaling", None),
    "d_conv": ("conv_kernel", 0),
    "rotary_emb_dim": ("rotary_dim", 0),
    "rotary_emb_base": ("rope_theta", 10000.0),
    "qkv_proj_bias": ("use_bias", True),
    "out_proj_bias": ("use_out_bias", True),
}
# The only values of other options of attn_cfg.
_ATTENTION_FIXED = {"causal": True, "mlp_dim": 0, "rotary_emb_interleaved": False}
# What mamba_ssm calls the mixer of the models that it has too.
LAYERS: dict[type[OurConfig], str] = {
    MambaConfig: "Mamba1",
    Mamba2Config: "Mamba2",
    Mamba3Config: "Mamba3",
}
# Choice of kernel, placement, or initial values that the checkpoint's own weights replace.
_OPTIONS_WITHOUT_EFFECT = {
    *("use_fast_path", "use_mem_eff_path", "process_group", "sequence_parallel"),
    *("device", "dtype", "layer_idx", "conv_init", "A_init_range"),
    *("fuse_pregate_headwise_norm", "n_layer", "dropout"),
}
# flash-linear-attention's fields of Mamba-3 that we call by another name, and their defaults.
_FLA_RENAMED: _Options = {
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "is_outproj_norm": ("output_norm", False),
    **_STEP_SIZES,
}
# Those with our names, with defaults that are not ours.
_FLA_DEFAULTS = {
    "vocab_size": 32000,
    "num_hidden_layers": 48,
    "mimo_rank": 4,
    "rescale_prenorm_residual": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FLA_WITHOUT_EFFECT = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "num_heads"),
    *("fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),
}
_RENAMED = {"backbone.embedding.weight": "backbone.embeddings.weight"}
_EMBEDDING, _HEAD = "backbone.embeddings.weight", "lm_head.weight"
# Formats that need no conversion: transformers', and ours.
_NATIVE, _OWN = ("mamba", "mamba2", "jamba"), ("mamba3", "ssm_hybrid", "taipan")
# Of GPT-NeoX's tokenizer, with which mamba_ssm's Mamba-1 and Mamba-2 were trained.
END_OF_TEXT = 0
# Of Llama 3's, with which its Mamba-3 was trained.
LLAMA_BEGIN, LLAMA_END = 128000, 128001


def convert_config(
    source: Mapping[str, Any], origin: str = "config.json", A_activation: str | None = None
) -> OurConfig:
    """Our config of the model that another library's config.json describes.

    Args:
        source: content of the file; missing fields have that library's defaults.
        origin: path of the file, for messages.
        A_activation: of Mamba-3's rates, in place of what the file says; of no other model.

    Returns:
        A config of ours; its vocab_size is the padded one, and where the file has no token ids they
        are those of the tokenizer that the released models were trained with.

    Raises:
        ValueError: neither mamba_ssm's format nor flash-linear-attention's Mamba-3, an unknown
            option, or one that our formats cannot express.
    """
    if "d_model" in source:
        return _from_mamba_ssm(source, origin, A_activation)
    kind = source.get("model_type")
    if kind == "mamba3" and source.keys() & {"is_mimo", "norm_eps", "fuse_norm"}:
        return _from_fla(source, origin, A_activation)
    if kind in (*_NATIVE, *_OWN) and "hidden_size" in source:
        whose = "our" if kind in _OWN else "transformers'"
        raise ValueError(
            f"{origin} is in {whose} {kind!r} format already: there is "
            "nothing to convert, load the directory with from_pretrained"
        )
    raise ValueError(f"{origin} is not a mamba_ssm config: it has no d_model")


def _from_mamba_ssm(source: Mapping[str, Any], origin: str, A_activation: str | None) -> OurConfig:
    known = {*_FIELDS, *_FIELDS_WITHOUT_EFFECT}
    for key, value in source.items():
        if key not in known and key[:1] != "_":
            raise ValueError(f"{origin}: unknown option {key}={value!r}; known are {list(_FIELDS)}")
    fields = {**_FIELDS, **source}
    options = fields["ssm_cfg"]
    if not isinstance(options, Mapping):
        raise ValueError(f"{origin}: ssm_cfg must be an object, got {options!r}")
    layer = options.get("layer", "Mamba1")
    if layer not in _OPTIONS:
        raise ValueError(f"{origin}: ssm_cfg has layer={layer!r}, supported are {list(_OPTIONS)}")
    if A_activation is not None and layer != "Mamba3":
        raise ValueError(f"{origin}: A_activation={A_activation!r} is not an option of {layer}")
    _refuse_inexpressible("rms_norm", fields["rms_norm"], origin)
    hybrid = bool(fields["attn_layer_idx"]) or (layer != "Mamba3" and fields["d_intermediate"] != 0)

    table = _OPTIONS[layer]
    for key, value in options.items():
        if key in table or key in _OPTIONS_WITHOUT_EFFECT or key == "layer":
            continue
        if layer == "Mamba2" and key in _MAMBA2_AS_BLOCK:
            # All inner channels by another name.
            whole = key == "d_ssm" and value == options.get("expand", 2) * fields["d_model"]
            hybrid |= not whole and value not in INEXPRESSIBLE[key]
            continue
        raise ValueError(
            f"{origin}: ssm_cfg has an unknown option {key}={value!r} of {layer}; "
            f"known are {sorted(table)}"
        )
    values = {ours: options.get(key, default) for key, (ours, default) in table.items()}
    sizes = {key: fields[key] for key in ("d_model", "n_layer", "vocab_size")}
    sizes["pad_vocab_size_multiple"] = multiple = fields["pad_vocab_size_multiple"]
    sizes |= {key: values[table[key][0]] for key in ("expand", "headdim") if key in table}
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{origin}: {key} must be a positive integer, got {value!r}")
    values |= {
        "vocab_size": -(-fields["vocab_size"] // multiple) * multiple,
        "hidden_size": fields["d_model"],
        "num_hidden_layers": fields["n_layer"],
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": fields["residual_in_fp32"],
        "tie_word_embeddings": fields["tie_embeddings"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT),
    }
    if hybrid:
        return _hybrid_from_mamba_ssm(fields, layer, values, origin, A_activation)
    inner = values["expand"] * fields["d_model"]
    if "head_dim" in values and inner % values["head_dim"]:
        raise ValueError(
            f"{origin}: headdim={values['head_dim']} does not divide expand * d_model = {inner}"
        )
    if layer == "Mamba3":
        values["intermediate_size"] = fields["d_intermediate"]
        if values["vocab_size"] > LLAMA_END:
            values |= {"bos_token_id": LLAMA_BEGIN, "eos_token_id": LLAMA_END}
            values["pad_token_id"] = LLAMA_END
        values = _mamba3_values(values, origin, A_activation or values["A_activation"])
        return _built(Mamba3Config, values, origin)
    if layer == "Mamba1":
        return _built(MambaConfig, values, origin)
    return _built(Mamba2Config, {"num_heads": inner // values["head_dim"], **values}, origin)


def _hybrid_from_mamba_ssm(
    fields: Mapping[str, Any],
    layer: str,
    values: Mapping[str, Any],
    origin: str,
    A_activation: str | None,
) -> OurConfig:
    """Attention among the layers, MLPs behind them, or options that no other format has."""
    kind, options, layers = layer.lower(), fields["ssm_cfg"], fields["n_layer"]
    mixer = {name: values[name] for name, _ in _OPTIONS[layer].values()}
    if layer == "Mamba1" and mixer["time_step_rank"] == "auto":
        mixer["time_step_rank"] = None
    if layer == "Mamba2":
        mixer |= {name: options.get(key, d) for key, (name, d) in _MAMBA2_AS_BLOCK.items()}
        if tuple(mixer["time_step_limit"]) == (0.0, float("inf")):
            mixer["time_step_limit"] = None
    if layer == "Mamba3":
        mixer = _mamba3_values(mixer, origin, A_activation or mixer["A_activation"])
    by_kind: dict[str, Any] = {kind: mixer}
    places = fields["attn_layer_idx"]
    if not isinstance(places, list | tuple):
        raise ValueError(f"{origin}: attn_layer_idx must be a list, got {places!r}")
    if places:
        if any(i not in range(layers) for i in places) or len(set(places)) != len(places):
            raise ValueError(
                f"{origin}: attn_layer_idx must name layers from 0 to {layers - 1} once each, got "
                f"{places}"
            )
        given = fields["attn_cfg"]
        if not isinstance(given, Mapping):
            raise ValueError(f"{origin}: attn_cfg must be an object, got {given!r}")
        for key, value in given.items():
            if key in _ATTENTION_FIXED and value == _ATTENTION_FIXED[key]:
                continue
            if key not in _ATTENTION:
                raise ValueError(
                    f"{origin} asks for {key}={value!r} in attn_cfg, which our formats cannot "
                    f"express; known are {sorted(_ATTENTION)}"
                )
        if "num_heads" not in given:
            raise ValueError(f"{origin}: attn_cfg must say num_heads")
        if not given.get("causal", False):
            raise ValueError(
                f"{origin}: attn_cfg must have causal=true, or it is no language model"
            )
        by_kind["attention"] = {name: given.get(key, d) for key, (name, d) in _ATTENTION.items()}
    blocks = []
    for index in range(layers):
        blocks.append("attention" if index in places else kind)
        if fields["d_intermediate"]:
            blocks.append("mlp")
            by_kind["mlp"] = {"intermediate_size": fields["d_intermediate"]}
    named = {name: values[name] for name in values if name in _HYBRID_FIELDS}
    return _built(HybridConfig, {**named, "blocks": blocks, "options": by_kind}, origin)


_HYBRID_FIELDS = {field.name for field in dataclasses.fields(HybridConfig)}


def _from_fla(source: Mapping[str, Any], origin: str, A_activation: str | None) -> OurConfig:
    """flash-linear-attention's Mamba-3: softplus rates and no MLP."""
    ours = {field.name for field in dataclasses.fields(Mamba3Config)} | {"is_mimo"}
    values: dict[str, Any] = dict(_FLA_DEFAULTS)
    values |= dict(_FLA_RENAMED.values())
    for key, value in source.items():
        name = _FLA_RENAMED[key][0] if key in _FLA_RENAMED else key
        if key in _FLA_WITHOUT_EFFECT or key[:1] == "_":
            continue
        if name not in ours:
            raise ValueError(
                f"{origin}: unknown option {key}={value!r} of flash-linear-attention's Mamba-3"
            )
        values[name] = value
    values["intermediate_size"] = 0
    # It draws embeddings and linear layers from one normal distribution.
    values["initialization"] = "transformers"
    values = _mamba3_values(values, origin, A_activation or "softplus")
    return _built(Mamba3Config, values, origin)


def _mamba3_values(values: dict[str, Any], origin: str, activation: str | None) -> dict[str, Any]:
    """is_mimo and mimo_rank as one number; the activation, or what must be assumed of it."""
    mimo, rank = values.pop("is_mimo", False), values["mimo_rank"]
    if mimo and rank == 1:
        raise ValueError(
            f"{origin}: is_mimo with mimo_rank=1 has weights mimo_x, mimo_z and mimo_o for a "
            "single stream, which our mamba3 format cannot express"
        )
    if activation is None:
        activation = ASSUMED_ACTIVATION
        logger.warning(
            "%s does not state the activation of Mamba-3's rates; mamba_ssm changed it in 2026. "
            "Assumed is the newer one, %r. If the loss on text is far too high, convert with "
            '--A_activation softplus, or write "A_activation": "softplus" into the new config.json',
            origin,
            activation,
        )
    return {**values, "mimo_rank": rank if mimo else 1, "A_activation": activation}


def _built(kind: Any, values: dict[str, Any], origin: str) -> OurConfig:
    try:
        return kind(**values)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{origin}: {error}") from error


def _refuse_inexpressible(key: str, value: Any, origin: str) -> None:
    if value not in INEXPRESSIBLE[key]:
        raise ValueError(f"{origin} asks for {key}={value!r}, which our formats cannot express")


def to_mamba_ssm(config: OurConfig, origin: str = "config.json") -> dict[str, Any]:
    """mamba_ssm's config.json of a model of ours.

    Mamba-3's activation of the rates is written too; mamba_ssm ignores the key.

    Raises:
        ValueError: the model has an option that mamba_ssm has not; it is named.
    """
    if type(config) not in LAYERS:
        raise ValueError(
            f"{origin}: the way back to mamba_ssm is not made for {config.model_type!r}"
        )
    layer = LAYERS[type(config)]
    values = {**config.to_dict(), "is_mimo": getattr(config, "mimo_rank", 1) > 1}
    options = {key: values[ours] for key, (ours, _) in _OPTIONS[layer].items()}
    written = {
        "d_model": config.hidden_size,
        "d_intermediate": values["intermediate_size"] if layer == "Mamba3" else 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer, **options},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }
    again = convert_config(written, origin).to_dict()
    told = {"hidden_act", *_UNTOLD} | {name for name in values if name.endswith("token_id")}
    lost = [
        f"{name}={values[name]!r}" for name in again if name not in told
        and values[name] != again[name]
    ]  # fmt: skip
    if lost:
        raise ValueError(f"{origin}: mamba_ssm cannot express {', '.join(lost)}")
    return written


# Of our configs, what says nothing about a trained model's computation.
_UNTOLD = (
    *("initialization", "initializer_range", "rescale_prenorm_residual", "residuals_per_layer"),
    *("architectures", "dtype", "transformers_version", "use_cache"),
    *("use_mambapy", "use_associative_scan", "_name_or_path", "is_mimo"),
)


def convert_state_dict(
    source: Mapping[str, Tensor], config: OurConfig, origin: str = "checkpoint"
) -> dict[str, Tensor]:
    """Weights under our names; the tensors themselves are the same objects.

    Args:
        source: another library's state dict.
        config: from `convert_config`.
        origin: where the weights come from, for messages.

    Returns:
        All weights of the model, without lm_head.weight where it is tied to the embedding.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; or lm_head.weight should be
            tied and differs from the embedding.
    """
    with torch.device("meta"):
        model = MODELS[type(config)](config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renamed = {**_RENAMED, **(_split_layers(source) if isinstance(config, HybridConfig) else {})}
    weights = {
        renamed.get(name, name): tensor
        for name, tensor in source.items()
        if not name.endswith("rotary_emb.inv_freq")  # a constant that some files hold
    }
    if config.tie_word_embeddings:
        del expected[_HEAD]
        head = weights.pop(_HEAD, None)
        if head is not None and _EMBEDDING in weights and not _same(head, weights[_EMBEDDING]):
            raise ValueError(
                f"{origin}: tie_embeddings is true, but {_HEAD} differs from "
                "backbone.embedding.weight"
            )
    old_names = {} if _EMBEDDING in source else {new: old for old, new in renamed.items()}
    for what, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("has unexpected", weights.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(old_names.get(name, name) for name in names))
            raise ValueError(f"{origin} {what} {len(names)} weights for its config.json: {listed}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            padded = " (vocab_size padded to pad_vocab_size_multiple rows)"
            raise ValueError(
                f"{origin}: {old_names.get(name, name)} has shape {tuple(weights[name].shape)}, "
                f"but config.json asks for {shape}{padded if name in (_EMBEDDING, _HEAD) else ''}"
            )
    return weights


def _split_layers(source: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of layers with an MLP, {theirs: ours}: two blocks of ours each."""
    found = [(name, _LAYER.fullmatch(name)) for name in source]
    if not any(match and match[2] == "norm2" for _, match in found):
        return {}
    renamed = {}
    for name, match in found:
        if match is not None:
            second = match[2] in ("norm2", "mlp")
            part = {"norm2": "norm", "mlp": "mixer"}.get(match[2], match[2])
            renamed[name] = f"backbone.layers.{2 * int(match[1]) + second}.{part}.{match[3]}"
    return renamed


_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(norm2|norm|mixer|mlp)\.(.+)")


def state_dict_of_mamba_ssm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under mamba_ssm's names, which hold a tied head a second time."""
    old_names = {new: old for old, new in _RENAMED.items()}
    theirs = {old_names.get(name, name): tensor for name, tensor in weights.items()}
    return {**theirs, _HEAD: weights.get(_HEAD, weights[_EMBEDDING])}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
