"""The store of finished samples."""

import json
import multiprocessing
from pathlib import Path

import pytest

from eval.samples import SampleStore, settings_key


def _store(directory: Path, model: str = "m", task: str = "t", **settings: object) -> SampleStore:
    return SampleStore(directory, model=model, section="s", task=task, settings=settings)


def test_samples_come_back_by_id(tmp_path: Path) -> None:
    store = _store(tmp_path / "new" / "samples", length=8)
    assert store.done == {}
    store.add("0", {"score": 0.5})
    store.add("1", {"text": 'a\n"b"\u2028'})
    again = _store(tmp_path / "new" / "samples", length=8)
    assert again.done == store.done == {"0": {"score": 0.5}, "1": {"text": 'a\n"b"\u2028'}}
    assert again.path == tmp_path / "new" / "samples" / "s-t.jsonl"


def test_another_model_or_setting_sees_nothing(tmp_path: Path) -> None:
    _store(tmp_path, length=8, seed=1).add("0", {"score": 1})
    assert _store(tmp_path, seed=1, length=8).done  # order does not matter
    assert not _store(tmp_path, model="other", length=8, seed=1).done
    assert not _store(tmp_path, length=9, seed=1).done
    assert not _store(tmp_path, task="u", length=8, seed=1).done
    assert settings_key("m", "s", "t", {}) != settings_key("m", "t", "s", {})


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_cut_last_line_costs_one_sample_only(tmp_path: Path, cut: int) -> None:
    store = _store(tmp_path)
    for id in "012":
        store.add(id, {"score": int(id)})
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-cut])
    again = _store(tmp_path)
    # Without the newline alone the line is still whole.
    assert set(again.done) == ({"0", "1", "2"} if cut == 1 else {"0", "1"})
    again.add("2", {"score": 2})
    again.add("3", {"score": 3})
    assert _store(tmp_path).done == {id: {"score": int(id)} for id in "0123"}


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    store = _store(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        store.add("0", {"score": float("nan")})
    assert _store(tmp_path).done == {}
    with pytest.raises(ValueError, match="cannot be part of a file name"):
        _store(tmp_path, task="a/b")


def test_the_file_says_what_its_key_stands_for(tmp_path: Path) -> None:
    store = _store(tmp_path, length=8)
    _store(tmp_path, length=8)
    (row,) = map(json.loads, store.path.read_text().splitlines())
    about = {"model": "m", "section": "s", "task": "t", "settings": {"length": 8}}
    assert row == {"key": store.key, "about": about}


def _add_many(directory: Path, first: int) -> None:
    store = _store(directory)
    for i in range(first, first + 50):
        store.add(str(i), {"text": "x" * 5000})


def test_processes_share_a_file(tmp_path: Path) -> None:
    store = _store(tmp_path)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add_many, args=(tmp_path, 50 * i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    store.reload()
    assert set(store.done) == {str(i) for i in range(150)}
