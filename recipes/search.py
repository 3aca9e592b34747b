"""Search for settings of meta-training by Optuna: trials of it, judged by their accuracy on validation corpora.

    python recipes/search.py --config recipes/configs/banking77.yaml --output runs/search --trials 30
    python recipes/search.py --config FILE --output FOLDER --sampler grid --search '{"learner.steps": [3, 5]}'

Takes the options of ``textmeta train``, and with ``valid`` corpora judges by these, else by classes held out; needs the
extra hpo. Interrupted, the same command goes on in the middle of a trial; with more trials it adds to a search that is
done. Test classes take no part.
"""

import itertools
import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from textmeta.data.corpus import Corpus
from textmeta.errors import DivergedError, SettingsError, TextMetaError
from textmeta.meta.checkpoint import rows_of
from textmeta.meta.outer_loop import RECORD
from textmeta.meta.trainer import MetaTrainer
from textmeta.training import corpora_of, parsed, train_parser

SPACE = {  # settings of MetaTrainer, of a list or between two numbers; nested ones have dotted names
    "lora_rate": {"low": 1e-4, "high": 3e-3, "log": True},
    "number_rate": {"low": 5e-3, "high": 0.1, "log": True},
    "lora.rank": [4, 8, 16],
    "learner.steps": {"low": 2, "high": 8},
}
SAMPLERS = {"tpe": TPESampler, "random": RandomSampler, "grid": RandomSampler}  # a grid is asked for as a whole
UNPRUNED = 3  # trials before a worse one is stopped
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def main() -> None:
    """Run the trials that are missing; print all, and how to train with the best settings."""
    parser = train_parser()
    parser.add_argument("--search", type=dict[str, Any], default=SPACE, help="setting to values, or low, high, log")
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="tpe", help="how the next trial is drawn")
    parser.add_argument("--prune", type=bool, default=True, help="stop a trial that is below the median of others")
    parser.add_argument("--trials", type=int | None, help="by default 20, or the whole grid")
    settings = parsed(parser, sys.argv[1:])
    space, grid = {name: distribution(name, given) for name, given in settings.search.items()}, []
    if settings.sampler == "grid":
        if between := [name for name, of in space.items() if not isinstance(of, CategoricalDistribution)]:
            raise SettingsError(f"search {between[0]}: a grid needs a list of values")
        rows = itertools.product(*(of.choices for of in space.values()))
        grid = [dict(zip(space, row, strict=True)) for row in rows]
    for name, of in space.items():  # what does not fit is told before anything runs
        for value in of.choices if isinstance(of, CategoricalDistribution) else (of.low, of.high):
            trainer_with(parser, {name: value})
    base, output = trainer_with(parser, {}), settings.output
    if output is None:
        raise SettingsError("nowhere to write to: give --output FOLDER")
    for name in ("dry_run", "start", "track"):
        if settings[name]:
            raise SettingsError(f"--{name} has no meaning in a search")
    corpora, valid, _ = corpora_of(settings)
    if not valid:
        raise SettingsError("nothing to judge trials by: give valid corpora, or hold classes out")
    output.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.MedianPruner(UNPRUNED) if settings.prune else optuna.pruners.NopPruner()
    named = {"study_name": "search", "storage": f"sqlite:///{output / 'study.db'}", "load_if_exists": True}
    study = optuna.create_study(direction="maximize", pruner=pruner, **named)
    # a seed of its own each time the search goes on, lest it draw the first trials again
    study.sampler = SAMPLERS[settings.sampler](seed=base.seed + len(study.trials))
    told = json.dumps([repr(base), settings.search, [corpus.summary for corpus in corpora + valid]])
    if study.user_attrs.get("settings", told) != told:
        sys.exit(f"{output} holds a search with other settings or corpora: give another folder")
    study.set_user_attr("settings", told)
    for left in study.get_trials(states=(TrialState.RUNNING,)):  # it was stopped: take it up again
        study.tell(left.number, state=TrialState.FAIL)
        study.enqueue_trial(left.params, {"folder": left.user_attrs.get("folder", f"trial-{left.number:03d}")})
    for row in grid:
        study.enqueue_trial(row, skip_if_exists=True)
    trials = settings.trials or len(grid) or 20
    for number in range(len(study.get_trials(states=DONE)), min(trials, len(grid) or trials)):
        trial = study.ask(space)
        print(f"trial {number + 1} of {trials}: {trial.params}")
        folder = output / trial.user_attrs.get("folder", f"trial-{trial.number:03d}")
        try:
            study.tell(trial, accuracy(trainer_with(parser, trial.params), corpora, valid, folder, trial))
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
    print(f"\n| {' | '.join(['trial', *space, 'best accuracy', 'steps'])} |\n|{'---|' * (len(space) + 3)}")
    for trial in study.get_trials(states=DONE):
        shown = [f"{value:.2g}" if isinstance(value, float) else str(value) for value in map(trial.params.get, space)]
        told = trial.intermediate_values or {0: 0.0}  # of one that diverged
        steps = f"{max(told)}{', stopped' * (trial.state == TrialState.PRUNED)}"
        print(f"| {' | '.join([str(trial.number), *shown, f'{100 * max(told.values()):.2f}', steps])} |")
    best = shlex.join(options(study.best_params))
    print(f"\nThe best told {100 * study.best_value:.2f} % of the validation queries. For textmeta train: {best}")


def distribution(name: str, given: Any) -> BaseDistribution:
    """Return what a setting is drawn from: a list of values, or {low, high} with step, or log for a log scale."""
    if isinstance(given, list) and given:  # a value that is a list itself is kept as it is written
        return CategoricalDistribution([json.dumps(part) if isinstance(part, list) else part for part in given])
    try:
        whole = all(isinstance(given[end], int) for end in ("low", "high"))
        return (IntDistribution if whole else FloatDistribution)(**given)
    except (TypeError, KeyError, ValueError) as error:
        raise SettingsError(f"search {name}: expected a list, or low and high, given {given!r:.80}") from error


def options(params: dict[str, Any]) -> list[str]:
    """Return settings as options of ``textmeta train``."""
    return [f"--{name}={value}" for name, value in params.items()]


def trainer_with(parser: Any, params: dict[str, Any]) -> MetaTrainer:
    """Return the trainer of the command line with other values of some settings."""
    settings = parsed(parser, [*sys.argv[1:], *options(params)])
    return MetaTrainer(**{field.name: settings[field.name] for field in fields(MetaTrainer)})


def accuracy(
    trainer: MetaTrainer, corpora: list[Corpus], valid: list[Corpus], folder: Path, trial: optuna.Trial
) -> float:
    """Train; return the best validation accuracy, 0 where training diverged; TrialPruned where others do better."""
    told: dict[int, float] = {}  # by step

    def judge(row: dict[str, Any]) -> None:
        if "valid_accuracy" in row and row["step"] not in told:
            told[row["step"]] = row["valid_accuracy"]
            trial.report(row["valid_accuracy"], row["step"])
            if row["step"] < trainer.steps and trial.should_prune():
                raise optuna.TrialPruned

    try:
        for row in rows_of(folder / RECORD):  # of a trial that goes on
            judge(row)
        trainer.train(corpora, valid, folder, cache=folder.parent / "frozen", callback=judge)
    except DivergedError:
        return 0.0
    return max(told.values(), default=0.0)


if __name__ == "__main__":
    try:
        main()
    except TextMetaError as error:
        sys.exit(str(error))
