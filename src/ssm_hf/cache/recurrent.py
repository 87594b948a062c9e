"""State of one layer between calls.

A layer's state is a dict of named tensors, written only by its mixer. Its size does not depend on
the number of tokens seen. Tensors keep their addresses while shapes stay the same.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
# (state before, inputs (B, T, ...) of the tokens to replay, constants) -> state after them
Replay = Callable[[State, dict[str, Tensor], dict[str, Tensor]], State]

# What came in at the last tokens, as it came; nothing is summed in it.
_INPUTS = ("conv_state", "k_state", "v_state", "keys", "values")
# Rounded, these would go wrong for good: an angle of a bf16 number is up to 0.02 off.
_NEVER_ROUNDED = ("angle_state",)
# Numbers of tokens, and numbers of their places.
_COUNTS = ("length", "position", "tokens", "places")


def kept_dtype(
    name: str, activations: torch.dtype, wide: torch.dtype, asked: torch.dtype | None
) -> torch.dtype:
    """The dtype in which a layer keeps the state `name`: the one place that says it.

    Args:
        name: of the state.
        activations: dtype of the mixer's activations, in which recent inputs are kept.
        wide: dtype that the scan computes in, in which its sums are kept,
        asked: unless another one is asked for.
    """
    if name in _COUNTS:
        return torch.int64
    if name in _INPUTS:
        return activations
    return wide if asked is None or name in _NEVER_ROUNDED else asked


class RecurrentLayer:
    """State of one recurrent layer.

    With past recording on, the layer also keeps the state before the latest calls and those calls'
    scan inputs, so that `crop` can take tokens back by replaying the ones that stay.

    Args:
        record_window: tokens of a long call whose inputs are kept for `crop`.
        state_dtype: of the scan's sums, see `kept_dtype`; None = as computed.
    """

    is_compileable = False  # generate() must not wrap the forward pass in torch.compile on its own
    supports_early_init = False
    is_sliding = False

    def __init__(self, record_window: int = 256, state_dtype: torch.dtype | None = None) -> None:
        self.state: State = {}
        self.state_dtype = state_dtype
        self.record_past = False
        self.record_window = record_window
        self._home: torch.device | None = None
        self._before: State = {}  # state before the recorded tokens
        self._inputs: dict[str, Tensor] = {}  # (B, tokens, ...) each
        self._constants: dict[str, Tensor] = {}
        self._replay: Replay | None = None
        self._tickets: Tensor | None = None

    def __repr__(self) -> str:
        shapes = {name: tuple(t.shape) for name, t in self.state.items()}
        return f"{type(self).__name__}({shapes})"

    def like(self) -> "RecurrentLayer":
        """An empty layer of the same kind, whose tensors will never be replaced by larger ones."""
        return type(self)(self.record_window, self.state_dtype)

    def begin(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        make: Callable[..., Tensor] = torch.zeros,
    ) -> None:
        """Hold the state that stands before a first token: zeros, if `make` makes those."""
        with torch.inference_mode(False):
            self.state = {
                name: make(shape, dtype=dtypes[name], device=device)
                for name, shape in shapes.items()
            }

    def reserve(self, tokens: int) -> None:
        """Be ready for a sequence of so many tokens, once there is a state; a recurrent one is."""

    def grow(self, tokens: int) -> None:
        """Make room for a sequence of so many tokens; a recurrent state has it."""

    @property
    def room(self) -> int | None:
        """Tokens of the longest sequence that fits; None = any."""
        return None

    def read(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
    ) -> State:
        """The state, or {} before the first call.

        Raises:
            ValueError: the stored state is that of another batch size, model or dtype.
        """
        if self.state and self.state.keys() != shapes.keys():
            raise ValueError(
                f"past_key_values holds {sorted(self.state)}, this layer needs {sorted(shapes)}: "
                "the cache belongs to another model"
            )
        for name, stored in self.state.items():
            # -1 stands for any number of slots.
            held, needed = (
                tuple(n for n, m in zip(sizes, shapes[name], strict=False) if m != -1)
                for sizes in (stored.shape, shapes[name])
            )
            if stored.ndim != len(shapes[name]) or held != needed:
                what = "batch size" if held[1:] == needed[1:] else "model"
                raise ValueError(
                    f"past_key_values belongs to another {what}: {name} has shape "
                    f"{tuple(stored.shape)}, expected {tuple(shapes[name])}"
                )
            if stored.dtype != dtypes[name]:
                raise ValueError(
                    f"past_key_values belongs to another dtype: {name} is {stored.dtype}, "
                    f"expected {dtypes[name]}"
                )
        return self.state

    def write(self, state: State) -> None:
        """Replace the state: in place where tensors exist, by reference where gradients flow."""
        for name, computed in state.items():
            dtype = kept_dtype(name, computed.dtype, computed.dtype, self.state_dtype)
            old = self.state.get(name)
            if computed.requires_grad or (old is not None and old.requires_grad):
                self.state[name] = computed.to(dtype)
            elif old is None or old.shape != computed.shape or old.device != computed.device:
                # A copy, not a view that keeps a whole prompt alive.
                new = torch.empty(computed.shape, dtype=dtype, device=computed.device)
                self.state[name] = new.copy_(computed.detach())
            else:
                old.copy_(computed)

    def tickets(self, batch: int, groups: int, device: torch.device) -> Tensor:
        """int32 zeros (B, G) for a kernel whose programs count themselves and leave 0 behind.

        They belong to the layer because two calls on one state never run at the same time.
        """
        held = self._tickets
        if held is None or held.shape != (batch, groups) or held.device != device:
            held = torch.zeros(batch, groups, dtype=torch.int32, device=device)
            self._tickets = held
        return held

    def record(
        self, replay: Replay, inputs: dict[str, Tensor], constants: dict[str, Tensor]
    ) -> None:
        """Note one call's scan inputs, (B, T, ...) each, before its state is written.

        `constants` are what `replay` needs beside them, the same for every token. Of a call into an
        empty layer (the prompt) only the last `record_window` tokens are kept; a later call is kept
        whole, because all of it may be taken back.
        """
        tokens = next(iter(inputs.values())).shape[1]
        if not self._inputs:
            self._before = {name: t.detach().clone() for name, t in self._replayed().items()}
            self._inputs = {name: t.detach() for name, t in inputs.items()}
            keep = self.record_window if not self.state else max(self.record_window, tokens)
        else:
            keep = max(self.record_window, tokens)
            self._inputs = {
                name: torch.cat([t, inputs[name].detach()], dim=1)
                for name, t in self._inputs.items()
            }
        self._replay = replay
        self._constants = {name: t.detach() for name, t in constants.items()}
        kept = next(iter(self._inputs.values())).shape[1]
        # Twice the window before anything is dropped, so that the replays stay rare.
        if kept > 2 * keep or (not self.state and kept > keep):
            dropped = {name: t[:, :-keep] for name, t in self._inputs.items()}
            self._before = replay(self._before, dropped, self._constants)
            self._inputs = {name: t[:, -keep:].clone() for name, t in self._inputs.items()}

    def _replayed(self) -> State:
        """The part of the state that `crop` computes anew."""
        return self.state

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back recorded tokens."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """From the next call on, keep what `crop` needs."""
        if not self.record_past:
            # Calls since an earlier recording were not noted; replaying over them would be wrong.
            self._before, self._inputs = {}, {}
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens.

        Raises:
            RuntimeError: recording is off, or fewer tokens were recorded.
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        if not self.record_past:
            raise RuntimeError(
                "crop needs past recording: call activate_past_recording() before the forward pass"
            )
        if tokens_to_remove == 0:
            return
        kept = next(iter(self._inputs.values())).shape[1] if self._inputs else 0
        stay = kept + tokens_to_remove
        if stay < 0 or self._replay is None:
            raise RuntimeError(
                f"cannot take back {-tokens_to_remove} tokens: only {kept} were recorded; build "
                f"the cache with a larger record_window (now {self.record_window})"
            )
        if stay > 0:
            inputs = {name: t[:, :stay] for name, t in self._inputs.items()}
            self.write(self._replay(self._before, inputs, self._constants))
        elif self._before:
            self.write(self._before)
        else:
            self.state = {}
        self._before, self._inputs = {}, {}

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for tensors in (self.state, self._before, self._inputs):
            for name, tensor in tensors.items():
                tensors[name] = change(tensor)

    def reset(self) -> None:
        """Forget everything."""
        self.state, self._before, self._inputs = {}, {}, {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b continues from what was row `beam_idx[b]`."""
        for stored in self.state.values():
            stored.copy_(stored.index_select(0, beam_idx.to(stored.device)))
        self._before, self._inputs = {}, {}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._map(lambda t: t.index_select(0, indices.to(t.device)))

    def offload(self) -> None:
        """Move the state to the CPU; `prefetch` brings it back."""
        for stored in self.state.values():
            self._home = stored.device
        self._map(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        """Move an offloaded state back to its device."""
        home = self._home
        if home is not None:
            self._map(lambda t: t.to(home))

    def get_max_length(self) -> int:
        """-1: a recurrent state has no longest sequence."""
        return -1

    @property
    def nbytes(self) -> int:
        """Size of the state in bytes."""
        return sum(t.nbytes for t in self.state.values())


class StatelessLayer(RecurrentLayer):
    """Stands for a block that keeps nothing, such as an MLP."""

    @property
    def is_croppable(self) -> bool:
        """There is nothing to take back."""
        return True

    def activate_past_recording(self) -> None:
        """There is nothing to record."""

    def crop(self, tokens_to_remove: int) -> None:
        """There is nothing to take back."""
