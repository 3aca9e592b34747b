"""The recipes run end to end, on the tiny encoder."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tests.hub.server import TOKEN, HubServer
from textmeta import Corpus, FewShotClassifier
from textmeta.artifact.publish import Destination, push_folder
from textmeta.cli import parse_settings
from textmeta.errors import AdapterError, DataError, SettingsError

ROOT = Path(__file__).parents[1]
SHORT = [
    *("--training.steps=4", "--training.tasks_per_step=2", "--training.validate_every=2", "--training.warmup=1"),
    *("--training.validation_episodes=2", "--training.checkpoint_every=2", "--test_episodes=4"),
    *("--episodes.ways=3", "--episodes.shots=[1,3]", "--lora.rank=4"),
]


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(corpus: Corpus, tmp_path: Path) -> list[str]:
    """Arguments that point at the toy corpus and a split of its classes."""
    rows = [{"text": t, "label": corpus.class_names[c]} for t, c in zip(corpus.texts, corpus.labels, strict=True)]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = corpus.class_names
    split = {"train": names[:4], "valid": names[4:7], "test": names[7:]}
    (tmp_path / "toy.splits.json").write_text(json.dumps({"01": split}))
    return ["--data", str(tmp_path / "toy.jsonl"), "--splits", str(tmp_path / "toy.splits.json"), "--fold", "01"]


def meta_train(*arguments: str) -> None:
    module = recipe("meta_train")
    module.main(parse_settings(module.MetaTrainSettings, list(arguments)))


CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_meta_train(
    config: Path, tiny_model: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = [
        "--config",
        str(config),
        *data,
        "--output",
        str(output),
        "--encoder.model",
        tiny_model,
        *SHORT,
    ]
    meta_train(*arguments)
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {"5-way 1-shot", "5-way 5-shot"}
    assert {"frozen", "meta_trained", "paired"} == set(results["5-way 1-shot"])
    assert "5-way 5-shot" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in (output / "record.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    before = (output / "adapter_model.safetensors").read_bytes()
    meta_train(*arguments)  # finished: goes on from the checkpoint, to the same adapter
    assert (output / "adapter_model.safetensors").read_bytes() == before
    classifier = FewShotClassifier.from_pretrained(output)
    assert list(classifier.fit(["bal bel", "dil dol"], ["x", "y"]).predict(["bal bel"])) == ["x"]


def test_the_cards_recipe_makes_the_same_adapter_again(
    tiny_model: str, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the files lie that the card names
    first, again = tmp_path / "first", tmp_path / "again"
    config = str(ROOT / "recipes" / "configs" / "banking77_fomaml.yaml")
    meta_train("--config", config, *data, "--output", str(first), "--encoder.model", tiny_model, *SHORT)
    card = (first / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "remake.yaml").write_text(blocks[0])
    meta_train("--config", "remake.yaml", "--output", str(again), "--test_episodes=4")
    for name in ("adapter_model.safetensors", "textmeta.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


CONDITIONED = [
    *("--inner.conditioning.start=banks", "--inner.conditioning.banks=2", "--inner.conditioning.task_encoder.size=8"),
    *("--inner.conditioning.temperature=true", "--training.self_supervision.episodes=4"),
]


def test_meta_train_with_a_task_encoder(
    tiny_model: str, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*data, "--encoder.model", tiny_model, *SHORT, *CONDITIONED, "--test_shots=[2]"]
    meta_train(*arguments, "--output", "run", "--index_rows=6")
    classifier = FewShotClassifier.from_pretrained("run")
    known = classifier.known_tasks_
    assert known is not None
    split = json.loads((tmp_path / "toy.splits.json").read_text())["01"]
    assert dict(known.classes) == {"toy": tuple(split["train"])}, "of training, and of nothing else"
    (nearest,) = classifier.fit(["bal bel", "dil dol"], ["x", "y"]).nearest_tasks()
    assert nearest.corpus == "toy"

    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    (tmp_path / "remake.yaml").write_text(block)
    meta_train("--config", "remake.yaml", "--output", "again", "--test_episodes=4")
    for name in ("adapter_model.safetensors", "textmeta.safetensors", "tasks.json", "tasks.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name

    meta_train(*arguments, "--output", "run", "--index_rows=0")  # from the checkpoint, to be given away
    assert FewShotClassifier.from_pretrained("run").known_tasks_ is None
    assert not any("class0" in path.read_text("utf-8", "replace") for path in (tmp_path / "run").glob("tasks*"))


def test_meta_train_refuses_an_index_of_fewer_than_no_texts(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="index_rows must not be negative, given -1"):
        meta_train("--output", str(tmp_path), "--data", "x.jsonl", "--index_rows=-1")


def test_no_path_of_the_machine_is_pushed(hub: HubServer, tiny_model: str, data: list[str], tmp_path: Path) -> None:
    meta_train(*data, "--output", str(tmp_path / "run"), "--encoder.model", tiny_model, *SHORT)
    push_folder(tmp_path / "run", Destination("tester/run", token=TOKEN), base_model="lab/tiny")
    pushed = hub.files("tester/run")
    assert "adapter_model.safetensors" in pushed
    for path in (tmp_path, Path(tiny_model).parent):
        assert not [name for name, content in pushed.items() if str(path).encode() in content]


def test_meta_train_starts_from_an_adapter(tiny_model: str, data: list[str], tmp_path: Path) -> None:
    arguments = [*data, "--encoder.model", tiny_model, *SHORT, "--episodes.queries=2", "--test_shots=[1]"]
    meta_train(*arguments, "--output", str(tmp_path / "first"))
    arguments = [argument for argument in arguments if not argument.startswith("--lora")]
    meta_train(*arguments, "--output", str(tmp_path / "second"), "--start", str(tmp_path / "first"))
    meta = json.loads((tmp_path / "second" / "textmeta.json").read_text())
    assert meta["lora"]["rank"] == 4, "of the start, not the default"
    assert meta["record"]["start"] == {"start": "first"}
    assert "started from the adapter `first`" in (tmp_path / "second" / "README.md").read_text()


def test_meta_train_needs_something_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--data FILE"):
        meta_train("--output", str(tmp_path))


def test_meta_train_refuses_what_cannot_be_tested_before_it_trains(
    tiny_model: str, data: list[str], tmp_path: Path
) -> None:
    arguments = [*data, "--output", str(tmp_path / "run"), "--encoder.model", tiny_model, *SHORT]
    with pytest.raises(DataError, match="14 shots and 5 queries need 19"):
        meta_train(*arguments, "--test_shots=[1,14]")
    with pytest.raises(SettingsError, match="test_episodes must be at least 2"):
        meta_train(*arguments, "--test_episodes=0")
    with pytest.raises(AdapterError, match="working folder"):
        meta_train(*arguments, "--output", ".")
    assert not (tmp_path / "run").exists()


def test_meta_train_on_two_corpora_with_splits_of_their_own(
    tiny_model: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, splits = data[1], data[3]
    corpora = [
        {"dataset": file, "name": "one", "splits": splits, "fold": "01"},
        {"dataset": file, "name": "two", "split_seed": 3, "split_fractions": [0.4, 0.2, 0.4]},
    ]
    meta_train(
        f"--corpora={json.dumps(corpora)}", "--output", str(tmp_path / "run"), "--encoder.model", tiny_model, *SHORT,
        "--episodes.ways=2", "--test_ways=2",
    )  # fmt: skip
    assert "2-way 1-shot" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "textmeta.json").read_text())["record"]
    assert [c["name"] for c in record["settings"]["train"]["corpora"]] == ["one", "two"]


def test_meta_train_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: nowhere\.jsonl"):
        meta_train("--output", str(tmp_path), "--data", "nowhere.jsonl")


def test_demo(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = recipe("demo")
    arguments = ["--output", str(tmp_path), "--encoder.model", tiny_model]
    arguments += ["--training.steps=2", "--training.validation_episodes=2", "--test_episodes=3"]
    module.main(parse_settings(module.DemoSettings, arguments))
    printed = capsys.readouterr().out
    assert "unseen domains, 5-way 5-shot" in printed
    assert "'flat tyre, halfway up the hill' →" in printed
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| everyday | training | 1408 | 64 | cc0-1.0 |" in card
    assert "How to remake it" not in card, "meta_train cannot make it"


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tiny_model: str, data: list[str], tmp_path: Path) -> None:
    config = str(ROOT / "recipes" / "configs" / "banking77_fomaml.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for processes, precision in ((1, "no"), (2, "no"), (2, "bf16")):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", precision, "--dynamo_backend", "no"]
        command += [str(ROOT / "recipes" / "meta_train.py"), "--config", config, *data, "--encoder.model", tiny_model]
        command += ["--output", str(tmp_path / f"{processes}-{precision}"), *SHORT]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("5-way 5-shot") == 1  # one process prints and saves
    one, two, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("1-no", "2-no", "2-bf16"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
        assert half[name].dtype == torch.float32
