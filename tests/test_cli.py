import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest

from tests.artifact.test_card import record
from tests.artifact.test_store import CONDITIONED, save_conditioned
from tests.hub.server import TOKEN, HubServer
from textmeta import FewShotClassifier
from textmeta.artifact.card import is_edited
from textmeta.artifact.store import load_adapter, save_adapter
from textmeta.cli import main, parse_settings
from textmeta.data.class_splits import read_class_split
from textmeta.data.corpus import CorpusSettings
from textmeta.errors import SettingsError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_meta_train", ROOT / "recipes" / "meta_train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def adapter(encoder: Encoder, tmp_path: Path) -> Path:
    inner = InnerLoopSettings(steps=2)
    classifier = FewShotClassifier(encoder, start_parameters(encoder.factor_shapes, inner, encoder.hidden_size), inner)
    classifier.fit(["bal bel", "dal del"], ["b", "d"]).save_pretrained(tmp_path / "adapter", include_support=True)
    return tmp_path / "adapter"


def test_info_tells_of_task_encoder_and_index(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path
) -> None:
    encoder, parameters = save_conditioned(tmp_path / "conditioned", tiny_model)
    main(["info", str(tmp_path / "conditioned")])
    shown = capsys.readouterr().out
    assert re.search(
        r"^task encoder +graph, embeddings of 8 numbers; LoRA starts from 3 banks; each task has", shown, re.M
    )
    assert re.search(r"^known tasks +.*by name, readable by anybody: größe: 2, a/b: 1$", shown, re.M)
    save_adapter(tmp_path / "conditioned", encoder, parameters, CONDITIONED, {})
    main(["info", str(tmp_path / "conditioned")])
    assert re.search(r"^known tasks +no index of them$", capsys.readouterr().out, re.M)
    main(["info", str(adapter)])
    assert "task" not in capsys.readouterr().out.replace(str(adapter), "")


def test_push_pull_and_info(
    hub: HubServer, adapter: Path, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo("lab/tiny", {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
    main(["push", str(adapter), "tester/mine", "--token", TOKEN, "--base_model", "lab/tiny", "--message", "hello"])
    assert capsys.readouterr().out.startswith(f"{hub.url}/tester/mine/commit/")
    main(["pull", "tester/mine", "--folder", str(tmp_path / "pulled")])
    assert capsys.readouterr().out == f"{tmp_path / 'pulled'}\n"
    card = (tmp_path / "pulled" / "README.md").read_text(encoding="utf-8")
    assert (
        card.count('"path/to/this/folder"')
        == hub.files("tester/mine")["README.md"].decode().count('"tester/mine"')
        == 2
    )
    assert not is_edited(card)
    loaded = FewShotClassifier.from_pretrained(tmp_path / "pulled")
    assert list(loaded.predict(["bal"])) == ["b"]
    for name in ("tester/mine", str(tmp_path / "pulled")):
        main(["info", name])
        printed = capsys.readouterr().out
        for part in ("fitted classifier", "whole +yes", "lab/tiny", "2: b, d", "2 stored, readable by anybody"):
            assert re.search(part, printed), part


def test_info_tells_what_it_was_trained_on(
    encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = InnerLoopSettings(steps=2)
    save_adapter(
        tmp_path / "adapter",
        encoder,
        start_parameters(encoder.factor_shapes, inner, encoder.hidden_size),
        inner,
        record(),
    )
    main(["info", str(tmp_path / "adapter")])
    printed = capsys.readouterr().out
    assert "fomaml, 1200 episodes" in printed
    assert "intents: 200 texts, 20 classes, cc-by-4.0" in printed
    assert "mine: 70 texts, 7 classes, licence not known" in printed
    assert "5-way 1-shot: 85.27 → 87.36 [+1.62, +2.56]" in printed


@pytest.mark.parametrize("command", [["info"], ["push", "owner/name"]], ids=["info", "push"])
def test_damaged_adapter_ends_the_command_with_a_message(adapter: Path, command: list[str]) -> None:
    os.truncate(adapter / "adapter_model.safetensors", 100)
    with pytest.raises(SystemExit, match=r"DamagedAdapterError: .*adapter_model\.safetensors is damaged"):
        main([command[0], str(adapter), *command[1:]])


def test_pull_into_a_place_that_cannot_be_replaced_is_refused_before_the_download(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="working folder"):
        main(["pull", "tester/mine", "--folder", "."])
    assert not hub.requests


def test_pull_asks_the_hub_whatever_is_called_so_here(
    hub: HubServer, adapter: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for revision in ("main", "v2"):
        main(
            ["push", str(adapter), "tester/mine", "--token", TOKEN, "--base_model", "lab/tiny", "--revision", revision]
        )
    main(["pull", "tester/mine", "--folder", "tester/mine"])
    (tmp_path / "tester" / "mine" / "adapter_config.json").write_text("damaged")
    main(["pull", "tester/mine", "--folder", "tester/mine", "--revision", "v2"])
    load_adapter(tmp_path / "tester" / "mine")


def test_pull_of_an_adapter_that_names_a_folder_as_its_encoder_is_refused(
    hub: HubServer, adapter: Path, tmp_path: Path
) -> None:
    hub.add_repo("lab/evil", {path.name: path.read_bytes() for path in adapter.iterdir()})
    with pytest.raises(SystemExit, match="no folder of this machine is opened"):
        main(["pull", "lab/evil", "--folder", str(tmp_path / "pulled")])
    assert not (tmp_path / "pulled").exists()


def test_info_shows_nothing_that_a_terminal_acts_on(
    encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = InnerLoopSettings(steps=2)
    classifier = FewShotClassifier(encoder, start_parameters(encoder.factor_shapes, inner, encoder.hidden_size), inner)
    classifier.fit(["bal bel", "dal del"], ["a\x1b[2Jb", "c\nwhole  no"]).save_pretrained(tmp_path / "adapter")
    main(["info", str(tmp_path / "adapter")])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\nwhole  no" not in printed


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="textmeta")
    assert command.load() is main


def write_config(folder: Path, text: str) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def test_defaults_are_those_of_the_dataclass(recipe: ModuleType) -> None:
    assert parse_settings(recipe.MetaTrainSettings, ["--output", "run"]) == recipe.MetaTrainSettings(Path("run"))


def test_values_of_a_config_file_arrive_with_their_types(recipe: ModuleType, tmp_path: Path) -> None:
    config = """
output: run
fold: "01"
test_shots: [2, 3]
corpora:
  - dataset: first.csv
    label_column: intent
  - dataset: owner/second
    config: en
lora:
  targets: [query]
episodes:
  ways: [2, 7]
  shots: 3
inner:
  adapt: [offset]
training:
  steps: 7
"""
    settings = parse_settings(recipe.MetaTrainSettings, write_config(tmp_path, config))
    assert settings.output == Path("run")
    assert settings.fold == "01"
    assert settings.test_shots == [2, 3]
    assert settings.corpora == [
        CorpusSettings("first.csv", label_column="intent"),
        CorpusSettings("owner/second", config="en"),
    ]
    assert settings.lora.targets == ("query",)
    assert settings.episodes.ways == (2, 7)
    assert settings.episodes.shots == 3
    assert settings.inner.adapt == ("offset",)
    assert settings.training.steps == 7


def test_command_line_after_the_config_overrides_it(recipe: ModuleType, tmp_path: Path) -> None:
    arguments = write_config(tmp_path, "output: run\ntraining:\n  steps: 4\n  seed: 5\n")
    settings = parse_settings(recipe.MetaTrainSettings, [*arguments, "--training.steps", "9"])
    assert (settings.training.steps, settings.training.seed) == (9, 5)


def test_config_after_the_command_line_overrides_it(recipe: ModuleType, tmp_path: Path) -> None:
    arguments = write_config(tmp_path, "output: run\ntraining:\n  steps: 4\n")
    settings = parse_settings(recipe.MetaTrainSettings, ["--training.steps", "9", "--training.seed", "5", *arguments])
    assert (settings.training.steps, settings.training.seed) == (4, 5)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--outptu", "output"),
        ("--tetst_shots", "test_shots"),
        ("--trainin.steps", "training.steps"),
        ("--training.steps_", "training.steps"),
        ("--training.stpes", "training.steps"),
        ("--seed", "training.seed"),
    ],
)
def test_unknown_option_names_the_nearest(recipe: ModuleType, option: str, nearest: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(recipe.MetaTrainSettings, ["--output", "run", option, "5"])
    assert f"'{option[2:]}' is not a setting; the nearest is '{nearest}'" in str(caught.value)


def test_abbreviated_option_is_unknown(recipe: ModuleType) -> None:
    # a prefix that is accepted today becomes ambiguous, or another setting, when a setting is added
    with pytest.raises(SettingsError, match=r"the nearest is 'training\.steps'"):
        parse_settings(recipe.MetaTrainSettings, ["--output", "run", "--training.step", "5"])


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("outptu: run\n", "outptu", "output"),
        ("trainign:\n  steps: 4\n", "trainign.steps", "training.steps"),
        ("training:\n  step: 4\n", "training.step", "training.steps"),
        ("corpora:\n  - dataset: a\n    label_colum: b\n", "label_colum", "corpora.label_column"),
        ("corpora:\n  - dataset: a\n  - datset: b\n", "datset", "corpora.dataset"),
    ],
    ids=["top level", "group", "nested", "in a list", "in the second of a list"],
)
def test_unknown_name_in_a_config_names_the_nearest(
    recipe: ModuleType, tmp_path: Path, text: str, unknown: str, nearest: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(recipe.MetaTrainSettings, [*write_config(tmp_path, text), "--output", "run"])
    assert f"'{unknown}' is not a setting; the nearest is '{nearest}'" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--training.steps", "many"), ("--training.steps", "4.5"), ("--cpu", "perhaps"), ("--precision", "fp16")],
)
def test_value_of_a_wrong_type_is_named(recipe: ModuleType, option: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(recipe.MetaTrainSettings, ["--output", "run", option, value])
    assert option[2:] in str(caught.value)
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("training:\n  steps: many\n", "training.steps"),
        ("fold: 01\n", "fold"),  # YAML reads the number 1
        ("corpora:\n  - dataset: a\n    label_column: 3\n", "label_column"),
    ],
)
def test_value_of_a_wrong_type_in_a_config_is_named(recipe: ModuleType, tmp_path: Path, text: str, name: str) -> None:
    with pytest.raises(SettingsError, match=f'"{name}"'):
        parse_settings(recipe.MetaTrainSettings, [*write_config(tmp_path, text), "--output", "run"])


def test_value_out_of_range_is_named(recipe: ModuleType) -> None:
    with pytest.raises(SettingsError, match="training steps must be at least 1, given 0"):
        parse_settings(recipe.MetaTrainSettings, ["--output", "run", "--training.steps", "0"])


def test_missing_required_setting_is_named(recipe: ModuleType) -> None:
    with pytest.raises(SettingsError, match="output"):
        parse_settings(recipe.MetaTrainSettings, [])


def test_missing_config_file_is_named(recipe: ModuleType) -> None:
    with pytest.raises(SettingsError, match=r"no-such\.yaml"):
        parse_settings(recipe.MetaTrainSettings, ["--config", "no-such.yaml", "--output", "run"])


@pytest.mark.parametrize("text", ["output: [run\n", "- a\n- b\n"], ids=["no YAML", "no mapping"])
def test_malformed_config_is_an_error(recipe: ModuleType, tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError):
        parse_settings(recipe.MetaTrainSettings, write_config(tmp_path, text))


def test_there_are_shipped_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_parses_and_its_split_exists(recipe: ModuleType, path: Path) -> None:
    settings = parse_settings(recipe.MetaTrainSettings, ["--config", str(path), "--output", "run"])
    assert settings.corpora
    assert settings.corpora[0].dataset
    if settings.splits is not None:
        assert read_class_split(ROOT / settings.splits, settings.fold).train


def test_names_may_have_hyphens_and_truth_may_go_unsaid() -> None:
    @dataclass(frozen=True)
    class Settings:
        data_dir: str = ""
        quick: bool = False
        steps: int = 3

    assert parse_settings(Settings, ["--data-dir", "a-b", "--quick"]) == Settings("a-b", quick=True)
    assert parse_settings(Settings, ["--quick", "--data-dir=a-b=c"]) == Settings("a-b=c", quick=True)
    assert parse_settings(Settings, ["--quick", "false"]) == Settings()
    with pytest.raises(SettingsError, match="steps"):
        parse_settings(Settings, ["--steps"])
