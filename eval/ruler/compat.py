"""Samples as NVIDIA's scripts make them, slips included, from the same words, texts and seed.

One stream of random numbers runs through the search for a size and all samples of a task; shuffles
take the same seed for every sample, so a question's document stands at one depth for a given number
of documents; the size is searched on throw-away samples. Only endless loops are left out: where the
smallest step does not fit, sizes go on down to 1, and an error says when that does not fit either.
"""

import random
import string
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from eval.ruler import templates
from eval.ruler.chains import HOPS, assignments
from eval.ruler.counting import COMMON, LONG, LONG_FROM, SHORT, FrequentWords, zeta_counts
from eval.ruler.fit import Frame, Sample, TooShortError, depths_of
from eval.ruler.needles import NOISE, draw
from eval.ruler.questions import QuestionSet
from eval.ruler.sources import Haystack, SortedPairs
from eval.ruler.specs import Kind, NeedleSpec
from eval.ruler.templates import Wording
from eval.ruler.tokens import TokenCounter

NOISE_LINE = " ".join(NOISE)
DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int).tolist()
EXAMPLE_TOKENS = 500
TRIES = 50


class Text(NamedTuple):
    """One prompt before the frame is put around it; see `Plan` for the fields."""

    lead: str
    wording: Wording
    context: str
    outputs: list[str]
    marks: Sequence[str] = ()

    def prompt(self, frame: Frame) -> str:
        wording = self.wording
        before = frame.before + self.lead + wording.head
        return before + self.context + wording.tail + frame.after + wording.prefix


class Stream:
    """The random numbers of one task.

    `shuffled` begins anew from the seed each time.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.numpy = np.random.RandomState(seed)

    def shuffled(self, items: Sequence[str]) -> list[str]:
        result = list(items)
        random.Random(self.seed).shuffle(result)
        return result

    def names(self, count: int, letters: int) -> list[str]:
        return ["".join(self.rng.choices(string.ascii_uppercase, k=letters)) for _ in range(count)]

    def value(self) -> str:
        return str(self.numpy.randint(10_000, 99_999))


class Maker:
    """Makes the texts of a task.

    Attributes:
        step: the least size that is searched, and what a text that is too long is shortened by.
        first: size of the text by which tokens per unit are measured.
    """

    step: int
    first: int

    def make(self, index: int, size: int) -> Text:
        """Return a new text; ValueError where the size is too small for the task."""
        raise NotImplementedError

    def most(self, length: int, per_unit: float) -> int:
        """Return the largest size to try."""
        return int(length / per_unit * 3)


class Needles(Maker):
    def __init__(
        self,
        stream: Stream,
        spec: NeedleSpec,
        words: SortedPairs,
        haystack: Haystack,
        length: int,
    ) -> None:
        self.stream, self.spec, self.words, self.haystack = stream, spec, words, haystack
        self.step = 500 if spec.haystack == "essay" else 25 if length >= LONG_FROM else 5
        self.first = self.step

    def make(self, index: int, size: int) -> Text:
        spec, rng = self.spec, self.stream.rng
        keys, values = [], []
        for _ in range(spec.keys):
            keys.append(self._draw(spec.key))
            values.append([self._draw(spec.value) for _ in range(spec.values)])
        pairs = list(zip(keys, values, strict=True))
        needles = self.stream.shuffled([self._needle(k, v) for k, vs in pairs for v in vs])
        if spec.haystack == "essay":
            context = self._essay(size, needles)
        else:
            if spec.haystack == "noise":
                lines = [NOISE_LINE] * size
            else:
                kinds = spec.key, spec.value
                lines = [self._needle(*(self._draw(kind) for kind in kinds)) for _ in range(size)]
            places = sorted(rng.sample(range(size), len(needles)), reverse=True)
            for place, needle in zip(places, needles, strict=True):
                lines.insert(place, needle)
            context = "\n".join(lines)
        asked = [pairs[i] for i in rng.sample(range(spec.keys), spec.queries)]
        outputs = [value for _, some in asked for value in some]
        wording = templates.needles(spec.value, [key for key, _ in asked], len(outputs))
        marks = [self._needle(key, value) for key, some in asked for value in some]
        return Text("", wording, context, outputs, marks)

    def _draw(self, kind: Kind) -> str:
        return draw(self.stream.rng, kind, lambda rng: rng.choice(self.words))

    def _needle(self, key: str, value: str) -> str:
        return templates.needle(self.spec.value, key, value)

    def _essay(self, size: int, needles: Sequence[str]) -> str:
        words, ends = self.haystack.words, self.haystack.ends
        repeats = -(-size // len(words))
        text = (words * repeats)[:size]
        limits = [end + turn * len(words) for turn in range(repeats) for end in ends.tolist()]
        limits = [0, *(end for end in limits if end < size), size]
        sentences = len(limits) - 1
        depths = self.stream.rng.sample(DEPTHS, len(needles))
        cuts = [limits[place] for place in sorted(int(sentences * (d / 100)) for d in depths)]
        parts, begin = [], 0
        for cut, needle in zip(cuts, needles, strict=True):
            # A needle at the very beginning follows an empty part and its space.
            parts += [" ".join(text[begin:cut]), needle]
            begin = cut
        return " ".join([*parts, " ".join(text[begin:])])


class Chains(Maker):
    """Chains with the example before them, or, with `example` None, the example itself."""

    def __init__(self, stream: Stream, length: int, example: str | None) -> None:
        self.stream, self.example = stream, example
        self.step = 10 if example is not None and length >= LONG_FROM else 5
        self.first = self.step

    def make(self, index: int, size: int) -> Text:
        text = self.plain(size)
        if self.example is None:
            return text
        example = self.example
        for name in example.split()[-HOPS - 1 :]:
            (new,) = self.stream.names(1, len(name))
            example = example.replace(name, new)
        return text._replace(lead=example.replace("12345", self.stream.value()) + "\n")

    def plain(self, size: int) -> Text:
        names = self.stream.names(HOPS + 1, 3 if self.example is None else 5)
        while len(set(names)) <= HOPS:
            names = self.stream.names(HOPS + 1, len(names[0]))
        value = "12345" if self.example is None else self.stream.value()
        lines = [NOISE_LINE] * size
        chain = assignments(names, value)
        places = sorted(self.stream.rng.sample(range(size), len(chain)))
        for shift, (place, line) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + shift, line)
        context = "\n".join(lines).replace(". \n", ".\n")
        marks = [line.rstrip() for line in chain]
        return Text("", templates.chain(value, len(names)), context, names, marks)


class CommonWords(Maker):
    step = 10
    first = 4096

    def __init__(
        self, stream: Stream, words: Sequence[str], more_words: Sequence[str], length: int
    ) -> None:
        self.stream, self.more_words = stream, more_words
        self.words = stream.shuffled(sorted(set(words)))
        self.repeats = LONG if length >= LONG_FROM else SHORT

    def most(self, length: int, per_unit: float) -> int:
        return int(length // per_unit) * 2

    def make(self, index: int, size: int) -> Text:
        example, answers = self._list(self.repeats.example_words, self.repeats.example)
        context, outputs = self._list(size, self.repeats.question)
        solved = templates.COMMON_WORDS.prompt(example)
        lead = f"{solved} {templates.numbered(answers)}\n"
        return Text(lead, templates.COMMON_WORDS, context, outputs)

    def _list(self, size: int, repeats: tuple[int, int]) -> tuple[str, list[str]]:
        words = self.words if size <= len(self.words) else self.more_words
        if size > len(words):
            raise ValueError(f"{size} words to count, but there are {len(words)}")
        words = self.stream.rng.sample(words, size)
        common, others = words[:COMMON], words[COMMON:]
        return templates.numbered(
            self.stream.shuffled(common * repeats[0] + others * repeats[1])
        ), common


class Documents(Maker):
    step = 10
    first = 10

    def __init__(self, stream: Stream, data: QuestionSet) -> None:
        self.stream, self.data = stream, data

    def make(self, index: int, size: int) -> Text:
        documents = self.data.documents
        question = self.data.questions[index]
        given = question.given
        near = [number for number in question.near if number not in given]
        missing = size - len(given)
        if size >= len(documents):
            texts = (documents * -(-size // len(documents)))[:size]
        else:
            if missing > len(near):
                taken = {*given, *near}
                others = [number for number in range(len(documents)) if number not in taken]
                near = [*near, *self.stream.rng.sample(others, missing - len(near))]
            else:
                near = self.stream.rng.sample(near, missing)
            texts = [documents[number] for number in [*given, *near]]
        context = templates.documents(self.stream.shuffled(texts))
        marks = [documents[number] for number in question.gold]
        return Text("", templates.question(question.query), context, question.outputs, marks)


class _Writer:
    """Counts texts against the limit, and turns those that fit into samples."""

    def __init__(
        self, name: str, counter: TokenCounter, frame: Frame, length: int, budget: int
    ) -> None:
        self.name, self.counter, self.frame = name, counter, frame
        self.length, self.budget = length, budget
        self.limit = length - frame.prefix_tokens

    def tokens(self, text: Text) -> int:
        return self.counter.count([text.prompt(self.frame)])[0]

    def sample(self, index: int, size: int, text: Text) -> Sample:
        tokens, depths = depths_of(self.counter, self.frame, text, text.context)
        tokens += self.frame.prefix_tokens
        prefix = text.wording.prefix
        return Sample(
            index=index,
            input=text.prompt(self.frame)[: -len(prefix)],
            answer_prefix=prefix,
            outputs=text.outputs,
            length=tokens + self.budget,
            tokens=tokens,
            size=size,
            depths=depths,
        )

    def too_short(self) -> TooShortError:
        return TooShortError(
            f"ruler task {self.name} does not fit in {self.length} tokens with this tokenizer, "
            "however small its context is"
        )


def _search(maker: Maker, writer: _Writer, extra: int) -> int:
    """Return the largest size of which a text, new for each try, fits with `extra` tokens more."""
    per_unit = writer.tokens(maker.make(0, maker.first)) / maker.first
    low, best = maker.step, maker.step
    high = max(maker.most(writer.limit, per_unit), 2 * maker.step)
    while low <= high:
        middle = (low + high) // 2
        if writer.tokens(maker.make(0, middle)) + extra <= writer.limit:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def _make_fitting(
    maker: Maker, writer: _Writer, index: int, size: int, budget: int
) -> tuple[Text, int]:
    for _ in range(TRIES):
        try:
            text = maker.make(index, size)
        except ValueError:  # too few lines or documents for what has to be in
            text = None
        if text is not None and writer.tokens(text) + budget <= writer.limit:
            return text, size
        if size > maker.step:
            size -= maker.step
        elif size > 1:
            size //= 2
    raise writer.too_short()


def compat_samples(
    make_maker: Callable[[Stream], Maker],
    *,
    name: str,
    counter: TokenCounter,
    frame: Frame,
    length: int,
    budget: int,
    samples: int,
    seed: int,
    chained: bool = False,
) -> Iterator[Sample]:
    """Yield samples of one task.

    Args:
        make_maker: makes the task's maker.
        name: of the task, for messages.
        counter, frame, length, budget: see `fit`; `length` includes the tokens of the frame.
        samples: how many.
        seed: of all random numbers.
        chained: variable tracking, whose example is made before and by the same numbers.

    Raises:
        TooShortError: not even the smallest size fits.
        ValueError: more samples than questions.
    """
    stream = Stream(seed)
    writer = _Writer(name, counter, frame, length, budget)
    if chained:
        example_writer = _Writer(name, counter, Frame(), EXAMPLE_TOKENS, 0)
        example_maker = Chains(stream, length, None)
        size = _search(example_maker, example_writer, 0)
        text, _ = _make_fitting(example_maker, example_writer, 0, size, 0)
        example = f"{text.prompt(Frame())} {' '.join(text.outputs)}\n"
        maker: Maker = Chains(stream, length, example)
        size = _search(_Plain(maker), writer, budget + counter.count([example])[0])
    else:
        maker = make_maker(stream)
        size = _search(maker, writer, budget)
    for index in range(samples):
        text, used = _make_fitting(maker, writer, index, size, budget)
        yield writer.sample(index, used, text)


class _Plain(Maker):
    """Chains without their example, as they are when the size is searched."""

    def __init__(self, maker: Chains) -> None:
        self.step, self.first, self._maker = maker.step, maker.first, maker

    def make(self, index: int, size: int) -> Text:
        return self._maker.plain(size)


def compat_frequent_words(
    *,
    counter: TokenCounter,
    frame: Frame,
    length: int,
    budget: int,
    samples: int,
    seed: int,
) -> Iterator[Sample]:
    """Yield samples of the coded text, whose size is searched upwards in steps; see above."""
    stream = Stream(seed)
    writer = _Writer("fwe", counter, frame, length, budget)
    room = writer.limit - budget
    step = room // 32

    def vocabulary() -> list[str]:
        count, words = room // 50, []
        while len(words) < count or len(set(words)) < count:
            words.append(
                "".join(stream.rng.choices(string.ascii_lowercase, k=FrequentWords.LETTERS))
            )
        return ["...", *stream.shuffled(sorted(set(words)))[1:]]

    def make(words: list[str], size: int) -> Text:
        counts = zeta_counts(size, len(words)).tolist()
        text = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
        context = " ".join(stream.shuffled(text))
        return Text("", templates.FREQUENT_WORDS, context, words[1:4])

    least = 4  # the noise and the three words of the answer
    if room // 50 < least or writer.tokens(make(["..."] * least, 0)) > room:
        raise writer.too_short()
    words, start = vocabulary(), room // FrequentWords.LETTERS
    while writer.tokens(make(words, start)) < room:
        start += step
    start -= step
    for index in range(samples):
        words, size = vocabulary(), start
        while writer.tokens(text := make(words, size)) > room:
            size -= step
            if size <= 0:
                raise writer.too_short()
        yield writer.sample(index, size, text)
