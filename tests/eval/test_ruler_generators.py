"""Samples of RULER: within their length, full, with their answers, and the same every time.

No model is needed. Two tokenizers are made here; GPT-2's and GPT-NeoX's are used where their files
are present.
"""

import json
import re
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

import ssm_hf
from eval.ruler.counting import LONG, SHORT, zeta_counts
from eval.ruler.fit import Frame, Sample, TooShortError, make_frame
from eval.ruler.needles import NOISE, insert
from eval.ruler.questions import load_questions
from eval.ruler.sources import (
    KeyWords,
    SortedPairs,
    counted_words,
    draw_words,
    key_words,
    load_haystack,
    sentence_ends,
)
from eval.ruler.specs import TASKS
from eval.ruler.tasks import Maker
from eval.ruler.tokens import TokenCounter
from tests.eval.ruler_inputs import hotpotqa, squad, word_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
FRAME = Frame()
# The lengths that are tried every time.
THINNED = {
    "byte": [512, 1024, 4096, 32768],
    "word": [512, 4096],
    "sentencepiece": [2048],
    "gpt2": [512],
    "neox": [4096],
}


def _gpt2() -> PreTrainedTokenizerFast:
    folder = SHARED / "tokenizers" / "gpt2"
    return GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))


def _neox() -> PreTrainedTokenizerFast:
    file = SHARED / "tokenizers" / "gpt_neox_20b" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file))


def _sentencepiece() -> PreTrainedTokenizerFast:
    """Pieces as SentencePiece makes them: every text begins with a space of its own."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(  # pyright: ignore
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # pyright: ignore
    backend.decoder = decoders.Metaspace()  # pyright: ignore
    trainer = trainers.BpeTrainer(  # pyright: ignore
        vocab_size=1500, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    haystack = load_haystack(None)
    texts = [" ".join(haystack.words[a:b]) for a, b in pairwise(haystack.ends[:1500])]
    backend.train_from_iterator([*texts, "0 1 2 3 4 5 6 7 8 9 - a-b: ?"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {
    "byte": ssm_hf.byte_tokenizer,
    "word": word_tokenizer,
    "sentencepiece": _sentencepiece,
    "gpt2": _gpt2,
    "neox": _neox,
}
FROM_FILES = ("gpt2", "neox")
_made: dict[str, PreTrainedTokenizerFast] = {}
_makers: dict[tuple[str, str], Maker] = {}


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    if name in FROM_FILES and not (SHARED / "tokenizers").is_dir():
        pytest.skip(f"the files of this tokenizer are not at {SHARED / 'tokenizers'}")
    if name not in _made:
        _made[name] = TOKENIZERS[name]()
    return _made[name]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("questions")
    for name, data in (("squad", squad()), ("hotpotqa", hotpotqa())):
        (folder / f"{name}.json").write_text(json.dumps(data))
    return {name: str(folder / f"{name}.json") for name in ("squad", "hotpotqa")}


def _maker(
    tokenizer: PreTrainedTokenizerFast,
    questions: dict[str, str],
    frame: Frame | None = None,
    **more,
) -> Maker:
    frame = frame or Frame()
    counter = TokenCounter(tokenizer, parse_special=frame.chat)
    return Maker(counter, frame, **{"seed": 0, **questions, **more})


def _shared_maker(tokenizer: str, questions: dict[str, str]) -> Maker:
    key = (tokenizer, questions["squad"])
    if key not in _makers:  # counting the novel's tokens takes a second
        _makers[key] = _maker(_tokenizer(tokenizer), questions)
    return _makers[key]


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return len(encoded["input_ids"])


def _largest_unit(name: str, sample: Sample, counter: TokenCounter) -> int:
    """The most tokens by which one unit more could have made the sample longer."""
    if name in ("qa_1", "qa_2"):
        return max(counter.costs(sample.input.split("\n\n"))) + 8
    if name in ("niah_multikey_2", "niah_multikey_3"):
        return max(counter.costs(sample.input.split("\n")[1:-1])) + 4
    if name == "cwe":
        words = re.findall(r"\d+\. \w+", sample.input)
        return 3 * (max(counter.costs(words)) + 1)
    if name == "fwe":  # one more in size can raise several counts
        return 4 * max(counter.costs(f" {word}" for word in sample.outputs))
    return max(counter.costs([f" {sentence}" for sentence in NOISE])) + 2


def _check(
    name: str, length: int, samples: list[Sample], tokenizer: PreTrainedTokenizerFast
) -> None:
    task, counter = TASKS[name], TokenCounter(tokenizer)
    for sample in samples:
        assert _tokens(tokenizer, sample.input + sample.answer_prefix) == sample.tokens
        assert sample.length == sample.tokens + task.budget
        assert sample.length <= length
        free = length - sample.length
        assert sample.length >= 0.95 * length or free <= _largest_unit(name, sample, counter)
        if name != "qa_2":  # HotpotQA has "yes" and "no"
            assert all(output in sample.input for output in sample.outputs)
        assert not sample.answer_prefix.endswith(" ")
        assert all(0 <= depth <= 1 for depth in sample.depths)
        located = task.needles is not None or task.questions is not None or name == "vt"
        assert bool(sample.depths) == located
        if task.needles is not None:
            assert len(sample.depths) == len(sample.outputs)


def _grid(lengths: Mapping[str, list[int]]) -> list[object]:
    return [
        pytest.param(name, length, tokenizer, id=f"{name}-{length}-{tokenizer}")
        for tokenizer in TOKENIZERS
        for length in lengths[tokenizer]
        for name in TASKS
    ]


# Tasks that need more than 512 tokens, and the length (a power of two) from which they fit.
BYTES = dict.fromkeys(TASKS, 1024) | {"cwe": 4096, "qa_2": 2048}
NEEDED = {
    "byte": BYTES,
    "sentencepiece": {"cwe": 4096},
    "word": {"cwe": 1024},
    "gpt2": {"cwe": 1024},
    "neox": {"cwe": 1024},
}


@pytest.mark.parametrize(("name", "length", "tokenizer"), _grid(THINNED))
def test_samples_fit_and_hold_their_answers(
    name: str, length: int, tokenizer: str, questions: dict[str, str]
) -> None:
    _fit_and_check(name, length, tokenizer, questions, count=4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length", "tokenizer"), _grid(dict.fromkeys(TOKENIZERS, LENGTHS)))
def test_samples_fit_at_all_lengths(
    name: str, length: int, tokenizer: str, questions: dict[str, str]
) -> None:
    files = {
        "squad": SHARED / "ruler" / "squad_v2_dev_half.json.gz",
        "hotpotqa": SHARED / "ruler" / "hotpotqa_distractor_sample100.json.gz",
    }
    if all(file.is_file() for file in files.values()):
        questions = {kind: str(file) for kind, file in files.items()}
    _fit_and_check(name, length, tokenizer, questions, count=20)


def _fit_and_check(
    name: str, length: int, tokenizer: str, questions: dict[str, str], count: int
) -> None:
    encoder = _tokenizer(tokenizer)
    try:
        samples = list(_shared_maker(tokenizer, questions).samples(name, length, count))
    except TooShortError:
        if length >= NEEDED[tokenizer].get(name, 0):
            raise
        return
    assert len(samples) == count
    assert [sample.index for sample in samples] == list(range(count))
    _check(name, length, samples, encoder)


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_functions_of_the_seed(name: str, questions: dict[str, str]) -> None:
    encoder = _tokenizer("byte")
    few = list(_maker(encoder, questions).samples(name, 4096, 5))
    many = list(_maker(encoder, questions).samples(name, 4096, 20))
    assert many[:5] == few
    assert len({sample.input for sample in many}) == 20
    other = list(_maker(encoder, questions, seed=1).samples(name, 4096, 5))
    assert not {sample.input for sample in other} & {sample.input for sample in few}


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("cwe", "fwe")])
def test_answers_stand_at_every_depth(name: str, questions: dict[str, str]) -> None:
    length = 32768 if TASKS[name].questions else 4096
    samples = list(_maker(_tokenizer("byte"), questions).samples(name, length, 300))
    if name == "vt":  # in order in every sample; together they stand everywhere
        assert all(sample.depths == sorted(sample.depths) for sample in samples)
    depths = np.sort([depth for sample in samples for depth in sample.depths])
    ranks = np.arange(1, len(depths) + 1) / len(depths)
    distance = max(np.max(ranks - depths), np.max(depths - ranks + 1 / len(depths)))
    # Kolmogorov-Smirnov at 0.1 %, the needles of a sample taken as one draw; and on top of it the
    # widest step between two places: a needle, a sentence or a document is up to 3 % of the rest.
    assert distance < 1.95 / np.sqrt(len(samples)) + 0.03


def test_500_samples_take_seconds(questions: dict[str, str]) -> None:
    maker = _maker(_tokenizer("byte"), questions)
    begin = time.process_time()
    samples = list(maker.samples("niah_multikey_2", 8192, 500))
    assert len(samples) == 500
    # Measured: 0.3 s of processor time.
    assert time.process_time() - begin < 10


def test_length_below_the_minimum_names_what_is_needed(questions: dict[str, str]) -> None:
    maker = _maker(_tokenizer("byte"), questions)
    with pytest.raises(TooShortError, match=r"task vt does not fit in 512 tokens.* has \d+ tokens"):
        list(maker.samples("vt", 512, 1))
    with pytest.raises(TooShortError, match=r"none of the 20 questions has documents that fit"):
        list(maker.samples("qa_2", 512, 1))


# --- what the contexts look like ------------------------------------------------------------------


def _one(name: str, questions: dict[str, str], length: int = 2048) -> Sample:
    return next(_shared_maker("word", questions).samples(name, length, 1))


def test_needles_are_asked_for_as_they_are_hidden(questions: dict[str, str]) -> None:
    sample = _one("niah_multiquery", questions)
    needles = dict(re.findall(r"magic numbers for ([\w-]+) is: (\d{7})\.", sample.input))
    assert len(needles) == 4
    asked = re.search(r"numbers for ([\w-]+), ([\w-]+), ([\w-]+), and ([\w-]+) ", sample.input)
    assert asked is not None
    assert [needles[key] for key in asked.groups()] == sample.outputs
    sample = _one("niah_multivalue", questions)
    values = re.findall(r"magic numbers for ([\w-]+) is: (\d{7})\.", sample.input)
    assert len({key for key, _ in values}) == 1
    assert {value for _, value in values} == set(sample.outputs)
    sample = _one("niah_single_3", questions)
    assert re.fullmatch(
        r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab]\w{3}-\w{12}", sample.outputs[0]
    )
    assert sample.input.startswith("A special magic uuid is hidden within the following text.")
    assert sample.answer_prefix.endswith("mentioned in the provided text is")
    for name in ("niah_multikey_2", "niah_multikey_3"):
        sample = _one(name, questions)
        lines = sample.input.split("\n")[1:-1]
        assert all(line.startswith("One of the special magic ") for line in lines)
        assert len(lines) == len(set(lines)) == sample.size + 1


def test_chain_leads_from_the_value_to_every_name(questions: dict[str, str]) -> None:
    sample = _one("vt", questions)
    example, task = sample.input.split("\n\nMemorize and track")
    for text, names in ((task, sample.outputs), (example, example.split()[-5:])):
        value = re.search(r"assigned the value (\d{5}) in", text)
        assert value is not None
        lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
        assert lines == list(zip(names, [value[1], *names], strict=False))
    assert sample.answer_prefix.endswith("they are:")


def test_common_words_are_the_most_common(questions: dict[str, str]) -> None:
    for length, repeats in ((2048, SHORT), (8192, LONG)):
        sample = _one("cwe", questions, length)
        example, task = sample.input.split("Below is a numbered list")[1:]
        for text, words, times in (
            (task, sample.outputs, repeats.question),
            (example.split(" Answer: ")[0], re.findall(r"\w+", example)[-19::2], repeats.example),
        ):
            entries = re.findall(r"(\d+)\. (\w+)", text)
            assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
            listed = [word for _, word in entries]
            counts = {word: listed.count(word) for word in set(listed)}
            assert {word for word, n in counts.items() if n == times[0]} == set(words)
            assert set(counts.values()) == set(times)


def test_frequent_words_are_unique_and_in_order(questions: dict[str, str]) -> None:
    for length in (512, 4096):
        sample = _one("fwe", questions, length)
        text = sample.input.split("coded words. ")[1].split("\nQuestion")[0].split(" ")
        counts = sorted(((text.count(word), word) for word in set(text)), reverse=True)
        assert counts[0][1] == "..."
        assert {word for _, word in counts[1:4]} == set(sample.outputs)
        assert counts[3][0] > counts[4][0]
        expected = zeta_counts(sample.size, (length - 50) // 50)
        assert sorted(expected[expected > 0].tolist(), reverse=True) == [n for n, _ in counts]


def test_gold_document_stands_once_and_anywhere(questions: dict[str, str]) -> None:
    data = load_questions("squad", questions["squad"])
    by_query = {question.query: question for question in data.questions}
    places = set()
    # More documents are asked for than there are: others are repeated, the gold one is not.
    for sample in _shared_maker("word", questions).samples("qa_1", 32768, 5):
        (query,) = re.findall(r"Question: (.*)", sample.input)
        parts = sample.input.split("\n\n")[2:-2]
        documents = [part.split(":\n", 1)[1] for part in parts]
        assert [part.split(":")[0] for part in parts] == [
            f"Document {i}" for i in range(1, len(parts) + 1)
        ]
        gold = data.documents[by_query[query].gold[0]]
        assert documents.count(gold) == 1
        assert set(documents) == set(data.documents)
        places.add(documents.index(gold))
    assert len(places) > 1


def test_hotpotqa_needs_its_supporting_documents_only(questions: dict[str, str]) -> None:
    data = load_questions("hotpotqa", questions["hotpotqa"])
    assert {len(question.gold) for question in data.questions} == {2}
    assert {len(question.given) for question in data.questions} == {10}
    for sample in _shared_maker("word", questions).samples("qa_2", 512, 5):
        assert len(sample.depths) == 2
        assert sample.outputs[0] in sample.input


# --- frames ---------------------------------------------------------------------------------------


def test_chat_template_stands_around_the_question(questions: dict[str, str]) -> None:
    tokenizer = _tokenizer("byte")
    frame = make_frame("chat", tokenizer, 1)
    sample = next(_maker(tokenizer, questions, frame).samples("niah_single_1", 1024, 1))
    assert sample.input.startswith("<|endoftext|><|user|>A special magic number")
    assert sample.input.endswith("mentioned in the provided text?<|end|><|assistant|>")
    assert sample.answer_prefix.startswith(" The special magic number")
    ids = tokenizer(sample.input + sample.answer_prefix, add_special_tokens=False)["input_ids"]
    assert len(ids) == sample.tokens <= 1024 - 128
    assert ids[:2] == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"])
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        make_frame("chat", _tokenizer("word"), 0)


def test_tokens_before_the_text_count(questions: dict[str, str]) -> None:
    maker = _maker(_tokenizer("byte"), questions, Frame(prefix_tokens=1))
    sample = next(maker.samples("niah_single_2", 1024, 1))
    assert sample.tokens == len((sample.input + sample.answer_prefix).encode()) + 1
    assert 0.95 * 1024 <= sample.length <= 1024


# --- sources --------------------------------------------------------------------------------------


def test_sentences_end_where_a_reader_would_end_them() -> None:
    text = "Mr. Smith of St. Ives went. “Why?” he asked. It cost 3.5 pounds! J. Doe did. 7 did not."
    words = text.split()
    ends = sentence_ends(words)
    sentences = [" ".join(words[a:b]) for a, b in pairwise([0, *ends])]
    assert sentences == [
        "Mr. Smith of St. Ives went.",
        "“Why?” he asked.",
        "It cost 3.5 pounds!",
        "J. Doe did.",
        "7 did not.",
    ]


def test_haystack_may_be_another_file(tmp_path: Path, questions: dict[str, str]) -> None:
    (tmp_path / "essays.json").write_text(json.dumps({"text": "A short one. Then more.\n" * 40}))
    maker = _maker(_tokenizer("word"), questions, haystack=str(tmp_path / "essays.json"))
    # The file has 240 tokens: it is repeated.
    sample = next(maker.samples("niah_single_2", 1024, 1))
    assert sample.input.count("A short one.") > 100
    assert sample.length > 0.95 * 1024
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text"):
        load_haystack(str(tmp_path / "empty.txt"))
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        load_haystack(str(tmp_path / "none.txt"))


def test_training_keys_share_no_word_with_the_samples() -> None:
    keys = key_words()
    kept = {*keys.adjectives[True], *keys.nouns[True]}
    others = {*keys.adjectives[False], *keys.nouns[False]}
    assert not kept & others
    assert 0.08 < len(kept) / (len(kept) + len(others)) < 0.17
    assert len(keys.adjectives[False]) * len(keys.nouns[False]) > 3_000_000
    assert KeyWords(["a", "b"], ["c"]).draw(Random(0)) in ("a-c", "b-c")


def test_words_to_count_never_run_out() -> None:
    words = counted_words()
    assert len(words) > 17_000
    drawn = draw_words(Random(0), words, len(words) + 5000)
    assert len(set(drawn)) == len(drawn) == len(words) + 5000
    assert set(words) - set(drawn) == set() or len(set(drawn) - set(words)) == 5000
    assert drawn == draw_words(Random(0), words, len(words) + 5000)


def test_sorted_pairs_are_the_sorted_set() -> None:
    adjectives = ["b", "teeny", "teeny-tiny", "a", "a b", "b", "teeny-t"]
    nouns = ["x", "tiny-x", "tiny", "a", "x"]
    pairs = SortedPairs(adjectives, nouns)
    expected = sorted({f"{a}-{n}" for a in adjectives for n in nouns})
    assert [pairs[i] for i in range(len(pairs))] == expected


def test_insert_keeps_all_lines_in_order() -> None:
    assert insert(["a", "b"], [(2, "z"), (0, "x"), (1, "y"), (1, "w")]) == list("xaywbz")


def test_questions_in_the_columns_of_the_hub(tmp_path: Path, questions: dict[str, str]) -> None:
    rows = [
        {
            "title": article["title"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {"text": [answer["text"] for answer in qa["answers"]]},
        }
        for article in squad()["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    file = tmp_path / "squad.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_questions("squad", str(file)) == load_questions("squad", questions["squad"])
    columns = [
        {
            **row,
            "context": {
                "title": [title for title, _ in row["context"]],
                "sentences": [lines for _, lines in row["context"]],
            },
            "supporting_facts": {"title": [title for title, _ in row["supporting_facts"]]},
        }
        for row in hotpotqa()
    ]
    file = tmp_path / "hotpotqa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in columns))
    expected = load_questions("hotpotqa", questions["hotpotqa"])
    assert load_questions("hotpotqa", str(file)) == expected


def test_broken_questions_are_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("empty.json", "", "is not JSON"),
        ("none.json", '{"data": []}', "holds no question that has an answer"),
        ("other.json", '{"data": [{"text": "x"}]}', "does not have the layout of squad"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_questions("squad", str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        load_questions("hotpotqa", str(tmp_path / "missing.json"))
