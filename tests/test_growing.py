"""Growing and shrinking: always what one fit of all examples gives; and what that needs after loading."""

import copy
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from tests.given import LABELS, NAMES, SUPPORT, TEXTS, Shown, adapter_of
from tests.sharing.made import rewrite_json, rewrite_tensors
from textmeta import FewShotClassifier
from textmeta.cli import main
from textmeta.errors import AdapterError, DataError, EncoderError, SettingsError

MORE, MORE_LABELS = ["gal gel", "gur dos gam", "bel bul"], ["g", "g", "b"]
UNLABELLED = ["bal bul bol", "fam fom fum", "kam kom gom"]
CODES = [7, 7, 8, 8, 9, 9]


@pytest.fixture
def make(shared: FewShotClassifier) -> Callable[..., FewShotClassifier]:
    """Return what fits a classifier that has its encoder."""
    return lambda *given, **more: FewShotClassifier(shared.adapter).fit(*given, **more)  # type: ignore[arg-type]


Make = Callable[..., FewShotClassifier]


def same(found: FewShotClassifier, expected: FewShotClassifier, atol: float = 1e-6) -> None:
    assert found.classes_.tolist() == expected.classes_.tolist()
    assert found.support_ is None or sorted(found.support_) == sorted(expected.support_ or ())
    np.testing.assert_allclose(found.predict_proba(TEXTS), expected.predict_proba(TEXTS), rtol=0, atol=atol)


# What one fit of everything gives

GIVEN: dict[str, dict[str, Any]] = {
    "labels read": {},
    "nothing read": {"label_names": None},
    "names": {"label_names": {**NAMES, "g": "gur"}},
    "class by name alone": {"label_names": {**NAMES, "g": "gur", "d": "dal dos"}},
    "weights": {"sample_weight": [1, 0.5, 2, 3, 0, 1]},
    "unlabelled": {"unlabelled": UNLABELLED},
    "all": {"label_names": {**NAMES, "g": "gur"}, "sample_weight": [1, 2, 1, 3, 1, 1], "unlabelled": UNLABELLED},
}


def everything(given: dict[str, Any], more: list[float]) -> dict[str, Any]:
    """Return the arguments of one fit of all examples."""
    weights = {"sample_weight": [*given["sample_weight"], *more]} if "sample_weight" in given else {}
    return {**given, **weights}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_further_examples_give_what_one_fit_of_all_gives(make: Make, given: dict[str, Any]) -> None:
    expected = make(SUPPORT + MORE, LABELS + MORE_LABELS, **everything(given, [1, 1, 1]))
    grown = make(SUPPORT, LABELS, **given)
    before = grown.predict_proba(TEXTS)
    assert grown.partial_fit(MORE[:1], MORE_LABELS[:1]).partial_fit(MORE[1:], MORE_LABELS[1:]) is grown
    same(grown, expected)
    assert before.shape != expected.predict_proba(TEXTS).shape or not np.allclose(
        before, expected.predict_proba(TEXTS), atol=1e-3
    )


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_class_that_went_leaves_what_one_fit_of_the_others_gives(make: Make, given: dict[str, Any]) -> None:
    rest = {**given}
    if names := given.get("label_names"):
        rest["label_names"] = {label: name for label, name in names.items() if label != "k"}
    if "sample_weight" in given:
        rest["sample_weight"] = given["sample_weight"][:4]
    expected = make(SUPPORT[:4], LABELS[:4], **rest)
    same(make(SUPPORT, LABELS, **given).remove_class("k"), expected)


def test_weights_may_come_with_further_examples(make: Make) -> None:
    expected = make(SUPPORT + MORE, LABELS + MORE_LABELS, sample_weight=[1] * 6 + [2, 0.5, 0])
    same(make(SUPPORT, LABELS).partial_fit(MORE, MORE_LABELS, sample_weight=[2, 0.5, 0]), expected)


READ = {"b": "b", "f": "f", "k": "k"}
NEW: dict[str, tuple[Any, list[str], str | None, Any]] = {  # label_names, examples and name, label_names of one fit
    "examples": ("auto", ["gal", "gel gur"], None, "auto"),
    "examples and name": ("auto", ["gal"], "gur dos", {**READ, "g": "gur dos"}),
    "name": ("auto", [], "gur dos", {**READ, "g": "gur dos"}),
    "label": ("auto", [], None, {**READ, "g": "g"}),
    "nothing read": (None, ["gal"], None, None),
    "named": (NAMES, [], "gur", {**NAMES, "g": "gur"}),
    "listed": (["bum", "fon", "kel"], ["gal"], "gur", {**NAMES, "g": "gur"}),
}


@pytest.mark.parametrize(("before", "texts", "name", "after"), NEW.values(), ids=NEW)
def test_a_new_class_gives_what_one_fit_gives(make: Make, before: Any, texts: Any, name: Any, after: Any) -> None:
    grown = make(SUPPORT, LABELS, label_names=before)
    assert grown.add_class("g", texts, name=name) is grown
    texts, labels = SUPPORT + texts, LABELS + ["g"] * len(texts)
    same(grown, make(texts, labels, label_names=after))
    if before == "auto":  # and later labels are read as before
        after = {**after, "d": "d"} if isinstance(after, dict) else after
        same(grown.partial_fit(["dal"], ["d"]), make([*texts, "dal"], [*labels, "d"], label_names=after))


def test_labels_without_letters(make: Make) -> None:
    same(make(SUPPORT, CODES).add_class(6, ["gal gel"]), make([*SUPPORT, "gal gel"], [*CODES, 6]))
    same(make(SUPPORT, CODES).add_class(np.int64(6), ["gal gel"]).remove_class(np.int64(6)), make(SUPPORT, CODES))
    with pytest.raises(DataError, match="class 6 needs examples or a name"):
        make(SUPPORT, CODES).add_class(6)
    with pytest.raises(DataError, match="label 7 has no name"):
        make(SUPPORT, CODES).add_class(6, ["gal"], name="gur")


def test_the_first_call_fits_and_may_name_all_classes(make: Make, shared: FewShotClassifier) -> None:
    def first(*given: Any, **more: Any) -> FewShotClassifier:
        return FewShotClassifier(shared.adapter).partial_fit(*given, **more)  # type: ignore[arg-type]

    same(first(SUPPORT, LABELS), make(SUPPORT, LABELS))
    named = {label: label for label in "bfkg"}
    same(first(SUPPORT[:3], LABELS[:3], list("bfkg")), make(SUPPORT[:3], LABELS[:3], label_names=named))
    numbers = first(SUPPORT[:4], CODES[:4], classes=[7, 8, 9]).partial_fit(SUPPORT[4:], CODES[4:], classes=[7, 8, 9])
    same(numbers, make(SUPPORT, CODES))
    with pytest.raises(DataError, match=r"partial_fit: 'k', 'k' is none of classes, 'b', 'f'"):
        first(SUPPORT, LABELS, ["b", "f"])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: c.add_class("b", ["gal"]), "'b' is a class already"),
        (lambda c: c.add_class("17"), "'17' needs examples or a name"),
        (lambda c: c.add_class("g", "gal gel"), "add_class: expected a list.*one string"),
        (lambda c: c.add_class("g", ["gal", ""]), "add_class, row 1: text is empty"),
        (lambda c: c.add_class("g", ["gal"], name=" "), "of 'g': text is empty"),
        (lambda c: c.add_class(None, ["gal"]), "add_class, label 0: the label is missing"),
        (
            lambda c: c.fit(SUPPORT, LABELS, label_names=NAMES).add_class("g", ["gal"]),
            "add_class: label 'g' has no name",
        ),
        (lambda c: c.remove_class("x"), r"remove_class: expected one of 'b', 'f', 'k', given 'x'"),
        (lambda c: c.remove_class("b").remove_class("f"), "remove_class needs at least 2 classes, found 1"),
        (lambda c: clone(c).partial_fit(["bal"], ["b"]), "partial_fit needs at least 2 classes, found 1"),
        (lambda c: c.partial_fit(["gal"], ["g", "g"]), "partial_fit: 1 texts but 2 labels"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(make: Make, act: Callable[[Any], Any], message: str) -> None:
    classifier = make(SUPPORT, LABELS)
    before = classifier.predict_proba(TEXTS)
    with pytest.raises(DataError, match=message):
        act(classifier)
    if "found 1" not in message and "no name" not in message:
        np.testing.assert_array_equal(classifier.predict_proba(TEXTS), before)


def test_codes_among_words_switch_names_off_and_it_is_told(make: Make) -> None:
    for act in (lambda one: one.add_class("17", MORE[:2]), lambda one: one.partial_fit(MORE[:2], ["17", "17"])):
        one = make(SUPPORT, LABELS)
        with pytest.warns(UserWarning, match="_.*: '17' is no word, so that no label is read") as told:
            act(one)
        assert [warning.filename for warning in told] == [__file__]
        same(one, make([*SUPPORT, *MORE[:2]], [*LABELS, "17", "17"]))
    named = make(SUPPORT, LABELS).add_class("17", MORE[:2], name="gur")
    assert named.name_weight_ > 0


def test_no_example_is_lost_where_threads_grow_it_at_once(make: Make) -> None:
    one, texts = make(SUPPORT, LABELS), [f"bal {'bel ' * number}" for number in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: one.partial_fit([text], ["b"]), texts))
    assert sorted(one.support_ or ()) == sorted([*zip(SUPPORT, LABELS, strict=True), *((text, "b") for text in texts)])
    assert pickle.loads(pickle.dumps(one)).support_ == copy.deepcopy(one).support_ == one.support_  # noqa: S301


SETTINGS: list[dict[str, Any]] = [
    {"class_weight": None},
    {"class_weight": {"b": 3.0, "g": 0.2}},
    {"adapt": "none"},
    {"steps": np.int64(1)},
]


@pytest.mark.filterwarnings("ignore:class_weight. 'g' is no class")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_was_loaded_grows_by_settings_of_its_fit(shared: FewShotClassifier, tmp_path: Path, settings: Any) -> None:
    one = FewShotClassifier(shared.adapter, **settings).fit(SUPPORT, LABELS)
    found = loaded(one, tmp_path, "texts")
    assert found.get_params().items() >= settings.items()
    same(found.partial_fit(MORE, MORE_LABELS), one.partial_fit(MORE, MORE_LABELS))
    other = FewShotClassifier.from_pretrained(tmp_path, adapt=None, steps=3, class_weight="balanced")
    expected = FewShotClassifier(shared.adapter).fit([*SUPPORT, *MORE], [*LABELS, *MORE_LABELS])
    same(other.partial_fit(MORE, MORE_LABELS), expected)


# After loading


def loaded(classifier: FewShotClassifier, folder: Path, include: Any) -> FewShotClassifier:
    classifier.save_pretrained(folder, include_support=include)
    return FewShotClassifier.from_pretrained(folder)


@pytest.mark.parametrize("given", [GIVEN["labels read"], GIVEN["class by name alone"], GIVEN["all"]])
@pytest.mark.parametrize(("include", "atol"), [("texts", 1e-6), ("states", 2e-3)])
def test_what_was_stored_grows(make: Make, tmp_path: Path, given: dict[str, Any], include: str, atol: float) -> None:
    found = loaded(make(SUPPORT, LABELS, **given), tmp_path / "one", include)
    np.testing.assert_array_equal(found.predict_proba(TEXTS), make(SUPPORT, LABELS, **given).predict_proba(TEXTS))
    found = loaded(found.partial_fit(MORE, MORE_LABELS), tmp_path / "two", include)
    expected = make(SUPPORT + MORE, LABELS + MORE_LABELS, **everything(given, [1, 1, 1]))
    same(found, expected, atol)
    same(found.remove_class("g").add_class("g", MORE[:2], name=given.get("label_names") and "gur"), expected, atol)


@pytest.mark.parametrize("adapt", ["lora", "none"])
def test_states_serve_every_way_to_adapt(tiny_model: str, tmp_path: Path, adapt: Any) -> None:
    classifier = FewShotClassifier(adapter_of(tiny_model, adapt=adapt)).fit(SUPPORT, LABELS)
    found = loaded(classifier, tmp_path / "a", "states").partial_fit(MORE, MORE_LABELS)
    same(found, classifier.partial_fit(MORE, MORE_LABELS), 2e-3)


def test_the_folder_holds_what_was_chosen_and_says_so(make: Make, tmp_path: Path, capsys: Shown) -> None:
    classifier = make([*SUPPORT, "kon secretword"], [*LABELS, "k"], label_names=NAMES, unlabelled=["bal secretword"])
    told = {
        False: ("are not stored, so that no class can be added", "not stored"),
        "states": (r"token states of 8 texts .* can guess them from", "8 texts as token states, which tell much"),
        "texts": (r"\*\*The 8 texts that it was fitted on", "8 texts stored, readable by anybody"),
    }
    for include, (card, info) in told.items():
        folder = tmp_path / str(include)
        found = loaded(classifier, folder, include)
        held = [path.name for path in folder.iterdir() if b"secretword" in path.read_bytes()]
        assert held == (["classifier.json"] if include == "texts" else [])
        assert (folder / "support.safetensors").exists() is (include == "states")
        assert re.search(card, (folder / "README.md").read_text(), re.DOTALL)
        main(["info", str(folder)])
        assert info in capsys.readouterr().out
        assert found.support_ == (classifier.support_ if include == "texts" else None)


def test_without_what_was_stored_the_error_says_how(make: Make, tmp_path: Path) -> None:
    found = loaded(make(SUPPORT, LABELS), tmp_path / "a", False)
    for act in (
        lambda: found.add_class("g", ["gal"]),
        lambda: found.remove_class("b"),
        lambda: found.partial_fit(MORE, MORE_LABELS),
        lambda: found.save_pretrained(tmp_path / "b", include_support="states"),
    ):
        with pytest.raises(AdapterError, match=r'include_support="texts", or "states"|no support texts to include'):
            act()
    found.fit(SUPPORT, LABELS).add_class("g", ["gal"])
    for odd in (True, "text", 1, None):
        with pytest.raises(SettingsError, match="include_support must be one of False, 'states', 'texts'"):
            found.save_pretrained(tmp_path / "b", include_support=odd)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="no support texts to include"):
        loaded(found, tmp_path / "c", "states").save_pretrained(tmp_path / "d", include_support="texts")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda j, t: j.update(classes=["f", "b"]), "not what the classes"),
        (lambda j, t: j["support"].update(kind="texts"), "states of 0 texts"),
        (lambda j, t: j["support"]["examples"][0].__setitem__(2, -1.0), "examples.0.2"),
        (lambda j, t: j["support"]["examples"][0].__setitem__(1, 9), "index out of range"),
        (lambda j, t: j["support"]["examples"][0].__setitem__(0, ""), "text is empty"),
        (lambda j, t: j["support"].update(names=["b"]), "shorter"),
        (lambda j, t: j.update(support=None), "holds token states"),
        (lambda j, t: t.pop(min(t)), "states of 2 texts"),
        (lambda j, t: t.update({min(t): t[min(t)].float()}), "float32, expected torch.float16"),
        (lambda j, t: t.update({min(t): t[min(t)] / 0}), "not finite"),
        (lambda j, t: t.update({min(t): t[min(t)][:, :, :5].clone()}), r"\(layers, length, 32\)"),
    ],
)
def test_stored_states_are_checked(make: Make, tmp_path: Path, act: Callable[[Any, Any], Any], message: str) -> None:
    loaded(make(["bal", "fim"], ["b", "f"]), tmp_path, "states")
    rewrite_tensors(
        tmp_path,
        "support.safetensors",
        lambda tensors: rewrite_json(tmp_path, "classifier.json", lambda content: act(content, tensors)),
    )
    with pytest.raises(AdapterError, match=message):
        FewShotClassifier.from_pretrained(tmp_path)


def test_states_of_other_layers_are_refused(make: Make, tmp_path: Path) -> None:
    loaded(make(["bal", "fim"], ["b", "f"]), tmp_path, "states")
    other = torch.zeros(7, 3, 32, dtype=torch.half)
    rewrite_tensors(tmp_path, "support.safetensors", lambda found: found.update({key: other.clone() for key in found}))
    with pytest.raises(EncoderError, match=r"token states are \(7, 3, 32\)"):
        FewShotClassifier.from_pretrained(tmp_path).add_class("g", ["gal"])
