"""Odd inputs to every public method of the classifier: an answer, or an error of ours, and never a broken object."""

import os
import random
import traceback
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.given import LABELS, NAMES, SUPPORT, TEXTS, Patch
from tests.sharing.made import make_index
from textmeta import Adapter, FewShotClassifier, TextMetaError

TRIES = 300


class UsersOwnError(Exception):
    """Raised by what a user gave: it is the user's, and passes through."""


def breaking(values: list[Any]) -> Iterator[Any]:
    yield from values
    raise UsersOwnError


class Unhashable:
    __hash__ = None  # type: ignore[assignment]


class Strange:
    """Equal to nothing, of no length, and an array that cannot be made."""

    shape = "none"
    columns = 3

    def __eq__(self, other: object) -> bool:
        raise UsersOwnError

    def __hash__(self) -> int:
        return 0


# fmt: off
STRINGS = ["", " \n", "bal", "bal bel", "\ud800", "bal \udfff\ud83d", "\u200b\u200d", "\0", "ÅÄÖ\u202e", "bal " * 1000,
    "x" * 20_000, "NaN", "auto"]
NUMBERS = [0, 1, -1, 3, 2**70, -(2**70), 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), 1 + 2j, True, False]
SCALARS = [None, pd.NA, pd.NaT, b"bal", bytearray(b"bal"), object(), int, len, Ellipsis, NotImplemented, range(3),
    Unhashable(), Strange(), Path("bal"), np.datetime64("2020"), np.float16(2), np.str_("bal"), torch.tensor(1)]
ARRAYS = [np.zeros(()), np.zeros((2, 2)), np.zeros((6, 1)), np.zeros((0, 3)), np.array(SUPPORT),
    np.array([SUPPORT] * 2),
    np.array(["bal", None], dtype=object), np.array([b"bal"]), torch.zeros(6), torch.zeros(2, 3),
    torch.zeros(6, dtype=torch.bfloat16)]
FRAMES = [pd.DataFrame({"a": SUPPORT}), pd.DataFrame({"a": SUPPORT, "b": LABELS}), pd.DataFrame(), pd.Series(SUPPORT),
    pd.Series([None, "bal"]), pd.Series(LABELS, dtype="category"), pd.Index(LABELS),
    pd.Series([1, None], dtype="Int64"),
    pd.DataFrame([["a", "b"]], columns=["x", "x"])]
# fmt: on


def junk(rng: random.Random, depth: int = 0) -> Any:
    """Return anything at all, or a container of it."""
    if depth == 3 or rng.random() < 0.7:
        return rng.choice(rng.choice([STRINGS, NUMBERS, SCALARS, ARRAYS, FRAMES]))
    return contained(rng, [junk(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 6]))])


def contained(rng: random.Random, parts: list[Any]) -> Any:
    """Return values in a container that people have."""
    array = np.empty(len(parts), dtype=object)
    for place, part in enumerate(parts):
        array[place] = part
    frame = pd.DataFrame({"a": pd.Series(array, dtype=object)})
    keys = rng.choices([*STRINGS, *NUMBERS, *LABELS], k=len(parts))
    others = [tuple(parts), iter(parts), breaking(parts), dict(zip(keys, parts, strict=True)), array, array[:, None]]
    return rng.choice([parts, *others, [parts], frame, frame["a"], frame.assign(b=1), deque(parts)])


def odd(rng: random.Random, good: Any) -> Any:
    """Return something that is not what a method expects, or only just."""
    if not isinstance(good, list | dict) or rng.random() < 0.3:
        return good if rng.random() < 0.1 else junk(rng)
    if isinstance(good, dict):
        changed = {**good, rng.choice([*NUMBERS, *STRINGS, *good]): rng.choice([junk(rng), "bum"])}
        return rng.choice([changed, list(changed.values()), dict(list(changed.items())[1:])])
    parts = list(good)
    for _ in range(rng.choice([0, 1, 1, 3])):
        parts[rng.randrange(len(parts))] = rng.choice([junk(rng), *STRINGS, *NUMBERS])
    return contained(rng, parts[: rng.choice([1, 3, len(parts), len(parts)])] * rng.choice([1, 1, 1, 2]))


# the arguments that are right
TEXT, ONES = {"texts": TEXTS[:3]}, [1.0] * 6
GOOD: dict[str, dict[str, Any]] = {
    "fit": {"texts": SUPPORT, "labels": LABELS, "sample_weight": ONES, "label_names": NAMES, "unlabelled": TEXTS[:3]},
    "partial_fit": {"texts": SUPPORT, "labels": LABELS, "classes": ["b", "f", "k"], "sample_weight": ONES},
    "add_class": {"label": "g", "examples": TEXTS[:2], "name": "gur"},
    "remove_class": {"label": "k"},
    "predict": {**TEXT, "reject": 0.5, "outside": "none"},
    "predict_top": {**TEXT, "k": 2},
    "predict_stream": {**TEXT, "k": 2, "total": 3},
    "score": {"texts": SUPPORT, "labels": LABELS, "sample_weight": ONES},
    **dict.fromkeys(("predict_proba", "predict_log_proba", "decision_function", "transform", "scope_score"), TEXT),
    "nearest_tasks": {"count": 2},
    "get_feature_names_out": {"input_features": None},
    "save_pretrained": {"folder": "saved", "include_support": "texts"},
    "push_to_hub": {"repo_id": "tester/m", "revision": "main", "include_support": "states", "base_model": "lab/tiny"},
    "merge": {"folder": "merged"},
    "from_pretrained": {"name": "nowhere", "revision": "main", "subfolder": "x", "max_length": 16},
    "set_params": {"adapt": "none", "steps": 1, "max_length": 9, "batch_size": 2, "errors": "raise", "progress": False},
}
ALWAYS = {"texts", "labels", "label", "folder", "repo_id", "name"}


@pytest.fixture(scope="module")
def shared(adapter: Adapter) -> FewShotClassifier:
    return FewShotClassifier(replace(adapter, index=make_index())).fit(SUPPORT, LABELS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", GOOD)
def test_odd_inputs_are_answered_or_refused(
    shared: FewShotClassifier, method: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    good, ends, wrong = GOOD[method], Counter[str](), dict[str, int]()
    for number in range(TRIES):
        rng = random.Random(f"{method} {number}")
        classifier = FewShotClassifier(shared.adapter)  # type: ignore[arg-type]
        classifier._fitted = None if method == "partial_fit" and number % 2 else shared._fitted
        given = {name: value for name, value in good.items() if name in ALWAYS or rng.random() < 0.6}
        for name in rng.sample(list(good), min(len(good), rng.choice([1, 1, 2]))):
            given[name] = odd(rng, good[name])
        try:
            by_place = [given.pop("texts")] if method == "transform" else []  # as scikit-learn's own names it X
            found = getattr(classifier, method)(*by_place, **given)
            list(found if method == "predict_stream" else ())
            if method == "set_params":  # which is checked when it is used
                classifier.fit(SUPPORT, LABELS).predict(TEXTS)
            ends["answered"] += 1
        except (TextMetaError, UsersOwnError):
            ends["refused"] += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            wrong[f"{error!r:.200} in {place.filename}:{place.lineno}"] = number
    assert not wrong
    assert len(ends) == 2 or method in ("get_feature_names_out", "push_to_hub", "from_pretrained", "nearest_tasks"), (
        ends
    )
