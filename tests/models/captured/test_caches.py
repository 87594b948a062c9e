"""Caches that captured steps continue, fill and return."""

import pytest
import torch
from transformers import PreTrainedModel

from ssm_hf import RecurrentCache
from ssm_hf.generation.graphs import graphs_of
from ssm_hf.models import generating
from tests.models.captured.helpers import build, generate, random_ids, theirs, with_hybrids


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "visible"), [({"do_sample": True}, False), ({}, True), ({"num_beams": 2}, False)]
)
def test_steps_go_on_where_the_room_for_keys_runs_out(
    options: dict, visible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build("ssm_hybrid"), random_ids(2, 50)
    monkeypatch.setattr(generating, "_AHEAD", 4)
    runs = []
    for compiled in (True, True, False):
        torch.manual_seed(3)
        out = generate(model, ids, max_new_tokens=90, disable_compile=not compiled,
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


@with_hybrids
@torch.no_grad()
@pytest.mark.parametrize("run", [generate, theirs])
def test_a_chat_continues_its_cache(model: PreTrainedModel, run) -> None:
    caches = [RecurrentCache(model.config) for _ in range(2)]
    texts = [random_ids(2, 7), random_ids(2, 7)]
    for _ in range(3):
        # Two conversations take turns on one captured step.
        for i, cache in enumerate(caches):
            whole = torch.cat([texts[i], random_ids(2, 4)], dim=1)
            expected = generate(model, whole, max_new_tokens=6, use_cache=False)
            texts[i] = run(model, whole, past_key_values=cache, max_new_tokens=6)
            assert torch.equal(texts[i], expected)
            assert cache.seen_tokens == texts[i].shape[1] - 1


@with_hybrids
@torch.no_grad()
def test_a_users_cache_keeps_its_tensors(model: PreTrainedModel) -> None:
    cache = RecurrentCache(model.config)
    ids = random_ids(2, 5)
    model(ids, past_key_values=cache)
    tensors = [t for layer in cache.layers for t in layer.state.values()]
    out = generate(
        model, torch.cat([ids, random_ids(2, 2)], 1), past_key_values=cache, max_new_tokens=6
    )
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
    cache = model(random_ids(3, 5)).past_key_values
    with pytest.raises(ValueError, match="belongs to another batch size"):
        generate(model, random_ids(2, 7), past_key_values=cache, max_new_tokens=3)
    # and the model generates on as if nothing had happened
    ids = random_ids(2, 7)
    expected = generate(model, ids, max_new_tokens=5, use_cache=False)
    assert torch.equal(generate(model, ids, max_new_tokens=5), expected)


@torch.no_grad()
def test_batch_sizes_may_change_between_calls(model: PreTrainedModel) -> None:
    for batch in (1, 4, 1, 2, 12, 5, 1):
        ids = random_ids(batch, 4)
        expected = generate(model, ids, max_new_tokens=6, use_cache=False)
        assert torch.equal(generate(model, ids, max_new_tokens=6), expected)


@with_hybrids
@torch.no_grad()
def test_returned_caches_do_not_change_later(model: PreTrainedModel) -> None:
    ids = random_ids(2, 4)
    first = generate(model, ids, max_new_tokens=6, return_dict_in_generate=True)
    before = first.past_key_values.snapshot()
    generate(model, random_ids(2, 9), max_new_tokens=6)
    for layer, state in zip(first.past_key_values.layers, before.states, strict=True):
        for name, value in layer.state.items():
            assert torch.equal(value, state[name])
