"""The Python of README and docs runs as it stands; what they name is there, and they name all that is public."""

import ast
import csv
import re
import runpy
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import textmeta
from tests.conftest import write_rows
from tests.encoder.given import save_multilingual
from tests.given import Patch
from tests.hub.server import TOKEN, USER, HubServer
from textmeta import cli, training
from textmeta.data.bundled import load_bundled
from textmeta.encoder.pretrained import CARRIED_PACKAGE, DEFAULT_ENCODER
from textmeta.meta import trainer
from textmeta.meta.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MULTILINGUAL = "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"  # in the docs; here a tiny one
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def python_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


def imported(code: str) -> set[str]:
    """Names that a block imports; the next ones have to import them anew, for readers copy one block alone."""
    found = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {alias.asname or alias.name.split(".")[0] for node in found for alias in node.names}


def with_python() -> list[Any]:
    pages = [page for page in PAGES if python_of(page)]
    return [pytest.param(page, marks=[pytest.mark.slow] * (page.name == "training.md"), id=page.name) for page in pages]


@pytest.mark.parametrize("page", with_python())
def test_python_runs_from_top_to_bottom(page: Path, hub: HubServer, tmp_path: Path, monkeypatch: Patch) -> None:
    folder = Path(pytest.importorskip(CARRIED_PACKAGE).__file__).parent / "model"
    hub.add_repo(DEFAULT_ENCODER, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(trainer, "CALIBRATION_EPISODES", 2)
    monkeypatch.setattr(trainer, "VALIDATION_EPISODES", 2)
    corpus, _ = load_bundled()
    with open("intents.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["utterance", "intent"])
        for number, name in enumerate(corpus.class_names[:16]):
            rows.writerows((corpus.texts[row], name) for row in corpus.rows_of(number))
    for name, classes in (("first", corpus.class_names[:8]), ("second", corpus.class_names[8:20])):
        write_rows(Path(f"corpora/{name}.jsonl"), corpus.restrict(classes))
    other = Path(save_multilingual(tmp_path / "multilingual", "xlm-roberta"))
    hub.add_repo(MULTILINGUAL, {path.name: path.read_bytes() for path in other.iterdir()})
    namespace: dict[str, Any] = {}
    for number, block in enumerate(python_of(page)):
        short = re.sub(r"episodes=\d+", "episodes=1", block).replace("your-name/", f"{USER}/")
        with patch.dict(ALGORITHMS):  # to which a block adds a row
            exec(compile(short, f"{page.name}, block {number + 1}", "exec"), namespace)
        for name in imported(block):
            del namespace[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_are_shown(page: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(ROOT)
    for block in re.findall(r"```console\n(.*?)```", text_of(page), re.DOTALL):
        for line in block.splitlines():
            given = shlex.split(line, comments=True)
            if "textmeta" in given[:1]:
                if given[1] == "train":
                    training.parsed(training.train_parser(), given[2:])
                else:
                    cli._parser().parse_args(given[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text_of(page))
    assert not [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"\b(?:textmeta|recipes|benchmarks|tests|docs)/[\w/.-]+\.(?:py|ya?ml|md|json)\b", text_of(page))
    gone = [path for path in named if not (ROOT / path).is_file()]
    assert not gone or page.name in ("CHANGELOG.md", "tried.md"), "which speak of what is gone"


def test_the_readme_and_the_report_are_short() -> None:
    assert len(text_of(README).split()) <= 1200
    assert len(text_of(ROOT / "benchmarks" / "README.md").split()) <= 2500


def test_every_public_name_has_a_place_in_the_docs() -> None:
    shown = " ".join(text_of(page) for page in PAGES if page.name not in ("CHANGELOG.md", "tried.md"))
    assert not [name for name in textmeta.__all__ if not re.search(rf"\b{name}\b", shown)]


def test_the_page_of_settings_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()
    assert text_of(ROOT / "docs" / "settings.md") == page, "write it anew: python docs/settings.py"
    assert page.count("\n| `") <= 41, "every setting has to be learned by somebody"
