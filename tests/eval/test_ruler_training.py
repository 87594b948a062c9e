"""Documents in RULER's form for training small models."""

import json
import lzma
import re
from pathlib import Path

import pytest

import ssm_hf
from eval.ruler.fit import Frame
from eval.ruler.sources import key_words
from eval.ruler.tasks import Maker
from eval.ruler.tokens import TokenCounter
from eval.ruler.training import DEFAULT_TASKS, answer_text, main, training_documents
from tests.eval.ruler_inputs import word_tokenizer
from training.config import DataConfig
from training.data import file_documents

KEY = re.compile(r"magic \w+ for ([a-z]+)-([a-z]+) is:")


def test_documents_are_prompts_with_their_answers() -> None:
    tokenizer = word_tokenizer()
    documents = list(training_documents(tokenizer, tokens=60_000, lengths=[1024, 2048]))
    assert {(d.task, d.length) for d in documents} == {
        (task, length) for task in DEFAULT_TASKS for length in (1024, 2048)
    }
    counts = TokenCounter(tokenizer).count([d.text for d in documents])
    # One token is left for the end of the document.
    assert all(n < d.length for n, d in zip(counts, documents, strict=True))
    assert 0.8 * 60_000 < sum(counts) < 1.4 * 60_000
    for document in documents:
        if document.task == "niah_single_1":
            key, answer = re.findall(
                r"number for ([\w-]+) mentioned .* is (\d{7})\.$", document.text
            )[0]
            assert f"One of the special magic numbers for {key} is: {answer}." in document.text
        if document.task == "vt":
            names = document.text.split("they are:")[-1].split()
            assert names == re.findall(r"VAR (\w+) = ", document.text)[-5:]


def test_documents_are_not_samples() -> None:
    keys = key_words()
    tokenizer = word_tokenizer()
    documents = list(training_documents(tokenizer, tokens=30_000, lengths=[1024]))
    pairs = [pair for document in documents for pair in KEY.findall(document.text)]
    assert len(pairs) > 100
    assert {adjective for adjective, _ in pairs} <= set(keys.adjectives[True])
    assert {noun for _, noun in pairs} <= set(keys.nouns[True])
    maker = Maker(TokenCounter(tokenizer), Frame(), seed=0)
    for sample in maker.samples("niah_multikey_2", 1024, 20):
        used = KEY.findall(sample.input)
        assert not {word for pair in used for word in pair} & {w for pair in pairs for w in pair}


def test_documents_are_functions_of_the_seed() -> None:
    def texts(seed: int) -> list[str]:
        made = training_documents(word_tokenizer(), tokens=9_000, lengths=[1024], seed=seed)
        return [document.text for document in made]

    assert texts(0) == texts(0)
    assert not set(texts(0)) & set(texts(1))


def test_answers_are_worded_as_the_examples_are() -> None:
    assert answer_text("niah_single_1", ["1"]) == " 1."
    assert answer_text("niah_multivalue", ["1", "2", "3"]) == " 1, 2, and 3."
    assert answer_text("vt", ["AB", "CD"]) == " AB CD"
    assert answer_text("cwe", ["a", "b"]) == " 1. a 2. b"
    assert answer_text("qa_1", ["yes", "no"]) == " yes"


def test_files_are_read_by_a_training_config(tmp_path: Path) -> None:
    ssm_hf.byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "book.txt").write_text("It was a dark night. Nothing stirred. " * 400)
    out = tmp_path / "needles.jsonl.xz"
    arguments = ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(out)]
    arguments += ["--tokens", "20000", "--lengths", "1024", "--tasks", "niah_single_2,cwe"]
    main([*arguments, "--haystack", str(tmp_path / "book.txt")])
    with lzma.open(out, "rt") as file:
        rows = [json.loads(line) for line in file]
    assert {row["task"] for row in rows} == {"niah_single_2"}  # the other needs more bytes
    assert all("Nothing stirred." in row["text"] for row in rows)
    config = DataConfig(files=[str(tmp_path / "book.txt"), str(out)])
    assert len(file_documents(config)) == 1 + len(rows)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown RULER task 'vtt'"):
        list(training_documents(word_tokenizer(), tokens=1000, tasks=["vtt"]))
    with pytest.raises(ValueError, match=r"none of the tasks .* fits"):
        list(training_documents(ssm_hf.byte_tokenizer(), tokens=1, tasks=["cwe"], lengths=[512]))
