import gzip
import json
import lzma
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ssm_hf
from tests.training.conftest import write_jsonl
from training.config import DataConfig, TokenizerConfig
from training.data import (
    Document,
    StreamRows,
    dataset_documents,
    encode,
    file_documents,
    load_tokenizer,
    prepare_data,
    split_heldout,
    stdlib_documents,
    write_heldout,
    write_seen_tokens,
)
from training.packing import IGNORED, Example, PackedRows, RowOrder, pack, row_tensors

EOS = 256


@pytest.fixture(scope="module")
def tokenizer():
    return ssm_hf.byte_tokenizer()


def examples_of(lengths: list[int]) -> list[Example]:
    """Documents of the given lengths whose token ids are all different."""
    ends = np.cumsum(lengths)
    return [
        Example(np.arange(end - n, end), np.arange(n) > 0, n)
        for n, end in zip(lengths, ends, strict=True)
    ]


# --- reading --------------------------------------------------------------------------------------


def test_files_of_every_kind_are_read(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("plain é")
    with gzip.open(tmp_path / "sub" / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("zipped")
    with lzma.open(tmp_path / "sub" / "c.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n')
    config = DataConfig(files=[str(tmp_path / "**" / "*"), str(tmp_path / "a.txt")])
    assert file_documents(config) == [
        Document("a.txt", {"text": "plain é"}),
        Document("sub/b.txt.gz", {"text": "zipped"}),
        Document("sub/c.jsonl.xz:1", {"text": "one"}),
        Document("sub/c.jsonl.xz:4", {"text": "two"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "data_format", "message"),
    [
        ("empty.txt", b"", "text", "empty.txt: the training file is empty"),
        ("empty.jsonl", b"\n\n", "text", "empty.jsonl: the training file is empty"),
        ("bad.txt", b"abc\xffdef", "text", r"bad.txt: not UTF-8 at byte 3 \(0xff"),
        (
            "bad.jsonl",
            b'{"text": "ok"}\n{"text": "\xe9"}\n',
            "text",
            r"bad.jsonl: not UTF-8 at byte 25 \(0xe9",
        ),
        (
            "broken.jsonl",
            b'{"text": "ok"}\n{"text": \n',
            "text",
            "broken.jsonl:2: not JSON .* expected one JSON object per line",
        ),
        ("key.jsonl", b'{"txt": "x"}', "text", r'key.jsonl:1: expected {"text": text}, got keys'),
        ("list.jsonl", b"[1]", "text", r"list.jsonl:1: expected .*, got \[1\]"),
        ("number.jsonl", b'{"text": 3}', "text", 'number.jsonl:1: expected {"text": text}'),
        ("p.jsonl", b'{"prompt": "x"}', "prompt", 'expected {"prompt": text, "completion": text}'),
        ("c.jsonl", b'{"messages": []}', "chat", "with an assistant message"),
        (
            "u.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}]}',
            "chat",
            "with an assistant message",
        ),
        ("p.txt", b"x", "prompt", "p.txt: data.format 'prompt' needs .jsonl files"),
        (
            "cut.txt.gz",
            gzip.compress(b"abcdef" * 99, mtime=0)[:-9],
            "text",
            "cut.txt.gz: damaged compressed",
        ),
        ("no.txt.xz", b"not xz", "text", "no.txt.xz: damaged compressed file"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, data_format, message):
    (tmp_path / name).write_bytes(content)
    config = DataConfig(files=[str(tmp_path / name)], format=data_format)
    with pytest.raises(ValueError, match=message):
        file_documents(config)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*none.txt'"):
        file_documents(DataConfig(files=[str(tmp_path / "none.txt")]))
    with pytest.raises(FileNotFoundError, match="only directories"):
        file_documents(DataConfig(files=[str(tmp_path)]))


def test_stdlib_is_this_interpreters_own_sources():
    documents = stdlib_documents()
    names = [document.name for document in documents]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert "json/decoder.py" in names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    root = Path(sysconfig.get_path("stdlib"))
    text = next(d.record["text"] for d in documents if d.name == "json/decoder.py")
    assert text.encode() == (root / "json" / "decoder.py").read_bytes()


# --- held-out split -------------------------------------------------------------------------------


def test_heldout_documents_depend_on_names_alone():
    documents = [Document(f"file{i}", {"text": str(i)}) for i in range(50)]
    train, heldout = split_heldout(documents, 0.1)
    assert len(heldout) == 5
    assert sorted([*train, *heldout]) == sorted(documents)
    _, again = split_heldout(documents[::-1], 0.1)
    assert sorted(again) == sorted(heldout)
    # The hash is the same on every machine: a change would move the split of existing runs.
    assert [document.name for document in heldout] == [
        "file6",
        "file18",
        "file21",
        "file29",
        "file30",
    ]


def test_heldout_share_of_nothing_and_of_too_little():
    one = [Document("a", {"text": "x"})]
    assert split_heldout(one, 0.0) == (one, [])
    with pytest.raises(ValueError, match=r"heldout_fraction 0.1 of 1 document\(s\) leaves nothing"):
        split_heldout(one, 0.1)


# --- encoding -------------------------------------------------------------------------------------


def test_text_is_framed_and_specials_in_it_stay_text(tokenizer):
    text = "é <|pad|>"
    (example,) = encode([Document("a", {"text": text})], tokenizer, DataConfig())
    assert example.ids.tolist() == [EOS, *text.encode(), EOS]
    assert example.targets.tolist() == [False] + [True] * (len(text.encode()) + 1)
    assert example.n_bytes == len(text.encode())


def test_prompts_are_masked(tokenizer):
    document = Document("a", {"prompt": "2+2=", "completion": "4"})
    (example,) = encode([document], tokenizer, DataConfig(format="prompt"))
    assert example.ids.tolist() == [EOS, *b"2+2=4", EOS]
    assert example.ids[example.targets].tolist() == [*b"4", EOS]
    assert example.n_bytes == 1


def test_chats_learn_the_assistants_turns(tokenizer):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "é"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "b"},
    ]
    document = Document("a", {"messages": messages})
    (example,) = encode([document], tokenizer, DataConfig(format="chat"))
    assert example.ids[example.targets].tolist() == [*"é".encode(), EOS, *b"b", EOS]
    assert example.n_bytes == 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}{% endif %}", "does not mark"),
    ],
)
def test_chats_need_a_template_with_marks(template, message):
    tokenizer = ssm_hf.byte_tokenizer()
    tokenizer.chat_template = template
    document = Document("a", {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(ValueError, match=message):
        list(encode([document], tokenizer, DataConfig(format="chat")))


def test_chats_that_the_template_refuses_are_named(tokenizer):
    messages = [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}]
    document = Document("chats.jsonl:7", {"messages": messages})
    with pytest.raises(ValueError, match=r"chats.jsonl:7: refused by the chat template: role must"):
        list(encode([document], tokenizer, DataConfig(format="chat")))


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[3], [8], [10], [20, 1, 2, 7], [5, 4, 8, 8, 16, 3]])
def test_full_rows_hold_every_token_once(lengths):
    rows = list(pack(examples_of(lengths), 8, pad_id=-1, split=True))
    assert all(row.length == 8 for row in rows[:-1])
    seen = np.concatenate([row.ids[: row.length] for row in rows])
    assert seen.tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize("lengths", [[3], [8], [9], [20, 2, 2, 7], [5, 4, 8, 8, 16, 3]])
def test_heldout_rows_predict_every_token_but_the_first_once(lengths):
    rows = list(pack(examples_of(lengths), 8, pad_id=-1, split=True, overlap=1))
    predicted = np.concatenate([row.ids[row.targets] for row in rows])
    firsts = np.cumsum([0, *lengths[:-1]])
    assert predicted.tolist() == [i for i in range(sum(lengths)) if i not in firsts]


@pytest.mark.parametrize("lengths", [[3, 4, 5], [8, 2, 8], [2, 20, 3]])
def test_unsplit_examples_stay_whole_unless_longer_than_a_row(lengths):
    rows = list(pack(examples_of(lengths), 8, pad_id=-1, split=False))
    for example in examples_of(lengths):
        places = [set(example.ids) & set(row.ids) for row in rows]
        pieces = sum(bool(place) for place in places)
        assert pieces == -(-len(example.ids) // 8)


def test_positions_restart_at_documents_pieces_and_padding():
    rows = list(pack(examples_of([3, 9]), 8, pad_id=-1, split=True))
    first, second = (row_tensors(row.ids, row.starts, row.targets) for row in rows)
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert first["labels"].tolist() == [IGNORED, 1, 2, IGNORED, 4, 5, 6, 7]
    assert second["input_ids"].tolist() == [8, 9, 10, 11, -1, -1, -1, -1]
    assert second["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert second["labels"].tolist() == [IGNORED, 9, 10, 11, *[IGNORED] * 4]


def test_rows_without_targets_are_left_out():
    silent = Example(np.arange(8), np.zeros(8, dtype=bool), 0)
    rows = list(pack([silent, *examples_of([8])], 8, pad_id=-1, split=False))
    assert len(rows) == 1
    with pytest.raises(ValueError, match="no row has a token to learn from"):
        PackedRows(pack([silent], 8, pad_id=-1, split=False), vocab_size=300)


def test_big_vocabularies_keep_their_ids():
    examples = [Example(np.array([0, 70_000]), np.array([False, True]), 1)]
    rows = PackedRows(pack(examples, 2, pad_id=0, split=True), vocab_size=100_000)
    assert rows[0]["input_ids"].tolist() == [0, 70_000]


# --- order ----------------------------------------------------------------------------------------


def take(order, count: int) -> list[int]:
    return [index for index, _ in zip(order, range(count), strict=False)]


def test_order_is_a_function_of_seed_and_sample_number():
    whole = take(RowOrder(10, seed=3, start=0), 35)
    for start in (0, 1, 10, 17, 29):
        assert take(RowOrder(10, seed=3, start=start), 5) == whole[start : start + 5]
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert whole[:10] != whole[10:20]
    assert take(RowOrder(10, seed=4, start=0), 10) != whole[:10]


def test_seen_tokens_are_the_training_order_without_padding(tmp_path, tokenizer, texts):
    config = DataConfig(files=[str(texts)], seq_len=32, heldout_fraction=0.1)
    rows = prepare_data(config, tokenizer, seed=0).train
    assert isinstance(rows, PackedRows)
    path = tmp_path / "seen.bin"
    for samples in (3, 10 * len(rows)):
        write_seen_tokens(path, rows, seed=0, samples=samples)
        order = take(RowOrder(len(rows), seed=0, start=0), min(samples, len(rows)))
        expected = np.concatenate([rows.ids[i][: rows.lengths[i]] for i in order])
        sidecar = json.loads((tmp_path / "seen.json").read_text())
        assert sidecar == {"dtype": "uint16", "count": len(expected)}
        assert np.fromfile(path, dtype="<u2").tolist() == expected.tolist()


# --- all together ---------------------------------------------------------------------------------


def texts_of(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_training_and_heldout_text_together_are_the_files(tmp_path, tokenizer, texts):
    config = DataConfig(files=[str(texts)], seq_len=16, heldout_fraction=0.2)
    data = prepare_data(config, tokenizer, seed=1)
    assert isinstance(data.train, PackedRows)
    assert data.evaluation is not None
    write_heldout(tmp_path / "heldout.jsonl", data.heldout)
    heldout = texts_of(tmp_path / "heldout.jsonl")
    assert len(heldout) == 3
    assert data.evaluation.n_bytes == sum(len(text.encode()) for text in heldout)
    bytes_of_all = sum(len(text.encode()) for text in texts_of(texts))
    trained = sum(int((row < 256).sum()) for row in data.train.ids)
    padding = data.train.ids.size - int(data.train.lengths.sum())
    assert trained + data.evaluation.n_bytes == bytes_of_all
    assert padding < 16


def test_evaluation_keeps_to_its_budget_of_bytes(tokenizer, texts):
    config = DataConfig(files=[str(texts)], heldout_fraction=0.5, eval_max_bytes=150)
    data = prepare_data(config, tokenizer, seed=0)
    assert data.evaluation is not None
    assert len(data.heldout) == 6
    assert 0 < data.evaluation.n_bytes <= 150
    config = DataConfig(files=[str(texts)], heldout_fraction=0.5, eval_max_bytes=1)
    with pytest.raises(ValueError, match="eval_max_bytes is 1, expected room for at least one"):
        prepare_data(config, tokenizer, seed=0)


# --- Hugging Face datasets ------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """A dataset directory as `datasets` reads it, offline."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"body": f"row {i} " + "x" * i} for i in range(40)])
    return str(folder)


def test_dataset_is_read_by_name_and_field(dataset, tokenizer):
    config = DataConfig(dataset=dataset, text_field="body", heldout_fraction=0.1, seq_len=16)
    documents = list(dataset_documents(config, epoch=0, seed=0))
    assert documents[3].record == {"text": "row 3 xxx"}
    assert len(prepare_data(config, tokenizer, seed=0).heldout) == 4
    wrong = DataConfig(dataset=dataset, text_field="text")
    with pytest.raises(ValueError, match=r"row 0: expected {\"text\": text}, got keys \['body'\]"):
        list(dataset_documents(wrong, epoch=0, seed=0))


def test_stream_continues_where_it_was_and_leaves_heldout_documents_out(dataset, tokenizer):
    config = DataConfig(
        dataset=dataset,
        text_field="body",
        streaming=True,
        shuffle_buffer=8,
        heldout_fraction=0.2,
        eval_max_bytes=10_000,
        seq_len=32,
    )
    data = prepare_data(config, tokenizer, seed=5)
    assert isinstance(data.train, StreamRows)

    def rows(start: int, count: int) -> list[list[int]]:
        data.train.start = start
        return [row["input_ids"].tolist() for row, _ in zip(data.train, range(count), strict=False)]

    whole = rows(0, 80)
    assert rows(50, 30) == whole[50:]
    text = bytes(token for row in whole for token in row if token < 256).decode()
    heldout = [document.record["text"] for document in data.heldout]
    assert 0 < len(heldout) < 20
    # Every document ends in as many x as its number; those of the held-out ones never occur.
    seen = {line.split(" ")[0] for line in text.split("row ")[1:]}
    assert seen.isdisjoint(line.split(" ")[1] for line in heldout)
    assert len(seen) == 40 - len(heldout)


# --- tokenizers -----------------------------------------------------------------------------------


def word_tokenizer(path: Path) -> str:
    """A tokenizer.json, which does not say which of its tokens ends a document."""
    vocab = {word: i for i, word in enumerate(["[UNK]", "<eos>", "a", "b"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(path))
    return str(path)


def test_bare_tokenizer_json_needs_its_end_token_named(tmp_path):
    source = word_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(
        ValueError, match=r"names no end-of-document token; set tokenizer.eos_token"
    ):
        load_tokenizer(TokenizerConfig(source=source), None)
    with pytest.raises(ValueError, match=r"tokenizer.eos_token: '<end>' is not a token of"):
        load_tokenizer(TokenizerConfig(source=source, eos_token="<end>"), None)
    loaded = load_tokenizer(TokenizerConfig(source=source, eos_token="<eos>"), None)
    (example,) = encode([Document("d", {"text": "a b"})], loaded, DataConfig())
    assert example.ids.tolist() == [1, 2, 3, 1]


def test_tokenizer_comes_from_the_checkpoint_unless_another_is_named(tmp_path):
    source = word_tokenizer(tmp_path / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=source, eos_token="<eos>").save_pretrained(
        tmp_path / "m"
    )
    assert len(load_tokenizer(TokenizerConfig(), str(tmp_path / "m"))) == 4
    assert len(load_tokenizer(TokenizerConfig(source="byte"), str(tmp_path / "m"))) == 264
