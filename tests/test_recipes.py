"""The recipes: the demo runs on the tiny encoder, and the configs are what `textmeta train` takes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from textmeta.data.splits import read_class_split
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.meta import trainer as trainer_module
from textmeta.meta.adapter import Adapter
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.sharing.store import load_adapter, save_adapter
from textmeta.training import parsed, train_parser

RECIPES = Path(__file__).parents[1] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


def recipe(name: str) -> ModuleType:
    """Import a recipe."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_what_textmeta_train_takes(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(RECIPES.parent)
    settings = parsed(train_parser(), ["--config", str(config), "--output", str(tmp_path), "--algorithm=fomaml"])
    assert settings.algorithm == "fomaml"
    (source,) = settings.corpora
    assert source.name == config.stem
    split = read_class_split(source.splits, settings.fold)
    assert min(len(split.train), len(split.valid), len(split.test)) >= 5


@pytest.mark.slow
def test_demo(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer_module, "CALIBRATION_EPISODES", 5)
    reader = TokenStateReader(encoder)
    settings = LearnerSettings(layers=reader.layers)
    start = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, settings, seed=0)
    save_adapter(tmp_path / "shipped", Adapter.of(reader, settings, start))
    tiny = EncoderSettings(encoder.settings.model, max_length=32)
    recipe("demo").main(tmp_path / "own", tiny, str(tmp_path / "shipped"), episodes=4, tests=3)
    printed = capsys.readouterr().out
    assert "'flat tyre, halfway up the hill' →" in printed
    for row in ("1 shot: frozen prototypes", "1 shot: the shipped adapter", "5 shots: your adapter"):
        assert row in printed
    assert printed.index("5 shots: your adapter") < printed.index("'the toilets were dirty' →")
    assert f"textmeta push {tmp_path / 'own'}" in printed
    (corpus,) = load_adapter(tmp_path / "own")[0].record["settings"]["corpora"]
    assert corpus["classes"] == 64
