"""Models, calls, and a stand-in for CUDA graphs.

Everything runs on a GPU where there is one; elsewhere the same code runs with captures that repeat
what they were given.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ssm_hf import (
    HybridForCausalLM,
    JambaForCausalLM,
    Mamba2ForCausalLM,
    Mamba3ForCausalLM,
    MambaForCausalLM,
    TaipanForCausalLM,
)
from ssm_hf.generation import graphs, session
from ssm_hf.generation.graphs import graphs_of
from ssm_hf.layers import selective_attention
from tests.helpers import kernel_device, randomize_, tiny

CLASSES = {
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "mamba3": Mamba3ForCausalLM,
    "jamba": JambaForCausalLM,
    "ssm_hybrid": HybridForCausalLM,
    "taipan": TaipanForCausalLM,
    "taipan-selected": TaipanForCausalLM,
}
DEVICE = kernel_device()
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no CUDA device"),
]
# Hybrids run quickly where keys and values can make a difference; the rest is slow for its number.
with_hybrids = pytest.mark.parametrize("model", list(CLASSES), indirect=True)


def build(model_type: str, **overrides: object) -> PreTrainedModel:
    if model_type == "mamba3":  # a layer of it has twice the operations to look at
        overrides = {"num_hidden_layers": 1, **overrides}
    model = randomize_(CLASSES[model_type](tiny(model_type, **overrides))).eval().to(DEVICE)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 96, (batch, length)).to(DEVICE)


def generate(model: PreTrainedModel, ids: Tensor, **options: object):
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


class Unknown(LogitsProcessor):
    """Changes nothing, but our loop cannot know that."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def theirs(model: PreTrainedModel, ids: Tensor, **options: object):
    """The same from transformers' loop."""
    return generate(model, ids, logits_processor=LogitsProcessorList([Unknown()]), **options)


def captures(model: PreTrainedModel) -> int:
    return sum(
        graph is not None
        for capture in graphs_of(model).captures.values()
        for graph in capture.graphs.values()
    )


@contextmanager
def uncaptured(model: PreTrainedModel) -> Iterator[None]:
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def an_eos(model: PreTrainedModel, ids: Tensor, step: int) -> int:
    """A token that greedy decoding of the first row first meets at this step, or before."""
    row = generate(model, ids, max_new_tokens=step + 1)[0, ids.shape[1] :].tolist()
    return next(t for i, t in reversed(list(enumerate(row))) if t not in row[:i])


class Repeated:
    """Stands in for a CUDA graph: repeats what was captured, operation by operation.

    It fails where a replay would launch something else than what was captured, as a graph could
    not; values that the host reads are not seen.
    """

    def __init__(self, run: Callable[[], None], pool: object) -> None:
        self.run = run
        self.ops: dict[bool, list[object]] = {}
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        if self.replays not in (1, 2, 9):  # looking on takes time
            self.run()
            return
        with Operations() as operations:
            self.run()
        # In inference mode composed operators are seen as one.
        expected = self.ops.setdefault(torch.is_inference_mode_enabled(), operations.names)
        assert operations.names == expected


class Operations(TorchDispatchMode):
    """Notes names and sizes of what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sizes = [a.shape for a in args if isinstance(a, Tensor)]
        self.names.append((func, *sizes))
        return func(*args, **(kwargs or {}))


def capture_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CAPTURING", {"cpu"})
    monkeypatch.setattr(session, "CAPTURING", {"cpu"})
    monkeypatch.setattr(graphs, "capture", Repeated)
    monkeypatch.setattr(graphs, "_memory", lambda device: 1 << 30)
    monkeypatch.setattr(graphs.torch.cuda, "graph_pool_handle", lambda: None)
    # As where a capture is made: how many tokens are selected is not known on the host.
    monkeypatch.setattr(selective_attention, "host_may_read", lambda values: False)
