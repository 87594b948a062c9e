"""generate() in all its forms: token equality in fp32 against runs without a cache."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ssm_hf import (
    HybridForCausalLM,
    Mamba2ForCausalLM,
    Mamba3ForCausalLM,
    MambaForCausalLM,
    RecurrentCache,
    TaipanForCausalLM,
    byte_tokenizer,
)
from ssm_hf.cache import KVLayer
from tests.helpers import decide_, randomize_, tiny

CLASSES = {
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "mamba3": Mamba3ForCausalLM,
    "ssm_hybrid": HybridForCausalLM,
    "taipan": TaipanForCausalLM,
    "taipan-selected": TaipanForCausalLM,
    "mamba3-mimo": Mamba3ForCausalLM,
}
# The laws of mixers cover the rest of what several streams change.
each_and_mimo = pytest.mark.parametrize("model", list(CLASSES), indirect=True)


def _model(model_type: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    model = CLASSES[model_type](tiny(model_type, **overrides))
    model = randomize_(model, seed).eval()
    # Greedy runs must reach their length, and padding must be told apart from text.
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow if name == "taipan" else ())
        for name in CLASSES
        if name != "mamba3-mimo"
    ]
)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return _model(request.param)


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 96, (batch, length))


def _left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(r.shape[0] for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - row.shape[0] :] = row
        mask[i, width - row.shape[0] :] = 1
    return ids, mask


def _by_hand(model: PreTrainedModel, prompt: Tensor, new: int) -> Tensor:
    """Greedy tokens of one row from whole forward passes, with no cache at all."""
    ids = prompt[None]
    for _ in range(new):
        logits = model(ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, prompt.shape[0] :]


@each_and_mimo
@torch.no_grad()
def test_generate_greedy_equals_whole_forward_passes(model: PreTrainedModel) -> None:
    ids = _ids(2, 9)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    for row in range(2):
        assert out[row, 9:].tolist() == _by_hand(model, ids[row], 12).tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beam", "beams-returned"],
)
def test_generate_with_cache_equals_without(model: PreTrainedModel, options: dict) -> None:
    ids, mask = _left_padded([_ids(1, n)[0] for n in (9, 4, 6)])
    runs = [
        model.generate(ids, attention_mask=mask, max_new_tokens=10, use_cache=use, **options)
        for use in (True, False)
    ]
    assert runs[0].tolist() == runs[1].tolist()


@torch.no_grad()
def test_generate_left_padded_batch_equals_single_rows(model: PreTrainedModel) -> None:
    rows = [_ids(1, n)[0] for n in (11, 3, 7, 1)]
    ids, mask = _left_padded(rows)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    for row, got in zip(rows, out, strict=True):
        assert got[ids.shape[1] :].tolist() == _by_hand(model, row, 12).tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 3}]
)
def test_generate_right_padded_batch_equals_single_rows(
    model: PreTrainedModel, options: dict
) -> None:
    rows = [_ids(1, n)[0] for n in (8, 3, 1)]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : row.shape[0]], mask[i, : row.shape[0]] = row, 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=10, **options)
    for row, got in zip(rows, out, strict=True):
        alone = model.generate(
            row[None], attention_mask=torch.ones(1, row.shape[0]), max_new_tokens=10, **options
        )
        assert got[8:].tolist() == alone[0, row.shape[0] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_generate_stops_at_strings(model: PreTrainedModel, options: dict) -> None:
    tokenizer, ids = byte_tokenizer(), _ids(1, 9)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, **options}
    stop = tokenizer.decode(model.generate(ids, **given)[0, 9:10])
    stopped = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **given)[0, 9:]
    text = tokenizer.decode(stopped)
    assert text == stop if "num_beams" not in options else stop not in text[:-1]


@torch.no_grad()
def test_generate_sampling_draws_the_same_tokens_with_and_without_cache(
    model: PreTrainedModel,
) -> None:
    ids = _ids(3, 8)
    runs = []
    for use in (True, False):
        torch.manual_seed(5)
        runs.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=20,
                top_p=0.9,
                temperature=0.8,
                repetition_penalty=1.1,
                max_new_tokens=12,
                use_cache=use,
            )
        )
    assert runs[0].tolist() == runs[1].tolist()


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_generate_chunked_prefill_equals_one_pass(model: PreTrainedModel, chunk: int) -> None:
    ids, mask = _left_padded([_ids(1, n)[0] for n in (10, 5)])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, prefill_chunk_size=chunk)
    assert out.tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("style", ["whole sequence", "new tokens", "cache_params"])
def test_generate_continues_a_users_cache(model: PreTrainedModel, style: str) -> None:
    first, second = _ids(2, 7), _ids(2, 4)
    cache = RecurrentCache(model.config)
    out = model.generate(first, attention_mask=torch.ones_like(first), past_key_values=cache,
                         max_new_tokens=5)  # fmt: skip
    # the last token was returned, but not yet fed to the model
    assert cache.get_seq_length() == out.shape[1] - 1
    whole = torch.cat([out, second], dim=1)
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=6)
    new = whole[:, cache.get_seq_length() :] if style == "new tokens" else whole
    name = "cache_params" if style == "cache_params" else "past_key_values"
    got = model.generate(new, attention_mask=torch.ones_like(whole), max_new_tokens=6,
                         **{name: cache})  # fmt: skip
    assert got[:, -6:].tolist() == expected[:, -6:].tolist()


@each_and_mimo
@torch.no_grad()
def test_generate_batched_second_turn_with_padding_equals_single_conversations(
    model: PreTrainedModel,
) -> None:
    firsts, seconds = [_ids(1, n)[0] for n in (6, 3)], [_ids(1, n)[0] for n in (2, 5)]
    ids, mask = _left_padded(firsts)
    cache = RecurrentCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    more, more_mask = _left_padded(seconds)
    out = model.generate(
        torch.cat([ids, more], 1),
        attention_mask=torch.cat([mask, more_mask], 1),
        past_key_values=cache,
        max_new_tokens=8,
    )
    for row in range(2):
        expected = _by_hand(model, torch.cat([firsts[row], seconds[row]]), 8)
        assert out[row, -8:].tolist() == expected.tolist()


@torch.no_grad()
def test_generate_from_inputs_embeds_equals_ids(model: PreTrainedModel) -> None:
    ids = _ids(2, 6)
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    out = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=8
    )
    assert out.tolist() == expected[:, 6:].tolist()


@torch.no_grad()
def test_generate_in_bfloat16_follows_its_own_whole_forward(model: PreTrainedModel) -> None:
    model = decide_(model).bfloat16()
    ids, mask = _left_padded([_ids(1, n)[0] for n in (10, 6)])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, output_logits=True, return_dict_in_generate=True
    )
    stepped = torch.stack(out.logits, dim=1)
    new_mask = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], 1)
    whole = model(out.sequences, attention_mask=new_mask).logits[:, 9:-1]
    # bf16 rounds each of 3 layers' activations to 8 bits, in another order in the two runs.
    assert (stepped - whole).abs().max() < 0.05 * whole.abs().max()
    assert out.past_key_values.layers[0].state["ssm_state"].dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("implementation", [None, "dynamic", "static"])
def test_generate_always_uses_a_recurrent_cache(
    model: PreTrainedModel, implementation: str | None
) -> None:
    ids = _ids(2, 5)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=3,
        return_dict_in_generate=True,
        cache_implementation=implementation,
    )
    assert isinstance(out.past_key_values, RecurrentCache)
    assert out.past_key_values.get_seq_length() == 7


@torch.no_grad()
def test_forward_returns_the_cache_under_both_names(model: PreTrainedModel) -> None:
    out = model(_ids(1, 4), use_cache=True)
    assert out.cache_params is out.past_key_values
    assert "cache_params" not in out  # one entry only, or generate would copy it twice
    more = model(_ids(1, 1), cache_params=out.cache_params)
    assert more.past_key_values is out.past_key_values
    assert more.past_key_values.get_seq_length() == 5
    assert model(_ids(1, 4), use_cache=False).past_key_values is None


@torch.no_grad()
def test_cache_size_is_independent_of_length(model: PreTrainedModel) -> None:
    caches = [model(_ids(2, n)).past_key_values for n in (1, 10, 300)]
    # All but the keys and values of full attention, which come by powers of two.
    sizes, slots = set(), set()
    for cache in caches:
        growing = [x for x in cache.layers if isinstance(x, KVLayer) and x.window is None]
        slots.update(layer.slots for layer in growing)
        sizes.add(cache.nbytes - sum(layer.nbytes for layer in growing))
    assert len(sizes) == 1
    assert slots == ({64, 512} if model.config.model_type == "ssm_hybrid" else set())


@torch.no_grad()
def test_snapshot_restores_a_cache_any_number_of_times(model: PreTrainedModel) -> None:
    cache = model(_ids(2, 9)).past_key_values
    snapshot, step = cache.snapshot(), _ids(2, 3)
    expected = model(step, past_key_values=cache).logits
    for _ in range(2):
        cache.restore(snapshot)
        assert cache.get_seq_length() == 9
        assert torch.equal(model(step, past_key_values=cache).logits, expected)
    fresh = RecurrentCache(model.config)
    fresh.restore(snapshot)
    assert torch.equal(model(step, past_key_values=fresh).logits, expected)
    cache.restore(RecurrentCache(model.config).snapshot())
    assert torch.equal(model(step, past_key_values=cache).logits, model(step).logits)


@torch.no_grad()
def test_cache_keeps_states_in_the_dtype_asked_for(model: PreTrainedModel) -> None:
    ids = _ids(2, 9)
    cache = RecurrentCache(model.config, state_dtype=torch.bfloat16)
    logits = [model(part, past_key_values=cache).logits[:, -1] for part in ids.split([5, 1, 3], 1)]
    for name, stored in cache.layers[0].state.items():
        assert stored.dtype == (torch.bfloat16 if name == "ssm_state" else torch.float32), name
    # The state of each layer is rounded to 8 bits three times.
    expected = model(ids).logits[:, -1]
    assert (logits[-1] - expected).abs().max() < 0.03 * expected.abs().max()
    cache = RecurrentCache(model.config, state_dtype=torch.bfloat16)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5)
    assert out.shape == (2, 14)
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int32"):
        RecurrentCache(model.config, state_dtype=torch.int32)


@torch.no_grad()
def test_cache_reset_starts_a_sequence(model: PreTrainedModel) -> None:
    ids = _ids(2, 5)
    cache = model(_ids(2, 9)).past_key_values
    cache.reset()
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_cache_rows_can_be_repeated_selected_and_copied(model: PreTrainedModel) -> None:
    ids, step = _ids(2, 5), _ids(4, 1)
    cache = model(ids).past_key_values
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    expected = model(torch.cat([ids.repeat_interleave(2, 0), step], 1)).logits[:, -1]
    logits = model(step, past_key_values=repeated).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    cache.batch_select_indices(torch.tensor([1]))
    logits = model(step[:1], past_key_values=cache).logits[:, -1]
    expected = model(torch.cat([ids[1:], step[:1]], 1)).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 8, 300])
@pytest.mark.parametrize("drafter", ["other", "itself"])
def test_assisted_decoding_equals_greedy(model: PreTrainedModel, drafter: str, prompt: int) -> None:
    assistant = model if drafter == "itself" else _model("mamba", seed=3, num_hidden_layers=1)
    ids = _ids(1, prompt)
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=24)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=24,
                         assistant_model=copy.deepcopy(assistant))  # fmt: skip
    assert out.tolist() == expected.tolist()


@each_and_mimo
@torch.no_grad()
def test_prompt_lookup_decoding_equals_greedy(model: PreTrainedModel) -> None:
    ids = _ids(1, 6).repeat(1, 4)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=24)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=24, prompt_lookup_num_tokens=5)
    assert out.tolist() == expected.tolist()


@torch.no_grad()
def test_assisted_decoding_continues_a_users_cache(model: PreTrainedModel) -> None:
    ids = _ids(1, 12)
    cache = model(ids[:, :7]).past_key_values
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                         past_key_values=cache, prompt_lookup_num_tokens=4)  # fmt: skip
    assert out.tolist() == expected.tolist()


@torch.no_grad()
def test_assisted_sampling_follows_the_models_distribution() -> None:
    model = _model("mamba2", vocab_size=6)
    assistant = _model("mamba", seed=3, vocab_size=6, num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 3
    ids = torch.tensor([[3, 4, 5]])
    model.get_output_embeddings().weight.mul_(0.2)  # far from one certain token
    logits = model(ids).logits[0, -1]
    first = torch.softmax(logits, -1)
    second = torch.stack(
        [torch.softmax(model(torch.tensor([[3, 4, 5, t]])).logits[0, -1], -1) for t in range(6)]
    )
    expected = (first[:, None] * second).flatten()
    counts = torch.zeros(36)
    n = 400
    for _ in range(n):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                             max_new_tokens=2, assistant_model=assistant)  # fmt: skip
        counts[out[0, 3] * 6 + out[0, 4]] += 1
    # Pearson's statistic over 36 cells; its 99.9 % quantile at 35 degrees of freedom is 66.6.
    statistic = ((counts - n * expected) ** 2 / (n * expected)).sum()
    assert statistic < 66.6
