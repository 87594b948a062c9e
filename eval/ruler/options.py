"""The options of section `ruler`."""

import difflib
from dataclasses import dataclass, field
from typing import Literal

from eval.options import require_positive
from eval.ruler.specs import TASKS

SHORTEST = 512


@dataclass(frozen=True)
class RulerOptions:
    """The thirteen tasks of RULER at several lengths.

    Args:
        tasks: names; all thirteen by default.
        lengths: tokens of prompt and answer together, 512 or more.
        samples: per task and length.
        seed: of the samples.
        template: "base" gives the prompt as it is, "chat" as the user's turn of the tokenizer's
            chat template; the answer begins after the answer prefix either way.
        compat: make samples as NVIDIA's scripts do, with all their choices (docs/evaluation.md);
            needs the package wonderwords.
        haystack: text file, or `.json`/`.jsonl` with "text", plain, `.gz` or `.xz`; null is the
            novel that comes with the project.
        splitter: what finds its sentences: "builtin", or NLTK's "punkt".
        squad, hotpotqa: questions of qa_1 and qa_2: the official JSON, JSONL with the columns of
            the Hub's data set, or the name of a data set on the Hugging Face Hub.
        english_words: file of words, one a line, that `compat` counts at great lengths.
        too_short: what to do with a task that a length is too short for: "error", or "skip".
        batch_size: most prompts in a batch.
        batch_tokens: most tokens in a batch of more than one prompt.
        prefill_chunk_size: read prompts in pieces of so many tokens; null reads them whole.
        cache: folder where samples are kept, by tokenizer and settings.
    """

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    lengths: list[int] = field(default_factory=lambda: [4096])
    samples: int = 500
    seed: int = 42
    template: Literal["base", "chat"] = "base"
    compat: bool = False
    haystack: str | None = None
    splitter: Literal["builtin", "punkt"] = "builtin"
    squad: str = "rajpurkar/squad_v2"
    hotpotqa: str = "hotpotqa/hotpot_qa"
    english_words: str | None = None
    too_short: Literal["error", "skip"] = "error"
    batch_size: int = 16
    batch_tokens: int = 65536
    prefill_chunk_size: int | None = None
    cache: str = "runs/ruler"

    def __post_init__(self) -> None:
        for name in self.tasks:
            if name not in TASKS:
                close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)
                raise ValueError(f"ruler.tasks: unknown task {name!r}, the closest is {close[0]!r}")
        for what, values in (("tasks", self.tasks), ("lengths", self.lengths)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"ruler.{what} must be one or more different values: {values}")
        if min(self.lengths) < SHORTEST:
            raise ValueError(f"ruler.lengths must be {SHORTEST} or more, got {min(self.lengths)}")
        require_positive(
            "ruler",
            samples=self.samples,
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
            prefill_chunk_size=self.prefill_chunk_size,
        )
