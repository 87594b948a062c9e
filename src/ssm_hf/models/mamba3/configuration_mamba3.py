"""Config of Mamba-3 models."""

import logging
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ssm_hf.layers.mamba3 import check_mamba3
from ssm_hf.models.configuration import (
    NativeConfigMixin,
    check_choice,
    check_positive,
    check_time_steps,
)

logger = logging.getLogger("ssm_hf")

# What a checkpoint that does not say so was trained with, as far as can be known.
ASSUMED_ACTIVATION = "heavy_tail"
# Keys that flash-linear-attention writes into its files of this model_type, and we never do.
_OF_ANOTHER_LIBRARY = ("is_mimo", "is_outproj_norm", "norm_eps", "fuse_norm")


@strict
class Mamba3Config(NativeConfigMixin):
    """Mamba-3, one stream (SISO) or several (MIMO); letters as in docs/glossary.md.

    The defaults are those of the released 1.5B model with one stream. There is no convolution: the
    trapezoidal rule, which also weighs the token before, stands in its place.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: blocks, each a mixer and, unless `intermediate_size` is 0, a gated MLP.
        intermediate_size: inner width of the MLPs, rounded up to a multiple of 128; 0 = no MLP.
        expand: the mixer's inner width is I = expand * hidden_size.
        head_dim: P; H = I / P heads.
        state_size: N, states of each channel.
        n_groups: G, heads that share B and C: H / G.
        mimo_rank: R, streams of each head; 1 = SISO.
        rope_fraction: share of the N states that rotate, 0.5 or 1; 0 = none (an ablation, with real
            decays alone).
        rope_layout: which states rotate together: `"pairwise"`, (2i, 2i+1), or `"half"`, (i,
            i + N/2); default pairwise for SISO and half for MIMO, as the released weights have it.
        A_activation: of the rates, A = -f(a): `"heavy_tail"`, f = 1 + a above 0 and 1 / (1 - a)
            below, or `"softplus"`, as in earlier releases. Weights do not carry over.
        A_floor: no rate is slower than this.
        trapezoid: False is the exponential-Euler rule, which ignores the token before (an
            ablation).
        bc_bias: False leaves out the biases of B and C (an ablation).
        output_norm: norm of each head's output, before the gate.
        use_bias: biases of in_proj and out_proj.
        chunk_size: longest chunk of the scan; changes no result beyond rounding.
        time_step_min, time_step_max, time_step_floor: initial step sizes.
        layer_norm_epsilon: of all norms.
        hidden_act: `"silu"`.
        residual_in_fp32: keep the residual stream in fp32.
        initialization: `"mamba_ssm"` (the recipe the models were trained with: linear layers
            uniform in ±1/sqrt(fan_in), embeddings of standard deviation 0.02, the last projections
            of mixer and MLP divided by the root of `residuals_per_layer` times the layers) or
            `"transformers"` (normal with standard deviation `initializer_range`; divided only with
            `rescale_prenorm_residual`).
        initializer_range: see above.
        rescale_prenorm_residual: see above.
        residuals_per_layer: see above. 1 is what the released models began with, although a layer
            with an MLP adds to the stream twice.
        use_cache: return the state.
        tie_word_embeddings: the head is the embedding.
        bos_token_id, eos_token_id, pad_token_id: see transformers.

    Raises:
        ValueError (from a validator: inside huggingface_hub's StrictDataclassError):
            an unknown argument, or values that contradict one another.

    Source: Lahoti et al. 2026, Mamba-3, arXiv 2603.15569.
    """

    model_type = "mamba3"
    _inexpressible: ClassVar[dict[str, Any]] = {}

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    intermediate_size: int = 4096
    expand: int = 2
    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 1
    mimo_rank: int = 1
    rope_fraction: float | int = 0.5
    rope_layout: str | None = None
    A_activation: str = ASSUMED_ACTIVATION
    A_floor: float = 1e-4
    trapezoid: bool = True
    bc_bias: bool = True
    output_norm: bool = False
    use_bias: bool = False
    chunk_size: int = 64
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    layer_norm_epsilon: float = 1e-5
    hidden_act: str = "silu"
    residual_in_fp32: bool = True
    initialization: str = "mamba_ssm"
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = False
    residuals_per_layer: int = 1
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_layout is None:
            self.rope_layout = "pairwise" if self.mimo_rank == 1 else "half"
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from the content of a config.json; keys of no field are kept as attributes.

        A file that does not state the activation of A is read with one warning, unless the caller
        states it.

        Raises:
            ValueError: the file is in mamba_ssm's or flash-linear-attention's format.
        """
        foreign = sorted(config_dict.keys() & set(_OF_ANOTHER_LIBRARY))
        if foreign:
            raise ValueError(
                f"config.json is in flash-linear-attention's format (it has {', '.join(foreign)}): "
                "convert the checkpoint with `python -m ssm_hf.convert SRC DST`"
            )
        result = super().from_dict(config_dict, **kwargs)
        if "A_activation" not in config_dict.keys() | kwargs.keys():
            logger.warning(
                "config.json does not state the activation of Mamba-3's rates: %r is assumed. If "
                'the loss is far too high, write "A_activation": "softplus" into the file',
                ASSUMED_ACTIVATION,
            )
        return result

    def validate_architecture(self) -> None:
        """Run by the constructor and by `from_dict`."""
        check_positive(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "expand", "head_dim",
            "state_size", "n_groups", "mimo_rank", "chunk_size", "residuals_per_layer",
        )  # fmt: skip
        check_choice(self, "hidden_act", ("silu", "swish"))
        check_choice(self, "initialization", ("mamba_ssm", "transformers"))
        check_choice(self, "rope_fraction", (0, 0.5, 1))
        check_time_steps(self)
        if self.intermediate_size < 0:
            raise ValueError(
                f"intermediate_size must be 0 (no MLP) or more, got {self.intermediate_size}"
            )
        inner = self.expand * self.hidden_size
        if inner % self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide expand * hidden_size = {inner}"
            )
        if self.rope_fraction and self.num_angles == 0:
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of state_size={self.state_size} leaves no "
                "pair of states to rotate; rope_fraction=0 means none"
            )
        check_mamba3(
            num_heads=self.num_heads,
            state_size=self.state_size,
            n_groups=self.n_groups,
            mimo_rank=self.mimo_rank,
            num_angles=self.num_angles,
            rope_layout=self.rope_layout,
            A_activation=self.A_activation,
            A_floor=self.A_floor,
        )

    @property
    def num_heads(self) -> int:
        """H."""
        return self.expand * self.hidden_size // self.head_dim

    @property
    def num_angles(self) -> int:
        """S, pairs of states that rotate."""
        return int(self.state_size * self.rope_fraction) // 2

    @property
    def layer_types(self) -> list[str]:
        """transformers' word for layers without keys and values."""
        return ["linear_attention"] * self.num_hidden_layers
