"""A micro-batch's forward and backward pass as one CUDA graph.

Rows of training data all have one length, so every pass launches the same kernels on the same
shapes. Captured once and replayed, a pass costs the host one launch in place of thousands.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
# (micro-batch, its share of the step's targets) -> detached loss; adds to the gradients
Pass = Callable[[Batch, Tensor], Tensor]


class FlatGradients:
    """Gradients of all parameters, one after another in one buffer per dtype.

    Their addresses stay, as replays need it, and one call zeroes or reduces them all.
    """

    _ALIGNMENT = 64  # elements: no gradient begins in the middle of a vector load

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        trained = [p for p in parameters if p.requires_grad]
        self.buffers: list[Tensor] = []
        for dtype in dict.fromkeys(p.dtype for p in trained):
            members = [p for p in trained if p.dtype == dtype]
            step = self._ALIGNMENT
            sizes = [-(-p.numel() // step) * step for p in members]
            buffer = torch.zeros(sum(sizes), dtype=dtype, device=members[0].device)
            self.buffers.append(buffer)
            for p, part in zip(members, buffer.split(sizes), strict=True):
                p.grad = part[: p.numel()].view_as(p)

    def zero_(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()

    def average_(self) -> None:
        """Mean over all processes; all take part."""
        for buffer in self.buffers:
            torch.distributed.all_reduce(buffer)
            buffer.div_(torch.distributed.get_world_size())


class GraphedPass:
    """`run`, captured at the first call and replayed from then on.

    Args:
        run: the pass; its gradients must exist already, so that it adds to them.
    """

    def __init__(self, run: Pass) -> None:
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch = {}
        self._share = self._loss = torch.empty(0)

    def __call__(self, batch: Batch, share: Tensor) -> Tensor:
        """The loss, in a tensor of its own; a batch of another shape runs uncaptured."""
        if self._graph is None:
            return self._capture(batch, share)
        held = {name: value.shape for name, value in self._batch.items()}
        if held != {name: value.shape for name, value in batch.items()}:
            return self._run(batch, share)
        for name, value in batch.items():
            self._batch[name].copy_(value)
        self._share.copy_(share)
        self._graph.replay()
        return self._loss.clone()

    def _capture(self, batch: Batch, share: Tensor) -> Tensor:
        """Run once for real, which compiles and loads all kernels, then record."""
        self._batch = {name: value.clone() for name, value in batch.items()}
        self._share = share.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._run(self._batch, self._share)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph's memory comes on top of what the first run has left
        graph = torch.cuda.CUDAGraph()
        # Other threads, a loader's, may go on using the GPU.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._loss = self._run(self._batch, self._share)
        self._graph = graph
        return loss
