"""The sections of a suite: what each needs, runs, and leaves in the results.

Another kind of evaluation is a module with a dataclass of options, a check and a runner (and, for
the report, a function that makes blocks of the results, see eval/report.py), and then one field of
`Suite` and one line of `SECTIONS`.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from eval.blocks import Results
from eval.consistency import run_consistency
from eval.documents import read_documents, sha256
from eval.efficiency import run_efficiency
from eval.generate import generate_samples
from eval.harness import run_lm_eval
from eval.lengths import run_length
from eval.model import LoadedModel, require_eos
from eval.ngram import SEPARATOR, ByteNgram, bits_per_byte, read_seen_tokens
from eval.options import (
    ConsistencyOptions,
    EfficiencyOptions,
    GenerateOptions,
    LengthOptions,
    LmEvalOptions,
    NgramOptions,
    PerplexityOptions,
    TextTasksOptions,
)
from eval.perplexity import file_perplexity
from eval.published import check_published, find_published
from eval.ruler.options import RulerOptions
from eval.ruler.runner import check_ruler, run_ruler
from eval.samples import SampleStore
from eval.suite import Suite
from eval.tasks.zero_shot import check_tasks
from eval.text_tasks import check_text_tasks, run_text_tasks


class Job(NamedTuple):
    """What a runner may use besides the model and its options.

    Args:
        suite: the whole of it: seed, dtype, ...
        results: of the header and of the sections that ran before; a runner may append to
            `results["checks"]`.
        samples: folder for `eval.samples.SampleStore`.
    """

    suite: Suite
    results: Results
    samples: Path


class Section(NamedTuple):
    """One kind of evaluation.

    Args:
        check: (options, suite, tokenizer) -> None; raises for whatever can be seen to be wrong
            before the model is loaded: missing files, unknown tasks, impossible lengths.
        run: (loaded, options, job) -> JSON values, which become the results of the section.
    """

    check: Callable[[Any, Suite, PreTrainedTokenizerFast], None]
    run: Callable[[LoadedModel, Any, Job], dict[str, Any]]


def check_perplexity(
    options: PerplexityOptions, suite: Suite, tokenizer: PreTrainedTokenizerFast
) -> None:
    for file in options.files:
        read_documents(file, options.max_bytes)


def check_ngram(options: NgramOptions, suite: Suite, tokenizer: PreTrainedTokenizerFast) -> None:
    read_seen_tokens(options.seen_tokens)


def check_files(
    options: LengthOptions | ConsistencyOptions, suite: Suite, tokenizer: PreTrainedTokenizerFast
) -> None:
    for file in options.files:
        read_documents(file)


def check_efficiency(
    options: EfficiencyOptions, suite: Suite, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Any model with a cache can be measured."""


def check_zero_shot(
    options: LmEvalOptions, suite: Suite, tokenizer: PreTrainedTokenizerFast
) -> None:
    check_tasks(options.tasks)
    check_published(options.published)
    require_eos(tokenizer, "lm_eval")


def check_generate(
    options: GenerateOptions, suite: Suite, tokenizer: PreTrainedTokenizerFast
) -> None:
    require_eos(tokenizer, "generate")


def run_perplexity(loaded: LoadedModel, options: PerplexityOptions, job: Job) -> dict[str, Any]:
    how = {name: getattr(options, name) for name in ("window", "stateful", "batch_size")}
    files = [
        file_perplexity(
            loaded, file, read_documents(file, options.max_bytes), samples=job.samples, **how
        )
        for file in options.files
    ]
    return {**how, "max_bytes": options.max_bytes, "files": files}


def run_ngram(loaded: LoadedModel, options: NgramOptions, job: Job) -> dict[str, Any]:
    probe = "".join(map(chr, range(0x800)))  # all characters of one and two bytes
    if loaded.encode(probe)[len(loaded.prefix) :] != list(probe.encode("utf-8")):
        raise ValueError(
            "section ngram needs a model whose token ids 0..255 are the bytes of the text, but its "
            f"tokenizer gives 'abc' the ids {loaded.encode('abc')}, expected {list(b'abc')} after "
            "the prefix"
        )
    tokens = read_seen_tokens(options.seen_tokens)
    ngram = ByteNgram(tokens, max(options.orders))
    files = []
    for score in job.results["perplexity"]["files"]:
        documents = read_documents(score["file"], job.results["perplexity"]["max_bytes"])
        texts = [document.text for document in documents]
        bits = bits_per_byte(ngram, texts, options.orders, skip_first=not loaded.prefix)
        # JSON has text keys only.
        files.append({"file": score["file"], "bits_per_byte": {str(k): v for k, v in bits.items()}})
        required = options.require_better_than_order
        if required is not None:
            job.results["checks"].append(
                {
                    "name": f"{score['file']}: fewer bits per byte than order {required}",
                    "passed": score["bits_per_byte"] < bits[required],
                    "detail": f"{score['bits_per_byte']:.4f} against {bits[required]:.4f}",
                }
            )
    return {
        "seen_tokens": options.seen_tokens,
        "sha256": sha256(options.seen_tokens),
        "tokens": len(tokens),
        "bytes": int((tokens < SEPARATOR).sum()),
        "files": files,
    }


def run_length_section(loaded: LoadedModel, options: LengthOptions, job: Job) -> dict[str, Any]:
    settings = {
        **asdict(options),
        "files": [sha256(file) for file in options.files],
        "max_seconds": None,  # changes what is possible, and no value
    }
    store = SampleStore(
        job.samples, model=loaded.identity, section="length", task="perplexity", settings=settings
    )
    return run_length(loaded, options, store)


def run_consistency_section(
    loaded: LoadedModel, options: ConsistencyOptions, job: Job
) -> dict[str, Any]:
    return run_consistency(loaded, options)


def run_efficiency_section(
    loaded: LoadedModel, options: EfficiencyOptions, job: Job
) -> dict[str, Any]:
    header = job.results["header"]
    settings = {
        **asdict(options),
        "lengths": None,  # each is a sample
        "max_seconds": None,  # changes what is possible, and no value
        "seed": job.suite.seed,
        # A time of another machine, or of another version, is another time.
        "device": header["device"],
        "processes": header["processes"],
        "versions": header["versions"],
        "commit": header["commit"],
    }
    store = SampleStore(
        job.samples, model=loaded.identity, section="efficiency", task="speed", settings=settings
    )
    return run_efficiency(loaded, options, job.suite.seed, store)


def run_zero_shot(loaded: LoadedModel, options: LmEvalOptions, job: Job) -> dict[str, Any]:
    if options.published is None:
        name = job.results["header"]["model"]["name"]
        options = replace(options, published=find_published(name))
    section = run_lm_eval(loaded, options, job.suite.seed, job.samples)
    for task in section["tasks"].values():
        task["sha256"] = sha256(task["file"]) if task["file"] else None
    return section


def run_generate(loaded: LoadedModel, options: GenerateOptions, job: Job) -> dict[str, Any]:
    samples = generate_samples(loaded, options, job.suite.seed)
    return {**asdict(options), "seed": job.suite.seed, "samples": samples}


def check_ruler_section(
    options: RulerOptions, suite: Suite, tokenizer: PreTrainedTokenizerFast
) -> None:
    check_ruler(options, suite.prefix, tokenizer)


def run_ruler_section(loaded: LoadedModel, options: RulerOptions, job: Job) -> dict[str, Any]:
    return run_ruler(loaded, options, job.samples)


def check_text_section(
    options: TextTasksOptions, suite: Suite, tokenizer: PreTrainedTokenizerFast
) -> None:
    check_text_tasks(options, tokenizer)


def run_text_section(loaded: LoadedModel, options: TextTasksOptions, job: Job) -> dict[str, Any]:
    return run_text_tasks(loaded, options, job.samples)


# In order of execution: a section may use the results of those before it. The names are those of
# the fields of `Suite`.
SECTIONS = {
    "perplexity": Section(check_perplexity, run_perplexity),
    "ngram": Section(check_ngram, run_ngram),
    "length": Section(check_files, run_length_section),
    "lm_eval": Section(check_zero_shot, run_zero_shot),
    "text_tasks": Section(check_text_section, run_text_section),
    "ruler": Section(check_ruler_section, run_ruler_section),
    "consistency": Section(check_files, run_consistency_section),
    "efficiency": Section(check_efficiency, run_efficiency_section),
    "generate": Section(check_generate, run_generate),
}
