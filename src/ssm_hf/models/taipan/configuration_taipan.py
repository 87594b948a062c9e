"""Config of Taipan models."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ssm_hf.layers.attention import check_attention
from ssm_hf.layers.selection import ESTIMATORS
from ssm_hf.models.configuration import (
    NativeConfigMixin,
    check_choice,
    check_positive,
    check_time_steps,
)


@strict
class TaipanConfig(NativeConfigMixin):
    """Mamba-2 blocks, with a selective attention layer after every `sal_period` of them.

    The paper leaves much open (Nguyen et al. 2024); what it fixes are the defaults below, the rest
    are choices of ours. Sizes are those of 1.3B parameters.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D, width of the residual stream.
        num_mamba_layers: M; with the attention layers there are M + M // `sal_period` layers.
        sal_period: K; attention layers stand after the K-th Mamba block, the 2K-th, and so on.
        mamba_d_state, mamba_d_conv, mamba_expand, mamba_d_head, mamba_n_groups, mamba_chunk_size,
            mamba_conv_bias, mamba_proj_bias: N, K, I / D, P, G, and options of the Mamba-2 blocks.
        time_step_min, time_step_max, time_step_floor: initial step sizes.
        time_step_limit: bounds of the step size.
        num_attention_heads, num_key_value_heads, head_dim: of the attention.
        attention_bias: biases of its projections of queries, keys and values.
        intermediate_size: inner width of the gated MLP after each attention layer.
        hidden_act: `"silu"`.
        rms_norm_eps: of all norms.
        sliding_window: w; None = unlimited.
        sal_kv_source: `"all"`, every token has keys and values, or `"selected"`.
        sal_window_unit: what w counts with selected keys: `"position"` or `"selected"`.
        sal_kv_budget: with selected keys, how many are kept, the oldest leave first; default
            ceil(2 C w), or w where that counts selected tokens; to be given where there is no
            window.
        sal_combine: of the stream h and the attention's output o, `"lerp"`, h + alpha (o - h), or
            `"residual"`, h + alpha o.
        sal_gate_hidden: inner width of the gates; None = one linear layer.
        attention_capacity: C, the share of tokens that may be selected.
        capacity_loss_coef_start: weight of the budget's loss until `capacity_ramp_start`,
        capacity_loss_coef: and from `capacity_ramp_end` on, linear between; both are shares of the
            training, see `TaipanForCausalLM.set_training_progress`.
        capacity_ramp_start, capacity_ramp_end: see above.
        capacity_loss_reduction: the budget holds for each `"sequence"` or for the `"batch"`.
        gumbel_tau: temperature of the choice in training.
        gumbel_noise: factor of the noise in training; 0 = none.
        gumbel_anneal_start: share of the training from which noise and temperature fall, to a
            twentieth at its end, so that evaluation without noise selects what training selected.
        gate_estimator: `"dense"` computes the attention of all tokens in training, so that gates of
            those not selected learn too; `"sparse"` of the selected ones, unselected tokens hear of
            the budget alone; `"paper"` as sparse, with the gradient as the paper writes it.
        gate_dense_until: share of the training in which `"sparse"` is dense.
        gate_open_until: share of the training in which all tokens are selected, as in a model with
            plain attention, so that attention is of use before gates decide about it.
        gate_eval_threshold: without noise, a token is selected if its scores differ by more: of all
            gates, or a list, see `TaipanForCausalLM.calibrate_threshold`.
        use_rope: rotate queries and keys by their positions.
        rope_theta: base of the rotation's wave lengths.
        residual_in_fp32: keep the residual stream in fp32.
        output_gates: return what the gates decided, outside training too.
        initialization: `"mamba_ssm"` (linear layers uniform in ±1/sqrt(fan_in), embeddings of
            standard deviation 0.02, last projections divided by the root of the number of residual
            additions) or `"transformers"` (normal with standard deviation `initializer_range`;
            divided only with `rescale_prenorm_residual`). Gates begin near 0 in both.
        initializer_range: see above.
        rescale_prenorm_residual: see above.
        use_cache: return the state.
        tie_word_embeddings: the head is the embedding.
        bos_token_id, eos_token_id, pad_token_id: see transformers.

    Raises:
        ValueError (from a validator: inside huggingface_hub's StrictDataclassError):
            an unknown argument, or values that contradict one another.
    """

    model_type = "taipan"
    _inexpressible: ClassVar[dict[str, Any]] = {}

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_mamba_layers: int = 30
    sal_period: int = 6
    mamba_d_state: int = 128
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_d_head: int = 64
    mamba_n_groups: int = 1
    mamba_chunk_size: int = 256
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 64
    attention_bias: bool = False
    intermediate_size: int = 5504
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 2048
    sal_kv_source: str = "all"
    sal_window_unit: str = "position"
    sal_kv_budget: int | None = None
    sal_combine: str = "lerp"
    sal_gate_hidden: int | None = None
    attention_capacity: float = 0.15
    capacity_loss_coef_start: float = 0.1
    capacity_loss_coef: float = 1.0
    capacity_ramp_start: float = 0.4
    capacity_ramp_end: float = 0.6
    capacity_loss_reduction: str = "sequence"
    gumbel_tau: float = 1.0
    gumbel_noise: float = 1.0
    gumbel_anneal_start: float = 0.8
    gate_estimator: str = "dense"
    gate_dense_until: float = 0.0
    gate_open_until: float = 0.0
    gate_eval_threshold: float | list[float] = 0.0
    use_rope: bool = False
    rope_theta: float = 10000.0
    residual_in_fp32: bool = False
    output_gates: bool = False
    initialization: str = "mamba_ssm"
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Before anything counts layers with it.
        check_positive(self, "sal_period")
        super().__post_init__(**kwargs)

    @property
    def num_attention_layers(self) -> int:
        """Selective attention layers."""
        return self.num_mamba_layers // self.sal_period

    @property
    def num_hidden_layers(self) -> int:
        """Mamba blocks and selective attention layers."""
        return self.num_mamba_layers + self.num_attention_layers

    @property
    def residuals_per_layer(self) -> float:
        """Additions to the residual stream; an attention layer adds twice."""
        return 1 + self.num_attention_layers / self.num_hidden_layers

    @property
    def layer_types(self) -> list[str]:
        """transformers' words for what each layer keeps between calls, and one of our own."""
        window = "full_attention" if self.sliding_window is None else "sliding_attention"
        kind = "selected_attention" if self.sal_kv_source == "selected" else window
        return [
            kind if self.is_attention(i) else "linear_attention"
            for i in range(self.num_hidden_layers)
        ]

    def is_attention(self, index: int) -> bool:
        """Whether a layer is selective attention."""
        return (index + 1) % (self.sal_period + 1) == 0

    def validate_layer_type(self) -> None:
        """The types follow from the period; transformers knows fewer kinds."""

    @property
    def kv_budget(self) -> int | None:
        """Selected tokens that are kept; None where all tokens are."""
        if self.sal_kv_source == "all":
            return None
        if self.sal_kv_budget is not None:
            return self.sal_kv_budget
        assert self.sliding_window is not None
        if self.sal_window_unit == "selected":
            return self.sliding_window
        return max(math.ceil(2 * self.attention_capacity * self.sliding_window), 1)

    @property
    def thresholds(self) -> list[float]:
        """`gate_eval_threshold` of each attention layer."""
        given = self.gate_eval_threshold
        return list(given) if isinstance(given, list) else [given] * self.num_attention_layers

    def validate_architecture(self) -> None:
        """Run by the constructor and by `from_dict`."""
        check_positive(
            self, "vocab_size", "hidden_size", "num_mamba_layers", "sal_period", "mamba_d_state",
            "mamba_d_conv", "mamba_expand", "mamba_d_head", "mamba_n_groups", "mamba_chunk_size",
            "intermediate_size",
        )  # fmt: skip
        if self.sal_period > self.num_mamba_layers:
            raise ValueError(
                f"sal_period={self.sal_period} leaves num_mamba_layers={self.num_mamba_layers} "
                "blocks without any attention layer: a Mamba-2 model is that without this type"
            )
        inner = self.mamba_expand * self.hidden_size
        if inner % self.mamba_d_head:
            raise ValueError(
                f"mamba_d_head={self.mamba_d_head} must divide mamba_expand * hidden_size = {inner}"
            )
        heads = inner // self.mamba_d_head
        if heads % self.mamba_n_groups:
            raise ValueError(
                f"mamba_n_groups={self.mamba_n_groups} must divide the number of heads = {heads}"
            )
        limit = self.time_step_limit
        if len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
            raise ValueError(
                "time_step_limit must be (lowest, highest) with 0 <= lowest <= highest, "
                f"got {limit}"
            )
        check_time_steps(self)
        check_choice(self, "hidden_act", ("silu", "swish"))
        check_choice(self, "initialization", ("mamba_ssm", "transformers"))
        check_choice(self, "sal_kv_source", ("all", "selected"))
        check_choice(self, "sal_window_unit", ("position", "selected"))
        check_choice(self, "sal_combine", ("lerp", "residual"))
        check_choice(self, "capacity_loss_reduction", ("sequence", "batch"))
        check_choice(self, "gate_estimator", ESTIMATORS)
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"sliding_window must be at least 1 token, or None, got {self.sliding_window}"
            )
        check_attention(
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.sliding_window,
            self.head_dim if self.use_rope else 0,
        )
        self._check_selection()

    def _check_selection(self) -> None:
        """Raise `ValueError` where budgets, schedules and thresholds make no sense."""
        for name in ("sal_kv_budget", "sal_gate_hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        if self.sal_kv_source == "all":
            for name, neutral in (("sal_kv_budget", None), ("sal_window_unit", "position")):
                if getattr(self, name) != neutral:
                    raise ValueError(
                        f'{name}={getattr(self, name)!r} needs sal_kv_source="selected": with keys '
                        "of all tokens nothing is counted by selection"
                    )
        elif self.sal_kv_budget is None and self.sliding_window is None:
            raise ValueError(
                'sal_kv_source="selected" without a sliding_window needs a sal_kv_budget: nothing '
                "else bounds the memory"
            )
        if not 0 < self.attention_capacity <= 1:
            raise ValueError(
                f"attention_capacity must lie in (0, 1], got {self.attention_capacity}"
            )
        for name in ("capacity_loss_coef_start", "capacity_loss_coef", "gumbel_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, and finite, got {getattr(self, name)}")
        if not 0 < self.gumbel_tau < math.inf:
            raise ValueError(f"gumbel_tau must be positive and finite, got {self.gumbel_tau}")
        for name in ("gumbel_anneal_start", "gate_dense_until", "gate_open_until",
                     "capacity_ramp_start"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.capacity_ramp_start <= self.capacity_ramp_end <= 1:
            raise ValueError(
                "capacity_ramp_end must lie between capacity_ramp_start="
                f"{self.capacity_ramp_start} and 1, got {self.capacity_ramp_end}"
            )
        if len(self.thresholds) != self.num_attention_layers:
            raise ValueError(
                f"gate_eval_threshold must be one number, or one for each of the "
                f"{self.num_attention_layers} attention layers, got {len(self.thresholds)}"
            )
        if any(math.isnan(threshold) for threshold in self.thresholds):
            raise ValueError(f"gate_eval_threshold must be numbers, got {self.gate_eval_threshold}")
