"""Byte n-grams against a direct reading of the formula."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from eval.ngram import ByteNgram, bits_per_byte, read_seen_tokens

TRAIN = [b"abracadabra", b"", b"ab", b"cadabracab", "née été".encode()]
TEST = [b"abracab", b"zz top abra", "été".encode(), b"a"]


def _tokens(documents: list[bytes]) -> np.ndarray:
    return np.array([token for text in documents for token in (256, *text)], dtype=np.uint16)


def _brute_force(train: list[bytes], order: int, history: bytes, byte: int) -> float:
    """Witten-Bell by dictionaries, one probability at a time."""
    p = 1 / 256
    for k in range(min(order, len(history)) + 1):
        followers: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
        for text in train:
            for i in range(k, len(text)):
                followers[text[i - k : i]][text[i]] += 1
        seen = followers[history[len(history) - k :]]
        if seen:
            p = (seen[byte] + len(seen) * p) / (seen.total() + len(seen))
    return p


@pytest.mark.parametrize("order", [0, 1, 2, 5, 7])
def test_ngram_equals_brute_force(order: int) -> None:
    rows = ByteNgram(_tokens(TRAIN), order).probabilities(_tokens(TEST))
    expected = [
        [
            p
            for text in TEST
            for p in (np.nan, *(_brute_force(TRAIN, k, text[:i], b) for i, b in enumerate(text)))
        ]
        for k in range(order + 1)
    ]
    # Same sums of a few exact ratios, in another order: rounding only.
    np.testing.assert_allclose(rows, expected, rtol=1e-12)


@pytest.mark.parametrize("history", [b"", b"a", b"abrac", b"zzzzz", b"\xc3"], ids=repr)
def test_ngram_probabilities_sum_to_one(history: bytes) -> None:
    rows = ByteNgram(_tokens(TRAIN), 5).probabilities(
        _tokens([history + bytes([byte]) for byte in range(256)])
    )
    last = rows[:, len(history) + 1 :: len(history) + 2]
    assert last.shape == (6, 256)
    assert (last > 0).all()
    np.testing.assert_allclose(last.sum(axis=1), 1, rtol=1e-12)


def test_ngram_longer_than_every_document_predicts_like_the_longest() -> None:
    rows = ByteNgram(_tokens([b"ab", b"ac"]), 5).probabilities(_tokens([b"abababab"]))
    np.testing.assert_array_equal(rows[1:, 1:], np.broadcast_to(rows[1, 1:], (5, 8)))


def test_bits_per_byte_counts_each_byte_once() -> None:
    texts = [text.decode() for text in TEST]
    model = ByteNgram(_tokens(TRAIN), 2)
    size = sum(map(len, TEST))
    for skip_first in (False, True):
        bits = [
            -np.log2(_brute_force(TRAIN, 2, text[:i], byte))
            for text in TEST
            for i, byte in enumerate(text)
            if i >= skip_first
        ]
        result = bits_per_byte(model, texts, [2], skip_first=skip_first)
        assert result == {2: pytest.approx(sum(bits) / size, rel=1e-12)}


@pytest.mark.parametrize(("order", "tokens"), [(8, [1, 2]), (-1, [1, 2]), (2, [256, 300])])
def test_ngram_bad_arguments_are_named(order: int, tokens: list[int]) -> None:
    message = "no byte" if tokens[0] == 256 else f"order must be from 0 to 7, got {order}"
    with pytest.raises(ValueError, match=message):
        ByteNgram(np.array(tokens), order)


def test_seen_tokens_are_read_in_both_widths(tmp_path: Path) -> None:
    for dtype in ("uint16", "uint32"):
        np.array([256, 7, 255, 300], dtype=dtype).tofile(tmp_path / "seen.bin")
        (tmp_path / "seen.json").write_text(json.dumps({"dtype": dtype, "count": 4}))
        assert read_seen_tokens(tmp_path / "seen.bin").tolist() == [256, 7, 255, 300]


def test_seen_tokens_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "seen.bin"
    with pytest.raises(FileNotFoundError, match=r"seen\.bin does not exist"):
        read_seen_tokens(path)
    path.write_bytes(bytes(10))
    with pytest.raises(FileNotFoundError, match=r"seen\.json does not exist"):
        read_seen_tokens(path)
    (tmp_path / "seen.json").write_text("{")
    with pytest.raises(ValueError, match=r"seen\.json is not JSON"):
        read_seen_tokens(path)
    (tmp_path / "seen.json").write_text('{"dtype": "int8", "count": 5}')
    with pytest.raises(ValueError, match=r"seen\.json must hold"):
        read_seen_tokens(path)
    (tmp_path / "seen.json").write_text('{"dtype": "uint16", "count": 6}')
    with pytest.raises(ValueError, match=r"has 10 bytes, but seen\.json describes 12"):
        read_seen_tokens(path)
