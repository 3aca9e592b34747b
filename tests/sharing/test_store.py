"""Adapter folders: what is saved comes back to the bit, and what is not what was saved is refused by name."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.sharing import made
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError
from textmeta.meta.adapter import Adapter, ClassIndex
from textmeta.sharing.folder import FORMAT, MANIFEST
from textmeta.sharing.store import adapter_files, load_adapter, save_adapter

META, TENSORS, WEIGHTS = "textmeta.json", "textmeta.safetensors", "adapter_model.safetensors"
HEAD = "classifier.safetensors"


def refused(folder: Path, *, naming: str) -> str:
    with pytest.raises(AdapterError, match=re.escape(naming)) as caught:
        load_adapter(folder)
    return str(caught.value)


def test_adapter_comes_back_to_the_bit(saved: Path, adapter: Adapter) -> None:
    found, _ = load_adapter(saved)
    ours, theirs = found.initialisation.tensors(), adapter.initialisation.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) and ours[name].dtype == torch.float32 for name, value in theirs.items())
    assert torch.equal(found.scope, torch.arange(8.0))
    assert torch.equal(found.probe, adapter.probe)
    for name in ("encoder", "weights_sha256", "lora", "learner", "commit", "record", "versions"):
        assert getattr(found, name) == getattr(adapter, name), name
    expected = made.make_index()
    assert list(found.index.classes.items()) == list(expected.classes.items()), "in the order of training"
    for name, value in expected.vectors.items():  # in bytes, and each of length 1 again
        np.testing.assert_allclose(found.index.vectors[name], value, atol=0.5 / 127)
        np.testing.assert_allclose(np.linalg.norm(found.index.vectors[name], axis=1), 1, rtol=1e-6)
    assert adapter_files(found)[TENSORS] == (saved / TENSORS).read_bytes()


@pytest.mark.parametrize("entry_step_sizes", [False, True])
def test_settings_that_are_not_the_defaults_come_back(tiny_model: str, tmp_path: Path, entry_step_sizes: bool) -> None:
    lora = LoraSettings(layers=1, rank=2, alpha=3, targets=("attention.self.key",))
    reader = TokenStateReader(Encoder(EncoderSettings(tiny_model, max_length=16), lora), (1, 4))
    adapter = made.make_adapter(reader, adapt="pooling+lora", head="prototype", entry_step_sizes=entry_step_sizes)
    adapter = replace(adapter, index=None, scope=None)
    save_adapter(tmp_path / "adapter", adapter)
    found, fitted = load_adapter(tmp_path / "adapter")
    assert (found.encoder, found.lora, found.learner) == (adapter.encoder, lora, adapter.learner)
    assert (found.index, found.scope, fitted) == (None, None, None)
    assert found.load_reader().encoder.factor_shapes == reader.encoder.factor_shapes


def test_saved_twice_or_loaded_and_saved_again_is_the_same_bytes(saved: Path, tiny_model: str, tmp_path: Path) -> None:
    made.save(tmp_path / "twice", tiny_model)
    save_adapter(tmp_path / "again", *load_adapter(saved))
    assert made.contents(tmp_path / "twice") == made.contents(tmp_path / "again") == made.contents(saved)


def test_folder_holds_the_documented_files_alone_and_nothing_of_the_machine(folder: Path, adapter: Adapter) -> None:
    assert sorted(made.contents(folder)) == sorted([*made.LISTED, *made.FITTED, "README.md", MANIFEST])
    assert all(str(folder.parent).encode() not in content for content in made.contents(folder).values())
    save_adapter(folder, replace(adapter, index=None))
    found, fitted = load_adapter(folder)
    assert (found.index, fitted) == (None, None)
    assert not list(folder.glob("classifier*")), "a classifier goes when the adapter is saved without"


# The user's own files


def test_card_of_somebodys_own_is_kept_beside_the_new_one(tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "README.md").write_text("my project")
    made.save(folder, tiny_model)
    assert (folder / "README.old.md").read_text() == "my project"
    (folder / "README.old.md").unlink()
    made.save(folder, tiny_model)
    assert not (folder / "README.old.md").exists(), "textmeta's own is replaced"
    written = (folder / "README.md").read_text()
    (folder / "README.md").write_text(written.replace("# Fitted", "# My own"))
    made.save(folder, tiny_model)
    assert "# My own" in (folder / "README.old.md").read_text()
    assert (folder / "README.md").read_text() == written


Change = Callable[[Adapter], Adapter]


def with_tensor(name: str, value: Tensor) -> Change:
    def change(adapter: Adapter) -> Adapter:
        init = adapter.initialisation
        return replace(adapter, initialisation=replace(init, **{name: value}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: replace(a, record={"path": object()}), "stored as JSON cannot be: Object of type object"),
        (lambda a: replace(a, record={"half": "\ud800"}), "surrogates not allowed"),
        (lambda a: replace(a, index=ClassIndex({"x": ("a", "a")}, {"x": made.unit(2)})), "is in the index twice"),
        (lambda a: replace(a, index=ClassIndex({"x": ("a", "")}, {"x": made.unit(2)})), "index.0.classes.1"),
        (lambda a: replace(a, index=ClassIndex({"x": ("a",)}, {"x": made.unit(2)})), "index has shape"),
        (lambda a: replace(a, index=ClassIndex({"x": ("a",)}, {"x": 0 * made.unit(1)})), "no row of zeros"),
        (lambda a: replace(a, index=ClassIndex({}, {})), "index: List should have at least 1 item"),
        (with_tensor("pull", torch.tensor(float("nan"))), "'pull' has values that are not finite"),
        (with_tensor("log_penalty", torch.tensor(1e3)), "log_penalty: the exponential"),
        (with_tensor("queries", torch.zeros(2, 32)), r"queries has shape \(2, 32\), expected \(3, 32\)"),
    ],
)
def test_what_would_not_be_loaded_is_not_saved(adapter: Adapter, tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(AdapterError, match=rf"not saved: .*{message}"):
        save_adapter(tmp_path / "adapter", change(adapter))
    assert list(tmp_path.iterdir()) == []


# Damage


@pytest.mark.parametrize("name", [*made.LISTED, *made.FITTED])
def test_damaged_file_is_found(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    refused(folder, naming=f"{name} is damaged")
    (folder / name).unlink()
    refused(folder, naming=f"lacks the file {name}")


@pytest.mark.parametrize("name", [*made.LISTED[1:], *made.FITTED])
def test_file_that_the_manifest_never_listed_is_missed(folder: Path, name: str) -> None:
    (folder / name).unlink()
    lines = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    refused(folder, naming=f"it has no {name}")


def test_missing_manifest_and_folder_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).unlink()
    refused(folder, naming=f"it has no {MANIFEST}, but ['README.md', ")
    refused(tmp_path / "nowhere", naming="nowhere")


@pytest.mark.parametrize("name", [WEIGHTS, TENSORS, HEAD])
def test_tensors_of_another_kind_are_found(folder: Path, name: str) -> None:
    good = made.contents(folder)
    for change, message in (
        (lambda found: next(iter(found.values())).view(-1)[:1].fill_(float("inf")), "not finite"),
        (lambda found: found.update({key: value.half() for key, value in found.items()}), "torch.float16, expected"),
        (lambda found: found.update(surprise=torch.zeros(1)), "surprise"),
    ):
        made.rewrite_tensors(folder, name, change)
        assert message in refused(folder, naming=name)
        made.rewrite(folder, name, good[name])
    made.rewrite(folder, name, b"nonsense")
    refused(folder, naming=f"{name} cannot be read")


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        *((TENSORS, name, None) for name in ("log_penalty", "queries", "probe", "index")),
        (WEIGHTS, made.LORA_A, torch.ones(3, 32)),
        (TENSORS, "log_step_sizes", torch.zeros(3, 3)),
        (TENSORS, "queries", torch.zeros(4, 32)),
        (TENSORS, "scope", torch.zeros(7)),
        (TENSORS, "probe", torch.zeros(3, 32)),
        (TENSORS, "index", torch.ones(4, 32, dtype=torch.int8)),
        (HEAD, "weights", None),
        (HEAD, "queries", torch.zeros(2, 3, 32)),
        (HEAD, "class_vectors", torch.zeros(1, 2, 31)),
        (HEAD, "lora.encoder.layer.2.attention.self.query.lora_A.weight", torch.zeros(1, 3, 32)),
    ],
)
def test_missing_tensor_or_another_shape_is_named(folder: Path, file: str, name: str, value: Tensor | None) -> None:
    made.rewrite_tensors(folder, file, lambda found: found.pop(name) if value is None else found.update({name: value}))
    message = refused(folder, naming=file)
    assert name.removeprefix("base_model.model.") in message
    assert value is None or str(tuple(value.shape)) in message


def test_truth_values_must_be_such(folder: Path) -> None:
    made.rewrite_tensors(folder, HEAD, lambda tensors: tensors["present"].fill_(0.5))
    refused(folder, naming=f"{HEAD}: present holds something else than 0 and 1")


@pytest.mark.parametrize("found", [FORMAT + 1, 10**30, 7, 1, 0, -1, 8.0, True, "8", None, [8]])
def test_another_format_is_refused(folder: Path, found: object) -> None:
    made.rewrite_json(folder, META, lambda meta: meta.update(format_version=found))
    with (folder / MANIFEST).open("a") as manifest:  # which has other files, and is not damaged
        manifest.write(f"{'0' * 64}  tasks.json\n")
    message = refused(folder, naming=f"{META} has format version {found!r}, this textmeta reads 8")
    newer = type(found) is int and found > 8
    assert message.endswith("made by a newer textmeta" if newer else "made by textmeta 0.1: train it again")


@pytest.mark.parametrize(
    ("place", "change"),
    [
        *((place, {"surprise": 1}) for place in ("encoder", "lora", "learner", "")),
        ("lora", {"rank": 0}),
        ("lora", {"targets": [3]}),
        ("learner", {"steps": True}),
        ("learner", {"adapt": "nothing"}),
        ("learner", {"layers": [3, 4.0]}),
        ("learner", {"layers": []}),
        ("encoder", {"model": 3}),
        ("encoder", {"model": "../encoder"}),
        ("encoder", {"revision": "../x"}),
        ("encoder", {"revision": "/etc"}),
        ("", {"encoder_commit": "../../models--lab--evil/blobs/abc"}),
        ("", {"encoder_commit": "main"}),
        ("", {"encoder_sha256": "12"}),
        *(("", {key: 3}) for key in ("encoder", "record", "versions", "index")),
        *(("", {key: ...}) for key in ("encoder", "lora", "learner", "record", "versions", "index", "encoder_sha256")),
    ],
    ids=str,
)
def test_setting_that_is_missing_or_cannot_be_is_named(folder: Path, place: str, change: dict[str, Any]) -> None:
    def act(meta: dict[str, Any]) -> None:
        own = meta[place] if place else meta
        for key, value in change.items():
            own.pop(key) if value is ... else own.update({key: value})

    made.rewrite_json(folder, META, act)
    assert re.search(rf"{META}: .*{place}.*{next(iter(change))}", refused(folder, naming=META), re.DOTALL)
