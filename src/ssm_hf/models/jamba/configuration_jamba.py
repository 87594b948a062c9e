"""Config of Jamba models, in transformers' `jamba` format."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.jamba.configuration_jamba import JambaConfig as NativeJambaConfig

from ssm_hf.layers.attention import check_attention
from ssm_hf.models.configuration import NativeConfigMixin, check_choice, check_positive
from ssm_hf.ops.moe import check_router


@strict
class JambaConfig(NativeConfigMixin, NativeJambaConfig):
    """transformers' `JambaConfig`, its fields and defaults, and one of our own.

    Mamba-1 layers, and attention without positions in every `attn_layer_period`-th; each is
    followed by a feed-forward network, every `expert_layer_period`-th of which is a mixture of
    experts, unless `num_experts` is 1. The same block with Mamba-2 or Mamba-3 is a pattern of
    `HybridConfig`. `use_mamba_kernels`, `use_mambapy` and `use_associative_scan` choose between
    transformers' own code paths and are kept for the file's sake.

    Args:
        initialization: `"mamba_ssm"` (linear layers uniform in ±1/sqrt(fan_in), embeddings of
            standard deviation 0.02, the last projections divided by the root of twice the layers)
            or `"transformers"` (normal with standard deviation `initializer_range`). Steps of the
            Mamba layers begin log-uniform in [0.001, 0.1] in both.

    Raises:
        ValueError (from a validator: inside huggingface_hub's StrictDataclassError):
            an unknown argument, or values that contradict one another.

    Source: Lieber et al. 2024 (Jamba), Jamba team 2024 (Jamba-1.5).
    """

    # Keys of older files, with the only values that they may have.
    _inexpressible: ClassVar[dict[str, tuple[Any, ...]]] = {
        "mamba_inner_layernorms": (True,),
        "sliding_window": (None,),
    }
    # Of our own wiring; no options of the format.
    residual_in_fp32 = False
    rescale_prenorm_residual = False
    residuals_per_layer = 2

    initialization: str = "mamba_ssm"

    def __post_init__(self, **kwargs: Any) -> None:
        # Before anything counts layers with them.
        check_positive(self, "attn_layer_period", "expert_layer_period")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Run by the constructor and by `from_dict`."""
        check_positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_experts", "mamba_d_state", "mamba_d_conv", "mamba_expand",
        )  # fmt: skip
        NativeJambaConfig.validate_architecture(self)
        for name in ("attn_layer_offset", "expert_layer_offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.router_aux_loss_coef < 0:
            raise ValueError(
                f"router_aux_loss_coef must be 0 or more, got {self.router_aux_loss_coef}"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout must lie in [0, 1), got {self.attention_dropout}")
        check_choice(self, "hidden_act", ("silu", "swish"))
        check_choice(self, "initialization", ("mamba_ssm", "transformers"))
        if int(self.mamba_dt_rank) < 1:
            raise ValueError(f"mamba_dt_rank must be at least 1, got {self.mamba_dt_rank}")
        heads = self.num_attention_heads
        if not hasattr(self, "head_dim") and (heads < 1 or self.hidden_size % heads):
            raise ValueError(
                f"num_attention_heads must divide hidden_size, got {heads} and {self.hidden_size}"
            )
        check_attention(heads, self.num_key_value_heads, self.attention_head_dim, None, 0)
        if self.num_experts > 1:
            check_router(self.num_experts, self.num_experts_per_tok)

    @property
    def attention_head_dim(self) -> int:
        """d of the attention layers."""
        own: int | None = getattr(self, "head_dim", None)
        return self.hidden_size // self.num_attention_heads if own is None else own
