"""One encoder in memory for all classifiers that can share it, and each text read once for all of them."""

import copy
import gc
import itertools
import os
import pickle
import shutil
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from tests.given import LABELS, NAMES, SUPPORT, TEXTS, Patch, adapter_of
from textmeta import Adapter, FewShotClassifier, predict_many
from textmeta.classifier import NotFittedError
from textmeta.encoder import pretrained as pretrained_module
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import DataError
from textmeta.meta import adapter as adapter_module

Same = Callable[[FewShotClassifier, Path], FewShotClassifier]


@pytest.fixture
def adapter(tiny_model: str, request: pytest.FixtureRequest) -> Adapter:
    """One of this test alone: no other test holds a classifier that would share its encoder."""
    return replace(adapter_of(tiny_model), record={"of": request.node.nodeid})


@pytest.fixture
def loads(monkeypatch: Patch) -> list[str]:
    """The names of the encoders that were loaded."""
    found: list[str] = []
    load = pretrained_module.load_pretrained

    def counted(name: str, *more: Any) -> Any:
        found.append(name)
        return load(name, *more)

    monkeypatch.setattr(adapter_module, "load_pretrained", counted)
    return found


def tensors(*held: object) -> dict[int, int]:
    """Return where the memory of each tensor begins that can be reached from an object, and how many bytes it has."""
    found, seen, left = {}, set(), list(held)
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | str | bytes | np.ndarray):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
        elif type(one).__module__.split(".")[0] in ("textmeta", "torch", "transformers"):
            left += getattr(one, "__dict__", {}).values()
    return found


def saved(fitted: FewShotClassifier, folder: Path, **how: Any) -> FewShotClassifier:
    fitted.save_pretrained(folder)
    return FewShotClassifier.from_pretrained(folder, **how)


WAYS: dict[str, Same] = {
    "adapter": lambda fitted, _: FewShotClassifier(fitted.adapter).fit(SUPPORT, LABELS),
    "other steps": lambda fitted, _: FewShotClassifier(fitted.adapter, adapt="none").fit(SUPPORT, LABELS),
    "clone": lambda fitted, _: clone(fitted).fit(SUPPORT, LABELS),
    "copy": lambda fitted, _: copy.deepcopy(fitted),
    "pickle": lambda fitted, _: pickle.loads(pickle.dumps(fitted)),  # noqa: S301
    "folder": saved,
    "token": lambda fitted, folder: saved(fitted, folder, token="hf_mine", cache_dir=folder),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_of_a_kind_own_what_was_fitted_alone(way: str, adapter: Adapter, tmp_path: Path, loads: list[str]) -> None:
    first = FewShotClassifier(adapter).fit(SUPPORT, LABELS)
    loads.clear()
    second = WAYS[way](first, tmp_path / "saved")
    second.predict(TEXTS)
    assert not loads
    assert sum(tensors(first).values()) > sum(tensors(first._learner).values()) > 200_000
    own = tensors(second).items() - tensors(first).items()
    assert own <= tensors(second._fitted).items()
    assert sum(size for _, size in own) < 10_000


OTHERS: dict[str, Same] = {
    "longer": lambda first, _: FewShotClassifier(first.adapter, max_length=31),
    "precision": lambda first, _: FewShotClassifier(first.adapter, precision="bf16"),
    "adapter": lambda first, _: FewShotClassifier(
        replace(first.adapter, initialisation=replace(first.adapter.initialisation, log_penalty=torch.tensor(0.3)))
    ),
    "elsewhere": lambda first, folder: FewShotClassifier(
        first.adapter, encoder=str(shutil.copytree(first._adapter.encoder.model, folder / "e"))
    ),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_others_have_an_encoder_of_their_own(other: Same, adapter: Adapter, tmp_path: Path, loads: list[str]) -> None:
    first = FewShotClassifier(adapter).fit(SUPPORT, LABELS)
    expected = first.predict_proba(TEXTS)
    loads.clear()
    second = other(first, tmp_path).fit(SUPPORT, LABELS)
    assert second._learner.reader is not first._learner.reader
    assert len(loads) == 1
    np.testing.assert_array_equal(first.predict_proba(TEXTS), expected)


def test_memory_is_freed_with_the_last_classifier(adapter: Adapter) -> None:
    first = FewShotClassifier(adapter).fit(SUPPORT, LABELS)
    second = clone(first).fit(SUPPORT, LABELS)
    encoder = weakref.ref(first._learner.reader.encoder)
    assert second._learner.reader.encoder is encoder()
    del first
    gc.collect()
    assert encoder() is not None
    del second
    gc.collect()
    assert encoder() is None


def test_a_copy_reaches_the_hub_as_it_does(adapter: Adapter, tiny_model: str, tmp_path: Path) -> None:
    commit = tmp_path / "cache" / "models--lab--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_model, commit)
    (commit.parent.parent / "refs").mkdir()
    (commit.parent.parent / "refs" / "main").write_text(commit.name)
    named = replace(adapter, encoder=replace(adapter.encoder, model="lab/tiny"), commit=commit.name)
    FewShotClassifier(named).save_pretrained(tmp_path / "saved")
    how = {"cache_dir": tmp_path / "cache", "local_files_only": True, "token": "hf_secret"}
    one = FewShotClassifier.from_pretrained(tmp_path / "saved", **how)  # type: ignore[arg-type]
    copied = clone(clone(one))
    del one
    gc.collect()
    assert copied.fit(SUPPORT, LABELS).predict(TEXTS).shape == (6,)
    assert b"hf_secret" not in pickle.dumps(copied)


def test_threads_load_an_encoder_once(adapter: Adapter, loads: list[str]) -> None:
    gc.collect()
    loads.clear()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: FewShotClassifier(adapter).fit(SUPPORT, LABELS), range(8)))
    assert len(loads) == 1
    assert len({id(one._learner.reader) for one in made}) == 1


@pytest.mark.parametrize("length", [16, 100])
def test_a_probe_changes_nothing_that_others_read_by(length: int, adapter: Adapter, monkeypatch: Patch) -> None:
    reader = FewShotClassifier(adapter, max_length=length)._learner.reader
    tokenizer, changes = reader.encoder.tokenizer, []
    enable = type(tokenizer).set_truncation_and_padding  # type: ignore[attr-defined]

    def watched(self: Any, *given: Any, **more: Any) -> None:
        before = tokenizer.backend_tokenizer.truncation
        enable(self, *given, **more)
        changes.append(tokenizer.backend_tokenizer.truncation != before)

    monkeypatch.setattr(type(tokenizer), "set_truncation_and_padding", watched)

    def set_attribute(self: Encoder, name: str, value: object) -> None:
        changes.append(self is reader.encoder)
        self.__dict__[name] = value

    monkeypatch.setattr(Encoder, "__setattr__", set_attribute)
    found = Adapter.of(reader, adapter.learner, adapter.initialisation)
    torch.testing.assert_close(found.probe, adapter.probe)
    reader.read(TEXTS)
    assert changes
    assert not any(changes)


# Many at once


@pytest.fixture
def reads(monkeypatch: Patch) -> list[str]:
    """The texts that an encoder has read."""
    found: list[str] = []
    lower = TokenStateReader._id_batches

    def counted(self: TokenStateReader, texts: list[str]) -> Iterator[Any]:
        found.extend(texts)
        return lower(self, texts)

    monkeypatch.setattr(TokenStateReader, "_id_batches", counted)
    return found


def test_many_classifiers_read_each_text_once(adapter: Adapter, reads: list[str]) -> None:
    tasks = [
        FewShotClassifier(adapter).fit(SUPPORT, LABELS),
        FewShotClassifier(adapter, batch_size=4).fit(SUPPORT[:4], [0, 0, 1, 1]),
        FewShotClassifier(adapter, adapt="none").fit(label_names=NAMES),
    ]
    expected = [one.predict(TEXTS) for one in tasks]
    assert len({tuple(one.tolist()) for one in expected}) == 3
    reads.clear()
    found = predict_many(iter(tasks), iter(TEXTS))
    assert sorted(reads) == sorted(TEXTS)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert [one.tolist() for one in predict_many(tasks, TEXTS[0])] == [one[:1].tolist() for one in expected]
    assert [one.shape for one in predict_many(tasks, [])] == [(0,)] * 3
    assert predict_many([], TEXTS) == []


def test_those_that_cannot_share_read_by_themselves(adapter: Adapter, tiny_model: str, reads: list[str]) -> None:
    own = FewShotClassifier(adapter_of(tiny_model, adapt="lora"))
    tasks = [
        clone(own).fit(SUPPORT, LABELS),
        clone(own).fit(SUPPORT[::-1], LABELS),
        FewShotClassifier(adapter).fit(SUPPORT, LABELS),
        FewShotClassifier(adapter, max_length=9).fit(SUPPORT, LABELS),
    ]
    with pytest.warns(UserWarning, match="^predict: 1 of 6 texts are cut at 9 tokens"):
        expected = [one.predict(TEXTS) for one in tasks]
    reads.clear()
    with pytest.warns(UserWarning, match="^predict_many: 1 of 6 texts are cut at 9 tokens") as told:
        found = predict_many(tasks, TEXTS)
    assert len(told) == 1
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert sorted(reads) == sorted(TEXTS * 4)


def test_what_many_cannot_take_is_named(adapter: Adapter) -> None:
    fitted = FewShotClassifier(adapter).fit(SUPPORT, LABELS)
    with pytest.raises(NotFittedError):
        predict_many([fitted, FewShotClassifier(adapter)], TEXTS)
    for one in (fitted, None, 3):
        with pytest.raises(
            DataError, match=f"^predict_many: expected a list of classifiers, given {type(one).__name__}"
        ):
            predict_many(one, TEXTS)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="predict_many: classifier 1 is dict, expected a FewShotClassifier"):
        predict_many([fitted, {}], TEXTS)  # type: ignore[list-item]
    with pytest.raises(DataError, match="predict_many, row 6: text is int 3"):
        predict_many([fitted], [*TEXTS, 3])  # type: ignore[list-item]
    with pytest.warns(UserWarning, match="predict_many: most tokens of 1 of 7 texts are unknown .* of row 6"):
        predict_many([fitted, clone(fitted).fit(SUPPORT, LABELS)], [*TEXTS, "你 好"])


def test_threads_predict_while_others_refit(adapter: Adapter) -> None:
    """8 threads over 5 classifiers: every answer is that of the one or the other task of its classifier."""
    calls, texts = int(os.environ.get("TEXTMETA_CALLS", "30")), TEXTS[:3]
    ways = ([0, 2, 4, 5], "aabb"), (range(6), "ccddee")
    fits = [
        [([SUPPORT[(row + number) % 6] for row in rows], [f"{number}{c}" for c in classes]) for rows, classes in ways]
        for number in range(5)
    ]
    tasks = [FewShotClassifier(adapter).fit(*fit[0]) for fit in fits]
    allowed = [[one.fit(*way).predict_proba(texts) for way in fit] for one, fit in zip(tasks, fits, strict=True)]
    labels = [[one.fit(*way).predict(texts).tolist() for way in fit] for one, fit in zip(tasks, fits, strict=True)]
    assert not np.allclose(allowed[0][1], allowed[1][1], atol=1e-3)
    done: list[bool] = []
    wrong = []

    def predict(thread: int) -> None:
        for call in range(calls):
            number = (thread + call) % 5
            if call % 3 == 0:
                found = tasks[number].predict_proba(texts)
                right = np.allclose(found, allowed[number][found.shape[1] - 2], rtol=0, atol=1e-5)
            elif call % 3 == 1:
                right = tasks[number].predict(texts).tolist() in labels[number]
            else:
                many = predict_many(tasks, texts)
                right = all(one.tolist() in own for one, own in zip(many, labels, strict=True))
            if not right:
                wrong.append((thread, call))

    def refit(first: int) -> None:
        for number, way in itertools.cycle(itertools.product(range(first, 5, 2), (0, 1))):
            if done:
                return
            tasks[number].fit(*fits[number][way])

    with ThreadPoolExecutor(10) as pool:
        fitting = list(map(pool.submit, [refit] * 2, range(2)))
        try:
            list(pool.map(predict, range(8)))  # which raises what they raise
        finally:
            done.append(True)
    assert [one.result() for one in fitting] == [None, None]
    assert not wrong
