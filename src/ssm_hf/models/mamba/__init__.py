"""Mamba-1."""

from ssm_hf.models.mamba.configuration_mamba import MambaConfig
from ssm_hf.models.mamba.modeling_mamba import MambaForCausalLM, MambaModel, MambaPreTrainedModel

__all__ = ["MambaConfig", "MambaForCausalLM", "MambaModel", "MambaPreTrainedModel"]
