"""Prompts read in captured pieces against one pass."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from ssm_hf.generation import forget_graphs, graphs, prefill
from ssm_hf.generation.graphs import graphs_of
from tests.models.captured.helpers import (
    DEVICE,
    build,
    capture_on_cpu,
    generate,
    random_ids,
    with_hybrids,
)


def _latest(model: PreTrainedModel) -> graphs.Capture:
    return next(reversed(graphs_of(model).captures.values()))


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
    rows = [random_ids(1, n)[0] for n in lengths]
    ids, mask = (torch.zeros(3, width, dtype=torch.long, device=DEVICE) for _ in range(2))
    for i, row in enumerate(rows):
        pads = {"left": width - len(row), "both": (width - len(row)) // 2}.get(side, 0)
        ids[i, pads : pads + len(row)], mask[i, pads : pads + len(row)] = row, 1
    for _ in range(3):
        got = generate(model, ids, attention_mask=mask, max_new_tokens=5,
                        return_dict_in_generate=True)  # fmt: skip
    right = generate(model, ids, attention_mask=mask, max_new_tokens=5, disable_compile=True,
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
        capture_on_cpu(monkeypatch)
    for length in (600, 512, 7):
        ids = random_ids(1, length)
        expected = generate(model, ids, max_new_tokens=5, disable_compile=True)
        assert torch.equal(generate(model, ids, max_new_tokens=5), expected)
    # Of a hybrid there is a capture for each number of slots.
    held = [capture.graphs for capture in graphs_of(model).captures.values()]
    assert any(captured.get(("prompt", 512, True)) is not None for captured in held)


@torch.no_grad()
def test_positions_of_the_caller_are_obeyed() -> None:
    model, ids, mask = build("ssm_hybrid"), random_ids(2, 9), torch.ones(2, 9, device=DEVICE)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 3, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    counted = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    for positions, pieces in ((counted + 7, True), (3 * counted, False)):
        forget_graphs(model)
        got, right = (
            generate(model, ids, position_ids=positions, disable_compile=uncaptured, **options)
            for uncaptured in (False, True)
        )
        # fp32 rounding in another order; positions that are not obeyed make 0.1
        torch.testing.assert_close(got.logits[0], right.logits[0], atol=1e-4, rtol=0)
        assert any(key[0] == "prompt" for key in _latest(model).graphs) is pieces


def test_how_prompts_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for batch, length, pieces in (
        (1, 1, [64]),
        (1, 65, [512]),
        (1, 512, [512]),
        (2, 1030, [64, 512, 512]),
        (32, 513, [64, 512]),
        (64, 100, [64, 64]),
        (64, 512, [512]),
        (128, 512, [256, 256]),
        (256, 64, [64]),
    ):
        assert prefill.cut(batch, length, 768) == pieces
    assert prefill.cut(64, 128, 2560) == [128]
    for batch, length in ((1, 2049), (513, 64), (64, 2100)):
        assert prefill.cut(batch, length, 768) is None


@torch.no_grad()
def test_a_pass_that_cannot_be_captured_runs_as_it_is(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Callable[[], None], pool: object) -> None:
        raise graphs.CaptureError("a test's refusal")

    ids = random_ids(2, 13)
    expected = generate(model, ids, max_new_tokens=5, disable_compile=True)
    assert not graphs_of(model).captures
    monkeypatch.setattr(graphs, "capture", refuse)
    monkeypatch.setattr(graphs, "_told", set())
    for _ in range(3):
        assert torch.equal(generate(model, ids, max_new_tokens=5), expected)
    assert sum("a test's refusal" in line for line in caplog.messages) == 1
