"""Taipan language models (Nguyen et al. 2024): Mamba-2 with attention of selected tokens."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ssm_hf.cache import RecurrentCache
from ssm_hf.layers.feed_forward import FeedForward
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mamba2 import Mamba2Mixer
from ssm_hf.layers.norm import ResidualNorm
from ssm_hf.layers.selection import (
    Gate,
    SelectionGate,
    capacity_loss,
    gate_fractions,
    gumbel_difference,
)
from ssm_hf.layers.selective_attention import SelectiveAttention
from ssm_hf.models.backbone import BackboneMixin, CausalLMMixin, SSMPreTrainedModel, residual
from ssm_hf.models.taipan.configuration_taipan import TaipanConfig
from ssm_hf.sequence import SequenceInfo

# What is left of noise and temperature at the end of the training.
_LAST_NOISE = 0.05


class TaipanBlock(GradientCheckpointingLayer):
    """x + mamba(norm(x)); or selective attention, and then x + feed_forward(norm(x))."""

    def __init__(self, config: TaipanConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.is_attention = config.is_attention(layer_idx)
        width = config.hidden_size
        self.input_layernorm = ResidualNorm(width, eps=config.rms_norm_eps)
        if not self.is_attention:
            self.mamba = Mamba2Mixer(
                hidden_size=width,
                inner_size=config.mamba_expand * width,
                num_heads=config.mamba_expand * width // config.mamba_d_head,
                head_dim=config.mamba_d_head,
                state_size=config.mamba_d_state,
                n_groups=config.mamba_n_groups,
                conv_kernel=config.mamba_d_conv,
                chunk_size=config.mamba_chunk_size,
                time_step_min=config.time_step_min,
                time_step_max=config.time_step_max,
                time_step_floor=config.time_step_floor,
                time_step_limit=(config.time_step_limit[0], config.time_step_limit[1]),
                norm_eps=config.rms_norm_eps,
                norm_before_gate=False,
                D_per_channel=False,
                use_bias=config.mamba_proj_bias,
                use_conv_bias=config.mamba_conv_bias,
                layer_idx=layer_idx,
            )
            return
        estimator: Any = config.gate_estimator
        combine: Any = config.sal_combine
        source: Any = config.sal_kv_source
        unit: Any = config.sal_window_unit
        self.gate = SelectionGate(
            hidden_size=width,
            inner_size=config.sal_gate_hidden,
            estimator=estimator,
            threshold=config.thresholds[layer_idx // (config.sal_period + 1)],
        )
        self.self_attn = SelectiveAttention(
            hidden_size=width,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            window=config.sliding_window,
            rotary_dim=config.head_dim if config.use_rope else 0,
            rope_theta=config.rope_theta,
            scaling=None,
            dropout=0.0,
            use_bias=config.attention_bias,
            use_out_bias=False,
            kv_source=source,
            window_unit=unit,
            budget=config.kv_budget,
            combine=combine,
            dense=_is_dense(config, 0.0),
            capacity=config.attention_capacity,
            config=config,
            layer_idx=layer_idx,
        )
        self.gate.is_open = _is_open(config, 0.0)
        self.pre_ff_layernorm = ResidualNorm(width, eps=config.rms_norm_eps)
        self.feed_forward = FeedForward(
            hidden_size=width,
            intermediate_size=config.intermediate_size,
            activation="silu",
            gated=True,
            use_bias=False,
        )

    def forward(
        self,
        update: Tensor,
        stream: Tensor | None,
        seq: SequenceInfo,
        past_key_values: RecurrentCache | None = None,
    ) -> tuple[Any, ...]:
        """(B, T, D) each, see `residual`; and what a gate has decided, a `Gate`."""
        if not self.is_attention:
            args = (self.input_layernorm, self.mamba, seq, past_key_values)
            return residual(update, stream, *args)
        normed, stream = self.input_layernorm(update, stream)
        noise, tau = _noise(seq, self.layer_idx)
        gate: Gate = self.gate(normed, seq.mask, noise, tau)
        update = self.self_attn(normed, seq, past_key_values, gate, stream)
        args = (self.pre_ff_layernorm, self.feed_forward, seq, past_key_values)
        return (*residual(update, stream, *args), *gate)


def _noise(seq: SequenceInfo, layer_idx: int) -> tuple[Tensor | None, Tensor | float]:
    """A layer's noise (B, T) and temperature, as drawn before the first block."""
    derived = seq.derived or {}
    return derived.get(("gumbel", layer_idx)), derived.get("gumbel_tau", 1.0)


def _is_dense(config: TaipanConfig, progress: float) -> bool:
    if config.gate_estimator == "sparse":
        return progress < config.gate_dense_until
    return config.gate_estimator == "dense"


def _is_open(config: TaipanConfig, progress: float) -> bool:
    return progress < config.gate_open_until


class TaipanPreTrainedModel(SSMPreTrainedModel):
    """Base of the Taipan models."""

    config: TaipanConfig
    config_class = TaipanConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["TaipanBlock"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TaipanModel):
            init.zeros_(module.progress)

    def set_training_progress(self, progress: float) -> bool:
        """Say which share of the training is done: schedules of gates and budget go by it.

        Args:
            progress: in [0, 1]; 0 until this is called.

        Returns:
            Whether training passes are other ones from now on, so that captured ones are not valid.

        Raises:
            ValueError: it is not a share.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], got {progress}")
        stack: Any = self.base_model
        stack.progress.fill_(progress)
        now, changed = (_is_dense(self.config, progress), _is_open(self.config, progress)), False
        for block in stack.layers:
            if block.is_attention:
                changed |= (block.self_attn.dense, block.gate.is_open) != now
                block.self_attn.dense, block.gate.is_open = now
        return changed


class TaipanModel(BackboneMixin, TaipanPreTrainedModel):
    """Taipan without a head."""

    progress: Tensor

    def __init__(self, config: TaipanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TaipanBlock(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = ResidualNorm(config.hidden_size, eps=config.rms_norm_eps)
        # A tensor, so that captured passes see it change.
        self.register_buffer("progress", torch.zeros((), dtype=torch.float32), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    def _parts(self) -> tuple[nn.Embedding, nn.ModuleList, nn.Module]:
        return self.embed_tokens, self.layers, self.final_layernorm

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def _before_blocks(self, x: Tensor, seq: SequenceInfo) -> SequenceInfo:
        """Draws the noise of all gates, outside of what gradient checkpointing runs twice."""
        config = self.config
        if not self.training:
            return seq
        begin = config.gumbel_anneal_start
        left = (1 - self.progress.float()) / max(1 - begin, 1e-9)
        factor = left.clamp(_LAST_NOISE, 1)
        derived: dict[Any, Any] = {"gumbel_tau": config.gumbel_tau * factor}
        if config.gumbel_noise:
            for index in range(config.num_hidden_layers):
                if config.is_attention(index):
                    drawn = gumbel_difference(x.shape[:2], x.device)
                    derived["gumbel", index] = config.gumbel_noise * factor * drawn
        return seq._replace(derived={**(seq.derived or {}), **derived})

    def _decided(
        self, decisions: list[tuple[Any, ...]], router_logits: bool, gates: bool | None
    ) -> dict[str, Any]:
        wanted = self.training or self.config.output_gates if gates is None else gates
        return {"gates": tuple(Gate(*decision) for decision in decisions)} if wanted else {}


class TaipanForCausalLM(CausalLMMixin, TaipanPreTrainedModel, GenerationMixin):
    """Taipan language model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TaipanConfig) -> None:
        super().__init__(config)
        self.model = TaipanModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _side_losses(self, base: Any, seq: SequenceInfo) -> tuple[Tensor | None, dict[str, Any]]:
        """The budget's loss, which counts in training, and what the gates decided."""
        if base.gates is None:
            return None, {}
        config = self.config
        reduction: Any = config.capacity_loss_reduction
        loss = capacity_loss(base.gates, seq.mask, config.attention_capacity, reduction)
        fields = {
            "capacity_loss": loss,
            "gate_fractions": gate_fractions(base.gates, seq.mask),
            "gates": base.gates,
        }
        if not self.training:
            return None, fields
        return self._capacity_weight() * loss, fields

    def _capacity_weight(self) -> Tensor:
        """Weight of the budget's loss at this point of the training."""
        config = self.config
        begin, end = config.capacity_ramp_start, config.capacity_ramp_end
        ramp = ((self.model.progress.float() - begin) / max(end - begin, 1e-9)).clamp(0, 1)
        first, last = config.capacity_loss_coef_start, config.capacity_loss_coef
        return first + (last - first) * ramp

    @torch.no_grad()
    def calibrate_threshold(
        self, batches: Iterable[dict[str, Tensor]], capacity: float | None = None
    ) -> list[float]:
        """Set the gates' thresholds so that without noise they select a share of the tokens.

        Args:
            batches: arguments of forward passes, without labels; a few thousand tokens do.
            capacity: the share; default `attention_capacity`.

        Returns:
            The thresholds, one for each attention layer. They are in effect, and in the config.

        Raises:
            ValueError: there are no tokens, the share is not one, or scores are not finite; the
                thresholds are then what they were.
        """
        share = self.config.attention_capacity if capacity is None else capacity
        if not 0 < share <= 1:
            raise ValueError(f"capacity must lie in (0, 1], got {share}")
        batches = list(batches)
        if not batches:
            raise ValueError("batches is empty: thresholds need tokens to be calibrated with")
        training = self.training
        self.eval()
        blocks: list[Any] = [block for block in self.model.layers if block.is_attention]
        gates: list[SelectionGate] = [block.gate for block in blocks]
        chosen = []
        try:
            # One layer after the other: what a gate sees depends on what those before it select.
            for index, gate in enumerate(gates):
                chosen.append(self._threshold(index, batches, share))
                gate.threshold.fill_(chosen[-1])
            for gate, threshold in zip(gates, chosen, strict=True):
                gate.initial_threshold = threshold
        finally:
            for gate in gates:
                gate.threshold.fill_(gate.initial_threshold)
            self.train(training)
        self.config.gate_eval_threshold = chosen
        return chosen

    def _threshold(self, index: int, batches: list[dict[str, Tensor]], share: float) -> float:
        """Above which the margins of a share of the real tokens lie, in an attention layer."""
        margins = []
        for batch in batches:
            out = self(**batch, use_cache=False, output_gates=True, logits_to_keep=1)
            margin = out.gates[index].margin
            real = torch.ones_like(margin, dtype=torch.bool)
            if batch.get("attention_mask") is not None:
                real &= batch["attention_mask"].bool()
            if batch.get("seq_idx") is not None:
                real &= batch["seq_idx"] >= 0
            margins.append(margin[real])
        ordered = torch.cat(margins).sort(descending=True).values
        if not len(ordered):
            raise ValueError("batches hold pads alone: thresholds need tokens")
        if not bool(ordered.isfinite().all()):
            raise ValueError(f"the scores of the gate of attention layer {index} are not finite")
        count = min(max(round(share * len(ordered)), 1), len(ordered))
        above = ordered[count - 1]
        below = ordered[count] if count < len(ordered) else above - 1
        return float((above + below) / 2)
