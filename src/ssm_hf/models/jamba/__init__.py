"""Jamba."""

from ssm_hf.models.jamba.configuration_jamba import JambaConfig
from ssm_hf.models.jamba.modeling_jamba import JambaForCausalLM, JambaModel, JambaPreTrainedModel

__all__ = ["JambaConfig", "JambaForCausalLM", "JambaModel", "JambaPreTrainedModel"]
