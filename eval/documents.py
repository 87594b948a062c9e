"""Evaluation texts from local files."""

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

OPENERS = {".gz": gzip.open, ".xz": lzma.open}


class Document(NamedTuple):
    """One text, scored on its own: no model carries anything from one document to the next."""

    name: str
    text: str


def read_documents(path: str | Path, max_bytes: int | None = None) -> list[Document]:
    """Read the documents of one file.

    Args:
        path: a `.jsonl` file holds one document per row, {"text": ..., "name": optional}; any
            other file is one document. A further `.gz` or `.xz` ending is decompressed.
        max_bytes: keep only this many UTF-8 bytes, in file order; the last kept document is cut
            (before a character that would not fit whole).

    Returns:
        The documents that are not empty.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken compression, not UTF-8, a row without "text", or no text at all.
    """
    path = Path(path)
    kind = path.with_suffix("") if path.suffix in OPENERS else path
    if kind.suffix == ".jsonl":
        documents = [_document(path, number, row) for number, row in read_rows(path)]
    else:
        documents = [Document(kind.name, read_text(path))]
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents if max_bytes is None else _cut(documents, max_bytes)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, decompressing `.gz` and `.xz`; errors as in `read_documents`."""
    if not path.is_file():
        raise FileNotFoundError(f"evaluation file {path} does not exist")
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            data = file.read()
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is not a complete {path.suffix} file: {error}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of every line that is not blank in a JSONL file."""
    # Not splitlines(), which also cuts at characters that JSON allows inside a string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} must be a JSON object, got {row!r:.80}")
        yield number, row


def _document(path: Path, number: int, row: dict[str, Any]) -> Document:
    text = row.get("text")
    if not isinstance(text, str):
        raise ValueError(f'{path} line {number} must have a string "text", has {sorted(row)}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} line {number}: text is not valid Unicode: {error}") from error
    return Document(str(row.get("name", f"line {number}")), text)


def _cut(documents: list[Document], max_bytes: int) -> list[Document]:
    kept = []
    for name, text in documents:
        data = text.encode("utf-8")[:max_bytes]
        # The input was valid UTF-8, so only a character cut by the limit can be dropped here.
        text = data.decode("utf-8", errors="ignore")
        if text:
            kept.append(Document(name, text))
        max_bytes -= len(data)
        if max_bytes == 0:
            break
    return kept


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
