"""The loss without logits equals the loss from logits, and so do the gradients."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssm_hf import (
    HybridForCausalLM,
    JambaForCausalLM,
    Mamba2ForCausalLM,
    Mamba3ForCausalLM,
    MambaForCausalLM,
    TaipanForCausalLM,
)
from tests.helpers import randomize_, relative_error, tiny

CLASSES = {
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "mamba3": Mamba3ForCausalLM,
    "jamba": JambaForCausalLM,
    "ssm_hybrid": HybridForCausalLM,
    "taipan": TaipanForCausalLM,
}
# Both losses are formed in fp32, and sum in another order.
TOLERANCE = 2e-6


def build(model_type: str = "mamba2", **overrides: object) -> PreTrainedModel:
    return randomize_(CLASSES[model_type](tiny(model_type, **overrides))).double().train()


def loss_and_gradients(model: PreTrainedModel, **arguments) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(use_cache=False, **arguments)
    assert (out.logits is None) == (arguments.get("return_logits") is False)
    out.loss.backward()
    return out.loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_equal_without_logits(model: PreTrainedModel, **arguments) -> None:
    expected, expected_grads = loss_and_gradients(model, **arguments)
    loss, grads = loss_and_gradients(model, return_logits=False, **arguments)
    assert relative_error(loss, expected) < TOLERANCE
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < TOLERANCE, name


def facts() -> dict[str, dict[str, object]]:
    labels = torch.randint(3, 96, (2, 13))
    labels[0, 5:8] = -100
    numbers = torch.tensor([[0] * 6 + [1] * 7, [0] * 12 + [1]])
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    return {
        "plain": {},
        "ignored labels": {"labels": labels},
        "packed": {"seq_idx": numbers},
        "padded": {"attention_mask": mask},
        "padded and packed": {"attention_mask": mask, "seq_idx": numbers},
        "last positions": {"logits_to_keep": 5},
        "some positions": {"logits_to_keep": torch.tensor([1, 4, 11])},
        "number of targets": {"num_items_in_batch": torch.tensor(37)},
        "number of targets, an int": {"num_items_in_batch": 37},
    }


@pytest.mark.parametrize("name", list(facts()))
def test_same_loss_and_gradients(name: str) -> None:
    ids = torch.randint(3, 96, (2, 13))
    assert_equal_without_logits(build(), **{"input_ids": ids, "labels": ids, **facts()[name]})


@pytest.mark.parametrize("model_type", list(CLASSES))
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(model_type: str, tied: bool) -> None:
    model, ids = build(model_type, tie_word_embeddings=tied), torch.randint(3, 96, (2, 13))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert_equal_without_logits(model, input_ids=ids, labels=ids)


class Adapter(nn.Module):
    """A frozen head with a low-rank addition, as adapters wrap it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, base.out_features, bias=False).double()

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_head_with_an_adapter_trains_the_adapter() -> None:
    model, ids = build(tie_word_embeddings=False), torch.randint(3, 96, (2, 13))
    without = model(ids, labels=ids).loss
    model.set_output_embeddings(Adapter(model.lm_head))
    assert_equal_without_logits(model, input_ids=ids, labels=ids)
    loss, grads = loss_and_gradients(model, input_ids=ids, labels=ids, return_logits=False)
    assert grads["lm_head.up.weight"].norm() > 0
    assert relative_error(loss, without) > 50 * TOLERANCE  # so the adapter was not passed over


def test_hook_on_the_head_and_loss_of_ones_own_are_obeyed() -> None:
    model, ids = build(), torch.randint(3, 96, (2, 13))
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: output / 2)
    assert_equal_without_logits(model, input_ids=ids, labels=ids)
    handle.remove()
    model.loss_function = lambda *, logits, **_: logits.square().mean()
    assert_equal_without_logits(model, input_ids=ids, labels=ids)


def test_nothing_to_return_is_refused() -> None:
    with pytest.raises(ValueError, match="return_logits=False without labels"):
        build()(torch.randint(3, 96, (1, 5)), return_logits=False)
