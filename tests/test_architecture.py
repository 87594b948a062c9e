"""The house rules that no single file shows: who may import whom, and what no file has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "ssm_hf"
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in ("src", "training", "eval", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
files = pytest.mark.parametrize("name", FILES)

# First component below ssm_hf -> the parts of ssm_hf that it may import.
FLOORS = {
    "ops": {"ops"},
    "tokenizer": set(),
    "sequence": {"ops"},
    "cache": set(),
    "layers": {"ops", "cache", "sequence", "layers"},
    "generation": {"ops", "cache", "layers", "generation"},
    "models": {"ops", "cache", "sequence", "layers", "generation", "models"},
    "formats": {"models"},
    "convert": {"formats", "models"},
    "__init__": {"ops", "cache", "sequence", "models", "tokenizer"},
}
SHARED_BY_MODELS = {"backbone", "checkpoint", "configuration", "generating"}
OUTSIDE = {
    "training": {"eval.tasks"},
    # The science suite trains as everybody does.
    "eval": {"training.config", "training.train"},
    "benchmarks": {"training.graph", "training.peaks"},
    "examples": set(),
}


def _tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(), filename=name)


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; exported files must say what they need"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _part(name: str) -> str:
    """The floor a file of src/ssm_hf belongs to."""
    return Path(name).relative_to("src/ssm_hf").parts[0].removesuffix(".py")


@files
def test_imports_go_down_only(name: str) -> None:
    modules = set(_imports(_tree(name)))
    inner = {m.split(".")[1] for m in modules if m.startswith("ssm_hf.")}
    if name.startswith("src/"):
        assert not {m.split(".")[0] for m in modules} & set(OUTSIDE), "src imports a script"
        assert inner <= FLOORS[_part(name)] | {_part(name)}
        return
    home = name.split("/")[0]
    for m in modules:
        top = m.split(".")[0]
        if top in OUTSIDE and top != home:
            allowed = OUTSIDE[home]
            assert any(m == a or m.startswith(a + ".") or a.startswith(m) for a in allowed), m
    # Benchmarks of one operator may look inside it; everything else uses public names.
    if home != "benchmarks":
        assert inner <= {"byte_tokenizer", "RecurrentCache", "register", "SequenceInfo"}, inner


@files
def test_model_families_do_not_know_one_another(name: str) -> None:
    if not name.startswith("src/ssm_hf/models/") or len(Path(name).parts) < 5:
        return
    family = Path(name).parts[3]
    for module in _imports(_tree(name)):
        if module.startswith("ssm_hf.models."):
            assert module.split(".")[2] in {family} | SHARED_BY_MODELS


@files
def test_triton_is_imported_by_kernels_alone(name: str) -> None:
    if not Path(name).name.startswith("kernels"):
        assert not any(m.split(".")[0] == "triton" for m in _imports(_tree(name)))


@files
def test_missing_packages_and_environment_are_decided_in_one_place(name: str) -> None:
    if not name.startswith("src/") or name == "src/ssm_hf/ops/dispatch.py":
        return
    text = FILES[name].read_text()
    assert not re.search(r"except\s*\(?[\w\s,]*ImportError|ModuleNotFoundError", text)
    assert not re.search(r"os\.environ|os\.getenv", text)


@files
def test_nothing_is_swallowed(name: str) -> None:
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            silent = all(isinstance(s, ast.Pass) for s in node.body)
            assert not silent, f"exception dropped in line {node.lineno}"


@files
def test_scripts_know_no_architecture(name: str) -> None:
    if name.startswith(("training/", "eval/")):
        assert "model_type ==" not in FILES[name].read_text()


@files
def test_files_stay_readable(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 600


def test_every_package_file_is_on_a_known_floor() -> None:
    assert {_part(name) for name in FILES if name.startswith("src/")} <= set(FLOORS)


def test_repository_speaks_of_the_product_alone() -> None:
    """No path of somebody's machine and no registry host in any text file."""
    forbidden = re.compile(r"/(?:home|root|work)/\w+|file:///|https?://[\w.]*(?:pypi|pythonhosted)")
    for folder in ("src", "training", "eval", "benchmarks", "examples", "configs", "docs", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".json", ".jsonl", ".toml"):
                if path == Path(__file__):
                    continue
                found = forbidden.search(path.read_text())
                assert found is None, f"{path.relative_to(ROOT)}: {found and found.group()}"
