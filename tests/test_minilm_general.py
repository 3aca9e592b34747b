"""The recipe of the shipped adapter, on the tiny encoder; what it makes is what the package loads by default."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.test_recipes import ROOT, recipe
from textmeta import Corpus, FewShotClassifier
from textmeta.artifact import locate
from textmeta.artifact.store import load_adapter
from textmeta.cli import parse_settings
from textmeta.errors import TrainingInterrupted
from textmeta.model.initialisation import LOG_ADAPTED_FACTOR, SCOPE, STRENGTH_PRIOR, TEMPERATURE_SLOPES

SHORT = [
    *("--training.steps=4", "--training.validate_every=4", "--training.checkpoint_every=2", "--training.warmup=1"),
    *("--episodes.ways=[3,6]", "--lora.rank=4", "--lora.layers=1", "--lora.targets=[query,value]", "--rows=12"),
    *("--calibration.episodes=8", "--calibration.rows=8", "--calibration.ways=[3,6]", "--calibration.shots=[1,3]"),
    *("--calibration.queries=3",),
]
FILES = ("adapter_model.safetensors", "textmeta.safetensors", "textmeta.json", "SHA256SUMS")


@pytest.fixture
def arguments(corpus: Corpus, tiny_model: str, tmp_path: Path) -> list[str]:
    for number, classes in enumerate((corpus.class_names[:6], corpus.class_names[6:])):
        part = corpus.restrict(classes)
        rows = [{"text": t, "label": part.class_names[c]} for t, c in zip(part.texts, part.labels, strict=True)]
        (tmp_path / f"toy{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ROOT / "recipes" / "configs" / "general" / "minilm_general.yaml"
    return [
        *("--config", str(config), "--data-dir", str(tmp_path), "--corpora", '{"toy0": "cc0-1.0", "toy1": "mit"}'),
        *("--encoder.model", tiny_model, *SHORT),
    ]


def make(arguments: list[str], output: Path) -> Path:
    module = recipe("minilm_general")
    module.main(parse_settings(module.GeneralSettings, [*arguments, "--output", str(output)]))
    return output


def test_the_recipe_makes_the_same_adapter_again(arguments: list[str], tmp_path: Path) -> None:
    first, again = make(arguments, tmp_path / "first"), make(arguments, tmp_path / "again")
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in FILES)


def test_interrupted_it_goes_on_to_the_same_adapter(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(arguments, tmp_path / "whole")
    module = recipe("minilm_general")
    settings = parse_settings(module.GeneralSettings, [*arguments, "--output", str(tmp_path / "parts")])
    measure, calls = module.measure_tasks, []

    def interrupted(*given: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise TrainingInterrupted("stopped")
        return measure(*given, **named)

    monkeypatch.setattr(module, "measure_tasks", interrupted)
    with pytest.raises(TrainingInterrupted):
        module.main(settings)
    assert not (tmp_path / "parts").exists()  # nothing half done
    module.main(settings)
    assert all((whole / name).read_bytes() == (tmp_path / "parts" / name).read_bytes() for name in FILES)


def test_what_it_makes_is_calibrated_and_loads_by_default(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make(arguments, tmp_path / "run")
    adapter = load_adapter(output)
    assert adapter.inner.head == "readout"
    assert adapter.parameters[TEMPERATURE_SLOPES].abs().sum() > 0
    assert (LOG_ADAPTED_FACTOR in adapter.parameters) == bool(adapter.inner.steps)
    assert len(adapter.parameters[STRENGTH_PRIOR]) == len(adapter.inner.strengths)
    assert SCOPE in adapter.parameters
    licences = {source["license"] for source in adapter.record["sources"]}
    assert licences == {"cc0-1.0", "mit"}
    shutil.copytree(output, tmp_path / "adapters" / "minilm-general")
    monkeypatch.setattr(locate, "SHIPPED", tmp_path / "adapters")
    classifier = FewShotClassifier().fit(["bal bel", "dil dol", "bil bol"], ["x", "y", "x"])
    scores = classifier.scope_score(["bal bel", "kam"])
    assert np.all((scores > 0) & (scores < 1))
    assert list(classifier.predict(["bal bel"])) == ["x"]
