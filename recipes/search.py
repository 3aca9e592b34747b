"""Search for settings of meta-training by Optuna: trials of it, judged by their accuracy on the validation classes.

    python recipes/search.py --config recipes/configs/banking77.yaml --output runs/search --trials 30

Takes the options of ``textmeta train``; needs the extra hpo. Interrupted, the same command goes on in the middle of a
trial; with more trials it adds to a search that is done. Test classes take no part.
"""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from textmeta.data.splits import load_parts
from textmeta.errors import DivergedError, TextMetaError
from textmeta.meta.outer_loop import RECORD
from textmeta.meta.trainer import MetaTrainer
from textmeta.training import parsed, train_parser

SPACE = {  # settings of MetaTrainer; nested ones have dotted names
    "lora_rate": FloatDistribution(1e-4, 3e-3, log=True),
    "number_rate": FloatDistribution(5e-3, 0.1, log=True),
    "lora.rank": CategoricalDistribution([4, 8, 16]),
    "learner.steps": IntDistribution(2, 8),
}


def main() -> None:
    """Run the trials that are missing, and say how to train with the best settings."""
    (parser := train_parser()).add_argument("--trials", type=int, default=20)
    settings = parsed(parser, sys.argv[1:])
    base, output = MetaTrainer(**{field.name: settings[field.name] for field in fields(MetaTrainer)}), settings.output
    parts = load_parts(settings.data or settings.corpora, settings.fold)
    output.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    named = {"study_name": "search", "storage": f"sqlite:///{output / 'study.db'}", "load_if_exists": True}
    study = optuna.create_study(direction="maximize", **named)
    # a seed of its own each time the search goes on, lest it draw the first trials again
    study.sampler = optuna.samplers.TPESampler(seed=base.seed + len(study.trials))
    told = json.dumps([repr(base), [corpus.summary for corpus in parts["train"] + parts["valid"]]])
    if study.user_attrs.get("settings", told) != told:
        sys.exit(f"{output} holds a search with other settings or corpora: give another folder")
    study.set_user_attr("settings", told)
    for left in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # it was stopped: take it up again
        study.tell(left.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(left.params, {"folder": left.user_attrs.get("folder", f"trial-{left.number:03d}")})
    for number in range(len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))), settings.trials):
        trial = study.ask(SPACE)
        print(f"trial {number + 1} of {settings.trials}: {trial.params}")
        folder = output / trial.user_attrs.get("folder", f"trial-{trial.number:03d}")
        study.tell(trial, accuracy(with_values(base, trial.params), parts, folder))
    best = " ".join(f"--{name}={value}" for name, value in study.best_params.items())
    print(f"The best told {100 * study.best_value:.2f} % of the validation queries. For textmeta train: {best}")


def with_values(trainer: MetaTrainer, values: dict) -> MetaTrainer:
    """Return a trainer with other values of some settings."""
    for name, value in values.items():
        group, _, own = name.rpartition(".")
        changed = replace(getattr(trainer, group), **{own: value}) if group else value
        trainer = replace(trainer, **{group or own: changed})
    return trainer


def accuracy(trainer: MetaTrainer, parts: dict, folder: Path) -> float:
    """Train; return the best accuracy on the validation classes, 0 where training diverged."""
    try:
        trainer.train(parts["train"], parts["valid"], folder, cache=folder.parent / "frozen")
    except DivergedError:
        return 0.0
    rows = map(json.loads, (folder / RECORD).read_text(encoding="utf-8").splitlines())
    return max(row.get("valid_accuracy", 0.0) for row in rows)


if __name__ == "__main__":
    try:
        main()
    except TextMetaError as error:
        sys.exit(str(error))
