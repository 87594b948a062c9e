"""Documents -> tokens, and what a run trains and evaluates on."""

import dataclasses
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import math
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import ssm_hf
from training.config import DataConfig, TokenizerConfig
from training.packing import Example, PackedRows, Row, RowOrder, epoch_order, pack, row_tensors
from training.tasks import Onwards, TaskRows, as_it_is

ENCODE_BATCH = 64  # documents handed to the tokenizer at once

Record = dict[str, Any]


class Document(NamedTuple):
    """name: stable over machines, decides held-out or not. record: fields that data.format says."""

    name: str
    record: Record


# --- tokenizer ------------------------------------------------------------------------------------


def load_tokenizer(config: TokenizerConfig, checkpoint: str | None) -> PreTrainedTokenizerBase:
    """The built-in byte tokenizer, a tokenizer.json, a directory or Hub name, or the checkpoint's.

    Raises:
        ValueError: the tokenizer has no end-of-document token to tell documents apart.
    """
    source = config.source if config.source is not None else checkpoint
    if source == "byte":
        tokenizer = ssm_hf.byte_tokenizer()
    elif str(source).endswith(".json"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=source)
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise ValueError(
                f"tokenizer.eos_token: {config.eos_token!r} is not a token of {source}"
            )
        tokenizer.eos_token = config.eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer.source {source}: names no end-of-document token; set tokenizer.eos_token"
        )
    return tokenizer


# --- documents ------------------------------------------------------------------------------------


def stdlib_documents() -> list[Document]:
    """The `*.py` files of the running interpreter's standard library, in order of their path.

    Left out: installed packages, test suites (more than half of the bytes, much of it generated),
    `pydoc_data` (the language reference as one long string, larger than any other file), and the
    few files that are not UTF-8 or are empty.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if left_out.intersection(parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            documents.append(Document("/".join(parts), {"text": text}))
    if not documents:
        raise ValueError(f"data.stdlib: no Python source files below {root}")
    return documents


def file_documents(config: DataConfig) -> list[Document]:
    """Documents of local files: one per line of a .jsonl file, one per file of any other.

    Raises:
        FileNotFoundError: a path or glob of data.files matches nothing.
        ValueError: a file that is empty, damaged or not UTF-8, or a line that is not as expected;
            the message names file and byte offset or line.
    """
    paths: dict[Path, None] = {}  # a set that keeps its order
    for pattern in config.files or ():
        found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not found:
            raise FileNotFoundError(f"data.files: no file matches {pattern!r}")
        paths.update(dict.fromkeys(Path(path) for path in found if not os.path.isdir(path)))
    if not paths:
        raise FileNotFoundError(f"data.files {config.files}: only directories, give dir/*.txt")
    # Names relative to the folder all files share, so the split survives moving them.
    root = os.path.commonpath([path.absolute().parent for path in paths])
    documents = []
    for path in paths:
        name = Path(os.path.relpath(path.absolute(), root)).as_posix()
        before = len(documents)
        if ".jsonl" in path.suffixes:
            for number, record in _read_jsonl(path):
                checked = check_record(record, config, f"{path}:{number}")
                if not is_empty(checked):
                    documents.append(Document(f"{name}:{number}", checked))
        elif config.format != "text":
            raise ValueError(f"{path}: data.format {config.format!r} needs .jsonl files")
        else:
            with _open(path) as file:
                text = _decode(_checked_read(file.read, path), path, 0)
            if text:
                documents.append(Document(name, {"text": text}))
        if len(documents) == before:
            raise ValueError(f"{path}: the training file is empty")
    return documents


def _open(path: Path) -> Any:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rb")


def _checked_read(read: Any, path: Path) -> bytes:
    try:
        return read()
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: damaged compressed file: {error}") from error


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ValueError(
            f"{path}: not UTF-8 at byte {at} (0x{raw[error.start]:02x}: {error.reason}); "
            "expected UTF-8 text"
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    offset = 0
    with _open(path) as file:
        for number in itertools.count(1):
            line = _checked_read(file.readline, path)
            if not line:
                return
            text = _decode(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                yield number, json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); "
                    "expected one JSON object per line"
                ) from error


def check_record(record: Any, config: DataConfig, where: str) -> Record:
    """The fields that `config.format` needs, or a ValueError that says what was expected."""

    def has_text(value: Any, *keys: str) -> bool:
        return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys)

    got = f"got keys {sorted(record)}" if isinstance(record, dict) else f"got {record!r:.80}"
    if config.format == "text":
        if has_text(record, config.text_field):
            return {"text": record[config.text_field]}
        expected = f'{{"{config.text_field}": text}}'
    elif config.format == "prompt":
        if has_text(record, "prompt", "completion"):
            return {"prompt": record["prompt"], "completion": record["completion"]}
        expected = '{"prompt": text, "completion": text}'
    else:
        messages = record.get("messages") if isinstance(record, dict) else None
        if (
            isinstance(messages, list)
            and all(has_text(message, "role", "content") for message in messages)
            and any(message["role"] == "assistant" for message in messages)
        ):
            return {"messages": messages}
        expected = '{"messages": [{"role": text, "content": text}, ...]} with an assistant message'
    raise ValueError(f"{where}: expected {expected}, {got}")


def is_empty(record: Record) -> bool:
    """True for a text without a byte: it says nothing, and datasets hold many (blank lines)."""
    return record.get("text") == ""


def dataset_documents(config: DataConfig, epoch: int, seed: int) -> Iterator[Document]:
    """Documents of a Hugging Face dataset.

    A stream is shuffled through a buffer seeded by (seed, epoch); reading it again from its
    beginning gives the same order, which is what resuming relies on.
    """
    import datasets  # takes seconds, and most runs read none

    table = datasets.load_dataset(
        config.dataset,
        config.dataset_config,
        split=config.dataset_split,
        streaming=config.streaming,
    )
    if config.streaming and config.shuffle_buffer > 1:
        table = table.shuffle(seed=seed, buffer_size=config.shuffle_buffer)
        table.set_epoch(epoch)
    for index, row in enumerate(table):
        record = check_record(row, config, f"{config.dataset}/{config.dataset_split}, row {index}")
        if not is_empty(record):
            # Named by content: a shuffled stream has no stable row numbers.
            content = json.dumps(record, sort_keys=True).encode()
            yield Document(hashlib.sha256(content).hexdigest()[:32], record)


# --- held-out split -------------------------------------------------------------------------------


def _rank(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, on every machine and Python."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_heldout(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """(train, heldout): the ceil(fraction * n) documents of the lowest name hash are held out.

    Raises:
        ValueError: a share is to be held out of a single document.
    """
    if fraction == 0:
        return list(documents), []
    count = math.ceil(fraction * len(documents))
    if count >= len(documents):
        raise ValueError(
            f"data.heldout_fraction {fraction} of {len(documents)} document(s) leaves nothing to "
            "train on; lower it, add documents, or set 0 for no held-out loss"
        )
    chosen = set(sorted(range(len(documents)), key=lambda i: _rank(documents[i].name))[:count])
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def split_stream(config: DataConfig) -> list[Document]:
    """Held-out documents of a stream: those of low name hash, read until eval_max_bytes is reached.
    `StreamRows` leaves out every document that this rule matches, seen here or not."""
    heldout, n_bytes = [], 0
    if config.heldout_fraction > 0:
        # Unshuffled, so that the set does not depend on the seed.
        unshuffled = dataclasses.replace(config, shuffle_buffer=1)
        for document in dataset_documents(unshuffled, epoch=0, seed=0):
            if _rank(document.name) < config.heldout_fraction:
                heldout.append(document)
                n_bytes += len(json.dumps(document.record, ensure_ascii=False).encode())
                if config.eval_max_bytes is not None and n_bytes >= config.eval_max_bytes:
                    break
    return heldout


# --- encoding -------------------------------------------------------------------------------------


def encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[Example]:
    """Tokens of each document, between a start token (bos, or eos where there is none) and eos.

    The start token stands before the text so that its first token is predicted too; special tokens
    spelled out inside a plain text or a prompt stay text. Chat documents are what the tokenizer's
    chat template makes of them.
    """
    if config.format == "chat":
        yield from _encode_chats(documents, tokenizer)
        return
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos

    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # no warning about documents longer than the model's usual context
        )["input_ids"]

    remaining = iter(documents)
    while batch := list(itertools.islice(remaining, ENCODE_BATCH)):
        if config.format == "text":
            texts = [document.record["text"] for document in batch]
            heads = [[bos]] * len(batch)
        else:
            # Encoded apart from the prompt, as generate() will see it: no token spans the seam.
            texts = [document.record["completion"] for document in batch]
            heads = [[bos, *ids] for ids in ids_of([doc.record["prompt"] for doc in batch])]
        for head, text, ids in zip(heads, texts, ids_of(texts), strict=True):
            targets = np.ones(len(head) + len(ids) + 1, dtype=bool)
            targets[: len(head)] = False
            yield Example(np.array([*head, *ids, eos]), targets, len(text.encode()))


def _encode_chats(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.chat_template is None:
        raise ValueError(
            f"data.format 'chat': the tokenizer {name} has no chat template; "
            "use one that has, or data.format 'prompt'"
        )
    # Without the markers transformers would return an all-zero mask and only warn.
    if "generation" not in str(tokenizer.chat_template).replace("add_generation_prompt", ""):
        raise ValueError(
            f"data.format 'chat': the chat template of {name} does not mark the assistant's "
            "tokens; put {% generation %} ... {% endgeneration %} round them"
        )
    for document in documents:
        messages = document.record["messages"]
        try:
            encoded = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError as error:
            raise ValueError(f"{document.name}: refused by the chat template: {error}") from error
        spoken = [m["content"] for m in messages if m["role"] == "assistant"]
        yield Example(
            np.array(encoded["input_ids"]),
            np.array(encoded["assistant_masks"], dtype=bool),
            sum(len(content.encode()) for content in spoken),
        )


# --- training data ------------------------------------------------------------------------------


class StreamRows(IterableDataset):
    """Rows of a streamed dataset for ever, beginning with the sample number `start`.

    The rows before `start` are read and thrown away: slow after a long run, but exact, whereas the
    saved state of a shuffle buffer is not.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, seed: int, start: int = 0
    ) -> None:
        self.tokenizer, self.config, self.seed, self.start = tokenizer, config, seed, start

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for row in itertools.islice(self._rows(), self.start, None):
            yield row_tensors(row.ids, row.starts, row.targets)

    def fingerprint(self) -> str:
        """The settings that decide the rows; the dataset itself is not read to find out."""
        settings = json.dumps([dataclasses.asdict(self.config), len(self.tokenizer)])
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    def summary(self) -> str:
        return f"a stream of {self.config.dataset}"

    def _rows(self) -> Iterator[Row]:
        for epoch in itertools.count():
            documents = (
                document
                for document in dataset_documents(self.config, epoch, self.seed)
                if _rank(document.name) >= self.config.heldout_fraction
            )
            examples = encode(documents, self.tokenizer, self.config)
            empty = True
            for row in pack_for_training(examples, self.tokenizer, self.config):
                empty = False
                yield row
            if empty:
                raise ValueError(f"data.dataset {self.config.dataset}: no row to train on")


def pack_for_training(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[Row]:
    return pack(examples, config.seq_len, _pad_id(tokenizer), split=config.format == "text")


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Any id would do where the tokenizer has no padding token: padding is never a target.
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


# --- what train.py asks for -----------------------------------------------------------------------


class TrainingData(NamedTuple):
    """train: rows to sample from. heldout: the held-out documents. evaluation: rows of (some of)
    them, or None where nothing is held out."""

    train: PackedRows | StreamRows | TaskRows
    heldout: list[Document]
    evaluation: PackedRows | None

    def identity(self, seed: int) -> dict[str, Any]:
        """What decides the data order besides the sample number."""
        return {"seed": seed, "rows": self.train.fingerprint()}

    def summary(self) -> str:
        return f"{self.train.summary()} to train on, {len(self.heldout)} documents held out"

    def loaders(
        self, seed: int, batch_size: int, start: int
    ) -> tuple[DataLoader, DataLoader | None]:
        """Loaders of micro-batches for training, from sample number `start` on, and evaluation.
        Accelerate deals the micro-batches out to the processes in turn."""
        # Copies from pinned memory do not wait for what the GPU is doing.
        options = {"batch_size": batch_size, "pin_memory": torch.cuda.is_available()}
        if isinstance(self.train, StreamRows):
            self.train.start = start
            train = DataLoader(self.train, **options)
        elif isinstance(self.train, TaskRows):
            rows = Onwards(start)
            train = DataLoader(self.train, sampler=rows, collate_fn=as_it_is, **options)
        else:
            order = RowOrder(len(self.train), seed, start)
            train = DataLoader(self.train, sampler=order, **options)
        if self.evaluation is None:
            return train, None
        return train, DataLoader(self.evaluation, **options)


def prepare_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, seed: int, total_rows: int = 1
) -> TrainingData:
    """Read, split, encode and pack. Documents are shuffled once by `seed` before packing, so that a
    row does not always join neighbours; `epoch_order` shuffles the rows.

    Args:
        config: the source.
        tokenizer: may be None for a synthetic task.
        seed: of the order.
        total_rows: in the whole run, for a task's curriculum.
    """
    if config.task.name is not None:
        return TrainingData(TaskRows(config, tokenizer, seed, total_rows), [], None)
    assert tokenizer is not None  # only a task goes without, see `_validate`
    vocab_size = len(tokenizer)
    if config.streaming:
        train, heldout = StreamRows(tokenizer, config, seed), split_stream(config)
    else:
        if config.stdlib:
            documents = stdlib_documents()
        elif config.files is not None:
            documents = file_documents(config)
        else:
            documents = list(dataset_documents(config, epoch=0, seed=seed))
        kept, heldout = split_heldout(documents, config.heldout_fraction)
        order = np.random.default_rng(seed).permutation(len(kept))
        examples = encode((kept[i] for i in order), tokenizer, config)
        train = PackedRows(pack_for_training(examples, tokenizer, config), vocab_size)
    if not heldout:
        return TrainingData(train, heldout, None)

    limit = math.inf if config.eval_max_bytes is None else config.eval_max_bytes
    examples, n_bytes = [], 0
    for example in encode(heldout, tokenizer, config):
        if n_bytes + example.n_bytes <= limit:
            examples.append(example)
            n_bytes += example.n_bytes
    if not examples:
        raise ValueError(
            f"data.eval_max_bytes is {limit}, expected room for at least one of the "
            f"{len(heldout)} held-out documents"
        )
    rows = pack(examples, config.seq_len, _pad_id(tokenizer), split=True, overlap=1)
    return TrainingData(train, heldout, PackedRows(rows, vocab_size, n_bytes))


def write_heldout(path: str | Path, documents: Iterable[Document]) -> None:
    """One JSON object per line: the document's name and its fields ("text", ...)."""
    with open(path, "w", encoding="utf-8") as file:
        for document in documents:
            line = {"name": document.name, **document.record}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_seen_tokens(path: str | Path, rows: PackedRows, seed: int, samples: int) -> None:
    """Write the token ids of the first `samples` samples in the order of training, without padding:
    little-endian integers in `path`, {"dtype", "count"} in `path` with the suffix .json. Rows that
    were visited again in later epochs are written once."""
    order = epoch_order(len(rows), seed, epoch=0)[:samples]
    with open(path, "wb") as file:
        for row in order:
            file.write(rows.ids[row, : rows.lengths[row]].tobytes())
    sidecar = {"dtype": rows.ids.dtype.name, "count": int(rows.lengths[order].sum())}
    Path(path).with_suffix(".json").write_text(json.dumps(sidecar) + "\n", encoding="utf-8")
