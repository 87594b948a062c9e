"""State-space language models for Hugging Face."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ssm_hf.cache import CacheSnapshot, RecurrentCache, RecurrentLayer
from ssm_hf.models.hybrid import HybridConfig, HybridForCausalLM, HybridModel, expand_pattern
from ssm_hf.models.jamba import JambaConfig, JambaForCausalLM, JambaModel
from ssm_hf.models.mamba import MambaConfig, MambaForCausalLM, MambaModel
from ssm_hf.models.mamba2 import Mamba2Config, Mamba2ForCausalLM, Mamba2Model
from ssm_hf.models.mamba3 import Mamba3Config, Mamba3ForCausalLM, Mamba3Model
from ssm_hf.models.taipan import TaipanConfig, TaipanForCausalLM, TaipanModel
from ssm_hf.ops import (
    ImplementationUnavailableError,
    NarrowWeights,
    compile_ahead,
    implementation,
    implementations,
    keep_activations,
    print_implementations,
)
from ssm_hf.sequence import SequenceInfo
from ssm_hf.tokenizer import byte_tokenizer

__version__ = "0.1.0"

__all__ = [
    "CacheSnapshot",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "ImplementationUnavailableError",
    "JambaConfig",
    "JambaForCausalLM",
    "JambaModel",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2Model",
    "Mamba3Config",
    "Mamba3ForCausalLM",
    "Mamba3Model",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaModel",
    "NarrowWeights",
    "RecurrentCache",
    "RecurrentLayer",
    "SequenceInfo",
    "TaipanConfig",
    "TaipanForCausalLM",
    "TaipanModel",
    "byte_tokenizer",
    "compile_ahead",
    "expand_pattern",
    "implementation",
    "implementations",
    "keep_activations",
    "print_implementations",
    "register",
]

# Types that transformers has classes for too: taken over on request only.
_NATIVE = (
    (MambaConfig, MambaModel, MambaForCausalLM),
    (Mamba2Config, Mamba2Model, Mamba2ForCausalLM),
    (JambaConfig, JambaModel, JambaForCausalLM),
)
_OWN = (
    (Mamba3Config, Mamba3Model, Mamba3ForCausalLM),
    (HybridConfig, HybridModel, HybridForCausalLM),
    (TaipanConfig, TaipanModel, TaipanForCausalLM),
)


def register(*, override: bool = False) -> None:
    """Let transformers' Auto classes use our models.

    Model types of our own (`mamba3`, `ssm_hybrid`, `taipan`) are registered by the import already,
    unless another library has taken the name before. With `override=True`, `AutoConfig`,
    `AutoModel` and `AutoModelForCausalLM` take our classes in this process, for the types that
    transformers has itself, `mamba`, `mamba2` and `jamba`, too; without it nothing changes for
    others.
    """
    for classes in _OWN:
        if override or classes[0].model_type not in CONFIG_MAPPING:
            _register(*classes)
    for classes in _NATIVE:
        if override:
            _register(*classes)


def _register(config: Any, model: Any, causal_lm: Any) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


register()
