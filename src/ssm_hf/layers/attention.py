"""Softmax attention among recurrent layers: grouped heads, windows, rotary positions.

The product of queries, keys and values is ours, or left to transformers' attention functions.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ssm_hf.cache import KVLayer, RecurrentCache, RecurrentLayer, State
from ssm_hf.layers.attention_functions import call_attention, call_by_document
from ssm_hf.layers.attention_mask import (
    Places,
    block_mask,
    cached_numbers,
    dense_mask,
    latest,
    next_position,
    places,
    positions,
    shared_columns,
    shared_fact,
)
from ssm_hf.layers.linear import Linear
from ssm_hf.layers.mixer import (
    CausalConv1d,
    Initialization,
    Mixer,
    recorded_mask,
    replayed_window,
    reset_conv,
    reset_linear,
    reset_out_proj,
)
from ssm_hf.ops.dispatch import pick
from ssm_hf.ops.interval_attention import (
    interval_attention,
    interval_attention_step,
    why_unsupported,
)
from ssm_hf.ops.packing import compute_dtype
from ssm_hf.sequence import SequenceInfo

# The implementation that models take where none is stated: kernels of ours for packed, padded and
# windowed rows and for single tokens, `sdpa` for the rest.
OWN_ATTENTION = "ssm_hf"
# Those kernels for all rows, on request: an error where they cannot run.
INTERVALS = "interval_attention"
# Queries that share one piece of a mask along a window.
_PIECE = 1024


class AttentionMixer(Mixer):
    """softmax(q kᵀ scale) v over the real tokens of a document, up to the query, within a window.

    Subclasses make queries, keys and values, and project the result back.

    Args:
        num_heads: H.
        num_kv_heads: G, divides H; head h reads keys and values h // (H / G).
        head_dim: d.
        window: tokens that a query sees, itself included; None = all before it.
        rotary_dim: the first so many dimensions of queries and keys are rotated by their position,
            in two halves; 0 = none.
        rope_theta: base of the rotation's wave lengths.
        scaling: of the scores; None = d^-0.5.
        dropout: of the attention weights, in training.
        config: its `_attn_implementation` chooses among `ssm_hf` (see `OWN_ATTENTION`), `eager`,
            `interval_attention`, `sdpa`, `flex_attention` and the flash attentions at every call;
            None = `ssm_hf`. One-token steps take `sdpa` in place of the last two.
        layer_idx: place in the cache.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()
    is_causal = True  # read by transformers' functions

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        rotary_dim: int,
        rope_theta: float,
        scaling: float | None,
        dropout: float,
        config: PreTrainedConfig | None,
        layer_idx: int,
    ) -> None:
        super().__init__(layer_idx)
        check_attention(num_heads, num_kv_heads, head_dim, window, rotary_dim)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.num_key_value_groups = num_heads // num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.rotary_dim = rotary_dim
        self.rope_theta = rope_theta
        self.scaling = head_dim**-0.5 if scaling is None else scaling
        self.dropout = dropout
        self.config = config

    @property
    def ring(self) -> int | None:
        """Tokens that a query may see at most, so that no more are kept; None = all."""
        return self.window

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Keys and values, the number of tokens, and the position of the next one."""
        shapes: dict[str, tuple[int, ...]] = {
            "keys": (batch, -1, self.num_kv_heads, self.head_dim),
            "values": (batch, -1, self.num_kv_heads, self.head_dim),
            "length": (batch,),
        }
        if self.rotary_dim:
            shapes["position"] = (batch,)
        return shapes

    def _layer(
        self, past_key_values: RecurrentCache | None, x: Tensor
    ) -> tuple[RecurrentLayer | None, State]:
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            if not isinstance(layer, KVLayer):
                raise ValueError(
                    f"past_key_values belongs to another model: its layer {self.layer_idx} has no "
                    "keys and values"
                )
            layer.window = self.ring
        return super()._layer(past_key_values, x)

    def _project(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> queries, keys and values (B, T, (H + 2 G) d), side by side."""
        raise NotImplementedError

    def _convolve(
        self, qkv: Tensor, seq: SequenceInfo, state: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What happens to the projections before they are used, and its state."""
        return qkv, None

    def _output(self, y: Tensor) -> Tensor:
        """y (B, T, H d) -> (B, T, D)."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, seq: SequenceInfo, past_key_values: RecurrentCache | None = None
    ) -> Tensor:
        """Mix x (B, T, D); with a cache, continue from its keys and values and add to them."""
        batch, length, _ = x.shape
        raw = self._project(x)
        layer, state = self._layer(past_key_values, raw)
        qkv, conv_state = self._convolve(raw, seq, state.get("conv_state"), layer is not None)
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = qkv.unflatten(-1, (sum(sizes), self.head_dim)).split(sizes, dim=2)
        own = shared_fact(
            seq, ("places", self.window, x.device), lambda: self._places(x, seq, None)
        )
        position = None
        if self.rotary_dim:
            position = positions(seq, own, state.get("position"))
            q, k = self._rotate(q, k, position)
        if layer is None or past_key_values is None:
            return self._output(self._attend(q, k, v, seq, own, None).flatten(2))
        assert isinstance(layer, KVLayer)
        new: State = {} if conv_state is None else {"conv_state": conv_state}
        if position is not None:
            new["position"] = next_position(seq, position, state.get("position"))
        if layer.record_past:
            inputs = {"mask": recorded_mask(seq, x)}
            constants: dict[str, Tensor] = {}
            if position is not None:
                inputs["position"] = new["position"].expand(batch, length)
            if isinstance(self, FusedAttention) and self.conv1d is not None:
                inputs["conv_in"] = raw
                constants = self.conv1d.replay_constants(raw)
            layer.record(replay_counts, inputs, constants)
        if position is not None:
            new["position"] = new["position"][:, -1].expand(batch)

        fresh, seen = not state, past_key_values.seen_tokens
        if length == 1 and seq.mask is None and seq.seq_idx is None and not fresh:
            y = self._step(q, k, v, seq, own, layer, seen)
        elif fresh:
            y = self._attend(q, k, v, seq, own, None)
            self.begin(layer, batch, raw.dtype, raw.device)
            self._store(layer, k, v, seq, own, seen)
        else:
            y = self._attend(q, k, v, seq, self._places(x, seq, state["length"]), state)
            self._store(layer, k, v, seq, own, seen)
        layer.write(new)
        return self._output(y.flatten(2))

    def begin(
        self,
        layer: RecurrentLayer,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[..., Tensor] = torch.zeros,
    ) -> None:
        """Put the state before a first token into the cache layer."""
        assert isinstance(layer, KVLayer)
        layer.window = self.ring
        super().begin(layer, batch, dtype, device, make)

    def _places(self, x: Tensor, seq: SequenceInfo, seen: Tensor | None) -> Places:
        return places(seq, x.shape[1], self.window, x.device, seen)

    def _rotate(self, q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, H, d), k (B, T, G, d) turned by position (B, T) (Su et al. 2021)."""
        dtype, half = compute_dtype(q), self.rotary_dim // 2
        step = torch.arange(half, device=q.device, dtype=dtype) / half
        angle = position.to(dtype)[..., None] * torch.exp(step * -math.log(self.rope_theta))
        cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]

        def turned(x: Tensor) -> Tensor:
            a, b, rest = x.split([half, half, self.head_dim - 2 * half], dim=-1)
            a, b = a.to(dtype), b.to(dtype)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
            return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

        return turned(q), turned(k)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, seq: SequenceInfo, own: Places, state: State | None
    ) -> Tensor:
        """q (B, T, H, d) over the new keys and values (B, T, G, d), and the cached ones if any."""
        name = self._implementation()
        if name not in (OWN_ATTENTION, INTERVALS):
            return self._attend_by(name, q, k, v, seq, own, state)
        by_torch = partial(self._attend_by, "sdpa")
        plain = seq.mask is None and seq.seq_idx is None and state is None
        if plain and name == OWN_ATTENTION and not self._banded(q):
            # Plainly causal: what torch's fused kernels are made for.
            return by_torch(q, k, v, seq, own, state)
        run = self._own_or(by_torch, self._attend_intervals_of, q, k, v)
        return run(q, k, v, seq, own, state)

    def _banded(self, q: Tensor) -> bool:
        """Whether the window hides keys of the call from queries (B, T, H, d) of the call."""
        return self.window is not None and q.shape[1] > self.window

    def _own_or(self, by_torch: Any, by_kernels: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """What runs on these: our kernels where they can, as for any operator."""
        unsupported = why_unsupported(q, k, v)
        if self.training and self.dropout:
            unsupported = "its kernels drop no attention weights out"
        return pick(
            "interval_attention",
            "triton" if self._implementation() == INTERVALS else "auto",
            q.device,
            reference=by_torch,
            triton=by_kernels,
            unsupported=unsupported,
        )

    def _attend_intervals_of(
        self, q: Tensor, k: Tensor, v: Tensor, seq: SequenceInfo, own: Places, state: State | None
    ) -> Tensor:
        """By our kernels; pads see nothing."""
        k, v = k.to(q.dtype), v.to(q.dtype)
        seen, cached = None, 0
        if state is not None:
            seen = state["length"]
            slots = latest(state["keys"], seen, self.ring)
            rows, cached = torch.arange(len(slots), device=q.device)[:, None], slots.shape[1]
            k = torch.cat([state["keys"][rows, slots].to(q.dtype), k], dim=1)
            v = torch.cat([state["values"][rows, slots].to(q.dtype), v], dim=1)
        low, high, real = shared_columns(seq, own, self.window, seen, cached)
        return interval_attention(
            q, k, v, low, high, key_mask=real, scale=self.scaling, impl="triton"
        )

    def _attend_by(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq: SequenceInfo,
        own: Places,
        state: State | None,
    ) -> Tensor:
        """The same by a function of transformers."""
        batch, length = q.shape[:2]
        plain = seq.mask is None and seq.seq_idx is None and state is None
        banded = self._banded(q)
        if plain and name not in ("eager", "flex_attention") and not banded:
            return self._call(name, q, k, v, None)
        if name.startswith("flash") and plain:
            return self._call(name, q, k, v, None, sliding_window=self.window)
        numbers = own.number
        if state is not None:
            k = torch.cat([state["keys"], k], dim=1)
            v = torch.cat([state["values"], v], dim=1)
            cached = cached_numbers(state["length"], state["keys"].shape[1])
            numbers = torch.cat([cached, numbers.expand(batch, -1)], dim=1)
        if name.startswith("flash"):
            return call_by_document(self, name, q, k, v, own, numbers)
        if plain and banded and length > _PIECE:
            assert self.window is not None
            pieces = []
            for start in range(0, length, _PIECE):
                end = min(start + _PIECE, length)
                first = max(start - self.window + 1, 0)
                part = Places(own.number[:, start:end], own.low[:, start:end], own.rank, None)
                mask = self._mask(name, part, numbers[:, first:end], q)
                pieces.append(
                    self._call(name, q[:, start:end], k[:, first:end], v[:, first:end], mask)
                )
            return torch.cat(pieces, dim=1)
        make = partial(self._mask, name, own, numbers, q)
        shared = state is None
        key = ("mask", name == "flex_attention", self.window, q.device)
        return self._call(name, q, k, v, shared_fact(seq, key, make) if shared else make())

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq: SequenceInfo,
        own: Places,
        layer: KVLayer,
        columns_before: int,
    ) -> Tensor:
        """q (B, 1, H, d) over what is cached and its own k, v (B, 1, G, d), which are stored."""

        def by_torch() -> Tensor:
            self._store(layer, k, v, seq, own, columns_before)
            return self._attend_cache(q, layer)

        def by_kernels() -> Tensor:
            layer.make_room(1, columns_before)
            held = layer.state
            y = interval_attention_step(
                q[:, 0],
                k[:, 0],
                v[:, 0],
                held["keys"],
                held["values"],
                held["length"],
                window=self.window,
                scale=self.scaling,
                impl="triton",
            )
            layer.write({"length": held["length"] + 1})
            return y[:, None]

        held, name = layer.state, self._implementation()
        differentiable = torch.is_grad_enabled() and any(
            t.requires_grad for t in (q, k, v, held["keys"], held["values"])
        )
        if differentiable and name == INTERVALS:
            # The kernels of one token have no gradients, those of many do.
            among = places(seq, 1, self.window, q.device, held["length"])
            y = self._attend(q, k, v, seq, among, held)
            self._store(layer, k, v, seq, own, columns_before)
            return y
        if differentiable or name not in (OWN_ATTENTION, INTERVALS):
            return by_torch()
        return self._own_or(by_torch, by_kernels, q, held["keys"], held["values"])()

    def _attend_cache(self, q: Tensor, layer: KVLayer) -> Tensor:
        """q (B, 1, H, d) over what is cached, the query's own token included."""
        keys, seen = layer.state["keys"], layer.state["length"]
        slot = torch.arange(keys.shape[1], device=keys.device)
        if self.window is None or keys.shape[1] <= self.window:
            mask = slot < seen[:, None]
        else:
            number = cached_numbers(seen, keys.shape[1])
            mask = (number < seen[:, None]) & (number >= seen[:, None] - self.window)
        name = "eager" if self._implementation() == "eager" else "sdpa"
        return self._call(name, q, keys, layer.state["values"], mask[:, None, None])

    def _mask(self, name: str, own: Places, keys: Tensor, q: Tensor) -> Any:
        if name == "flex_attention":
            return block_mask(own, keys, q.shape[0])
        return dense_mask(own, keys)

    def _implementation(self) -> str:
        return getattr(self.config, "_attn_implementation", None) or OWN_ATTENTION

    def _call(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
    ) -> Tensor:
        return call_attention(self, name, q, k, v, mask, **options)

    def _store(
        self, layer: KVLayer, k: Tensor, v: Tensor, seq: SequenceInfo, own: Places, columns: int
    ) -> None:
        """Keep k, v (B, T, G, d) of the real tokens of each row's last document.

        `columns` tokens, pads included, came in before.
        """
        batch, length = k.shape[:2]
        layer.make_room(length, columns)
        slots, seen = layer.slots, layer.state["length"]
        used = min(length, slots)
        if seq.mask is None and seq.seq_idx is None:
            number = seen[:, None] + torch.arange(length - used, length, device=k.device)
            layer.put(number % slots, k[:, length - used :], v[:, length - used :])
            layer.write({"length": seen + length})
            return
        keep = torch.ones(batch, length, dtype=torch.bool, device=k.device)
        if seq.mask is not None:
            keep &= seq.mask
        if own.doc is not None:
            last = own.doc[:, -1:]
            keep &= own.doc == last
            seen = torch.where(last[:, 0] == 0, seen, 0)
        count = keep.sum(dim=1)
        # The last `used` kept tokens of each row; where there are fewer, slots keep what they hold.
        order = (~keep).to(torch.int8).sort(dim=1, stable=True).indices
        at = (count - used).clamp(min=0)[:, None] + torch.arange(used, device=k.device)
        source = order.gather(1, at.clamp(max=length - 1))
        target = (seen[:, None] + at) % slots
        rows = torch.arange(batch, device=k.device)[:, None]
        valid = (at < count[:, None])[..., None, None]
        layer.put(
            target,
            torch.where(valid, k[rows, source], layer.state["keys"][rows, target]),
            torch.where(valid, v[rows, source], layer.state["values"][rows, target]),
        )
        layer.write({"length": seen + count})

    def _scores_flops(self, sequence_length: int) -> int:
        """Both products with the mean number of keys that a token sees."""
        n = sequence_length
        w = n if self.window is None else min(self.window, n)
        seen = w * n - w * (w - 1) // 2
        return 4 * self.num_heads * self.head_dim * seen // n


class SelfAttention(AttentionMixer):
    """Attention with projections of their own for queries, keys and values.

    Args:
        hidden_size: D.
        use_bias: biases of q_proj, k_proj and v_proj.
        use_out_bias: bias of o_proj.
        options: as of `AttentionMixer`.
    """

    def __init__(
        self, *, hidden_size: int, use_bias: bool, use_out_bias: bool, **options: Any
    ) -> None:
        super().__init__(**options)
        inner, grouped = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(hidden_size, inner, bias=use_bias)
        self.k_proj = Linear(hidden_size, grouped, bias=use_bias)
        self.v_proj = Linear(hidden_size, grouped, bias=use_bias)
        self.o_proj = Linear(inner, hidden_size, bias=use_out_bias)
        self.reset_parameters("mamba_ssm", std=0.0, num_residual_layers=None)

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values."""
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            reset_linear(linear, scheme, std)
        reset_out_proj(self.o_proj, num_residual_layers)

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, and the products with the keys and values that a token sees."""
        linear = sum(m.weight.numel() for m in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        return 2 * linear + self._scores_flops(sequence_length)

    def _project(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)

    def _output(self, y: Tensor) -> Tensor:
        return self.o_proj(y)


class FusedAttention(AttentionMixer):
    """Attention with one projection [q | k | v], which a causal convolution may follow.

    The convolution is linear; its state are the raw projections before it.

    Args:
        hidden_size: D.
        conv_kernel: K; 0 = no convolution.
        use_conv_bias: bias of the convolution.
        use_bias: bias of in_proj.
        use_out_bias: bias of out_proj.
        options: as of `AttentionMixer`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        conv_kernel: int,
        use_conv_bias: bool,
        use_bias: bool,
        use_out_bias: bool,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        inner = self.num_heads * self.head_dim
        width = inner + 2 * self.num_kv_heads * self.head_dim
        self.in_proj = Linear(hidden_size, width, bias=use_bias)
        self.conv_kernel = conv_kernel
        self.conv1d = None
        if conv_kernel:
            self.conv1d = CausalConv1d(width, conv_kernel, bias=use_conv_bias, activation=None)
        self.out_proj = Linear(inner, hidden_size, bias=use_out_bias)
        self.reset_parameters("mamba_ssm", std=0.0, num_residual_layers=None)

    def reset_parameters(
        self, scheme: Initialization, std: float, num_residual_layers: int | None
    ) -> None:
        """Draw all initial values."""
        reset_linear(self.in_proj, scheme, std)
        if self.conv1d is not None:
            reset_conv(self.conv1d, scheme)
        reset_out_proj(self.out_proj, num_residual_layers)

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Keys and values, numbers of tokens, and the last K-1 inputs of the convolution."""
        shapes = super().state_shapes(batch)
        if self.conv1d is not None:
            width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
            shapes["conv_state"] = (batch, self.conv_kernel - 1, width)
        return shapes

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, convolution, and the products with the keys and values that a token sees."""
        weights = [self.in_proj.weight, self.out_proj.weight]
        if self.conv1d is not None:
            weights.append(self.conv1d.weight)
        return 2 * sum(w.numel() for w in weights) + self._scores_flops(sequence_length)

    def _project(self, x: Tensor) -> Tensor:
        return self.in_proj(x)

    def _convolve(
        self, qkv: Tensor, seq: SequenceInfo, state: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.conv1d is None:
            return qkv, None
        return self.conv1d(qkv, seq, state, return_state)

    def _output(self, y: Tensor) -> Tensor:
        return self.out_proj(y)


def check_attention(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, rotary_dim: int
) -> None:
    """Raise `ValueError` where the sizes of an attention layer do not fit one another."""
    for name, value in (
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads must divide num_heads, got num_kv_heads={num_kv_heads}, "
            f"num_heads={num_heads}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 token, or None for all, got {window}")
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim must be even and lie between 0 and head_dim={head_dim}, got {rotary_dim}"
        )


def replay_counts(state: State, inputs: dict[str, Tensor], constants: dict[str, Tensor]) -> State:
    """Counts after the recorded tokens; keys and values stay in their slots."""
    length = inputs["mask"].sum(dim=1)
    after: State = {"length": state["length"] + length if state else length}
    if "position" in inputs:
        after["position"] = inputs["position"][:, -1]
    if "conv_in" in inputs:
        after["conv_state"] = replayed_window(state, inputs, constants)
    return after
