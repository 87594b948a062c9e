"""Config of Mamba-2 models, in transformers' `mamba2` format."""

from huggingface_hub.dataclasses import strict
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as NativeMamba2Config

from ssm_hf.models.configuration import NativeConfigMixin


@strict
class Mamba2Config(NativeConfigMixin, NativeMamba2Config):
    """transformers' `Mamba2Config`, its fields and defaults, and one of our own.

    The defaults are upstream's, those of Codestral-Mamba; the state-spaces models have n_groups=1,
    tied embeddings and hidden_size * expand / head_dim heads. `chunk_size` bounds the chunks of the
    scan and does not change results beyond rounding.

    Args:
        initialization: `"mamba_ssm"` (the recipe the models were trained with: linear layers
            uniform in ±1/sqrt(fan_in), embeddings of standard deviation 0.02, A uniform in [1, 16],
            out_proj divided by the root of the number of layers) or `"transformers"` (normal with
            standard deviation `initializer_range`, A = 1..H; out_proj divided only with
            `rescale_prenorm_residual`).

    Raises:
        ValueError (from a validator: inside huggingface_hub's StrictDataclassError):
            an unknown argument, an option of mamba_ssm that this format cannot express (d_ssm,
            norm_before_gate, D_has_hdim, ...), or values that contradict one another.
    """

    initialization: str = "mamba_ssm"

    def validate_architecture(self) -> None:
        """Run by the constructor and by `from_dict`."""
        NativeMamba2Config.validate_architecture(self)
        NativeConfigMixin.validate_architecture(self)
        for name in ("num_heads", "head_dim", "n_groups", "chunk_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_heads % self.n_groups:
            raise ValueError(
                f"n_groups must divide num_heads, got n_groups={self.n_groups}, "
                f"num_heads={self.num_heads}"
            )
        limit = self.time_step_limit
        if len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
            raise ValueError(
                f"time_step_limit must be (lowest, highest) with 0 <= lowest <= highest, "
                f"got {self.time_step_limit}"
            )
