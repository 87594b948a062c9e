"""The options of a suite's sections: one dataclass each, whose fields are the keys of the YAML.

A section of another module keeps its dataclass there. Options check themselves when they are made,
so that a wrong value ends the program before any model is loaded.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def require_positive(section: str, **values: float | None) -> None:
    """Raise ValueError unless every value is None or above 0; the message names section and key."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{section}.{name} must be above 0, got {value}")


@dataclass(frozen=True)
class PerplexityOptions:
    """Likelihood of held-out files.

    Args:
        files: text files (one document each) or `.jsonl` files (rows with "text"), plain, `.gz`
            or `.xz`.
        max_bytes: read only this many UTF-8 bytes of each file, from its start; None reads all.
        window: tokens per forward pass, and with `stateful: false` the length after which the
            model forgets.
        stateful: carry the model's cache from window to window through each document. False
            starts every window afresh, as lm-evaluation-harness' rolling perplexity does.
        batch_size: documents (stateful) or windows per forward pass.
    """

    files: list[str]
    max_bytes: int | None = None
    window: int = 1024
    stateful: bool = True
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("perplexity.files is empty, expected at least one path")
        require_positive(
            "perplexity", max_bytes=self.max_bytes, window=self.window, batch_size=self.batch_size
        )


@dataclass(frozen=True)
class NgramOptions:
    """Byte n-gram baselines on the documents of `perplexity`, in the same bits per byte.

    Args:
        seen_tokens: `.bin` file of the token ids that the model was trained on; the `.json` beside
            it says {"dtype": "uint16" or "uint32", "count": N}.
        orders: numbers of context bytes.
        require_better_than_order: the run fails unless the model needs fewer bits per byte than
            this order on every file.
    """

    seen_tokens: str
    orders: list[int] = field(default_factory=lambda: [2, 5])
    require_better_than_order: int | None = None

    def __post_init__(self) -> None:
        if not self.orders or not all(0 <= order <= 7 for order in self.orders):
            raise ValueError(f"ngram.orders must be numbers from 0 to 7, got {self.orders}")
        required = self.require_better_than_order
        if required is not None and required not in self.orders:
            raise ValueError(
                f"ngram.require_better_than_order is {required}, expected one of ngram.orders "
                f"{self.orders}"
            )


@dataclass(frozen=True)
class LengthOptions:
    """Perplexity against length.

    Args:
        files: long texts, see `PerplexityOptions.files`; every document counts on its own.
        documents: only the first so many that are long enough; None takes all of them. Long enough
            is as long as the longest window and the block that any document reaches.
        windows: context lengths W of definition A, in tokens.
        last: tokens scored at the end of each window.
        places: windows per document and W, at the same ends for every W.
        block: tokens of the one long block of definition B; 0 leaves B out.
        bucket: positions per range of B.
        chunk: tokens per forward pass; the cache carries the state from one to the next.
        max_seconds: for one window or block; a length that takes longer is reported as such, and
            longer ones are not tried.
    """

    files: list[str]
    documents: int | None = None
    windows: list[int] = field(
        default_factory=lambda: [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    )
    last: int = 100
    places: int = 10
    block: int = 65536
    bucket: int = 2048
    chunk: int = 2048
    max_seconds: float = 120.0

    def __post_init__(self) -> None:
        if not self.files or not (self.windows or self.block):
            raise ValueError("length needs at least one of files, and windows or a block")
        require_positive(
            "length",
            documents=self.documents,
            last=self.last,
            places=self.places,
            bucket=self.bucket,
            chunk=self.chunk,
            max_seconds=self.max_seconds,
        )
        for window in self.windows:
            if window <= self.last:
                raise ValueError(
                    f"length.windows: {window} is not above length.last ({self.last}), of which "
                    "it would score more tokens than it has context"
                )
        if self.block and self.block < 2 * self.bucket:
            raise ValueError(
                f"length.block must be 0 or at least two buckets ({2 * self.bucket}), got "
                f"{self.block}"
            )


@dataclass(frozen=True)
class LmEvalOptions:
    """Zero-shot tasks of lm-evaluation-harness.

    Args:
        tasks: task name -> local JSONL file (plain, `.gz` or `.xz`) in the columns of the task's
            own dataset, or null for that dataset from the Hugging Face Hub.
        limit: questions per task, from the start; None takes all.
        batch_size: requests per forward pass, halved when memory runs out; None begins with 256
            on a GPU and 16 on a CPU.
        max_length: longest input in tokens, longer ones lose their beginning; None takes the
            limit in the model's config, and no limit where it states none.
        bos: "tokenizer": inputs begin as the tokenizer begins them (GPT-NeoX: with no bos token,
            as in the papers' numbers); "always" or "never": with or without bos (or eos).
        published: row of eval/published.json to compare with; None finds the row of a Hub name.
        bootstrap_iters: resamples behind the standard error of perplexities; 0 reports no
            standard errors at all.
    """

    tasks: dict[str, str | None]
    limit: int | None = None
    batch_size: int | None = None
    max_length: int | None = None
    bos: Literal["tokenizer", "always", "never"] = "tokenizer"
    published: str | None = None
    bootstrap_iters: int = 1000

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("lm_eval.tasks is empty, expected at least one task")
        require_positive(
            "lm_eval", limit=self.limit, batch_size=self.batch_size, max_length=self.max_length
        )
        if self.bootstrap_iters < 0:
            raise ValueError(f"lm_eval.bootstrap_iters must be >= 0, got {self.bootstrap_iters}")


@dataclass(frozen=True)
class ConsistencyOptions:
    """Whether a model answers alike in batches, in pieces and token by token.

    Args:
        files: texts, see `PerplexityOptions.files`.
        samples: sequences cut from them.
        tokens: length of the longest; the shortest has half as many.
        piece: tokens of a forward pass where sequences are read in pieces.
        batch_size: sequences of a batch.
        new_tokens: of the greedy continuations.
    """

    files: list[str]
    samples: int = 32
    tokens: int = 128
    piece: int = 33
    batch_size: int = 8
    new_tokens: int = 16

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("consistency.files is empty, expected at least one path")
        require_positive(
            "consistency",
            samples=self.samples,
            piece=self.piece,
            batch_size=self.batch_size,
            new_tokens=self.new_tokens,
        )
        if self.tokens < 4:
            raise ValueError(f"consistency.tokens must be at least 4, got {self.tokens}")


@dataclass(frozen=True)
class EfficiencyOptions:
    """Speed and memory at every length.

    Args:
        lengths: tokens of the prompt, and in the cache while decoding.
        batch_sizes: sequences that decode together.
        new_tokens: decoded in a timed run.
        warmup: runs before the timed ones.
        repeats: timed runs, of which the median is reported.
        chunk: prompts are read in pieces of so many tokens; null reads them whole.
        max_seconds: for one measurement; what takes longer is reported as such, and not tried at
            greater lengths.
    """

    lengths: list[int] = field(default_factory=lambda: [2048, 8192, 32768, 131072])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 128])
    new_tokens: int = 64
    warmup: int = 2
    repeats: int = 5
    chunk: int | None = None
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.lengths or not self.batch_sizes:
            raise ValueError("efficiency needs at least one of lengths and one of batch_sizes")
        require_positive(
            "efficiency",
            shortest=min(self.lengths),
            smallest=min(self.batch_sizes),
            new_tokens=self.new_tokens,
            warmup=self.warmup,
            repeats=self.repeats,
            chunk=self.chunk,
            max_seconds=self.max_seconds,
        )


@dataclass(frozen=True)
class GenerateOptions:
    """Sample texts.

    Args:
        prompts: one continuation is generated for each.
        max_new_tokens: length of each continuation, unless the model ends it earlier.
        do_sample: draw from the model's distribution; False takes the likeliest token.
        temperature, top_k, top_p: used when sampling; top_k 0 and top_p 1 keep every token.
    """

    prompts: list[str]
    max_new_tokens: int = 128
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("generate.prompts is empty, expected at least one prompt")
        require_positive(
            "generate",
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        if self.top_k < 0 or self.top_p > 1:
            raise ValueError(
                f"generate.top_k must be >= 0 and generate.top_p <= 1, got {self.top_k} and "
                f"{self.top_p}"
            )


@dataclass(frozen=True)
class TextTaskOptions:
    """One task of `text_tasks`.

    Args:
        task: "phone_book" or "text_copy", see eval/tasks/text.py.
        lengths: entries of the book, or tokens of the passage.
        options: of the task; text_copy needs `file`.
        samples: for each length.
    """

    task: str
    lengths: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 100

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("text_tasks: lengths is empty, expected at least one")
        require_positive("text_tasks", samples=self.samples)


@dataclass(frozen=True)
class TextTasksOptions:
    """Copying and look-up in text, exact answers against length.

    Args:
        tasks: name in the report -> what it is.
        batch_tokens: of a forward pass.
    """

    tasks: dict[str, TextTaskOptions]
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("text_tasks.tasks is empty, expected at least one task")
        require_positive("text_tasks", batch_tokens=self.batch_tokens)
