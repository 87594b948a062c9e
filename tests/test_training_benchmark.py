"""The training benchmark's own rules, without a GPU: another function is not timed."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ssm_hf
from benchmarks import training


def _model(_name: str = "") -> tuple[nn.Module, training.Loss]:
    config = ssm_hf.Mamba2Config(hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16,
                                 state_size=16, n_groups=1, vocab_size=48)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    options = {"use_cache": False, "return_logits": False}
    return model, lambda batch: model(**batch, labels=batch["input_ids"], **options).loss


@pytest.fixture(params=["one document", "packed"])
def batch(request: pytest.FixtureRequest) -> training.Batch:
    ids = torch.randint(3, 48, (2, 20))
    return {"input_ids": ids} | (
        {"seq_idx": ids.gt(40).cumsum(1)} if request.param == "packed" else {}
    )


@pytest.fixture
def truth(batch: training.Batch, monkeypatch: pytest.MonkeyPatch) -> training.Truth:
    ssm_hf.register(override=True)
    monkeypatch.setattr(training, "ours", _model)
    return training.Truth.of("tiny", batch)


def test_the_same_weights_pass(batch: training.Batch, truth: training.Truth) -> None:
    errors = training.check(*_model(), batch, truth, 2)
    assert 0 < errors["gradient_error_auto"] < 0.1  # bf16 against fp32
    assert errors["gradient_error_auto"] == errors["gradient_error_reference"]
    assert errors["loss_error_auto"] == errors["loss_error_reference"] < 1e-2


@pytest.mark.parametrize("changed", ["loss", "gradient"])
def test_another_function_is_not_timed(
    batch: training.Batch, truth: training.Truth, changed: str
) -> None:
    model, loss = _model()
    if changed == "gradient":
        with torch.no_grad():
            model.get_parameter("backbone.layers.0.mixer.in_proj.weight").mul_(1.5)
    with pytest.raises(RuntimeError, match=r"nothing is timed"):
        training.check(
            model, lambda b: 1.1 * loss(b) if changed == "loss" else loss(b), batch, truth, 4
        )


def test_every_peer_is_filed_beside_ours() -> None:
    for name, peer in training.PEERS.items():
        assert peer.case.startswith("train-"), name
        if peer.own is not None:
            family, size = peer.own.split("-")
            assert peer.case == f"train-{size}-{family}", name
            assert (training.MODELS / f"{peer.own}.json").is_file(), name
