"""The making of samples, task by task."""

from collections.abc import Iterator
from functools import cached_property
from random import Random

from eval.ruler import compat
from eval.ruler.chains import TrackedChain
from eval.ruler.counting import CommonWords, FrequentWords, choose_repeats
from eval.ruler.fit import Frame, Plan, Sample, fit
from eval.ruler.needles import EssayNeedles, Hidden, NeedleNeedles, NoiseNeedles, Text
from eval.ruler.questions import Questions, load_questions
from eval.ruler.sources import (
    Haystack,
    SortedPairs,
    counted_words,
    key_words,
    load_haystack,
    read_lines,
    wonderwords,
)
from eval.ruler.specs import TASKS, Task
from eval.ruler.tokens import TokenCounter


class Maker:
    """Makes samples with one tokenizer from one set of texts.

    Args:
        counter: of the tokenizer.
        frame: around every prompt.
        seed: samples are a function of it, the task, the length and their number.
        haystack: file of the running text, the text itself, or None for the project's novel.
        splitter: "builtin" or "punkt", what finds its sentences.
        squad, hotpotqa: sources of the questions, see `load_questions`.
        compat: as NVIDIA's scripts do, with the words of wonderwords.
        english_words: file of more words for `compat` to count at great lengths, one a line; None
            takes those of the project.
        reserved: keys of the words that training documents use.
    """

    def __init__(
        self,
        counter: TokenCounter,
        frame: Frame,
        *,
        seed: int | str,
        haystack: str | Haystack | None = None,
        splitter: str = "builtin",
        squad: str = "",
        hotpotqa: str = "",
        compat: bool = False,
        english_words: str | None = None,
        reserved: bool = False,
    ) -> None:
        self.counter, self.frame, self.seed = counter, frame, seed
        self.compat, self.reserved = compat, reserved
        self._haystack, self._splitter = haystack, splitter
        self._sources = {"squad": squad, "hotpotqa": hotpotqa}
        self._english_words = english_words
        self._questions: dict[str, Questions] = {}

    @cached_property
    def haystack(self) -> Haystack:
        if isinstance(self._haystack, Haystack):
            return self._haystack
        return load_haystack(self._haystack, self._splitter)

    @cached_property
    def _text(self) -> Text:
        return Text(self.haystack, self.counter)

    def samples(self, name: str, length: int, count: int) -> Iterator[Sample]:
        """Yield the first `count` samples of a task at a length.

        Raises:
            TooShortError: the task does not fit in `length` tokens.
        """
        task = TASKS[name]
        if self.compat:
            return self._compat_samples(name, task, length, count)
        room = length - task.budget - self.frame.prefix_tokens
        plans = (self.plan(name, length, room, index) for index in range(count))
        return fit(plans, self.counter, self.frame, length=length, budget=task.budget, name=name)

    def plan(self, name: str, length: int, room: int, index: int) -> Plan:
        """Make sample number `index`, all but its size."""
        task, counter = TASKS[name], self.counter
        rng = Random(f"{self.seed}/{name}/{length}/{index}")
        if task.needles is not None:
            hidden = Hidden(rng, task.needles, lambda rng: key_words().draw(rng, self.reserved))
            if task.needles.haystack == "noise":
                return NoiseNeedles(rng, hidden, counter)
            if task.needles.haystack == "needle":
                return NeedleNeedles(rng, hidden, counter)
            return EssayNeedles(rng, hidden, counter, self._text, room)
        if task.questions is not None:
            return self.questions(task.questions).plan(rng, index, room)
        if name == "vt":
            return TrackedChain(rng, counter, length)
        if name == "fwe":
            return FrequentWords(rng, counter, (length - task.budget) // 50)
        # One choice for all samples of a length, by a sample that is not among them.
        chooser = Random(f"{self.seed}/{name}/{length}")
        repeats = choose_repeats(chooser, counter, counted_words(), length, room)
        return CommonWords(rng, counter, counted_words(), room, repeats)

    def questions(self, kind: str) -> Questions:
        """Return the questions of "squad" or "hotpotqa" in the order of the samples."""
        if kind not in self._questions:
            data = load_questions(kind, self._sources[kind])
            self._questions[kind] = Questions(data, self.counter, f"{self.seed}/{kind}")
        return self._questions[kind]

    def _compat_samples(self, name: str, task: Task, length: int, count: int) -> Iterator[Sample]:
        def maker(stream: compat.Stream) -> compat.Maker:
            if task.needles is not None:
                words = SortedPairs(wonderwords("adjective"), wonderwords("noun"))
                return compat.Needles(stream, task.needles, words, self.haystack, length)
            if task.questions is not None:
                data = load_questions(task.questions, self._sources[task.questions])
                if count > len(data.questions):
                    raise ValueError(
                        f"ruler.compat asks each of the {len(data.questions)} questions once, "
                        f"not {count}"
                    )
                return compat.Documents(stream, data)
            kinds = "noun", "adjective", "verb"
            words = [word for kind in kinds for word in wonderwords(kind)]
            more = self._english_words
            return compat.CommonWords(
                stream, words, read_lines(more) if more else counted_words(), length
            )

        common = {
            "counter": self.counter,
            "frame": self.frame,
            "length": length,
            "budget": task.budget,
            "samples": count,
            "seed": self.seed,
        }
        if name == "fwe":
            return compat.compat_frequent_words(**common)
        return compat.compat_samples(maker, name=name, chained=name == "vt", **common)
