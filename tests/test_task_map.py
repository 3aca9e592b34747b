"""The map of tasks, on the tiny encoder: what is written, that it comes out the same again, and its errors."""

import csv
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from textmeta import Corpus
from textmeta.artifact.store import save_adapter
from textmeta.cli import parse_settings
from textmeta.errors import AdapterError, DataError, SettingsError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT = ["--steps=1", "--tasks=3", "--shots=2", "--self_supervision.episodes=2", "--projection=pca"]


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))  # where `python recipes/task_map.py` looks first
    return importlib.import_module("map_drawing")


@pytest.fixture
def recipe(drawing: ModuleType) -> ModuleType:
    return importlib.import_module("task_map")


@pytest.fixture
def toy(corpus: Corpus, tmp_path: Path) -> Path:
    """The toy corpus as a file, the first 4 classes of one domain, the others of another."""
    path = tmp_path / "toy.jsonl"
    rows = [
        {"text": text, "label": corpus.class_names[c], "domain": "first" if c < 4 else "second"}
        for text, c in zip(corpus.texts, corpus.labels, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(recipe: ModuleType, *arguments: str) -> None:
    recipe.main(parse_settings(recipe.TaskMapSettings, list(arguments)))


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "task-map.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_without_arguments_it_draws_every_domain_of_the_bundled_corpus(
    recipe: ModuleType, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        run(recipe, *SHORT, "--encoder.model", tiny_model, "--output", str(tmp_path / name))
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["task-map.csv", "task-map.png", "task-map.svg"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    rows = read(tmp_path / "one")
    assert len(rows) == 15 * 3
    assert {row["corpus"] for row in rows} == {"everyday"}
    assert len({row["group"] for row in rows if row["seen"] == "True"}) == 8
    assert len({row["group"] for row in rows if row["seen"] == "False"}) == 7
    assert all(len(row["classes"].split("; ")) == 3 for row in rows)
    places = np.array([(float(row["x"]), float(row["y"])) for row in rows])
    assert np.isfinite(places).all()
    assert (places.std(0) > 0).all()
    png = (tmp_path / "one" / "task-map.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20_000
    svg = (tmp_path / "one" / "task-map.svg").read_text(encoding="utf-8")
    for text in ("45 tasks", "voice assistant", "of the variance", "classes that it never saw"):
        assert text in svg
    assert "<dc:date>" not in svg
    printed = capsys.readouterr().out
    assert printed.count("  bank (") == 2
    assert printed.count("nearest are") == 2 * 15


def test_data_with_domains_and_without(
    recipe: ModuleType, tiny_model: str, corpus: Corpus, toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    plain = tmp_path / "other" / "toy.jsonl"  # of the same name
    rows = [json.loads(line) for line in toy.read_text().splitlines()]
    plain.write_text("".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in rows))
    arguments = [*SHORT, "--encoder.model", tiny_model, "--output", str(tmp_path / "map")]
    run(recipe, *arguments, f"--data=[{toy},{plain}]", "--bundled=true")
    rows = read(tmp_path / "map")
    assert len(rows) == (15 + 2 + 1) * 3
    told = [(row["corpus"], row["group"]) for row in rows if row["corpus"] != "everyday"]
    assert list(dict.fromkeys(told)) == [("toy", "first"), ("toy", "second"), ("toy'", "toy'")]
    first = [row for row in rows if row["group"] == "first"]
    assert {name for row in first for name in row["classes"].split("; ")} <= set(corpus.class_names[:4])
    run(recipe, *arguments, f"--data=[{toy}]", "--domain_column=topic")
    assert {(row["corpus"], row["group"]) for row in read(tmp_path / "map")} == {("toy", "toy")}


def test_an_adapters_task_encoder(recipe: ModuleType, encoder: Encoder, toy: Path, tmp_path: Path) -> None:
    arguments = [*SHORT, "--output", str(tmp_path / "map"), f"--data=[{toy}]", "--adapter", str(tmp_path / "adapter")]
    for inner in (InnerLoopSettings(), InnerLoopSettings(conditioning=ConditioningSettings(start="banks"))):
        parameters = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
        save_adapter(tmp_path / "adapter", encoder, parameters, inner, {})
        if inner.conditioning is None:
            with pytest.raises(AdapterError, match="has no task encoder"):
                run(recipe, *arguments)
            assert not (tmp_path / "map").exists()
    run(recipe, *arguments)
    assert {row["seen"] for row in read(tmp_path / "map")} == {""}, "what an adapter saw is not known"
    assert "task encoder of the adapter adapter" in (tmp_path / "map" / "task-map.svg").read_text(encoding="utf-8")


def test_what_cannot_be_drawn_is_refused_before_anything_is_computed(
    recipe: ModuleType, drawing: ModuleType, tiny_model: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SHORT, "--encoder.model", tiny_model, "--output", str(tmp_path / "map"), f"--data=[{toy}]"]
    with pytest.raises(SettingsError, match="tasks must be at least 1, given 0"):
        run(recipe, *arguments, "--tasks=0")
    with pytest.raises(SettingsError, match="nothing to draw"):
        run(recipe, *arguments, "--data=[]", "--bundled=false")
    with pytest.raises(DataError, match="'toy, first' has 4 classes, but 5 ways"):
        run(recipe, *arguments, "--ways=5")
    with pytest.raises(DataError, match="at least 3 tasks, given 2"):
        run(recipe, *arguments, "--tasks=1")
    monkeypatch.setattr(drawing, "_has_umap", lambda: False)
    with pytest.raises(SettingsError, match="pip install umap-learn"):
        run(recipe, *arguments, "--projection=umap")
    monkeypatch.setattr(drawing, "matplotlib", None)
    with pytest.raises(SettingsError, match=r"textmeta\[plot\]"):
        run(recipe, *arguments)
    assert not (tmp_path / "map").exists()


def test_without_matplotlib_the_recipe_still_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec = importlib.util.spec_from_file_location("map_drawing_alone", RECIPES / "map_drawing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "map_drawing_alone", module)
    spec.loader.exec_module(module)
    with pytest.raises(SettingsError, match=r"pip install 'textmeta\[plot\]'"):
        module.check_drawing("auto")


@pytest.mark.parametrize("seed", range(5))
def test_labels_do_not_overlap(drawing: ModuleType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    anchors = rng.normal(500, 40, (20, 2))  # far too close together
    anchors[1] = anchors[0]
    sizes = np.stack([rng.uniform(40, 160, 20), np.full(20, 24.0)], axis=1)
    frame = np.array([[0.0, 0.0], [1000.0, 900.0]])
    placed = drawing.spread(anchors, sizes, frame)
    gaps = np.abs(placed[:, None] - placed[None]) - (sizes[:, None] + sizes[None]) / 2
    apart = (gaps >= -1e-6).any(-1) | np.eye(20, dtype=bool)
    assert apart.all()
    assert (placed - sizes / 2 >= frame[0] - 1e-6).all()
    assert (placed + sizes / 2 <= frame[1] + 1e-6).all()
    alone = drawing.spread(np.array([[100.0, 100.0], [800.0, 500.0]]), sizes[:2], frame)
    assert (alone == [[100, 100], [800, 500]]).all(), "labels with room stay where they are"
