"""The benchmarks run on the tiny encoder: the engine beside the plain loop, training of an arm, and what designs are
chosen by: it records episodes, resumes, prints paired differences. Those that report are in test_report_benchmark.py.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import write_rows
from tests.data.test_episodes import numbered
from tests.given import Patch, Shown, adapter_of
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.meta import evaluation
from textmeta.meta.evaluation import _calibration_error, score_episodes
from textmeta.meta.learner import TaskLearner
from textmeta.sharing.store import load_adapter, save_adapter


@pytest.fixture
def toy(corpus: Corpus, tmp_path: Path) -> Path:
    """The toy corpus as a file."""
    return write_rows(tmp_path / "toy.jsonl", corpus)


@pytest.mark.parametrize("adapt", ["pooling", "lora"])
def test_the_engine_returns_the_gradient_of_a_plain_loop(
    adapt: str, benchmark, run_script, toy: Path, tiny_model: str, capsys: Shown
) -> None:
    arguments = ["--data", toy, "--model", tiny_model, "--tasks=2", "--repeats=1", "--adapt", adapt, "--threads=1"]
    run_script(benchmark("engine"), *arguments)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows[2:]] == [["fomaml", "2"], ["maml", "2"]]
    for *_, fresh, cached, distance in rows[2:]:
        assert float(fresh) > 0
        assert float(cached) > 0
        assert float(distance) < 1e-4


def test_scopes_tell_other_classes(benchmark, run_script, toy: Path, tiny_model: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "choose").mkdir()
    toy.rename(tmp_path / "choose" / "toy.jsonl")
    adapter = adapter_of(tiny_model, scope=torch.eye(8)[0])  # the largest probability alone tells
    save_adapter(tmp_path / "adapter", adapter)
    arguments = ["--data-dir", tmp_path, "--table=scope", "--episodes=2", "--adapter", tmp_path / "adapter"]
    run_script(benchmark("other_classes"), *arguments)
    _, name, _, scope, largest, _ = capsys.readouterr().out.splitlines()[2].split("|")
    assert name.strip() == "toy"
    assert scope == largest != " 50.0 "
    save_adapter(tmp_path / "adapter", replace(adapter, scope=None))
    with pytest.raises(SystemExit):
        run_script(benchmark("other_classes"), *arguments)


@pytest.fixture
def choose(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("choose")


@pytest.fixture
def cells(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("cells")


@pytest.fixture
def data_dir(corpus: Corpus, tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data" / "choose" / "toy.jsonl", corpus).parents[1]


@pytest.fixture
def adapter(tiny_model: str, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "tiny", adapter_of(tiny_model, layers=(2, 4), steps=2))
    return tmp_path / "tiny"


@pytest.fixture
def record(
    choose: ModuleType, data_dir: Path, adapter: Path, run_script, tmp_path: Path, monkeypatch: Patch, capsys: Shown
) -> Callable[..., str]:
    """Record 6 episodes a cell in results.jsonl, 3 a line, with further options; return what is printed."""
    monkeypatch.setattr(choose, "CHUNK", 3)
    places = ["--data-dir", data_dir, "--results", tmp_path / "results.jsonl", "--adapters", adapter]

    def run(*more: str) -> str:
        run_script(choose, *places, "--episodes=6", "--run", *more)
        return capsys.readouterr().out

    return run


def test_every_variant_is_recorded_once(choose: ModuleType, record: Callable[..., str], tmp_path: Path) -> None:
    results, shots = tmp_path / "results.jsonl", ("--shots", "1", "5")
    out = record(*shots, "--by-corpus")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    alone = sum("alone" in name for name in choose.VARIANTS)
    assert len(lines) == 2 * (2 * (len(choose.VARIANTS) - alone) + alone)
    assert all(len(line["result"]["right"]) == 3 for line in lines)
    assert "toy" in out
    assert "names @ tiny" in out
    assert "over plain" in out
    whole = results.read_text()
    torn = whole[: whole.rindex("\n", 0, -1) - 20]  # stopped while the last line but one was written
    results.write_text(torn)
    record(*shots)
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["key"], line["result"]["nll"]) for line in again] == [
        (line["key"], line["result"]["nll"]) for line in lines
    ]
    results.write_text(results.read_text().replace(lines[0]["result"]["adapter_sha256"], "another"))
    with pytest.raises(SystemExit, match="another adapter"):
        record(*shots)


@pytest.mark.parametrize("adapt", ["pooling", "pooling+lora"])
def test_what_is_recorded_is_what_evaluation_says(
    choose: ModuleType, cells: ModuleType, data_dir: Path, adapter: Path, monkeypatch: Patch, adapt: str
) -> None:
    """Texts are read once a corpus, and tasks are learned together: the answers are the same."""
    (cell,) = cells.cells_of(cells.choose_corpora(data_dir), [2])
    episodes: list[Episode] = [choose.VARIANTS["names"](cell.episode(number), cell, number) for number in range(4)]
    monkeypatch.setattr(evaluation, "TASKS_AT_ONCE", 3)
    answers, _ = choose.Contestant(adapter, {"adapt": adapt}).answers(cell, episodes)
    result = cells.result_of(answers, episodes)
    loaded = load_adapter(adapter)[0]
    own = replace(loaded, learner=replace(loaded.learner, adapt=adapt))  # type: ignore[arg-type]
    monkeypatch.setattr(evaluation, "TASKS_AT_ONCE", 1)
    expected = score_episodes(TaskLearner(loaded.load_reader(), own), episodes)
    assert np.divide(result["right"], result["queries"]) == pytest.approx(expected.accuracy)
    assert np.array(result["nll"]) == pytest.approx(1000 * expected.nll, abs=2)
    assert np.array(result["f1"]) == pytest.approx(1000 * expected.macro_f1, abs=1)


def test_what_is_changed_without_training_is_another_method(
    choose: ModuleType, record: Callable[..., str], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(choose, "CHUNK", 6)
    results = tmp_path / "results.jsonl"
    options = ("--shots", "5", "--variants", "unlabelled", "--cache", str(tmp_path / "frozen"))
    for more in ([], ["--precision", "bf16"], ["--adapt", "none"]):
        shown = record(*options, *more)
    assert "unlabelled adapt=none @ tiny over unlabelled" in shown
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    methods = ["unlabelled", "unlabelled adapt=none"]
    assert [line["key"]["method"] for line in lines] == methods
    assert len({tuple(line["result"]["nll"]) for line in lines}) == 2


def test_differences_are_paired_by_episode(choose: ModuleType) -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(20, 90, 200)
    better = {("a", 1): hard + 1 + rng.normal(0, 0.1, 200)}
    mean, half = choose.scores.difference(better, {("a", 1): hard[:150]}, [("a", 1), ("b", 1)])
    assert mean == pytest.approx(1, abs=0.05)
    assert 0 < half < 0.05
    assert choose.scores.difference(better, {}, [("a", 1)]) is None


def test_a_gap_ends_what_is_paired(choose: ModuleType) -> None:
    def line(first: int) -> dict:
        key = {"method": "plain", "adapter": "x", "corpus": "a", "shots": 1, "first": first}
        key |= {"classes": 2, "sha256": "0"}
        return {"key": key, "result": {"right": [5, 10], "queries": [25, 25]}}

    found = choose.scores.accuracies([line(0), line(4)])
    assert found["plain @ x"]["a", 1].tolist() == [20, 40]


def test_unlabelled_texts_never_change_with_the_code(cells: ModuleType) -> None:
    """Results are paired with those recorded earlier."""
    corpus, mixtures = numbered(), ("same", "skewed", "others")
    tasks = EpisodeSampler(corpus, EpisodeSettings(3, 2, 2), seed=0).take(3)
    more = [cells.with_unlabelled(e, corpus, 1, i, 5, mixture) for i, e in enumerate(tasks) for mixture in mixtures]
    drawn = repr([episode.unlabelled_texts for episode in more])
    expected = "4752f727dd2b9a4e2e4e28f18c797069288dd0f59322471c6f280c0e07389a46"
    assert hashlib.sha256(drawn.encode()).hexdigest() == expected


def test_calibration_errors_are_those_of_all_queries_together(choose: ModuleType, cells: ModuleType) -> None:
    rng = np.random.default_rng(0)
    lines, sure, right = [], [], []
    for corpus in ("a", "b"):
        probabilities = [rng.dirichlet([0.5] * 3, 6) for _ in range(4)]
        labels = [rng.integers(0, 3, 6) for _ in range(4)]
        episodes = [SimpleNamespace(query_labels=part) for part in labels]
        key = {"method": "plain", "adapter": "x", "corpus": corpus, "shots": 5}
        lines.append({"key": key, "result": cells.result_of(probabilities, episodes)})
        sure += [rows.max(1) for rows in probabilities]
        right += [rows.argmax(1) == part for rows, part in zip(probabilities, labels, strict=True)]
    expected = 100 * _calibration_error(np.concatenate(sure), np.concatenate(right))
    assert choose.scores.calibration_errors(lines) == {("plain @ x", 5): pytest.approx(expected, abs=0.05)}


def test_the_card_has_the_recorded_figures(choose: ModuleType, adapter: Path) -> None:
    rng = np.random.default_rng(0)
    cells = [(corpus, shots) for corpus in "ab" for shots in (1, 5)]
    before = {cell: rng.uniform(0, 100, 50) for cell in cells}
    after = {cell: values + rng.uniform(0, 10, 50) for cell, values in before.items()}
    before["b", 5] = np.append(before["b", 5], 0.0)  # more episodes than are paired
    found = {"prototypes-last-256": before, "plain @ tiny": after}
    results = choose.results_of(found, {("plain @ tiny", k): 2.5 for k in (1, 5)}, "tiny")
    assert list(results) == ["2 other corpora, 5-way 1-shot", "2 other corpora, 5-way 5-shot"]
    row = results["2 other corpora, 5-way 5-shot"]
    means = [np.mean([part[cell][:50].mean() for cell in cells if cell[1] == 5]) / 100 for part in (before, after)]
    assert [row["frozen"]["accuracy"], row["meta_trained"]["accuracy"]] == pytest.approx(means)
    assert row["paired"]["difference"] == pytest.approx(means[1] - means[0])
    assert row["paired"]["low"] < row["paired"]["difference"] < row["paired"]["high"]
    save_adapter(adapter, replace(load_adapter(adapter)[0], record={"results": results}))
    told = f"| 2 other corpora, 5-way 5-shot | 100 | {100 * means[0]:.2f} ± "
    assert told in (adapter / "README.md").read_text()
