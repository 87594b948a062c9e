"""Runs in processes of their own, several at once, each with a limit of time."""

import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from eval.science.plan import Group, Plan
from eval.science.worker import ERROR, Job, run_job

FORK_POISONED = "Cannot re-initialize CUDA in forked subprocess"
GPU_WORKERS = 12  # models this small leave most of a GPU idle


@dataclass
class _Running:
    process: BaseProcess
    group: Group
    key: tuple[float, int]
    job: Job
    since: float
    execution: str | None
    method: str


def default_workers() -> int:
    """Runs at once: on GPUs as many as leave the CPU a core each, without one a single run."""
    if not torch.cuda.device_count():
        return 1
    return max(1, min(GPU_WORKERS * torch.cuda.device_count(), _cores() - 2))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class Pool:
    """Works through a plan.

    Processes are forked from one that has imported everything and has not touched a GPU, so a run
    costs no import. Where a library has touched it all the same, processes begin from nothing.

    Args:
        plan: what to do; it is told what comes out.
        workers: runs at once.
        timeout_s: after which a run is ended and counts as failed.
        minutes: after which all are ended; None for no limit.
        say: called with a line for whoever watches.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        workers: int,
        timeout_s: float,
        minutes: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.workers, self.timeout_s, self.say = plan, workers, timeout_s, say
        self.deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.gpus = torch.cuda.device_count()  # asks the driver's manager, touches no GPU
        # Never more than OMP_NUM_THREADS, which torch's own number follows.
        self.threads = max(1, min(torch.get_num_threads(), _cores() // workers))
        self._method = "forkserver"
        self._running: list[_Running | None] = [None] * workers
        self._again: list[tuple[Group, tuple[float, int], str | None]] = []

    def work(self) -> bool:
        """Until all is done or time is up; True if all is done."""
        try:
            while True:
                if time.monotonic() >= self.deadline:
                    return not any(self.plan.open())
                for slot in range(self.workers):
                    if self._running[slot] is None:
                        self._start(slot)
                if not any(self._running):
                    return True
                self._wait()
        finally:
            for slot, running in enumerate(self._running):
                if running is not None:
                    self._end(slot, running)

    def _start(self, slot: int) -> None:
        execution = None
        if self._again:
            group, key, execution = self._again.pop(0)
        else:
            busy = {(id(r.group), r.key) for r in self._running if r is not None}
            busy |= {(id(group), key) for group, key, _ in self._again}
            open_now = ((g, k) for g, k in self.plan.open() if (id(g), k) not in busy)
            found = next(open_now, None)
            if found is None:
                return
            group, key = found
        job = self.plan.job(group, key)
        folder = self.plan.folder(job)
        (folder / ERROR).unlink(missing_ok=True)
        device = slot % self.gpus if self.gpus > 1 else None
        context: Any = multiprocessing.get_context(self._method)
        if self._method == "forkserver":
            context.set_forkserver_preload([run_job.__module__])
        process = context.Process(
            target=run_job, args=(job, str(folder), self.threads, device, execution)
        )
        process.start()
        self._running[slot] = _Running(
            process, group, key, job, time.monotonic(), execution, self._method
        )

    def _wait(self) -> None:
        """Until something ends or is due to."""
        now = time.monotonic()
        alive = [r for r in self._running if r is not None]
        due = min(self.deadline, min(r.since for r in alive) + self.timeout_s)
        sentinels = [r.process.sentinel for r in alive]
        multiprocessing.connection.wait(sentinels, timeout=max(0.0, due - now))
        for slot, running in enumerate(self._running):
            if running is None:
                continue
            seconds = time.monotonic() - running.since
            if not running.process.is_alive():
                running.process.join()
                self._running[slot] = None
                failure = f"ended with exit code {running.process.exitcode}"
                self._settle(running, failure, seconds)
            elif seconds >= self.timeout_s:
                self._end(slot, running)
                self._settle(
                    running, f"not done after {self.timeout_s:.0f} s", seconds, retry=False
                )

    def _end(self, slot: int, running: _Running) -> None:
        running.process.kill()
        running.process.join()
        self._running[slot] = None

    def _settle(self, running: _Running, failure: str, seconds: float, retry: bool = True) -> None:
        group, key = running.group, running.key
        self.plan.settle(group, key, failure)
        error = group.errors.get(key)
        if error is not None and retry:
            again = self._other_way(running, error)
            if again is not None:
                del group.errors[key]
                self._again.append((group, key, again[0]))
                self.say(f"{running.job.name}: {error.splitlines()[0]:.120}; {again[1]}")
                return
        finished, failed, planned = self.plan.counts()
        if error is None:
            score = group.results[key]["select"][group.metric]
            outcome = f"{group.metric}@{running.job.experiment.select} {score:.3f}"
        else:
            outcome = f"FAILED: {error.splitlines()[0]:.200}"
        self.say(f"[{finished + failed}/{planned}] {running.job.name}: {outcome} ({seconds:.0f} s)")

    def _other_way(self, running: _Running, error: str) -> tuple[str | None, str] | None:
        """(execution, what is said) of a second attempt, if one is worth it."""
        if FORK_POISONED in error and running.method == "forkserver":
            self._method = "spawn"
            return running.execution, "processes begin from nothing now"
        configured = running.job.recipe.get("model", {}).get("execution", "auto")
        if self.gpus and running.execution is None and configured != "eager":
            return "eager", "again without a captured graph"
        return None
