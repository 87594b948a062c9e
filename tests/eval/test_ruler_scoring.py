"""Scores of RULER, and what is made of them."""

import pytest

from eval.ruler.options import RulerOptions
from eval.ruler.results import by_depth, effective_lengths, summarise, weighted_means
from eval.ruler.scoring import clean, found, score, task_score, wilson

# (prediction, references, share found, any found); the two last columns were compared with the two
# metrics of NVIDIA's evaluation script at c3f5e3b, the cleaning before them included.
CASES = [
    ("4712345", ["4712345"], 1.0, 1.0),
    (" 4712345.", ["4712345"], 1.0, 1.0),
    ("", ["4712345"], 0.0, 0.0),
    (" \n\t ", ["4712345"], 0.0, 0.0),
    ("471234", ["4712345"], 0.0, 0.0),
    ("47123456", ["4712345"], 1.0, 1.0),
    ("4712345 and what else there is to say", ["4712345"], 1.0, 1.0),
    ("471\x002345", ["4712345"], 0.0, 0.0),
    ("4712345\x00", ["4712345"], 1.0, 1.0),
    ("\x1b4712345\x07", ["4712345"], 1.0, 1.0),
    ("4,712,345", ["4712345"], 0.0, 0.0),
    ("AbCdE fghij", ["ABCDE", "FGHIJ"], 1.0, 1.0),
    ("abcde", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"], 0.25, 1.0),
    ("abcdefghij", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"], 0.5, 1.0),
    ("1. art 2. cat", ["art", "cat", "dog"], 2 / 3, 1.0),
    ("a party of cattle", ["art", "cat", "dog"], 2 / 3, 1.0),
    ("The Eiffel\nTower", ["Eiffel Tower", "the Eiffel Tower"], 0.0, 0.0),
    ("The Eiffel\tTower", ["Eiffel Tower"], 0.0, 0.0),
    ("the Eiffel Tower in Paris", ["Eiffel Tower", "tower of Paris"], 0.5, 1.0),
    ("I do not know", ["no"], 1.0, 1.0),
    ("STRASSE", ["straße"], 0.0, 0.0),
    ("ÉCOLE", ["école"], 1.0, 1.0),
    ("İstanbul", ["istanbul"], 0.0, 0.0),
    ("x\x7fy", ["x\x7fy"], 1.0, 1.0),
    ("x\x85y", ["x\x85y"], 1.0, 1.0),
    ("\u00a04712345\u2003", ["4712345"], 1.0, 1.0),
    ("a\r\nb", ["a\n\nb"], 1.0, 1.0),
    ("anything", [""], 1.0, 1.0),
    ("  ab  ", ["ab "], 0.0, 0.0),
    ("twice twice", ["twice", "twice"], 1.0, 1.0),
]


@pytest.mark.parametrize(("prediction", "references", "share", "any_found"), CASES)
def test_scores_are_those_of_upstream(
    prediction: str, references: list[str], share: float, any_found: float
) -> None:
    assert score(prediction, references, "all") == pytest.approx(share)
    assert score(prediction, references, "any") == any_found
    assert sum(found(prediction, references)) == pytest.approx(share * len(references))


def test_task_scores_are_those_of_upstream() -> None:
    predictions = [case[0] for case in CASES]
    references = [case[1] for case in CASES]
    # Upstream's functions on these cases.
    assert task_score(predictions, references, "all") == UPSTREAM_ALL
    assert task_score(predictions, references, "any") == UPSTREAM_ANY


UPSTREAM_ALL = 58.61
UPSTREAM_ANY = 66.67


def test_cleaning_strips_before_and_after_control_characters() -> None:
    assert clean("\x00 a\x1fb \x00") == "a\nb"
    assert clean("\x00\x01") == ""


def test_a_sample_needs_references() -> None:
    with pytest.raises(ValueError, match="without references"):
        score("x", [], "all")


def test_wilson_intervals() -> None:
    # Published examples: 0 of 10, 81 of 263 (Newcombe 1998, table I).
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(1.0, 50)[1] == pytest.approx(1.0)
    low, high = wilson(0.5, 500)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 500) ** 0.5, rel=0.01)


def test_effective_lengths() -> None:
    curve = [(4096, 90.0), (8192, 86.0), (16384, 85.6), (32768, 81.0), (65536, 80.9)]
    effective = effective_lengths(curve)
    assert effective["absolute"] == {"threshold": 85.6, "length": 8192}  # above, not equal
    assert effective["relative"]["length"] == 32768
    assert effective["relative"]["threshold"] == pytest.approx(81.0)
    small = effective_lengths([(1024, 40.0), (2048, 10.0)])
    assert (small["absolute"]["length"], small["relative"]["length"]) == (None, 1024)
    nothing = effective_lengths([(1024, 0.0), (2048, 0.0)])
    assert (nothing["absolute"]["length"], nothing["relative"]["length"]) == (None, None)


def test_weighted_means_are_the_published_ones() -> None:
    # Jamba-1.5-large at 4K to 128K: 95.7 and 96.3.
    means = [96.7, 96.6, 96.4, 96.0, 95.4, 95.1]
    weighted = weighted_means(means)
    assert weighted["increasing"] == pytest.approx(95.7, abs=0.05)
    assert weighted["decreasing"] == pytest.approx(96.3, abs=0.05)


def _judged(score: float, depths: list[float], found: list[bool], text: str = "x") -> dict:
    return {
        "score": score,
        "tokens": 900,
        "length": 1000,
        "depths": depths,
        "found": found,
        "prediction": text,
    }


def test_needles_are_sorted_by_depth() -> None:
    samples = [
        _judged(0.5, [0.0, 0.19], [True, False]),
        _judged(1.0, [0.2], [True]),
        _judged(0.0, [1.0], [False]),
    ]
    rows = by_depth(samples)
    assert [row["needles"] for row in rows] == [2, 1, 0, 0, 1]
    assert [row["score"] for row in rows] == [50.0, 100.0, None, None, 0.0]


def test_means_are_of_the_tasks_that_ran_at_every_length() -> None:
    options = RulerOptions(tasks=["niah_single_1", "vt", "cwe"], lengths=[2048, 1024], samples=2)
    one, none = _judged(1.0, [0.5], [True]), _judged(0.0, [0.9], [False], " \n")
    cells = {
        ("niah_single_1", 1024): [one, one],
        ("niah_single_1", 2048): [one, none],
        ("vt", 1024): [none, none],
        ("vt", 2048): [none, none],
        ("cwe", 2048): [one, one],
    }
    results = summarise(options, cells, {("cwe", 1024): "too few tokens"}, {})
    assert results["left_out"] == [{"task": "cwe", "length": 1024, "reason": "too few tokens"}]
    assert results["averaged"] == ["niah_single_1", "vt"]
    assert [row["length"] for row in results["means"]] == [1024, 2048]
    assert [row["mean"] for row in results["means"]] == [50.0, 25.0]
    assert results["means"][1]["categories"] == {"retrieval": 50.0, "tracking": 0.0}
    cell = next(c for c in results["cells"] if (c["task"], c["length"]) == ("niah_single_1", 2048))
    assert cell["nulls"] == 0.5
    assert cell["missed"] == [0.9]
    assert cell["fill"]["mean"] == pytest.approx(1000 / 2048)
    assert cell["interval"] == [pytest.approx(9.45, abs=0.01), pytest.approx(90.55, abs=0.01)]
    assert results["effective"]["relative"]["length"] == 1024
