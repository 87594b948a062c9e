"""Evaluate one model on one suite: `python -m eval.run --model DIR --suite FILE [--output DIR]`.

Any value of the suite can be overridden with `--section.key VALUE` (see eval/suite.py).
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ssm_hf
from eval.blocks import THIS, Results, Run
from eval.model import (
    describe_environment,
    describe_model,
    describe_training,
    length_limit,
    load_model,
    load_tokenizer,
)
from eval.parallel import processes
from eval.report import FORMAT, summary, write_report
from eval.sections import SECTIONS, Job
from eval.suite import Suite, load_suite


def check_inputs(model: str, suite: Suite) -> None:
    """Raise for whatever is wrong with the tokenizer, the files or the options of a suite.

    A wrong path then costs no minutes of scoring.
    """
    tokenizer, _ = load_tokenizer(model, suite.prefix)
    for name, section in SECTIONS.items():
        options = getattr(suite, name)
        if options is not None:
            section.check(options, suite, tokenizer)


def evaluate(model: str, suite: Suite, *, suite_file: str, command: str, samples: Path) -> Results:
    """Load a model, run every section of the suite, and return the results as JSON values.

    Args:
        model: directory or Hub name.
        suite: what to run.
        suite_file, command: where it was read and how it was started, for the record.
        samples: folder where finished samples are kept and taken from.
    """
    begin = time.perf_counter()
    check_inputs(model, suite)
    loaded = load_model(model, dtype=suite.dtype, device=suite.device, prefix=suite.prefix)
    training = describe_training(model)
    limit = length_limit(loaded.model.config) if training is None else training["seq_len"]
    header: dict[str, Any] = {
        "model": describe_model(model, loaded),
        "training": training,
        "training_length": limit if suite.training_length is None else suite.training_length,
        "suite_file": suite_file,
        "command": command,
        "processes": processes().num_processes,
        "suite": suite.as_dict(),
        "seed": suite.seed,
        **describe_environment(loaded.model.device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": {"load": time.perf_counter() - begin},
    }
    results: Results = {"format": FORMAT, "header": header, "checks": []}
    job = Job(suite, results, samples)
    for name, section in SECTIONS.items():
        options = getattr(suite, name)
        if options is not None:
            start = time.perf_counter()
            results[name] = section.run(loaded, options, job)
            header["seconds"][name] = time.perf_counter() - start
    header["seconds"]["total"] = time.perf_counter() - begin
    return results


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Split ["--a", "1", "--b=2"] into [("a", "1"), ("b", "2")].

    Raises:
        ValueError: a value without a key, or a key without a value.
    """
    overrides = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.removeprefix("--").partition("=")
        following = value if equals else next(rest, None)
        if not argument.startswith("--") or following is None:
            raise ValueError(f"expected --section.key VALUE, got {argument!r}")
        overrides.append((key, following))
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns 1 when a check of the suite failed."""
    ssm_hf.register(override=True)
    parser = argparse.ArgumentParser(prog="python -m eval.run", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="model directory or Hugging Face Hub name")
    parser.add_argument("--suite", required=True, help="YAML file, see configs/eval")
    parser.add_argument("--output", help="default: runs/eval/<model folders>-<suite>")
    parser.add_argument("--samples", help="folder of finished samples, default: OUTPUT/samples")
    options, rest = parser.parse_known_args(arguments)
    try:
        overrides = parse_overrides(rest)
    except ValueError as error:
        parser.error(str(error))
    suite = load_suite(options.suite, overrides)
    # Two parts, because most runs call their last one "final".
    name = "-".join([*Path(options.model).absolute().parts[-2:], Path(options.suite).stem])
    output = Path(options.output or Path("runs/eval") / name)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "eval.run", *given])
    results = evaluate(
        options.model,
        suite,
        suite_file=options.suite,
        command=command,
        samples=Path(options.samples or output / "samples"),
    )
    if processes().is_main_process:
        print(summary([Run(THIS, results)], write_report(results, output)))
    return 0 if all(check["passed"] for check in results["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
