"""Learning-rate schedules: pure functions of where the run stands.

transformers' `get_scheduler` counts whole steps. Ours take progress as a share of the run as well,
because a run bounded by wall time does not know its number of steps, and they hold no state, so
nothing has to be saved or restored. After the warm-up they are its "cosine_with_min_lr" and
"warmup_stable_decay" with linear decay.
"""

import math

from training.config import ScheduleConfig


def run_progress(
    step: int, max_steps: int, elapsed_minutes: float, max_minutes: float | None
) -> float:
    """Share of the run that is done, in [0, 1]: the nearer of its two limits decides."""
    by_time = 0.0 if max_minutes is None else elapsed_minutes / max_minutes
    return min(1.0, max(step / max_steps, by_time))


def lr_factor(schedule: ScheduleConfig, step: int, max_steps: int, progress: float) -> float:
    """The learning rate of optimiser step `step` as a share of the peak.

    Args:
        schedule: name, warm-up and end of the schedule.
        step: steps done before this one; the first step of a warm-up has 1/warmup_steps.
        max_steps: steps of the whole run.
        progress: share of the run done before this step (`run_progress`).
    """
    warmup = min(1.0, (step + 1) / max(1, schedule.warmup_steps))
    if schedule.name == "cosine":
        # The cosine begins where the warm-up ends.
        start = schedule.warmup_steps / max_steps
        decay = cosine(max(0.0, (progress - start) / (1.0 - start)))
    else:
        decay = wsd(progress, schedule.decay_fraction)
    # A product, so that a run cut short by wall time decays even inside its warm-up.
    return warmup * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * decay)


def cosine(progress: float) -> float:
    """Half a cosine from 1 at the start to 0 at the end (Loshchilov & Hutter 2017, eq. 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(progress: float, decay_fraction: float) -> float:
    """1 until the last `decay_fraction` of the run, then a straight line to 0 (Hu et al. 2024)."""
    return min(1.0, (1.0 - progress) / decay_fraction)
