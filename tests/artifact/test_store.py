import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from textmeta import FewShotClassifier
from textmeta.artifact.adapter import FittedHead
from textmeta.artifact.folder import MANIFEST
from textmeta.artifact.store import FORMAT_VERSION, load_adapter, save_adapter
from textmeta.errors import AdapterError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import Parameters, lora_factors
from textmeta.model.lora import LoraSettings
from textmeta.model.task_encoder import TaskEncoderSettings
from textmeta.tasks import KnownTasks, TaskEmbedding

INNER = InnerLoopSettings(steps=2, adapt=("lora_A", "offset"), lora_step_size=0.02)
TASK_ENCODER = TaskEncoderSettings("graph", size=8, width=12, label_names=True)
CONDITIONED = replace(
    INNER, conditioning=ConditioningSettings("banks", banks=3, groups=2, temperature=True, task_encoder=TASK_ENCODER)
)
RECORD = {"episodes": 40, "settings": {"training": {"algorithm": "fomaml"}}, "größe": [1, 2.5, None, True]}
LISTED = ["adapter_config.json", "adapter_model.safetensors", "textmeta.json", "textmeta.safetensors"]
FITTED = ["classifier.json", "classifier.safetensors"]
INDEX = ["tasks.json", "tasks.safetensors"]
ONE_FACTOR = "base_model.model.encoder.layer.3.attention.self.value.lora_B.weight"
TEXTS = ["bal bel", "fim fon gur dal kes", "bal", "kut kut dal fim bel bol bun bam ban"]


def make_encoder(model: str) -> Encoder:
    return Encoder(EncoderSettings(model, max_length=32), LoraSettings(rank=4))


def random_parameters(encoder: Encoder, seed: int = 0, inner: InnerLoopSettings = INNER) -> Parameters:
    """Return parameters none of which is at its start: B is not zero, each step size is its own."""
    generator = torch.Generator().manual_seed(seed)
    start = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size, seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in start.items()}


def save(folder: Path, model: str) -> tuple[Encoder, Parameters]:
    encoder = make_encoder(model)
    parameters = random_parameters(encoder)
    factors = {name: value + 1 for name, value in lora_factors(parameters).items()}
    fitted = FittedHead(factors, torch.arange(64.0).view(2, 32), ["a", "b"], temperature=torch.tensor(7.1))
    save_adapter(folder, encoder, parameters, INNER, RECORD, fitted)
    return encoder, parameters


def unit(rows: int, seed: int = 0, size: int = 32) -> np.ndarray:
    """Return random float32 rows of length 1."""
    rows_ = np.random.default_rng(seed).normal(size=(rows, size)).astype(np.float32)
    return rows_ / np.linalg.norm(rows_, axis=1, keepdims=True)


def known_tasks() -> KnownTasks:
    """Return an index of two corpora."""
    return KnownTasks({"größe": ("klein", "groß"), "a/b": ("klein",)}, {"größe": unit(2), "a/b": unit(1, seed=1)})


def save_conditioned(folder: Path, model: str) -> tuple[Encoder, Parameters]:
    """Save a fitted classifier with a task encoder, a memory and an index."""
    encoder = make_encoder(model)
    parameters = random_parameters(encoder, inner=CONDITIONED)
    task = TaskEmbedding(unit(1, seed=2, size=8)[0], unit(2, seed=3), ("a", "b"))
    factors, weights = lora_factors(parameters), torch.arange(64.0).view(2, 32)
    fitted = FittedHead(factors, weights, ["a", "b"], temperature=torch.tensor(7.1), task=task)
    save_adapter(folder, encoder, parameters, CONDITIONED, RECORD, fitted, known_tasks())
    return encoder, parameters


@pytest.fixture(scope="module")
def saved(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoder, Parameters]:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    return folder, *save(folder, tiny_model)


@pytest.fixture
def folder(saved: tuple[Path, Encoder, Parameters], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "adapter"))


@pytest.fixture(scope="module")
def saved_conditioned(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoder, Parameters]:
    folder = tmp_path_factory.mktemp("conditioned") / "adapter"
    return folder, *save_conditioned(folder, tiny_model)


@pytest.fixture
def conditioned(saved_conditioned: tuple[Path, Encoder, Parameters], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved_conditioned[0], tmp_path / "conditioned"))


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and its hash: what a writer with a fault would write."""
    (folder / name).write_bytes(content)
    lines = (folder / MANIFEST).read_text().splitlines()
    changed = [
        f"{hashlib.sha256(content).hexdigest()}  {name}" if line.endswith(f"  {name}") else line for line in lines
    ]
    assert changed != lines
    (folder / MANIFEST).write_text("\n".join(changed) + "\n")


def rewrite_tensors(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    rewrite(folder, name, save_tensors(tensors, metadata={"format": "pt"}))


def rewrite_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    rewrite(folder, name, json.dumps(content).encode())


def refused(folder: Path, *, naming: str) -> str:
    with pytest.raises(AdapterError, match=re.escape(naming)) as caught:
        load_adapter(folder)
    return str(caught.value)


def test_parameters_come_back_to_the_bit(saved: tuple[Path, Encoder, Parameters]) -> None:
    folder, _, parameters = saved
    found = load_adapter(folder).parameters
    assert found.keys() == parameters.keys()
    for name, value in parameters.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == torch.float32


def test_settings_and_record_come_back(saved: tuple[Path, Encoder, Parameters]) -> None:
    folder, encoder, _ = saved
    adapter = load_adapter(folder)
    assert adapter.inner == INNER
    assert adapter.encoder == encoder.settings
    assert adapter.lora == encoder.lora
    assert adapter.weights_sha256 == encoder.weights_sha256
    assert adapter.record == RECORD


def test_settings_that_are_not_the_defaults_come_back(tiny_model: str, tmp_path: Path) -> None:
    settings = EncoderSettings(tiny_model, pooling="cls", max_length=16)
    encoder = Encoder(settings, LoraSettings(layers=1, rank=2, alpha=3, targets=("attention.self.key",)))
    save_adapter(tmp_path / "adapter", encoder, random_parameters(encoder), INNER, {})
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.encoder == settings
    assert adapter.lora == encoder.lora
    assert adapter.load_encoder().factor_shapes == encoder.factor_shapes


def test_fitted_head_comes_back(saved: tuple[Path, Encoder, Parameters]) -> None:
    folder, _, parameters = saved
    fitted = load_adapter(folder).fitted
    assert fitted is not None
    assert fitted.classes == ["a", "b"]
    assert torch.equal(fitted.weights, torch.arange(64.0).view(2, 32))
    assert fitted.temperature is not None
    assert torch.equal(fitted.temperature, torch.tensor(7.1))
    assert fitted.task is None
    assert fitted.factors.keys() == lora_factors(parameters).keys()
    for name, value in lora_factors(parameters).items():
        assert torch.equal(fitted.factors[name], value + 1)


def test_conditioned_adapter_comes_back_to_the_bit(saved_conditioned: tuple[Path, Encoder, Parameters]) -> None:
    folder, _, parameters = saved_conditioned
    adapter = load_adapter(folder)
    assert adapter.inner == CONDITIONED
    assert adapter.parameters.keys() == parameters.keys()
    assert {"task_encoder.centre", "memory.keys", "task_temperature"} <= parameters.keys()
    assert all(torch.equal(adapter.parameters[name], value) for name, value in parameters.items())
    known, expected = adapter.known_tasks, known_tasks()
    assert known is not None
    assert list(known.classes.items()) == list(expected.classes.items()), "in the order of training"
    assert all(np.array_equal(known.vectors[name], value) for name, value in expected.vectors.items())
    fitted = adapter.fitted
    assert fitted is not None
    assert fitted.task is not None
    assert fitted.task.labels == ("a", "b")
    assert np.array_equal(fitted.task.vector, unit(1, seed=2, size=8)[0])
    assert np.array_equal(fitted.task.classes, unit(2, seed=3))


def test_conditioned_adapter_holds_the_documented_files_alone(conditioned: Path) -> None:
    assert sorted(contents(conditioned)) == sorted([*LISTED, *FITTED, *INDEX, "README.md", MANIFEST])
    assert set(json.loads((conditioned / "tasks.json").read_text())) == {"corpora"}


@pytest.mark.parametrize("start", ["none", "gates", "banks"])
@pytest.mark.parametrize("kind", ["statistics", "set_transformer", "graph"])
@pytest.mark.parametrize("temperature", [True, False])
def test_every_conditioning_comes_back(
    saved: tuple[Path, Encoder, Parameters], tmp_path: Path, start: Any, kind: Any, temperature: bool
) -> None:
    encoder = saved[1]
    settings = ConditioningSettings(start, 2, 3, temperature, TaskEncoderSettings(kind, size=8, width=8))
    inner = replace(INNER, conditioning=settings)
    parameters = random_parameters(encoder, inner=inner)
    save_adapter(tmp_path / "adapter", encoder, parameters, inner, {})
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.inner == inner
    assert adapter.known_tasks is None
    assert all(torch.equal(adapter.parameters[name], value) for name, value in parameters.items())


def test_index_goes_when_it_is_saved_without(conditioned: Path, tiny_model: str) -> None:
    encoder = make_encoder(tiny_model)
    save_adapter(conditioned, encoder, random_parameters(encoder, inner=CONDITIONED), CONDITIONED, {})
    assert not set(INDEX) & contents(conditioned).keys()
    assert load_adapter(conditioned).known_tasks is None


def changed(classes: Any = None, vectors: Any = None) -> KnownTasks:
    return KnownTasks(
        {"one": ("a", "b")} if classes is None else classes, {"one": unit(2) if vectors is None else vectors}
    )


@pytest.mark.parametrize(
    ("inner", "known", "message"),
    [
        (INNER, known_tasks(), "no task encoder"),
        (CONDITIONED, changed(classes={}), "no corpus"),
        (CONDITIONED, changed(classes={"one": ("a", "a")}), "a class is given twice"),
        (CONDITIONED, changed(classes={"one": ("a", "")}), "names of one character or more"),
        (CONDITIONED, changed(classes={"one": ("a", 3)}), "names of one character or more"),
        (CONDITIONED, changed(vectors=unit(3)), r"shape \(3, 32\), expected \(2, 32\)"),
        (CONDITIONED, changed(vectors=unit(2, size=9)), r"shape \(2, 9\), expected \(2, 32\)"),
        (CONDITIONED, changed(vectors=2 * unit(2)), "of length 1"),
        (CONDITIONED, changed(vectors=np.nan * unit(2)), "of length 1"),
    ],
)
def test_index_that_would_be_refused_afterwards_is_refused_before(
    saved: tuple[Path, Encoder, Parameters], tmp_path: Path, inner: InnerLoopSettings, known: KnownTasks, message: str
) -> None:
    encoder = saved[1]
    parameters = random_parameters(encoder, inner=inner)
    with pytest.raises(AdapterError, match=f"not saved: the index of training tasks.*{message}"):
        save_adapter(tmp_path / "adapter", encoder, parameters, inner, {}, known_tasks=known)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", INDEX)
def test_half_an_index_is_refused(conditioned: Path, name: str) -> None:
    (conditioned / name).unlink()
    lines = (conditioned / MANIFEST).read_text().splitlines(keepends=True)
    (conditioned / MANIFEST).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    refused(conditioned, naming=f"half an index of training tasks: it has no {name}")


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"banks": 0}, "inner.conditioning.banks"),
        ({"banks": "3"}, "inner.conditioning.banks"),
        ({"surprise": 1}, "inner.conditioning.surprise"),
        ({"task_encoder": {"kind": "graph", "size": 8.0}}, "inner.conditioning.task_encoder.size"),
        ({"task_encoder": {"size": 10**9}}, "inner.conditioning.task_encoder.size"),
        ({"task_encoder": {"surprise": 1}}, "inner.conditioning.task_encoder.surprise"),
        ({"task_encoder": None}, "inner.conditioning.task_encoder"),
    ],
)
def test_nested_setting_is_named_in_full(conditioned: Path, change: dict[str, Any], setting: str) -> None:
    rewrite_json(conditioned, "textmeta.json", lambda meta: meta["inner"]["conditioning"].update(change))
    assert re.search(rf"{re.escape(setting)}\b", refused(conditioned, naming="textmeta.json"))


def test_task_encoder_for_other_features_is_refused(tiny_model: str, tmp_path: Path) -> None:
    encoder, folder = make_encoder(tiny_model), tmp_path / "adapter"  # no index, which would be found out first
    save_adapter(folder, encoder, random_parameters(encoder, inner=CONDITIONED), CONDITIONED, RECORD)
    wide = {"task_encoder.centre": (31,), "task_encoder.class": (8, 31)}
    wide |= {f"task_encoder.{name}": (12, 31) for name in ("prototype", "spread", "name")}
    change = {name: torch.ones(shape) for name, shape in wide.items()}
    rewrite_tensors(folder, "textmeta.safetensors", lambda tensors: tensors.update(change))
    with pytest.raises(AdapterError, match=r"task encoder takes features of 31 numbers, but those of .* have 32"):
        load_adapter(folder).load_encoder()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", torch.tensor(0.0)),
        ("temperature", torch.tensor(-1.0)),
        ("temperature", torch.ones(1)),
        ("task_vector", torch.ones(8)),
        ("task_vector", torch.from_numpy(unit(1, size=8))),
        ("task_classes", torch.from_numpy(unit(3))),
        ("task_classes", torch.zeros(2, 8)),
    ],
)
def test_task_of_a_fitted_head_must_be_what_the_encoder_makes(conditioned: Path, name: str, value: Tensor) -> None:
    rewrite_tensors(conditioned, "classifier.safetensors", lambda tensors: tensors.update({name: value}))
    assert f"classifier.safetensors: {name} must" in refused(conditioned, naming="classifier.safetensors")


def test_task_of_a_fitted_head_needs_a_task_encoder(folder: Path) -> None:
    change = {"task_vector": torch.from_numpy(unit(1, size=8)[0])}
    rewrite_tensors(folder, "classifier.safetensors", lambda tensors: tensors.update(change))
    refused(folder, naming="classifier.safetensors")


def test_no_fitted_head_where_none_was_saved(tiny_model: str, tmp_path: Path) -> None:
    encoder, parameters = save(tmp_path / "adapter", tiny_model)
    save_adapter(tmp_path / "adapter", encoder, parameters, INNER, RECORD)
    assert load_adapter(tmp_path / "adapter").fitted is None
    assert not list((tmp_path / "adapter").glob("classifier*"))


def test_parameters_in_training_can_be_saved(saved: tuple[Path, Encoder, Parameters], tmp_path: Path) -> None:
    _, encoder, parameters = saved
    learned = {name: value.double().t() if value.ndim == 2 else value.double() for name, value in parameters.items()}
    learned = {name: (value.t() if value.ndim == 2 else value).requires_grad_() for name, value in learned.items()}
    save_adapter(tmp_path / "adapter", encoder, learned, INNER, {})
    found = load_adapter(tmp_path / "adapter").parameters
    assert all(torch.equal(found[name], value) for name, value in parameters.items())
    assert not any(value.requires_grad for value in found.values())


def test_encoder_of_the_adapter_makes_the_same_features(saved: tuple[Path, Encoder, Parameters]) -> None:
    folder, encoder, parameters = saved
    adapter = load_adapter(folder)
    loaded = adapter.load_encoder()
    expected = encoder.features(encoder.prepare(TEXTS), lora_factors(parameters))
    assert torch.equal(loaded.features(loaded.prepare(TEXTS), lora_factors(adapter.parameters)), expected)


def test_two_saves_are_equal_to_the_byte(folder: Path, tiny_model: str, tmp_path: Path) -> None:
    save(tmp_path / "again", tiny_model)
    assert contents(tmp_path / "again") == contents(folder)


def test_save_in_another_process_is_equal_to_the_byte(folder: Path, tiny_model: str, tmp_path: Path) -> None:
    # another seed than this process's: sets have another order; as many threads: sums have the same
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "again"), tiny_model]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    assert contents(tmp_path / "again") == contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_holds_the_documented_files_alone(folder: Path) -> None:
    assert sorted(contents(folder)) == sorted([*LISTED, *FITTED, "README.md", MANIFEST])


def test_nothing_of_the_machine_is_stored(saved: tuple[Path, Encoder, Parameters]) -> None:
    folder = saved[0]
    assert b"cache_mb" not in (folder / "textmeta.json").read_bytes()
    assert all(str(folder.parent).encode() not in content for content in contents(folder).values())


def test_peft_alone_makes_the_same_features(saved: tuple[Path, Encoder, Parameters], tiny_model: str) -> None:
    folder, encoder, parameters = saved
    expected = encoder.features(encoder.prepare(TEXTS), lora_factors(parameters))

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), folder).eval()
    batch = AutoTokenizer.from_pretrained(tiny_model)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
        unadapted = AutoModel.from_pretrained(tiny_model).eval()(**batch).last_hidden_state

    def pool(states: Tensor) -> Tensor:
        mask = batch["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    assert torch.allclose(pool(hidden), expected, atol=1e-5)
    # and the factors matter: without them the features are others
    assert not torch.allclose(pool(unadapted), expected, atol=1e-2)


def test_card_of_somebodys_own_is_kept_beside_the_new_one(tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "README.md").write_text("my project")
    save(folder, tiny_model)
    assert (folder / "README.old.md").read_text() == "my project"
    (folder / "README.old.md").unlink()
    save(folder, tiny_model)
    assert not (folder / "README.old.md").exists(), "textmeta's own is replaced"
    written = (folder / "README.md").read_text()
    (folder / "README.md").write_text(written.replace("# Fitted", "# My own"))
    save(folder, tiny_model)
    assert "# My own" in (folder / "README.old.md").read_text()
    assert (folder / "README.md").read_text() == written


def test_folder_that_would_be_refused_afterwards_is_refused_before(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "run.py").write_text("print()")
    with pytest.raises(AdapterError, match=r"run\.py is of a kind that can run code"):
        save(tmp_path / "adapter", tiny_model)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["run.py"]


@pytest.mark.parametrize("name", ["textmeta.json", "classifier.json"])
def test_unknown_member_is_refused(folder: Path, name: str) -> None:
    rewrite_json(folder, name, lambda content: content.update(surprise=1))
    assert "unexpected 'surprise'" in refused(folder, naming=name)


def test_newer_format_with_other_files_is_called_that_and_not_damaged(folder: Path) -> None:
    rewrite_json(folder, "textmeta.json", lambda meta: meta.update(format_version=FORMAT_VERSION + 1))
    with (folder / MANIFEST).open("a") as manifest:
        manifest.write(f"{'0' * 64}  zbank.safetensors\n")
    assert "made by another version of textmeta: train it again" in refused(folder, naming="textmeta.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("commit", "../../models--lab--evil/blobs/abc"),
        ("commit", "main"),
        ("weights_sha256", "12"),
        ("revision", "../x"),
        ("revision", "/etc"),
    ],
)
def test_names_of_the_encoders_version_cannot_be_paths(folder: Path, key: str, value: str) -> None:
    rewrite_json(folder, "textmeta.json", lambda meta: meta["encoder"].update({key: value}))
    assert key in refused(folder, naming="textmeta.json")


def copy_of(tiny_model: str, to: Path, change: Callable[[Path], object]) -> str:
    shutil.copytree(tiny_model, to)
    change(to)
    return str(to)


def swap_words(folder: Path) -> None:
    """Give two words of the tokenizer each other's number, as an attack or a careless update would."""
    content = json.loads((folder / "tokenizer.json").read_text())
    numbers = content["model"]["vocab"]
    numbers["[CLS]"], numbers["[UNK]"] = numbers["[UNK]"], numbers["[CLS]"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def change_config(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "hidden_act": "relu"}))


@pytest.mark.parametrize("change", [swap_words, change_config])
def test_encoder_with_the_same_weights_and_other_features_is_refused(
    folder: Path, tiny_model: str, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    other = copy_of(tiny_model, tmp_path / "other", change)
    with pytest.raises(AdapterError, match=r"has the adapter's weights, but makes other features"):
        load_adapter(folder).load_encoder(model=other)


def test_loaded_and_saved_again_is_the_same_to_the_byte(
    folder: Path, conditioned: Path, tiny_model: str, tmp_path: Path
) -> None:
    elsewhere = copy_of(tiny_model, tmp_path / "elsewhere", lambda _: None)
    for given in (folder, conditioned):
        for encoder in (None, elsewhere):
            FewShotClassifier.from_pretrained(given, encoder=encoder).save_pretrained(tmp_path / "again")
            assert contents(tmp_path / "again") == contents(given), "wherever its encoder was loaded from"


def test_encoder_in_a_relative_folder_is_remembered_as_a_folder(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(tiny_model, tmp_path / "models" / "tiny", lambda _: None)
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "adapter", "models/tiny")
    monkeypatch.chdir("/")
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.encoder.model == str(tmp_path / "models" / "tiny")
    adapter.load_encoder()


def test_user_file_in_the_folder_is_fine(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    load_adapter(folder)


@pytest.mark.parametrize("name", [*LISTED, *FITTED, *INDEX])
def test_flipped_byte_is_found(conditioned: Path, name: str) -> None:
    content = bytearray((conditioned / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (conditioned / name).write_bytes(content)
    refused(conditioned, naming=f"{name} is damaged")


@pytest.mark.parametrize("name", [*LISTED, *FITTED, *INDEX])
def test_missing_file_is_found(conditioned: Path, name: str) -> None:
    (conditioned / name).unlink()
    refused(conditioned, naming=f"lacks the file {name}")


@pytest.mark.parametrize("name", [*LISTED, *FITTED, *INDEX])
def test_truncated_file_is_found(conditioned: Path, name: str) -> None:
    os.truncate(conditioned / name, (conditioned / name).stat().st_size // 2)
    refused(conditioned, naming=f"{name} is damaged")


@pytest.mark.parametrize("name", [*LISTED[1:], "classifier.safetensors"])
def test_file_that_the_manifest_never_listed_is_missed(folder: Path, name: str) -> None:
    (folder / name).unlink()
    lines = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    refused(folder, naming=f"it has no {name}")


def test_manifest_damage_is_found(folder: Path) -> None:
    content = bytearray((folder / MANIFEST).read_bytes())
    content[3] ^= 1
    (folder / MANIFEST).write_bytes(content)
    refused(folder, naming=MANIFEST)


def test_missing_manifest_is_found(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    refused(folder, naming=f"it has no {MANIFEST}")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", naming="nowhere")


def test_manifest_that_points_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder.parent / "x").write_bytes(b"outside")
    with (folder / MANIFEST).open("a") as manifest:
        manifest.write(f"{hashlib.sha256(b'outside').hexdigest()}  ../x\n")
    refused(folder, naming="../x")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "textmeta.safetensors", "classifier.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite_is_found(folder: Path, name: str, value: float) -> None:
    rewrite_tensors(folder, name, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(value))
    assert "not finite" in refused(folder, naming=name)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "textmeta.safetensors", "classifier.safetensors"])
def test_wrong_type_of_numbers_is_found(folder: Path, name: str) -> None:
    rewrite_tensors(folder, name, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    assert "torch.float16, expected torch.float32" in refused(folder, naming=name)


def test_wrong_shape_of_a_factor_is_found(folder: Path) -> None:
    # classifier.* go first: they are checked against the factors
    for name in FITTED:
        (folder / name).unlink()
    lines = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(line for line in lines if "classifier" not in line))
    rewrite_tensors(
        folder, "adapter_model.safetensors", lambda tensors: tensors.update({ONE_FACTOR: torch.ones(32, 3)})
    )
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: .*lora_B.*\(32, 3\), expected .* rank 4"):
        load_adapter(folder).load_encoder()


def test_missing_factor_is_found(folder: Path) -> None:
    rewrite_tensors(folder, "adapter_model.safetensors", lambda tensors: tensors.pop(ONE_FACTOR))
    with pytest.raises(AdapterError, match=r"\.safetensors"):
        load_adapter(folder).load_encoder()


@pytest.mark.parametrize("change", [{"log_temperature": torch.ones(2)}, {"log_step_size.lora": torch.zeros(3)}])
def test_wrong_shape_of_a_scalar_is_found(folder: Path, change: dict[str, Tensor]) -> None:
    rewrite_tensors(folder, "textmeta.safetensors", lambda tensors: tensors.update(change))
    assert next(iter(change)) in refused(folder, naming="textmeta.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "textmeta.safetensors", "classifier.safetensors"])
def test_unexpected_tensor_is_found(folder: Path, name: str) -> None:
    rewrite_tensors(folder, name, lambda tensors: tensors.update(surprise=torch.zeros(1)))
    refused(folder, naming=name)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        *(
            ("textmeta.safetensors", name)
            for name in (
                *("log_temperature", "log_name_weight", "temperature_slopes", "evidence_slopes", "strength_prior"),
                "probe",
            )
        ),
        ("classifier.safetensors", "temperature"),
        ("classifier.safetensors", "weights"),
    ],
)
def test_missing_tensor_is_found(folder: Path, file: str, name: str) -> None:
    rewrite_tensors(folder, file, lambda tensors: tensors.pop(name))
    assert name in refused(folder, naming=file)


def test_file_that_is_no_safetensors_is_named(folder: Path) -> None:
    rewrite(folder, "adapter_model.safetensors", b"nonsense")
    refused(folder, naming="adapter_model.safetensors cannot be read")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00"], ids=["cut", "list", "no text"])
@pytest.mark.parametrize("name", ["textmeta.json", "classifier.json"])
def test_file_that_is_no_json_object_is_named(folder: Path, name: str, content: bytes) -> None:
    rewrite(folder, name, content)
    refused(folder, naming=name)


@pytest.mark.parametrize(
    "found", [FORMAT_VERSION + 1, 10**30, FORMAT_VERSION - 1, 1, 0, -1, float(FORMAT_VERSION), True, "7", None, [7]]
)
def test_another_format_is_refused(folder: Path, found: object) -> None:
    rewrite_json(folder, "textmeta.json", lambda meta: meta.update(format_version=found))
    message = refused(folder, naming="textmeta.json")
    assert f"has format version {found!r}" in message
    assert "made by another version of textmeta: train it again" in message


def test_the_factor_after_inner_steps_comes_back(tiny_model: str, tmp_path: Path) -> None:
    encoder, factor = make_encoder(tiny_model), torch.tensor(0.3)
    save_adapter(tmp_path, encoder, random_parameters(encoder) | {"log_adapted_factor": factor}, INNER, {})
    assert torch.equal(load_adapter(tmp_path).parameters["log_adapted_factor"], factor)


@pytest.mark.parametrize("group", ["encoder", "lora", "inner"])
def test_unknown_setting_is_refused(folder: Path, group: str) -> None:
    rewrite_json(folder, "textmeta.json", lambda meta: meta[group].update(surprise=1))
    assert "surprise" in refused(folder, naming="textmeta.json")


@pytest.mark.parametrize(
    ("group", "change"),
    [
        ("lora", {"rank": 0}),
        ("lora", {"rank": "four"}),
        ("inner", {"steps": -1}),
        ("inner", {"adapt": ["nothing"]}),
        ("encoder", {"pooling": "max"}),
        ("encoder", {"max_length": None}),
    ],
)
def test_setting_out_of_range_is_refused(folder: Path, group: str, change: dict[str, object]) -> None:
    rewrite_json(folder, "textmeta.json", lambda meta: meta[group].update(change))
    refused(folder, naming="textmeta.json")


@pytest.mark.parametrize("key", ["encoder", "lora", "inner", "record"])
def test_missing_part_is_refused(folder: Path, key: str) -> None:
    rewrite_json(folder, "textmeta.json", lambda meta: meta.pop(key))
    assert key in refused(folder, naming="textmeta.json")


@pytest.mark.parametrize("key", ["encoder", "lora", "inner", "record"])
def test_part_of_a_wrong_kind_is_refused(folder: Path, key: str) -> None:
    rewrite_json(folder, "textmeta.json", lambda meta: meta.update({key: 3}))
    refused(folder, naming="textmeta.json")


def test_classes_must_be_as_many_as_the_rows_of_the_head(folder: Path) -> None:
    rewrite_json(folder, "classifier.json", lambda content: content.update(classes=["a", "b", "c"]))
    assert "3 classes" in refused(folder, naming="classifier.json")


def test_head_must_fit_the_features(folder: Path) -> None:
    rewrite_tensors(folder, "classifier.safetensors", lambda tensors: tensors.update(weights=torch.ones(2, 31)))
    with pytest.raises(AdapterError, match=r"classifier\.safetensors"):
        load_adapter(folder).load_encoder()


def test_encoder_with_other_weights_is_refused(
    saved: tuple[Path, Encoder, Parameters], tiny_model: str, tmp_path: Path
) -> None:
    adapter = load_adapter(saved[0])
    other = shutil.copytree(tiny_model, tmp_path / "other")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(BertConfig.from_pretrained(tiny_model), add_pooling_layer=False).save_pretrained(other)
    with pytest.raises(AdapterError, match=re.escape(f"belongs to {tiny_model} with weights")):
        adapter.load_encoder(model=str(other))


def test_encoder_moved_to_another_folder_is_accepted(
    saved: tuple[Path, Encoder, Parameters], tiny_model: str, tmp_path: Path
) -> None:
    folder, encoder, parameters = saved
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    loaded = load_adapter(folder).load_encoder(model=str(moved))
    factors = lora_factors(parameters)
    expected = encoder.features(encoder.prepare(TEXTS), factors)
    assert torch.equal(loaded.features(loaded.prepare(TEXTS), factors), expected)


def test_record_that_is_no_json_is_refused_before_anything_is_written(
    saved: tuple[Path, Encoder, Parameters], tmp_path: Path
) -> None:
    _, encoder, parameters = saved
    with pytest.raises(AdapterError, match="stored as JSON cannot be: Object of type object"):
        save_adapter(tmp_path / "adapter", encoder, parameters, INNER, {"path": object()})
    assert list(tmp_path.iterdir()) == []


def test_save_onto_a_file_is_refused(saved: tuple[Path, Encoder, Parameters], tmp_path: Path) -> None:
    _, encoder, parameters = saved
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(AdapterError, match="there is a file of that name"):
        save_adapter(tmp_path / "adapter", encoder, parameters, INNER, {})
    assert (tmp_path / "adapter").read_text() == "mine"


def test_crash_between_the_renames_leaves_an_adapter_that_loads(
    saved: tuple[Path, Encoder, Parameters], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, encoder, parameters = saved
    changed = {name: value + 1 for name, value in parameters.items()}
    rename, calls = Path.rename, 0

    def killed_at_the_second(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(folder, encoder, changed, INNER, RECORD)
    found = load_adapter(folder).parameters
    assert all(torch.equal(found[name], value) for name, value in parameters.items())


if __name__ == "__main__":
    save(Path(sys.argv[1]), sys.argv[2])
