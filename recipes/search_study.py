"""The study of a search: which trial comes next, and what came out of those before, in Optuna and a file of its own."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from textmeta.errors import SettingsError

try:
    import optuna
    from optuna.trial import TrialState
except ImportError:  # an extra: check_optuna says so
    optuna = None

STUDY = "study.db"


@dataclass(frozen=True)
class Range:
    """Numbers that a setting is drawn from, both ends included.

    Args:
        low: the lowest; where both are whole numbers, only whole ones are drawn.
        high: the highest.
        log: draw the logarithm evenly.
    """

    low: int | float
    high: int | float
    log: bool = False


Space = Mapping[str, list[Any] | Range]


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What is searched, and how.

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
        """Check the ranges."""
        for name, least in (("trials", 1), ("seed", 0), ("startup_trials", 0), ("prune_after", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, given {getattr(self, name)}")
        if not self.space or not all(self.space.values()):
            raise SettingsError(f"space must give every setting choices or a range, given {self.space}")
        for name, values in self.space.items():
            if not isinstance(values, Range):
                continue
            if self.sampler == "grid":
                raise SettingsError(f"the sampler grid needs a list of choices for {name}, given a range")
            if not values.low < values.high or (values.log and values.low <= 0):
                wanted = "0 < low < high" if values.log else "low < high"
                raise SettingsError(f"the range of {name} needs {wanted}, given {values.low} and {values.high}")

    def grid(self) -> list[dict[str, Any]]:
        """Return all points of the grid, shuffled, so that the first trials are not all of one corner."""
        points = list(product(*(values for values in self.space.values() if isinstance(values, list))))
        order = np.random.default_rng(self.seed).permutation(len(points))
        return [dict(zip(self.space, points[index], strict=True)) for index in order]

    @property
    def goal(self) -> int:
        """How many trials the search ends with."""
        return min(self.trials, len(self.grid())) if self.sampler == "grid" else self.trials


@dataclass(frozen=True)
class Outcome:
    """A trial that is over.

    Args:
        number: of the trial.
        accuracy: on the validation classes, the best that it had; None where it diverged before it was validated.
        pruned: whether it was ended early.
        values: of the settings that are searched.
    """

    number: int
    accuracy: float | None
    pruned: bool
    values: dict[str, Any]


def check_optuna() -> None:
    """Check that Optuna is installed, before anything is computed.

    Raises:
        SettingsError: if it is not; the message says how to install it.
    """
    if optuna is None:
        raise SettingsError("a search needs optuna, which is not installed: pip install 'textmeta[hpo]'")


@contextmanager
def open_study(plan: SearchPlan, output: Path, settings: dict[str, Any]) -> Iterator["optuna.Study"]:
    """Open the study in the output folder, or make one.

    Args:
        plan: of the search.
        output: the folder.
        settings: all that decides what the search ends in, JSON-able.

    Raises:
        SettingsError: if it is of a search with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    output.mkdir(parents=True, exist_ok=True)
    pruner = optuna.pruners.MedianPruner(plan.startup_trials, plan.prune_after)
    # SQLite, because a kill in the middle of a write leaves it whole
    storage = optuna.storages.RDBStorage(f"sqlite:///{output / STUDY}")
    try:
        study = optuna.create_study(
            storage=storage,
            study_name="search",
            direction="maximize",
            load_if_exists=True,
            pruner=pruner if plan.prune else optuna.pruners.NopPruner(),
        )
        saved = study.user_attrs.get("settings")
        if saved is None and any(output.glob("trial-*")):
            raise SettingsError(f"{output} holds trials of a search, but not its {STUDY}; give another output folder")
        if saved is None:
            study.set_user_attr("settings", settings)
        elif saved != settings:
            there, here = _flat(saved), _flat(settings)
            differing = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
            told = "; ".join(f"{n}: {there.get(n)!r:.60} there, {here.get(n)!r:.60} now" for n in differing[:5])
            raise SettingsError(
                f"{output / STUDY} is of a search with other settings ({told}); give another output folder"
            )
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def next_trial(study: "optuna.Study", plan: SearchPlan, number: int) -> "optuna.Trial":
    """Return the trial that was interrupted, or draw one, by a seed of its own: a sampler's state is not stored.

    Args:
        study: whose trial it is.
        plan: of the search.
        number: how many trials are over.
    """
    # Optuna does not take a trial up again: a new one with the same values does, and the old one counts for nothing
    left = study.get_trials(states=(TrialState.RUNNING,))
    drawn = [trial.params for trial in left if trial.params.keys() == plan.space.keys()]  # not killed while drawn
    if not drawn and plan.sampler == "grid":
        drawn = [{name: json.dumps(value) for name, value in plan.grid()[number].items()}]
    if drawn and not study.get_trials(states=(TrialState.WAITING,)):
        study.enqueue_trial(drawn[0])
    for trial in left:
        study.tell(trial.number, state=TrialState.FAIL)
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    if plan.sampler == "tpe":
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=plan.startup_trials, seed=seed)
    else:
        study.sampler = optuna.samplers.RandomSampler(seed)
    return study.ask({name: _distribution(values) for name, values in plan.space.items()})


def decoded(params: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Return values as settings have them, from those of Optuna."""
    return {name: params[name] if isinstance(space[name], Range) else json.loads(params[name]) for name in space}


def outcomes(study: "optuna.Study", space: Space) -> list[Outcome]:
    """Return the trials that are over, in their order."""
    found = []
    for number, trial in enumerate(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))):
        pruned = trial.state == TrialState.PRUNED
        accuracy = max(trial.intermediate_values.values(), default=None) if pruned else trial.value
        found.append(Outcome(number, accuracy, pruned, decoded(trial.params, space)))
    return found


def best_of(found: list[Outcome]) -> list[Outcome]:
    """Return the complete trials, the best first; of equal ones the earlier."""
    return sorted((o for o in found if not o.pruned), key=lambda outcome: -(outcome.accuracy or 0))


def table(found: list[Outcome], rows: int = 5) -> str:
    """Return a table of the best trials."""
    best = best_of(found)[:rows]
    lines = [["trial", "validation", *found[0].values]]
    lines += [[str(o.number), f"{100 * (o.accuracy or 0):.2f} %", *map(shown, o.values.values())] for o in best]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def shown(value: Any) -> str:
    """Return a value as tables and pictures show it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def _distribution(values: list[Any] | Range) -> "optuna.distributions.BaseDistribution":
    if not isinstance(values, Range):  # as JSON, because Optuna stores no lists
        return optuna.distributions.CategoricalDistribution([json.dumps(value) for value in values])
    if isinstance(values.low, int) and isinstance(values.high, int):
        return optuna.distributions.IntDistribution(values.low, values.high, values.log)
    return optuna.distributions.FloatDistribution(values.low, values.high, values.log)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
