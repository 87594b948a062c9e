"""Config of Mamba-1 models, in transformers' `mamba` format."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.mamba.configuration_mamba import MambaConfig as NativeMambaConfig

from ssm_hf.models.configuration import NativeConfigMixin


@strict
class MambaConfig(NativeConfigMixin, NativeMambaConfig):
    """transformers' `MambaConfig`, its fields and defaults, and one of our own.

    `use_mambapy` and `use_associative_scan` choose between transformers' own code paths and are
    kept for the file's sake.

    Args:
        initialization: `"mamba_ssm"` (the recipe the models were trained with: linear layers
            uniform in ±1/sqrt(fan_in), embeddings of standard deviation 0.02, out_proj divided by
            the root of the number of layers) or `"transformers"` (normal with standard deviation
            `initializer_range`; out_proj divided only with `rescale_prenorm_residual`).

    Raises:
        ValueError (from a validator: inside huggingface_hub's StrictDataclassError):
            an unknown argument, or values that contradict one another.
    """

    initialization: str = "mamba_ssm"
    _derived = ("intermediate_size",)

    def __post_init__(self, **kwargs: Any) -> None:
        inner = kwargs.pop("intermediate_size", None)
        super().__post_init__(**kwargs)
        if inner is not None and inner != self.intermediate_size:
            raise ValueError(
                f"intermediate_size={inner} contradicts expand * hidden_size = "
                f"{self.intermediate_size}"
            )

    def validate_architecture(self) -> None:
        """Run by the constructor and by `from_dict`."""
        super().validate_architecture()
        if self.time_step_init_scheme not in ("random", "constant"):
            raise ValueError(
                'time_step_init_scheme must be "random" or "constant", '
                f"got {self.time_step_init_scheme!r}"
            )
        if int(self.time_step_rank) < 1:
            raise ValueError(f"time_step_rank must be at least 1, got {self.time_step_rank}")
