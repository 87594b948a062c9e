"""Tokenizers and questions for the tests of RULER that need no files but the project's own."""

import itertools
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval.ruler.sources import load_haystack


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or run of punctuation, all of them unknown."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[EOS]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")


def _paragraphs(count: int, sentences: int) -> list[list[str]]:
    haystack = load_haystack(None)
    ends = [0, *haystack.ends.tolist()]
    texts = [" ".join(haystack.words[a:b]) for a, b in itertools.pairwise(ends)]
    return [texts[i * sentences : (i + 1) * sentences] for i in range(count)]


def squad() -> dict[str, Any]:
    """Twelve articles of ten paragraphs, each with a question that has answers and one without."""
    articles = []
    for number, start in enumerate(range(0, 120, 10)):
        paragraphs = []
        for i, lines in enumerate(_paragraphs(120, 4)[start : start + 10], start=start):
            words = lines[0].split()
            answers = [
                {"text": text, "answer_start": 0} for text in (words[0], " ".join(words[:3]))
            ]
            paragraphs.append(
                {
                    "context": " ".join(lines),
                    "qas": [
                        {
                            "question": f"What begins {i}?",
                            "answers": answers,
                            "is_impossible": False,
                        },
                        {"question": f"What ends {i}?", "answers": [], "is_impossible": True},
                    ],
                }
            )
        articles.append({"title": f"article {number}", "paragraphs": paragraphs})
    return {"version": "test", "data": articles}


def hotpotqa() -> list[dict[str, Any]]:
    """Twenty questions with ten documents each, of which two hold the answer."""
    paragraphs = _paragraphs(320, 3)[120:]
    rows = []
    for number in range(20):
        context = [
            [f"title {number * 10 + i}", [f"{line} " for line in lines]]
            for i, lines in enumerate(paragraphs[number * 10 : number * 10 + 10])
        ]
        titles = [context[number % 10][0], context[(number + 3) % 10][0]]
        rows.append(
            {
                "_id": str(number),
                "question": f"Which words begin {titles[0]} and {titles[1]}?",
                "answer": " ".join(context[number % 10][1][0].split()[:2]),
                "supporting_facts": [[title, 0] for title in titles],
                "context": context,
            }
        )
    return rows
