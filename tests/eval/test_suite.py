"""Suite files: types, variables, overrides, and errors that name the key."""

from pathlib import Path

import pytest

from eval.suite import load_suite

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml")
    if not path.stem.startswith("science")  # of eval.science, which has options of its own
)


def _suite(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_suites_load(path: Path) -> None:
    suite = load_suite(path, [("dtype", "float32")])
    assert suite.dtype == "float32"
    assert "${" not in str(suite.as_dict())


def test_variables_and_overrides_apply(tmp_path: Path) -> None:
    path = _suite(
        tmp_path,
        "variables: {run: a}\nperplexity: {files: ['${run}/x.txt'], window: 5}\n",
    )
    assert load_suite(path).perplexity.files == ["a/x.txt"]
    suite = load_suite(
        path,
        [
            ("variables.run", "b"),
            ("perplexity.window", "7"),
            ("perplexity.stateful", "false"),
            ("generate.prompts", "['${run}', y]"),
            ("generate.temperature", "2"),
            ("generate.top_p", "1e-1"),
        ],
    )
    assert suite.perplexity.files == ["b/x.txt"]
    assert (suite.perplexity.window, suite.perplexity.stateful) == (7, False)
    assert suite.generate.prompts == ["b", "y"]
    assert (suite.generate.temperature, suite.generate.top_p) == (2.0, 0.1)
    assert load_suite(path, [("perplexity.files", "b.txt")]).perplexity.files == ["b.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexty: {files: [a]}", "unknown key 'perplexty', the closest is 'perplexity'"),
        (
            "perplexity: {files: [a], windows: 3}",
            r"unknown key 'perplexity\.windows', the closest is 'window'",
        ),
        ("perplexity: {window: 3}", r"perplexity\.files is missing"),
        ("perplexity: {files: []}", r"perplexity\.files is empty"),
        ("perplexity: {files: 3}", r"perplexity\.files must be of type list, got 3"),
        ("perplexity: {files: [3]}", r"perplexity\.files\[0\] must be of type str, got 3"),
        ("perplexity: {files: [a], window: 0}", r"perplexity\.window must be above 0, got 0"),
        ("perplexity: {files: [a], window: yes}", r"perplexity\.window must be of type int"),
        ("perplexity: {files: [a], max_bytes: -1}", r"perplexity\.max_bytes must be above 0"),
        ("perplexity: {files: ['${runs}/a']}", r"variable \$\{runs\} has no value"),
        ("ngram: {seen_tokens: a}", "ngram needs section perplexity"),
        (
            "{perplexity: {files: [a]}, ngram: {seen_tokens: a, orders: [9]}}",
            r"ngram\.orders must be numbers from 0 to 7, got \[9\]",
        ),
        (
            "{perplexity: {files: [a]}, ngram: {seen_tokens: a, require_better_than_order: 3}}",
            r"ngram\.require_better_than_order is 3, expected one of ngram\.orders \[2, 5\]",
        ),
        ("lm_eval: {tasks: {}}", r"lm_eval\.tasks is empty"),
        ("lm_eval: {tasks: {piqa: 3}}", r"lm_eval\.tasks\.piqa must be of type str, got 3"),
        ("lm_eval: {tasks: {piqa: a}, limit: 0}", r"lm_eval\.limit must be above 0"),
        ("generate: {prompts: []}", r"generate\.prompts is empty"),
        ("generate: {prompts: [a], top_p: 2}", r"generate\.top_p <= 1"),
        ("generate: {prompts: [a], temperature: 0}", r"generate\.temperature must be above 0"),
        ("generate: 3", "generate must be a mapping, got 3"),
        ("dtype: int8", r"dtype must be one of \['auto'"),
        ("seed: 1", "the suite evaluates nothing"),
        ("[1, 2]", "must be a YAML mapping, got list"),
        ("{", "is not valid YAML"),
    ],
)
def test_bad_suite_names_key_and_expectation(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_suite(_suite(tmp_path, text))
    assert "suite.yaml" in str(error.value)


def test_override_of_a_plain_value_is_refused(tmp_path: Path) -> None:
    path = _suite(tmp_path, "{seed: 1, generate: {prompts: [a]}}")
    with pytest.raises(ValueError, match=r"--seed\.x: seed is a plain value"):
        load_suite(path, [("seed.x", "1")])


def test_missing_suite_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        load_suite(tmp_path / "none.yaml")
