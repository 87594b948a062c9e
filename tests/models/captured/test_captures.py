"""What is captured, how often, and for how long it is valid."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from ssm_hf.generation import forget_graphs
from ssm_hf.generation.graphs import graphs_of
from tests.models.captured.helpers import (
    DEVICE,
    build,
    captures,
    generate,
    gpu,
    random_ids,
    theirs,
    uncaptured,
)


@torch.no_grad()
def test_blocks_without_a_state_and_shared_blocks_are_captured() -> None:
    attention = {"type": "attention", "shared": "a"}
    blocks = ["mlp", "mamba2", attention, "moe", "mamba2", attention, "mlp"]
    model, ids = build("ssm_hybrid", blocks=blocks), random_ids(2, 9)
    for _ in range(3):
        out = generate(model, ids, max_new_tokens=12)
    assert torch.equal(out, generate(model, ids, max_new_tokens=12, use_cache=False))
    assert captures(model) == 3  # two pieces of the prompt, and the step
    assert torch.equal(out, theirs(model, ids, max_new_tokens=12))


@torch.no_grad()
def test_weights_may_change_between_calls(model: PreTrainedModel) -> None:
    ids = random_ids(2, 6)

    def check() -> None:
        got = generate(model, ids, max_new_tokens=12)
        with uncaptured(model):
            assert torch.equal(got, generate(model, ids, max_new_tokens=12, use_cache=False))

    check()
    check()
    for p in model.parameters():  # in place, as an optimiser does
        p.add_(0.05 * torch.randn_like(p))
    check()
    *_, last = (m for n, m in model.named_modules() if n.endswith(("out_proj", "o_proj")))
    last.weight = torch.nn.Parameter(torch.randn_like(last.weight))
    check()
    model.to("cpu").to(DEVICE)
    check()
    model.load_state_dict(model.state_dict(), assign=True)
    check()


@torch.no_grad()
def test_copies_and_files_of_a_model_carry_no_graphs(model: PreTrainedModel, tmp_path) -> None:
    ids = random_ids(2, 6)
    expected = generate(model, ids, max_new_tokens=9)
    other = copy.deepcopy(model)
    assert torch.equal(generate(other, ids, max_new_tokens=9), expected)
    file = io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    other = pickle.load(file)
    assert torch.equal(generate(other, ids, max_new_tokens=9), expected)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).to(DEVICE)
    assert torch.equal(generate(other, ids, max_new_tokens=9), expected)


def test_threads_share_a_model(model: PreTrainedModel) -> None:
    prompts = [random_ids(2, 6) for _ in range(4)]
    expected = [generate(model, ids, max_new_tokens=15, use_cache=False) for ids in prompts]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            got[i] = generate(model, prompts[i], max_new_tokens=15)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], right) for i, right in enumerate(expected))


def test_steps_are_captured_once_and_bounded(model: PreTrainedModel) -> None:
    for _ in range(3):
        generate(model, random_ids(2, 4), max_new_tokens=9)
    assert captures(model) == 2  # prompt and step
    theirs(model, random_ids(2, 4), max_new_tokens=9)
    assert captures(model) == 3
    for batch in range(1, 9):
        generate(model, random_ids(batch, 4), max_new_tokens=4)
    assert len(graphs_of(model).captures) == 4
    forget_graphs(model)
    assert captures(model) == 0


@pytest.mark.parametrize("marks", [pytest.param(None, marks=gpu)])
def test_captures_are_freed_with_the_model(marks: None) -> None:
    def allocated_after_a_model() -> int:
        model = build("mamba2")
        generate(model, random_ids(4, 6), max_new_tokens=9)
        del model
        gc.collect()
        return torch.cuda.memory_allocated()

    # The first leaves the workspaces of cuBLAS behind, one a stream, which are no model's.
    assert allocated_after_a_model() == allocated_after_a_model()


@pytest.mark.parametrize("marks", [pytest.param(None, marks=gpu)])
def test_what_cannot_be_captured_is_told_once(
    model: PreTrainedModel, marks: None, caplog: pytest.LogCaptureFixture
) -> None:
    ids = random_ids(2, 6)
    expected = generate(model, ids, max_new_tokens=5)
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):
            generate(model, ids, max_new_tokens=5)
    assert sum("autocast is on" in line for line in caplog.messages) <= 1
    with uncaptured(model):
        assert torch.equal(generate(model, ids, max_new_tokens=5), expected)
