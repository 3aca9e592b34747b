"""The house rules: imports point one way, the public names are an explicit list."""

import ast
from pathlib import Path

import pytest

import textmeta

PACKAGE = Path(textmeta.__file__).parent
# Data flows down this list; a file imports only from its own place and from those above it.
ORDER = [
    "errors",
    "files",
    "hub",
    "data",
    "model",
    "encoder",
    "heads",
    "meta",
    "tasks",
    "artifact",
    "classifier",
    "cli",
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def place(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def imported_modules(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.startswith("textmeta.")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = "textmeta." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    wrong = [name for name in imported_modules(path) if place(name) > place(own)]
    assert not wrong, f"{own} imports {wrong}, which stand below it"


def test_every_file_has_a_place() -> None:
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} == set(ORDER)


def test_public_names() -> None:
    assert sorted(textmeta.__all__) == [
        "Corpus",
        "CorpusSettings",
        "Episode",
        "EpisodeSampler",
        "EpisodeSettings",
        "FewShotClassifier",
        "TextMetaError",
        "load_corpus",
    ]
    assert all(hasattr(textmeta, name) for name in textmeta.__all__)


def test_nothing_is_unpickled() -> None:
    unsafe = ("import pickle", "torch.load(", "import joblib", "from joblib", "trust_remote_code=True")
    assert not [(path.name, word) for path in FILES for word in unsafe if word in path.read_text(encoding="utf-8")]
