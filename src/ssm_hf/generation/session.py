"""One `generate` call: which capture it uses, and the way back to the caller's cache."""

import threading
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ssm_hf.cache import RecurrentCache
from ssm_hf.generation.graphs import (
    CAPTURING,
    Capture,
    CaptureError,
    ModelGraphs,
    graphs_of,
    modules_of,
    tell_once,
    why_no_graph,
)

# (token numbers (B, 1), cache) -> logits (B, V) of any float dtype
NextLogits = Callable[[Tensor, RecurrentCache], Tensor]


class _Logits:
    """Input and output of a captured step that only computes logits."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.logits: Tensor | None = None


class Session:
    """State of one call.

    Attributes:
        model: whose call it is.
        visible: the cache outlives the call.
        prefilled: the prompt is processed; from now on every token of one-token calls is real.
        modules: of the model, where anything can be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        visible: bool,
        graphs: ModelGraphs | None,
        modules: list[nn.Module],
    ) -> None:
        self.model = model
        self.visible = visible
        self.modules = modules
        self.prefilled = False
        self._graphs = graphs
        self._capture: Capture | None = None

    @property
    def captures(self) -> bool:
        """Whether anything can be captured."""
        return self._graphs is not None

    def next_logits(
        self, tokens: Tensor, cache: RecurrentCache, compute: NextLogits
    ) -> Tensor | None:
        """Logits (B, V) after tokens (B, 1), in fp32 or wider, from a captured step; None where
        there is none."""
        capture = self.capture_for(cache)
        if capture is None or not self.prefilled:
            return None
        static: _Logits = capture.buffers("logits", lambda: _Logits(len(tokens), tokens.device))
        static.tokens.copy_(tokens)

        def body() -> None:
            static.logits = compute(static.tokens, capture.cache)

        if not self.run(capture, "logits", body):
            return None
        cache.seen_tokens += 1
        assert static.logits is not None
        wide = torch.promote_types(static.logits.dtype, torch.float32)
        return static.logits.to(wide, copy=True)

    def capture_for(
        self, cache: RecurrentCache, tokens: int = 1, zeros: bool = False
    ) -> Capture | None:
        """The capture that holds the content of `cache` until the session is closed.

        Where `tokens` more do not fit, the cache grows first: that is another capture then. With
        `zeros`, the states of `cache` are not filled in yet; where there is a capture, they are
        zeros afterwards.
        """
        if self._graphs is None or any(x.record_past or not x.state for x in cache.stateful):
            return None
        room = cache.room
        if room is not None and cache.seen_tokens + tokens > room:
            if self._capture is not None:
                self._capture.give_back(keep=not self.visible)
                self._capture = None
            cache.grow(tokens)
        elif not zeros and self._capture is not None and self._capture.holds(cache):
            return self._capture
        capture = self._graphs.find(cache, self.visible)
        if capture is not self._capture and self._capture is not None:
            self._capture.give_back()
        self._capture = capture
        if capture is not None:
            capture.lend(cache, keep=self.visible, zeros=zeros)
        return capture

    def run(self, capture: Capture, key: Hashable, body: Callable[[], None]) -> bool:
        """Run `body` on the capture's tensors; False where it cannot be captured: nothing ran."""
        assert self._graphs is not None
        try:
            capture.run(key, body, self._graphs.pool)
        except CaptureError as error:
            tell_once(str(error))
            capture.give_back()
            self._graphs.give_up(capture)
            self._capture = None
            return False
        return True

    def run_anyway(self, capture: Capture, key: Hashable, body: Callable[[], None]) -> None:
        """Run `body` on the capture's tensors, as a graph where that is possible."""
        assert self._graphs is not None
        if key not in capture.refused:
            try:
                capture.run(key, body, self._graphs.pool)
                return
            except CaptureError as error:
                tell_once(str(error))
                capture.refused.add(key)
        body()

    def close(self) -> None:
        """Return the content to the caches, and free what is too large to keep."""
        if self._graphs is None:
            return
        if self._capture is not None:
            self._capture.give_back()
            self._capture = None
        self._graphs.trim()
        self._graphs.mark_done()


_open = threading.local()


def current_session(model: nn.Module) -> Session | None:
    """The innermost open session of this thread, if it is one of `model`."""
    sessions: list[Session] = getattr(_open, "sessions", [])
    return sessions[-1] if sessions and sessions[-1].model is model else None


@contextmanager
def open_session(
    model: nn.Module, visible: bool, capture: bool = True
) -> Generator[Session, None, None]:
    """Within the block, prompts and one-token calls of `model` may run as captures.

    Args:
        model: a language model of this package.
        visible: the cache is the caller's own, or will be returned.
        capture: False lets everything run as it is.
    """
    device = next(model.parameters()).device
    sessions: list[Session] = _open.__dict__.setdefault("sessions", [])
    modules = modules_of(model) if capture and device.type in CAPTURING else []
    graphs = _usable_graphs(model, device, modules) if modules else None
    current: Any = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    session = Session(model, visible, graphs, modules)
    sessions.append(session)
    try:
        with current:
            if graphs is not None:
                graphs.wait_until_done()
            try:
                yield session
            finally:
                session.close()
    finally:
        sessions.pop()
        if graphs is not None:
            graphs.lock.release()


def _usable_graphs(
    model: nn.Module, device: torch.device, modules: list[nn.Module]
) -> ModelGraphs | None:
    """The captures of `model`, locked for this call; None where nothing can be captured."""
    reason = why_no_graph(model, device, modules)
    if reason is not None:
        tell_once(reason)
        return None
    graphs = graphs_of(model)
    if not graphs.lock.acquire(blocking=False):
        tell_once("another thread is generating with the same model")
        return None
    try:
        graphs.check(model, modules)
    except BaseException:
        graphs.lock.release()
        raise
    return graphs
