"""What `textmeta train` does: load corpora, meta-train, judge the adapter on classes held out, write its folder."""

import difflib
import re
from argparse import Action
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from textmeta.data.corpus import Corpus, CorpusSettings, each_source, load_corpora
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.data.labels import whole_number
from textmeta.data.overview import warn_of_overlap
from textmeta.data.splits import load_parts
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.errors import SettingsError
from textmeta.files import at_home
from textmeta.heads import HEADS
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.evaluation import format_table, frozen_prototypes, paired_difference, score_episodes, summary
from textmeta.meta.initialisation import LearnerSettings
from textmeta.meta.learner import TaskLearner
from textmeta.meta.trainer import MetaTrainer
from textmeta.nearest import index_corpora
from textmeta.sharing.folder import check_destination
from textmeta.sharing.store import load_adapter, save_adapter

TEST_WAYS, TEST_QUERIES = 5, 5
TABLES: dict[str, Iterable[str]] = {"ALGORITHMS": ALGORITHMS, "HEADS": HEADS}


def train(arguments: Sequence[str]) -> None:
    """Meta-train an adapter, save it, and print what it brings on classes that it has not seen."""
    settings = parsed(train_parser(), arguments)
    trainer = MetaTrainer(**{field.name: settings[field.name] for field in fields(MetaTrainer)})
    # what might fail goes first, for training takes long
    output: Any = settings.output and at_home(settings.output)
    if output:
        check_destination(output)
    elif not settings.dry_run:
        raise SettingsError("nowhere to write to: give --output FOLDER, or --dry-run, which needs none")
    whole_number("test_episodes", settings.test_episodes, 2)
    corpora, valid, test = corpora_of(settings)
    warn_of_overlap(corpora, test, "test on")
    tests = _tests(test, settings.test_shots, trainer.seed)
    start = None
    if settings.start:
        start = load_adapter(settings.start, encoder=settings.encoder.model)[0]
        own = start.learner if trainer.learner == LearnerSettings() else trainer.learner
        trainer = replace(trainer, lora=start.lora, learner=own)
    if settings.dry_run:
        plan = trainer.plan(corpora, valid, output, start=start)
        if PartialState().is_main_process:
            print(plan)
        return
    adapter = trainer.train(corpora, valid, output, start=start, track=settings.track)
    state = PartialState()
    main = state.is_main_process
    reader = adapter.load_reader(device=state.device, precision=trainer.precision)
    learner = TaskLearner(reader, adapter.to(reader.encoder.device))
    adapter = replace(adapter, index=index_corpora(learner, corpora))
    if main:
        save_adapter(output, adapter)  # before it is judged, lest that be interrupted
    results: dict[str, Any] = {}
    table: dict[str, Any] = {}
    for name, sampler in tests:  # the adapter and frozen prototypes on the same episodes
        episodes = sampler.take(settings.test_episodes)
        before = frozen_prototypes(reader, episodes, f"{name}, frozen", together=True)
        after = score_episodes(learner, episodes, name, together=True)
        paired = paired_difference(after, before)
        results[name] = {"frozen": summary(before), "meta_trained": summary(after), "paired": paired}
        table[f"{name}: frozen prototypes"] = summary(before)
        table[f"{name}: this adapter"] = {**summary(after), "paired": paired}
    if not main:
        return
    if results:
        save_adapter(output, replace(adapter, record={**adapter.record, "results": results}))
        print(format_table(table))
    print(f"The adapter is in {output}: FewShotClassifier({str(output)!r}) has it.")


def corpora_of(settings: Namespace) -> tuple[list[Corpus], list[Corpus], list[Corpus]]:
    """Return corpora to train on, to choose by, and to test on."""
    sources, given = settings.data or settings.corpora, settings.corpora
    if settings.data and len(given) == 1 and given[0].splits:
        sources = [replace(source, splits=given[0].splits) for source in each_source(settings.data)]
    if not sources:
        raise SettingsError("nothing to train on: give --data FILE, FOLDER or ID, or corpora in the config")
    if settings.valid or not settings.hold_out:
        return load_corpora(sources), load_corpora(settings.valid), []
    # of each class 5 shots to choose by
    parts = load_parts(sources, settings.fold, max([5, *settings.test_shots]) + TEST_QUERIES)
    return parts["train"], parts["valid"], parts["test"]


def _tests(corpora: Sequence[Corpus], shots: Sequence[int], seed: int) -> list[tuple[str, EpisodeSampler]]:
    """Return the name and the episodes of each test, with and without names of the classes."""
    found = []
    for number in shots if corpora else ():
        for names in (0.0, 1.0):
            asked = EpisodeSettings(TEST_WAYS, number, TEST_QUERIES, label_names=names)
            name = f"{number} shot{'s' * (number != 1)}{', class names' * (names > 0)}"
            found.append((name, EpisodeSampler(corpora, asked, seed + 2)))
    return found


class _Help(DefaultHelpFormatter):
    def _expand_help(self, action: Action) -> str:
        return plain_help(super()._expand_help(action))


def plain_help(text: str) -> str:
    """Return what a docstring says of a setting without its markup; a table is shown as the names of its rows."""
    text = re.sub(rf":data:`~[\w.]+\.({'|'.join(TABLES)})`", lambda role: ", ".join(TABLES[role[1]]), text)
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def train_parser() -> ArgumentParser:
    """Return the parser of ``textmeta train``: the settings of MetaTrainer, and those of a run."""
    parser = ArgumentParser(
        prog="textmeta train",
        usage="textmeta train [--config FILE] --output FOLDER [--data FILE] [--encoder ID] [--dry-run] [--SETTING ...]",
        description="Meta-train an adapter on labelled texts. The same command goes on with a run that was stopped: by "
        "SIGINT it ends with exit code 130, by SIGTERM with 143, after the step.",
        # wider, and so shorter
        formatter_class=partial(_Help, max_help_position=34, width=118),  # type: ignore[arg-type]
        print_config=None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these; the later of two counts")
    run = parser.add_argument_group("The run")
    run.add_argument("--output", type=Path | None, help="folder for checkpoint, record and adapter")
    told = "say what a run would do and take, and make no folder"
    run.add_argument("--dry_run", "--dry-run", action="store_true", help=told)
    run.add_argument("--corpora", type=list[CorpusSettings], default=[], help="what to train on")
    data = "instead of the corpora: a file, a folder of files or an id on the Hub; may be given several times"
    run.add_argument("--data", type=str | list[str] | None, help=data)
    run.add_argument("--fold", type=str | None, help="which class split, where the corpora's files have several")
    run.add_argument("--hold_out", type=bool, default=True, help="classes to choose and test by; false trains on all")
    run.add_argument("--valid", type=list[CorpusSettings], default=[], help="corpora to choose by; none is split then")
    run.add_argument("--start", type=str | None, help="adapter to start from, with its settings")
    run.add_argument("--test_shots", type=list[int], default=[1, 5], help="shots of the tests")
    run.add_argument("--test_episodes", type=int, default=600, help="episodes of each test")
    told = "trackers that get the record: tensorboard, trackio, or a list"
    run.add_argument("--track", type=list[str] | str, default=[], help=told)
    groups = {"encoder": EncoderSettings, "lora": LoraSettings, "learner": LearnerSettings}
    parser.add_class_arguments(MetaTrainer, as_group=True, skip=set(groups))
    for name, kind in groups.items():
        parser.add_class_arguments(kind, name, skip={"long_texts"})  # which is for classifiers
    return parser


def parsed(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse a command line; settings that are dataclasses come back as such. ``--encoder`` alone names the model.

    SettingsError for an unknown name, with the nearest that is known, or a value of the wrong type.
    """
    meant = {"--data": "--data+", "--encoder": "--encoder.model"}  # with + several add up
    given = [re.sub(r"^--(?:data|encoder)(?==|$)", lambda name: meant[name[0]], argument) for argument in arguments]
    try:
        settings: Namespace = parser.instantiate(parser.parse_args(given))
        return settings
    except ArgumentError as error:
        known = [*parser.get_defaults().keys(), *(field.name for field in fields(CorpusSettings))]
        naming = r"(?i)(?:group '([\w.]+)' does not accept )?(?:arguments: --|option ')([\w.]+)"
        unknown = [f"{group}.{name}".lstrip(".") for group, name in re.findall(naming, str(error))]
        near = [(name, best) for name in unknown for best in difflib.get_close_matches(name, known, 1, cutoff=0.4)]
        said = "".join(f"; the nearest to {name!r} is {best!r}" for name, best in near)
        raise SettingsError(f"{error}{said}") from error
