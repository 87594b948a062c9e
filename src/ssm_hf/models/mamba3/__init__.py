"""Mamba-3."""

from ssm_hf.models.mamba3.configuration_mamba3 import ASSUMED_ACTIVATION, Mamba3Config
from ssm_hf.models.mamba3.modeling_mamba3 import (
    Mamba3ForCausalLM,
    Mamba3Model,
    Mamba3PreTrainedModel,
)

__all__ = [
    "ASSUMED_ACTIVATION",
    "Mamba3Config",
    "Mamba3ForCausalLM",
    "Mamba3Model",
    "Mamba3PreTrainedModel",
]
