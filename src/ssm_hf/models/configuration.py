"""Checks shared by all configs, and those of formats that transformers owns.

Such a config keeps upstream's fields and defaults. Upstream stores any unknown keyword and ignores
it; here a constructor refuses one, and a file is refused where it asks for a model that the format
cannot express. Other keys of a file are kept, as upstream does.
"""

import difflib
import logging
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig

logger = logging.getLogger("ssm_hf")

# mamba_ssm options that change the computation and have no place in transformers' mamba formats,
# with the values that mean "not used".
INEXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "d_ssm": (None,),
    "D_has_hdim": (False,),
    "rmsnorm": (True,),
    "rms_norm": (True,),
    "norm_before_gate": (False,),
    "d_intermediate": (0,),
    "attn_layer_idx": ([], ()),
}
# Older transformers wrote these into mamba2 files whatever the model was, and never read them.
_WRITTEN_BUT_NEVER_READ = ("norm_before_gate", "rms_norm")

_BASE_KEYWORDS = {
    *("torch_dtype", "name_or_path", "num_labels", "output_attentions", "model_type"),
    *("attn_implementation", "experts_implementation", "per_layer_config", "auto_map"),
    *("quantization_config", "tokenizer_class", "use_cache"),
}


class NativeConfigMixin(PreTrainedConfig):
    """Adds the checks above to a config class of transformers."""

    # Trainer gathers what is left of an output: the logits, and hidden states where asked for.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("past_key_values", "aux_loss", "z_loss", "router_logits", "router_statistics"),
        *("capacity_loss", "gate_fractions", "gates"),
    ]
    _derived = ()
    _inexpressible: ClassVar[dict[str, Any]] = INEXPRESSIBLE

    def __post_init__(self, **kwargs: Any) -> None:
        fields = set(type(self).__dataclass_fields__)
        known = fields | _BASE_KEYWORDS | set(GenerationConfig._get_default_generation_params())
        for key, value in kwargs.items():
            if key in known or key.startswith("_"):
                continue
            name = type(self).__name__
            if key in self._inexpressible:
                raise ValueError(
                    f"{name} got {key}={value!r}, which the {self.model_type!r} format cannot "
                    "express; transformers would ignore it and run another model"
                )
            close = difflib.get_close_matches(key, sorted(fields), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{name} got an unknown argument {key}={value!r}{hint}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from the content of a config.json; keys of no field are kept as attributes.

        Raises:
            ValueError: the file is in mamba_ssm's format, of another type, or asks for a model that
                this format cannot express.
        """
        if "d_model" in config_dict and "hidden_size" not in config_dict:
            raise ValueError(
                "config.json is in mamba_ssm's own format (it has d_model, not hidden_size): "
                "convert the checkpoint with `python -m ssm_hf.convert SRC DST`"
            )
        other = config_dict.get("model_type", cls.model_type)
        if other != cls.model_type:
            raise ValueError(
                f"config.json is that of a model of type {other!r}, not {cls.model_type!r}"
            )
        for key, neutral in cls._inexpressible.items():
            value = config_dict.get(key, neutral[0])
            if value in neutral:
                continue
            if key in _WRITTEN_BUT_NEVER_READ:
                logger.warning(
                    "config.json holds %s=%r, a key that transformers writes and never reads; "
                    "it is ignored here too",
                    key,
                    value,
                )
                continue
            raise ValueError(
                f"config.json asks for {key}={value!r}, which the {cls.model_type!r} format cannot "
                "express"
            )
        known = set(cls.__dataclass_fields__) | _BASE_KEYWORDS | set(cls._derived)
        known |= set(GenerationConfig._get_default_generation_params())
        foreign = {k: v for k, v in config_dict.items() if k not in known and k[0] != "_"}
        native = {k: v for k, v in config_dict.items() if k not in foreign}
        result = super().from_dict(native, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for key, value in foreign.items():
            setattr(config, key, value)
        config.validate_architecture()
        return result

    def validate_architecture(self) -> None:
        """What the formats of Mamba-1 and Mamba-2 require; subclasses add theirs."""
        check_positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "state_size",
                       "expand", "conv_kernel")  # fmt: skip
        check_choice(self, "hidden_act", ("silu", "swish"))
        check_choice(self, "initialization", ("mamba_ssm", "transformers"))
        check_time_steps(self)


def check_positive(config: Any, *names: str) -> None:
    """Raise `ValueError` unless the fields are at least 1."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_choice(config: Any, name: str, choices: tuple[Any, ...]) -> None:
    """Raise `ValueError` unless the field has one of the values."""
    value = getattr(config, name)
    if value not in choices:
        listed = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {listed}, got {value!r}")


def check_time_steps(config: Any) -> None:
    """Raise `ValueError` unless the bounds of the initial step sizes are in order."""
    low, high = config.time_step_min, config.time_step_max
    if not 0 < low <= high:
        raise ValueError(
            f"time_step_min and time_step_max must satisfy 0 < min <= max, got {low}, {high}"
        )
