"""Adapters of older formats load; those of newer ones are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.artifact.test_store import CONDITIONED, random_parameters, rewrite, rewrite_json, rewrite_tensors
from textmeta import FewShotClassifier
from textmeta.artifact import migrations
from textmeta.artifact.migrations import FORMAT_VERSION, migrate, migrate_tensors
from textmeta.artifact.store import load_adapter, save_adapter
from textmeta.errors import AdapterError
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import Parameters

INNER = InnerLoopSettings(steps=2)
PATH = Path("textmeta.json")
NEW_IN_4 = {
    "log_name_weight": torch.tensor(0.0),
    "temperature_slopes": torch.zeros(2),
    "strength_prior": torch.zeros(1),
}
NEW_IN_5 = {"evidence_slopes": torch.zeros(2)}
IN_7 = {"log_adapted_factor": torch.tensor(0.3)}  # of some


def as_version_6(folder: Path) -> None:
    """Rewrite a folder as textmeta wrote it in format 6: the same temperature before and after the inner steps."""
    rewrite_json(folder, "textmeta.json", lambda meta: meta.update(format_version=6))


def as_version_5(folder: Path) -> None:
    """Rewrite a folder as textmeta wrote it in format 5: the inner steps lower the loss of the head."""
    as_version_6(folder)

    def change(meta: dict[str, Any]) -> None:
        meta["format_version"] = 5
        del meta["inner"]["loss"], meta["inner"]["schedule"]

    rewrite_json(folder, "textmeta.json", change)


def as_version_4(folder: Path) -> None:
    """Rewrite a folder as textmeta wrote it in format 4: the same temperature, whatever the support set says."""
    as_version_5(folder)
    rewrite_json(folder, "textmeta.json", lambda meta: meta.update(format_version=4))
    rewrite_tensors(folder, "textmeta.safetensors", lambda tensors: [tensors.pop(name) for name in NEW_IN_5])


def as_version_3(folder: Path) -> None:
    """Rewrite a folder as textmeta wrote it in format 3: no weight of names, one strength, one temperature."""

    as_version_4(folder)

    def change(meta: dict[str, Any]) -> None:
        meta["format_version"] = 3
        del meta["inner"]["strengths"]

    rewrite_json(folder, "textmeta.json", change)
    rewrite_tensors(folder, "textmeta.safetensors", lambda tensors: [tensors.pop(name) for name in NEW_IN_4])


def as_version_1(folder: Path, encoder: Encoder) -> None:
    """Rewrite a folder as textmeta wrote it in format 1: no commit, one version, PEFT's whole configuration."""
    as_version_3(folder)
    meta = json.loads((folder / "textmeta.json").read_text())
    meta["format_version"] = 1
    del meta["inner"]["conditioning"]
    meta["textmeta_version"] = meta.pop("versions")["textmeta"]
    del meta["encoder"]["commit"]
    rewrite(folder, "textmeta.json", json.dumps(meta).encode())
    config: dict[str, Any] = {
        **encoder.peft_config.to_dict(),
        "base_model_name_or_path": encoder.settings.model,
        "revision": None,
        "task_type": "FEATURE_EXTRACTION",
        "inference_mode": True,
    }
    config = {key: sorted(value, reverse=True) if isinstance(value, set) else value for key, value in config.items()}
    rewrite(folder, "adapter_config.json", json.dumps(config, default=str).encode())


def as_version_2(folder: Path) -> None:
    """Rewrite a folder as textmeta wrote it in format 2: no conditioning, and a fitted head without a temperature."""
    as_version_3(folder)
    meta = json.loads((folder / "textmeta.json").read_text())
    meta["format_version"] = 2
    del meta["inner"]["conditioning"]
    rewrite(folder, "textmeta.json", json.dumps(meta).encode())
    if (folder / "classifier.safetensors").exists():
        rewrite_tensors(folder, "classifier.safetensors", lambda tensors: tensors.pop("temperature"))


def old_parameters(encoder: Encoder, inner: InnerLoopSettings = INNER) -> Parameters:
    """What an adapter of format 1 to 3 is loaded as: names weigh as much as examples, one temperature for all tasks."""
    return {**random_parameters(encoder, inner=inner), **NEW_IN_4, **NEW_IN_5}


def test_version_1_loads(encoder: Encoder, tmp_path: Path) -> None:
    parameters = old_parameters(encoder)
    save_adapter(tmp_path / "adapter", encoder, parameters, INNER, {"episodes": 7})
    as_version_1(tmp_path / "adapter", encoder)
    adapter = load_adapter(tmp_path / "adapter")
    assert all(torch.equal(adapter.parameters[name], value) for name, value in parameters.items())
    assert (adapter.commit, adapter.record) == (None, {"episodes": 7})
    assert adapter.versions["textmeta"] is not None
    assert adapter.load_encoder().weights_sha256 == encoder.weights_sha256


def test_version_2_loads(encoder: Encoder, tmp_path: Path) -> None:
    parameters = old_parameters(encoder)
    save_adapter(tmp_path / "adapter", encoder, parameters, INNER, {"episodes": 7})
    as_version_2(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.parameters.keys() == parameters.keys()
    assert all(torch.equal(adapter.parameters[name], value) for name, value in parameters.items())
    assert adapter.inner == INNER
    assert (adapter.known_tasks, adapter.record) == (None, {"episodes": 7})
    assert adapter.load_encoder().weights_sha256 == encoder.weights_sha256


def test_fitted_version_2_answers_as_it_did(encoder: Encoder, tmp_path: Path) -> None:
    texts = ["bal bel bil", "fim fon", "kut kon"]
    fitted = FewShotClassifier(encoder, old_parameters(encoder), INNER).fit(texts, ["b", "f", "k"])
    fitted.save_pretrained(tmp_path / "adapter")
    as_version_2(tmp_path / "adapter")
    loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    np.testing.assert_array_equal(loaded.predict_proba(texts), fitted.predict_proba(texts))
    assert loaded.task_embedding_ is None
    loaded.save_pretrained(tmp_path / "again")  # in today's format
    again = FewShotClassifier.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(again.predict_proba(texts), fitted.predict_proba(texts))


@pytest.mark.parametrize(
    "inner",
    [INNER, replace(INNER, head="ridge"), replace(INNER, head="readout"), CONDITIONED],
    ids=["plain", "ridge", "readout", "task"],
)
def test_version_3_loads(inner: InnerLoopSettings, encoder: Encoder, tmp_path: Path) -> None:
    parameters = old_parameters(encoder, inner)
    save_adapter(tmp_path / "adapter", encoder, parameters, inner, {"episodes": 7})
    as_version_3(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.parameters.keys() == parameters.keys()
    assert all(torch.equal(adapter.parameters[name], value) for name, value in parameters.items())
    assert (adapter.inner, adapter.record) == (inner, {"episodes": 7})
    loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    loaded.fit(["bal bel bil"], ["b"], label_names={"b": "bum", "f": "fon"})  # what it never learned
    loaded.save_pretrained(tmp_path / "again")
    again = FewShotClassifier.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(again.predict_proba(["bal", "fim"]), loaded.predict_proba(["bal", "fim"]))


@pytest.mark.parametrize(("as_older", "new"), [(as_version_4, NEW_IN_5), (as_version_6, {})], ids=["4", "6"])
def test_version_that_lacks_tensors_loads(
    as_older: Callable[[Path], None], new: Parameters, encoder: Encoder, tmp_path: Path
) -> None:
    parameters = random_parameters(encoder, inner=INNER) | new
    parameters["temperature_slopes"] = torch.tensor([0.3, -0.1])
    save_adapter(tmp_path / "adapter", encoder, parameters, INNER, {"episodes": 7})
    as_older(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.parameters.keys() == parameters.keys()
    assert all(torch.equal(adapter.parameters[name], value) for name, value in parameters.items())


@pytest.mark.parametrize(
    ("version", "name", "later"),
    [
        *((version, name, 4) for version in (1, 2, 3) for name in NEW_IN_4),
        (4, "evidence_slopes", 5),
        (6, "log_adapted_factor", 7),
    ],
)
def test_older_version_with_a_tensor_that_came_later_is_refused(version: int, name: str, later: int) -> None:
    message = rf"textmeta\.safetensors is not what format version {version} is: {name} came with version {later}"
    with pytest.raises(AdapterError, match=message):
        migrate_tensors({name: {**NEW_IN_4, **NEW_IN_5, **IN_7}[name]}, version, Path("textmeta.safetensors"))


def test_version_5_loads(encoder: Encoder, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", encoder, random_parameters(encoder), INNER, {"episodes": 7})
    as_version_5(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert (adapter.inner, adapter.inner.loss, adapter.inner.schedule) == (INNER, "head", "constant")


@pytest.mark.parametrize("name", ["loss", "schedule"])
def test_version_5_with_a_setting_that_came_later_is_refused(name: str) -> None:
    meta = {"format_version": 5, "inner": {name: "head"}}
    with pytest.raises(AdapterError, match=rf"is not what format version 5 is: inner.{name} came with version 6"):
        migrate(meta, PATH)


def test_version_7_may_have_a_factor(encoder: Encoder, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", encoder, random_parameters(encoder) | IN_7, INNER, {})
    assert load_adapter(tmp_path / "adapter").parameters["log_adapted_factor"] == IN_7["log_adapted_factor"]


@pytest.mark.parametrize("name", [*NEW_IN_4, *NEW_IN_5])
def test_version_7_without_a_tensor_is_refused(encoder: Encoder, tmp_path: Path, name: str) -> None:
    save_adapter(tmp_path / "adapter", encoder, random_parameters(encoder), INNER, {})
    rewrite_tensors(tmp_path / "adapter", "textmeta.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(AdapterError, match=rf"textmeta\.safetensors: expected tensors .*{name}"):
        load_adapter(tmp_path / "adapter")


def test_tensors_of_all_later_versions_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    new = {3: {"c": torch.tensor(3.0)}, 4: {"d": torch.tensor(4.0)}, 5: {"e": torch.ones(2)}}
    monkeypatch.setattr(migrations, "NEW_TENSORS", new)
    monkeypatch.setattr(migrations, "FORMAT_VERSION", 5)
    given = {"b": torch.tensor(2.0), "c": torch.tensor(7.0)}
    found = migrate_tensors(given, 3, PATH)
    assert {name: value.tolist() for name, value in found.items()} == {"b": 2.0, "c": 7.0, "d": 4.0, "e": [1.0, 1.0]}
    assert given.keys() == {"b", "c"}
    found["e"].zero_()
    assert new[5]["e"].all()  # a default is nobody's to change


def test_version_2_with_what_came_later_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"is not what format version 2 is: inner\.conditioning came with version 3"):
        migrate({"format_version": 2, "inner": {"conditioning": None}}, PATH)


@pytest.mark.parametrize("version", [1, 3])
def test_version_3_with_strengths_is_refused(version: int) -> None:
    inner = {"strengths": [1.0], **({"conditioning": None} if version == 3 else {})}
    meta = {"format_version": version, "inner": inner, "encoder": {}, "record": {}}
    with pytest.raises(AdapterError, match=r"is not what format version 3 is: inner\.strengths came with version 4"):
        migrate(meta, PATH)


def test_every_older_version_has_a_way_up() -> None:
    assert set(migrations.MIGRATIONS) == set(range(1, FORMAT_VERSION))


def test_migrations_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {version: lambda meta, version=version: {**meta, "seen": [*meta["seen"], version]} for version in (1, 2, 3)}
    monkeypatch.setattr(migrations, "MIGRATIONS", steps)
    monkeypatch.setattr(migrations, "FORMAT_VERSION", 4)
    assert migrate({"format_version": 2, "seen": []}, PATH) == {"format_version": 4, "seen": [2, 3]}


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**30])
def test_newer_version_says_what_to_install(version: int) -> None:
    with pytest.raises(AdapterError, match=r"textmeta\.json has format version .*; a newer textmeta is needed: pip"):
        migrate({"format_version": version}, PATH)


@pytest.mark.parametrize("version", [0, -1, 1.5, True, "2", None, [1]])
def test_what_is_no_version_is_refused(version: object) -> None:
    with pytest.raises(AdapterError, match=r"textmeta\.json has format version .*, this textmeta reads 1 to \d+$"):
        migrate({"format_version": version}, PATH)


def test_version_1_that_is_none_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"is not what format version 1 is"):
        migrate({"format_version": 1, "encoder": 3}, PATH)
