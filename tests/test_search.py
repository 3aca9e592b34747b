"""The search for settings, on the tiny encoder: what it finds, that it goes on from anywhere, and its errors."""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import yaml
from optuna import Trial, load_study
from optuna.storages import RDBStorage
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
GRID = ["--sampler=grid", '--space={"training.learning_rate": [0.001, 0.1], "lora.rank": [2, 3, 4]}']


Find = Callable[..., list[Any]]


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


@pytest.fixture
def find(recipe: ModuleType, base: list[str], tmp_path: Path) -> Find:
    """Run the recipe, its output in a folder of this name; return what its trials came to."""

    def run(name: str, *arguments: str) -> list[Any]:
        recipe.main(parse_settings(recipe.SearchSettings, [*base, *arguments, "--output", str(tmp_path / name)]))
        storage = RDBStorage(f"sqlite:///{tmp_path / name / 'study.db'}")
        study = load_study(study_name="search", storage=storage)
        assert not study.get_trials(states=(TrialState.WAITING, TrialState.RUNNING))
        found = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
        storage.remove_session()
        storage.engine.dispose()
        return [(trial.params, trial.value, trial.state, trial.intermediate_values) for trial in found]

    return run


@pytest.fixture
def undrawn(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "draw", lambda *_: None)  # takes longer than all the rest


@pytest.fixture
def untrained(undrawn: None, recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials train nothing: the higher the rank, the better."""
    monkeypatch.setattr(recipe, "Encoder", lambda _, lora, *__: lora)
    monkeypatch.setattr(recipe, "train", lambda lora, *_: SimpleNamespace(record={"valid_accuracy": lora.rank / 100}))


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
    find: Find, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, found = tmp_path / "search", find("search", "--trials=3", "--prune=false")
    assert [state for _, _, state, _ in found] == [TrialState.COMPLETE] * 3
    rates = [params["training.learning_rate"] for params, *_ in found]
    assert len(set(rates)) == 3
    assert all(1e-3 <= rate <= 0.3 for rate in rates)
    for number, (_, accuracy, _, reported) in enumerate(found):
        rows = [json.loads(line) for line in (output / f"trial-{number:03d}" / "record.jsonl").read_text().splitlines()]
        said = {row["step"]: row["valid_accuracy"] for row in rows if "valid_accuracy" in row}
        assert said == reported
        assert [*said] == [2, 4]
        assert accuracy == max(said.values())

    best, accuracy, *_ = max(found, key=lambda trial: trial[1])
    arguments = ["--config", str(output / "best.yaml"), "--output", str(tmp_path / "run")]
    settings = parse_settings(importlib.import_module("meta_train").MetaTrainSettings, arguments)
    assert settings.training.learning_rate == best["training.learning_rate"]
    assert settings.training.algorithm == json.loads(best["training.algorithm"])
    assert settings.lora.rank == best["lora.rank"]
    assert settings.episodes.shots in ((1, 2), 2), "as given, not as Optuna has it"
    assert settings.training.steps == 4, "what is not searched stays as it was"
    assert settings.data == base[1]
    assert f"{100 * accuracy:.2f} %" in capsys.readouterr().out
    for name in ("optimization_history", "slice"):
        assert matplotlib.image.imread(output / f"{name}.png")[..., :3].std() > 0.05, "not empty"


@pytest.mark.usefixtures("untrained")
def test_samplers(find: Find) -> None:
    one, same, other = (
        [params for params, *_ in find(name, "--trials=2", "--sampler=random", f"--seed={seed}")]
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one == same
    assert all(values not in other for values in one)
    assert one[0] != one[1]
    wide, ranks = ['--space={"lora.rank": {"low": 1, "high": 99}}', "--startup_trials=8", "--trials=20"], {}
    for sampler in ("random", "tpe"):
        whole = find(sampler, *wide, f"--sampler={sampler}")
        find("parts-" + sampler, *wide, f"--sampler={sampler}", "--trials=12")
        assert find("parts-" + sampler, *wide, f"--sampler={sampler}") == whole, "more end where as many at once do"
        ranks[sampler] = [params["lora.rank"] for params, *_ in whole]
    assert ranks["tpe"][:8] == ranks["random"][:8], "at random, too"
    assert sum(ranks["tpe"][12:]) > sum(ranks["random"][12:]) + 8 * 20, "learns from what came out"


@pytest.mark.usefixtures("untrained")
def test_a_grid_is_every_point_once(find: Find) -> None:
    few = find("grid", *GRID, "--trials=2")
    found = find("grid", *GRID, "--trials=100")
    assert found[:2] == few
    points = [tuple(map(json.loads, params.values())) for params, *_ in found]
    assert sorted(points) == [(rate, rank) for rate in (0.001, 0.1) for rank in (2, 3, 4)]
    assert points != sorted(points), "the first are not all of one corner"
    with pytest.raises(SettingsError, match=r"grid needs a list of choices for training\.learning_rate"):
        find("other", "--sampler=grid")


# sampler, and step in whose midst it stops: before and at a validation, before and after trials can be pruned
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("sampler", "at"), [("random", 5), ("tpe", 8), ("grid", 6)])
def test_interrupted_it_goes_on_to_the_same_end(
    sampler: str, at: int, find: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--trials=3", *(GRID if sampler == "grid" else [f"--sampler={sampler}"])]
    expected = find("whole", *arguments)
    with monkeypatch.context() as patch:
        counted_steps(patch, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == at else None)
        with pytest.raises(TrainingInterrupted, match=r"goes on from .*trial-00\d/checkpoint"):
            find("parts", *arguments)
    assert not (tmp_path / "parts" / "best.yaml").exists()
    steps = counted_steps(monkeypatch)
    assert find("parts", *arguments) == expected
    assert steps[0] == at % 4 + 1, "from the step at which it stopped"
    for name in ("best.yaml", *(f"trial-{n:03d}/record.jsonl" for n in range(3))):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    steps.clear()
    find("parts", *arguments)
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


@pytest.mark.usefixtures("undrawn")
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
@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_killed_anywhere_it_goes_on_to_the_same_end(
    sampler: str, place: str, when: Callable[..., bool], after: bool, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--trials=3", *(GRID if sampler == "grid" else [])]
    expected = find("whole", *arguments)
    owner, _, name = place.rpartition(".")
    module, _, kind = owner.rpartition(".")
    target = getattr(importlib.import_module(module), kind)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, killing(getattr(target, name), when, after=after))
        with pytest.raises(Killed):
            find("parts", *arguments)
    assert find("parts", *arguments) == expected


@pytest.mark.usefixtures("undrawn")
def test_a_signal_while_training_is_not_running_stops_it_too(
    recipe: ModuleType, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, handler, original = counted_steps(monkeypatch), signal.getsignal(signal.SIGINT), recipe.Encoder
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "Encoder", lambda *given: os.kill(os.getpid(), signal.SIGINT) or original(*given))
        with pytest.raises(TrainingInterrupted, match="stopped in trial 0; the same command goes on"):
            find("search", "--trials=2", "--sampler=random")
    assert len(steps) == 2, "until the first validation"
    assert signal.getsignal(signal.SIGINT) is handler, "as it was, also where whoever started this ignores it"
    assert len(find("search", "--trials=2", "--sampler=random")) == 2
    assert len(steps) == 8


@pytest.mark.usefixtures("undrawn")
def test_what_is_worse_than_most_is_pruned(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    # by rank, what each validation says
    curves = {2: (0.5, 0.6), 3: (0.7, 0.8), 4: (0.1, 0.9), 5: (0.65, 0.66), 6: (0.3, 0.3)}
    given = training._validate

    def validate(encoder: Any, state: Any, *arguments: Any) -> float:
        before, accuracy = state.best_accuracy, curves[encoder.lora.rank][0 if state.step == 2 else 1]
        given(encoder, state, *arguments)
        state.best_accuracy = max(before, accuracy)
        return accuracy

    monkeypatch.setattr(training, "_validate", validate)
    arguments = ['--space={"lora.rank": [2, 3, 4, 5, 6]}', "--trials=5", "--sampler=grid", "--seed=16"]
    steps = counted_steps(monkeypatch)
    found = find("pruned", *arguments)
    # by hand: the median of the complete trials before, of at least two, at that step
    complete: list[int] = []
    for params, accuracy, state, reported in found:
        rank = int(params["lora.rank"])
        best = [curves[rank][0], max(curves[rank])]
        medians = [median(curves[r][at] for r in complete) if len(complete) >= 2 else -1 for at in (0, 1)]
        lost = [at for at in (0, 1) if best[at] < medians[at]]
        assert (state == TrialState.PRUNED) == bool(lost)
        assert max(reported.values()) == (best[lost[0]] if lost else accuracy)
        complete += [] if lost else [rank]
    assert len(complete) < 5
    assert len(steps) == sum(max(reported) for *_, reported in found), "pruned trials take fewer steps"
    assert all(max(reported) == 4 for *_, reported in find("late", *arguments, "--prune_after=3")), "not before"
    assert all(state == TrialState.COMPLETE for _, _, state, _ in find("all", *arguments, "--prune=false"))


@pytest.mark.usefixtures("undrawn")
def test_a_trial_that_diverges_is_no_candidate(find: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = training.outer_step

    def diverging(*arguments: Any) -> Any:
        if arguments[2].learning_rate == 0.1:
            raise DivergedError("step 1: loss nan")
        return original(*arguments)

    monkeypatch.setattr(training, "outer_step", diverging)
    found = find("search", "--sampler=grid", '--space={"training.learning_rate": [0.1, 0.001]}')
    states = {params["training.learning_rate"]: state for params, _, state, _ in found}
    assert states == {"0.1": TrialState.PRUNED, "0.001": TrialState.COMPLETE}
    assert yaml.safe_load((tmp_path / "search" / "best.yaml").read_text())["training"]["learning_rate"] == 0.001
    with pytest.raises(DivergedError, match="all 1 trials diverged"):
        find("all", "--sampler=grid", '--space={"training.learning_rate": [0.1]}')


@pytest.mark.usefixtures("undrawn")
def test_validation_is_the_same_for_all_trials_and_sees_no_test_class(
    find: Find, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, seen = training._validate, []

    def validate(encoder: Any, state: Any, episodes: Any, *arguments: Any) -> float:
        seen.append([(episode.class_names, episode.support_texts) for episode in episodes])
        return given(encoder, state, episodes, *arguments)

    monkeypatch.setattr(training, "_validate", validate)
    space = {"episodes.ways": [2, 4], "training.seed": [0, 5]}
    assert len(find("search", "--sampler=grid", f"--space={json.dumps(space)}", "--prune=false")) == 4
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
        ({"lora.rank": {"low": 5, "high": 4}}, "lora.rank .*a range: .*low"),
        ({"training.learning_rate": {"low": 0, "high": 1, "log": True}}, "training.learning_rate .*a range: .*low"),
        ({"training.algorithm": []}, "choices or a range"),
        ({}, "choices or a range"),
        ({"training.algorithm": ["fomaml", "fomalm"]}, "fomalm"),
        ({"data": ["a.csv", "b.csv"]}, "data cannot be searched"),
        ({"training.validation_episodes": [1, 2]}, r"training\.validation_episodes cannot be searched"),
        ({"training.steps.more": [1]}, "training.steps"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_is_refused_before_the_first_trial(
    space: dict[str, Any], said: str, find: Find, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=said):
        find("search", f"--space={json.dumps(space)}")
    assert not (tmp_path / "search").exists()


def test_a_setting_of_a_group_that_is_off_can_be_searched(recipe: ModuleType, base: list[str]) -> None:
    space = {"inner.conditioning.start": ["banks"], "inner.steps": [2]}
    settings = parse_settings(recipe.SearchSettings, [*base, "--output=x", f"--space={json.dumps(space)}"])
    assert settings.inner.conditioning is None
    own = recipe.with_values(settings, {name: json.dumps(values[0]) for name, values in space.items()})
    assert (type(own).__name__, own.inner.conditioning.start, own.inner.steps) == ("MetaTrainSettings", "banks", 2)


@pytest.mark.usefixtures("untrained")
def test_another_searchs_folder_is_refused_and_left_alone(find: Find, base: list[str], tmp_path: Path) -> None:
    found = find("search", "--trials=2")
    narrower = {**SPACE, "lora.rank": {"low": 1, "high": 3}}
    for change, said in (
        (f"--space={json.dumps(narrower)}", r"space\.lora\.rank\.high: 4 there, 3 now"),
        ("--sampler=random", "sampler: 'tpe' there, 'random' now"),
        ("--training.steps=5", r"training\.steps: 4 there, 5 now"),
    ):
        with pytest.raises(SettingsError, match=said):
            find("search", "--trials=3", change)
    lines, other = Path(base[1]).read_text().splitlines(keepends=True), tmp_path / "toy.jsonl"
    other.write_text("".join(lines))
    assert find("search", "--trials=2", "--test_episodes=50", f"--data={other}") == found
    other.write_text("".join(lines[1:]))
    with pytest.raises(SettingsError, match=r"train: .* there, .* now"):
        find("search", "--trials=3", f"--data={other}")
    more = find("search", "--trials=3")
    assert more[:2] == found
    assert len(more) == 3
    assert find("search", "--trials=1") == more, "fewer than there are: only drawn again"
    (tmp_path / "search" / "trial-000").mkdir()
    (tmp_path / "search" / "study.db").unlink()
    with pytest.raises(SettingsError, match=r"holds trials of a search, but not its study\.db"):
        find("search", "--trials=3")


@pytest.mark.parametrize("name", ["optuna", "matplotlib"])
def test_what_is_not_installed_is_named(name: str, recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=rf"{name}.* pip install 'textmeta\[hpo,plot\]'"):
        importlib.reload(recipe)


def test_a_shipped_config_is_a_search(recipe: ModuleType) -> None:
    configs = sorted((RECIPES / "configs" / "search").glob("*.yaml"))
    assert configs
    for path in configs:
        settings = parse_settings(recipe.SearchSettings, ["--config", str(path), "--output=x"])
        assert (ROOT / settings.corpora[0].splits).is_file()
        assert settings.space
