"""Search for settings of meta-training: trials of it, judged by their accuracy on the validation classes.

python recipes/search.py --config recipes/configs/search/banking77.yaml --output runs/search --trials 30 \
    --data banking77.jsonl --splits recipes/splits/banking77.splits.json

Settings are those of meta_train.py and the few of the search; with the extras hpo and plot. Interrupted or killed, the
same command goes on in the middle of the trial; with more trials it adds to a search that is done. meta_train.py with
runs/search/best.yaml then trains with the best, and reports on the test classes, of which the search sees nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal
from warnings import catch_warnings

import numpy as np
import yaml
from accelerate import Accelerator
from meta_train import MetaTrainSettings
from tqdm import tqdm

from textmeta.artifact.start import load_start
from textmeta.cli import parse_settings, run_recipe
from textmeta.data.class_splits import load_parts
from textmeta.data.episodes import EpisodeSampler
from textmeta.errors import DivergedError, SettingsError, TrainingInterrupted
from textmeta.files import write_atomically
from textmeta.meta.checkpoint import differences
from textmeta.meta.interruption import stop_requests
from textmeta.meta.training import RECORD, train
from textmeta.model.encoder import Encoder

try:
    import optuna
    from matplotlib import pyplot
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState
except ImportError as error:
    raise SystemExit(f"{error}: a search needs the extras hpo and plot: pip install 'textmeta[hpo,plot]'") from error

OVER = (TrialState.COMPLETE, TrialState.PRUNED)
SEARCHABLE = ("encoder.", "lora.", "episodes.", "inner.", "training.")
# may differ when a search goes on; of the corpora counts what they hold, not where they are
FREE = {"output", "trials", "corpora", "data", "splits", "fold"}
FREE |= {"test_ways", "test_shots", "test_episodes", "index_rows", "calibration"}  # they come after training


@dataclass(frozen=True)
class Range:
    """Numbers that a setting is drawn from: from low to high, whole ones if both are; log: evenly on that scale."""

    low: int | float
    high: int | float
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class SearchSettings(MetaTrainSettings):
    """Settings of this recipe: those of meta_train, and of the search.

    Where episodes are searched, those of validation stay as they are set, so that trials compare.

    Args:
        space: dotted name of a setting to a list of choices, or to a range {low, high, log}.
        trials: complete or pruned, that the search ends with; of a grid at most all its points.
        sampler: random, tpe (tree-structured Parzen estimator), or grid (lists only; its points in random order).
        seed: of the sampler; training.seed is that of each trial.
        prune: end a trial early where its best validation accuracy is below the median of the trials before.
        startup_trials: first trials, which tpe draws at random, and complete trials without which none is pruned.
        prune_after: step before which no trial is pruned.
    """

    space: dict[str, list[Any] | Range] = field(default_factory=dict)
    trials: int = 20
    sampler: Literal["random", "tpe", "grid"] = "tpe"
    seed: int = 0
    prune: bool = True
    startup_trials: int = 5
    prune_after: int = 0

    def __post_init__(self) -> None:
        """Check every value of the space, before the first trial."""
        super().__post_init__()
        for name, least in (("trials", 1), ("seed", 0), ("startup_trials", 0), ("prune_after", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, given {getattr(self, name)}")
        ends: dict[str, Sequence[Any]] = {}
        for name, values in self.space.items():
            if self.sampler == "grid" and isinstance(values, Range):
                raise SettingsError(f"the sampler grid needs a list of choices for {name}, given a range")
            try:
                drawn = distribution(values)
            except ValueError as error:
                raise SettingsError(f"space must give {name} choices or a range: {error}") from error
            ends[name] = [values.low, values.high] if isinstance(values, Range) else drawn.choices
        if not ends:
            raise SettingsError("space must give settings, and choices or a range for each")
        for number in range(max(map(len, ends.values()))):
            with_values(self, {name: values[min(number, len(values) - 1)] for name, values in ends.items()})
        if fixed := [n for n in ends if not n.startswith(SEARCHABLE) or n == "training.validation_episodes"]:
            raise SettingsError(f"{fixed[0]} cannot be searched: trials would not compare")


def main(settings: SearchSettings) -> None:
    """Run the trials that are missing; print, save and draw what came out."""
    if (processes := Accelerator(mixed_precision=settings.precision).num_processes) > 1:
        raise SettingsError(f"a search runs in one process, given {processes}")
    parts, goal = load_parts(settings.sources()), settings.trials
    if settings.sampler == "grid":
        goal = min(goal, int(np.prod([len(v) for v in settings.space.values() if isinstance(v, list)])))
    told = {name: value for name, value in plain(settings).items() if name not in FREE}
    told |= {part: [corpus.summary for corpus in parts[part]] for part in ("train", "valid")}
    with open_study(settings, told) as study, stop_requests() as stopped:
        done = len(study.get_trials(states=OVER))
        for number in tqdm(range(done, goal), "search", goal, initial=done, unit="trial"):
            run_trial(study, number, settings, parts, stopped)
        trials = study.get_trials(states=OVER)
        complete = (number for number, trial in enumerate(trials) if trial.state == TrialState.COMPLETE)
        best = max(complete, key=lambda number: trials[number].value or 0, default=None)  # of equal ones the first
        if best is None:
            raise DivergedError(f"all {len(trials)} trials diverged; try smaller learning rates and step sizes")
        config = {k: v for k, v in plain(with_values(settings, trials[best].params)).items() if k != "output"}
        write_atomically(settings.output / "best.yaml", yaml.safe_dump(config, sort_keys=False).encode())
        draw(study, settings.output)
    print(f"trial {best} of {len(trials)} is the best, {100 * (trials[best].value or 0):.2f} %: {trials[best].params}")


@contextmanager
def open_study(settings: SearchSettings, told: dict[str, Any]) -> Iterator[optuna.Study]:
    """Open the study in the output folder, or make one; ``told`` is all that decides how it ends."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path, pruners = settings.output / "study.db", optuna.pruners
    path.parent.mkdir(parents=True, exist_ok=True)
    pruner = pruners.MedianPruner(settings.startup_trials, settings.prune_after) if settings.prune else None
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")  # SQLite: a kill in the middle of a write leaves it whole
    named = {"study_name": "search", "direction": "maximize", "load_if_exists": True}
    try:
        study = optuna.create_study(storage=storage, pruner=pruner or pruners.NopPruner(), **named)
        if "settings" not in study.user_attrs and any(path.parent.glob("trial-*")):
            raise SettingsError(f"{path.parent} holds trials of a search, but not its {path.name}")
        if differing := "; ".join(list(differences(study.user_attrs.get("settings", told), told))[:5]):
            raise SettingsError(f"{path} is of a search with other settings ({differing}); give another output folder")
        study.set_user_attr("settings", told)
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def next_trial(study: optuna.Study, settings: SearchSettings, number: int) -> optuna.Trial:
    """Return the trial that was interrupted, or draw one, by a seed of its own: a sampler's state is not stored."""
    space = {name: distribution(values) for name, values in settings.space.items()}
    seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
    if settings.sampler == "grid":
        study.sampler = optuna.samplers.GridSampler({n: values.choices for n, values in space.items()}, settings.seed)
        study.sampler.after_trial = lambda *_: None  # would stop `optimize`, which does not run here
    elif settings.sampler == "tpe":
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=settings.startup_trials, seed=seed)
    else:
        study.sampler = optuna.samplers.RandomSampler(seed)
    for left in study.get_trials(states=(TrialState.RUNNING,)):
        if settings.sampler == "grid" or left.params.keys() == space.keys():
            trial = optuna.Trial(study, left._trial_id)
            for name, values in space.items():
                trial._suggest(name, values)
            return trial
        study.tell(left.number, state=TrialState.FAIL)  # killed while drawn: the same seed draws all of it again
    return study.ask(space)


def run_trial(
    study: optuna.Study, number: int, settings: SearchSettings, parts: Mapping[str, Any], stopped: Callable[..., bool]
) -> None:
    """Run a trial to its end, from where it was interrupted if it was; its validation is that of all trials."""
    trial = next_trial(study, settings, number)
    own = replace(with_values(settings, trial.params), output=settings.output / f"trial-{number:03d}")
    accelerator, record = Accelerator(mixed_precision=settings.precision), own.output / RECORD
    train_episodes = EpisodeSampler(parts["train"], own.episodes, own.training.seed)
    valid_episodes = EpisodeSampler(parts["valid"], settings.episodes, settings.training.seed + 1)
    reported = set(study.trials[trial.number].intermediate_values)

    def on_validation(step: int, accuracy: float) -> None:
        if step not in reported:
            trial.report(accuracy, step)
            reported.add(step)
        if trial.should_prune():
            raise optuna.TrialPruned
        if stopped():  # while nobody else listened
            raise TrainingInterrupted(f"stopped in trial {number}; the same command goes on")

    try:
        for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else ():
            row = json.loads(line) if line.endswith("}") else {}  # a kill may leave a part of a line
            if "valid_accuracy" in row:
                on_validation(row["step"], row["valid_accuracy"])
        start = load_start(own.start, revision=own.start_revision) if own.start else None
        encoder = Encoder(
            own.encoder, start.lora if start else own.lora, accelerator.device, accelerator.mixed_precision
        )
        result = train(
            encoder, train_episodes, valid_episodes, own.training, own.inner, own.output, accelerator,
            start.fitted_to(encoder) if start else None, on_validation,
        )  # fmt: skip
        study.tell(trial, result.record["valid_accuracy"])
    except (optuna.TrialPruned, DivergedError) as error:  # an outcome, too: of settings to keep away from
        tqdm.write(f"trial {number} is pruned {error}")
        study.tell(trial, state=TrialState.PRUNED)


def distribution(values: list[Any] | Range) -> BaseDistribution:
    """Return what Optuna draws from: choices as JSON, because it stores no lists."""
    if not isinstance(values, Range):
        return CategoricalDistribution([json.dumps(value) for value in values])
    whole = type(values.low) is type(values.high) is int
    return (IntDistribution if whole else FloatDistribution)(values.low, values.high, values.log)


def draw(study: optuna.Study, output: Path) -> None:
    """Draw accuracy by trial, and by each setting, as Optuna does."""
    pyplot.switch_backend("agg")
    with catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        for name in ("optimization_history", "slice"):
            plot = getattr(optuna.visualization.matplotlib, f"plot_{name}")
            np.ravel(plot(study, target_name="validation accuracy"))[0].figure.savefig(output / f"{name}.png")
    pyplot.close("all")


def with_values(settings: SearchSettings, values: Mapping[str, Any]) -> MetaTrainSettings:
    """Return settings of meta_train with values of the space, as Optuna has them, in their places."""
    known = {part.name for part in fields(MetaTrainSettings)}
    config = {name: value for name, value in plain(settings).items() if name in known}
    for name, value in values.items():
        *groups, last = name.split(".")
        place = config
        for group in groups:  # null, such as the task encoder's, becomes a group
            place[group] = place = place[group] if isinstance(place.get(group), dict) else {}
        place[last] = value if isinstance(settings.space[name], Range) else json.loads(value)
    return parse_settings(MetaTrainSettings, ["--config", json.dumps(config)])


def plain(settings: MetaTrainSettings) -> dict[str, Any]:
    """Return settings as JSON has them."""
    return json.loads(json.dumps(asdict(settings), default=str))  # type: ignore[no-any-return]


if __name__ == "__main__":
    run_recipe(main, SearchSettings, __doc__)
