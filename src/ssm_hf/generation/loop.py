"""The decoding loop: steps are launched without waiting for what they choose."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ssm_hf.cache import RecurrentCache
from ssm_hf.generation.graphs import Capture
from ssm_hf.generation.select import Request, Selection
from ssm_hf.generation.session import NextLogits, Session
from ssm_hf.ops.dispatch import HAS_TRITON, runs_kernels

if HAS_TRITON:
    from ssm_hf.generation.fused import FusedSelection
else:
    FusedSelection = None

# Steps that are launched before the host looks at what an earlier one has chosen. Two hide the
# launches; what is computed beyond the end is thrown away.
_LAG = 2
# Without a streamer the end is looked for in every so manieth step.
_EVERY = 4


def decode(
    model: nn.Module,
    session: Session,
    request: Request,
    cache: RecurrentCache,
    logits: Tensor,
    input_ids: Tensor,
    compute: NextLogits,
    streamer: Any = None,
) -> Tensor:
    """Tokens by `request` after the prompt, and the cache as `generate` must leave it.

    Args:
        model: called for steps that cannot be captured.
        session: open session of `model`.
        request: how tokens are chosen and when to stop.
        cache: holds the prompt; afterwards also all new tokens but the last.
        logits: (B, V) fp32, after the prompt.
        input_ids: (B, T) the prompt, T = 0 if it came as embeddings.
        compute: the step that is captured.
        streamer: its `put` is given the tokens (B,) of each step, on the CPU.

    Returns:
        (B, new) int64.
    """
    batch, vocabulary = logits.shape
    capture = session.capture_for(cache)
    recipe = request.recipe
    kind = selection_class(logits.device)
    key = kind.key(recipe)

    def make() -> Selection:
        return kind(recipe, batch, vocabulary, logits.device)

    selection: Selection = make() if capture is None else capture.buffers(key, make)
    room = cache.room

    def captured(capture: Capture, selection: Selection) -> None:
        selection.choose(compute(selection.tokens, capture.cache))

    def step() -> None:
        nonlocal capture, selection, room
        if capture is not None and room is not None and cache.seen_tokens >= room:
            capture, room = session.capture_for(cache), cache.room
            if capture is not None:
                larger: Selection = capture.buffers(key, make)
                if larger is not selection:
                    larger.take_over(selection)
                selection = watch.selection = larger
        if capture is not None:
            body = functools.partial(captured, capture, selection)
            if session.run(capture, key, body):
                cache.seen_tokens += 1
                return
        capture = None
        outputs = model(
            input_ids=selection.tokens, past_key_values=cache, use_cache=True, return_dict=True
        )
        selection.choose(outputs.logits[:, -1])

    seen = cache.seen_tokens
    most = None if request.max_length is None else request.max_length - input_ids.shape[1]
    # A cache that is used again must not see tokens beyond the end.
    ahead = logits.is_cuda and not (session.visible and recipe.eos)
    watch = _Watch(
        selection, streamer, _LAG if ahead else 0, 1 if streamer or not ahead else _EVERY
    )
    draws = _Draws(logits.device) if recipe.sample else None
    selection.start(request, input_ids)
    selection.choose(logits)
    if draws is not None:
        draws.first()
    chunks: list[Tensor] = []
    new = 1
    while not watch.ended(new) and (most is None or new < most):
        step()
        new += 1
        if new % selection.capacity == 0:
            chunks.append(selection.chosen.clone())
    watch.finish(new)
    tokens = torch.cat([*chunks, selection.chosen[:, : new % selection.capacity]], dim=1)
    if recipe.eos:
        length = _length(tokens, selection.eos)
        if draws is not None and length < new:
            draws.rewind(length)
        new = length
    if selection.broken is not None and bool(selection.broken):
        raise RuntimeError("the logits hold inf or nan: no token can be drawn")
    cache.seen_tokens = seen + new - 1
    return tokens[:, :new]


def selection_class(device: torch.device) -> type[Selection]:
    """Who chooses tokens on `device`."""
    if FusedSelection is not None and runs_kernels("next_token", device):
        return FusedSelection
    return Selection


def _length(tokens: Tensor, eos: Tensor) -> int:
    """Tokens until the last row has ended: (B, T) -> at most T."""
    ends = (tokens[..., None] == eos).any(dim=-1)
    at = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, tokens.shape[1])
    return int(at.max())


class _Watch:
    """Learns on the host, `lag` steps late and without holding the device up, what was chosen."""

    def __init__(self, selection: Selection, streamer: Any, lag: int, every: int) -> None:
        self.selection, self.streamer = selection, streamer
        self.lag, self.every = lag, every
        self.ends = bool(selection.recipe.eos)
        self.idle = not self.ends and streamer is None
        self._read = 0  # steps looked at so far
        self._over = False
        if not self.idle and selection.tokens.is_cuda:
            self._slots = [
                (
                    torch.empty(selection.tokens.shape, dtype=torch.long, pin_memory=True),
                    torch.empty((), dtype=torch.bool, pin_memory=True),
                    torch.cuda.Event(),
                )
                for _ in range(lag + 1)
            ]

    def ended(self, new: int) -> bool:
        """Whether all rows are known to have ended; to be asked after each of `new` steps."""
        if self.idle or new % self.every:
            return self._over
        number = new // self.every
        if not self.selection.tokens.is_cuda:
            self._look(self.selection.tokens, self.selection.alive)
            return self._over
        tokens, alive, copied = self._slots[number % len(self._slots)]
        if self.streamer is not None:
            tokens.copy_(self.selection.tokens, non_blocking=True)
        alive.copy_(self.selection.alive, non_blocking=True)
        copied.record()
        self._catch_up(number - self.lag)
        return self._over

    def finish(self, new: int) -> None:
        """Stream what is still under way."""
        if self.streamer is not None and self.selection.tokens.is_cuda:
            self._catch_up(new // self.every)

    def _catch_up(self, number: int) -> None:
        while self._read < number and not self._over:
            self._read += 1
            tokens, alive, copied = self._slots[self._read % len(self._slots)]
            copied.synchronize()
            self._look(tokens, alive)

    def _look(self, tokens: Tensor, alive: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens[:, 0].cpu().clone())
        self._over = self.ends and not bool(alive)


class _Draws:
    """Puts the generator back to where it was after so many draws."""

    def __init__(self, device: torch.device) -> None:
        self._generator = None
        if device.type == "cuda":
            self._generator = torch.cuda.default_generators[device.index]
            self._start = self._state()
            self._per_draw = 0

    def _state(self) -> Tensor:
        """[seed, offset] int64."""
        assert self._generator is not None
        return self._generator.get_state().view(torch.int64)

    def first(self) -> None:
        """To be called after the first draw."""
        if self._generator is not None:
            self._per_draw = int(self._state()[1] - self._start[1])

    def rewind(self, draws: int) -> None:
        """As if only so many tokens had been drawn."""
        if self._generator is not None:
            state = self._start.clone()
            state[1] += draws * self._per_draw
            self._generator.set_state(state.view(torch.uint8))
