"""What a model keeps between calls: states of recurrent layers, keys and values of attention.

A layer's state is a dict of named tensors, written only by its mixer. Tensors keep their addresses
while shapes stay the same; only the keys and values of full attention grow with the sequence.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ssm_hf.cache.kv import KVLayer, SelectedKVLayer
from ssm_hf.cache.recurrent import RecurrentLayer, Replay, State, StatelessLayer, kept_dtype

__all__ = [
    "CacheSnapshot",
    "KVLayer",
    "RecurrentCache",
    "RecurrentLayer",
    "Replay",
    "SelectedKVLayer",
    "State",
    "StatelessLayer",
    "kept_dtype",
    "layer_classes",
]


class CacheSnapshot(NamedTuple):
    """A copy of a cache's content at one moment; see `RecurrentCache.snapshot`."""

    seen_tokens: int
    states: tuple[State, ...]


# By transformers' words for what a layer is, and some of our own.
_LAYERS: dict[str, type[RecurrentLayer]] = {
    "linear_attention": RecurrentLayer,
    "full_attention": KVLayer,
    "sliding_attention": KVLayer,
    "selected_attention": SelectedKVLayer,
    "mlp": StatelessLayer,
    "moe": StatelessLayer,
}


def layer_classes(config: PreTrainedConfig) -> list[type[RecurrentLayer]]:
    """What each block of a model keeps its state in, by the config's `layer_types`."""
    kinds: list[str] = config.layer_types  # pyright: ignore[reportAttributeAccessIssue]
    return [_LAYERS[kind] for kind in kinds]


class RecurrentCache(Cache):
    """One layer object per block of the model, and a count of the tokens seen (pads included).

    Args:
        config: model config; its `layer_types` say what each of its blocks keeps.
        record_window: tokens of a prompt that `crop` can take back once past recording is on.
        state_dtype: in which the scans' states are kept between calls; None = fp32 or wider. With
            `torch.bfloat16` a decoding step moves half the memory, and rounds the state each time.

    Raises:
        ValueError: `state_dtype` is not a floating-point dtype.
    """

    layers: list[RecurrentLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        record_window: int = 256,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype must be a floating-point dtype, got {state_dtype}")
        self.seen_tokens = 0
        layers = [kind(record_window, state_dtype) for kind in layer_classes(config)]
        super().__init__(layers=layers)  # pyright: ignore[reportArgumentType]

    @classmethod
    def like(cls, cache: "RecurrentCache") -> "RecurrentCache":
        """An empty cache with the same layers, which will not grow."""
        empty = cls.__new__(cls)
        empty.seen_tokens = 0
        layers = [layer.like() for layer in cache.layers]
        Cache.__init__(empty, layers=layers)  # pyright: ignore[reportArgumentType]
        return empty

    @property
    def stateful(self) -> list[RecurrentLayer]:
        """The layers that keep anything."""
        return [layer for layer in self.layers if not isinstance(layer, StatelessLayer)]

    def reserve(self, tokens: int) -> None:
        """Be ready for sequences of so many tokens: up to there, no tensor moves once it exists."""
        for layer in self.layers:
            layer.reserve(tokens)

    @property
    def room(self) -> int | None:
        """Tokens of the longest sequence that fits without any tensor growing; None = any."""
        rooms = [room for layer in self.layers if (room := layer.room) is not None]
        return min(rooms) if rooms else None

    def grow(self, tokens: int) -> None:
        """Make room for so many tokens more."""
        for layer in self.layers:
            layer.grow(self.seen_tokens + tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, pads included."""
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no longest sequence."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of a mask over the cached and the new tokens."""
        return self.seen_tokens + query_length, 0

    def zero_(self) -> None:
        """Fill all states with zeros, in place."""
        alike: dict[torch.dtype, list[torch.Tensor]] = {}
        for layer in self.layers:
            for tensor in layer.state.values():
                alike.setdefault(tensor.dtype, []).append(tensor)
        for tensors in alike.values():  # of several dtypes at once they would be filled one by one
            torch._foreach_zero_(tensors)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether the layer (default: the last that keeps any) holds a state."""
        return bool((self.stateful[-1] if layer_idx is None else self.layers[layer_idx]).state)

    @property
    def batch_size(self) -> int:
        """Rows of the stored states, -1 while empty."""
        return next((t.shape[0] for x in self.layers for t in x.state.values()), -1)

    @property
    def nbytes(self) -> int:
        """Size of all states in bytes; only full attention lets it grow with the sequence."""
        return sum(layer.nbytes for layer in self.layers)

    def reset(self) -> None:
        """Forget everything: the next call starts a sequence."""
        super().reset()
        self.seen_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, which must have been recorded."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 gives a tensor
        if -tokens_to_remove > self.seen_tokens:
            raise ValueError(
                f"cannot take back {-tokens_to_remove} tokens of {self.seen_tokens} seen"
            )
        super().crop(tokens_to_remove)
        self.seen_tokens += tokens_to_remove

    def snapshot(self) -> CacheSnapshot:
        """Copy of the present content, to `restore` any number of times."""
        return CacheSnapshot(
            self.seen_tokens,
            tuple(
                {name: t.detach().clone() for name, t in layer.state.items()}
                for layer in self.layers
            ),
        )

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Return to the content of `snapshot`, taken from this cache or one of the same model.

        Raises:
            ValueError: the snapshot has another number of layers.
        """
        if len(snapshot.states) != len(self.layers):
            raise ValueError(
                f"snapshot has {len(snapshot.states)} layers, this cache has {len(self.layers)}"
            )
        for layer, state in zip(self.layers, snapshot.states, strict=True):
            held = layer.state
            layer.reset()
            layer.state = {name: t for name, t in held.items() if name in state}
            layer.write(state)
        self.seen_tokens = snapshot.seen_tokens
