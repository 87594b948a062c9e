"""Every generator against a solver in plain Python that sees only what stands before a label."""

import collections

import pytest
import torch

from eval.tasks import IGNORED, TASKS, Lengths, check_fits, make_task, pack, seeded
from eval.tasks.base import distinct, random_places
from eval.tasks.tracking import group, product_table

BYTES = lambda text: list(text.encode())  # noqa: E731

# name, options, lengths
CASES = [
    ("string_copy", {"alphabet": 5}, "1-9"),
    ("ngram_lookup", {"key": "prefix"}, "7-20"),
    ("ngram_lookup", {"key": "suffix", "n": 2, "answer": 3}, "5-20"),
    ("selective_copy", {"data_tokens": 4}, "4-20"),
    ("induction_heads", {}, "3-20"),
    ("copy_memory", {"symbols": 4}, "1-9"),
    ("delay", {"delay": 3}, "4-20"),
    ("delay", {"delay": 0}, "1-9"),
    ("mqar", {"vocabulary": 64, "min_context": 16, "max_context": 64}, "2-8"),
    ("mqar", {"vocabulary": 64, "min_context": 32, "max_context": 32}, "8"),
    ("mqar", {"vocabulary": 4096, "random_fillers": False}, "4"),
    ("needles", {"keys": 5, "vocabulary": 8}, "10-30"),
    ("needles", {"keys": 5, "fewest": 1, "vocabulary": 8}, "10-30"),
    ("directory", {}, "1-12"),
    ("directory", {"letters": 3, "name": 2, "number": 2, "questions": 3}, "3-9"),
    ("parity", {}, "1-20"),
    ("parity", {"running": False}, "1-20"),
    ("word_problem", {"name": "Z5"}, "1-20"),
    ("word_problem", {"name": "S3"}, "1-20"),
    ("word_problem", {"name": "A5", "inputs": "generators"}, "1-20"),
    ("word_problem", {"name": "S5", "inputs": "swaps", "running": False}, "1-20"),
    ("modular_arithmetic", {}, "1-20"),
    ("modular_arithmetic", {"running": True, "modulus": 3}, "1-20"),
    ("modular_arithmetic", {"brackets": True}, "1-30"),
    ("phone_book", {}, "3-12"),
]
cases = pytest.mark.parametrize(
    ("name", "options", "lengths"), CASES, ids=[f"{c[0]}{i}" for i, c in enumerate(CASES)]
)


def drawn(name, options, lengths, seed=0, count=64):
    task = make_task(name, options, BYTES)
    generator = seeded(seed, "test")
    wanted = Lengths.parse(lengths).draw(count, generator)
    return task, wanted, task.sample(wanted, generator)


def solve(name, options, before):
    """The label that follows the tokens `before`."""
    return SOLVERS[name](before, options)


def _string_copy(before, options):
    at = before.index(2)
    done = len(before) - at - 1
    return [*before[1:at], 3][done]


def _ngram_lookup(before, options):
    n, answer = options.get("n", 3), options.get("answer", 4)
    first = before.index(2)
    if options["key"] == "prefix":
        key, rest = before[1 : 1 + n], before[first + 1 :]
        text, said = rest[: rest.index(2)], rest[rest.index(2) + 1 :]
    else:
        text, key, said = before[1:first], before[first + 1 :][:n], before[first + 1 + n :]
    places = [i for i in range(len(text) - n + 1) if text[i : i + n] == key]
    assert len(places) == 1
    return [*text[places[0] + n :][:answer], 3][len(said)]


def _selective_copy(before, options):
    data = [token for token in before if token >= 3]
    return data[before.count(2) - 1]


def _induction_heads(before, options):
    assert before[-1] == 1
    assert before.count(1) == 2
    return before[before.index(1) + 1]


def _copy_memory(before, options):
    return before[len(before) - before.index(2) - 1]


def _delay(before, options):
    return before[-1 - options["delay"]]


def _mqar(before, options):
    # The key asked is the last token; fillers may equal it, so the pairs stand at the front.
    keys = before[0 : len(before) : 2]
    return before[2 * keys.index(before[-1]) + 1]


def _needles(before, options):
    assert before[-2] == 1
    return before[before.index(before[-1]) + 1]


def _directory(before, options):
    name, size = options.get("name", 3), options.get("name", 3) + options.get("number", 4)
    at = before.index(1)
    book = {tuple(before[i : i + name]): before[i + name : i + size] for i in range(0, at, size)}
    assert len(book) == at // size
    said = before[at + 1 :]
    begin = len(said) // size * size
    return book[tuple(said[begin : begin + name])][len(said) - begin - name]


def _word(before, options):
    elements = group(options.get("name", "Z2"))
    product = elements[0]
    for token in before:
        product = tuple(elements[token - 2][i] for i in product)
    return 2 + elements.index(product)


def _modular(before, options):
    modulus = options.get("modulus", 5)
    signs = {1: "+", 2: "-", 3: "*", 4: "(", 5: ")", 6: ""}
    text = "".join(signs.get(token) or str(token - 7) for token in before if token != 6)
    return 7 + eval(text) % modulus


def _phone_book(before, options):
    lines = bytes(before).decode().split("\n")
    asked, said = lines[-1].split(":")
    (number,) = {line.split(":")[1] for line in lines[:-1] if line.startswith(asked + ":")}
    return BYTES(number)[len(said)]


SOLVERS = {
    "string_copy": _string_copy,
    "ngram_lookup": _ngram_lookup,
    "selective_copy": _selective_copy,
    "induction_heads": _induction_heads,
    "copy_memory": _copy_memory,
    "delay": _delay,
    "mqar": _mqar,
    "needles": _needles,
    "directory": _directory,
    "parity": _word,
    "word_problem": _word,
    "modular_arithmetic": _modular,
    "phone_book": _phone_book,
}


def test_every_task_has_a_case() -> None:
    assert {case[0] for case in CASES} | {"text_copy"} == set(TASKS)


@cases
def test_labels_follow_from_what_stands_before_them(name, options, lengths) -> None:
    _, _, samples = drawn(name, options, lengths)
    asked = 0
    for ids, labels in zip(samples.input_ids.tolist(), samples.labels.tolist(), strict=True):
        assert labels[0] == IGNORED
        for at, label in enumerate(labels):
            if label != IGNORED:
                asked += 1
                assert label == solve(name, options, ids[:at]), (ids, at)
    assert asked >= 64


@cases
def test_shapes_sizes_and_ranges(name, options, lengths) -> None:
    task, wanted, samples = drawn(name, options, lengths)
    assert samples.input_ids.shape == samples.labels.shape
    assert samples.input_ids.dtype == samples.labels.dtype == torch.int64
    bound = torch.tensor([task.tokens(length) for length in wanted.tolist()])
    is_exact = name not in ("phone_book", "modular_arithmetic")
    assert ((samples.lengths == bound) if is_exact else (samples.lengths <= bound)).all()
    padding = torch.arange(samples.input_ids.shape[1]) >= samples.lengths[:, None]
    assert (samples.input_ids[padding] == 0).all()
    assert (samples.labels[padding] == IGNORED).all()
    assert ((samples.labels != IGNORED).sum(1) > 0).all()
    if task.vocab_size is not None:
        assert samples.input_ids.min() >= 0
        assert samples.input_ids.max() < task.vocab_size
        assert samples.labels.max() < task.vocab_size


@cases
def test_a_seed_decides_everything(name, options, lengths) -> None:
    _, _, first = drawn(name, options, lengths)
    _, _, again = drawn(name, options, lengths)
    _, _, other = drawn(name, options, lengths, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.input_ids, other.input_ids)


# Tasks in which the next input is not the answer: there it must say nothing about the answer. Words
# of two generators or of swaps are left out, their first products are among few elements.
ASKED = [
    c
    for c in CASES
    if c[0] not in ("string_copy", "ngram_lookup", "directory", "phone_book")
    and "inputs" not in c[1]
]


@pytest.mark.parametrize(
    ("name", "options", "lengths"), ASKED, ids=[f"{c[0]}{i}" for i, c in enumerate(ASKED)]
)
def test_inputs_do_not_hold_the_answer(name, options, lengths) -> None:
    """The input in an answer's place equals the answer no more often than chance allows."""
    task, _, samples = drawn(name, options, lengths, count=512)
    asked = samples.labels != IGNORED
    hits = (samples.input_ids == samples.labels)[asked].float()
    # Up to four standard deviations above what independent tokens would give.
    chance = 1 / task.choices
    limit = chance + 4 * (chance * (1 - chance) / len(hits)) ** 0.5
    assert hits.mean() <= limit


def test_exact_samples() -> None:
    """Layouts, spelled out once."""
    _, _, copy = drawn("string_copy", {"alphabet": 2}, "2", count=1)
    a, b = copy.input_ids[0, 1:3].tolist()
    assert copy.input_ids[0].tolist() == [1, a, b, 2, a, b, 3]
    assert copy.labels[0].tolist() == [IGNORED] * 4 + [a, b, 3]

    _, _, book = drawn("phone_book", {"examples": 1}, "3", count=1)
    lines = bytes(book.input_ids[0, : book.lengths[0]].tolist()).decode().split("\n")
    assert [len(line.split(": ")) for line in lines if line] == [2] * 5
    assert lines[3] == lines[5] == ""
    assert lines[4] in lines[:3]
    assert lines[6] in lines[:3]
    assert lines[4] != lines[6]
    answer = bytes(book.labels[0][book.labels[0] != IGNORED].tolist()).decode()
    assert answer == lines[6].split(":")[1]


def test_letters_are_uniform() -> None:
    _, _, samples = drawn("string_copy", {}, "50", count=400)
    counts = torch.bincount(samples.input_ids[:, 1:51].flatten() - 4, minlength=26)
    expected = 400 * 50 / 26
    # Chi-square with 25 degrees of freedom: above 60 once in 10,000 seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 60


@pytest.mark.parametrize("key", ["prefix", "suffix"])
def test_ngrams_asked_for_are_anywhere(key) -> None:
    options = {"key": key, "n": 3, "answer": 2}
    _, _, samples = drawn("ngram_lookup", options, "14", count=1000)
    places = collections.Counter()
    for ids in samples.input_ids.tolist():
        if key == "prefix":
            wanted, text = ids[1:4], ids[5:19]
        else:
            wanted, text = ids[16:19], ids[1:15]
        places[next(i for i in range(12) if text[i : i + 3] == wanted)] += 1
    assert sorted(places) == list(range(10))
    assert max(places.values()) < 150  # five standard deviations above 100


def test_strings_with_too_few_ngrams_are_refused() -> None:
    task = make_task("ngram_lookup", {"alphabet": 4, "n": 2, "answer": 1})
    assert task.sample([8] * 20, seeded(0)).input_ids.shape == (20, 15)
    with pytest.raises(ValueError, match="too many of the 16 n-grams"):
        task.sample([9], seeded(0))
    with pytest.raises(ValueError, match="too many of the 16 n-grams"):
        check_fits(task, Lengths.parse("3-9"), 100)


def test_selected_tokens_stand_anywhere() -> None:
    _, _, samples = drawn("selective_copy", {"data_tokens": 2}, "10", count=2000)
    share = (samples.input_ids[:, :10] >= 3).float().mean(0)
    assert torch.allclose(share, torch.full((10,), 0.2), atol=0.045)  # five standard deviations


def test_needles_stand_anywhere_and_do_not_overlap() -> None:
    task, _, samples = drawn(
        "needles", {"keys": 3, "vocabulary": 4, "fillers": 2}, "12", count=3000
    )
    is_key = (samples.input_ids >= 4) & (samples.input_ids < 8)
    is_value = samples.input_ids >= 8
    assert torch.equal(is_key[:, :11], is_value[:, 1:12])
    assert (is_value.sum(1) == 3).all()
    # The first of 3 dominoes in 12 places: 9 choose 2 of 9 choose 3 begin at 0, and so at the end.
    share = is_key[:, :11].float().mean(0)
    assert share[0] == pytest.approx(1 / 3, abs=0.045)
    assert share[10] == pytest.approx(1 / 3, abs=0.045)
    assert task.tokens(12) == 15


def test_the_number_of_needles_is_uniform() -> None:
    options = {"keys": 4, "fewest": 2, "vocabulary": 8, "fillers": 2}
    _, _, samples = drawn("needles", options, "12", count=900)
    is_value = samples.input_ids[:, :12] >= 12
    counts = torch.bincount(is_value.sum(1), minlength=5)
    assert counts[:2].sum() == 0
    assert ((counts[2:] - 300).abs() < 75).all()  # five standard deviations


def test_mqar_follows_upstream_settings() -> None:
    train = make_task("mqar", {"tokens_per_pair": 16, "min_context": 64, "max_context": 256})
    assert [train.context(k) for k in (4, 8, 16, 32, 64)] == [64, 128, 256, 256, 256]
    test = make_task("mqar", {})
    assert [test.context(k) for k in (4, 8, 16, 32, 64, 128, 256)] == [
        64,
        64,
        64,
        128,
        256,
        512,
        1024,
    ]


def test_mqar_pairs_are_distinct_and_questions_come_early() -> None:
    options = {"vocabulary": 64, "min_context": 64}
    _, _, samples = drawn("mqar", options, "8", count=500)
    keys, values = samples.input_ids[:, 0:16:2], samples.input_ids[:, 1:16:2]
    for tokens, low, high in ((keys, 1, 32), (values, 32, 64)):
        assert low <= tokens.min()
        assert tokens.max() < high
        assert (tokens.sort(1).values.diff() > 0).all()
    slots = (samples.labels != IGNORED).nonzero()[:, 1] - 1
    assert (slots % 2 == 0).all()
    by_slot = torch.bincount((slots - 16) // 2, minlength=24)
    assert by_slot[0] == 500 or by_slot[0] > 450  # weight 1 of about 4: nearly always drawn
    assert by_slot[0] > 3 * by_slot[12]
    every_key_once = samples.input_ids.gather(1, slots.view(500, 8)).sort(1).values
    assert torch.equal(every_key_once, keys.sort(1).values)


@pytest.mark.parametrize(
    ("name", "size"), [("Z2", 2), ("Z7", 7), ("S3", 6), ("A4", 12), ("A5", 60), ("S5", 120)]
)
def test_groups(name, size) -> None:
    table = product_table(name)
    assert table.shape == (size, size)
    assert table[0].tolist() == table[:, 0].tolist() == list(range(size))  # identity first
    everything = torch.arange(size)
    assert all(torch.equal(row.sort().values, everything) for row in table)
    a, b, c = torch.randint(size, (3, 200))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    is_abelian = name[0] == "Z"
    assert torch.equal(table, table.T) == is_abelian


def test_word_problem_labels_are_uniform() -> None:
    """Products of uniform elements are uniform: no position is easier to guess."""
    _, _, samples = drawn("word_problem", {"name": "S3"}, "6", count=3000)
    for at in range(1, 7):
        counts = torch.bincount(samples.labels[:, at] - 2, minlength=6)
        assert ((counts - 500) ** 2 / 500).sum() < 30  # 5 degrees of freedom: once in 50,000


def test_brackets_take_many_shapes() -> None:
    _, _, samples = drawn("modular_arithmetic", {"brackets": True}, "13", count=200)
    shapes = {tuple(t * (t in (4, 5)) for t in row) for row in samples.input_ids.tolist()}
    assert len(shapes) == 5  # the binary trees of four leaves


def test_text_copy(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the quick\nbrown  fox jumps over\nthe lazy dog " * 4)
    task = make_task("text_copy", {"file": str(file)}, BYTES)
    samples = task.sample([20, 9], seeded(0))
    ids, labels = samples.input_ids[1], samples.labels[1]
    text = bytes(ids[: samples.lengths[1]].tolist()).decode()
    passage = text[:9]
    assert text == f"{passage}\n\n{passage}\n\n{passage}"
    assert passage in " ".join(file.read_text().split())
    assert bytes(labels[labels != IGNORED].tolist()).decode() == passage[1:]
    assert samples.lengths.tolist() == [task.tokens(20), task.tokens(9)]

    shuffled = make_task("text_copy", {"file": str(file), "shuffled": True}, BYTES)
    ids = shuffled.sample([60], seeded(0)).input_ids[0].tolist()
    assert ids[:60] == ids[62:122]
    whole = " ".join(file.read_text().split())
    assert bytes(ids[:60]).decode() not in whole
    with pytest.raises(ValueError, match="fewer than the length"):
        task.sample([10_000], seeded(0))


def test_phone_book_names_differ() -> None:
    task = make_task("phone_book", {}, BYTES)
    prompt, _ = task.texts(3000, seeded(0))
    names = [line.split(":")[0] for line in prompt.split("\n")[:3000]]
    assert len(set(names)) == 3000
    with pytest.raises(ValueError, match="at most"):
        task.sample([10**6], seeded(0))


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [True, False])
@cases
def test_rows_hold_whole_samples(name, options, lengths, several) -> None:
    """Every piece between two restarts of the positions is a sample, solvable on its own."""
    task = make_task(name, options, BYTES)
    row_tokens = 2 * task.tokens(max(Lengths.parse(lengths).values)) + 5
    rows = pack(
        task,
        Lengths.parse(lengths),
        rows=3,
        row_tokens=row_tokens,
        generator=seeded(0),
        several=several,
    )
    ids, labels, positions = (rows[key] for key in ("input_ids", "labels", "position_ids"))
    assert ids.shape == labels.shape == positions.shape == (3, row_tokens)
    assert (positions[:, 0] == 0).all()
    assert ((positions[:, 1:] == 0) | (positions[:, 1:] == positions[:, :-1] + 1)).all()
    for row in range(3):
        starts = (positions[row] == 0).nonzero()[:, 0].tolist()
        pieces = list(zip(starts, [*starts[1:], row_tokens], strict=True))
        asking = [(a, b) for a, b in pieces if (labels[row, a:b] != IGNORED).any()]
        assert len(asking) == 1 if not several else len(asking) >= 2
        for begin, end in pieces:
            piece = ids[row, begin:end].tolist()
            for at, label in enumerate(labels[row, begin:end].tolist()):
                if label != IGNORED:
                    assert label == solve(name, options, piece[:at])


def test_without_borders_a_row_is_one_document() -> None:
    task = make_task("string_copy", {})
    lengths = Lengths.parse("2-6")
    with_borders, without = (
        pack(task, lengths, rows=3, row_tokens=40, generator=seeded(0), borders=borders)
        for borders in (True, False)
    )
    for name in ("input_ids", "labels"):
        assert torch.equal(with_borders[name], without[name])
    assert (with_borders["position_ids"] == 0).sum() > 3
    assert torch.equal(without["position_ids"], torch.arange(40).repeat(3, 1))


def test_packed_rows_are_nearly_full() -> None:
    task = make_task("string_copy", {})
    rows = pack(task, Lengths.parse("5-50"), rows=50, row_tokens=220, generator=seeded(0))
    assert (rows["input_ids"] != 0).float().mean() > 0.75


def test_packing_keeps_the_distribution_of_lengths() -> None:
    task = make_task("parity", {})
    rows = pack(task, Lengths.parse("3-40"), rows=400, row_tokens=160, generator=seeded(0))
    ends = (rows["input_ids"] == 1).nonzero()
    found = rows["position_ids"][ends[:, 0], ends[:, 1]]
    # Lengths are uniform of mean 21.5; the last of a row that did not fit begins the next one.
    assert found.float().mean() == pytest.approx(21.5, abs=1)
    assert found.min() == 3
    assert found.max() == 40


def test_what_does_not_fit_is_refused() -> None:
    copy = make_task("string_copy", {})
    with pytest.raises(ValueError, match="longest sample has 103 tokens, a row 102"):
        check_fits(copy, Lengths.parse("5-50"), 102)
    check_fits(copy, Lengths.parse("5-50"), 103)
    with pytest.raises(ValueError, match="below the smallest possible, 7"):
        make_task("ngram_lookup", {}).sample([6], seeded(0))
    directory = make_task("directory", {"letters": 3, "name": 2, "questions": 2})
    with pytest.raises(ValueError, match="10 entries, but only 9 names of 2 of 3 letters"):
        directory.sample([10], seeded(0))
    with pytest.raises(ValueError, match="below the smallest possible, 2"):
        directory.sample([1], seeded(0))
    mqar = make_task("mqar", {"min_context": 16, "max_context": 16})
    with pytest.raises(ValueError, match="context is 16"):
        mqar.sample([5], seeded(0))
    with pytest.raises(ValueError, match="list of lengths"):
        copy.sample([], seeded(0))


# --- options and building blocks ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stringcopy", {}, "closest is 'string_copy'"),
        ("string_copy", {"alphabeth": 3}, "closest is 'alphabet'"),
        ("string_copy", {"alphabet": "3"}, "must be of type int"),
        ("string_copy", {"alphabet": True}, "must be of type int"),
        ("string_copy", {"alphabet": 1}, "2 or more"),
        ("ngram_lookup", {"key": "middle"}, "prefix"),
        ("ngram_lookup", {"n": 0}, "1 or more"),
        ("ngram_lookup", {"answer": 0}, "1 or more"),
        ("selective_copy", {"data_tokens": 0}, "1 or more"),
        ("induction_heads", {"alphabet": 1}, "2 or more"),
        ("copy_memory", {"symbols": 0}, "1 or more"),
        ("delay", {"delay": -1}, "0 or more"),
        ("mqar", {"tokens_per_pair": 2}, "4 or more"),
        ("mqar", {"vocabulary": 2}, "4 or more"),
        ("mqar", {"power": 0.0}, "above 0"),
        ("needles", {"keys": 300}, "between 1 and"),
        ("directory", {"number": 0}, "number must be 1 or more"),
        ("needles", {"keys": 3, "fewest": 4}, "between 0 and keys"),
        ("parity", {"name": "S3"}, "Z2"),
        ("word_problem", {"name": "Q8"}, "must be"),
        ("word_problem", {"name": "S9"}, "n <= 6"),
        ("word_problem", {"name": "A4", "inputs": "swaps"}, "holds none"),
        ("word_problem", {"inputs": "some"}, "swaps or generators"),
        ("modular_arithmetic", {"modulus": 1}, "2 or more"),
        ("modular_arithmetic", {"brackets": True, "running": True}, "no value"),
        ("text_copy", {}, r"needs the options \['file'\]"),
    ],
)
def test_wrong_options_are_refused(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, options, BYTES)


def test_a_task_of_text_needs_a_tokenizer_and_its_text() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_task("phone_book", {})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        make_task("text_copy", {"file": "nowhere.txt"}, BYTES)


def test_lengths() -> None:
    assert Lengths.parse("3-5").values == (3, 4, 5)
    assert Lengths.parse("4, 8,16-17").values == (4, 8, 16, 17)
    assert set(Lengths.parse("3-5").draw(100, seeded(0)).tolist()) == {3, 4, 5}
    for wrong in ("", "a", "5-3", "3-", "-3", "3.5"):
        with pytest.raises(ValueError, match="expected a range"):
            Lengths.parse(wrong)


def test_streams_of_different_purposes_differ() -> None:
    draws = [torch.rand(4, generator=seeded(0, *parts)) for parts in ((), ("train",), ("eval",))]
    draws.append(torch.rand(4, generator=seeded(1, "train")))
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


@pytest.mark.parametrize("high", [6, 40])
def test_distinct_numbers_are_uniform_in_every_order(high) -> None:
    drawn = distinct(1, 1 + high, 4000, 3, seeded(0))
    assert (drawn.sort(1).values.diff() > 0).all()
    for column in range(3):
        counts = torch.bincount(drawn[:, column] - 1, minlength=high)
        expected = 4000 / high
        # Chi-square: five standard deviations above its mean, the degrees of freedom.
        assert ((counts - expected) ** 2 / expected).sum() < high - 1 + 5 * (2 * (high - 1)) ** 0.5
    with pytest.raises(ValueError, match="cannot draw"):
        distinct(0, 2, 1, 3, seeded(0))


def test_random_places() -> None:
    widths, counts = torch.tensor([5, 9]), torch.tensor([2, 4])
    for seed in range(20):
        places = random_places(widths, counts, 4, seeded(seed))
        assert (places[0, :2].diff() > 0).all()
        assert places[0, 1] < 5
        assert places[0, 2:].tolist() == [5, 5]
        assert (places[1].diff() > 0).all()
        assert places[1, 3] < 9
