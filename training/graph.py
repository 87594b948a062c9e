"""A micro-batch's forward and backward pass as a CUDA graph.

Rows of training data all have one length, so every pass launches the same kernels on the same
shapes. Captured once and replayed, a pass costs the host one launch in place of thousands.
"""

import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import ssm_hf

Batch = dict[str, Tensor]
# (micro-batch, its share of the step's targets) -> detached loss, alone () or before other figures
# (n,); adds to the gradients
Pass = Callable[[Batch, Tensor], Tensor]


class GraphedPass:
    """`run`, captured at the first call and replayed from then on.

    Gradients keep their addresses; who reduces or clips them does so in place. There are two
    graphs: the first pass of a step writes the gradients, the others add to them, so that nobody
    has to zero them. Weights in 16 bits are formed once a step, by its first pass.

    Args:
        run: the pass.
        parameters: all that it gives gradients to.
    """

    def __init__(self, run: Pass, parameters: Iterable[nn.Parameter]) -> None:
        self._run = run
        self._parameters = [p for p in parameters if p.requires_grad]
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._batch: Batch = {}
        self._share = torch.empty(0)
        self._narrow = ssm_hf.NarrowWeights()

    def __call__(self, batch: Batch, share: Tensor, is_first: bool) -> Tensor:
        """What the pass returns, in a tensor of its own; `is_first` of the passes of one step.

        A batch of another shape than the first one's is run without a graph.
        """
        if not self._batch:
            self._prepare(batch, share)
        held = {name: value.shape for name, value in self._batch.items()}
        if held != {name: value.shape for name, value in batch.items()}:
            if is_first:
                torch._foreach_zero_(self.gradients())
            return self._run(batch, share)
        if is_first not in self._graphs:
            self._graphs[is_first] = self._captured(is_first)
        for name, value in batch.items():
            self._batch[name].copy_(value)
        self._share.copy_(share)
        graph, figures = self._graphs[is_first]
        graph.replay()
        return figures.clone()

    def forget(self) -> None:
        """Capture anew at the next call."""
        self._graphs, self._batch = {}, {}
        self._narrow = ssm_hf.NarrowWeights()

    def gradients(self) -> list[Tensor]:
        """Those that the passes have formed."""
        return [p.grad for p in self._parameters if p.grad is not None]

    def average_gradients(self) -> None:
        """Mean over all processes; all take part."""
        works = [torch.distributed.all_reduce(g, async_op=True) for g in self.gradients()]
        for work in works:
            work.wait()
        torch._foreach_div_(self.gradients(), float(torch.distributed.get_world_size()))

    def _prepare(self, batch: Batch, share: Tensor) -> None:
        """Compile and load all kernels, then capture the pass that writes the gradients.

        Random numbers are left as they were: the first replay draws what the pass outside of a
        graph would have drawn.

        Raises:
            RuntimeError: a replay does not give what the pass gives outside of a graph.
        """
        self._batch = {name: value.clone() for name, value in batch.items()}
        self._share = share.clone()
        generator = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            with ssm_hf.compile_ahead(), self._narrow.in_pass():
                self._run(self._batch, self._share)
            self._forget_gradients()
            torch.cuda.set_rng_state(generator)
            expected = self._summary(self._run(self._batch, self._share))
        torch.cuda.current_stream().wait_stream(stream)
        self._forget_gradients()
        torch.cuda.synchronize()
        gc.collect()  # cycles hold nodes of the autograd graph, which belong to the other stream
        torch.cuda.empty_cache()  # the graphs' memory comes on top of what these runs have left
        graph, figures = self._graphs[True] = self._captured(is_first=True)
        torch.cuda.set_rng_state(generator)
        graph.replay()
        got = self._summary(figures)
        # Roundings to 8 bits, and sums whose order may differ.
        if not torch.allclose(got, expected, rtol=2e-2, equal_nan=True):
            raise RuntimeError(
                f"the captured pass gives loss and gradient norm {got.tolist()}, the same pass "
                f"outside of the graph {expected.tolist()}; run without a graph"
            )
        torch.cuda.set_rng_state(generator)

    def _summary(self, figures: Tensor) -> Tensor:
        """Loss and gradient norm, (2,)."""
        norm = torch.stack(torch._foreach_norm(self.gradients())).norm()
        return torch.stack([figures.flatten()[0].to(norm), norm])

    def _forget_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None

    def _captured(self, is_first: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph that writes the gradients where there are none yet, else adds to them."""
        graph = torch.cuda.CUDAGraph()
        pool = next((g.pool() for g, _ in self._graphs.values()), None)
        # Other threads, a loader's, may go on using the GPU.
        capture = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
        with capture, self._narrow.in_pass(renew=is_first):
            figures = self._run(self._batch, self._share)
        return graph, figures
