"""Generation of all our models: inputs of a step, the cache, and which loop runs."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssm_hf.cache import RecurrentCache, layer_classes
from ssm_hf.generation import (
    Piece,
    Request,
    Session,
    current_session,
    cut,
    decode,
    open_session,
    read_prompt,
    read_request,
)
from ssm_hf.layers.mixer import Mixer, all_plain
from ssm_hf.ops.norm_linear import few_rows, norm_linear
from ssm_hf.sequence import SequenceInfo, check_ids

_CACHES_THAT_ARE_OURS = (None, "dynamic", "static")
# Tokens that a cache makes room for at once when steps are captured.
_AHEAD = 1024
# What a captured prompt may come with.
_KNOWN = {
    "attention_mask",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
}


def check_cache(cache: Any, config: PreTrainedConfig) -> None:
    """Raise `ValueError` unless `cache` is a `RecurrentCache` with layers of the config's kinds."""
    if not isinstance(cache, RecurrentCache):
        raise ValueError(
            f"past_key_values must be an ssm_hf.RecurrentCache, got {type(cache).__name__}"
        )
    needed = layer_classes(config)
    if len(cache.layers) != len(needed):
        raise ValueError(
            f"past_key_values belongs to another model: it has {len(cache.layers)} layers, this "
            f"model has {len(needed)}"
        )
    for index, (layer, kind) in enumerate(zip(cache.layers, needed, strict=True)):
        if type(layer) is not kind:
            raise ValueError(
                f"past_key_values belongs to another model: layer {index} is a "
                f"{type(layer).__name__}, this model needs a {kind.__name__}"
            )


def one_cache(
    past_key_values: RecurrentCache | None, cache_params: RecurrentCache | None
) -> RecurrentCache | None:
    """The cache under either of its names.

    Raises:
        ValueError: two different ones.
    """
    if past_key_values is None or cache_params is None:
        return past_key_values if past_key_values is not None else cache_params
    if past_key_values is not cache_params:
        raise ValueError("past_key_values and cache_params are one argument: pass one of them")
    return past_key_values


class GeneratingMixin:
    """Hooks of transformers' `generate`.

    Greedy decoding and sampling run in our loop when it knows every option of the request;
    everything else runs in transformers' loop. On a GPU the decoding steps of both are captured.
    """

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a `RecurrentCache` into `model_kwargs`, always named past_key_values."""
        cache = one_cache(
            model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache_params", None)
        )
        implementation = generation_config.cache_implementation
        if implementation not in _CACHES_THAT_ARE_OURS:
            raise ValueError(
                f"cache_implementation={implementation!r} is not supported: a recurrent state has "
                f"a fixed size; use one of {_CACHES_THAT_ARE_OURS}"
            )
        if cache is not None:
            if implementation is not None:
                raise ValueError("pass either cache_implementation or past_key_values, not both")
            check_cache(cache, self.config)
            cache._is_user_defined = True  # pyright: ignore[reportAttributeAccessIssue]
        elif generation_config.use_cache is not False:
            cache = RecurrentCache(self.config)
        else:
            return
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def _prepare_position_ids_for_generation(
        self: Any, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Positions that count real tokens; pads keep the count, so that what follows goes on."""
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: RecurrentCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next forward pass: only tokens that the cache has not seen.

        Raises:
            ValueError: nothing is left to process.
        """
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        given = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
        length = given.shape[1]
        # Assisted decoding hands over the whole sequence in its first round.
        if seen and next_sequence_length is None:
            # generate() drops a mask of ones; the positions still tell how far the sequence goes.
            whole = attention_mask if attention_mask is not None else kwargs.get("position_ids")
            if whole is None or whole.shape[1] == length:
                next_sequence_length = length - seen
        if seen and next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                f"input_ids holds {length} tokens, but past_key_values has seen {seen}: pass the "
                "whole sequence, or the new tokens with an attention_mask over old and new ones"
            )
        return super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _sample(
        self: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Greedy decoding and sampling: the same tokens as transformers' loop, without waiting."""
        model_kwargs.pop("tokenizer", None)  # the stopping criteria have it
        cache = model_kwargs.get("past_key_values")
        options = (input_ids, logits_processor, stopping_criteria, generation_config)
        request = _request(self, *options, synced_gpus, cache)
        visible = _outlives(generation_config, cache)
        with open_session(self, visible, not generation_config.disable_compile) as session:
            _reserve(session, cache, input_ids, generation_config)
            if isinstance(request, str) or cache is None:
                return super()._sample(*options, synced_gpus, streamer, **model_kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            logits = self._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
            tokens = decode(
                self, session, request, cache, logits, input_ids, self._next_logits, streamer
            )
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([input_ids, tokens], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # pyright: ignore[reportArgumentType]
            past_key_values=cache,
        )

    def _beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' beam search over captured steps."""
        kwargs.pop("tokenizer", None)  # the stopping criteria have it
        config, cache = kwargs.get("generation_config"), kwargs.get("past_key_values")
        visible = config is None or _outlives(config, cache)
        capture = not getattr(config, "disable_compile", False)
        with open_session(self, visible, capture) as session:
            _reserve(session, cache, kwargs.get("input_ids", args[0] if args else None), config)
            return super()._beam_search(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _prefill(
        self: Any,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Process the prompt, in chunks if asked to; what follows are single real tokens."""
        session, outputs = current_session(self), None
        if generation_config.prefill_chunk_size is None or "inputs_embeds" in model_kwargs:
            if session is not None and session.captures:
                outputs = self._captured_prefill(session, input_ids, model_kwargs)
            if outputs is None:
                given = (input_ids, generation_config, model_kwargs, *args)
                outputs = super()._prefill(*given, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            outputs = self._chunked_prefill(
                input_ids, generation_config.prefill_chunk_size, model_kwargs
            )
        if session is not None:
            session.prefilled = True
        return outputs

    def _captured_prefill(
        self: Any, session: Session, input_ids: Tensor, model_kwargs: dict[str, Any]
    ) -> CausalLMOutputWithPast | None:
        """The prompt in captured pieces; None where it must be read in another way."""
        cache = model_kwargs.get("past_key_values")
        given = {name for name, value in model_kwargs.items() if value is not None}
        if cache is None or not given <= _KNOWN or self.config.output_hidden_states:
            return None
        ids = _new_tokens(input_ids, model_kwargs)
        batch, length = ids.shape
        embed, _, _ = self.base_model._parts()
        width = embed.embedding_dim
        if not length or cut(batch, length, width) is None or cache.batch_size not in (-1, batch):
            return None
        if any(layer.record_past for layer in cache.stateful):
            return None
        positions = model_kwargs.get("position_ids")
        seq = SequenceInfo.from_inputs(
            batch,
            length,
            attention_mask=model_kwargs.get("attention_mask"),
            position_ids=None if positions is None else positions[:, -length:],
            past_length=cache.get_seq_length(),
        )
        rotates = any(m.__dict__.get("rotary_dim") for m in session.modules)
        if seq.seq_idx is not None or (rotates and not _only_counted(seq)):
            return None
        check_ids(ids, "input_ids", embed.num_embeddings)
        first = not cache.has_previous_state()
        if first:
            self._begin_states(cache, batch, session.modules)
        head = self.get_output_embeddings()

        def make_last() -> Tensor:
            return embed.weight.new_zeros(batch, 1, width, dtype=head.weight.dtype)

        last = read_prompt(session, cache, ids, seq.mask, width, make_last, self._read_piece, first)
        if last is None:
            return None
        logits = head(last)
        return CausalLMOutputWithPast(
            logits=logits if logits.dtype == torch.float64 else logits.float(),  # pyright: ignore[reportArgumentType]
            past_key_values=cache,
        )

    def _begin_states(
        self: Any, cache: RecurrentCache, batch: int, modules: list[nn.Module]
    ) -> None:
        """Memory for the states, of which nothing is filled in yet."""
        weight: Tensor = self.get_output_embeddings().weight
        for mixer in modules:
            if isinstance(mixer, Mixer):
                layer = cache.layers[mixer.layer_idx]
                mixer.begin(layer, batch, weight.dtype, weight.device, torch.empty)

    def _read_piece(self: Any, piece: Piece, cache: RecurrentCache) -> None:
        """Pass over one piece of a prompt; nothing in it waits for the device."""
        embed, blocks, norm = self.base_model._parts()
        update, stream = embed(piece.ids), None
        if self.config.residual_in_fp32 and update.dtype != torch.float64:
            update = update.float()
        seq = SequenceInfo(mask=piece.mask)
        for block in blocks:
            update, stream, *_ = block(update, stream, seq, past_key_values=cache)
        if piece.mask is None:
            hidden, _ = norm(update[:, -1:], None if stream is None else stream[:, -1:])
            piece.last.copy_(hidden)
            return
        position = torch.arange(piece.mask.shape[1], device=piece.mask.device)
        at = torch.where(piece.mask, position, 0).amax(dim=1)[:, None, None]
        at = at.expand(-1, 1, update.shape[-1])
        hidden, _ = norm(update.gather(1, at), None if stream is None else stream.gather(1, at))
        # A row whose tokens have all come in earlier pieces keeps what it has.
        new = piece.mask.any(dim=1)[:, None, None]
        piece.last.copy_(torch.where(new, hidden.to(piece.last.dtype), piece.last))

    def _chunked_prefill(
        self: Any, input_ids: Tensor, size: int, model_kwargs: dict[str, Any]
    ) -> CausalLMOutputWithPast:
        """The prompt in calls of `size` tokens; input_ids holds all of it, or what is new."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if cache is None:
            raise ValueError("prefill_chunk_size needs a cache: leave use_cache on")
        positions = model_kwargs.get("position_ids")
        input_ids = _new_tokens(input_ids, model_kwargs)
        outputs = None
        for part in input_ids.split(size, dim=1):
            seen = cache.get_seq_length() + part.shape[1]
            columns = slice(seen - part.shape[1], seen)
            before = outputs
            outputs = self(
                input_ids=part,
                attention_mask=None if mask is None else mask[:, :seen],
                position_ids=None if positions is None else positions[:, columns],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
            )
            if before is not None and mask is not None:
                # A row whose tokens have all come in earlier calls keeps what follows them.
                new = mask[:, columns].bool().any(dim=1)[:, None, None]
                outputs.logits = torch.where(new, outputs.logits, before.logits)
        if outputs is None:
            raise ValueError("past_key_values has seen all of input_ids: no new token is given")
        return outputs

    def _generating_step(
        self: Any,
        session: Session,
        input_ids: Tensor | None,
        cache: RecurrentCache | None,
        labels: Tensor | None,
        output_hidden_states: bool | None,
    ) -> CausalLMOutputWithPast | None:
        """One step of transformers' loops as a replayed capture; None where there is none."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if input_ids is None or cache is None or labels is not None or output_hidden_states:
            return None
        logits = session.next_logits(input_ids, cache, self._next_logits)
        if logits is None:
            return None
        return CausalLMOutputWithPast(
            logits=logits[:, None],  # pyright: ignore[reportArgumentType]
            past_key_values=cache,
        )

    def _next_logits(self: Any, tokens: Tensor, cache: RecurrentCache) -> Tensor:
        """Logits (B, V) after real tokens (B, 1), as the head gives them; nothing in it waits for
        the device."""
        embed, blocks, norm = self.base_model._parts()
        head = self.get_output_embeddings()
        update, stream = embed(tokens), None
        if self.config.residual_in_fp32 and update.dtype != torch.float64:
            update = update.float()
        for block in blocks:
            update, stream, *_ = block(update, stream, SequenceInfo(), past_key_values=cache)
        if stream is None and few_rows(update, head.weight) and all_plain(norm, head):
            return norm_linear(
                update[:, 0],
                head.weight,
                head.bias,
                norm_weight=norm.weight,
                eps=norm.eps,
                out_dtype=torch.float32,
                overlap=True,
            )
        hidden, _ = norm(update, stream)
        return head(hidden[:, -1].to(head.weight.dtype))


def _new_tokens(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Of input_ids, which hold the whole sequence or what is new, the tokens not in the cache."""
    mask, seen = (
        model_kwargs.get("attention_mask"),
        model_kwargs["past_key_values"].get_seq_length(),
    )
    # generate() drops a mask of ones; the positions still tell how far the sequence goes.
    whole = mask if mask is not None else model_kwargs.get("position_ids")
    if seen and (whole is None or whole.shape[1] == input_ids.shape[1]):
        return input_ids[:, seen:]
    return input_ids


def _only_counted(seq: SequenceInfo) -> bool:
    """Whether positions, where any are given, go up by one from real token to real token."""
    if seq.position_ids is None:
        return True
    if seq.mask is None:
        return bool((seq.position_ids.diff(dim=1) == 1).all())
    ahead = seq.position_ids - seq.mask.long().cumsum(dim=1)
    first = ahead.gather(1, seq.mask.int().argmax(dim=1, keepdim=True))
    return bool(((ahead == first) | ~seq.mask).all())


def _reserve(
    session: Session,
    cache: RecurrentCache | None,
    input_ids: Tensor | None,
    config: GenerationConfig | None,
) -> None:
    """Room in the cache for what is asked for, so that few captures of growing size are made.

    Of a long output only the beginning is prepared: it may end early.
    """
    if not session.captures or cache is None or input_ids is None:
        return
    ahead = cache.seen_tokens + input_ids.shape[1] + _AHEAD
    longest = None if config is None else config.max_length
    cache.reserve(ahead if longest is None else min(ahead, longest))


def _outlives(config: GenerationConfig, cache: Any) -> bool:
    """Whether somebody sees the cache after the call."""
    return bool(config.return_dict_in_generate) or getattr(cache, "_is_user_defined", False)


def _request(
    model: Any,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    synced_gpus: bool,
    cache: RecurrentCache | None,
) -> Request | str:
    """What our loop is asked for, or the reason why it must be transformers'."""
    if cache is None:
        return "there is no cache"
    if synced_gpus:
        return "several GPUs step together"
    if config.is_assistant:
        return "the model drafts for another one"
    if input_ids.device != model.device:
        return "the prompt does not lie where the model does"
    if config.return_dict_in_generate and any(
        (config.output_scores, config.output_logits, config.output_hidden_states,
         config.output_attentions)
    ):  # fmt: skip
        return "scores or hidden states are asked for"
    return read_request(input_ids.shape[1], processors, criteria, config)
