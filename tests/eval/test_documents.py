"""Reading of evaluation files."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from eval.documents import Document, read_documents, sha256

ROWS = [{"name": "one", "text": "né\u2028e"}, {"text": ""}, {"text": "two\n"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize("compress", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_documents_of_every_format(tmp_path: Path, compress: tuple) -> None:
    suffix, pack = compress
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(JSONL))
    (tmp_path / f"a.txt{suffix}").write_bytes(pack("é\n".encode()))
    rows = read_documents(tmp_path / f"a.jsonl{suffix}")
    assert rows == [Document("one", "né\u2028e"), Document("line 3", "two\n")]
    assert read_documents(tmp_path / f"a.txt{suffix}") == [Document("a.txt", "é\n")]


def test_max_bytes_cuts_at_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL)
    assert [d.text for d in read_documents(path, 2)] == ["n"]  # é needs bytes 2 and 3
    assert [d.text for d in read_documents(path, 9)] == ["né\u2028e", "tw"]
    assert [d.text for d in read_documents(path, 99)] == ["né\u2028e", "two\n"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.txt", b"abc\xff", "not UTF-8 text: invalid start byte at byte 3"),
        ("a.txt.gz", b"plain", r"not a complete \.gz file"),
        ("a.txt.xz", lzma.compress(b"abc")[:-5], r"not a complete \.xz file"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', 'line 1 must have a string "text", has'),
        ("a.jsonl", b"[3]\n", r"line 1 must be a JSON object, got \[3\]"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: text is not valid Unicode"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_documents(tmp_path / name)
    assert name in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist"):
        read_documents(tmp_path / "nothing.txt")


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1.
    assert sha256(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
