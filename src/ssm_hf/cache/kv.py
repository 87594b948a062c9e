"""Keys and values of an attention layer between calls."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ssm_hf.cache.recurrent import RecurrentLayer, State

# Slots of a layer that has seen little; more come in powers of two, so that few sizes occur.
_FEWEST_SLOTS = 64


class KVLayer(RecurrentLayer):
    """State of one attention layer: each row's real tokens alone, without pads.

    Token number p of a row's document lies in slot p mod S of `keys` and `values` (B, S, G, d);
    `length` (B,) int64 counts the tokens. S grows with the sequence in powers of two, but not
    beyond the window. `reserve` makes it large enough beforehand, so that addresses stay fixed.
    Slots beyond `length` hold finite numbers of no meaning.

    To take tokens back, `length` is set back; a window keeps some more slots than it is long while
    past recording is on, so that what comes into sight again has not been overwritten.

    Args:
        record_window, state_dtype: as in `RecurrentLayer`; keys and values keep their dtype.
    """

    slotted: ClassVar[tuple[str, ...]] = ("keys", "values")  # (B, S, ...) each

    def __init__(self, record_window: int = 256, state_dtype: torch.dtype | None = None) -> None:
        super().__init__(record_window, state_dtype)
        self.window: int | None = None  # tokens that a query sees, as its mixer says; None = all
        self.grows = True
        self._columns = 0  # tokens seen, pads included: no row is longer
        self._reserved = 0

    def like(self) -> "KVLayer":
        """An empty layer of the same kind, whose tensors will never be replaced by larger ones."""
        layer = type(self)(self.record_window, self.state_dtype)
        layer.window, layer.grows = self.window, False
        return layer

    @property
    def slots(self) -> int:
        """S, 0 while empty."""
        return self.state["keys"].shape[1] if self.state else 0

    def begin(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        make: Callable[..., Tensor] = torch.zeros,
    ) -> None:
        """Hold the state before a first token: no token, and room for those reserved."""
        slots = self._room(self._reserved, self.window)
        shapes = {k: tuple(slots if n == -1 else n for n in v) for k, v in shapes.items()}
        super().begin(shapes, dtypes, device, make)

    def reserve(self, tokens: int) -> None:
        """Be ready for a sequence of so many tokens, once there is a state."""
        self._reserved = max(self._reserved, tokens)

    @property
    def room(self) -> int | None:
        """Tokens of the longest sequence that fits; None = any, a window is always full."""
        full = self.window is not None and self.slots >= self.window
        return None if full or not self.state else self.slots

    def grow(self, tokens: int) -> None:
        """Make room for a sequence of so many tokens."""
        if self.state:
            self._resize(self._room(max(tokens, self._reserved), self.window))

    def make_room(self, tokens: int, seen: int) -> None:
        """Grow a layer that has begun, where that is needed, for so many tokens more.

        Args:
            tokens: of the next call.
            seen: columns before it, as far as the caller knows.
        """
        if not self.grows:
            return
        recorded = self.record_window if self._columns == 0 else max(self.record_window, tokens)
        self._columns = max(self._columns, seen) + tokens
        limit = self.window
        if limit is not None and self.record_past:
            limit += 2 * recorded  # `record` never keeps more
        self._resize(self._room(max(self._columns, self._reserved), limit))

    def _resize(self, needed: int) -> None:
        slots = self.slots
        if needed <= slots:
            return
        # Where each new slot's token lay before.
        last = self.state["length"][:, None] - 1
        slot = torch.arange(needed, device=last.device)
        token = last - (last - slot) % needed
        source = torch.where(token > last - slots, token, -1)
        rows = torch.arange(last.shape[0], device=last.device)[:, None]
        for name in self.slotted:
            moved = self.state[name][rows, source.clamp(min=0) % slots]
            held = (source >= 0).reshape(*source.shape, *[1] * (moved.ndim - 2))
            self.state[name] = torch.where(held, moved, 0)

    @staticmethod
    def _room(tokens: int, limit: int | None) -> int:
        slots = max(_FEWEST_SLOTS, 1 << max(tokens - 1, 0).bit_length())
        return slots if limit is None else min(slots, limit)

    def put(self, slots: Tensor, keys: Tensor, values: Tensor, **others: Tensor) -> None:
        """Write keys and values (B, U, G, d), and what else is kept of a token, into slots (B, U):
        in place, unless gradients flow."""
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        for name, new in {"keys": keys, "values": values, **others}.items():
            old = self.state[name]
            if new.requires_grad or old.requires_grad:
                self.state[name] = old.index_put((rows, slots), new.to(old.dtype))
            else:
                old.index_put_((rows, slots), new.to(old.dtype))

    def write(self, state: State) -> None:
        """Replace the state."""
        super().write(state)
        if "keys" in state:
            # The host does not follow the counts of every row; this is no part of a fast path.
            self._columns = int(self.state["length"].max())

    def _replayed(self) -> State:
        return {name: t for name, t in self.state.items() if name not in self.slotted}

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens."""
        super().crop(tokens_to_remove)
        self._columns += tokens_to_remove

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._columns = 0


class SelectedKVLayer(KVLayer):
    """State of an attention layer that keeps selected tokens alone.

    `length` counts those, and token number p of them lies in slot p mod S; the window is the number
    that is kept. `places` (B, S) int64 says where each stood among the real tokens of the row's
    document, and `tokens` (B,) how many of these have been seen.
    """

    slotted: ClassVar[tuple[str, ...]] = ("keys", "values", "places")
