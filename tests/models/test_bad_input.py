"""Bad input to models, caches and checkpoints: the error says what is wrong, nothing is lost."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from ssm_hf import (
    HybridForCausalLM,
    JambaForCausalLM,
    Mamba2ForCausalLM,
    Mamba3ForCausalLM,
    MambaForCausalLM,
    RecurrentCache,
    TaipanForCausalLM,
)
from tests.helpers import names_of, randomize_, tiny

MODELS = {
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "mamba3": Mamba3ForCausalLM,
    "jamba": JambaForCausalLM,
    "ssm_hybrid": HybridForCausalLM,
    "taipan": TaipanForCausalLM,
}
each_type = pytest.mark.parametrize(
    "model_type",
    [pytest.param(n, marks=pytest.mark.slow if n in ("jamba", "taipan") else ()) for n in MODELS],
)
IDS = torch.arange(3, 29).view(2, 13)


def build(model_type: str, **overrides: Any) -> Any:
    return randomize_(MODELS[model_type](tiny(model_type, **overrides))).eval()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def replaced(value: int) -> Tensor:
    """IDS with one token changed."""
    ids = IDS.clone()
    ids[1, 4] = value
    return ids


def labels_at(column: int) -> Tensor:
    """Labels of one column only."""
    labels = torch.full_like(IDS, -100)
    labels[:, column] = 5
    return labels


POSITIONS = torch.arange(13).expand(2, 13)
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "id too large": ({"input_ids": replaced(96)}, r"input_ids must lie in \[0, 96\).*got 96"),
    "id negative": ({"input_ids": replaced(-1)}, r"input_ids must lie in \[0, 96\).*got -1"),
    "no tokens": ({"input_ids": zeros(2, 0)}, "got T=0"),
    "ids of one dimension": ({"input_ids": IDS[0]}, r"input_ids must have shape \(B, T\).*\(13,\)"),
    "no input": ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
    "two inputs": (
        {"inputs_embeds": torch.zeros(2, 13, 32)},
        "exactly one of input_ids and inputs_embeds",
    ),
    "mask too short": (
        {"attention_mask": torch.ones(2, 12)},
        r"attention_mask must have shape \(2, 13\), got \(2, 12\)",
    ),
    "mask of another batch": (
        {"attention_mask": torch.ones(3, 13)},
        r"attention_mask must have shape \(2, 13\), got \(3, 13\)",
    ),
    "mask of four dimensions": (
        {"attention_mask": torch.ones(2, 1, 13, 13)},
        r"attention_mask must have shape \(2, 13\), got \(2, 1, 13, 13\)",
    ),
    "positions too short": (
        {"position_ids": zeros(2, 12)},
        r"position_ids must have shape \(2, 13\) or \(1, 13\), got \(2, 12\)",
    ),
    "seq_idx of floats": (
        {"seq_idx": torch.zeros(2, 13)},
        r"seq_idx must be an integer tensor of shape \(2, 13\), got torch.float32",
    ),
    "positions and seq_idx disagree": (
        {"position_ids": POSITIONS, "seq_idx": (POSITIONS > 5).long()},
        "position_ids and seq_idx disagree.*row 0, token 6",
    ),
    "offsets of two rows": ({"cu_seqlens": torch.tensor([0, 6, 13])}, "expected B=1, got B=2"),
    "maximum without offsets": (
        {"max_length_q": 7},
        "max_length_q=7 says that rows of 13 tokens hold several documents",
    ),
    "attention weights": ({"output_attentions": True}, "output_attentions=True"),
    "labels too short": (
        {"labels": IDS[:, 1:]},
        r"labels must have shape \(2, 13\), got \(2, 12\)",
    ),
    "label too large": ({"labels": replaced(96)}, r"labels must lie in \[0, 96\).*got 96"),
    "label negative": ({"labels": replaced(-1)}, r"labels must lie in \[0, 96\).*got -1"),
    "labels all ignored": (
        {"labels": torch.full_like(IDS, -100)},
        "labels: every target is ignored",
    ),
    # The first token of a document is no target, so these are all ignored too.
    "label of a first token": ({"labels": labels_at(0)}, "labels: every target is ignored"),
    "labels of first tokens": (
        {"labels": labels_at(6), "position_ids": POSITIONS % 6},
        "labels: every target is ignored",
    ),
    "labels of pads": (
        {"labels": labels_at(12), "attention_mask": (POSITIONS < 12).long()},
        "labels: every target is ignored",
    ),
    "labels whose targets are cut off": (
        {"labels": IDS, "logits_to_keep": 1},
        "labels: every target is ignored",
    ),
}


@each_type
@pytest.mark.parametrize("case", CALLS)
def test_bad_call_is_refused_and_leaves_the_cache(model_type: str, case: str) -> None:
    model = build(model_type)
    arguments, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, **arguments})
    # With an empty cache: a call that fails must not have begun to fill it.
    cache = RecurrentCache(model.config)
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, **arguments}, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert not any(layer.state for layer in cache.layers)


def filled(model: Any, rows: int = 2) -> RecurrentCache:
    return model(IDS[:rows], use_cache=True).past_key_values


def _bf16(model_type: str) -> Any:
    return build(model_type).bfloat16()


FOREIGN: dict[str, tuple[Any, str]] = {
    "batch": (
        lambda model_type: filled(build(model_type), rows=1),
        r"belongs to another batch size: \w+_state has shape \(1, .*expected \(2, ",
    ),
    "dtype": (
        lambda model_type: filled(_bf16(model_type)),
        r"past_key_values belongs to another dtype: (conv|k)_state is torch.bfloat16, "
        "expected torch.float32",
    ),
    "depth": (
        lambda model_type: filled(build(model_type, num_hidden_layers=2)),
        "past_key_values belongs to another model: it has 2 layers, this model has 3",
    ),
    "state size": (
        lambda model_type: filled(build(model_type, state_size=10)),
        "past_key_values belongs to another model: .*_state has shape",
    ),
    "family": (
        lambda model_type: filled(build("mamba" if model_type == "mamba2" else "mamba2")),
        "past_key_values (belongs to another model: (conv_state has shape|layer .)|holds .*model)",
    ),
}


def content(cache: RecurrentCache) -> tuple[int, list[dict[str, Tensor]]]:
    return cache.get_seq_length(), [
        {name: tensor.clone() for name, tensor in layer.state.items()} for layer in cache.layers
    ]


def assert_unchanged(cache: RecurrentCache, before: tuple[int, list[dict[str, Tensor]]]) -> None:
    tokens, layers = content(cache)
    assert tokens == before[0]
    for layer, expected in zip(layers, before[1], strict=True):
        assert layer.keys() == expected.keys()
        assert all(torch.equal(layer[name], tensor) for name, tensor in expected.items())


@each_type
@pytest.mark.parametrize("case", FOREIGN)
@torch.no_grad()
def test_cache_of_something_else_is_refused_and_kept(model_type: str, case: str) -> None:
    make, message = FOREIGN[case]
    cache = make(model_type)
    before = content(cache)
    with pytest.raises(ValueError, match=message):
        build(model_type)(IDS[:, :1], past_key_values=cache)
    assert_unchanged(cache, before)


@each_type
@torch.no_grad()
def test_bad_continuation_leaves_a_filled_cache_usable(model_type: str) -> None:
    model = build(model_type)
    cache = filled(model)
    before = content(cache)
    for arguments, message in (
        ({"input_ids": replaced(96)}, "input_ids must lie in"),
        (
            {"attention_mask": torch.ones(2, 20)},
            r"shape \(2, 13\) or \(2, 26\), cache included, got \(2, 20\)",
        ),
        ({"labels": torch.full_like(IDS, -100)}, "every target is ignored"),
        (
            {"cache_params": RecurrentCache(model.config)},
            "past_key_values and cache_params are one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": IDS, "past_key_values": cache, **arguments})
        assert_unchanged(cache, before)
    expected = model(torch.cat([IDS, IDS], dim=1)).logits[:, 13:]
    continued = model(IDS, past_key_values=cache).logits
    torch.testing.assert_close(continued, expected, atol=2e-5, rtol=0)


@each_type
def test_cache_of_another_library_is_refused(model_type: str) -> None:
    model = build(model_type)
    with pytest.raises(ValueError, match=r"must be an ssm_hf\.RecurrentCache, got DynamicCache"):
        model(IDS, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"must be an ssm_hf\.RecurrentCache, got DynamicCache"):
        model.generate(IDS, past_key_values=DynamicCache(config=model.config), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"must be an ssm_hf\.RecurrentCache, got tuple"):
        model(IDS, past_key_values=())


@each_type
def test_generate_refuses_what_it_cannot_do(model_type: str) -> None:
    model = build(model_type)
    with pytest.raises(ValueError, match="cache_implementation='quantized' is not supported"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="quantized")
    cache = filled(model)
    before = content(cache)
    with pytest.raises(
        ValueError, match="input_ids holds 13 tokens, but past_key_values has seen 13"
    ):
        model.generate(IDS, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="either cache_implementation or past_key_values"):
        model.generate(IDS, past_key_values=cache, max_new_tokens=2, cache_implementation="dynamic")
    assert_unchanged(cache, before)


@each_type
@torch.no_grad()
def test_crop_and_restore_refuse_what_they_cannot_take_back(model_type: str) -> None:
    model = build(model_type)
    cache = filled(model)
    before = content(cache)
    with pytest.raises(RuntimeError, match=r"call activate_past_recording\(\) before"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="cannot take back 14 tokens of 13 seen"):
        cache.crop(-14)
    with pytest.raises(ValueError, match="must be 0 or negative, got 1"):
        cache.crop(1)
    other = RecurrentCache(tiny(model_type, num_hidden_layers=2))
    with pytest.raises(ValueError, match="snapshot has 2 layers, this cache has 3"):
        cache.restore(other.snapshot())
    cache.activate_past_recording()
    with pytest.raises(RuntimeError, match="cannot take back 1 tokens: only 0 were recorded"):
        cache.crop(-1)
    assert_unchanged(cache, before)

    small = RecurrentCache(model.config, record_window=4)
    small.activate_past_recording()
    model(IDS, past_key_values=small)
    before = content(small)
    with pytest.raises(RuntimeError, match=r"only 4 were recorded.*record_window"):
        small.crop(-5)
    assert_unchanged(small, before)
    packed = {"position_ids": POSITIONS % 6}
    with pytest.raises(ValueError, match="packed documents cannot be combined with a cache that"):
        model(IDS, past_key_values=small, **packed)
    assert_unchanged(small, before)


def saved(model_type: str, folder: Path, **options: Any) -> Any:
    model = build(model_type)
    model.save_pretrained(folder, **options)
    return model


@each_type
def test_damaged_checkpoint_is_refused_by_file_name(model_type: str, tmp_path: Path) -> None:
    model = saved(model_type, tmp_path, max_shard_size="20KB")
    read = MODELS[model_type].from_pretrained
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    # Cut within the header, and within the numbers.
    for length in (4, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{re.escape(shard.name)} is cut off or damaged"):
            read(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"lists {re.escape(shard.name)}, which is missing"):
        read(tmp_path)
    shard.write_bytes(content)
    assert torch.equal(read(tmp_path)(IDS).logits, model(IDS).logits)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        with pytest.raises(
            ValueError, match=r"model\.safetensors\.index\.json is not a shard index"
        ):
            read(tmp_path)


@each_type
def test_checkpoint_without_some_weights_is_refused(model_type: str, tmp_path: Path) -> None:
    saved(model_type, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    names = names_of(model_type)
    lost = f"{names.backbone}.layers.0.{names.mixer}.D"
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of .*: {re.escape(lost)}"):
        MODELS[model_type].from_pretrained(tmp_path)


@each_type
def test_checkpoint_of_other_sizes_is_refused(model_type: str, tmp_path: Path) -> None:
    saved(model_type, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 104}))
    # transformers' own error; it lists each weight with both shapes.
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes"):
        MODELS[model_type].from_pretrained(tmp_path)


class _Touch:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@each_type
def test_pickle_is_read_as_tensors_only(model_type: str, tmp_path: Path) -> None:
    model = saved(model_type, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file, touched = tmp_path / "pytorch_model.bin", tmp_path / "touched"
    read = MODELS[model_type].from_pretrained
    torch.save(model.state_dict(), file)
    assert torch.equal(read(tmp_path)(IDS).logits, model(IDS).logits)

    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is cut off or damaged"):
        read(tmp_path)
    with file.open("wb") as stream:
        pickle.dump(dict(model.state_dict()), stream, protocol=2)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin (holds more than|is cut off)"):
        read(tmp_path)
    for extra, message in (
        (_Touch(touched), "holds more than tensors and is refused"),
        ({"step": 3}, r"must hold tensors only, but 'extra' is a dict"),
        ("text", r"must hold tensors only, but 'extra' is a str"),
    ):
        torch.save({**model.state_dict(), "extra": extra}, file)
        with pytest.raises(ValueError, match=rf"pytorch_model\.bin {message}"):
            read(tmp_path)
    torch.save([1, 2], file)
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin must hold a dict of tensors, got list"
    ):
        read(tmp_path)
    assert not touched.exists()
