"""Our decoding loop and captured steps against transformers' loop and whole forward passes.

Everything runs on a GPU where there is one; elsewhere the same code runs with captures that repeat
what they were given.
"""

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

from ssm_hf import (
    HybridForCausalLM,
    Mamba2ForCausalLM,
    Mamba3ForCausalLM,
    MambaForCausalLM,
    RecurrentCache,
)
from ssm_hf.generation import forget_graphs, graphs, prefill, select, session
from ssm_hf.generation.graphs import graphs_of
from ssm_hf.models import generating
from tests.helpers import kernel_device, randomize_, tiny

CLASSES = {
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "mamba3": Mamba3ForCausalLM,
    "ssm_hybrid": HybridForCausalLM,
}
DEVICE = kernel_device()
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no CUDA device"),
]
SAMPLING = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.7},
    "top-k": {"top_k": 7},
    "top-p": {"top_k": 0, "top_p": 0.8},
    "min-p": {"top_k": 0, "min_p": 0.1},
    "penalty": {"top_k": 0, "repetition_penalty": 1.3},
    "all": {"top_k": 20, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.1},
}


class Unknown(LogitsProcessor):
    """Changes nothing, but our loop cannot know that."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def _model(model_type: str, **overrides: object) -> PreTrainedModel:
    if model_type == "mamba3":  # a layer of it has twice the operations to look at
        overrides = {"num_hidden_layers": 1, **overrides}
    model = randomize_(CLASSES[model_type](tiny(model_type, **overrides))).eval().to(DEVICE)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model


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


@pytest.fixture(autouse=True)
def _captures_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "SMALL", 4)
    monkeypatch.setattr(prefill, "LARGE", 8)
    if DEVICE.type != "cuda":
        _capture_on_cpu(monkeypatch)


def _capture_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CAPTURING", {"cpu"})
    monkeypatch.setattr(session, "CAPTURING", {"cpu"})
    monkeypatch.setattr(graphs, "capture", Repeated)
    monkeypatch.setattr(graphs, "_memory", lambda device: 1 << 30)
    monkeypatch.setattr(graphs.torch.cuda, "graph_pool_handle", lambda: None)


# Hybrids run quickly where keys and values can make a difference; the rest is slow for its number.
with_hybrids = pytest.mark.parametrize("model", list(CLASSES), indirect=True)


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow if name == "ssm_hybrid" else ())
        for name in CLASSES
    ]
)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return _model(request.param)


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 96, (batch, length)).to(DEVICE)


def _generate(model: PreTrainedModel, ids: Tensor, **options: object):
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


def _theirs(model: PreTrainedModel, ids: Tensor, **options: object):
    """The same from transformers' loop."""
    return _generate(model, ids, logits_processor=LogitsProcessorList([Unknown()]), **options)


def _captures(model: PreTrainedModel) -> int:
    return sum(
        graph is not None
        for capture in graphs_of(model).captures.values()
        for graph in capture.graphs.values()
    )


@contextmanager
def _uncaptured(model: PreTrainedModel) -> Iterator[None]:
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@with_hybrids
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 9])
def test_greedy_tokens_equal_whole_forward_passes(model: PreTrainedModel, batch: int) -> None:
    ids = _ids(batch, 9)
    out = _generate(model, ids, max_new_tokens=20)
    assert torch.equal(out, _generate(model, ids, max_new_tokens=20, use_cache=False))
    assert torch.equal(out, _theirs(model, ids, max_new_tokens=20))
    with _uncaptured(model):
        assert torch.equal(out, _generate(model, ids, max_new_tokens=20))


@torch.no_grad()
@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_sampled_tokens_equal_transformers(model: PreTrainedModel, options: dict) -> None:
    ids, mask = _ids(3, 8), torch.ones(3, 8, dtype=torch.long, device=DEVICE)
    mask[1, :3] = 0
    ids[1, :3] = 0
    runs = []
    for run in (_generate, _theirs):
        torch.manual_seed(5)
        tokens = run(model, ids, attention_mask=mask, do_sample=True, max_new_tokens=15, **options)
        # The generator must stand where transformers leaves it, too.
        runs.append([*tokens.tolist(), torch.rand(2, device=DEVICE).tolist()])
    assert runs[0] == runs[1]


def _an_eos(model: PreTrainedModel, ids: Tensor, step: int) -> int:
    """A token that greedy decoding of the first row first meets at this step, or before."""
    row = _generate(model, ids, max_new_tokens=step + 1)[0, ids.shape[1] :].tolist()
    return next(t for i, t in reversed(list(enumerate(row))) if t not in row[:i])


@torch.no_grad()
@pytest.mark.parametrize(("visible", "sample"), [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("step", [0, 5])
def test_ended_rows_are_padded_and_the_surplus_leaves_no_trace(
    model: PreTrainedModel, step: int, visible: bool, sample: bool
) -> None:
    ids = _ids(2, 6)
    eos = [_an_eos(model, ids, step), int(_generate(model, ids, max_new_tokens=9)[1, -1])]
    results = []
    for run in (_generate, _theirs):
        torch.manual_seed(1)
        out = run(model, ids, max_new_tokens=60, eos_token_id=eos, do_sample=sample,
                  return_dict_in_generate=visible)  # fmt: skip
        tokens = out.sequences if visible else out
        results.append([tokens.tolist(), torch.rand(2, device=DEVICE).tolist()])
        if visible:
            cache = out.past_key_values
            results[-1] += [cache.seen_tokens]
            results[-1] += [model(ids[:, :1], past_key_values=cache).logits.argmax(-1).tolist()]
    assert results[0] == results[1]


@torch.no_grad()
def test_min_new_tokens_hold_the_end_back(model: PreTrainedModel) -> None:
    ids = _ids(2, 5)
    eos = _an_eos(model, ids, 1)
    for options in ({"min_new_tokens": 12}, {"min_length": 14}):
        options |= {"eos_token_id": eos, "max_new_tokens": 25}
        assert torch.equal(_generate(model, ids, **options), _theirs(model, ids, **options))


class Listener:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@torch.no_grad()
@pytest.mark.parametrize("ends", [False, True])
def test_streamers_receive_every_token_in_order(model: PreTrainedModel, ends: bool) -> None:
    ids = _ids(1, 5)
    eos = _an_eos(model, ids, 5) if ends else None
    listeners = []
    for run in (_generate, _theirs):
        listeners.append(Listener())
        out = run(model, ids, max_new_tokens=17, eos_token_id=eos, streamer=listeners[-1])
        assert [t for part in listeners[-1].parts for t in part] == out[0].tolist()
    assert listeners[0].parts == listeners[1].parts
    assert listeners[0].ended == 1


@torch.no_grad()
def test_long_outputs_pass_the_static_buffer(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = _ids(2, 5)
    expected = _generate(model, ids, max_new_tokens=40)
    forget_graphs(model)
    monkeypatch.setattr(select.Selection, "capacity", 8)
    assert torch.equal(_generate(model, ids, max_new_tokens=40), expected)
    assert torch.equal(_generate(model, ids, max_new_tokens=32), expected[:, :37])


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "visible"), [({"do_sample": True}, False), ({}, True), ({"num_beams": 2}, False)]
)
def test_steps_go_on_where_the_room_for_keys_runs_out(
    options: dict, visible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = _model("ssm_hybrid"), _ids(2, 50)
    monkeypatch.setattr(generating, "_AHEAD", 4)
    runs = []
    for compiled in (True, True, False):
        torch.manual_seed(3)
        out = _generate(model, ids, max_new_tokens=90, disable_compile=not compiled,
                        return_dict_in_generate=visible, **options)  # fmt: skip
        runs.append(out.sequences if visible else out)
        if visible:
            assert out.past_key_values.layers[1].slots == 256
            more = model(ids[:1].expand(len(out.past_key_values.layers[0].state["ssm_state"]), -1),
                         past_key_values=out.past_key_values).logits  # fmt: skip
            runs[-1] = torch.cat([runs[-1], more.argmax(-1)[: len(runs[-1])]], dim=1)
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[2])
    slots = {capture.cache.layers[1].slots for capture in graphs_of(model).captures.values()}
    assert slots == {64, 128, 256}


@torch.no_grad()
def test_blocks_without_a_state_and_shared_blocks_are_captured() -> None:
    attention = {"type": "attention", "shared": "a"}
    blocks = ["mlp", "mamba2", attention, "moe", "mamba2", attention, "mlp"]
    model, ids = _model("ssm_hybrid", blocks=blocks), _ids(2, 9)
    for _ in range(3):
        out = _generate(model, ids, max_new_tokens=12)
    assert torch.equal(out, _generate(model, ids, max_new_tokens=12, use_cache=False))
    assert _captures(model) == 3  # two pieces of the prompt, and the step
    assert torch.equal(out, _theirs(model, ids, max_new_tokens=12))


@with_hybrids
@torch.no_grad()
def test_left_padded_rows_equal_single_rows(model: PreTrainedModel) -> None:
    rows = [_ids(1, n)[0] for n in (8, 3, 1)]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 8 - len(row) :], mask[i, 8 - len(row) :] = row, 1
    out = _generate(model, ids.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=15)
    for row, got in zip(rows, out, strict=True):
        alone = _generate(model, row[None], max_new_tokens=15)
        assert got[8:].tolist() == alone[0, len(row) :].tolist()


@with_hybrids
@torch.no_grad()
@pytest.mark.parametrize(
    ("width", "side"),
    [(16, "none"), (19, "none"), (3, "left"), (19, "left"), (15, "right"), (20, "right"),
     (16, "both"), (33, "both")],
)  # fmt: skip
def test_prompts_read_in_pieces_equal_one_pass(
    model: PreTrainedModel, width: int, side: str
) -> None:
    lengths = (width,) * 3 if side == "none" else (width, max(width - 9, 1), 1)
    rows = [_ids(1, n)[0] for n in lengths]
    ids, mask = (torch.zeros(3, width, dtype=torch.long, device=DEVICE) for _ in range(2))
    for i, row in enumerate(rows):
        pads = {"left": width - len(row), "both": (width - len(row)) // 2}.get(side, 0)
        ids[i, pads : pads + len(row)], mask[i, pads : pads + len(row)] = row, 1
    for _ in range(3):
        got = _generate(model, ids, attention_mask=mask, max_new_tokens=5,
                        return_dict_in_generate=True)  # fmt: skip
    right = _generate(model, ids, attention_mask=mask, max_new_tokens=5, disable_compile=True,
                      return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(got.sequences, right.sequences)
    for layer, expected in zip(
        got.past_key_values.layers, right.past_key_values.layers, strict=True
    ):
        for name, value in layer.state.items():
            # fp32 rounding in another order
            torch.testing.assert_close(value, expected.state[name], atol=1e-4, rtol=1e-4)
    pieces = [key for key in _latest(model).graphs if key[0] == "prompt"]
    assert bool(pieces) == (width <= prefill.LARGE * prefill.MOST_PIECES)


@with_hybrids
@torch.no_grad()
def test_pieces_of_the_usual_size(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if DEVICE.type != "cuda":
        _capture_on_cpu(monkeypatch)
    for length in (600, 512, 7):
        ids = _ids(1, length)
        expected = _generate(model, ids, max_new_tokens=5, disable_compile=True)
        assert torch.equal(_generate(model, ids, max_new_tokens=5), expected)
    # Of a hybrid there is a capture for each number of slots.
    held = [capture.graphs for capture in graphs_of(model).captures.values()]
    assert any(captured.get(("prompt", 512, True)) is not None for captured in held)


def test_how_prompts_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert prefill.cut(1, 1) == [64]
    assert prefill.cut(1, 65) == [512]
    assert prefill.cut(1, 512) == [512]
    assert prefill.cut(2, 1030) == [64, 512, 512]
    assert prefill.cut(64, 100) == [64, 64]
    for batch, length in ((1, 2049), (65, 64), (32, 513)):
        assert prefill.cut(batch, length) is None


@torch.no_grad()
def test_a_pass_that_cannot_be_captured_runs_as_it_is(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Callable[[], None], pool: object) -> None:
        raise graphs.CaptureError("a test's refusal")

    ids = _ids(2, 13)
    expected = _generate(model, ids, max_new_tokens=5, disable_compile=True)
    assert not graphs_of(model).captures
    monkeypatch.setattr(graphs, "capture", refuse)
    monkeypatch.setattr(graphs, "_told", set())
    for _ in range(3):
        assert torch.equal(_generate(model, ids, max_new_tokens=5), expected)
    assert sum("a test's refusal" in line for line in caplog.messages) == 1


def _latest(model: PreTrainedModel) -> graphs.Capture:
    return next(reversed(graphs_of(model).captures.values()))


@with_hybrids
@torch.no_grad()
@pytest.mark.parametrize("run", [_generate, _theirs])
def test_a_chat_continues_its_cache(model: PreTrainedModel, run) -> None:
    caches = [RecurrentCache(model.config) for _ in range(2)]
    texts = [_ids(2, 7), _ids(2, 7)]
    for _ in range(3):
        # Two conversations take turns on one captured step.
        for i, cache in enumerate(caches):
            whole = torch.cat([texts[i], _ids(2, 4)], dim=1)
            expected = _generate(model, whole, max_new_tokens=6, use_cache=False)
            texts[i] = run(model, whole, past_key_values=cache, max_new_tokens=6)
            assert torch.equal(texts[i], expected)
            assert cache.seen_tokens == texts[i].shape[1] - 1


@with_hybrids
@torch.no_grad()
def test_a_users_cache_keeps_its_tensors(model: PreTrainedModel) -> None:
    cache = RecurrentCache(model.config)
    ids = _ids(2, 5)
    model(ids, past_key_values=cache)
    tensors = [t for layer in cache.layers for t in layer.state.values()]
    out = _generate(model, torch.cat([ids, _ids(2, 2)], 1), past_key_values=cache, max_new_tokens=6)
    assert all(
        new is old
        for new, old in zip(
            (t for layer in cache.layers for t in layer.state.values()), tensors, strict=True
        )
    )
    expected = model(out[:, :-1]).past_key_values
    for layer, right in zip(cache.layers, expected.layers, strict=True):
        for name, value in layer.state.items():
            # fp32 rounding in another order
            torch.testing.assert_close(value, right.state[name], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_of_another_batch_size_is_refused(model: PreTrainedModel) -> None:
    cache = model(_ids(3, 5)).past_key_values
    with pytest.raises(ValueError, match="belongs to another batch size"):
        _generate(model, _ids(2, 7), past_key_values=cache, max_new_tokens=3)
    # and the model generates on as if nothing had happened
    ids = _ids(2, 7)
    expected = _generate(model, ids, max_new_tokens=5, use_cache=False)
    assert torch.equal(_generate(model, ids, max_new_tokens=5), expected)


@torch.no_grad()
def test_batch_sizes_may_change_between_calls(model: PreTrainedModel) -> None:
    for batch in (1, 4, 1, 2, 12, 5, 1):
        ids = _ids(batch, 4)
        expected = _generate(model, ids, max_new_tokens=6, use_cache=False)
        assert torch.equal(_generate(model, ids, max_new_tokens=6), expected)


@with_hybrids
@torch.no_grad()
def test_returned_caches_do_not_change_later(model: PreTrainedModel) -> None:
    ids = _ids(2, 4)
    first = _generate(model, ids, max_new_tokens=6, return_dict_in_generate=True)
    before = first.past_key_values.snapshot()
    _generate(model, _ids(2, 9), max_new_tokens=6)
    for layer, state in zip(first.past_key_values.layers, before.states, strict=True):
        for name, value in layer.state.items():
            assert torch.equal(value, state[name])


@torch.no_grad()
def test_weights_may_change_between_calls(model: PreTrainedModel) -> None:
    ids = _ids(2, 6)

    def check() -> None:
        got = _generate(model, ids, max_new_tokens=12)
        with _uncaptured(model):
            assert torch.equal(got, _generate(model, ids, max_new_tokens=12, use_cache=False))

    check()
    check()
    for p in model.parameters():  # in place, as an optimiser does
        p.add_(0.05 * torch.randn_like(p))
    check()
    mixer = model.backbone.layers[-1].mixer
    mixer.out_proj.weight = torch.nn.Parameter(torch.randn_like(mixer.out_proj.weight))
    check()
    model.to("cpu").to(DEVICE)
    check()
    model.load_state_dict(model.state_dict(), assign=True)
    check()


@torch.no_grad()
def test_copies_and_files_of_a_model_carry_no_graphs(model: PreTrainedModel, tmp_path) -> None:
    ids = _ids(2, 6)
    expected = _generate(model, ids, max_new_tokens=9)
    other = copy.deepcopy(model)
    assert torch.equal(_generate(other, ids, max_new_tokens=9), expected)
    file = io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    other = pickle.load(file)
    assert torch.equal(_generate(other, ids, max_new_tokens=9), expected)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).to(DEVICE)
    assert torch.equal(_generate(other, ids, max_new_tokens=9), expected)


@torch.no_grad()
def test_several_sequences_of_one_prompt(model: PreTrainedModel) -> None:
    ids = _ids(2, 6)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9}
    runs = []
    for run in (_generate, _theirs):
        torch.manual_seed(3)
        runs.append(run(model, ids, **options))
    assert runs[0].shape == (6, 15)
    assert torch.equal(runs[0], runs[1])


@with_hybrids
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "top_k": 5},
        {"output_logits": True, "return_dict_in_generate": True},
        {"no_repeat_ngram_size": 2},
        {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1e6)])},
        {"prefill_chunk_size": 3},
    ],
    ids=["beams", "sampled beams", "logits", "n-grams", "time", "chunks"],
)
def test_everything_else_runs_transformers_loop(model: PreTrainedModel, options: dict) -> None:
    ids = _ids(2, 7)
    runs = []
    for captured in (True, False):
        torch.manual_seed(2)
        if captured:
            out = _generate(model, ids, max_new_tokens=10, **options)
        else:
            with _uncaptured(model):
                out = _generate(model, ids, max_new_tokens=10, **options)
        runs.append(out.sequences if options.get("return_dict_in_generate") else out)
    assert torch.equal(runs[0], runs[1])


@torch.no_grad()
def test_generation_in_inference_mode_and_outside(model: PreTrainedModel) -> None:
    ids = _ids(2, 6)
    with torch.inference_mode():
        expected = _generate(model, ids, max_new_tokens=9)
    for _ in range(2):
        assert torch.equal(_generate(model, ids, max_new_tokens=9), expected)
    with torch.inference_mode():
        assert torch.equal(_generate(model, ids, max_new_tokens=9), expected)


def test_threads_share_a_model(model: PreTrainedModel) -> None:
    prompts = [_ids(2, 6) for _ in range(4)]
    expected = [_generate(model, ids, max_new_tokens=15, use_cache=False) for ids in prompts]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            got[i] = _generate(model, prompts[i], max_new_tokens=15)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], right) for i, right in enumerate(expected))


@torch.no_grad()
def test_a_failing_streamer_leaves_the_model_usable(model: PreTrainedModel) -> None:
    class Broken(Listener):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.parts) == 4:
                raise OSError("closed")

    ids = _ids(1, 4)
    with pytest.raises(OSError, match="closed"):
        _generate(model, ids, max_new_tokens=20, streamer=Broken())
    expected = _generate(model, ids, max_new_tokens=9, use_cache=False)
    assert torch.equal(_generate(model, ids, max_new_tokens=9), expected)


@torch.no_grad()
def test_logits_that_are_not_numbers_are_an_error(model: PreTrainedModel) -> None:
    model.backbone.norm_f.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="inf or nan"):
        _generate(model, _ids(1, 4), do_sample=True, max_new_tokens=5)


def test_steps_are_captured_once_and_bounded(model: PreTrainedModel) -> None:
    for _ in range(3):
        _generate(model, _ids(2, 4), max_new_tokens=9)
    assert _captures(model) == 2  # prompt and step
    _theirs(model, _ids(2, 4), max_new_tokens=9)
    assert _captures(model) == 3
    for batch in range(1, 9):
        _generate(model, _ids(batch, 4), max_new_tokens=4)
    assert len(graphs_of(model).captures) == 4
    forget_graphs(model)
    assert _captures(model) == 0


@pytest.mark.parametrize("marks", [pytest.param(None, marks=gpu)])
def test_captures_are_freed_with_the_model(marks: None) -> None:
    def allocated_after_a_model() -> int:
        model = _model("mamba2")
        _generate(model, _ids(4, 6), max_new_tokens=9)
        del model
        gc.collect()
        return torch.cuda.memory_allocated()

    # The first leaves the workspaces of cuBLAS behind, one a stream, which are no model's.
    assert allocated_after_a_model() == allocated_after_a_model()


@pytest.mark.parametrize("marks", [pytest.param(None, marks=gpu)])
def test_what_cannot_be_captured_is_told_once(
    model: PreTrainedModel, marks: None, caplog: pytest.LogCaptureFixture
) -> None:
    ids = _ids(2, 6)
    expected = _generate(model, ids, max_new_tokens=5)
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):
            _generate(model, ids, max_new_tokens=5)
    assert sum("autocast is on" in line for line in caplog.messages) <= 1
    with _uncaptured(model):
        assert torch.equal(_generate(model, ids, max_new_tokens=5), expected)
