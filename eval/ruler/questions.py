"""Questions about documents: SQuAD's and HotpotQA's, among other documents of the same set."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from eval.documents import read_rows
from eval.ruler import templates
from eval.ruler.fit import Plan, TooShortError
from eval.ruler.sources import read_json
from eval.ruler.tokens import TokenCounter

SEPARATOR = "\n\n"
# Documents tried for the room that is left at the end.
CANDIDATES = 64
# Of the room, what a question and its own documents may take by estimate.
SPARE = 0.98


class Question(NamedTuple):
    """A question with its answers and documents, these as numbers.

    Args:
        query: the question.
        outputs: answers, each of which is right.
        gold: the documents that hold the answer.
        given: those that NVIDIA's scripts always show: `gold`, or all ten of HotpotQA.
        near: others about the same thing, shown before others are.
    """

    query: str
    outputs: list[str]
    gold: list[int]
    given: list[int]
    near: list[int]


class QuestionSet(NamedTuple):
    """Questions, and the documents of all of them."""

    questions: list[Question]
    documents: list[str]


@functools.lru_cache(maxsize=4)
def load_questions(kind: str, source: str) -> QuestionSet:
    """Read SQuAD 2.0 or HotpotQA.

    Args:
        kind: "squad" or "hotpotqa".
        source: the official JSON file, a `.jsonl` file with the columns of the Hub's data set
            (either plain, `.gz` or `.xz`), or the name of that data set on the Hugging Face Hub.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not as expected, or no question with an answer.
        ConnectionError: the Hub is out of reach.
    """
    read = {"squad": _squad, "hotpotqa": _hotpotqa}[kind]
    try:
        questions = read(_load(kind, source))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} does not have the layout of {kind}: {error!r}") from error
    if not questions.questions:
        raise ValueError(f"{source} holds no question that has an answer")
    return questions


def _load(kind: str, source: str) -> Any:
    suffixes = Path(source).suffixes[-2:]
    if ".jsonl" in suffixes:
        return [row for _, row in read_rows(Path(source))]
    if ".json" in suffixes:
        return read_json(source)
    from datasets import load_dataset  # slow to import, and files do not need it

    config = {"hotpotqa": "distractor"}.get(kind)
    return list(load_dataset(source, config, split="validation"))


def _number(texts: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    documents = sorted(set(texts))
    return documents, {text: number for number, text in enumerate(documents)}


def _squad(data: Any) -> QuestionSet:
    """NVIDIA's choice: answerable questions in file order; near is the rest of the article."""
    rows = list(_squad_rows(data))
    documents, numbers = _number(context for _, context, _, _ in rows)
    articles: dict[str, dict[int, None]] = {}
    for title, context, _, _ in rows:
        articles.setdefault(title, {})[numbers[context]] = None
    questions = [
        Question(query, answers, [gold], [gold], [n for n in articles[title] if n != gold])
        for title, context, query, answers in rows
        if answers
        for gold in [numbers[context]]
    ]
    return QuestionSet(questions, documents)


def _squad_rows(data: Any) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield title, context, question and answers (none: it cannot be answered)."""
    if isinstance(data, list):
        for row in data:
            yield row["title"], row["context"], row["question"], list(row["answers"]["text"])
        return
    for number, article in enumerate(data["data"]):
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                impossible = qa.get("is_impossible", False)
                answers = [] if impossible else [answer["text"] for answer in qa["answers"]]
                yield str(number), paragraph["context"], qa["question"], answers


def _hotpotqa(data: Any) -> QuestionSet:
    """Gold are the two supporting documents where the file tells them, else all ten."""
    rows = []
    for row in data:
        context = row["context"]
        pairs = (
            zip(context["title"], context["sentences"], strict=True)
            if isinstance(context, dict)
            else context
        )
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in pairs}
        rows.append((row, texts))
    documents, numbers = _number(text for _, texts in rows for text in texts.values())
    questions = []
    for row, texts in rows:
        titles = _supporting(row)
        given = [numbers[text] for text in texts.values()]
        gold = [numbers[text] for title, text in texts.items() if title in titles] or given
        near = [number for number in given if number not in gold]
        questions.append(Question(row["question"], [row["answer"]], gold, given, near))
    return QuestionSet(questions, documents)


def _supporting(row: dict[str, Any]) -> set[str]:
    facts = row.get("supporting_facts", row.get("supporting_titles", []))
    if isinstance(facts, dict):
        return set(facts["title"])
    return {fact if isinstance(fact, str) else fact[0] for fact in facts}


class Questions:
    """A set's questions in an order drawn from a seed, and the tokens of its documents.

    Samples beyond the number of questions ask some again, among other documents.
    """

    def __init__(self, data: QuestionSet, counter: TokenCounter, seed: int | str) -> None:
        self.data, self.counter = data, counter
        self.order = Random(seed).sample(range(len(data.questions)), len(data.questions))
        # By room: the questions that fit so far, and those not looked at.
        self._fitting: dict[int, tuple[list[int], Iterator[int]]] = {}

    def plan(self, rng: Random, index: int, room: int) -> "QuestionPlan":
        """Make the plan of sample number `index`.

        Questions whose own documents would not fit in `room` tokens are passed over.

        Raises:
            TooShortError: none is left.
        """
        if room not in self._fitting:
            self._fitting[room] = ([], iter(self.order))
        fitting, rest = self._fitting[room]
        while len(fitting) <= index and (number := next(rest, None)) is not None:
            if self._least(number) <= SPARE * room:
                fitting.append(number)
        if not fitting:
            raise TooShortError(
                f"none of the {len(self.order)} questions has documents that fit in {room} tokens"
            )
        question = self.data.questions[fitting[index % len(fitting)]]
        return QuestionPlan(rng, self, question)

    def _least(self, number: int) -> int:
        """Return about how many tokens a question and its own documents take."""
        question = self.data.questions[number]
        (around,) = self.counter.count([templates.question(question.query).prompt("")])
        return around + sum(self.costs(question.gold))

    def costs(self, numbers: Iterable[int]) -> list[int]:
        """Return about how many tokens documents take with their number and the blank line."""
        return self.counter.costs(self._text(number) for number in numbers)

    def _text(self, number: int) -> str:
        return f"Document 100:\n{self.data.documents[number]}{SEPARATOR}"


class QuestionPlan(Plan):
    """Documents in random order, the gold ones among them; size counts tokens of documents.

    Gold documents come first in line, then near ones, then others, as many as there is room for;
    the room of the last goes to the longest of the next that fit. Where all documents are in,
    others than the gold ones are repeated.
    """

    tolerance = 0.02

    def __init__(self, rng: Random, source: Questions, question: Question) -> None:
        self._source, self._gold = source, question.gold
        self._rng = rng
        self._shuffle = str(rng.getrandbits(64))
        self.wording = templates.question(question.query)
        self.outputs = question.outputs
        documents = source.data.documents
        self.marks = [documents[number] for number in question.gold]
        near = rng.sample(question.near, len(question.near))
        self._line = [*question.gold, *near]
        self._taken = set(self._line)
        self._costs = source.costs(self._line)
        # The first document needs no blank line before it.
        self.minimum = max(sum(self._costs[: len(question.gold)]), 1)

    def estimate(self, size: int) -> int:
        return size

    def size_for(self, tokens: int) -> int:
        return max(tokens, self.minimum)

    def context(self, size: int) -> str:
        chosen = self._choose(size)
        Random(self._shuffle).shuffle(chosen)
        return templates.documents([self._source.data.documents[number] for number in chosen])

    def _choose(self, size: int) -> list[int]:
        count = total = 0
        while total <= size:
            self._grow(count + CANDIDATES)
            if count == len(self._line):
                return list(self._line)
            total += self._costs[count]
            count += 1
        # The one that is too long is left out, and the one before it may make way for a better fit.
        count = max(count - 2, len(self._gold))
        room = size - sum(self._costs[:count])
        chosen = self._line[:count]
        rest = range(count, min(count + CANDIDATES, len(self._line)))
        for place in sorted(rest, key=lambda place: (-self._costs[place], place)):
            if self._costs[place] <= room:
                chosen.append(self._line[place])
                room -= self._costs[place]
        return chosen

    def _grow(self, count: int) -> None:
        """Make the line at least `count` documents long, if there are any but gold ones."""
        documents = len(self._source.data.documents)
        while len(self._line) < count and documents > len(self._gold):
            if len(self._taken) == documents:  # all of them stand in line: begin again
                self._taken = set(self._gold)
            missing = count - len(self._line)
            left = documents - len(self._taken)
            if left <= 4 * missing:
                others = [n for n in range(documents) if n not in self._taken]
                new = self._rng.sample(others, min(len(others), missing))
            else:
                new = []
                while len(new) < missing:
                    number = self._rng.randrange(documents)
                    if number not in self._taken and number not in new:
                        new.append(number)
            self._line += new
            self._taken.update(new)
            self._costs += self._source.costs(new)
