"""Train small models on synthetic tasks and judge published claims by what comes out.

    python -m eval.science --suite quick --output runs/science

A suite is configs/eval/science-<name>.yaml or any such file. Finished runs in the output folder are
not repeated; a report of whatever is there is written at the end, also after an interruption, and
by `--report-only` at once. Exit code 1 where a control did not come out as it must, or where no run
has finished.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from eval.documents import sha256
from eval.model import describe_environment
from eval.science import controls
from eval.science.plan import Plan
from eval.science.pool import Pool, default_workers
from eval.science.report import summary, write_report
from eval.science.results import collect
from eval.science.suite import ScienceSuite, load_science_suite
from eval.science.worker import check_job

ROOT = Path(__file__).parents[2]
SUITES = ROOT / "configs" / "eval"


def suite_file(name: str) -> Path:
    """The file of a suite given by its name or path."""
    named = SUITES / f"science-{name}.yaml"
    return named if named.is_file() else Path(name)


def check(plan: Plan) -> None:
    """Build every recipe and model config once, so that a mistake costs no run.

    Raises:
        ValueError: one of them is not valid; the message names experiment and model.
    """
    controls.register()
    for group in plan.groups.values():
        try:
            check_job(plan.job(group, (group.learning_rates[0], group.seeds[0])))
        except Exception as error:
            raise ValueError(f"{group.experiment}, model {group.model}: {error}") from error


def run(
    suite: ScienceSuite,
    file: Path,
    output: Path,
    *,
    workers: int | None = None,
    minutes: float | None = None,
    only: list[str] | None = None,
    report_only: bool = False,
) -> dict:
    """Do what is left of a suite, write the report, and return the results."""
    begin = time.monotonic()
    plan = Plan(suite, output, only)
    workers = workers or suite.workers or default_workers()
    if not report_only:
        check(plan)
        pool = Pool(
            plan,
            workers=workers,
            timeout_s=suite.timeout_s,
            minutes=minutes if minutes is not None else suite.minutes,
            say=lambda line: print(line, flush=True),
        )
        try:
            pool.work()
        except KeyboardInterrupt:
            print("interrupted; the report is of what is done", flush=True)
    seconds = [sum(r["seconds"].values()) for g in plan.groups.values() for r in g.results.values()]
    where = file.resolve()
    header = {
        "title": suite.title,
        # Where a report is read, nobody has this machine's folders.
        "suite": str(where.relative_to(ROOT)) if where.is_relative_to(ROOT) else file.name,
        "suite_sha256": sha256(file),
        "budget": suite.budget,
        "workers": workers,
        "minutes": (time.monotonic() - begin) / 60,
        "run_minutes": sum(seconds) / 60,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **describe_environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    results = collect(plan, header)
    files = write_report(results, output)
    print(summary(results))
    print("written: " + ", ".join(str(path) for path in files))
    return results


def _interrupt(signal_number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def succeeded(results: dict) -> bool:
    """Whether there is something to report and no control has failed."""
    failed = [row for row in results["controls"] if row["verdict"] == "not confirmed"]
    return results["header"]["runs"]["finished"] > 0 and not failed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    # Whoever ends this process gets a report of what is done, and leaves no run behind.
    signal.signal(signal.SIGTERM, _interrupt)
    # The number of GPUs is then asked without touching one, which processes forked later need.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    parser = argparse.ArgumentParser(
        prog="python -m eval.science",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--suite", default="quick", help="a name (quick, full, tiny) or a file")
    parser.add_argument("--output", help="default: runs/science/<suite>")
    parser.add_argument("--workers", type=int, help="runs at once")
    parser.add_argument("--minutes", type=float, help="stop after so many; overrides the suite's")
    parser.add_argument("--only", help="names of experiments, with commas between")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    for name in ("workers", "minutes"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be above 0, got {value}")
    file = suite_file(options.suite)
    suite = load_science_suite(file)
    output = Path(options.output or Path("runs/science") / file.stem.removeprefix("science-"))
    results = run(
        suite,
        file,
        output,
        workers=options.workers,
        minutes=options.minutes,
        only=options.only.split(",") if options.only else None,
        report_only=options.report_only,
    )
    return 0 if succeeded(results) else 1


if __name__ == "__main__":
    sys.exit(main())
