"""Attention of selected tokens among recurrent layers (Nguyen et al. 2024, "Taipan").

Keys are those of all tokens, or of the selected ones under a budget that drops the oldest first.
Either way a query sees one interval of them, so that one operator serves training, prompts in
pieces, padding and packing.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ssm_hf.cache import KVLayer, RecurrentCache, State
from ssm_hf.layers.attention import (
    INTERVALS,
    OWN_ATTENTION,
    SelfAttention,
    replay_counts,
)
from ssm_hf.layers.attention_mask import (
    EMPTY,
    Places,
    block_mask,
    cached_numbers,
    first_true,
    latest,
    next_position,
    positions,
    shared_columns,
    shared_fact,
)
from ssm_hf.layers.mixer import recorded_mask
from ssm_hf.layers.selection import Gate
from ssm_hf.ops.interval_attention import (
    interval_attention,
    interval_attention_definition,
    interval_attention_step,
    put_rows,
    rows_at,
)
from ssm_hf.ops.packing import host_may_read
from ssm_hf.sequence import SequenceInfo

# Gathered queries come in multiples of this, so that few sizes occur.
_MULTIPLE = 16


class Chosen(NamedTuple):
    """The selected tokens of each row, side by side in their order.

    Attributes:
        index: (B, N) their places in the row; those of other tokens follow where there are fewer.
        valid: (B, N) bool, which of them are selected.
    """

    index: Tensor
    valid: Tensor

    def take(self, x: Tensor) -> Tensor:
        """x (B, T, ...) -> (B, N, ...); (1, T, ...) stands for equal rows."""
        if x.ndim == 2:
            return x.expand(len(self.index), -1).gather(1, self.index)
        return rows_at(x.expand(len(self.index), *x.shape[1:]), self.index)

    def put(self, x: Tensor, length: int) -> Tensor:
        """x (B, N, ...) -> (B, T, ...), 0 at other places and where none is selected."""
        valid = self.valid.reshape(*self.valid.shape, *[1] * (x.ndim - 2))
        return put_rows(x.masked_fill(~valid, 0), self.index, length)


def choose(selected: Tensor) -> Chosen:
    """Of (B, T) flags; where the host may look, N is little more than a row has at most."""
    size = selected.shape[1]
    if size == 1:
        return Chosen(torch.zeros_like(selected, dtype=torch.long), selected)
    count = selected.sum(dim=1, keepdim=True)
    if host_may_read(selected):
        most = max(int(count.max()), 1)
        size = min(size, -(-most // _MULTIPLE) * _MULTIPLE)
    index = torch.arange(size, device=selected.device)
    return Chosen(first_true(selected)[:, :size], index < count)


def all_tokens(x: Tensor, seq: SequenceInfo) -> Gate:
    """The gate that selects every real token of x (B, T, D), with alpha = 1."""
    ones = x.new_ones(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    selected = ones.bool() if seq.mask is None else seq.mask
    return Gate(selected, selected.to(ones.dtype), ones, ones)


class SelectiveAttention(SelfAttention):
    """What attention adds to the tokens that a gate has selected, and nothing to others.

    Of the attention's output o and the residual stream h that is alpha (o - h), or alpha o.

    Args:
        kv_source: whose keys and values are seen: of `"all"` tokens or of those `"selected"`.
        window_unit: what the window counts with selected keys: every `"position"`, or those
            `"selected"`.
        budget: with selected keys, how many are kept; the oldest leave first.
        combine: `"lerp"`, alpha (o - h), or `"residual"`, alpha o.
        dense: whether training computes the attention of tokens that are not selected, so that the
            gate learns what it would have been; not on top of a cache's content. Selected keys then
            take T² bits a row.
        capacity: share of the tokens that is selected, for counting operations.
        options: as of `SelfAttention`. Flash attentions count keys by their places and cannot
            serve queries that are selected.
    """

    def __init__(
        self,
        *,
        kv_source: Literal["all", "selected"],
        window_unit: Literal["position", "selected"],
        budget: int | None,
        combine: Literal["lerp", "residual"],
        dense: bool,
        capacity: float,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.budget: int | None = None
        if kv_source == "selected":
            if budget is None or budget < 1:
                raise ValueError(f"selected keys need a budget of at least 1, got {budget}")
            self.budget = budget
            if window_unit == "selected" and self.window is not None:
                self.budget = min(budget, self.window)
                self.window = None  # no position is out of sight
        self.combine = combine
        self.dense = dense
        self.capacity = capacity

    @property
    def ring(self) -> int | None:
        """Tokens that a query may see at most; as many are kept."""
        return self.window if self.budget is None else self.budget

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Keys, values, their number; of selected keys also their places, and the tokens seen."""
        shapes = super().state_shapes(batch)
        if self.budget is not None:
            shapes |= {"places": (batch, -1), "tokens": (batch,)}
        return shapes

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections and products, of what only selected tokens need by their share."""
        selected = 2 * (self.q_proj.weight.numel() + self.o_proj.weight.numel())
        selected += self._scores_flops(sequence_length)
        keys = 2 * (self.k_proj.weight.numel() + self.v_proj.weight.numel())
        return int(self.capacity * selected + keys * (1 if self.budget is None else self.capacity))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        seq: SequenceInfo,
        past_key_values: RecurrentCache | None = None,
        gate: Gate | None = None,
        stream: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D), the normed stream -> what is added to the stream, (B, T, D).

        Args:
            x: what queries, keys and values are made of.
            seq: padding and documents.
            past_key_values: continue from its keys and values, and add to them.
            gate: which tokens attend; None = all real ones, with alpha = 1.
            stream: h (B, T, D); default x.
        """
        batch, length, _ = x.shape
        gate = all_tokens(x, seq) if gate is None else gate
        stream = x if stream is None else stream
        begins = past_key_values is None or not past_key_values.layers[self.layer_idx].state
        dense = self.training and self.dense and begins
        chosen = None if dense and past_key_values is None else choose(gate.selected)
        # Of which tokens there are keys: of all, or of the chosen ones.
        keyed = None if dense or self.budget is None else chosen
        given = x if keyed is None else keyed.take(x)
        k, v = self._heads(self.k_proj(given)), self._heads(self.v_proj(given))
        layer, state = self._layer(past_key_values, k)

        own = shared_fact(
            seq, ("places", self.window, x.device), lambda: self._places(x, seq, None)
        )
        position = None
        if self.rotary_dim:
            position = positions(seq, own, state.get("position"))
            k = self._rotated(k, position if keyed is None else keyed.take(position))
        update = None
        if dense:
            update = self._combined(self._dense(x, k, v, seq, own, position, gate), stream, gate)
        if layer is None or past_key_values is None or chosen is None:
            if update is None:
                assert chosen is not None
                update = self._gathered(x, k, v, seq, own, position, gate, stream, chosen, {})
            return update
        assert isinstance(layer, KVLayer)

        new: State = {}
        if position is not None:
            new["position"] = next_position(seq, position, state.get("position"))
        if layer.record_past:
            inputs = {"mask": recorded_mask(seq, x)}
            if self.budget is not None:
                inputs["selected"] = gate.selected
            if position is not None:
                inputs["position"] = new["position"].expand(batch, length)
            layer.record(replay_counts if self.budget is None else _replay_selected, inputs, {})
        if position is not None:
            new["position"] = new["position"][:, -1].expand(batch)

        seen = past_key_values.seen_tokens
        if state and _is_step(x, seq, layer):
            update = self._step(x, k, v, position, gate, stream, layer, seen)
        else:
            before = dict(state)
            if before:
                counted = before["length" if self.budget is None else "tokens"]
                own = self._places(x, seq, counted)
            else:
                self.begin(layer, batch, k.dtype, k.device)
            if update is None:
                update = self._gathered(x, k, v, seq, own, position, gate, stream, chosen, before)
            if self.budget is None:
                self._store(layer, k, v, seq, own, seen)
            else:
                k, v = (t if keyed is not None else chosen.take(t) for t in (k, v))
                self._store_selected(layer, k, v, seq, own, chosen, seen)
        layer.write(new)
        return update

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _rotated(self, x: Tensor, position: Tensor) -> Tensor:
        return self._rotate(x, x[:, :, :0], position)[0]

    def _queries(self, x: Tensor, position: Tensor | None) -> Tensor:
        q = self._heads(self.q_proj(x))
        return q if position is None else self._rotated(q, position)

    def _combined(self, o: Tensor, stream: Tensor, gate: Gate) -> Tensor:
        """Attention's output (..., D) -> what is added to the stream (..., D), in its dtype."""
        share = (gate.weight * gate.alpha)[..., None]
        value = o - stream if self.combine == "lerp" else o
        return (share * value).to(stream.dtype)

    def _dense(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        seq: SequenceInfo,
        own: Places,
        position: Tensor | None,
        gate: Gate,
    ) -> Tensor:
        """The output of every token, as if it were selected."""
        q = self._queries(x, position)
        if self.budget is None:
            return self.o_proj(self._attend(q, k, v, seq, own, None).flatten(2))
        rank = gate.selected.cumsum(dim=1)
        number, low = own.number, own.low
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        # A token that is not selected counts as the latest of those that are.
        latest = rank + (~gate.selected).long()
        seen = (number[:, None] <= number[..., None]) & (number[:, None] >= low[..., None])
        seen = seen & gate.selected[:, None] & (latest[..., None] - rank[:, None] < self.budget)
        name = "eager" if self._implementation() == "eager" else "sdpa"
        return self.o_proj(self._call(name, q, k, v, (seen | itself)[:, None]).flatten(2))

    def _gathered(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        seq: SequenceInfo,
        own: Places,
        position: Tensor | None,
        gate: Gate,
        stream: Tensor,
        chosen: Chosen,
        state: State,
    ) -> Tensor:
        """What is added to the stream, by attention of the selected tokens alone."""
        # Where the host does not know how many there are, all queries come, in their places.
        in_place = chosen.index.shape[1] == x.shape[1]
        taken = (lambda t: t) if in_place else chosen.take
        q = self._queries(taken(x), None if position is None else taken(position))
        cached, key_mask = None, None
        if state:
            cached = _Cached.of(state, self.ring)
            k = torch.cat([cached.take(state["keys"]), k], dim=1)
            v = torch.cat([cached.take(state["values"]), v], dim=1)
        if self.budget is None:
            size = 0 if cached is None else cached.size
            seen = state.get("length")
            low, high, key_mask = shared_columns(seq, own, self.window, seen, size)
            low, high = chosen.take(low), chosen.take(high)
        else:
            low, high = self._ranks(gate.selected, seq, own, chosen, state, cached)
        low, high = low.masked_fill(~chosen.valid, 1), high.masked_fill(~chosen.valid, 0)
        places = chosen.index if in_place else None
        y = self._attend_intervals(q, k, v, low, high, key_mask, places)
        o = self.o_proj(y.flatten(2))
        if in_place:
            weight = gate.weight.masked_fill(~gate.selected, 0)
            return self._combined(o, stream, gate._replace(weight=weight))
        picked = Gate(*(chosen.take(t) for t in gate))
        return chosen.put(self._combined(o, chosen.take(stream), picked), x.shape[1])

    def _ranks(
        self,
        selected: Tensor,
        seq: SequenceInfo,
        own: Places,
        chosen: Chosen,
        state: State,
        cached: "_Cached | None",
    ) -> tuple[Tensor, Tensor]:
        """First and last place (B, N), among cached and new selected keys, that each sees."""
        assert self.budget is not None
        before = selected.cumsum(dim=1) - selected.long()
        low = chosen.take(own.low)
        relative = low if not state else low - state["tokens"][:, None]
        column = relative.clamp(0, selected.shape[1] - 1)
        if seq.mask is not None:
            column = first_true(seq.mask).gather(1, column)
        first = torch.where(relative > 0, before.gather(1, column), 0)
        high = torch.arange(low.shape[1], device=low.device)[None].expand_as(low)
        if cached is not None:
            stored = cached.take(state["places"]).masked_fill(~cached.valid, -1)
            first = first + torch.searchsorted(stored, low.contiguous())
            high = high + cached.size
        return torch.maximum(first, high - (self.budget - 1)), high

    def _attend_intervals(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        low: Tensor,
        high: Tensor,
        key_mask: Tensor | None,
        places: Tensor | None,
    ) -> Tensor:
        """q (B, N, H, d) over k, v (B, S, G, d) -> (B, N, H, d), 0 where nothing is seen.

        With places (B, N), the intervals are those of the queries there.
        """
        name = self._implementation()
        k, v = k.to(q.dtype), v.to(q.dtype)
        if places is not None and name in ("eager", "flex_attention"):
            y = self._attend_intervals(rows_at(q, places), k, v, low, high, key_mask, None)
            return put_rows(y, places, q.shape[1])
        if name == "flex_attention":
            number = torch.arange(k.shape[1], device=k.device).expand(k.shape[:2])
            if key_mask is not None:
                number = number.masked_fill(~key_mask, EMPTY)
            mask = block_mask(Places(high, low, high, None), number, q.shape[0])
            y = self._call(name, q, k, v, mask)
            return y.masked_fill((low > high)[..., None, None], 0)
        if name == "eager":
            return interval_attention_definition(q, k, v, low, high, key_mask, self.scaling)
        return interval_attention(
            q, k, v, low, high, key_mask=key_mask, places=places, scale=self.scaling,
            impl=self._impl(),
        )  # fmt: skip

    def _impl(self) -> str:
        """Our kernels where they can run, unless another implementation is stated."""
        return {OWN_ATTENTION: "auto", INTERVALS: "triton"}.get(self._implementation(), "reference")

    def _step(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        gate: Gate,
        stream: Tensor,
        layer: KVLayer,
        columns_before: int,
    ) -> Tensor:
        """One real token (B, 1, D) on top of a state; nothing in it waits for the device."""
        layer.make_room(1, columns_before)
        state, selected = layer.state, gate.selected[:, 0]
        length = state["length"]
        first = store = None
        new: State = {"length": length + 1}
        if self.budget is not None:
            tokens, store = state["tokens"], selected
            new = {"length": length + selected, "tokens": tokens + 1}
            if self.window is not None:
                number = cached_numbers(length, layer.slots)
                held = (number < length[:, None]) & (number >= length[:, None] - self.budget)
                inside = held & (state["places"] > tokens[:, None] - self.window)
                first = length - inside.sum(dim=1)
            slot = (length % layer.slots)[:, None]
            place = torch.where(selected, tokens, state["places"].gather(1, slot)[:, 0])
            state["places"].scatter_(1, slot, place[:, None])
        y = interval_attention_step(
            self._queries(x, position)[:, 0],
            k[:, 0],
            v[:, 0],
            state["keys"],
            state["values"],
            length,
            window=self.ring,
            first=first,
            attend=selected,
            store=store,
            scale=self.scaling,
            impl=self._impl(),
        )
        layer.write(new)
        return self._combined(self.o_proj(y.flatten(1)[:, None]), stream, gate)

    def _store_selected(
        self,
        layer: KVLayer,
        k: Tensor,
        v: Tensor,
        seq: SequenceInfo,
        own: Places,
        chosen: Chosen,
        columns_before: int,
    ) -> None:
        """Keep k, v (B, N, G, d) of the selected tokens of each row's last document."""
        batch, length = chosen.valid.shape[0], own.number.shape[1]
        layer.make_room(length, columns_before)
        slots, stored, tokens = layer.slots, layer.state["length"], layer.state["tokens"]
        place, last = chosen.take(own.rank), chosen.valid
        real = torch.ones(1, length, dtype=torch.bool, device=k.device)
        if seq.mask is not None:
            real = seq.mask
        if own.doc is not None:
            final = own.doc[:, -1:]
            last, real = last & (chosen.take(own.doc) == final), real & (own.doc == final)
            goes_on = final[:, 0] == 0
            stored, tokens = torch.where(goes_on, stored, 0), torch.where(goes_on, tokens, 0)
        place = place + tokens[:, None]
        end, count = chosen.valid.sum(dim=1), last.sum(dim=1)
        used = min(chosen.valid.shape[1], slots)
        # The last `used` of the selected; where the document has fewer, slots keep what they hold.
        at = (end - used).clamp(min=0)[:, None] + torch.arange(used, device=k.device)
        source, start = at.clamp(max=chosen.valid.shape[1] - 1), (end - count)[:, None]
        target = (stored[:, None] + at - start) % slots
        rows = torch.arange(batch, device=k.device)[:, None]
        valid = (at >= start) & (at < end[:, None])
        held = layer.state
        layer.put(
            target,
            torch.where(valid[..., None, None], k[rows, source], held["keys"][rows, target]),
            torch.where(valid[..., None, None], v[rows, source], held["values"][rows, target]),
            places=torch.where(valid, place[rows, source], held["places"][rows, target]),
        )
        layer.write({"length": stored + count, "tokens": tokens + real.sum(dim=1)})


class _Cached(NamedTuple):
    """The latest tokens of a cache layer, in order, the last one rightmost.

    Attributes:
        slot: (B, S') where they lie.
        valid: (B, S') False where a row has fewer.
    """

    slot: Tensor
    valid: Tensor

    @classmethod
    def of(cls, state: State, ring: int | None) -> "_Cached":
        slot = latest(state["keys"], state["length"], ring)
        before = slot.shape[1] - torch.arange(slot.shape[1], device=slot.device)
        return cls(slot, state["length"][:, None] >= before)

    @property
    def size(self) -> int:
        return self.slot.shape[1]

    def take(self, held: Tensor) -> Tensor:
        """held (B, S, ...) -> (B, S', ...)."""
        return held[torch.arange(len(held), device=held.device)[:, None], self.slot]


def _is_step(x: Tensor, seq: SequenceInfo, layer: KVLayer) -> bool:
    """Whether x (B, T, D) is one real token whose keys may be written in place."""
    return (
        x.shape[1] == 1
        and seq.mask is None
        and seq.seq_idx is None
        and not torch.is_grad_enabled()
        and not any(t.requires_grad for t in layer.state.values())
    )


def _replay_selected(
    state: State, inputs: dict[str, Tensor], constants: dict[str, Tensor]
) -> State:
    """Counts after the recorded tokens; keys, values and places stay in their slots."""
    after = replay_counts({**state, "length": state["tokens"]} if state else {}, inputs, constants)
    stored = inputs["selected"].sum(dim=1)
    after["tokens"] = after["length"]
    after["length"] = state["length"] + stored if state else stored
    return after
