"""The search for settings of meta-training, on the tiny encoder."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import write_rows
from tests.given import Patch, Shown
from tests.meta.runs import set_constants
from tests.test_recipes import recipe
from textmeta import Corpus
from textmeta.errors import SettingsError
from textmeta.meta import outer_loop

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def search(
    corpus: Corpus, tiny_model: str, run_script: Callable[..., None], tmp_path: Path, monkeypatch: Patch
) -> ModuleType:
    """The recipe, with two steps a trial, validated after each by the corpus itself."""
    found, data = recipe("search"), write_rows(tmp_path / "toy.jsonl", corpus)
    set_constants(monkeypatch, CALIBRATION_EPISODES=3, WARMUP=1, VALIDATE_EVERY=1, VALIDATION_EPISODES=3)
    arguments = ["--data", data, "--output", tmp_path / "out", "--encoder.model", tiny_model, "--episodes=4"]
    arguments += ["--valid", json.dumps([{"dataset": str(data)}])]
    found.run = partial(run_script, found, *arguments)
    return found


def study(folder: Path) -> "optuna.Study":
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'out' / 'study.db'}")


def test_a_grid_of_any_settings_is_searched_once(search: ModuleType, tmp_path: Path, capsys: Shown) -> None:
    grid = {"learner.layers": [[2, 4], [4]], "lora.rank": [2], "learner.steps": [1, 2]}
    for _ in range(2):  # the second run has nothing left to do
        search.run("--sampler=grid", "--search", json.dumps(grid), "--prune=false")
        told = capsys.readouterr().out
    assert "trial 1 of" not in told
    trials = study(tmp_path).trials
    found = {(trial.params["learner.layers"], trial.params["learner.steps"]) for trial in trials}
    assert len(trials) == 4
    assert found == {("[2, 4]", 1), ("[2, 4]", 2), ("[4]", 1), ("[4]", 2)}
    best = max(trials, key=lambda trial: trial.value)
    assert all(trial.value == max(trial.intermediate_values.values()) for trial in trials)
    assert f"The best told {100 * best.value:.2f} % of the validation queries." in told
    assert told.count(" | 2 |\n") == 4, "rows of trials that took both steps"


@pytest.mark.parametrize("given", [{"lora_rat": [1]}, {"lora.rank": [0]}, {"lora_rate": {"low": 1}}, {"seed": []}])
def test_what_cannot_be_searched_is_told_first(search: ModuleType, tmp_path: Path, given: dict) -> None:
    with pytest.raises(SettingsError, match=r"lora_rate|rank|seed"):
        search.run("--search", json.dumps(given))
    assert not (tmp_path / "out").exists()


def test_a_worse_trial_is_stopped(search: ModuleType, tmp_path: Path, monkeypatch: Patch, capsys: Shown) -> None:
    every = iter([0.5] * 6 + [0.4] * 2)
    validate: Callable = lambda *_: {"valid_accuracy": next(every)}  # noqa: E731
    monkeypatch.setattr(outer_loop.Run, "_validate", validate)
    search.run("--trials=4", "--sampler=random", "--search", json.dumps({"lora_rate": {"low": 1e-4, "high": 1e-3}}))
    assert [trial.state.name for trial in study(tmp_path).trials] == ["COMPLETE"] * 3 + ["PRUNED"]
    assert len((tmp_path / "out" / "trial-003" / "record.jsonl").read_text().splitlines()) == 1
    assert "| 40.00 | 1, stopped |" in capsys.readouterr().out


def test_a_search_goes_on_in_the_middle_of_a_trial(search: ModuleType, tmp_path: Path, capsys: Shown) -> None:
    search.run("--trials=1")
    left = study(tmp_path).ask({name: search.distribution(name, given) for name, given in search.SPACE.items()})
    capsys.readouterr()
    search.run("--trials=2")  # as if killed in a second trial, once it was drawn
    assert f"trial 2 of 2: {left.params}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").glob("trial-*")) == ["trial-000", "trial-001"]
    with pytest.raises(SystemExit, match="another folder"):
        search.run("--trials=2", "--seed=1")
