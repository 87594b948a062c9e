"""Taipan."""

from ssm_hf.models.taipan.configuration_taipan import TaipanConfig
from ssm_hf.models.taipan.modeling_taipan import (
    TaipanForCausalLM,
    TaipanModel,
    TaipanPreTrainedModel,
)

__all__ = ["TaipanConfig", "TaipanForCausalLM", "TaipanModel", "TaipanPreTrainedModel"]
