"""Packed rows equal separate documents: logits, loss and gradients, under every spelling."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssm_hf import (
    HybridForCausalLM,
    JambaForCausalLM,
    Mamba2ForCausalLM,
    Mamba3ForCausalLM,
    MambaForCausalLM,
    TaipanForCausalLM,
)
from ssm_hf.models.backbone import shift_labels
from ssm_hf.sequence import SequenceInfo
from tests.helpers import randomize_, relative_error, tiny

CLASSES = {
    "mamba": MambaForCausalLM,
    "mamba2": Mamba2ForCausalLM,
    "mamba3": Mamba3ForCausalLM,
    "jamba": JambaForCausalLM,
    "ssm_hybrid": HybridForCausalLM,
    "taipan": TaipanForCausalLM,
    "taipan-selected": TaipanForCausalLM,
}
LENGTHS = (5, 1, 9, 2)
TOTAL = sum(LENGTHS)
# transformers' loss function computes in fp32, and sums in another order here and there.
LOSS_TOLERANCE = 2e-6


@pytest.fixture(params=list(CLASSES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return randomize_(CLASSES[request.param](tiny(request.param))).double().train()


def _spellings() -> dict[str, dict[str, object]]:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    longest = max(LENGTHS)
    flash = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets.int(), "max_length_q": longest,
             "max_length_k": torch.tensor(longest)}  # fmt: skip
    return {
        "position_ids": {"position_ids": positions},
        "positions from 7": {"position_ids": positions + 7},
        "seq_idx": {"seq_idx": numbers.int()},
        "cu_seqlens": {"cu_seqlens": offsets.int()},
        "cu_seq_lens_q": {"cu_seq_lens_q": offsets},
        "flash": flash,
        "all": {"position_ids": positions, "seq_idx": numbers, **flash},
    }


def _separate(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of each document on its own, and the mean loss over all their targets."""
    logits, losses, targets = [], 0.0, 0
    for part in ids.split(LENGTHS, dim=1):
        logits.append(model(part).logits)
        if part.shape[1] > 1:
            n = part.shape[1] - 1
            losses = losses + model(part, labels=part).loss * n
            targets += n
    return torch.cat(logits, dim=1), losses / targets


@pytest.mark.parametrize("spelling", list(_spellings()))
def test_packed_equals_separate(model: PreTrainedModel, spelling: str) -> None:
    ids = torch.randint(3, 96, (1, TOTAL))
    expected, expected_loss = _separate(model, ids)
    names, values = zip(*model.named_parameters(), strict=True)
    expected_grads = torch.autograd.grad(expected_loss, values)
    out = model(ids, labels=ids, **_spellings()[spelling])
    grads = torch.autograd.grad(out.loss, values)
    assert relative_error(out.logits, expected) < 1e-10
    assert relative_error(out.loss, expected_loss) < LOSS_TOLERANCE
    for name, grad, right in zip(names, grads, expected_grads, strict=True):
        assert relative_error(grad, right) < LOSS_TOLERANCE, name


def test_unpacked_call_leaks_so_the_test_above_can_fail(model: PreTrainedModel) -> None:
    ids = torch.randint(3, 96, (1, TOTAL))
    expected, _ = _separate(model, ids)
    assert relative_error(model(ids).logits, expected) > 1e-2


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_packed_rows_with_padding_equal_separate(model: PreTrainedModel, side: str) -> None:
    ids = torch.randint(3, 96, (1, TOTAL))
    positions = _spellings()["position_ids"]["position_ids"]
    at = {"left": 0, "right": TOTAL, "middle": 7}[side]

    def insert(row: Tensor, value: int) -> Tensor:
        return torch.cat([row[:, :at], row.new_full((1, 4), value), row[:, at:]], dim=1)

    mask = insert(torch.ones_like(ids), 0)
    for position_of_pads in (0, 1, 50):
        out = model(
            insert(ids, 0),
            attention_mask=mask,
            position_ids=insert(positions, position_of_pads),
            labels=insert(ids, 0),
        )
        expected, expected_loss = _separate(model, ids)
        assert relative_error(out.logits[mask.bool()], expected[0]) < 1e-10
        assert relative_error(out.loss, expected_loss) < LOSS_TOLERANCE
    negative = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
    out = model(insert(ids, 0), seq_idx=insert(negative, -1), labels=insert(ids, 0))
    assert relative_error(out.loss, expected_loss) < LOSS_TOLERANCE


def test_packed_prompt_continues_its_last_document(model: PreTrainedModel) -> None:
    ids, more = torch.randint(3, 96, (1, TOTAL)), torch.randint(3, 96, (1, 6))
    model = model.eval()
    cache = model(ids, **_spellings()["seq_idx"], use_cache=True).past_key_values
    # The first real token of a call continues the cache, whatever its position.
    out = model(more, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), past_key_values=cache)
    last = torch.cat([ids[:, -LENGTHS[-1] :], more[:, :3]], dim=1)
    expected = torch.cat([model(last).logits[:, -3:], model(more[:, 3:]).logits], dim=1)
    assert relative_error(out.logits, expected) < 1e-10


def test_gradient_checkpointing_keeps_packing(model: PreTrainedModel) -> None:
    ids = torch.randint(3, 96, (1, TOTAL))
    packing = _spellings()["position_ids"]
    values = list(model.parameters())
    expected = torch.autograd.grad(model(ids, labels=ids, **packing).loss, values)
    # renamed between the transformers releases we support
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    grads = torch.autograd.grad(model(ids, labels=ids, **packing).loss, values)
    for grad, right in zip(grads, expected, strict=True):
        assert relative_error(grad, right) < LOSS_TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_idx": torch.tensor([[0, 0, 1, 1]]), "position_ids": torch.tensor([[0, 1, 2, 0]])},
         r"position_ids and seq_idx disagree .* row 0, token 2"),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1]]), "cu_seqlens": torch.tensor([0, 3, 4])},
         r"seq_idx and cu_seqlens disagree"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 4]), "cu_seq_lens_k": torch.tensor([0, 3, 4])},
         r"cu_seq_lens_k and cu_seq_lens_q disagree"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, r"cu_seqlens must rise from 0 to .* length 4"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"cu_seqlens must rise"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, r"cu_seqlens must be a 1-D integer"),
        ({"cu_seqlens": torch.tensor([0, 1, 4]), "max_length_q": 2},
         r"max_length_q=2, but cu_seqlens holds a document of 3 tokens"),
        ({"max_length_q": 2}, r"max_length_q=2 says .* no cu_seqlens"),
        ({"seq_idx": torch.tensor([[0, 0, 1]])}, r"seq_idx must be .* shape \(1, 4\)"),
        ({"position_ids": torch.zeros(3, 1, 4)}, r"position_ids must have shape"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask must have shape \(1, 4\)"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask must have shape"),
    ],
)  # fmt: skip
def test_packing_arguments_that_disagree_are_refused(
    arguments: dict[str, Tensor], message: str
) -> None:
    model = Mamba2ForCausalLM(tiny("mamba2"))
    with pytest.raises(ValueError, match=message):
        model(torch.randint(3, 96, (1, 4)), **arguments)


def test_cu_seqlens_of_several_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="expected B=1, got B=2"):
        SequenceInfo.from_inputs(2, 4, cu_seqlens=torch.tensor([0, 2, 4]))


def test_common_case_carries_nothing() -> None:
    info = SequenceInfo.from_inputs(
        2,
        4,
        attention_mask=torch.ones(2, 4),
        position_ids=torch.arange(4)[None],
        seq_idx=torch.full((2, 4), 3),
    )
    assert info.mask is None
    assert info.seq_idx is None


def test_shift_labels_skips_pads_and_document_starts() -> None:
    labels = torch.tensor([[10, 11, 12, 13, 14, 15]])
    mask = torch.tensor([[0, 1, 0, 1, 1, 0]]).bool()
    assert shift_labels(labels, SequenceInfo()).tolist() == [[11, 12, 13, 14, 15, -100]]
    assert shift_labels(labels, SequenceInfo(mask=mask)).tolist() == [
        [-100, 13, -100, 14, -100, -100]
    ]
    doc = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert shift_labels(labels, SequenceInfo(seq_idx=doc)).tolist() == [
        [11, 12, -100, 14, 15, -100]
    ]
    assert shift_labels(labels, SequenceInfo(mask=mask, seq_idx=doc)).tolist() == [
        [-100, -100, -100, 14, -100, -100]
    ]
