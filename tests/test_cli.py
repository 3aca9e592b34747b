"""The command `textmeta`."""

import json
import logging
import os
import re
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import write_rows
from tests.given import LABELS, SUPPORT, TEXTS, Logged, Patch, Shown
from tests.hub.server import TOKEN, HubServer
from tests.sharing.made import rewrite_json
from textmeta import Corpus, CorpusSettings, FewShotClassifier
from textmeta.cli import main
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.heads import HEADS
from textmeta.meta import trainer
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.initialisation import LearnerSettings
from textmeta.progress import progress_bar
from textmeta.sharing.store import load_adapter
from textmeta.training import parsed, train_parser

Run = Callable[..., Path]


@pytest.fixture
def folder(shared: FewShotClassifier, tmp_path: Path) -> Path:
    shared.save_pretrained(tmp_path / "adapter", include_support="texts")
    return tmp_path / "adapter"


@pytest.fixture
def data(corpus: Corpus, tmp_path: Path) -> Path:
    """The toy corpus as a file."""
    return write_rows(tmp_path / "toy.jsonl", corpus)


@pytest.fixture
def run(tiny_model: str, monkeypatch: Patch) -> Run:
    """Run ``textmeta train`` with few episodes; return the output folder."""
    monkeypatch.setattr(trainer, "CALIBRATION_EPISODES", 8)
    monkeypatch.setattr(trainer, "VALIDATION_EPISODES", 2)

    def run_(output: Path, *arguments: Any) -> Path:
        few = ["--episodes", "4", "--test_episodes", "2", "--test_shots", "[1]"]
        encoder = ["--encoder", tiny_model, "--encoder.max_length", "32"]
        main(["train", "--output", str(output), *few, *encoder, *map(str, arguments)])
        return output

    return run_


def failure(arguments: list[Any], capsys: Shown) -> str:
    """Return the line that a command ends with, on an error of ours."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return str(shown.splitlines()[-1])


def test_train_on_a_file_makes_an_adapter(run: Run, data: Path, corpus: Corpus, tmp_path: Path, capsys: Shown) -> None:
    output = run(tmp_path / "run", "--data", data)
    shown = capsys.readouterr().out
    for row in ("1 shot: frozen prototypes", "1 shot: this adapter", "1 shot, class names: this adapter"):
        assert re.search(rf"^{row} +\| \d+\.\d\d ± ", shown, re.M), row
    assert str(output) in shown.splitlines()[-1]

    made, fitted = load_adapter(output)
    assert fitted is None
    assert made.scope is not None
    assert made.record["settings"]["episodes"] == 4
    assert made.record["results"].keys() == {"1 shot", "1 shot, class names"}
    known = set(made.index.classes["toy"])
    assert len(known) == 6
    assert known < set(corpus.class_names), "the others are held out"
    classifier = FewShotClassifier(output).fit(SUPPORT, LABELS)
    assert np.isfinite(classifier.predict_proba(TEXTS)).all()
    assert classifier.nearest_tasks()[0].corpus == "toy"

    main(["info", str(output)])
    shown = capsys.readouterr().out
    for line in (
        r"what +meta-trained adapter",
        r"size +\d\.\d MiB",
        r"encoder +/.*tiny-bert.*, revision unknown; texts are cut at 32 tokens",
        r"learner +ridge on layers 2, 3, 4; 6 steps on pooling",
        r"known +toy: 6 classes by name, readable by anybody",
        r"trained +maml, 4 episodes",
        r"on +toy: 96 texts, 6 classes, licence not known",
        r"result +1 shot: \d+\.\d\d ± \d+\.\d\d → \d+\.\d\d ± \d+\.\d\d %, .*\[",
    ):
        assert re.search(f"^{line}", shown, re.M), line


def test_the_same_command_again_takes_no_step(run: Run, data: Path, tmp_path: Path) -> None:
    first, _ = load_adapter(run(tmp_path / "run", "--data", data))
    record = (tmp_path / "run" / "record.jsonl").read_bytes()
    again, _ = load_adapter(run(tmp_path / "run", "--data", data))
    assert (tmp_path / "run" / "record.jsonl").read_bytes() == record
    tensors = again.initialisation.tensors()
    assert all(tensors[name].equal(value) for name, value in first.initialisation.tensors().items())


def test_nothing_may_be_held_out(run: Run, data: Path, corpus: Corpus, tmp_path: Path, capsys: Shown) -> None:
    """Both train on all classes, and so have nothing to test on."""
    valid = json.dumps([{"dataset": str(data), "name": "other"}])
    for number, how in enumerate((["--hold_out", "false"], ["--valid", valid])):
        made, _ = load_adapter(run(tmp_path / str(number), "--data", data, *how))
        assert made.index.classes["toy"] == corpus.class_names
        assert "results" not in made.record
        assert len(made.record["settings"]["valid"]) == number
        assert "accuracy" not in capsys.readouterr().out


def test_train_on_a_folder_and_a_file_of_several_corpora(
    run: Run, data: Path, corpus: Corpus, tmp_path: Path, capsys: Shown, caplog: Logged
) -> None:
    few, many = corpus.restrict(corpus.class_names[:3]), corpus.restrict(corpus.class_names[::-1])
    write_rows(tmp_path / "corpora" / "few.jsonl", few)
    write_rows(tmp_path / "corpora" / "many.jsonl", many)
    (tmp_path / "corpora" / "README.md").write_text("of these corpora")
    made, _ = load_adapter(run(tmp_path / "run", "--data", tmp_path / "corpora", f"--data={data}"))
    assert {name: len(classes) for name, classes in made.index.classes.items()} == {"few": 3, "many": 6, "toy": 6}
    assert [row["name"] for row in made.record["settings"]["valid"]] == ["many", "toy"]
    assert "1 shot: this adapter" in capsys.readouterr().out
    for told in (
        "2 corpora; not read: 'README.md'",
        "1 of 3 corpora are trained on whole, with fewer than 8 classes of 10 different texts: few (3 of its 3",
        "corpus few: 48 texts, 3 classes\ncorpus many: 96 texts, 6 classes\ncorpus toy: 96 texts, 6 classes\n3 ",
    ):
        assert told in caplog.text
    found = [record.message for record in caplog.records if record.message.startswith("held out to ")]
    assert len(found) == 2
    assert all("of 48 of many (" in told for told in found)


def test_a_lopsided_corpus_is_trained_on(run: Run, tmp_path: Path, capsys: Shown, caplog: Logged) -> None:
    rows = [(f"bal {number}", 1) for number in range(10_000)] + [(f"kes {number}", 2) for number in range(5)]
    rows += [(f"fim {number}", 1000 + number) for number in range(100)] + [("dal " * 25_000, 2)]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    line = failure(["train", "--data", path, "--output", tmp_path / "none"], capsys)
    assert "odd (1 of its 102 classes); `--hold_out false` trains on all classes" in line
    made, _ = load_adapter(run(tmp_path / "run", "--data", path, "--hold_out", "false"))
    assert len(made.index.classes["odd"]) == 102
    assert "corpus odd: 10,106 texts, 102 classes; 100 of classes with fewer than 4; " in caplog.text
    assert "(not used: '1000', '1001', " in caplog.text


def test_train_starts_from_an_adapter(run: Run, data: Path, folder: Path, tmp_path: Path) -> None:
    """Its LoRA's settings are taken, and what is not learned stays as it was there."""
    fixed = ["--fixed", '["lora."]', "--lora.rank", "2"]
    made, start = (
        load_adapter(place)[0] for place in (run(tmp_path / "run", "--data", data, "--start", folder, *fixed), folder)
    )
    assert (made.lora, made.learner) == (start.lora, start.learner)
    lora = start.initialisation.lora
    assert all(made.initialisation.lora[name].equal(value) for name, value in lora.items())
    assert not made.initialisation.queries.equal(start.initialisation.queries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to train on: give --data FILE, FOLDER or ID, or corpora in the config"),
        (["--data", "no-such.csv"], "no such file"),
        (["--data", "{data}", "--test_shots", "[12]"], "8 classes of 17 different texts: toy (0 of its 12 classes)"),
        (["--data", "{data}", "--test_episodes", "1"], "test_episodes must be a whole number from 2, given 1"),
        (["--data", "{data}", "--output", "."], "working folder"),
        (["--data", "{data}", "--start", "no-such"], "no-such"),
        (["--data", "{data}", "--encoder.max_length", "1"], "a whole number from 3, given 1"),
    ],
)
def test_what_cannot_be_run_ends_in_a_line_before_training(
    data: Path, tmp_path: Path, capsys: Shown, tiny_model: str, arguments: list[str], message: str
) -> None:
    given = [str(data) if argument == "{data}" else argument for argument in arguments]
    command = ["train", "--output", tmp_path / "run", "--encoder.model", tiny_model, *given]
    assert message in failure(command, capsys)
    assert not (tmp_path / "run").exists()


# The settings of train


def write_config(folder: Path, text: str) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def test_there_are_few_settings_and_their_help_is_short() -> None:
    parser = train_parser()
    names = list(parser.get_defaults().keys())
    names.remove("config")
    assert len(names) == len(set(names)) <= 34, names
    assert {"output", "corpora", "algorithm", "encoder.model", "lora.rank", "learner.adapt"} <= set(names)
    shown = parser.format_help()
    assert len(shown.splitlines()) <= 80
    for table in (ALGORITHMS, HEADS):
        assert f"one of {', '.join(table)}" in shown
    assert not re.search(r":\w+:`|``", shown), "markup of docstrings"


def test_every_setting_has_its_default_and_a_config_file_changes_it(tmp_path: Path) -> None:
    plain = parsed(train_parser(), ["--output", "run"])
    assert (plain.encoder, plain.lora, plain.learner) == (EncoderSettings(), LoraSettings(), LearnerSettings())
    assert {name: plain[name] for name in ("algorithm", "precision")} == {"algorithm": "maml", "precision": "no"}
    config = """
output: run
fold: "01"
test_shots: [2, 3]
corpora:
  - dataset: first.csv
    label_column: intent
  - {dataset: owner/second, config: en}
encoder: {model: some/encoder}
lora: {targets: [query]}
learner: {layers: [1, 2], adapt: lora}
algorithm: reptile
fixed: [centre]
lora_rate: 1e-3
"""
    settings = parsed(train_parser(), write_config(tmp_path, config))
    assert (settings.output, settings.fold, settings.test_shots) == (Path("run"), "01", [2, 3])
    second = CorpusSettings("owner/second", config="en")
    assert settings.corpora == [CorpusSettings("first.csv", label_column="intent"), second]
    assert settings.encoder == EncoderSettings("some/encoder")
    assert settings.lora == LoraSettings(targets=("query",))
    assert settings.learner == LearnerSettings(layers=(1, 2), adapt="lora")
    assert (settings.algorithm, settings.fixed, settings.lora_rate) == ("reptile", ("centre",), 0.001)


def test_the_later_of_config_and_command_line_counts_and_data_add_up(tmp_path: Path) -> None:
    config = write_config(tmp_path, "output: run\nepisodes: 4\nlora: {rank: 5, alpha: 6}\n")
    line = ["--episodes", "9", "--lora.rank", "7"]
    after, before = parsed(train_parser(), [*config, *line]), parsed(train_parser(), [*line, *config])
    assert (after.episodes, after.lora) == (9, LoraSettings(rank=7, alpha=6))
    assert (before.episodes, before.lora) == (4, LoraSettings(rank=5, alpha=6))
    for line, found in (
        (["--data", "a.csv"], ["a.csv"]),
        (["--data", "a.csv", "--data=folder"], ["a.csv", "folder"]),
        (write_config(tmp_path, "data: [a.csv, b.csv]"), ["a.csv", "b.csv"]),
        ([*write_config(tmp_path, "data: [a.csv, b.csv]"), "--data", "c"], ["a.csv", "b.csv", "c"]),
    ):
        assert parsed(train_parser(), ["--output", "run", *line]).data == found
    assert parsed(train_parser(), ["--output", "run", *write_config(tmp_path, "data: a.csv")]).data == "a.csv"
    both = ["--encoder.max_length", "64", "--encoder", "some/encoder"]
    for line in (both, [*both[2:], *both[:2]], [*both[:2], "--encoder=some/encoder"]):
        assert parsed(train_parser(), ["--output", "run", *line]).encoder == EncoderSettings("some/encoder", None, 64)


@pytest.mark.parametrize(
    ("given", "unknown", "nearest"),
    [
        (["--outptu", "5"], "outptu", "output"),
        (["--tetst_shots", "5"], "tetst_shots", "test_shots"),
        (["--lora.rnak", "5"], "lora.rnak", "lora.rank"),
        (["--episode", "5"], "episode", "episodes"),  # a beginning that is accepted today is ambiguous tomorrow
        ({"outptu": "run"}, "outptu", "output"),
        ({"learner": {"stpes": 4}}, "learner.stpes", "learner.steps"),
        ({"corpora": [{"dataset": "a", "label_colum": "b"}]}, "label_colum", "label_column"),
        ({"corpora": [{"dataset": "a"}, {"datset": "b"}]}, "datset", "dataset"),
    ],
    ids=str,
)
def test_unknown_names_get_the_nearest(tmp_path: Path, capsys: Shown, given: Any, unknown: str, nearest: str) -> None:
    arguments = given if isinstance(given, list) else write_config(tmp_path, yaml.safe_dump(given))
    line = failure(["train", "--output", tmp_path / "run", *arguments], capsys)
    assert f"the nearest to {unknown!r} is {nearest!r}" in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--episodes", "many"], "many"),
        (["--lora.rank", "4.5"], "4.5"),
        (["--hold_out", "perhaps"], "perhaps"),
        (["--learner.head", "knn"], "knn"),
        (["--algorithm", "mamal"], "algorithm must be one of .*given 'mamal'"),
        (["--config", "no-such.yaml"], r"no-such\.yaml"),
        ("episodes: many\n", "episodes"),
        ("fold: 01\n", "fold"),  # YAML reads the number 1
        ("corpora:\n  - dataset: a\n    label_column: 3\n", "label_column"),
        ("output: [run\n", "config"),
        ("- a\n- b\n", "config"),
    ],
)
def test_value_that_cannot_be_used_is_named(tmp_path: Path, capsys: Shown, given: Any, message: str) -> None:
    arguments = given if isinstance(given, list) else write_config(tmp_path, given)
    assert re.search(message, failure(["train", "--output", tmp_path / "run", *arguments], capsys))


# info and push


def test_push_and_info(hub: HubServer, folder: Path, tiny_model: str, capsys: Shown, monkeypatch: Patch) -> None:
    hub.add_repo("lab/tiny", {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    main(["push", str(folder), "tester/mine", "--base-model", "lab/tiny", "--message", "hello"])
    assert capsys.readouterr().out.startswith(f"{hub.url}/tester/mine/commit/")
    pushed, kept = (FewShotClassifier.from_pretrained(name) for name in ("tester/mine", folder))
    np.testing.assert_array_equal(pushed.predict_proba(TEXTS), kept.predict_proba(TEXTS))
    for name in ("tester/mine", str(folder)):
        main(["info", name])
        shown = capsys.readouterr().out
        for part in (r"what +fitted classifier", r"classes +3: b, f, k", r"support +6 texts stored, readable by any"):
            assert re.search(part, shown), part
        assert ("(hub, commit " in shown) is (name == "tester/mine")


@pytest.mark.parametrize("command", [["info"], ["push", "owner/name"]], ids=["info", "push"])
def test_no_adapter_and_a_damaged_one_end_in_a_line(folder: Path, capsys: Shown, command: list[str]) -> None:
    os.truncate(folder / "adapter_model.safetensors", 100)
    for given, told in ((folder, "adapter_model.safetensors is damaged"), ("no/such/place", "no/such/place")):
        assert told in failure([command[0], given, *command[1:]], capsys)


def test_info_shows_nothing_a_terminal_acts_on(classifier: FewShotClassifier, tmp_path: Path, capsys: Shown) -> None:
    classifier.fit(SUPPORT[:4], ["a\x1b[2J", "c\nwhole", "c\nwhole", "d"])
    classifier.save_pretrained(tmp_path / "adapter")
    main(["info", str(tmp_path / "adapter")])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\nwhole" not in shown


def test_info_of_a_folder_that_is_older_than_some_settings(folder: Path, capsys: Shown) -> None:
    rewrite_json(folder, "textmeta.json", lambda meta: (meta["encoder"].pop("long_texts"), meta.pop("prompt")))
    main(["info", str(folder)])
    assert "texts are cut at 32 tokens" in capsys.readouterr().out


def test_the_command_is_installed_and_lists_its_commands(capsys: Shown) -> None:
    (command,) = entry_points(group="console_scripts", name="textmeta")
    assert command.load() is main
    for arguments, code, told in (
        (["--help"], 0, "143 terminated"),
        (["train", "--help"], 0, "usage: textmeta"),
        (["--version"], 0, f"textmeta {version('textmeta')}\n"),
        ([], 2, "usage: textmeta"),
        (["trian"], 2, "usage: textmeta"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
        shown = capsys.readouterr()
        assert told in (shown.err if code else shown.out)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_speaks_for_all(rank: str, capsys: Shown, monkeypatch: Patch) -> None:
    def work(_: object) -> None:
        warnings.warn("a warning", stacklevel=1)
        for _ in progress_bar(2, "a bar", "step", over=range(2)):
            pass

    monkeypatch.setattr("textmeta.training.train", work)
    monkeypatch.setenv("RANK", rank)
    main(["train"])
    said = capsys.readouterr().err
    heard = ["a warning" in said, "a bar" in said, logging.getLogger("textmeta").isEnabledFor(logging.WARNING)]
    assert heard == [rank == "0"] * 3
    logging.getLogger("textmeta").setLevel(logging.WARNING)  # as it was
