"""Samples equal those of NVIDIA's scripts, where the same words, texts, tokenizer and seed go in.

The hashes were taken of what the scripts of NVIDIA/RULER at c3f5e3b wrote with the tokenizer and
the questions of `ruler_inputs`, the novel of the project as the essays, the words of wonderwords
3.0.1, `counted_words()` as the English words and `sentence_ends` as the sentence splitter; seed 42,
four samples each. Equal hashes are equal prompts, answers and lengths, character by character.
"""

import hashlib
import importlib.util
import json

import pytest

from eval.ruler.fit import Frame, TooShortError
from eval.ruler.specs import TASKS
from eval.ruler.tasks import Maker
from eval.ruler.tokens import TokenCounter
from tests.eval.ruler_inputs import hotpotqa, squad, word_tokenizer

LENGTHS = (2048, 4096)
UPSTREAM = {
    "niah_single_1": ("a60b2fb72b0112d9", "640dfaadd0c99f90"),
    "niah_single_2": ("0b46fed8e297736c", "3402d24e954b96b6"),
    "niah_single_3": ("eb7626c2a2676d38", "8fbcc4fa03997bf7"),
    "niah_multikey_1": ("317f52db157ec449", "e46c6002e141dce5"),
    "niah_multikey_2": ("493a9698b5af418f", "b6aef5d748c0d8e3"),
    "niah_multikey_3": ("330ba4e2b4942561", "d243c2bd06fb011c"),
    "niah_multivalue": ("2ab54b99ff765ff9", "386ca4d37f25f9a3"),
    "niah_multiquery": ("046ca10724445b85", "949f5b6dee732102"),
    "vt": ("2afa48e422f74840", "2f31b43aecc23580"),
    "cwe": ("322a876dc423fbd9", "e2168c96866babfb"),
    "fwe": ("4de0a295fe1fe75d", "1fd042110371e27f"),
    "qa_1": ("dbfebd52ef288deb", "ab5f81576b3daf72"),
    "qa_2": ("40dcd7c825fdee07", "bf5f5192c63775b9"),
}

needs_words = pytest.mark.skipif(
    importlib.util.find_spec("wonderwords") is None, reason="wonderwords is not installed"
)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    folder = tmp_path_factory.mktemp("questions")
    for name, data in (("squad", squad()), ("hotpotqa", hotpotqa())):
        (folder / f"{name}.json").write_text(json.dumps(data))
    files = {name: str(folder / f"{name}.json") for name in ("squad", "hotpotqa")}
    return Maker(TokenCounter(word_tokenizer()), Frame(), seed=42, compat=True, **files)


@needs_words
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_samples_are_those_of_upstream(name: str, length: int, maker: Maker) -> None:
    samples = list(maker.samples(name, length, 4))
    rows = [[s.input, s.answer_prefix, s.outputs, s.length] for s in samples]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    assert digest == UPSTREAM[name][LENGTHS.index(length)]
    assert all(sample.length <= length for sample in samples)


@needs_words
@pytest.mark.parametrize("name", ["niah_multikey_3", "vt", "cwe", "fwe", "qa_2"])
def test_what_never_fits_ends_with_an_error(name: str, maker: Maker) -> None:
    """Where upstream's loop does not end."""
    with pytest.raises(TooShortError, match="does not fit in 140 tokens"):
        list(maker.samples(name, 140, 1))


def test_more_samples_than_questions_are_refused(maker: Maker) -> None:
    with pytest.raises(ValueError, match="compat asks each of the 20 questions once, not 21"):
        list(maker.samples("qa_2", 4096, 21))
