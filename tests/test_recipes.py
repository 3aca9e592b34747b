"""The recipes: they run on the tiny encoder, and the configs are what `textmeta train` takes."""

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import write_rows
from tests.given import Patch, Shown, adapter_of
from textmeta import Corpus, MetaTrainer
from textmeta.data.splits import read_class_split
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.meta import trainer as trainer_module
from textmeta.meta.initialisation import LearnerSettings
from textmeta.sharing.store import load_adapter, save_adapter
from textmeta.training import parsed, train_parser

RECIPES = Path(__file__).parents[1] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


def recipe(name: str) -> ModuleType:
    """Import a recipe."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_what_textmeta_train_takes(config: Path, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.chdir(RECIPES.parent)
    settings = parsed(train_parser(), ["--config", str(config), "--output", str(tmp_path), "--algorithm=fomaml"])
    assert settings.algorithm == "fomaml"
    (source,) = settings.corpora
    assert source.name == config.stem
    split = read_class_split(source.splits, settings.fold)
    assert min(len(split.train), len(split.valid), len(split.test)) >= 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*most tokens of")  # its texts are English
def test_demo(tiny_model: str, tmp_path: Path, monkeypatch: Patch, capsys: Shown) -> None:
    monkeypatch.setattr(trainer_module, "CALIBRATION_EPISODES", 5)
    save_adapter(tmp_path / "shipped", adapter_of(tiny_model))
    tiny = EncoderSettings(tiny_model, max_length=32)
    recipe("demo").main(tmp_path / "own", tiny, str(tmp_path / "shipped"), episodes=4, tests=3)
    printed = capsys.readouterr().out
    assert "'flat tyre, halfway up the hill' →" in printed
    for row in ("1 shot: frozen prototypes", "1 shot: the shipped adapter", "5 shots: your adapter"):
        assert row in printed
    assert printed.index("5 shots: your adapter") < printed.index("'the toilets were dirty' →")
    assert f"textmeta push {tmp_path / 'own'}" in printed
    (corpus,) = load_adapter(tmp_path / "own")[0].record["settings"]["corpora"]
    assert corpus["classes"] == 64


def test_thinned_keeps_different_rows_of_every_class() -> None:
    thinned = recipe("general").thinned
    texts = [f"{label} {row // 2}" for label in "abc" for row in range(20)]  # each twice
    corpus = Corpus.from_pairs("c", texts, [text[0] for text in texts])
    few = thinned(corpus, 5)
    assert np.bincount(few.labels).tolist() == [5, 5, 5]
    assert len(set(few.texts)) == 15
    assert all(text[0] == few.class_names[label] for text, label in zip(few.texts, few.labels, strict=True))
    assert list(few.texts) == list(thinned(corpus, 5).texts)
    assert len(thinned(corpus, 99)) == 30


def test_every_corpus_of_the_general_adapter_has_a_licence() -> None:
    general = recipe("general")
    rows = list(csv.DictReader(general.CORPORA.read_text(encoding="utf-8").splitlines()))
    assert len({row["corpus"] for row in rows}) == len(rows) == 81  # and the bundled one
    assert all(row["source"] and row["licence"] for row in rows)
    assert sum(row["left_out"] == "yes" for row in rows) == 10


@pytest.mark.slow
def test_the_general_adapter_is_made_again_byte_for_byte(
    corpus: Corpus, tiny_model: str, run_script, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Its scope is told by a run without some corpora, and its card names all with their licences."""
    general = recipe("general")
    for name in ("train/one", "train/two", "three"):
        write_rows(tmp_path / f"{name}.jsonl", corpus)
    (tmp_path / "corpora.csv").write_text(
        "corpus,source,licence,left_out\none,here,MIT,\ntwo,here,CC0,yes\nthree,here,Apache-2.0,\n"
    )
    tiny, learner = EncoderSettings(tiny_model, max_length=32), LearnerSettings(layers=(2, 4))
    for name, value in {
        "CORPORA": tmp_path / "corpora.csv",
        "LEFT_OUT_EPISODES": 2,
        "CALIBRATION_EPISODES": 5,
        "GENERAL": replace(general.GENERAL, encoder=tiny, lora=LoraSettings(rank=4), learner=learner, episodes=4),
    }.items():
        monkeypatch.setattr(general, name, value)
    monkeypatch.setattr(trainer_module, "CALIBRATION_EPISODES", 5)
    trained: list[list[str]] = []
    train = MetaTrainer.train
    monkeypatch.setattr(
        MetaTrainer,
        "train",
        lambda self, corpora, **more: trained.append([c.name for c in corpora]) or train(self, corpora, **more),
    )
    for output in ("first", "second"):
        run_script(general, "--data-dir", tmp_path, "--output", tmp_path / output)
    assert trained == [["one", "two", "three", "everyday"], ["one", "three", "everyday"]] * 2
    for file in ("adapter_model.safetensors", "textmeta.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    adapter = load_adapter(tmp_path / "first")[0]
    assert adapter.scope is not None
    assert set(adapter.index.classes) == {"one", "two", "three", "everyday"}
    card = (tmp_path / "first" / "README.md").read_text()
    assert "| three | " in card
    assert "Apache-2.0" in card
