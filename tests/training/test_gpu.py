"""Whole runs on a GPU: a captured pass trains as an eager one does."""

import shutil

import pytest
import torch

from tests.training.test_train import events, run, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--micro_batch_size", "1"],
        ["--micro_batch_size", "2", "--model.gradient_checkpointing", "true"],
    ],
    ids=["whole", "accumulated", "checkpointed"],
)
def test_captured_run_equals_an_eager_one(recipe, arguments) -> None:
    arguments = [*arguments, "--save_every", "0", "--eval_every", "2", "--precision", "bf16"]
    run_dir = run(recipe, *arguments, "--model.execution", "eager")
    expected, expected_events = weights(run_dir), events(run_dir, "train")
    shutil.rmtree(run_dir)
    run(recipe, *arguments)
    # The same kernels; passes of one step add up in another order.
    for one, two in zip(events(run_dir, "train"), expected_events, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)
    trained = weights(run_dir)
    assert trained.keys() == expected.keys()
    moved = max(float(v.abs().max()) for v in expected.values())
    for name, value in trained.items():
        assert float((value - expected[name]).abs().max()) < 2e-2 * moved, name


def test_steps_that_are_not_finite_are_dropped_on_the_device(recipe, tmp_path) -> None:
    arguments = ["--optimizer.lr", "1e30", "--max_skipped_steps", "2"]
    with pytest.raises(RuntimeError, match="step 3: 2 steps in a row had a loss or gradient"):
        run(recipe, *arguments, "--schedule.warmup_steps", "0")
    assert [event["step"] for event in events(tmp_path / "run", "train")] == [1]
    assert [event["step"] for event in events(tmp_path / "run", "skip")] == [2, 3]
