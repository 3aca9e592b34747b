"""The accuracy benchmark, on the tiny encoder and toy corpora."""

import importlib
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from textmeta import Corpus, FewShotClassifier
from textmeta.cli import parse_settings
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.errors import DataError, SettingsError
from textmeta.meta.evaluation import (
    EpisodeScores,
    expected_calibration_error,
    frozen_prototypes,
    paired_difference,
    score_episodes,
)
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import SCOPE
from textmeta.model.scope import RULE_SIZE

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECIPE = """
encoder: {{model: {model}, max_length: 32}}
lora: {{rank: 4}}
episodes: {{ways: 3, shots: [1, 2], queries: 2}}
inner: {{steps: {steps}}}
training: {{algorithm: {algorithm}, steps: 4, tasks_per_step: 1, validate_every: 2, validation_episodes: 2, warmup: 0}}
"""
SCOPE_RECIPE = """
inner: {{steps: 0, head: readout, strengths: [0.0, 1.0]}}
calibration: {{episodes: 4, rows: 6, ways: [3, 4], shots: [1, 2], queries: 2}}
"""
SERIES = {"queries": 2, "nll": [100, 300], "f1": [1000, 500]}


@pytest.fixture(autouse=True)
def benchmarks_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def folder(corpus: Corpus, tmp_path: Path) -> Path:
    """Two corpora, one with a fold."""
    rows = [{"text": t, "label": corpus.class_names[c]} for t, c in zip(corpus.texts, corpus.labels, strict=True)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("known", "new"):
        (tmp_path / f"{name}.jsonl").write_text(content)
    names = corpus.class_names
    split = {"train": names[:4], "valid": names[4:7], "test": names[7:]}
    (tmp_path / "known.splits.json").write_text(json.dumps({"01": split}))
    return tmp_path


@pytest.fixture
def settings(folder: Path, tiny_model: str) -> Any:
    """Of a small benchmark, without SetFit."""
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_model, steps=1, algorithm="anil"))
    (folder / "protonet.yaml").write_text(RECIPE.format(model=tiny_model, steps=0, algorithm="protonet"))
    accuracy = module("accuracy")
    return accuracy.AccuracySettings(
        folder,
        parts=["classes"],
        methods=[name for name in accuracy.METHODS if name not in ("setfit", "sentence-transformers")],
        unseen=["new"],
        adapters=[],
        episodes=3,
        recipe=folder / "recipe.yaml",
        protonet=folder / "protonet.yaml",
        runs=folder / "runs",
        cache=folder / "cache",
        results=folder / "results.jsonl",
    )


def lines_of(settings: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in settings.results.read_text().splitlines()]


def test_runs_are_lines_and_are_not_repeated(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = module("accuracy")
    accuracy.main(settings)
    lines = lines_of(settings)
    assert len(lines) == 2 * 7  # 1 and 5 shots, each method
    for line in lines:
        assert {"key", "seconds", "date", "versions", "device", "result"} == line.keys()
        result = line["result"]
        assert result["queries"] == 25
        assert [len(result[name]) for name in ("right", "nll", "f1")] == [3, 3, 3]
        assert all(isinstance(value, int) for name in ("right", "nll", "f1") for value in result[name])
        assert sum(result["bins"]["count"]) == 75
        assert sum(result["bins"]["correct"]) == sum(result["right"])
    trained = {line["key"]["method"]: line["result"] for line in lines if line["key"].get("seed") is not None}
    assert trained["textmeta"]["training_steps"] == 4
    assert trained["protonet"]["training_steps"] >= 1
    first = capsys.readouterr().out
    rows = [line for line in first.splitlines() if line.startswith("| known, 5 |")]
    frozen = next(line["result"] for line in lines if line["key"]["method"] == "frozen" and line["key"]["shots"] == 5)
    assert rows[0].split("|")[2].strip().startswith(f"{sum(frozen['right']) / 0.75:.2f}")

    before = settings.results.read_bytes()
    accuracy.main(settings)
    assert settings.results.read_bytes() == before
    capsys.readouterr()
    accuracy.main(replace(settings, tables=True, data_dir=Path("nowhere")))  # from the lines alone
    assert capsys.readouterr().out.strip() in first

    # what is lost of the file is done again, to the same numbers; what the trainers and caches keep is used
    whole = before.splitlines(keepends=True)
    settings.results.write_bytes(b"".join(whole[:-1]) + whole[-1][:40])
    accuracy.main(settings)
    again = lines_of(settings)
    assert again[:-1] == lines[:-1]
    assert {**again[-1]["result"], "episode_seconds": 0} == {**lines[-1]["result"], "episode_seconds": 0}


def test_unseen_corpora(settings: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = module("accuracy")
    accuracy.main(replace(settings, methods=["textmeta"], episodes=2))
    (adapter,) = (settings.runs / "known-01").glob("textmeta-0-*")
    shipped = settings.data_dir / "shipped"
    shutil.copytree(adapter, shipped / "minilm-general")
    monkeypatch.setattr("textmeta.artifact.locate.SHIPPED", shipped)
    usual = accuracy.AccuracySettings(settings.data_dir).adapters
    quick = [name for name in settings.methods if name != "lora"]
    own = replace(settings, parts=["all_way", "corpora", "curve"], methods=quick, adapters=[*usual, "nobody/nothing"])
    capsys.readouterr()
    accuracy.main(own)
    out = capsys.readouterr().out
    assert "no adapter nothing" in out
    assert "left out: curve, new, 20 shots" in out  # of 16 texts
    lines = [line["key"] for line in lines_of(settings)]
    assert {line["ways"] for line in lines if line["part"] == "all_way"} == {0}
    curve = [line for line in lines if line["part"] == "curve"]
    assert {line["shots"] for line in curve} == {0, 1, 2, 5, 10}
    assert {line["method"] for line in curve if line["shots"] == 0} == {"frozen-names", "textmeta-names"}
    assert {line["corpus"] for line in curve} == {"new"}
    by_shipped = {(line["part"], line["shots"]) for line in lines if line.get("adapter") == "minilm-general"}
    assert by_shipped == {("corpora", n) for n in (1, 5, 10)} | {("curve", n) for n in (0, 1, 2, 5, 10)}
    assert not [line for line in lines if line["part"] == "corpora" and line["method"] == "protonet"]  # no adapter
    assert str(settings.runs) not in settings.results.read_text()
    if importlib.util.find_spec("matplotlib"):
        assert (settings.results.parent / "accuracy_curve.png").stat().st_size > 10_000


def test_a_curve_has_no_point_of_a_few_episodes() -> None:
    scores, picture = module("accuracy_scores"), module("accuracy_picture")

    def of(count: int) -> dict:
        return {None: scores.Series(np.full(count, 0.5), np.zeros(count), np.zeros(count), np.zeros((3, 15)))}

    rows = {("new", 1): {"frozen": of(10), "setfit": of(5)}, ("new", 10): {"frozen": of(10), "setfit": of(4)}}
    points = picture.curve_points({**rows, ("other", 1): {"frozen": of(2)}}, "new")
    assert {key: len(values) for key, values in points.items()} == {
        (1, "frozen"): 10, (1, "setfit"): 5, (10, "frozen"): 10,
    }  # fmt: skip
    assert (points[1, "setfit"] == 50).all()
    rows = {("new", 1): {"frozen": of(200), "setfit": of(20)}, ("new", 10): {"frozen": of(200), "setfit": of(19)}}
    assert picture.curve_points(rows, "new").keys() == {(1, "frozen"), (1, "setfit"), (10, "frozen")}


def test_the_key_holds_what_the_result_depends_on(settings: Any) -> None:
    accuracy = module("accuracy")

    def keys(**changes: Any) -> list[str]:
        return [json.dumps(run.key, sort_keys=True) for run in accuracy.Runs(replace(settings, **changes), [])]

    usual = keys()
    assert len(set(usual)) == len(usual) == 14
    for change in ({"episodes": 4}, {"rows": 12}):
        assert not set(usual) & set(keys(**change))
    trained = {key for key in usual if '"model"' in key}
    assert len(trained) == 6
    assert set(usual) - set(keys(steps=3)) == set(usual) - set(keys(seeds=[1])) == trained
    assert set(usual) < set(keys(seeds=[0, 1]))


def test_equal_time(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy, training = module("accuracy"), module("accuracy_training")
    bench = accuracy.Runs(settings, []).bench
    monkeypatch.setattr(training.Trainer, "_calibrate", lambda *_: (0.5, 1.0))
    parts = [bench.corpora.part("known", "01", part) for part in ("train", "valid")]
    encoder = bench.encoder(bench.protonet.lora)
    trained = bench.trainer.train_as_long("p", encoder, bench.protonet, *parts, seconds=5.2)
    assert trained.steps == 6  # (5.2 - 2 validations) / 0.5
    assert trained.result.record["settings"]["training"]["validate_every"] == 3
    monkeypatch.setattr(training.Trainer, "_calibrate", lambda *_: (0.1, 0.0))
    again = bench.trainer.train_as_long("p", encoder, bench.protonet, *parts, seconds=9)
    assert again is trained  # chosen once


def test_a_training_whose_time_nobody_knows_is_done_again(settings: Any) -> None:
    accuracy, training = module("accuracy"), module("accuracy_training")
    bench = accuracy.Runs(settings, []).bench
    parts = [bench.corpora.part("known", "01", part) for part in ("train", "valid")]
    encoder = bench.encoder(bench.recipe.lora)
    first = bench.trainer.train("t", encoder, bench.recipe, *parts)
    (folder,) = settings.runs.glob("t-*")
    (folder / "times.json").unlink()  # as if killed between the last checkpoint and the end
    again = training.Trainer(settings.runs, bench.cache).train("t", encoder, bench.recipe, *parts)
    assert again.steps == first.steps
    assert json.loads((folder / "times.json").read_text())["steps"] == first.steps
    for name, value in first.result.parameters.items():
        assert torch.equal(value, again.result.parameters[name])


def test_time_of_a_run_that_was_killed_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = module("accuracy_training")
    steps: Iterator[int] = iter([0, 10, 15, 20])  # 5 steps of the second run are nowhere: it was killed after them
    monkeypatch.setattr(training, "_step", lambda _: next(steps))
    for _ in range(2):
        with training._timed(tmp_path):
            pass
    assert json.loads((tmp_path / "times.json").read_text())["steps"] == 15


@pytest.fixture
def scope(settings: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a benchmark of the part scope: 2 ways of the fold's 5 test classes, and texts of no class beside "known"."""
    episodes = module("accuracy_episodes")
    monkeypatch.setattr(episodes, "OOS", {"known": "known_oos"})
    monkeypatch.setattr(episodes, "SCOPE", {"oos": (0, (2,), 3), "left-out": (2, (1, 2), 4)})
    rows = [{"text": f"{corpus.texts[row]} {row}", "label": "oos", "split": "test"} for row in range(60)]
    rows += [{"text": "not to be used", "label": "oos", "split": "train"}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (settings.data_dir / "known_oos.jsonl").write_text(content)
    recipe = settings.recipe.read_text().replace("inner: {steps: 1}", SCOPE_RECIPE.format().strip())
    settings.recipe.write_text(recipe.replace("anil", "protonet"))
    return replace(settings, parts=["scope"], episodes=None)


def test_scope_episodes_are_half_from_outside(scope: Any, corpus: Corpus) -> None:
    accuracy, episodes = module("accuracy"), module("accuracy_episodes")
    corpora = accuracy.Runs(scope, []).bench.corpora
    class_of = {text: corpus.class_names[c] for text, c in zip(corpus.texts, corpus.labels, strict=True)}
    test_classes = set(corpora.part("known", "01", "test").class_names)
    cells = list(corpora.cells("scope", ["known", "new"], ["01"], ["new"], None))
    assert [(cell.setting, cell.ways, cell.shots, cell.episodes) for cell in cells] == [
        ("oos", 0, 2, 3),
        ("left-out", 2, 1, 4),
        ("left-out", 2, 2, 4),
    ]
    for cell in cells:
        drawn = corpora.episodes(cell)
        ways = cell.ways or 5
        for episode in drawn:
            inside = episode.query_labels != episodes.OUTSIDE
            assert (inside.sum(), (~inside).sum()) == (5 * ways, 5 * ways)
            assert len(set(episode.query_texts) | set(episode.support_texts)) == 10 * ways + cell.shots * ways
            assert episode.support_labels.tolist() == np.repeat(np.arange(ways), cell.shots).tolist()
            outside = {text for text, own in zip(episode.query_texts, inside, strict=True) if not own}
            if cell.setting == "oos":
                assert outside <= set(corpora.outside("known").texts)
            else:
                others = {class_of[text] for text in outside}
                assert len(others) == ways
                assert others <= test_classes - set(episode.class_names)
            for text, label in zip(episode.query_texts, episode.query_labels, strict=True):
                assert label == episodes.OUTSIDE or class_of[text] == episode.class_names[label]
        last = corpora.episodes(replace(cell, episodes=2))[1]  # whatever else is drawn
        assert last.query_texts == drawn[1].query_texts
        first, second = (
            {t for t, c in zip(e.query_texts, e.query_labels, strict=True) if c == episodes.OUTSIDE} for e in drawn[:2]
        )
        assert first != second
    assert "not to be used" not in corpora.outside("known").texts


def test_scope_runs_and_tables(scope: Any, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, own = module("accuracy"), module("accuracy_scope")
    accuracy.main(scope)
    out = capsys.readouterr().out
    lines = lines_of(scope)
    assert len(lines) == 3 * 3
    for line in lines:
        key, result = line["key"], line["result"]
        assert ("outside" in key) == (key["setting"] == "oos")
        assert ("accuracy" in result) == (key["method"] == "textmeta")
        for name in {"auroc", "aupr", "fpr95", "accuracy"} & result.keys():
            assert len(result[name]) == key["episodes"]
            assert all(isinstance(value, int) and 0 <= value <= 1000 for value in result[name])
    assert "## Out of scope: all test classes at once" in out
    assert "## Out of scope: 5-way" in out
    of = {line["key"]["method"]: line["result"]["auroc"] for line in lines if line["key"]["setting"] == "oos"}
    row = next(line for line in out.splitlines() if line.startswith("| known, 2 |")).split(" | ")
    assert [cell.split(" ±")[0] for cell in row[1:4]] == [
        f"{np.mean(of[name]) / 10:.2f}" for name in ("frozen", "logistic", "textmeta")
    ]
    assert row[4].split(" [")[0] == f"{(np.mean(of['textmeta']) - np.mean(of['frozen'])) / 10:+.2f}"

    # the rule is the classifier's own
    bench = accuracy.Runs(scope, []).bench
    (folder,) = (scope.runs / "known-01").glob("textmeta-0-*")
    classifier = FewShotClassifier.from_pretrained(folder)
    cells = list(bench.corpora.cells("scope", ["known"], ["01"], [], None))
    for cell in cells:
        probabilities, episodes = [], bench.corpora.episodes(cell)
        for episode in episodes:
            classifier.fit(episode.support_texts, episode.support_labels.tolist())
            probabilities.append(classifier.scope_score(episode.query_texts))
        expected = own.score_scope(probabilities, episodes, probabilities=True).to_result()
        result = next(
            line["result"]
            for line in lines
            if (line["key"]["setting"], line["key"]["shots"], line["key"]["method"])
            == (cell.setting, cell.shots, "textmeta")
        )
        for name, values in expected.items():
            np.testing.assert_allclose(result[name], values, atol=1.5)  # thousandths

    # the baselines, by other means
    cell = cells[0]
    episodes = bench.corpora.episodes(cell)
    row_of, features = bench.features(cell, episodes)
    vectors = {text: features[row].double().numpy() for text, row in row_of.items()}
    means = [
        np.mean([vectors[t] for t, c in zip(e.support_texts, e.support_labels, strict=True) if c == way], axis=0)
        for e in episodes[:1] for way in range(e.ways)
    ]  # fmt: skip
    nearest = [max(vectors[t] @ m / np.linalg.norm(m) for m in means) for t in episodes[0].query_texts]
    frozen = own.SCOPE_METHODS["frozen"].run(bench, cell, episodes[:1], {}).scores
    expected = own.score_scope([np.array(nearest)], episodes[:1])
    np.testing.assert_allclose([frozen.auroc, frozen.aupr], [expected.auroc, expected.aupr], atol=1e-3)


def test_scope_by_the_rule_of_tasks_that_take_steps(scope: Any) -> None:
    accuracy, own = module("accuracy"), module("accuracy_scope")
    bench = accuracy.Runs(replace(scope, methods=["textmeta"]), []).bench
    inner, encoder = replace(bench.recipe.inner, steps=2), bench.encoder(bench.recipe.lora)
    parameters = module("accuracy_methods").start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    parameters[SCOPE] = torch.linspace(-1, 1, RULE_SIZE)
    (cell, *_) = bench.corpora.cells("scope", ["known"], ["01"], [], 1)
    (episode,) = bench.corpora.episodes(cell)
    (found,) = own.in_scope_probabilities(encoder, parameters, inner, None, [episode])
    classifier = FewShotClassifier(encoder, parameters, inner)
    classifier.fit(episode.support_texts, episode.support_labels.tolist())
    np.testing.assert_allclose(found, classifier.scope_score(episode.query_texts), atol=1e-5)


def test_scope_measures() -> None:
    own, outside = module("accuracy_scope"), module("accuracy_episodes").OUTSIDE
    labels = np.array([0] * 20 + [outside] * 20)
    episode = SimpleNamespace(query_labels=labels)
    inside = np.linspace(0.6, 0.9, 20)
    perfect = np.concatenate([inside, np.linspace(0.1, 0.4, 20)])
    # the lowest of 20 in scope is below all: 95 % are taken without it; 3 of 20 outside are above the second lowest
    mixed = np.concatenate([[0.0], inside[1:], [0.95, 0.95, 0.95], np.linspace(0.1, 0.4, 17)])
    scores = own.score_scope([perfect, mixed, -perfect], [episode] * 3, probabilities=True)
    assert scores.auroc.round(6).tolist() == [1.0, round(19 * 17 / 400, 6), 0.0]
    assert scores.fpr95.tolist() == [0.0, 0.15, 1.0]
    assert scores.accuracy is not None
    assert scores.accuracy.tolist() == [1.0, (19 + 17) / 40, 0.5]
    assert scores.aupr[0] == 1.0
    assert own.score_scope([perfect], [episode]).accuracy is None
    tables = module("accuracy_scope_tables")
    ours = {"01": {"auroc": np.array([90.0, 80.0])}, "02": {"auroc": np.array([70.0])}}
    other = {"01": {"auroc": np.array([85.0])}, "03": {"auroc": np.array([1.0])}}
    assert tables.paired_auroc(ours, other).tolist() == [5.0]


def test_files_of_two_processes_put_together(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = module("accuracy")
    parts = []
    for name, methods in (("one", ["frozen"]), ("two", ["frozen", "logistic"])):
        own = replace(settings, methods=methods, results=settings.data_dir / f"{name}.jsonl")
        accuracy.main(own)
        parts.append(own.results.read_text())
    first = json.loads(parts[0].splitlines()[0])
    later = [json.loads(line) for line in parts[1].splitlines()]
    for line in later:
        line["result"] |= {"right": [0] * 3} if line["key"] == first["key"] else {}  # as if it had gone another way
    settings.results.write_text(parts[0] + "".join(json.dumps(line) + "\n" for line in later))
    whole = settings.results.read_bytes()
    capsys.readouterr()
    accuracy.main(replace(settings, methods=["frozen", "logistic"]))
    assert settings.results.read_bytes() == whole  # nothing is missing
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| known, 1 |"))
    assert row.split("|")[2].strip().startswith(f"{sum(first['result']['right']) / 0.75:.2f}")


@pytest.mark.parametrize("given", ["[01, 02]", "['01', '02']", "[1, 2]"])
def test_folds_without_quotes(given: str) -> None:
    accuracy = module("accuracy")
    assert parse_settings(accuracy.AccuracySettings, ["--data-dir=.", "--folds", given]).folds == ["01", "02"]


def test_quick_is_small(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy, methods = module("accuracy"), module("accuracy_methods")
    monkeypatch.setattr(methods, "has_setfit", lambda: True)
    monkeypatch.setattr(methods, "version", lambda _: "0")
    everything = replace(
        settings, quick=True, episodes=None, parts=list(accuracy.PARTS), methods=list(accuracy.METHODS)
    )
    runs = accuracy.Runs(everything.scaled(), [])
    keys = [run.key for run in runs]
    assert {key["part"] for key in keys} == {"classes", "all_way", "corpora", "curve"}  # too few classes for scope
    assert max(key["episodes"] for key in keys) == 20
    assert {key["episodes"] for key in keys if key["method"] == "lora"} == {2}
    ours = [key for key in keys if key["method"] == "textmeta"]
    assert {key["episodes"] for key in ours if key["fold"] is None} <= {8}, "which takes inner steps"
    assert {key["episodes"] for key in ours if key["part"] == "classes"} == {20}
    fits = [key for key in keys if key["method"] == "setfit"]
    assert {(key["part"], key["shots"]) for key in fits} == {("classes", 1), ("classes", 5)}
    assert {key["episodes"] for key in fits} == {2}
    assert runs.bench.recipe.training.steps == 20
    for name in ("banking77", "huffpost", "clinc150", "another"):
        for ending in ("jsonl", "splits.json"):
            shutil.copy(settings.data_dir / f"known.{ending}", settings.data_dir / f"{name}.{ending}")
    runs = accuracy.Runs(replace(everything, unseen=["huffpost", "trec6", "another"]).scaled(), [])
    used = {part: runs._used(part) for part in accuracy.PARTS}
    assert used["classes"] == used["all_way"] == ["banking77", "huffpost"]
    assert used["corpora"] == used["curve"] == ["huffpost"]
    assert used["scope"] == ["clinc150"]


def test_dear_methods_have_the_first_episodes() -> None:
    methods, cell = module("accuracy_methods"), module("accuracy_episodes").Cell
    fit = methods.METHODS["setfit"]

    def counts(part: str, episodes: int = 600) -> list[int]:
        return [fit.count(5 * shots, cell(part, "c", None, 5, shots, episodes)) for shots in (1, 5, 10, 20)]

    assert counts("classes") == counts("curve") == [20, 6, 6, 0]
    assert counts("corpora") == [60, 18, 18, 0], "a corpus without folds has one cell, where others have five"
    assert counts("corpora", episodes=10) == [10, 10, 10, 0]
    assert methods.METHODS["frozen"].count(1000, cell("corpora", "c", None, 5, 200, 600)) == 600


def test_dear_methods_have_all_episodes_where_that_is_asked_for(settings: Any) -> None:
    accuracy = module("accuracy")
    for asked, found in ((False, {100}), (True, {150})):
        asking = replace(settings, methods=["lora"], parts=["classes"], episodes=150, all_episodes=asked)
        assert {run.key["episodes"] for run in accuracy.Runs(asking, []) if run.key["shots"] == 1} == found


def test_more_episodes_go_on_from_those_that_a_line_has(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy, ran = module("accuracy"), []
    run = accuracy.METHODS["lora"].__class__.run

    def counted(method: Any, bench: Any, cell: Any, episodes: list, variant: Any) -> Any:
        ran.append((cell.episodes, len(episodes)))
        return run(method, bench, cell, episodes, variant)

    monkeypatch.setattr(accuracy.METHODS["lora"].__class__, "run", counted)
    one = replace(settings, methods=["lora", "textmeta"])
    for episodes in (2, 3, 5):
        accuracy.main(replace(one, episodes=episodes))
    assert ran == [(2, 2)] * 4 + [(3, 1)] * 4 + [(5, 2)] * 4
    at_once = replace(one, episodes=5, results=settings.results.with_name("at-once.jsonl"))
    accuracy.main(at_once)

    for line, other in zip(lines_of(one)[-4:], lines_of(at_once), strict=True):
        assert line["key"] == other["key"]
        bins, at_once_bins = line["result"].pop("bins"), other["result"].pop("bins")
        assert bins.pop("confidence") == pytest.approx(at_once_bins.pop("confidence"), abs=3e-4)  # rounded thrice
        assert bins == at_once_bins
        assert line["result"].pop("nll") == pytest.approx(other["result"].pop("nll"), abs=1)  # in other batches
        assert {**line["result"], "episode_seconds": 0} == {**other["result"], "episode_seconds": 0}

    # what ran elsewhere is not gone on with
    for other in ({"device": "cuda"}, {"versions": {"torch": "1.0"}}):
        elsewhere = [line | other for line in lines_of(one)]
        assert accuracy.Runs(one, lines_of(one))._first_episodes(elsewhere[-1]["key"])["key"]["episodes"] == 3
        assert accuracy.Runs(one, elsewhere)._first_episodes(elsewhere[-1]["key"]) is None


def test_a_line_of_another_part_counts_if_it_was_made_alike(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = module("accuracy")
    curve = replace(settings, parts=["curve"], methods=["frozen"])
    accuracy.main(replace(curve, parts=["corpora"]))
    ran = []
    monkeypatch.setattr(accuracy.METHODS["frozen"].__class__, "run", lambda *given: ran.append(given[2].shots))
    runs = list(accuracy.Runs(curve, lines_of(settings)))
    one_shot = next(run for run in runs if run.key["shots"] == 1)
    assert one_shot.work()["right"] == lines_of(settings)[0]["result"]["right"]
    elsewhere = [line | {"device": "cuda"} for line in lines_of(settings)]
    one_shot = next(run for run in accuracy.Runs(curve, elsewhere) if run.key["shots"] == 1)
    with pytest.raises(AttributeError):  # of what the stand-in returned
        one_shot.work()
    assert ran == [1]


def test_adapters_that_end_in_one_name_are_refused(tmp_path: Path) -> None:
    accuracy = module("accuracy")
    with pytest.raises(SettingsError, match="different names, given 'a/minilm'"):
        accuracy.AccuracySettings(tmp_path, adapters=["a/minilm", "b/minilm"])


def test_tables_are_of_the_seeds_and_adapters_that_are_asked_for(settings: Any) -> None:
    accuracy = module("accuracy")
    asked = replace(settings, seeds=[1], adapters=["runs/one"], protonet_adapters=["other"])
    for key, expected in (
        ({"method": "setfit", "seed": 0}, True),
        ({"model": "textmeta", "seed": 0}, False),
        ({"model": "textmeta", "seed": 1}, True),
        ({"model": "textmeta", "adapter": "one"}, True),
        ({"model": "textmeta", "adapter": "other"}, False),
        ({"model": "protonet", "adapter": "other"}, True),
    ):
        assert accuracy._is_of(key, asked) is expected


def test_joined_results() -> None:
    scores = module("accuracy_scores")
    first = {"right": [1], "nll": [5], "queries": 2, "episode_seconds": 1.0, "steps": 3, "bins": {"count": [1, 1]}}
    second = {
        "right": [2, 0],
        "nll": [4, 9],
        "queries": 2,
        "episode_seconds": 4.0,
        "steps": 4,
        "bins": {"count": [0, 4]},
    }
    assert scores.joined(first, second) == {
        "right": [1, 2, 0],
        "nll": [5, 4, 9],
        "queries": 2,
        "episode_seconds": 3.0,
        "steps": 4,
        "bins": {"count": [1, 5]},
    }
    assert first["right"] == [1]
    assert scores.joined({"auroc": [900]}, {"auroc": [800, 1000]}) == {"auroc": [900, 800, 1000]}
    assert scores.joined({"auroc": [900]}, {"auroc": [800], "aupr": [700]}) == {"auroc": [900, 800]}


def test_torn_lines(tmp_path: Path) -> None:
    runs = module("runs")
    path = tmp_path / "lines.jsonl"
    path.write_text('{"key":1}\n{"key":2}\n{"key":')
    assert runs.read_lines(path) == [{"key": 1}, {"key": 2}]
    assert path.read_text() == '{"key":1}\n{"key":2}\n'
    path.write_text('{"ke')
    assert runs.read_lines(path) == []
    assert path.read_text() == ""
    assert runs.read_lines(tmp_path / "none") == []


def test_paired_differences(capsys: pytest.CaptureFixture[str]) -> None:
    tables, scores = module("accuracy_tables"), module("accuracy_scores")

    def series(*accuracy: float) -> Any:
        count = len(accuracy)
        return scores.Series(np.array(accuracy), np.zeros(count), np.zeros(count), np.zeros((3, 15)))

    ours = {"01": series(0.8, 0.6, 1.0), "02": series(0.4, 0.6)}
    other = {"01": series(0.6, 0.6), "02": series(0.6, 0.2, 1.0), "03": series(0.0)}
    one, two = tables.paired(ours, other)
    assert (one - two).round(6).tolist() == [0.2, 0.0, -0.2, 0.4]
    assert tables._difference(ours, other) == "+10.00"  # of four episodes there is no interval
    assert tables._error_cut(ours, other) == "20"  # mean errors: 50 % before, 40 % after
    assert tables._difference({"04": series(1.0)}, other) == "–"

    many = np.random.default_rng(0).normal(size=(2, 500))
    expected = paired_difference(*(EpisodeScores(a, a, a, a, a) for a in many))  # by the normal distribution
    assert tables.half_interval(many[0] - many[1]) == pytest.approx((expected["high"] - expected["low"]) / 2, rel=5e-3)
    few = np.array([0.2, 0.0, -0.2, 0.4, 0.1])
    test = stats.ttest_1samp(few, 0).confidence_interval()
    assert tables.half_interval(few) == pytest.approx((test.high - test.low) / 2)
    assert tables.half_interval(few[:4]) is None


def test_the_short_table_is_of_the_episodes_that_both_have(capsys: pytest.CaptureFixture[str]) -> None:
    tables = module("accuracy_tables")
    key = {"part": "corpora", "corpus": "c", "shots": 1, "fold": None, "recipe": "a"}
    right = {"frozen": [2, 0, 0], "textmeta": [2, 1]}
    bins = {"bins": {name: [1] * 15 for name in ("count", "confidence", "correct")}}
    lines = [
        {"key": key | {"method": method, "episodes": len(own)}, "result": SERIES | bins | {"right": own, "nll": own}}
        for method, own in right.items()
    ]
    tables._short(lines)
    assert "| 50.00 | 75.00 | +25.00 | 0.00 → 0.00 |" in capsys.readouterr().out


def test_lines_of_different_data_are_not_put_side_by_side() -> None:
    tables = module("accuracy_tables")
    key = {"corpus": "c", "shots": 1, "fold": None, "episodes": 1, "method": "frozen", "data": "a", "encoder": "e"}
    other = {**key, "method": "textmeta", "data": "b"}
    with pytest.raises(DataError, match=r"c, 1 shots: textmeta was run with data 'b', frozen with 'a'"):
        tables.read_rows([{"key": key, "result": SERIES}, {"key": other, "result": SERIES}])


def test_the_newest_settings_count_however_few_episodes_they_have() -> None:
    tables = module("accuracy_tables")

    def line(sha256: str, episodes: int, date: str) -> dict[str, Any]:
        key = {"corpus": "c", "shots": 5, "method": "textmeta", "fold": None, "adapter": "a", "sha256": sha256}
        return {"key": key | {"episodes": episodes}, "date": date}

    old, new, more = line("a", 200, "2026-01-01"), line("b", 20, "2026-01-02"), line("b", 40, "2026-01-02")
    for lines in ([old, new, more], [more, old, new], [new, more, old]):
        assert tables.counting_lines(lines) == [more]
    assert tables.counting_lines([new, old]) == [new]


def test_lines_with_more_episodes_count_and_seeds_are_averaged() -> None:
    tables = module("accuracy_tables")
    bins = {"count": [0] * 14 + [4], "confidence": [0] * 14 + [3.9], "correct": [0] * 14 + [3]}

    def line(right: list[int], seed: int, episodes: int = 2, recipe: str = "a") -> dict[str, Any]:
        key = {"corpus": "c", "shots": 1, "method": "textmeta", "fold": "01", "seed": seed, "recipe": recipe}
        return {"key": key | {"episodes": episodes}, "result": SERIES | {"right": right, "bins": bins}}

    rows = tables.read_rows([line([0, 0], 0), line([2, 1], 0, recipe="b"), line([1, 0], 1), line([9], 1, episodes=1)])
    found = rows["c", 1]["textmeta"]["01"]
    assert found.accuracy.tolist() == [0.75, 0.25]
    assert found.nll.tolist() == [0.1, 0.3]
    assert found.ece == pytest.approx(0.9 / 4)


def test_scores_are_those_of_the_evaluation(encoder: Encoder, corpus: Corpus) -> None:
    scores, methods, cache = module("accuracy_scores"), module("accuracy_methods"), module("accuracy_cache")
    episodes = EpisodeSampler(corpus, EpisodeSettings(4, 3, 4), seed=5).take(40)  # more than one chunk
    texts = cache.unique(corpus.texts)
    features = cache.plain_features(encoder, texts)
    row_of = {text: row for row, text in enumerate(texts)}
    found = scores.score(methods.frozen_probabilities(row_of, features, episodes), episodes)
    expected = frozen_prototypes(encoder, episodes)
    for name in ("accuracy", "macro_f1", "nll", "confidence", "correct"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
    series = scores.Series.of(json.loads(json.dumps(scores.to_result(expected))))
    np.testing.assert_allclose(series.accuracy, expected.accuracy)
    np.testing.assert_allclose(series.nll, expected.nll, atol=5.01e-4)
    assert series.ece == pytest.approx(expected_calibration_error(expected.confidence, expected.correct), abs=1e-5)
    halves = [
        scores.Series.of(scores.to_result(frozen_prototypes(encoder, part))) for part in (episodes[:9], episodes[9:])
    ]
    assert scores.Series.joined(halves).ece == pytest.approx(series.ece, abs=1e-5)


@pytest.mark.parametrize("shots", [0, 2])
def test_frozen_prototypes_with_label_names(
    settings: Any, shots: int, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy, methods, adaptation = module("accuracy"), module("accuracy_methods"), module("accuracy_episodes")
    bench = accuracy.Runs(settings, []).bench
    cell = adaptation.Cell("curve", "new", None, 5, shots, 6)
    episodes = adaptation.with_names(bench.corpora.episodes(cell))
    assert all(len(episode.support_texts) == 5 * shots for episode in episodes)
    found = methods.METHODS["frozen-names"].run(bench, cell, episodes, {}).scores
    start = methods.start_parameters(encoder.factor_shapes, InnerLoopSettings(steps=0), encoder.hidden_size)
    expected = score_episodes(encoder, start, episodes, InnerLoopSettings(steps=0))
    np.testing.assert_allclose(found.nll, expected.nll, atol=1e-5)


def test_states_from_the_disk_are_the_same_bits(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    cache = module("accuracy_cache")
    disk = cache.DiskCache(tmp_path, states_mb=100)
    disk.warm(encoder, corpus)
    (file,) = tmp_path.iterdir()
    other = Encoder(encoder.settings, encoder.lora)
    cache.DiskCache(tmp_path, states_mb=100).warm(other, corpus)

    def refuse(**_: Any) -> None:
        raise AssertionError("the frozen layers ran again")

    other._prefix = refuse  # type: ignore[assignment]
    texts = list(corpus.texts[:20])
    ours, theirs = (one.prepare(texts).buckets for one in (Encoder(encoder.settings, encoder.lora), other))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(ours, theirs, strict=True))
    file.unlink()
    cache.DiskCache(tmp_path, states_mb=0).warm(Encoder(encoder.settings, encoder.lora), corpus)
    assert not list(tmp_path.iterdir())  # too large to keep


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setfit") is None, reason="needs the extra `bench`")
def test_setfit(
    settings: Any, encoder: Encoder, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    accuracy, own = module("accuracy"), module("accuracy_setfit")
    monkeypatch.chdir(settings.data_dir)
    texts = [*corpus.texts[:30], " ".join(corpus.texts[:10])]  # the last one is cut
    found = own.sentence_encoder(encoder.settings).encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(found, encoder.frozen_features(texts).numpy(), atol=1e-5)

    def around() -> tuple[Any, ...]:
        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002 - SetFit draws from it
        return legacy, torch.get_rng_state().tolist(), random.getstate(), sorted(os.listdir())

    before = around()
    capfd.readouterr()
    episodes = EpisodeSampler(corpus, EpisodeSettings(3, 2, 2), seed=1).take(2)
    first, seconds = own.setfit_probabilities(encoder.settings, episodes, seed=0)
    again, _ = own.setfit_probabilities(encoder.settings, episodes, seed=0)
    np.testing.assert_array_equal(first, again)
    assert np.shape(first) == (2, 6, 3)
    assert seconds > 0
    assert around() == before
    shown = capfd.readouterr()
    assert not shown.out
    assert not [line for line in shown.err.split("\r") if line.strip() and not line.strip().startswith("setfit:")]

    accuracy.main(replace(settings, methods=["logistic", "sentence-transformers", "setfit"], episodes=2))
    result = {(line["key"]["method"], line["key"]["shots"]): line["result"] for line in lines_of(settings)}
    assert result["setfit", 1]["fit_seconds"] > 0
    for shots in (1, 5):
        np.testing.assert_allclose(
            result["logistic", shots]["nll"], result["sentence-transformers", shots]["nll"], atol=2
        )
