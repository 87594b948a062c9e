"""Captured decoding steps of a model: made once per batch size, replayed, forgotten in time.

A captured step reads the weights and the recurrent state at fixed addresses. The weights are the
model's own: values changed in place are seen, and what replaces them is noticed before the next
call. The state belongs to the capture; a cache lends it for the time of a `generate` call.
"""

import functools
import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ssm_hf.cache import RecurrentCache, RecurrentLayer, State
from ssm_hf.layers.mixer import has_own_forward
from ssm_hf.ops.dispatch import chosen_impl

logger = logging.getLogger("ssm_hf")

# States that stay on the GPU between calls, for all batch sizes of a model together: what is more
# than this share of its memory is given back at once, and captured anew by the next call.
_SHARE_OF_MEMORY = 0.05
_MOST_CAPTURES = 4

# Types of devices whose launches can be captured.
CAPTURING = {"cuda"}

_told: set[str] = set()
_by_model: "WeakKeyDictionary[nn.Module, ModelGraphs]" = WeakKeyDictionary()
_registry_lock = threading.Lock()
_local = threading.local()


class CaptureError(RuntimeError):
    """A decoding step does something that a CUDA graph cannot hold."""


class Capture:
    """One batch size: the static state, and a graph for each way of going on from the logits."""

    def __init__(self, cache: RecurrentCache) -> None:
        self.cache = cache
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self.refused: set[Hashable] = set()  # what could not be captured, and runs as it is
        self._buffers: dict[Hashable, Any] = {}
        self._lent: list[tuple[RecurrentLayer, State]] = []

    def buffers(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What the graph `key` reads and writes beside the state, made at its first use."""
        if key not in self._buffers:
            with torch.inference_mode(False):
                self._buffers[key] = make()
        return self._buffers[key]

    def run(self, key: Hashable, body: Callable[[], None], pool: Callable[[], Any]) -> None:
        """Run `body`, the first time as it is, from then on as a graph.

        Raises:
            CaptureError: it cannot be captured; nothing has run.
        """
        if key not in self.graphs:
            # Compiles kernels and sets up libraries, which a capture must not do.
            body()
            self.graphs[key] = None
            return
        graph = self.graphs[key]
        if graph is None:
            graph = self.graphs[key] = capture(body, pool())
        graph.replay()

    def holds(self, cache: RecurrentCache) -> bool:
        """Whether the static tensors are those in `cache`."""
        return all(
            layer.state.get(name) is tensor
            for mine, layer in zip(self.cache.layers, cache.layers, strict=True)
            for name, tensor in mine.state.items()
        )

    def lend(self, cache: RecurrentCache, keep: bool, zeros: bool = False) -> None:
        """Put the static tensors, holding its content, into `cache`.

        Args:
            cache: of the same shapes.
            keep: `give_back` returns the content to the tensors that `cache` held.
            zeros: they are to hold zeros in place of its content.
        """
        own, theirs = [], []
        for mine, layer in zip(self.cache.layers, cache.layers, strict=True):
            if all(layer.state[name] is tensor for name, tensor in mine.state.items()):
                continue
            own += mine.state.values()
            theirs += (layer.state[name] for name in mine.state)
            self._lent.append((layer, layer.state if keep else {}))
            layer.state = dict(mine.state)
        if zeros:
            self.cache.zero_()
        else:
            _copy(own, theirs)

    def give_back(self, keep: bool = False) -> None:
        """Return the content of the static tensors to the caches that borrowed them.

        With `keep` a cache keeps the tensors instead, until another capture lends it some.
        """
        if keep:
            self._lent = []
        homes, contents = [], []
        for layer, home in self._lent:
            for name, tensor in home.items():
                if tensor.shape == layer.state[name].shape:
                    homes.append(tensor)
                    contents.append(layer.state[name])
            layer.state = home
        _copy(homes, contents)
        self._lent = []


class ModelGraphs:
    """The captures of one model, valid for its present weights."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.captures: OrderedDict[Hashable, Capture] = OrderedDict()
        self.signature: object = None
        self.failed: set[Hashable] = set()
        self._done: torch.cuda.Event | None = None
        self._pool: Any = None

    def check(self, model: nn.Module, modules: list[nn.Module]) -> None:
        """Forget captures whose weights are no longer the model's, which consists of `modules`."""
        signature = _signature(model, modules)
        if signature != self.signature:
            self.captures.clear()
            self.failed.clear()
            self.signature = signature

    def find(self, cache: RecurrentCache, visible: bool) -> Capture | None:
        """The capture for caches like this one, or None where it failed before.

        Args:
            visible: the cache outlives the call, so its tensors must not become the capture's.
        """
        key = (chosen_impl(), *_flags(), *_shapes(cache))
        if key in self.failed:
            return None
        if key not in self.captures:
            copied = visible and self._may_stay(cache)
            self.captures[key] = Capture(_like(cache, copied))
        self.captures.move_to_end(key)
        return self.captures[key]

    def give_up(self, capture: Capture) -> None:
        """Never capture this batch size again, until the weights change."""
        for key, held in list(self.captures.items()):
            if held is capture:
                self.failed.add(key)
                del self.captures[key]

    def pool(self) -> Any:
        """Memory that all graphs share: they never run at the same time."""
        if not any(g is not None for c in self.captures.values() for g in c.graphs.values()):
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def mark_done(self) -> None:
        """What is launched later, on any stream, may use the static tensors after this point."""
        if torch.cuda.is_available():
            self._done = torch.cuda.Event()
            self._done.record()

    def wait_until_done(self) -> None:
        """Let this stream wait for the calls before."""
        if self._done is not None:
            self._done.wait()

    def trim(self) -> None:
        """Keep the latest captures within the bounds."""
        kept, left = 0, []
        for key, held in reversed(self.captures.items()):
            if len(left) < _MOST_CAPTURES and self._may_stay(held.cache, kept):
                kept += held.cache.nbytes
                left.append((key, held))
        self.captures = OrderedDict(reversed(left))

    @staticmethod
    def _may_stay(cache: RecurrentCache, beside: int = 0) -> bool:
        device = next(t for layer in cache.layers for t in layer.state.values()).device
        return beside + cache.nbytes <= _SHARE_OF_MEMORY * _memory(device)


@functools.cache
def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def graphs_of(model: nn.Module) -> ModelGraphs:
    """The captures of `model`; they do not travel with it into copies or files."""
    with _registry_lock:
        return _by_model.setdefault(model, ModelGraphs())


def forget_graphs(model: nn.Module) -> None:
    """Free the captured steps of `model` and the memory of their states; the next call captures."""
    with _registry_lock:
        _by_model.pop(model, None)


def why_no_graph(model: nn.Module, device: torch.device, modules: list[nn.Module]) -> str | None:
    """Reason why decoding steps of `model`, which consists of `modules`, cannot be captured, or
    None."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on; load the model in the wanted dtype instead"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a graph is being captured around it"
    for module in modules:
        if not _is_known(type(module)):
            kind = type(module).__name__
            return f"{_name(model, module)} is a {kind}, which may change what it does"
        if not has_own_forward(module):
            return f"{_name(model, module)} carries a hook, an adapter or a quantised weight"
        for p in module._parameters.values():
            if p is not None and p.device != device:
                return f"its weights do not all lie on {device}"
    return None


@functools.cache
def _is_known(module: type[nn.Module]) -> bool:
    ours = module.__module__.split(".")[0] == "ssm_hf"
    return ours or module in (nn.Embedding, nn.Linear, nn.ModuleList, nn.Dropout, nn.Identity)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules; `model.modules()` takes several times as long."""
    found = [model]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def tell_once(reason: str) -> None:
    """One line in the log for each reason."""
    if reason not in _told:
        _told.add(reason)
        logger.warning("generate() runs without a CUDA graph: %s", reason)


def capture(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Record `run`, which must have run before, as a graph; nothing is executed.

    Raises:
        CaptureError: `run` does something that cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.current_stream()
    side = _side_stream(here.device)
    side.wait_stream(here)
    collecting = gc.isenabled()
    # A collection during the capture could free memory of other graphs, which is not allowed then.
    gc.disable()
    try:
        with torch.cuda.stream(side):
            # Other threads may go on using the GPU.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        raise CaptureError(str(error).splitlines()[0]) from error
    finally:
        if collecting:
            gc.enable()
    here.wait_stream(side)
    return graph


def _copy(to: list[torch.Tensor], source: list[torch.Tensor]) -> None:
    """Tensors of equal shape and dtype, all of a dtype at once."""
    alike: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for new, old in zip(to, source, strict=True):
        pair = alike.setdefault(new.dtype, ([], []))
        pair[0].append(new)
        pair[1].append(old)
    for news, olds in alike.values():
        torch._foreach_copy_(news, olds)  # pyright: ignore[reportPrivateImportUsage]


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a thread and device: cuBLAS keeps a workspace of 32 MiB for every stream."""
    streams: dict[torch.device, torch.cuda.Stream] = _local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def _signature(model: nn.Module, modules: list[nn.Module]) -> object:
    return model.training, [
        (t.data_ptr(), t.dtype, t.shape, t.stride())
        for module in modules
        for tensors in (module._parameters, module._buffers)
        if tensors
        for t in tensors.values()
        if t is not None
    ]


def _flags() -> tuple[Hashable, ...]:
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


def _shapes(cache: RecurrentCache) -> tuple[Hashable, ...]:
    return tuple(
        (name, tensor.shape, tensor.dtype, tensor.device)
        for layer in cache.layers
        for name, tensor in layer.state.items()
    )


def _like(cache: RecurrentCache, copied: bool) -> RecurrentCache:
    """A cache of the same shapes, on the same tensors or with memory of its own."""
    own = RecurrentCache.like(cache)
    # Tensors made in inference mode could not be written outside it.
    with torch.inference_mode(False):
        for mine, layer in zip(own.layers, cache.layers, strict=True):
            mine.state = {
                name: torch.empty(t.shape, dtype=t.dtype, device=t.device)
                if copied or t.is_inference() or not t.is_contiguous()
                else t
                for name, t in layer.state.items()
            }
    return own
