"""What people do to a `PreTrainedModel`, done to ours."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from ssm_hf import (
    HybridForCausalLM,
    HybridModel,
    JambaForCausalLM,
    JambaModel,
    Mamba2ForCausalLM,
    Mamba2Model,
    Mamba3ForCausalLM,
    Mamba3Model,
    MambaForCausalLM,
    MambaModel,
    TaipanForCausalLM,
    TaipanModel,
)
from tests.helpers import decide_, names_of, randomize_, relative_error, tiny

MODELS = {
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "mamba3": Mamba3ForCausalLM,
    "jamba": JambaForCausalLM,
    "ssm_hybrid": HybridForCausalLM,
    "taipan": TaipanForCausalLM,
}
BACKBONES = {
    "mamba": MambaModel,
    "mamba2": Mamba2Model,
    "mamba3": Mamba3Model,
    "ssm_hybrid": HybridModel,
    "taipan": TaipanModel,
    "jamba": JambaModel,
}
each_type = pytest.mark.parametrize(
    "model_type",
    [pytest.param(n, marks=pytest.mark.slow if n == "jamba" else ()) for n in MODELS],
)
each_tying = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def build(model_type: str, **overrides: Any) -> Any:
    return randomize_(MODELS[model_type](tiny(model_type, **overrides))).eval()


def some_ids(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, 96, (batch, length))


@each_type
def test_inputs_embeds_equal_input_ids(model_type: str) -> None:
    model, ids = build(model_type), some_ids()
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    new = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens[:, ids.shape[1] :], new)


@each_type
@torch.no_grad()
def test_hidden_states_are_each_layers_output_and_the_normalised_last(model_type: str) -> None:
    model, ids = build(model_type), some_ids()
    seen: list[Tensor] = []
    _, blocks, norm = model.base_model._parts()
    for block in blocks:
        block.register_forward_hook(lambda _module, _args, output: seen.append(sum(output[:2])))
    out = model.base_model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == len(seen) + 1 == 4
    assert all(torch.equal(x, y) for x, y in zip(out.hidden_states[:-1], seen, strict=True))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.equal(norm(seen[-1])[0], out.last_hidden_state)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    as_argument = model(ids, return_dict=False)
    model.config.return_dict = False
    for logits, cache, hidden_states in (as_argument, model(ids)):
        assert torch.equal(logits, model.lm_head(hidden_states[-1]))
        assert cache.get_seq_length() == 13


@each_type
def test_backbone_alone_loads_from_a_language_model(model_type: str, tmp_path: Path) -> None:
    model, ids = build(model_type), some_ids()
    model.save_pretrained(tmp_path)
    backbone = BACKBONES[model_type].from_pretrained(tmp_path)
    assert torch.equal(backbone(ids).last_hidden_state, model.base_model(ids).last_hidden_state)
    backbone.save_pretrained(tmp_path / "backbone")
    again = BACKBONES[model_type].from_pretrained(tmp_path / "backbone")
    assert torch.equal(again(ids).last_hidden_state, backbone(ids).last_hidden_state)


@each_type
@each_tying
@pytest.mark.parametrize("size", [104, 90])
def test_vocabulary_can_be_resized(model_type: str, tied: bool, size: int, tmp_path: Path) -> None:
    model, ids = build(model_type, tie_word_embeddings=tied), some_ids().clamp(max=80)
    before = model(ids).logits
    model.resize_token_embeddings(size)
    kept = min(size, 96)
    assert model.config.vocab_size == size
    assert model.get_input_embeddings().weight.shape == (size, 32)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == size
    # Another width may be multiplied in another order.
    torch.testing.assert_close(after.logits[..., :kept], before[..., :kept], atol=2e-6, rtol=1e-5)
    if size > 96:
        model(torch.full_like(ids, size - 1), labels=ids)
    else:
        with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 90\)"):
            model(torch.full_like(ids, 95))
    model.save_pretrained(tmp_path)
    loaded = MODELS[model_type].from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@each_type
@each_tying
@pytest.mark.parametrize("shards", ["one", "many"])
def test_saved_and_loaded_model_is_the_same(
    model_type: str, tied: bool, shards: str, tmp_path: Path
) -> None:
    model, ids = build(model_type, tie_word_embeddings=tied), some_ids()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "many" else "1GB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "many")
    names = [name for file in files for name in load_file(file)]
    assert names.count("lm_head.weight") == (0 if tied else 1)
    own = names_of(model_type)
    assert names.count(f"{own.backbone}.{own.embeddings}.weight") == 1
    loaded, info = MODELS[model_type].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@each_type
@each_tying
def test_state_dict_survives_torch_save(model_type: str, tied: bool, tmp_path: Path) -> None:
    model, ids = build(model_type, tie_word_embeddings=tied), some_ids()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = MODELS[model_type](model.config).eval()
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(ids).logits, model(ids).logits)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, model(ids).logits)


@each_type
def test_bf16_model_keeps_decays_in_fp32(model_type: str, tmp_path: Path) -> None:
    model, ids = build(model_type), some_ids()
    model.save_pretrained(tmp_path)
    loaded = MODELS[model_type].from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        precise = name.endswith(("A_log", ".D", "dt_bias", "B_bias", "C_bias"))
        assert tensor.dtype == (torch.float32 if precise else torch.bfloat16), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    loaded.save_pretrained(tmp_path / "bf16")
    again = MODELS[model_type].from_pretrained(tmp_path / "bf16")
    assert again.dtype == torch.bfloat16
    assert getattr(again.base_model.layers[0], names_of(model_type).mixer).D.dtype == torch.float32
    assert torch.equal(again(ids).logits, loaded(ids).logits)


# Everything on the disk, and a mixture; `auto` finds a CPU only.
def places(model_type: str) -> dict[str, Any]:
    backbone, embeddings, norm, _ = names_of(model_type)
    return {
        "cpu": {"": "cpu"},
        "auto": "auto",
        "disk": {backbone: "disk", "lm_head": "disk"},
        "layers on disk": {
            f"{backbone}.{embeddings}": "cpu",
            "lm_head": "cpu",
            f"{backbone}.layers.0": "cpu",
            f"{backbone}.layers.1": "disk",
            f"{backbone}.layers.2": "disk",
            f"{backbone}.{norm}": "cpu",
        },
    }


@each_type
@each_tying
@pytest.mark.parametrize("place", places("mamba"))
def test_device_map_changes_nothing(
    model_type: str, tied: bool, place: str, tmp_path: Path
) -> None:
    model, ids = build(model_type, tie_word_embeddings=tied), some_ids(1)
    model.save_pretrained(tmp_path / "model")
    placed = MODELS[model_type].from_pretrained(
        tmp_path / "model",
        device_map=places(model_type)[place],
        offload_folder=tmp_path / "offload",
    )
    offloaded = [p for p in placed.base_model.layers[2].parameters() if p.device.type == "meta"]
    assert bool(offloaded) == ("disk" in place)
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, model(ids).logits)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(ids, **settings)
    assert torch.equal(placed.generate(ids, **settings), tokens)
    if place != "disk":  # with no weight in memory at all, transformers makes its masks on "meta"
        assisted = placed.generate(ids, prompt_lookup_num_tokens=2, **settings)
        assert torch.equal(assisted, tokens)


@each_type
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(model_type: str, use_reentrant: bool) -> None:
    model, ids = build(model_type).train(), some_ids()
    calls: list[int] = []
    mixer = getattr(model.base_model.layers[0], names_of(model_type).mixer)
    mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    # Two documents a row: the facts about the batch must reach the second computation too.
    packed = {"position_ids": torch.tensor([[*range(5), *range(8)]] * 2)}

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        calls.clear()
        model(ids, labels=ids, use_cache=True, **packed).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    assert len(calls) == 1
    # Renamed between the transformers releases that are supported.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    checkpointed = gradients()
    assert len(calls) == 2
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@each_type
def test_trainer_step_on_a_packed_batch_has_the_separate_documents_loss(
    model_type: str, tmp_path: Path
) -> None:
    model = build(model_type).train()
    documents = [some_ids(1, length)[0].tolist() for length in (5, 9, 2, 6)]
    rows = [torch.tensor([document]) for document in documents]
    losses = [float(model(row, labels=row).loss.detach()) for row in rows]
    targets = [len(d) - 1 for d in documents]
    expected = sum(a * b for a, b in zip(losses, targets, strict=True)) / sum(targets)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        data_collator=DataCollatorWithFlattening(
            return_position_ids=True, return_seq_idx=True, return_flash_attn_kwargs=True
        ),
    )
    result = trainer.train()
    # fp32 means of some 20 logs of order 5, in another order.
    assert result.training_loss == pytest.approx(expected, abs=2e-5)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == list(before)


@each_type
def test_trainer_predicts_logits_alone(model_type: str, tmp_path: Path) -> None:
    options = {"output_router_logits": True} if model_type in ("jamba", "ssm_hybrid") else {}
    if model_type == "ssm_hybrid":
        options["blocks"] = ["mamba2", "moe"]
    model, ids = build(model_type, **options), some_ids(3)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    predictions = Trainer(model=model, args=arguments).predict(rows).predictions
    assert relative_error(torch.tensor(predictions), model(ids).logits) < 1e-6


MIXER_GROUPS = {
    "mamba": (
        ["conv1d.weight", "in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"],
        ["A_log", "D", "conv1d.bias", "in_proj.bias", "dt_proj.bias", "out_proj.bias"],
    ),
    "mamba2": (
        ["conv1d.weight", "in_proj.weight", "out_proj.weight"],
        ["A_log", "D", "dt_bias", "norm.weight", "conv1d.bias", "in_proj.bias", "out_proj.bias"],
    ),
    "mamba3": (
        ["in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight"],
        ["D", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight", "mimo_x", "mimo_z",
         "mimo_o", "norm.weight", "in_proj.bias", "out_proj.bias", "norm2.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", MIXER_GROUPS)
@each_tying
def test_parameter_groups_list_every_parameter_once(model_type: str, tied: bool) -> None:
    options = {"mimo_rank": 2, "output_norm": True} if model_type == "mamba3" else {}
    model = build(
        model_type, tie_word_embeddings=tied, use_bias=True, num_hidden_layers=2, **options
    )
    decayed, spared = ["backbone.embeddings.weight"], ["backbone.norm_f.weight"]
    if not tied:
        decayed.append("lm_head.weight")
    for layer in ("backbone.layers.0.", "backbone.layers.1."):
        spared.append(layer + "norm.weight")
        homes = {"fc1.weight": "mlp.", "fc2.weight": "mlp.", "norm2.weight": ""}
        for names, listed in zip((decayed, spared), MIXER_GROUPS[model_type], strict=True):
            names += [layer + homes.get(name, "mixer.") + name for name in listed]
    groups = model.parameter_groups(0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert sorted(groups[0]["names"]) == sorted(decayed)
    assert sorted(groups[1]["names"]) == sorted(spared)
    parameters = dict(model.named_parameters())
    for group in groups:
        assert all(parameters[n] is p for n, p in zip(group["names"], group["params"], strict=True))
    torch.optim.AdamW(groups)
    model.backbone.embeddings.weight.requires_grad_(False)
    names = [name for group in model.parameter_groups(0.1) for name in group["names"]]
    assert "backbone.embeddings.weight" not in names


def test_flops_per_token_equal_a_count_by_hand() -> None:
    # D=32, I=64, N=4, R=2, K=4; projections, convolution, 9 operations per state.
    layer = 2 * (32 * 128 + 64 * (2 + 4 + 4) + 2 * 64 + 64 * 32) + 2 * 4 * 64 + 9 * 64 * 4
    head = 2 * 32 * 96
    assert build("mamba").flops_per_token(1024) == 3 * layer + head == 56064
    # D=32, I=64, H=8, P=8, N=16, G=2, K=4, chunks of 4: projections, convolution, C B^T per group,
    # scores times x, states, and outputs from states.
    scan = 4 * 2 * 16 + 4 * 64 + 64 * 16 + 64 * 16
    layer = 2 * (32 * (64 + 64 + 2 * 2 * 16 + 8) + 64 * 32 + 4 * (64 + 2 * 2 * 16) + scan)
    assert build("mamba2").flops_per_token(1024) == 3 * layer + head == 74496
    assert BACKBONES["mamba2"](tiny("mamba2")).flops_per_token(1) == 3 * layer
    # D=32, I=64, H=8, P=8, N=8, G=2, R=2, S=2, chunks of 4, so 8 rows; MLP of 128.
    scan = 8 * 2 * (8 * (8 + 8) + 2 * 8 * 8) + 8 * 2 * 4 * 2 + 3 * 8 * 2 * 8
    layer = 2 * (32 * (64 + 64 + 2 * 2 * 2 * 8 + 3 * 8 + 2) + 64 * 32 + scan + 3 * 32 * 128)
    model = BACKBONES["mamba3"](tiny("mamba3-mimo"))
    assert model.flops_per_token(1) == 3 * layer


@each_type
def test_loss_of_a_larger_batch_can_be_shared(model_type: str) -> None:
    """`num_items_in_batch`: parts of an accumulated batch sum to the mean over all of it."""
    model, ids = build(model_type), some_ids(3)
    whole = model(ids, labels=ids).loss
    parts = [model(ids[i : i + 1], labels=ids[i : i + 1], num_items_in_batch=36) for i in range(3)]
    assert relative_error(sum(part.loss for part in parts), whole) < 1e-6
    # A part may hold no target at all, such as a document of one token.
    for return_logits in (True, False):
        alone = model(ids[:, :1], labels=ids[:, :1], num_items_in_batch=36,
                      return_logits=return_logits).loss  # fmt: skip
        assert float(alone.detach()) == 0
        alone.backward()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@each_type
@pytest.mark.parametrize("keep", [5, torch.tensor([2, 7, 8]), torch.arange(12, -1, -1)])
def test_logits_to_keep_selects_logits_and_their_targets(
    model_type: str, keep: int | Tensor
) -> None:
    model, ids = build(model_type), some_ids()
    chosen = torch.arange(13 - keep, 13) if isinstance(keep, int) else keep
    out, whole = model(ids, labels=ids, logits_to_keep=keep), model(ids).logits
    # Fewer rows may be multiplied in another order.
    torch.testing.assert_close(out.logits, whole[:, chosen], atol=2e-6, rtol=1e-5)
    targets = torch.cat([ids[:, 1:], ids.new_full((2, 1), -100)], dim=1)[:, chosen]
    expected = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    assert relative_error(out.loss, expected) < 1e-6


@each_type
@torch.no_grad()
def test_cache_works_under_autocast(model_type: str) -> None:
    """Sampling from an fp32 model in the middle of mixed-precision training."""
    model, ids = decide_(build(model_type)), some_ids()
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model(ids).logits
        cache = model(ids[:, :6], use_cache=True).past_key_values
        parts = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(6, 13)]
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 17)
    states = [layer.state["ssm_state"] for layer in cache.layers if "ssm_state" in layer.state]
    assert {state.dtype for state in states} == {torch.float32}
    # bf16 (4e-3) rounds differently in a step; neither may be further from fp32 than 3e-2.
    assert relative_error(whole, exact) < 3e-2
    assert relative_error(torch.cat(parts, dim=1), exact[:, 6:]) < 3e-2


class LowRank(torch.nn.Module):
    """A frozen linear layer with a low-rank addition, as adapters wrap it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Linear(base.in_features, 2, bias=False).to(base.weight)
        self.up = torch.nn.Linear(2, base.out_features, bias=False).to(base.weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name) if name == "weight" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@each_type
def test_adapters_of_all_projections_are_obeyed_and_trained(model_type: str) -> None:
    merged = build(model_type).double()
    model = copy.deepcopy(merged)
    for ours, theirs in zip(model.base_model.layers, merged.base_model.layers, strict=True):
        for name, linear in list(ours.named_modules()):
            if isinstance(linear, torch.nn.Linear) and not name.endswith("dt_proj"):
                home, _, last = name.rpartition(".")
                adapter = LowRank(linear)
                setattr(ours.get_submodule(home), last, adapter)
                theirs.get_submodule(name).weight.data += (
                    adapter.up.weight.data @ adapter.down.weight.data
                )
    ids = some_ids()
    # fp64 rounding; the loss is formed in fp32.
    assert relative_error(model(ids).logits, merged(ids).logits) < 1e-10
    for run in (model, merged):
        run.train()(ids, labels=ids, use_cache=False, return_logits=False).loss.backward()
    for ours, theirs in zip(model.base_model.layers, merged.base_model.layers, strict=True):
        name, adapter = next((n, m) for n, m in ours.named_modules() if isinstance(m, LowRank))
        expected = theirs.get_submodule(name).weight.grad @ adapter.down.weight.data.T
        assert relative_error(adapter.up.weight.grad, expected) < 1e-5
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.eval().generate(ids, **settings), merged.eval().generate(ids, **settings)
    )
