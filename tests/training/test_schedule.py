import pytest
from torch import nn, optim
from transformers import get_scheduler

from training.config import ScheduleConfig
from training.schedule import lr_factor, run_progress


def factors(schedule: ScheduleConfig, steps: int) -> list[float]:
    return [lr_factor(schedule, step, steps, step / steps) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_schedule_warms_up_and_ends_at_the_minimum(name):
    schedule = ScheduleConfig(name=name, warmup_steps=10, decay_fraction=0.25, min_lr_ratio=0.1)
    values = factors(schedule, 1000)
    assert values[0] == pytest.approx(0.1, abs=1e-3)
    assert max(values) == pytest.approx(1.0, abs=1e-3)
    assert values.index(max(values)) == 9
    assert values[10:] == sorted(values[10:], reverse=True)
    assert lr_factor(schedule, 1000, 1000, 1.0) == pytest.approx(0.1)


def test_cosine_is_transformers_cosine_after_warmup():
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    theirs = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=10,
        num_training_steps=100,
        scheduler_specific_kwargs={"min_lr_rate": 0.2},
    ).lr_lambdas[0]
    schedule = ScheduleConfig(name="cosine", warmup_steps=10, min_lr_ratio=0.2)
    assert factors(schedule, 100)[10:] == pytest.approx([theirs(step) for step in range(10, 100)])


def test_wsd_is_transformers_wsd_after_warmup():
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    theirs = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=10,
        num_training_steps=100,
        scheduler_specific_kwargs={
            "num_decay_steps": 25,
            "decay_type": "linear",
            "min_lr_ratio": 0.1,
        },
    ).lr_lambdas[0]
    schedule = ScheduleConfig(name="wsd", warmup_steps=10, decay_fraction=0.25, min_lr_ratio=0.1)
    assert factors(schedule, 100)[10:] == pytest.approx([theirs(step) for step in range(10, 100)])


def test_the_nearer_limit_decides_progress():
    assert run_progress(50, 100, elapsed_minutes=1.0, max_minutes=None) == 0.5
    assert run_progress(50, 100, elapsed_minutes=3.0, max_minutes=4.0) == 0.75
    assert run_progress(50, 100, elapsed_minutes=1.0, max_minutes=4.0) == 0.5
    assert run_progress(50, 100, elapsed_minutes=9.0, max_minutes=4.0) == 1.0
