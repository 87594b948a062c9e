"""Models of any pattern of blocks."""

from ssm_hf.models.hybrid.configuration_hybrid import HybridConfig
from ssm_hf.models.hybrid.modeling_hybrid import (
    HybridForCausalLM,
    HybridModel,
    HybridPreTrainedModel,
)
from ssm_hf.models.hybrid.patterns import expand_pattern

__all__ = [
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "HybridPreTrainedModel",
    "expand_pattern",
]
