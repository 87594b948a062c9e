"""Our decoding loop over captured steps against transformers' loop and whole forward passes."""

import pytest
import torch
from torch import Tensor
from transformers import MaxTimeCriteria, PreTrainedModel, StoppingCriteriaList

from ssm_hf.generation import forget_graphs, select
from tests.models.captured.helpers import (
    DEVICE,
    an_eos,
    generate,
    random_ids,
    theirs,
    uncaptured,
    with_hybrids,
)

SAMPLING = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.7},
    "top-k": {"top_k": 7},
    "top-p": {"top_k": 0, "top_p": 0.8},
    "min-p": {"top_k": 0, "min_p": 0.1},
    "penalty": {"top_k": 0, "repetition_penalty": 1.3},
    "all": {"top_k": 20, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.1},
}


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


@with_hybrids
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 9])
def test_greedy_tokens_equal_whole_forward_passes(model: PreTrainedModel, batch: int) -> None:
    ids = random_ids(batch, 9)
    out = generate(model, ids, max_new_tokens=20)
    assert torch.equal(out, generate(model, ids, max_new_tokens=20, use_cache=False))
    assert torch.equal(out, theirs(model, ids, max_new_tokens=20))
    with uncaptured(model):
        assert torch.equal(out, generate(model, ids, max_new_tokens=20))


@torch.no_grad()
@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_sampled_tokens_equal_transformers(model: PreTrainedModel, options: dict) -> None:
    ids, mask = random_ids(3, 8), torch.ones(3, 8, dtype=torch.long, device=DEVICE)
    mask[1, :3] = 0
    ids[1, :3] = 0
    runs = []
    for run in (generate, theirs):
        torch.manual_seed(5)
        tokens = run(model, ids, attention_mask=mask, do_sample=True, max_new_tokens=15, **options)
        # The generator must stand where transformers leaves it, too.
        runs.append([*tokens.tolist(), torch.rand(2, device=DEVICE).tolist()])
    assert runs[0] == runs[1]


@torch.no_grad()
@pytest.mark.parametrize(("visible", "sample"), [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("step", [0, 5])
def test_ended_rows_are_padded_and_the_surplus_leaves_no_trace(
    model: PreTrainedModel, step: int, visible: bool, sample: bool
) -> None:
    ids = random_ids(2, 6)
    eos = [an_eos(model, ids, step), int(generate(model, ids, max_new_tokens=9)[1, -1])]
    results = []
    for run in (generate, theirs):
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
    ids = random_ids(2, 5)
    eos = an_eos(model, ids, 1)
    for options in ({"min_new_tokens": 12}, {"min_length": 14}):
        options |= {"eos_token_id": eos, "max_new_tokens": 25}
        assert torch.equal(generate(model, ids, **options), theirs(model, ids, **options))


@torch.no_grad()
@pytest.mark.parametrize("ends", [False, True])
def test_streamers_receive_every_token_in_order(model: PreTrainedModel, ends: bool) -> None:
    ids = random_ids(1, 5)
    eos = an_eos(model, ids, 5) if ends else None
    listeners = []
    for run in (generate, theirs):
        listeners.append(Listener())
        out = run(model, ids, max_new_tokens=17, eos_token_id=eos, streamer=listeners[-1])
        assert [t for part in listeners[-1].parts for t in part] == out[0].tolist()
    assert listeners[0].parts == listeners[1].parts
    assert listeners[0].ended == 1


@torch.no_grad()
def test_a_failing_streamer_leaves_the_model_usable(model: PreTrainedModel) -> None:
    class Broken(Listener):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.parts) == 4:
                raise OSError("closed")

    ids = random_ids(1, 4)
    with pytest.raises(OSError, match="closed"):
        generate(model, ids, max_new_tokens=20, streamer=Broken())
    expected = generate(model, ids, max_new_tokens=9, use_cache=False)
    assert torch.equal(generate(model, ids, max_new_tokens=9), expected)


@torch.no_grad()
def test_long_outputs_pass_the_static_buffer(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(2, 5)
    expected = generate(model, ids, max_new_tokens=40)
    forget_graphs(model)
    monkeypatch.setattr(select.Selection, "capacity", 8)
    assert torch.equal(generate(model, ids, max_new_tokens=40), expected)
    assert torch.equal(generate(model, ids, max_new_tokens=32), expected[:, :37])


@with_hybrids
@torch.no_grad()
def test_left_padded_rows_equal_single_rows(model: PreTrainedModel) -> None:
    rows = [random_ids(1, n)[0] for n in (8, 3, 1)]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 8 - len(row) :], mask[i, 8 - len(row) :] = row, 1
    out = generate(model, ids.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=15)
    for row, got in zip(rows, out, strict=True):
        alone = generate(model, row[None], max_new_tokens=15)
        assert got[8:].tolist() == alone[0, len(row) :].tolist()


@torch.no_grad()
def test_several_sequences_of_one_prompt(model: PreTrainedModel) -> None:
    ids = random_ids(2, 6)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9}
    runs = []
    for run in (generate, theirs):
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
    ids = random_ids(2, 7)
    runs = []
    for captured in (True, False):
        torch.manual_seed(2)
        if captured:
            out = generate(model, ids, max_new_tokens=10, **options)
        else:
            with uncaptured(model):
                out = generate(model, ids, max_new_tokens=10, **options)
        runs.append(out.sequences if options.get("return_dict_in_generate") else out)
    assert torch.equal(runs[0], runs[1])


@torch.no_grad()
def test_generation_in_inference_mode_and_outside(model: PreTrainedModel) -> None:
    ids = random_ids(2, 6)
    with torch.inference_mode():
        expected = generate(model, ids, max_new_tokens=9)
    for _ in range(2):
        assert torch.equal(generate(model, ids, max_new_tokens=9), expected)
    with torch.inference_mode():
        assert torch.equal(generate(model, ids, max_new_tokens=9), expected)


@torch.no_grad()
def test_logits_that_are_not_numbers_are_an_error(model: PreTrainedModel) -> None:
    model.base_model._parts()[2].weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="inf or nan"):
        generate(model, random_ids(1, 4), do_sample=True, max_new_tokens=5)
