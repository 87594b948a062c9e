"""State-space language models for Hugging Face."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ssm_hf.cache import CacheSnapshot, RecurrentCache, RecurrentLayer
from ssm_hf.models.mamba import MambaConfig, MambaForCausalLM, MambaModel
from ssm_hf.models.mamba2 import Mamba2Config, Mamba2ForCausalLM, Mamba2Model
from ssm_hf.ops import (
    ImplementationUnavailableError,
    compile_ahead,
    implementation,
    implementations,
    print_implementations,
)
from ssm_hf.sequence import SequenceInfo
from ssm_hf.tokenizer import byte_tokenizer

__version__ = "0.1.0"

__all__ = [
    "CacheSnapshot",
    "ImplementationUnavailableError",
    "Mamba2Config",
    "Mamba2ForCausalLM",
    "Mamba2Model",
    "MambaConfig",
    "MambaForCausalLM",
    "MambaModel",
    "RecurrentCache",
    "RecurrentLayer",
    "SequenceInfo",
    "byte_tokenizer",
    "compile_ahead",
    "implementation",
    "implementations",
    "print_implementations",
    "register",
]

# Types that transformers has classes for too: taken over on request only.
_NATIVE = (
    (MambaConfig, MambaModel, MambaForCausalLM),
    (Mamba2Config, Mamba2Model, Mamba2ForCausalLM),
)


def register(*, override: bool = False) -> None:
    """Let transformers' Auto classes use our models.

    Model types of our own are registered by the import already. With `override=True`, `AutoConfig`,
    `AutoModel` and `AutoModelForCausalLM` take our classes for the types that transformers has
    itself, `mamba` and `mamba2`, in this process; without it nothing changes for others.
    """
    if not override:
        return
    for config, model, causal_lm in _NATIVE:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
