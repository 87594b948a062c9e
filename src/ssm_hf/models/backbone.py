"""What is equal in every model family: residual stream, layer loop, head, loss, generation hooks.

A model file owns names and wiring; its classes mix these in.
"""

import inspect
import os
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss

from ssm_hf.cache import RecurrentCache
from ssm_hf.generation import current_session
from ssm_hf.layers.attention import INTERVALS, OWN_ATTENTION
from ssm_hf.layers.mixer import Sublayer, all_plain, has_own_forward, reset_linear
from ssm_hf.layers.moe import take_routings
from ssm_hf.layers.norm import RMSNorm
from ssm_hf.models.checkpoint import check_checkpoint
from ssm_hf.models.generating import GeneratingMixin, check_cache, one_cache
from ssm_hf.models.outputs import SSMCausalLMOutput, SSMModelOutput
from ssm_hf.ops import linear_cross_entropy
from ssm_hf.ops.moe import (
    Routing,
    load_balancing_loss,
    router_statistics,
    router_z_loss,
)
from ssm_hf.ops.packing import check_later, document_starts, next_real
from ssm_hf.sequence import SequenceInfo, check_ids

IGNORED = -100
# Standard deviation of embeddings in mamba_ssm (GPT-2's).
EMBEDDING_STD = 0.02


def residual(
    update: Tensor, stream: Tensor | None, norm: nn.Module, sublayer: nn.Module, *args: Any
) -> tuple[Tensor, Tensor | None]:
    """One sublayer on the residual stream: x + sublayer(norm(x)) with x = stream + update.

    The last addition is left to the next norm, which reads both anyway: returned are the
    sublayer's output, the new update, and x, which keeps the stream's dtype. A fused step may add
    at once and return the sum as the beginning of a stream, or leave the update as shares.
    """
    stepped = _fused_step(update, stream, norm, sublayer, *args)
    if stepped is not None:
        return stepped
    passed = _fused_pass(update, stream, norm, sublayer, *args)
    if passed is not None:
        return passed
    normed, stream = norm(update, stream)
    return sublayer(normed, *args), stream


def routed(sublayer: nn.Module) -> tuple[Any, ...]:
    """What the router of a sublayer with experts has just decided; () for any other.

    Blocks hand it on beside their outputs, so that its gradients come back under every kind of
    gradient checkpointing.
    """
    return tuple(value for routing in take_routings([sublayer]) for value in routing)


def _fused_step(
    update: Tensor,
    stream: Tensor | None,
    norm: nn.Module,
    sublayer: nn.Module,
    seq: SequenceInfo,
    past_key_values: RecurrentCache | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """The whole of `residual` for one token, where the sublayer can do it in a few kernels."""
    if past_key_values is None or update.shape[-2] != 1 or seq.mask is not None:
        return None
    if not isinstance(sublayer, Sublayer) or not has_own_forward(sublayer):
        return None
    return sublayer.residual_step(update, stream, norm, past_key_values)


def _fused_pass(
    update: Tensor,
    stream: Tensor | None,
    norm: nn.Module,
    sublayer: nn.Module,
    seq: SequenceInfo,
    past_key_values: RecurrentCache | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The whole of `residual` without a cache, where the sublayer can do it in fewer operators."""
    if past_key_values is not None or not isinstance(sublayer, Sublayer):
        return None
    if not has_own_forward(sublayer):
        return None
    return sublayer.residual_pass(update, stream, norm, seq)


class SSMPreTrainedModel(PreTrainedModel):
    """Initial values, loading checks and optimiser facts of all our models."""

    supports_gradient_checkpointing = True
    # The cache can take tokens back, so assisted decoding is possible.
    _is_stateful = False
    _can_compile_fullgraph = False
    # Rounding these to bf16 changes every decay; mixers compute with them in fp32 anyway.
    _keep_in_fp32_modules_strict: ClassVar[Any] = [
        *("A_log", "D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"),
        "e_score_correction_bias",  # decides between experts by small differences
    ]

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        """Called for every module. For classes outside transformers, one without parameters of its
        own (an MLP) would be passed over; here one is, if all that is in it has been loaded."""
        values = [*module.parameters(), *module.buffers()]
        if values and all(getattr(value, "_is_hf_initialized", False) for value in values):
            return
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        scheme, std = self.config.initialization, self.config.initializer_range
        if isinstance(module, Sublayer):
            rescale = scheme == "mamba_ssm" or self.config.rescale_prenorm_residual
            depth = self.config.num_hidden_layers if rescale else None
            if depth is not None:
                depth *= getattr(self.config, "residuals_per_layer", 1)
            module.reset_parameters(scheme, std, depth)
        elif isinstance(module, RMSNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std if scheme == "transformers" else EMBEDDING_STD)
        elif isinstance(module, nn.Linear) and module is self.get_output_embeddings():
            reset_linear(module, scheme, std)

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """The implementation of attention: `ssm_hf` unless another one is stated."""
        if self._supports_sdpa and requested_attention in (None, OWN_ATTENTION, INTERVALS):
            return requested_attention or OWN_ATTENTION
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint; arguments as in `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: a shard is missing or cut off, a pickle holds more than tensors, or weights
                of the model are not in the checkpoint (they would be random).
        """
        if pretrained_model_name_or_path is not None and os.path.isdir(
            pretrained_model_name_or_path
        ):
            check_checkpoint(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of {cls.__name__}, "
                f"which would be left random: {', '.join(missing[:5])}"
            )
        return (model, info) if wants_info else model

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two optimiser groups: decayed, and not decayed (norms, biases, A_log, D, dt_bias).

        Returns:
            `[{"params", "names", "weight_decay"}, ...]` over all parameters that require gradients.
        """
        spared: set[nn.Parameter] = set()
        for module in self.modules():
            spare: Iterable[str] = ("bias",)
            if isinstance(module, Sublayer):
                spare = (*spare, *module.no_decay)
            elif isinstance(module, RMSNorm):
                spare = ("weight",)
            spared.update(p for name, p in module.named_parameters(recurse=False) if name in spare)
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = []
        for decay, chosen in ((weight_decay, False), (0.0, True)):
            members = [(name, p) for name, p in named if (p in spared) == chosen]
            groups.append(
                {
                    "params": [p for _, p in members],
                    "names": [name for name, _ in members],
                    "weight_decay": decay,
                }
            )
        return groups

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of one token's forward pass (a multiply-add counts 2).

        Args:
            sequence_length: tokens per row, for layers whose cost grows with it.
        """
        sublayers = [m for m in self.modules() if isinstance(m, Sublayer)]
        inner = {part for m in sublayers for part in m.modules() if part is not m}
        flops = sum(m.flops_per_token(sequence_length) for m in sublayers if m not in inner)
        head = self.get_output_embeddings()
        return flops + (0 if head is None else 2 * head.weight.numel())  # pyright: ignore[reportCallIssue, reportOperatorIssue, reportAttributeAccessIssue]


class BackboneMixin:
    """Forward pass of a stack: embed, blocks, final norm.

    The model class names its three parts by `_parts()`.
    """

    def _parts(self) -> tuple[nn.Embedding, nn.ModuleList, nn.Module]:
        raise NotImplementedError

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        cache_params: RecurrentCache | None = None,
        sequence_info: SequenceInfo | None = None,
        output_router_logits: bool | None = None,
        output_gates: bool | None = None,
    ) -> SSMModelOutput | tuple[Any, ...]:
        """Hidden states of every token.

        Args:
            input_ids: (B, T) token numbers; or
            inputs_embeds: (B, T, D).
            attention_mask: (B, T), or (B, seen + T) with a cache; 1 = real token, on any side.
            position_ids: (B, T); documents packed into a row restart their positions.
            past_key_values: state to continue from; updated in place. `cache_params` is an alias.
            use_cache: return the state (default: `config.use_cache`, and False in training).
            output_hidden_states: return every layer's output.
            return_dict: False returns a tuple.
            seq_idx: (B, T) document numbers of packed rows.
            cu_seqlens: (n+1,) document offsets into one row, also spelled `cu_seq_lens_q`/`_k`
                with `max_length_q`/`_k`.
            sequence_info: the facts of all these, where a caller has them already.
            output_router_logits: return what routers of experts decided (default: as the config
                says, if it says anything).
            output_gates: the same of gates of selective attention (default: in training, or as the
                config says).

        Raises:
            ValueError: arguments of wrong shape, out of range, or in disagreement; a cache of
                another batch size, dtype or model.
        """
        embed, blocks, final_norm = self._parts()
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_router_logits is None:
            output_router_logits = getattr(config, "output_router_logits", False)
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        past_key_values = one_cache(past_key_values, cache_params)
        if self.gradient_checkpointing and self.training and past_key_values is None:
            use_cache = False
        if input_ids is not None:
            check_ids(input_ids, "input_ids", embed.num_embeddings)
        x: Tensor = embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = RecurrentCache(config)
        if past_key_values is not None:
            check_cache(past_key_values, config)
        if sequence_info is None:
            sequence_info = SequenceInfo.from_inputs(
                x.shape[0],
                x.shape[1],
                attention_mask=attention_mask,
                position_ids=position_ids,
                seq_idx=seq_idx,
                cu_seqlens=cu_seqlens,
                cu_seq_lens_q=cu_seq_lens_q,
                cu_seq_lens_k=cu_seq_lens_k,
                max_length_q=max_length_q,
                max_length_k=max_length_k,
                past_length=past_key_values.seen_tokens if past_key_values is not None else 0,
            )
        tokens = x.shape[1]
        if config.residual_in_fp32 and x.dtype != torch.float64:
            x = x.float()
        outputs: list[Tensor] = []
        decisions: list[tuple[Any, ...]] = []
        sequence_info = self._before_blocks(x, sequence_info)
        update, stream = x, None
        for block in blocks:
            update, stream, *decision = block(
                update, stream, sequence_info, past_key_values=past_key_values
            )
            if decision:
                decisions.append(tuple(decision))
            if output_hidden_states:
                whole = update if update.ndim == 3 else update.sum(dim=0)
                outputs.append(whole if stream is None else (stream + whole).to(stream.dtype))
        x, _ = final_norm(update, stream)
        if output_hidden_states:
            outputs.append(x)
        if past_key_values is not None:
            past_key_values.seen_tokens += tokens
        result = SSMModelOutput(
            last_hidden_state=x,  # pyright: ignore[reportArgumentType]
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(outputs) if output_hidden_states else None,
            **self._decided(decisions, output_router_logits, output_gates),
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()

    def _before_blocks(self, x: Tensor, seq: SequenceInfo) -> SequenceInfo:
        """What the blocks are to know about the inputs x (B, T, D)."""
        return seq

    def _decided(
        self, decisions: list[tuple[Any, ...]], router_logits: bool, gates: bool | None
    ) -> dict[str, Any]:
        """Fields of the output that hold what blocks have returned beside their outputs."""
        if not decisions or not router_logits:
            return {}
        routings = tuple(Routing(*decision) for decision in decisions)
        logits = tuple(routing.logits.flatten(0, -2) for routing in routings)
        return {"router_logits": logits, "routings": routings}


def shift_labels(labels: Tensor, seq: SequenceInfo) -> Tensor:
    """Targets (B, T): at each token the label of the next real one, -100 where there is none.

    The first token of a document has nothing to be predicted from; pads are no targets and stand
    between no neighbours, so padding and packing leave the loss unchanged.
    """
    if seq.mask is None:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if seq.seq_idx is not None:
            targets = targets.masked_fill(document_starts(seq.seq_idx).roll(-1, 1), IGNORED)
        return targets
    following = next_real(seq.mask)
    at = following.clamp(max=labels.shape[1] - 1)
    predicts = seq.mask & (following < labels.shape[1])
    if seq.seq_idx is not None:
        predicts &= seq.seq_idx == seq.seq_idx.gather(1, at)
    return labels.gather(1, at).masked_fill(~predicts, IGNORED)


def hold_at_pads(hidden: Tensor, seq: SequenceInfo) -> Tensor:
    """At pads the hidden states (B, T, D) of the last real token before them in this call.

    The last column of a right-padded batch, from which `generate` takes the next token, then
    predicts what follows the text.
    """
    if seq.mask is None:
        return hidden
    position = torch.arange(hidden.shape[1], device=hidden.device)
    last = torch.where(seq.mask, position, 0).cummax(dim=1).values
    return hidden.gather(1, last[..., None].expand_as(hidden))


class CausalLMMixin(GeneratingMixin):
    """Language-model head over `self.backbone`-like stacks, its loss, and generation."""

    # Trainer: the loss can be divided by the number of targets of a whole accumulated batch.
    accepts_loss_kwargs = True

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        cache_params: RecurrentCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        output_router_logits: bool | None = None,
        output_gates: bool | None = None,
    ) -> SSMCausalLMOutput | tuple[Any, ...]:
        """Logits of the next token, and the loss if labels are given.

        Args:
            labels: (B, T) token numbers, -100 = ignored; shifted inside. The labels of a document's
                first token and of pads are ignored.
            output_attentions: must not be True; no attention weights are kept.
            logits_to_keep: only the last so many positions (0 = all), or their indices.
            num_items_in_batch: the summed loss is divided by it; default: by the number of targets.
                Losses of routers then count by this call's share of the targets, and a call of none
                is no error.
            return_logits: False gives `logits=None` and forms the loss without ever holding the
                logits of all tokens, which for small models are most of the memory.
            output_router_logits: return what routers of experts decided and add their losses, with
                the config's weights (default: as the config says, if it says anything).
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                output_gates, output_hidden_states, return_dict, seq_idx, cu_seqlens, cu_seq_lens_q,
                cu_seq_lens_k, max_length_q, max_length_k, cache_params: as in the backbone.

        Returns:
            `SSMCausalLMOutput`, logits in fp32. At a pad stand those of the last real token before.

        Raises:
            ValueError: as in the backbone; labels of wrong shape, out of range, or all ignored
                without `num_items_in_batch`; `return_logits=False` without labels.
        """
        if output_attentions:
            raise ValueError("output_attentions=True: no attention weights are kept")
        if return_logits is False and labels is None:
            raise ValueError("return_logits=False without labels leaves nothing to return")
        past_key_values = one_cache(past_key_values, cache_params)
        shaped = input_ids if input_ids is not None else inputs_embeds
        if shaped is None:
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        name, expected = (
            ("input_ids", "(B, T)") if input_ids is not None else ("inputs_embeds", "(B, T, D)")
        )
        if shaped.ndim != expected.count(",") + 1:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(shaped.shape)}")
        if past_key_values is not None:
            check_cache(past_key_values, self.config)
        if labels is not None and labels.shape != shaped.shape[:2]:
            raise ValueError(
                f"labels must have shape {tuple(shaped.shape[:2])}, got {tuple(labels.shape)}"
            )
        session = current_session(self)
        if session is not None and session.prefilled and shaped.shape[1] == 1:
            stepped = self._generating_step(session, input_ids, past_key_values, labels,
                                            output_hidden_states)  # fmt: skip
            if stepped is not None:
                return stepped if return_dict is not False else stepped.to_tuple()
            # generate() appends real tokens only: nothing to look up on the device.
            attention_mask = None
        seq = SequenceInfo.from_inputs(
            shaped.shape[0],
            shaped.shape[1],
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            past_length=past_key_values.get_seq_length() if past_key_values is not None else 0,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        targets = None
        if labels is not None:
            check_ids(labels, "labels", self.config.vocab_size, IGNORED)
            targets = shift_labels(labels, seq)[:, keep].contiguous()
            if num_items_in_batch is None:
                _check_targets(targets)
        base = self.base_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            sequence_info=seq,
            return_dict=True,
            output_router_logits=output_router_logits,
            output_gates=output_gates,
        )
        loss = logits = None
        if return_logits is False:
            loss = self._loss_without_logits(
                base.last_hidden_state[:, keep], targets, num_items_in_batch
            )
        if loss is None:
            head = self.get_output_embeddings()
            hidden = hold_at_pads(base.last_hidden_state, seq)[:, keep]
            logits = head(hidden.to(head.weight.dtype))
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if targets is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=targets,
                )
        added, fields = self._side_losses(base, seq)
        if loss is not None and added is not None:
            if num_items_in_batch is not None:
                # This call's share of an accumulated batch, as of the other loss.
                added = added * ((targets != IGNORED).sum() / num_items_in_batch)
            loss = loss + added.to(loss.device)
        result = SSMCausalLMOutput(
            loss=loss,
            logits=None if return_logits is False else logits,  # pyright: ignore[reportArgumentType]
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            **fields,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()

    def _side_losses(
        self: Any, base: SSMModelOutput, seq: SequenceInfo
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """What layers add to the loss, () or None, and fields of the output about it."""
        if base.routings is None:
            return None, {}
        aux_loss = load_balancing_loss(base.routings, mask=seq.mask)
        z_loss = router_z_loss(base.routings, mask=seq.mask)
        added = self.config.router_aux_loss_coef * aux_loss
        z_weight = getattr(self.config, "router_z_loss_coef", 0.0)
        if z_weight:
            added = added + z_weight * z_loss
        return added, {
            "aux_loss": aux_loss,
            "z_loss": z_loss,
            "router_logits": base.router_logits,
            "router_statistics": router_statistics(base.routings, mask=seq.mask),
        }

    def _loss_without_logits(
        self: Any, hidden: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor | None:
        """The loss of hidden states (B, T, D) and targets (B, T), fused with the head.

        None where the head is more than one matrix (an adapter, a quantised weight, a hook), or the
        loss another than the usual one: what they compute is then formed in full.
        """
        head = self.get_output_embeddings()
        if not all_plain(head) or self.loss_function is not ForCausalLMLoss:
            return None
        return linear_cross_entropy(
            hidden, head.weight, targets, bias=head.bias, num_items=num_items_in_batch
        )


# `generate` asks for it seven times a call, while the device has nothing to do.
CausalLMMixin.forward.__signature__ = inspect.signature(CausalLMMixin.forward)  # pyright: ignore[reportFunctionMemberAccess]


def _check_targets(targets: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    some = (targets != IGNORED).any()
    message = "labels: every target is ignored (-100), so the loss would be 0/0"
    if targets.device.type == "cpu" and not bool(some):
        raise ValueError(message)
    check_later(some, message)
