"""Mamba-2."""

from ssm_hf.models.mamba2.configuration_mamba2 import Mamba2Config
from ssm_hf.models.mamba2.modeling_mamba2 import (
    Mamba2ForCausalLM,
    Mamba2Model,
    Mamba2PreTrainedModel,
)

__all__ = ["Mamba2Config", "Mamba2ForCausalLM", "Mamba2Model", "Mamba2PreTrainedModel"]
