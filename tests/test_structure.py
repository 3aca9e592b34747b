"""The rules of the house: imports point one way, public names are an explicit list, a call is short to follow."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FrameType

import pytest

import textmeta
from tests.given import LABELS, SUPPORT, TEXTS
from textmeta import FewShotClassifier

PACKAGE = Path(textmeta.__file__).parent
# Data flows down this list; a file imports only from its own place and from those above it.
ORDER = [
    *("errors", "files", "progress", "hub", "processes", "data", "encoder", "heads", "meta", "nearest", "sharing"),
    *("predicting", "export", "estimator", "classifier", "many", "training", "commands", "cli"),
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).stem not in ("__init__", "__main__"))
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
MAX_LINES = 450


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def place(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield module and name of everything that is imported from textmeta, at the top or within a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue  # for readers alone
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        else:
            yield from imports(node)


def imports_of(path: Path) -> list[tuple[str, str]]:
    found = imports(ast.parse(path.read_text(encoding="utf-8")))
    return [(module, name) for module, name in found if module.split(".")[0] == "textmeta"]


@EVERY_FILE
def test_imports_point_one_way(path: Path) -> None:
    own = place(module_name(path))
    wrong = [module for module, _ in imports_of(path) if "." not in module or place(module) > own]
    assert not wrong, f"{module_name(path)} imports {wrong}, which stand below it"


@EVERY_FILE
def test_no_file_imports_a_private_name_of_another(path: Path) -> None:
    private = [f"{module}.{name}" for module, name in imports_of(path) if "._" in module or name.startswith("_")]
    assert not private


@EVERY_FILE
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_every_file_has_a_place() -> None:
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} == set(ORDER)


def test_nothing_is_unpickled() -> None:
    unsafe = ("import pickle", "torch.load(", "import joblib", "from joblib", "trust_remote_code=True")
    assert not [(path.name, word) for path in FILES for word in unsafe if word in path.read_text(encoding="utf-8")]


def test_public_names() -> None:
    assert textmeta.__all__ == [
        *("Adapter", "Corpus", "CorpusSettings", "Episode", "EpisodeSampler", "EpisodeSettings", "FewShotClassifier"),
        *("MetaTrainer", "TextMetaError", "__version__", "load_corpora", "load_corpus", "predict_many", "similarity"),
    ]
    assert set(textmeta.__all__) <= set(dir(textmeta))
    assert textmeta.__version__ == version("textmeta")
    with pytest.raises(AttributeError, match="module 'textmeta' has no attribute 'FewShotClasifier'"):
        textmeta.FewShotClasifier  # noqa: B018


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import textmeta; dir(textmeta)", ["numpy", "torch", "datasets", "transformers", "importlib.metadata"]),
        ("from textmeta import TextMetaError", ["numpy", "torch", "datasets", "transformers"]),
        (
            "from textmeta.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
            ["numpy", "torch", "datasets", "transformers", "jsonargparse", "huggingface_hub"],
        ),
        (
            "from textmeta.cli import main\nmain(['info', '.'])",
            ["torch", "datasets", "transformers", "peft", "jsonargparse"],
        ),
    ],
    ids=["import", "errors", "help", "info"],
)
def test_what_is_not_needed_is_not_loaded(
    code: str, absent: list[str], fitted: FewShotClassifier, tmp_path: Path
) -> None:
    fitted.save_pretrained(tmp_path, include_support="texts")
    program = f"{code}\nimport sys; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def entered(call: Callable[[], object]) -> tuple[dict[CodeType, str], int]:
    """Return the functions of textmeta that a call entered, with their names, and how deep they were nested."""
    found: dict[CodeType, str] = {}
    depth = deepest = 0

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth, deepest
        code = frame.f_code
        own = code.co_filename.startswith(f"{PACKAGE}/") and not code.co_name.startswith("<")
        if own and event in ("call", "return"):  # comprehensions and lambdas are a part of their function
            found[code] = f"{Path(code.co_filename).stem}.{code.co_qualname}"
            depth += 1 if event == "call" else -1
            deepest = max(deepest, depth)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found, deepest


def test_fit_and_predict_are_short_to_follow(fitted: FewShotClassifier) -> None:
    for call, most, deep in (
        (lambda: fitted.fit(SUPPORT, LABELS, unlabelled=TEXTS[:-1]), 81, 9),
        (lambda: fitted.predict(TEXTS), 32, 7),
    ):
        functions, deepest = entered(call)
        assert 10 < len(functions) <= most, functions
        assert len({code.co_filename for code in functions}) <= 19, functions
        assert deepest <= deep
