"""The search for settings, on the tiny encoder: what it finds, that it goes on from anywhere, and its errors."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import yaml
from optuna import Trial
from optuna.trial import TrialState

from textmeta import Corpus
from textmeta.cli import parse_settings
from textmeta.errors import DivergedError, SettingsError, TrainingInterrupted
from textmeta.meta import training

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
SHORT = [
    *("--training.steps=4", "--training.tasks_per_step=1", "--training.validate_every=2", "--training.warmup=1"),
    *("--training.validation_episodes=4", "--training.checkpoint_every=3", "--episodes.ways=3"),
    *("--episodes.shots=[1,2]", "--episodes.queries=2", "--lora.rank=2", "--encoder.max_length=32", "--inner.steps=1"),
]
SPACE: dict[str, Any] = {
    "training.learning_rate": {"low": 1e-3, "high": 0.3, "log": True},
    "training.algorithm": ["fomaml", "protonet"],
    "lora.rank": {"low": 1, "high": 4},
    "episodes.shots": [[1, 2], 2],
}
LISTS = {"training.learning_rate": [0.001, 0.1], "lora.rank": [2, 3, 4]}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))  # where `python recipes/search.py` looks first
    return importlib.import_module("search")


@pytest.fixture(scope="module")
def base(tiny_model: str, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a short search in the toy corpus."""
    folder = tmp_path_factory.mktemp("toy")
    rows = [{"text": t, "label": corpus.class_names[c]} for t, c in zip(corpus.texts, corpus.labels, strict=True)]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = corpus.class_names
    split = {"train": names[:4], "valid": names[4:8], "test": names[8:]}
    (folder / "toy.splits.json").write_text(json.dumps({"01": split}))
    data = ["--data", str(folder / "toy.jsonl"), "--splits", str(folder / "toy.splits.json"), "--fold=01"]
    return [*data, "--encoder.model", tiny_model, *SHORT, f"--space={json.dumps(SPACE)}", "--startup_trials=2"]


@pytest.fixture(scope="module")
def whole(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModuleType, str], Path]:
    """Make the folder of an uninterrupted search with a sampler, or return it."""
    made: dict[str, Path] = {}

    def make(recipe: ModuleType, sampler: str) -> Path:
        if sampler not in made:
            made[sampler] = tmp_path_factory.mktemp("whole")
            search(recipe, made[sampler], *three(base, sampler))
        return made[sampler]

    return make


def three(base: list[str], sampler: str) -> list[str]:
    lists = [f"--space={json.dumps(LISTS)}"] if sampler == "grid" else []
    return [*base, "--trials=3", "--sampler", sampler, *lists]


def search(recipe: ModuleType, output: Path, *arguments: str) -> list[Any]:
    """Run the recipe; return what its trials came to."""
    recipe.main(parse_settings(recipe.SearchSettings, [*arguments, "--output", str(output)]))
    return trials(output)


def trials(output: Path) -> list[Any]:
    study_module = importlib.import_module("search_study")
    storage = study_module.optuna.storages.RDBStorage(f"sqlite:///{output / 'study.db'}")
    try:
        study = study_module.optuna.load_study(study_name="search", storage=storage)
        assert not study.get_trials(states=(TrialState.WAITING, TrialState.RUNNING))
        space = study.user_attrs["settings"]["space"]
        ranges = {n: study_module.Range(**v) if isinstance(v, dict) else v for n, v in space.items()}
        return study_module.outcomes(study, ranges)  # type: ignore[no-any-return]
    finally:
        storage.remove_session()
        storage.engine.dispose()


def stub(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have trials that train nothing: the higher the rank, the better; and no picture."""
    monkeypatch.setattr(
        recipe, "train_once", lambda own, *_: SimpleNamespace(record={"valid_accuracy": own.lora.rank / 100})
    )
    monkeypatch.setattr(recipe, "draw", lambda *_: None)


def counted_steps(monkeypatch: pytest.MonkeyPatch, at: Callable[[int], None] = lambda number: None) -> list[int]:
    """Count the steps of training from here on, calling ``at`` with the number before each."""
    original, steps = training.outer_step, []

    def step(*arguments: Any) -> Any:
        at(len(steps))
        steps.append(arguments[5].step)
        return original(*arguments)

    monkeypatch.setattr(training, "outer_step", step)
    return steps


def test_a_search_and_what_it_leaves(
    recipe: ModuleType, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "search"
    found = search(recipe, output, *base, "--trials=3", "--prune=false")
    assert [outcome.number for outcome in found] == [0, 1, 2]
    assert not any(outcome.pruned for outcome in found)
    rates = [outcome.values["training.learning_rate"] for outcome in found]
    assert len(set(rates)) == 3
    assert all(1e-3 <= rate <= 0.3 for rate in rates)
    assert all(outcome.values["episodes.shots"] in ([1, 2], 2) for outcome in found), "as given, not as Optuna has it"
    for outcome in found:
        record = (output / f"trial-{outcome.number:03d}" / "record.jsonl").read_text()
        rows = [json.loads(line) for line in record.splitlines()]
        assert [row["step"] for row in rows if "valid_accuracy" in row] == [2, 4]
        assert outcome.accuracy == max(row.get("valid_accuracy", 0) for row in rows)

    best = max(found, key=lambda outcome: outcome.accuracy)
    meta_train = importlib.import_module("meta_train")
    arguments = ["--config", str(output / "best.yaml"), "--output", str(tmp_path / "run")]
    settings = parse_settings(meta_train.MetaTrainSettings, arguments)
    assert settings.training.learning_rate == best.values["training.learning_rate"]
    assert settings.training.algorithm == best.values["training.algorithm"]
    assert settings.lora.rank == best.values["lora.rank"]
    assert settings.training.steps == 4, "what is not searched stays as it was"
    assert settings.data == base[1]
    printed = capsys.readouterr().out
    assert f"{100 * best.accuracy:.2f} %" in printed.splitlines()[1]
    assert "training.learning_rate" in printed.splitlines()[0]
    picture = matplotlib.image.imread(output / "search.png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.05, "not empty"


def test_the_sampler_draws_by_the_seed(
    recipe: ModuleType, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(recipe, monkeypatch)
    arguments = [*base, "--trials=2", "--sampler=random"]
    one, same, other = (
        [outcome.values for outcome in search(recipe, tmp_path / name, *arguments, f"--seed={seed}")]
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one == same
    assert all(values not in other for values in one)
    assert one[0] != one[1]


def test_tpe_learns_from_what_came_out(recipe: ModuleType, tmp_path: Path) -> None:
    study_module = importlib.import_module("search_study")
    ranks: dict[str, list[int]] = {}
    for sampler in ("random", "tpe"):
        plan = study_module.SearchPlan(
            space={"lora.rank": study_module.Range(1, 99)}, sampler=sampler, startup_trials=8, trials=24
        )
        with study_module.open_study(plan, tmp_path / sampler, {}) as study:
            for number in range(plan.goal):
                trial = study_module.next_trial(study, plan, number)
                study.tell(trial, trial.params["lora.rank"] / 100)
            ranks[sampler] = [trial.params["lora.rank"] for trial in study.trials]
    assert ranks["tpe"][:8] == ranks["random"][:8], "at random, too"
    assert np.mean(ranks["tpe"][12:]) > np.mean(ranks["random"][12:]) + 20


def test_a_grid_is_every_point_once(
    recipe: ModuleType, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(recipe, monkeypatch)
    arguments = [*base, "--sampler=grid", f"--space={json.dumps(LISTS)}"]
    few = search(recipe, tmp_path / "grid", *arguments, "--trials=2")
    found = search(recipe, tmp_path / "grid", *arguments, "--trials=100")
    assert found[:2] == few
    points = [tuple(outcome.values.values()) for outcome in found]
    assert sorted(points) == [(rate, rank) for rate in (0.001, 0.1) for rank in (2, 3, 4)]
    assert points != sorted(points), "the first are not all of one corner"
    with pytest.raises(SettingsError, match=r"grid needs a list of choices for training\.learning_rate"):
        search(recipe, tmp_path / "other", *base, "--sampler=grid")


# sampler, and step in whose midst it stops: before and at a validation, before and after trials can be pruned
INTERRUPTED = [("random", 5), ("tpe", 8), ("grid", 6)]


@pytest.mark.parametrize(("sampler", "at"), INTERRUPTED)
def test_interrupted_it_goes_on_to_the_same_end(
    sampler: str,
    at: int,
    recipe: ModuleType,
    base: list[str],
    whole: Callable[[ModuleType, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recipe, "draw", lambda *_: None)  # takes longer than all the rest
    arguments = three(base, sampler)
    expected = trials(whole(recipe, sampler))
    with monkeypatch.context() as patch:
        counted_steps(patch, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == at else None)
        with pytest.raises(TrainingInterrupted, match=r"goes on from .*trial-00\d/checkpoint"):
            search(recipe, tmp_path / "parts", *arguments)
    assert not (tmp_path / "parts" / "best.yaml").exists()
    steps = counted_steps(monkeypatch)
    assert search(recipe, tmp_path / "parts", *arguments) == expected
    assert steps[0] == at % 4 + 1, "from the step at which it stopped"
    for name in ("best.yaml", *(f"trial-{n:03d}/record.jsonl" for n in range(3))):
        one, two = ((run / name).read_bytes() for run in (whole(recipe, sampler), tmp_path / "parts"))
        assert one == two, name
    steps.clear()
    search(recipe, tmp_path / "parts", *arguments)
    assert not steps, "finished: only drawn again"


class Killed(BaseException):
    """What nobody catches, as nobody catches kill -9."""


def killing(original: Callable[..., Any], when: Callable[..., bool], *, after: bool) -> Callable[..., Any]:
    """Wrap a function: the first call of which ``when`` is true kills, before or after it has done its work."""
    armed = [True]

    def wrapped(*arguments: Any, **named: Any) -> Any:
        hit = armed[0] and when(*arguments, **named)
        armed[0] = armed[0] and not hit
        if hit and not after:
            raise Killed
        result = original(*arguments, **named)
        if hit:
            raise Killed
        return result

    return wrapped


@pytest.mark.parametrize(
    ("place", "when", "after"),
    [
        ("optuna.Trial.report", lambda trial, value, step: step == 2 and trial.number == 2, True),
        ("optuna.Study.ask", lambda study, *_: len(study.trials) == 2, True),
        ("optuna.Study.tell", lambda study, trial, *_, **__: isinstance(trial, Trial) and trial.number == 2, False),
        ("optuna.Trial._suggest", lambda trial, name, _: trial.number == 1 and name == "lora.rank", True),
        ("textmeta.meta.training.save_state", lambda state, path, _: "-001" in str(path) and state.step == 2, False),
        ("textmeta.meta.training.save_state", lambda state, path, _: "-001" in str(path) and state.step == 2, True),
    ],
    ids=["reported", "asked", "not yet told", "half drawn", "not yet saved", "saved"],
)
def test_killed_anywhere_it_goes_on_to_the_same_end(
    place: str,
    when: Callable[..., bool],
    after: bool,
    recipe: ModuleType,
    base: list[str],
    whole: Callable[[ModuleType, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recipe, "draw", lambda *_: None)
    arguments = three(base, "tpe")
    expected = trials(whole(recipe, "tpe"))
    owner, _, name = place.rpartition(".")
    module, _, kind = owner.rpartition(".")
    target = getattr(importlib.import_module(module), kind)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, killing(getattr(target, name), when, after=after))
        with pytest.raises(Killed):
            search(recipe, tmp_path / "parts", *arguments)
    assert search(recipe, tmp_path / "parts", *arguments) == expected


@pytest.mark.slow
def test_a_killed_process_goes_on_in_the_same_trial(
    recipe: ModuleType, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*base, "--trials=2", "--sampler=random", "--training.steps=30"]
    command = [sys.executable, str(RECIPES / "search.py"), *arguments, "--output", str(tmp_path / "parts")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    checkpoint, deadline = tmp_path / "parts" / "trial-000" / "checkpoint.safetensors", time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.exists()
    monkeypatch.setattr(recipe, "draw", lambda *_: None)
    found = search(recipe, tmp_path / "parts", *arguments)
    assert [outcome.number for outcome in found] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "parts").glob("trial-*")) == ["trial-000", "trial-001"]
    assert found == search(recipe, tmp_path / "whole", *arguments)


def test_a_signal_while_training_is_not_running_stops_it_too(
    recipe: ModuleType, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "draw", lambda *_: None)
    arguments = [*base, "--trials=2", "--sampler=random"]
    original = recipe.Encoder

    def loading(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*given)

    steps, handler = counted_steps(monkeypatch), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "Encoder", loading)
        with pytest.raises(TrainingInterrupted, match="stopped in trial 0; the same command goes on"):
            search(recipe, tmp_path, *arguments)
    assert len(steps) == 2, "until the first validation"
    assert signal.getsignal(signal.SIGINT) is handler, "as it was, also where whoever started this ignores it"
    assert len(search(recipe, tmp_path, *arguments)) == 2
    assert len(steps) == 8


def test_what_is_worse_than_most_is_pruned(
    recipe: ModuleType, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "draw", lambda *_: None)
    # by rank, what each validation says
    curves = {2: (0.5, 0.6), 3: (0.7, 0.8), 4: (0.1, 0.9), 5: (0.65, 0.66), 6: (0.3, 0.3)}
    given = training._validate

    def validate(encoder: Any, state: Any, *arguments: Any) -> float:
        before, accuracy = state.best_accuracy, curves[encoder.lora.rank][0 if state.step == 2 else 1]
        given(encoder, state, *arguments)
        state.best_accuracy = max(before, accuracy)
        return accuracy

    monkeypatch.setattr(training, "_validate", validate)
    arguments = [*base, '--space={"lora.rank": [2, 3, 4, 5, 6]}', "--trials=5", "--sampler=grid", "--seed=16"]
    ranks = [point["lora.rank"] for point in parse_settings(recipe.SearchSettings, [*arguments, "--output=x"]).grid()]
    steps = counted_steps(monkeypatch)
    found = search(recipe, tmp_path / "pruned", *arguments)
    # by hand: the median of the complete trials before, of at least two, at that step
    complete: list[int] = []
    for outcome, rank in zip(found, ranks, strict=True):
        assert outcome.values == {"lora.rank": rank}
        best = [curves[rank][0], max(curves[rank])]
        medians = [np.median([curves[r][at] for r in complete]) if len(complete) >= 2 else -1 for at in (0, 1)]
        lost = [at for at in (0, 1) if best[at] < medians[at]]
        assert outcome.pruned == bool(lost)
        assert outcome.accuracy == (best[lost[0]] if lost else best[1])
        complete += [] if lost else [rank]
    assert [outcome.pruned for outcome in found] == [False, False, True, True, True]
    assert len(steps) == 4 + 4 + 4 + 2 + 2, "pruned trials take fewer steps"

    late = search(recipe, tmp_path / "late", *arguments, "--prune_after=3")
    early = [outcome.number for outcome in found if outcome.pruned]
    assert all(late[number].accuracy == max(curves[ranks[number]]) for number in early), "not before that step"
    assert not any(outcome.pruned for outcome in search(recipe, tmp_path / "all", *arguments, "--prune=false"))


def test_a_trial_that_diverges_is_no_candidate(
    recipe: ModuleType, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "draw", lambda *_: None)
    original = training.outer_step

    def diverging(*arguments: Any) -> Any:
        if arguments[2].learning_rate == 0.1:
            raise DivergedError("step 1: loss nan")
        return original(*arguments)

    monkeypatch.setattr(training, "outer_step", diverging)
    arguments = [*base, "--sampler=grid", '--space={"training.learning_rate": [0.1, 0.001]}']
    found = search(recipe, tmp_path / "search", *arguments)
    assert {o.values["training.learning_rate"]: (o.accuracy is None, o.pruned) for o in found} == {
        0.1: (True, True),
        0.001: (False, False),
    }
    assert yaml.safe_load((tmp_path / "search" / "best.yaml").read_text())["training"]["learning_rate"] == 0.001
    with pytest.raises(DivergedError, match="all 1 trials diverged"):
        search(recipe, tmp_path / "all", *arguments, '--space={"training.learning_rate": [0.1]}')


def test_validation_is_the_same_for_all_trials_and_sees_no_test_class(
    recipe: ModuleType, base: list[str], tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "draw", lambda *_: None)
    given, seen = training._validate, []

    def validate(encoder: Any, state: Any, episodes: Any, *arguments: Any) -> float:
        seen.append([(episode.class_names, episode.support_texts) for episode in episodes])
        return given(encoder, state, episodes, *arguments)

    monkeypatch.setattr(training, "_validate", validate)
    space = {"episodes.ways": [2, 4], "training.seed": [0, 5]}
    found = search(recipe, tmp_path, *base, "--sampler=grid", f"--space={json.dumps(space)}", "--prune=false")
    assert len(found) == 4
    assert all(episodes == seen[0] for episodes in seen)
    assert {name for names, _ in seen[0] for name in names} <= set(corpus.class_names[4:8])
    assert {len(names) for names, _ in seen[0]} == {3}


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"training.learnig_rate": [0.1]}, "'training.learnig_rate' is not .* 'training.learning_rate'"),
        ({"trainin.steps": [1]}, "the nearest is 'training.steps'"),
        ({"lora.rank": {"low": 1, "hihg": 4}}, "hihg"),
        ({"lora.rank": [2, "four"]}, "four"),
        ({"lora.rank": [2, 0]}, "rank must be at least 1, given 0"),
        ({"lora.rank": {"low": 1.5, "high": 4}}, r"1\.5"),
        ({"lora.rank": {"low": 4, "high": 4}}, "lora.rank needs low < high, given 4 and 4"),
        ({"training.learning_rate": {"low": 0, "high": 1, "log": True}}, "needs 0 < low < high, given 0 and 1"),
        ({"training.algorithm": []}, "choices or a range"),
        ({}, "choices or a range"),
        ({"training.algorithm": ["fomaml", "fomalm"]}, "fomalm"),
        ({"data": ["a.csv", "b.csv"]}, "data cannot be searched"),
        ({"training.validation_episodes": [1, 2]}, r"training\.validation_episodes cannot be searched"),
        ({"training.steps.more": [1]}, "training.steps"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_is_refused_before_the_first_trial(
    space: dict[str, Any], said: str, recipe: ModuleType, base: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=said):
        search(recipe, tmp_path / "search", *base, f"--space={json.dumps(space)}")
    assert not (tmp_path / "search").exists()


def test_a_setting_of_a_group_that_is_off_can_be_searched(recipe: ModuleType, base: list[str]) -> None:
    space = {"inner.conditioning.start": ["banks"], "inner.steps": [2]}
    settings = parse_settings(recipe.SearchSettings, [*base, "--output=x", f"--space={json.dumps(space)}"])
    assert settings.inner.conditioning is None
    own = recipe.with_values(settings, {name: values[0] for name, values in space.items()})
    assert own.inner.conditioning.start == "banks"
    assert own.inner.steps == 2
    assert type(own).__name__ == "MetaTrainSettings"


def test_another_searchs_folder_is_refused_and_left_alone(
    recipe: ModuleType, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(recipe, monkeypatch)
    output = tmp_path / "search"
    found = search(recipe, output, *base, "--trials=2")
    narrower = {**SPACE, "lora.rank": {"low": 1, "high": 3}}
    for change, said in (
        (f"--space={json.dumps(narrower)}", r"space\.lora\.rank\.high: 4 there, 3 now"),
        ("--sampler=random", "sampler: 'tpe' there, 'random' now"),
        ("--training.steps=5", r"training\.steps: 4 there, 5 now"),
    ):
        with pytest.raises(SettingsError, match=said):
            search(recipe, output, *base, "--trials=3", change)
    lines = Path(base[1]).read_text().splitlines(keepends=True)
    (tmp_path / "toy.jsonl").write_text("".join(lines))
    assert (
        search(recipe, output, *base, "--trials=2", "--test_episodes=50", "--data", str(tmp_path / "toy.jsonl"))
        == found
    )
    (tmp_path / "toy.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(SettingsError, match=r"train: .* there, .* now"):
        search(recipe, output, *base, "--trials=3", "--data", str(tmp_path / "toy.jsonl"))
    more = search(recipe, output, *base, "--trials=3")
    assert more[:2] == found
    assert len(more) == 3
    assert search(recipe, output, *base, "--trials=1") == more, "fewer than there are: only drawn again"

    (output / "trial-000").mkdir()
    (output / "study.db").unlink()
    with pytest.raises(SettingsError, match=r"holds trials of a search, but not its study\.db"):
        search(recipe, output, *base, "--trials=3")


def test_more_trials_end_where_as_many_at_once_do(
    recipe: ModuleType,
    base: list[str],
    whole: Callable[[ModuleType, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recipe, "draw", lambda *_: None)
    search(recipe, tmp_path, *three(base, "tpe"), "--trials=2")
    assert search(recipe, tmp_path, *three(base, "tpe")) == trials(whole(recipe, "tpe"))


def test_training_tells_of_validations_once_its_checkpoint_holds_them(
    recipe: ModuleType, base: list[str], tmp_path: Path
) -> None:
    settings = parse_settings(recipe.SearchSettings, [*base, "--output", str(tmp_path / "run")])
    parts = recipe.load_parts(settings.sources())
    told: list[tuple[int, float]] = []

    def tell(step: int, accuracy: float) -> None:
        told.append((step, accuracy))
        if len(told) == 1:
            raise InterruptedError

    accelerator = recipe.Accelerator()
    with pytest.raises(InterruptedError):
        recipe.train_once(settings, settings, parts, accelerator, tell)
    result = recipe.train_once(settings, settings, parts, accelerator, tell)
    rows = [json.loads(line) for line in (tmp_path / "run" / "record.jsonl").read_text().splitlines()]
    assert told == [(row["step"], row["valid_accuracy"]) for row in rows if "valid_accuracy" in row]
    assert [step for step, _ in told] == [2, 4], "the second run went on after the step that raised"
    assert result.record["valid_accuracy"] == max(accuracy for _, accuracy in told)


def test_what_is_not_installed_is_named(
    recipe: ModuleType, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, extra in (("search_drawing", "matplotlib", "plot"), ("search_study", "optuna", "hpo")):
        monkeypatch.setattr(importlib.import_module(module), name, None)
        with pytest.raises(SettingsError, match=rf"pip install 'textmeta\[{extra}\]'"):
            search(recipe, tmp_path / "search", *base)
    assert not (tmp_path / "search").exists()


def test_a_shipped_config_is_a_search(recipe: ModuleType) -> None:
    configs = sorted((RECIPES / "configs" / "search").glob("*.yaml"))
    assert configs
    for path in configs:
        settings = parse_settings(recipe.SearchSettings, ["--config", str(path), "--output=x"])
        assert (ROOT / settings.corpora[0].splits).is_file()
        assert settings.space
