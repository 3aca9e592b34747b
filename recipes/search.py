"""Search for settings of meta-training: trials of it, judged by their accuracy on the validation classes.

python recipes/search.py --config recipes/configs/search/banking77.yaml --output runs/search --trials 30 \
    --data banking77.jsonl --splits recipes/splits/banking77.splits.json

Settings are those of meta_train.py and the few of the search; with the extras hpo and plot. Interrupted or killed, the
same command goes on in the middle of the trial; with more trials it adds to a search that is done.

python recipes/meta_train.py --config runs/search/best.yaml --output runs/best

then trains with the best settings, and reports on the test classes, of which the search sees nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from meta_train import MetaTrainSettings
from search_drawing import check_drawing, draw
from search_study import Range, SearchPlan, best_of, check_optuna, decoded, next_trial, open_study, outcomes, table
from tqdm import tqdm

from textmeta.artifact.start import load_start
from textmeta.cli import parse_settings, run_recipe
from textmeta.data.class_splits import load_parts
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler
from textmeta.errors import DivergedError, SettingsError, TrainingInterrupted
from textmeta.files import write_atomically
from textmeta.meta.interruption import stop_requests
from textmeta.meta.training import RECORD, TrainingResult, train
from textmeta.model.encoder import Encoder

try:
    import optuna
    from optuna.trial import TrialState
except ImportError:  # an extra: check_optuna says so
    optuna = None

SEARCHABLE = ("encoder.", "lora.", "episodes.", "inner.", "training.")
# may differ when a search goes on; of the corpora counts what they hold, not where they are
FREE = {"output", "trials", "corpora", "data", "splits", "fold"}
FREE |= {"test_ways", "test_shots", "test_episodes", "index_rows", "calibration"}  # they come after training


@dataclass(frozen=True)
class SearchSettings(SearchPlan, MetaTrainSettings):
    """Settings of this recipe: of the search, and of meta_train.

    Where episodes are searched, those of validation stay as they are set, so that trials compare.
    """

    def __post_init__(self) -> None:
        """Check every value of the space, before the first trial."""
        SearchPlan.__post_init__(self)
        MetaTrainSettings.__post_init__(self)
        ends = {n: [v.low, v.high] if isinstance(v, Range) else v for n, v in self.space.items()}
        for number in range(max(map(len, ends.values()))):
            with_values(self, {name: values[min(number, len(values) - 1)] for name, values in ends.items()})
        fixed = [n for n in self.space if not n.startswith(SEARCHABLE) or n == "training.validation_episodes"]
        if fixed:
            raise SettingsError(f"{fixed[0]} cannot be searched: trials would not compare")


def main(settings: SearchSettings) -> None:
    """Run the trials that are missing; print, save and draw what came out."""
    check_optuna()
    check_drawing()
    accelerator = Accelerator(mixed_precision=settings.precision)
    if accelerator.num_processes > 1:
        raise SettingsError(f"a search runs in one process, given {accelerator.num_processes}")
    parts = load_parts(settings.sources())
    told = {name: value for name, value in plain(settings).items() if name not in FREE}
    told |= {part: [corpus.summary for corpus in parts[part]] for part in ("train", "valid")}
    with open_study(settings, settings.output, told) as study, stop_requests() as stopped:
        found = outcomes(study, settings.space)
        with tqdm(total=max(settings.goal, len(found)), initial=len(found), desc="search", unit="trial") as progress:
            while len(found) < settings.goal:
                run_trial(study, settings, len(found), parts, accelerator, stopped)
                found = outcomes(study, settings.space)
                if best_of(found):
                    progress.set_postfix(best_valid=best_of(found)[0].accuracy, refresh=False)
                progress.update()
    if not best_of(found):
        raise DivergedError(f"all {len(found)} trials diverged; try smaller learning rates and step sizes")
    best = best_of(found)[0]
    config = plain(with_values(settings, best.values))
    del config["output"]  # another folder each time
    write_atomically(settings.output / "best.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    draw(found, settings.space, settings.output / "search.png")
    print(table(found))
    print(f"\nThe settings of trial {best.number} are in {settings.output / 'best.yaml'}; search.png shows all trials")


def run_trial(
    study: "optuna.Study",
    settings: SearchSettings,
    number: int,
    parts: Mapping[str, Sequence[Corpus]],
    accelerator: Accelerator,
    stopped: Callable[[], bool],
) -> None:
    """Run a trial to its end, from where it was interrupted if it was."""
    trial = next_trial(study, settings, number)
    own = with_values(settings, decoded(trial.params, settings.space))
    own = replace(own, output=settings.output / f"trial-{number:03d}")
    reported: set[int] = set()

    def on_validation(step: int, accuracy: float) -> None:
        if step not in reported:
            trial.report(accuracy, step)
            reported.add(step)
        if trial.should_prune():
            raise optuna.TrialPruned
        if stopped():  # while nobody else listened
            raise TrainingInterrupted(f"stopped in trial {number}; the same command goes on")

    try:
        for step, accuracy in recorded(own.output / RECORD):  # those before it was interrupted
            on_validation(step, accuracy)
        study.tell(trial, train_once(own, settings, parts, accelerator, on_validation).record["valid_accuracy"])
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except DivergedError as error:  # an outcome, too: of settings to keep away from
        tqdm.write(f"trial {number}: {error}")
        study.tell(trial, state=TrialState.PRUNED)


def train_once(
    own: MetaTrainSettings,
    settings: SearchSettings,
    parts: Mapping[str, Sequence[Corpus]],
    accelerator: Accelerator,
    on_validation: Callable[[int, float], None],
) -> TrainingResult:
    """Train with a trial's own settings, validated on the episodes that all trials share."""
    train_episodes = EpisodeSampler(parts["train"], own.episodes, own.training.seed)
    valid_episodes = EpisodeSampler(parts["valid"], settings.episodes, settings.training.seed + 1)
    start = load_start(own.start, revision=own.start_revision) if own.start else None
    lora = start.lora if start else own.lora
    encoder = Encoder(own.encoder, lora, accelerator.device, accelerator.mixed_precision)
    return train(
        encoder, train_episodes, valid_episodes, own.training, own.inner, own.output, accelerator,
        start.fitted_to(encoder) if start else None, on_validation,
    )  # fmt: skip


def recorded(path: Path) -> Iterator[tuple[int, float]]:
    """Yield step and accuracy of each validation in the record of a run."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line) if line.endswith("}") else {}  # a kill may leave a part of a line
        if "valid_accuracy" in row:
            yield row["step"], row["valid_accuracy"]


def with_values(settings: SearchSettings, values: Mapping[str, Any]) -> MetaTrainSettings:
    """Return settings of meta_train with values of the space in their places.

    Raises:
        SettingsError: for a name that is no setting, naming the nearest that is, or a value that does not fit it.
    """
    whole = plain(settings)
    config = {part.name: whole[part.name] for part in fields(MetaTrainSettings)}
    for name, value in values.items():
        *groups, last = name.split(".")
        place = config
        for group in groups:
            if not isinstance(place.get(group), dict):  # null, such as the task encoder's
                place[group] = {}
            place = place[group]
        place[last] = value
    return parse_settings(MetaTrainSettings, ["--config", json.dumps(config)])


def plain(settings: MetaTrainSettings) -> dict[str, Any]:
    """Return settings as JSON has them."""
    return json.loads(json.dumps(asdict(settings), default=str))  # type: ignore[no-any-return]


if __name__ == "__main__":
    run_recipe(main, SearchSettings, __doc__)
