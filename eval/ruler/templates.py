"""The words of the prompts, as in NVIDIA's RULER (Apache License 2.0): scores depend on them.

A prompt is `head + context + tail`, where the tail ends with the question, and then the answer
prefix: the beginning of a sentence that the answer completes.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Wording(NamedTuple):
    """What stands around a context: before it, after it, and the answer's first words."""

    head: str
    tail: str
    prefix: str

    def prompt(self, context: str) -> str:
        return self.head + context + self.tail + self.prefix


def needle(kind: str, key: str, value: str) -> str:
    """Return one needle; kind is "numbers", "words" or "uuids"."""
    return f"One of the special magic {kind} for {key} is: {value}."


def needles(kind: str, keys: Sequence[str], answers: int) -> Wording:
    """Return the wording that asks for the values of `keys`, `answers` of them together."""
    query = f"{', '.join(keys[:-1])}, and {keys[-1]}" if len(keys) > 1 else keys[0]
    if answers == 1:
        some, are, are_all, kind = "A", "is", "is", kind[:-1]
    else:
        some, are, are_all = "Some", "are", "are all"
    return Wording(
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {kind} afterwards.\n",
        f"\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text?",
        f" The special magic {kind} for {query} mentioned in the provided text {are}",
    )


def chain(value: str, variables: int) -> Wording:
    """Return the wording that asks for the `variables` names that hold `value`."""
    return Wording(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{variables} variables are assigned the value {value}, they are: ",
    )


COMMON_WORDS = Wording(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)

FREQUENT_WORDS = Wording(
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)


def question(query: str) -> Wording:
    """Return the wording that asks `query` about documents."""
    order = (
        "Answer the question based on the given documents. Only give me the answer and do not "
        "output any other words.\n\n"
    )
    return Wording(
        f"{order}The following are given documents.\n\n",
        f"\n\n{order}Question: {query}",
        " Answer:",
    )


def numbered(words: Sequence[str]) -> str:
    """Return "1. word 2. word ..."."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def documents(texts: Sequence[str]) -> str:
    """Return numbered documents, separated by blank lines."""
    return "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, start=1))
