"""The classifier, as users call it."""

import copy
import io
import multiprocessing
import pickle
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, softmax
from sklearn import config_context, exceptions
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score, learning_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from tests.given import LABELS, NAMES, RULE, SUPPORT, TEXTS, Patch, adapter_of, task
from tests.hub.server import TOKEN, HubServer
from textmeta import Corpus, FewShotClassifier, estimator, similarity
from textmeta.classifier import NotFittedError
from textmeta.encoder.encoder import best_precision
from textmeta.errors import AdapterError, DataError, HubError, SettingsError
from textmeta.meta.adapter import ClassIndex
from textmeta.meta.batch import Rows, TaskBatch
from textmeta.nearest import index_corpora
from textmeta.sharing import locate
from textmeta.sharing.store import load_adapter, save_adapter


@pytest.mark.parametrize(
    "settings",
    [
        *({"adapt": adapt} for adapt in ("pooling", "none", "lora", "pooling+lora", "offset")),
        *({"head": "prototype"}, {"entry_step_sizes": True}),
    ],
    ids=str,
)
def test_every_learner_classifies(tiny_model: str, plain: Corpus, tmp_path: Path, settings: dict[str, Any]) -> None:
    texts, labels, queries, true = task(plain, list(plain.class_names), 6)
    fitted = FewShotClassifier(adapter_of(tiny_model, **settings)).fit(texts, labels)
    assert fitted.score(queries, true) > 0.6
    fitted.save_pretrained(tmp_path)
    loaded = FewShotClassifier.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.predict_proba(queries), fitted.predict_proba(queries))


@pytest.mark.parametrize("unlabelled", [(), TEXTS[:-1]], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("names", [None, NAMES], ids=["no names", "names"])
def test_fit_and_predict_do_as_training_does(classifier: FewShotClassifier, names: Any, unlabelled: list[str]) -> None:
    learner = classifier._learner
    numbers = [[0, 0, 1, 1, 2, 2]]
    batch = TaskBatch.of([SUPPORT], numbers, [3], [names and list(names.values())], [unlabelled])
    with torch.no_grad():
        answers = learner.answer(learner.learn(batch), Rows.of([TEXTS], torch.device("cpu")))
    classifier.fit(SUPPORT, LABELS, label_names=names, unlabelled=unlabelled)
    assert classifier.support_ == list(zip(SUPPORT, LABELS, strict=True))
    expected = answers.logits[0].double().softmax(-1).numpy()
    np.testing.assert_allclose(classifier.predict_proba(TEXTS), expected, rtol=0, atol=1e-6)
    in_scope = 1 / (1 + np.exp(-(answers.scope_inputs[0].numpy() @ RULE[:-1].numpy() + float(RULE[-1]))))
    np.testing.assert_allclose(classifier.scope_score(TEXTS), in_scope, rtol=0, atol=1e-6)


def test_bfloat16_is_used_where_it_is_faster(tiny_model: str, tmp_path: Path, monkeypatch: Patch) -> None:
    for able, expected in (({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "no"), ({}, "no")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert best_precision(torch.device("cpu")) == expected
    monkeypatch.setattr(estimator, "best_precision", lambda device: "bf16")
    coarse = FewShotClassifier(adapter_of(tiny_model)).fit(SUPPORT, LABELS)
    exact = FewShotClassifier(coarse.adapter, precision="no").fit(SUPPORT, LABELS)
    assert (coarse._learner.reader.encoder.precision, exact._learner.reader.encoder.precision) == ("bf16", "no")
    assert FewShotClassifier(coarse.adapter, precision="bf16")._learner.reader is coarse._learner.reader
    expected = exact.predict_proba(TEXTS)
    coarse.save_pretrained(tmp_path / "coarse")
    elsewhere = FewShotClassifier.from_pretrained(tmp_path / "coarse", precision="no")
    for clf in (coarse, elsewhere):
        found = clf.predict_proba(TEXTS)
        assert 0 < np.abs(found - expected).max() < 0.1


def test_order_and_labels_of_the_examples_do_not_matter(classifier: FewShotClassifier, corpus: Corpus) -> None:
    texts, labels, queries, _ = task(corpus, ["class0", "class1", "class2"], 4)
    expected = classifier.fit(texts, labels, label_names=None).predict_proba(queries)
    order = np.random.default_rng(0).permutation(len(texts))
    renamed = {"class0": "z", "class1": "y", "class2": "x"}
    classifier.fit([texts[i] for i in order], [renamed[labels[i]] for i in order], label_names=None)
    assert classifier.classes_.tolist() == ["x", "y", "z"]
    np.testing.assert_allclose(classifier.predict_proba(queries)[:, ::-1], expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.* unknown to the encoder", "ignore:.* are cut")
@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ([*SUPPORT[:4], "kut kon"], ["b", "b", "b", "b", "k"]),
        (["bal", "bal", "bal", "fim"], ["b", "b", "f", "f"]),
        (["bal", "bal"], ["b", "f"]),
        (["bal " * 500, "é" * 2000, "…", "\0"], ["b", "b", "f", "f"]),
    ],
    ids=["unequal", "same text in two classes", "nothing to tell", "odd texts"],
)
def test_unusual_examples_make_a_classifier(classifier: FewShotClassifier, texts: list[str], labels: list[str]) -> None:
    probabilities = classifier.fit(texts, labels).predict_proba([*TEXTS, *texts])
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)


def test_many_classes(classifier: FewShotClassifier, corpus: Corpus) -> None:
    texts = list(corpus.texts[:50])
    classifier.fit(texts, range(50))
    assert classifier.predict_proba(texts[:3]).shape == (3, 50)
    assert classifier.predict(texts).tolist() == list(range(50))


# Names of classes, and unlabelled texts


def test_names_are_read_by_default_where_labels_are_words(classifier: FewShotClassifier) -> None:
    labels = ["balBel", "balBel", "fim_fon", "fim_fon", "kut", "kut"]
    found = classifier.fit(SUPPORT, labels).predict_proba(TEXTS)
    names = {"balBel": "bal bel", "fim_fon": "fim fon", "kut": "kut"}
    for said in (names, list(names.values())):
        np.testing.assert_array_equal(classifier.fit(SUPPORT, labels, label_names=said).predict_proba(TEXTS), found)
    without = classifier.fit(SUPPORT, labels, label_names=None).predict_proba(TEXTS)
    assert not np.allclose(without, found, atol=1e-4)
    numbers = classifier.fit(SUPPORT, [1, 1, 2, 2, 3, 3]).predict_proba(TEXTS)
    np.testing.assert_array_equal(numbers, without)


def test_names_alone_make_a_classifier(classifier: FewShotClassifier) -> None:
    classifier.fit(label_names={"k": "kel", "b": "bum", "f": "fon"})
    assert classifier.classes_.tolist() == ["b", "f", "k"]
    assert classifier.support_ == []
    assert classifier.predict(list(NAMES.values())).tolist() == ["b", "f", "k"]
    assert np.isfinite(classifier.scope_score(TEXTS)).all()
    with_texts = classifier.fit(label_names=NAMES, unlabelled=SUPPORT).predict_proba(TEXTS)
    assert np.isfinite(with_texts).all()
    # and one class of several may have a name alone
    classifier.fit(SUPPORT[:4], LABELS[:4], label_names=NAMES)
    assert classifier.classes_.tolist() == ["b", "f", "k"]
    by_its_name = classifier.predict_proba(["kel"])[0, 2]
    classifier.fit(SUPPORT[:4], LABELS[:4], label_names={**NAMES, "k": "gur dos"})
    assert classifier.predict_proba(["kel"])[0, 2] < by_its_name


# Labels and texts, in and out


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["b", "f", "k"], "U"),
        ([3, 1, 2], "i"),
        ([0.5, float("-inf"), 2.0], "f"),
        (["b", 2.5, True], "O"),
        ([1, "1", 2.5], "O"),
        (["z", 1, 2.5], "O"),
        (["a\0", "a", "b"], "O"),  # NumPy's own strings lose the null
        ([2**63, -1, 5], "O"),  # and its numbers would be floats
        (np.array([3, 1, 2], dtype=np.uint8), "i"),
        (np.array(["k", "b", "f"]), "U"),
        (pd.Series(["b", "f", "k"], index=[7, 8, 9], dtype="category"), "U"),
    ],
    ids=["str", "int", "float", "mixed", "int and str", "unsorted", "null", "large", "uint8", "array", "series"],
)
def test_labels_come_back_as_given(classifier: FewShotClassifier, tmp_path: Path, labels: Any, kind: str) -> None:
    texts = ["bal bel bil", "fim fon", "kut kon"]
    classifier.fit(texts, labels).save_pretrained(tmp_path)
    given = labels.tolist() if hasattr(labels, "tolist") else labels
    for one in (classifier, FewShotClassifier.from_pretrained(tmp_path)):
        predicted = one.predict(texts)
        assert repr(predicted.tolist()) == repr(given)
        assert one.classes_.dtype.kind == predicted.dtype.kind == kind
        assert one.score(texts, labels) == 1.0


def test_no_texts_give_empty_arrays_and_one_string_is_one_text(fitted: FewShotClassifier) -> None:
    assert (fitted.predict_proba([]).shape, fitted.predict_proba([]).dtype) == ((0, 3), np.float64)
    assert (fitted.predict([]).shape, fitted.predict([]).dtype) == ((0,), fitted.classes_.dtype)
    assert (fitted.scope_score([]).shape, fitted.scope_score([]).dtype) == ((0,), np.float64)
    assert fitted.predict([], reject=True).shape == (0,)
    assert fitted.predict("fim fon").tolist() == ["f"]
    np.testing.assert_array_equal(fitted.predict_proba("fim fon"), fitted.predict_proba(["fim fon"]))


@pytest.mark.parametrize(
    ("texts", "labels", "more", "message"),
    [
        (["bal", None], ["b", "f"], {}, "row 1: text is null"),
        (["bal", "fim"], ["b"], {}, "2 texts but 1 labels"),
        (["bal", "fim"], ["b", "f"], {"unlabelled": ["bal", " "]}, "unlabelled, row 1: text is empty"),
    ],
)
def test_unusable_examples_are_named_and_leave_the_last_fit(
    fitted: FewShotClassifier, texts: Any, labels: Any, more: dict[str, Any], message: str
) -> None:
    expected = fitted.predict_proba(TEXTS)
    with pytest.raises(DataError, match=message):
        fitted.fit(texts, labels, **more)
    np.testing.assert_array_equal(fitted.predict_proba(TEXTS), expected)
    assert fitted.classes_.tolist() == ["b", "f", "k"]


def test_half_of_a_character_is_replaced_if_asked_for(shared: FewShotClassifier) -> None:
    one = FewShotClassifier(shared.adapter, errors="replace")
    with pytest.warns(UserWarning, match="most tokens of 1 of 7"):
        one.fit([*SUPPORT[:5], "\ud83d"], LABELS, unlabelled=["bal \ud83d"])
    assert one.predict(["bal \ud83d"]).shape == (1,)


def test_texts_that_the_encoder_does_not_know_are_told(fitted: FewShotClassifier) -> None:
    foreign = ["bal fim", "bal 我 丢 了", "卡", ""]
    told = r"^{}: most tokens of 2 of {} texts are unknown to the encoder .*first of row {}, 'bal 我 丢 了'"
    for method in (fitted.predict, fitted.predict_proba, fitted.scope_score):
        with pytest.warns(UserWarning, match=told.format("predict", 4, 1)) as found:
            method(foreign)  # type: ignore[operator]
        assert [warning.filename for warning in found] == [__file__]
    with pytest.warns(UserWarning, match=told.format("fit", 8, 6)) as found:
        fitted.fit([*SUPPORT, foreign[1], "卡"], [*LABELS, "b", "f"])
    assert [warning.filename for warning in found] == [__file__]


def test_table_of_texts_and_labels_is_not_taken_for_its_column_names(fitted: FewShotClassifier) -> None:
    """One of one column is, in test_scikit_learn.py."""
    frame = pd.DataFrame({"text": SUPPORT, "label": LABELS})
    for call in (
        lambda: fitted.predict(frame),
        lambda: fitted.predict_proba({"text": SUPPORT}),
        lambda: fitted.score(frame, LABELS),
        lambda: fitted.score(SUPPORT, frame),
        lambda: fitted.fit(frame, LABELS),
        lambda: fitted.fit(SUPPORT, LABELS, unlabelled=frame),
    ):
        with pytest.raises(DataError, match="columns: 'text'"):
            call()


def test_not_fitted(classifier: FewShotClassifier) -> None:
    for one in (classifier, pickle.loads(pickle.dumps(classifier))):  # noqa: S301
        for method in ("predict", "predict_proba", "scope_score", "score", "add_class", "remove_class"):
            with pytest.raises(exceptions.NotFittedError, match="call fit"):
                getattr(one, method)(["bal"], *[["b"]] * (method in ("score", "add_class")))
    with pytest.raises(exceptions.NotFittedError):
        check_is_fitted(classifier)
    assert not any(hasattr(classifier, name) for name in ("classes_", "support_", "task_embedding_"))


def test_score_is_the_share_that_is_right(fitted: FewShotClassifier) -> None:
    texts = ["bal bel bil", "fim fon", "kut kon", "kel kas kim"]
    predicted = fitted.predict(texts).tolist()
    assert fitted.score(texts, [*predicted[:3], "other"]) == 0.75
    assert fitted.score(["fim fon", "fim fon"], ["f", "b"], sample_weight=[3, 1]) == 0.75
    for some, labels in ((["bal"], ["b", "f"]), ([], [])):
        with pytest.raises(DataError, match=f"{len(some)} texts but {len(labels)} labels"):
            fitted.score(some, labels)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_fit_where_gradients_are_switched_off(fitted: FewShotClassifier, tmp_path: Path, mode: Any) -> None:
    expected = fitted.predict_proba(TEXTS)
    fitted.save_pretrained(tmp_path)
    with mode():
        named, loaded = FewShotClassifier(tmp_path), FewShotClassifier.from_pretrained(tmp_path)
        named.save_pretrained(tmp_path / "again")  # loads the adapter
        np.testing.assert_array_equal(loaded.predict_proba(TEXTS), expected)
        np.testing.assert_array_equal(named.fit(SUPPORT, LABELS).predict_proba(TEXTS), expected)
    for one in (named, loaded):
        np.testing.assert_array_equal(one.fit(SUPPORT, LABELS).predict_proba(TEXTS), expected)


@pytest.mark.parametrize(("name", "value"), [("log_penalty", -1000.0), ("temperature", 1e6)])
def test_numbers_that_are_not_finite_are_an_error(shared: FewShotClassifier, name: str, value: float) -> None:
    tensors = shared.adapter.initialisation.tensors()
    broken = shared.adapter.initialisation.with_tensors({**tensors, name: torch.full_like(tensors[name], value)})
    classifier = FewShotClassifier(replace(shared.adapter, initialisation=broken))
    with pytest.raises(AdapterError, match="not finite"):
        classifier.fit(["bal", "bal", "bal", "fim"], ["b", "b", "f", "f"])  # without a penalty there is no solution
    with pytest.raises(NotFittedError):
        classifier.predict(["bal"])


# Out of scope


def between(scores: np.ndarray) -> float:
    """Return a threshold that rejects three, and is none of the scores."""
    ordered = np.sort(scores)
    return float(ordered[2] + ordered[3]) / 2


@pytest.mark.parametrize(
    ("labels", "outside"),
    [(["b", "f", "k"], None), (["b", "f", "k"], ("none",)), ([3, 1, 2], -1), ([True, "b", 2.5], "outside")],
    ids=["str, None", "str, tuple", "int", "mixed"],
)
def test_what_is_below_the_number_is_rejected(classifier: FewShotClassifier, labels: list[Any], outside: Any) -> None:
    classifier.fit(SUPPORT, [label for label in labels for _ in range(2)])
    scores, all_ = classifier.scope_score(TEXTS), classifier.predict(TEXTS).tolist()
    assert ((scores > 0) & (scores < 1)).all()
    threshold = between(scores)
    found = classifier.predict(TEXTS, reject=threshold, outside=outside)
    expected = [outside if score < threshold else label for score, label in zip(scores, all_, strict=True)]
    assert found.shape == (len(TEXTS),)
    assert repr(found.tolist()) == repr(expected)


def test_ends_of_the_threshold(fitted: FewShotClassifier) -> None:
    everything, nothing = fitted.predict(TEXTS).tolist(), [None] * len(TEXTS)
    half = [label if score >= 0.5 else None for label, score in zip(everything, fitted.scope_score(TEXTS), strict=True)]
    for rejects, expected in (
        ((False, np.bool_(False), 0), everything),
        ((1.0, np.float32(1)), nothing),
        ((True, np.bool_(True), torch.tensor(True)), half),
    ):
        for reject in rejects:
            assert fitted.predict(TEXTS, reject=reject).tolist() == expected  # type: ignore[arg-type]
    for reject in (-0.1, 1.1, 2, float("nan"), None, "0.5", [0.5]):
        with pytest.raises(DataError, match=r"reject must be True, False or a number from 0 to 1, given "):
            fitted.predict(TEXTS, reject=reject)  # type: ignore[arg-type]


def test_an_adapter_without_a_rule_says_so(shared: FewShotClassifier) -> None:
    fitted = FewShotClassifier(replace(shared.adapter, scope=None)).fit(SUPPORT, LABELS)
    assert fitted.predict(TEXTS).tolist() == shared.predict(TEXTS).tolist()
    for call in (lambda: fitted.scope_score(TEXTS), lambda: fitted.predict(TEXTS, reject=0.3)):
        with pytest.raises(AdapterError, match=r"no rule for what is out of scope.*minilm-general"):
            call()


def test_task_embedding_is_of_the_fitted_task(fitted: FewShotClassifier, corpus: Corpus) -> None:
    found = fitted.task_embedding_
    assert found.labels == ("b", "f", "k")
    assert found.classes.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(found.classes, axis=1), 1, atol=1e-5)
    assert similarity(found, fitted.fit(SUPPORT[::-1], LABELS[::-1]).task_embedding_) == pytest.approx(1, abs=1e-5)
    texts, labels, _, _ = task(corpus, ["class1", "class5", "class8"], 4)
    assert similarity(found, fitted.fit(texts, labels).task_embedding_) < 0.99
    assert fitted.fit(label_names=NAMES).task_embedding_.classes.shape == (3, 32)


def test_nearest_task_is_of_the_corpus_that_the_examples_are_from(
    shared: FewShotClassifier, plain: Corpus, corpus: Corpus, tmp_path: Path
) -> None:
    index = index_corpora(shared._learner, [corpus, plain])
    FewShotClassifier(replace(shared.adapter, index=index)).save_pretrained(tmp_path)
    classifier = FewShotClassifier.from_pretrained(tmp_path)
    for known, names in ((plain, ["b", "f", "k"]), (corpus, ["class1", "class5", "class8"])):
        texts, labels, _, _ = task(known, names, 12)
        nearest, other = classifier.fit(texts, labels).nearest_tasks()
        assert nearest.corpus == known.name
        assert other.similarity < nearest.similarity <= 1 + 1e-5
        assert {match.label for match in nearest.matches} == set(names)
        assert len(classifier.nearest_tasks(1)) == 1
    assert {match.known: match.label for match in nearest.matches} == {name: name for name in names}


def test_nearest_tasks_need_an_index_and_a_fitted_task(fitted: FewShotClassifier, shared: FewShotClassifier) -> None:
    with pytest.raises(AdapterError, match="no index of the classes"):
        fitted.nearest_tasks()
    with pytest.raises(NotFittedError):
        FewShotClassifier(replace(shared.adapter, index=ClassIndex({}, {}))).nearest_tasks()


# Saved and loaded


@pytest.mark.parametrize("way", ["folder", "hub"])
def test_saved_classifier_is_the_same(
    fitted: FewShotClassifier, hub: HubServer, tiny_model: str, tmp_path: Path, way: str
) -> None:
    if way == "hub":
        hub.add_repo("lab/tiny", {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
        assert fitted.push_to_hub("tester/mine", token=TOKEN, base_model="lab/tiny").oid
        loaded = FewShotClassifier.from_pretrained("tester/mine", revision="main")
    else:
        fitted.save_pretrained(tmp_path / "adapter")
        loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    np.testing.assert_array_equal(loaded.scope_score(TEXTS), fitted.scope_score(TEXTS))
    np.testing.assert_array_equal(loaded.task_embedding_.classes, fitted.task_embedding_.classes)
    assert loaded.classes_.tolist() == fitted.classes_.tolist()
    assert loaded.support_ is None
    # and it can be fitted again, from the same start
    loaded.fit(SUPPORT[2:], LABELS[2:])
    fitted.fit(SUPPORT[2:], LABELS[2:])
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), fitted.predict_proba(TEXTS))


@pytest.mark.parametrize("names", [NAMES, None], ids=["zero shots", "some without"])
def test_classes_without_examples_can_be_saved(classifier: FewShotClassifier, tmp_path: Path, names: Any) -> None:
    classifier.fit(label_names=names) if names else classifier.fit(SUPPORT[:3], LABELS[:3], label_names=NAMES)
    classifier.save_pretrained(tmp_path)
    loaded = FewShotClassifier.from_pretrained(tmp_path)
    assert loaded.classes_.tolist() == ["b", "f", "k"]
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    assert not any("bum" in path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".md"))


def test_adapter_that_is_not_fitted_comes_back_without_its_encoder(tiny_model: str, tmp_path: Path) -> None:
    adapter = adapter_of(tiny_model)
    missing = replace(adapter, encoder=replace(adapter.encoder, model="nobody/nothing"))
    FewShotClassifier(missing).save_pretrained(tmp_path)  # a run may have ended on a machine that has it no more
    classifier = FewShotClassifier(tmp_path, encoder=tiny_model).fit(SUPPORT, LABELS)
    np.testing.assert_array_equal(
        classifier.predict_proba(TEXTS), FewShotClassifier(adapter).fit(SUPPORT, LABELS).predict_proba(TEXTS)
    )


def test_a_name_takes_the_adapter_alone_and_loads_it_late(fitted: FewShotClassifier, tmp_path: Path) -> None:
    late = FewShotClassifier(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="no such adapter folder"):
        late.fit(SUPPORT, LABELS)
    fitted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotFittedError):
        late.predict(TEXTS)
    np.testing.assert_array_equal(late.fit(SUPPORT, LABELS).predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    with pytest.raises(AdapterError, match="nowhere"):
        FewShotClassifier.from_pretrained(tmp_path / "nowhere")


def test_without_arguments_it_has_the_shipped_adapter(
    fitted: FewShotClassifier, tiny_model: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(locate, "SHIPPED", tmp_path)
    with pytest.raises((AdapterError, HubError), match="textmeta/minilm-general"):
        FewShotClassifier().fit(SUPPORT, LABELS)
    save_adapter(tmp_path / "minilm-general", adapter_of(tiny_model))
    found = FewShotClassifier()
    np.testing.assert_array_equal(found.fit(SUPPORT, LABELS).predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    found.save_pretrained(tmp_path / "again")
    assert load_adapter(tmp_path / "again")[0].record == {"episodes": 7}


def test_paths_begin_at_home(tiny_model: str, fitted: FewShotClassifier, tmp_path: Path, monkeypatch: Patch) -> None:
    home = tmp_path / "home"
    shutil.copytree(tiny_model, home / "encoder")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    expected = fitted.predict_proba(TEXTS)
    fitted.save_pretrained("~/adapter")
    FewShotClassifier(Path("~/adapter")).merge("~/merged")
    for one in (
        FewShotClassifier("~/adapter", encoder="~/encoder").fit(SUPPORT, LABELS),
        FewShotClassifier.from_pretrained("~/adapter", encoder="~/encoder", cache_dir="~/cache"),
    ):
        np.testing.assert_array_equal(one.predict_proba(TEXTS), expected)
    assert {path.name for path in home.iterdir()} == {"adapter", "encoder", "merged"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "no folder of the name ~"


# An estimator of scikit-learn


def test_arguments_are_stored_and_nothing_is_loaded(tmp_path: Path) -> None:
    given = {"adapter": tmp_path / "nowhere", "adapt": "none", "steps": 0, "max_length": 9, "device": "none"}
    classifier = clone(FewShotClassifier(**given))  # type: ignore[arg-type]
    assert classifier.get_params().items() >= given.items()
    assert vars(classifier).keys() == classifier.get_params().keys()
    assert is_classifier(classifier)
    assert get_tags(classifier).input_tags.string
    assert FewShotClassifier.from_pretrained.__doc__


def test_unusable_arguments_are_named(shared: FewShotClassifier) -> None:
    for given, message in (
        ({"adapt": "lora"}, r"adapt, .* must be one of None, 'none', 'pooling', given 'lora'"),
        ({"steps": 4}, "steps must be a whole number from 0 to 3, given 4"),
        ({"steps": True}, "steps must be a whole number .* given True"),
        ({"max_length": 2}, "max_length must be a whole number from 3, given 2"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1, given 0"),
        ({"errors": "ignore"}, "errors must be one of 'raise', 'replace', given 'ignore'"),
        ({"long_texts": "split"}, "long_texts must be one of 'cut', 'window', given 'split'"),
        ({"precision": "fp8"}, "precision must be one of 'auto', 'bf16', 'no', given 'fp8'"),
    ):
        with pytest.raises(SettingsError, match=message):
            FewShotClassifier(shared.adapter, **given).fit(SUPPORT, LABELS)  # type: ignore[arg-type]


def test_no_steps_are_no_adaptation(classifier: FewShotClassifier) -> None:
    every, none, without = (
        classifier.set_params(**given).fit(SUPPORT, LABELS).predict_proba(TEXTS)
        for given in ({}, {"steps": 0}, {"steps": None, "adapt": "none"})
    )
    np.testing.assert_array_equal(none, without)
    assert not np.allclose(every, none, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.* texts are cut")
@pytest.mark.parametrize("way", ["assigned", "set_params"])
def test_what_is_fitted_and_loaded_is_of_the_arguments_as_they_are(fitted: FewShotClassifier, way: str) -> None:
    def change(**given: Any) -> None:
        fitted.set_params(**given) if way == "set_params" else vars(fitted).update(given)

    expected = fitted.predict_proba(TEXTS)
    for name, value in (("adapt", "none"), ("max_length", 9), ("class_weight", {"b": 2.0}), ("long_texts", "window")):
        change(**{name: value})
        for call in (fitted.predict, fitted.scope_score):
            with pytest.raises(NotFittedError):
                call(TEXTS)
        again = clone(fitted).fit(SUPPORT, LABELS).predict_proba(TEXTS)
        np.testing.assert_array_equal(fitted.fit(SUPPORT, LABELS).predict_proba(TEXTS), again)
        change(**{name: fitted.__class__().get_params()[name]})
        np.testing.assert_array_equal(fitted.fit(SUPPORT, LABELS).predict_proba(TEXTS), expected)
    change(class_weight={"b": 2.0}, max_length=int("300"))
    fitted.fit(SUPPORT, LABELS)
    change(class_weight={"b": 2.0}, max_length=int("300"), device="cpu", progress=False, batch_size=4)
    fitted.predict(TEXTS)
    fitted.class_weight["b"] = 3.0  # type: ignore[index, call-overload]
    with pytest.raises(NotFittedError):
        fitted.predict(TEXTS)
    for name, value in (("batch_size", 0), ("errors", "none"), ("progress", 3)):
        change(**{name: value})
        with pytest.raises((SettingsError, NotFittedError)):
            fitted.fit(SUPPORT, LABELS)
        change(**{name: fitted.__class__().get_params()[name]})


@pytest.mark.parametrize("count", [4, 6], ids=["two classes", "three"])
def test_scores_agree_with_probabilities(classifier: FewShotClassifier, count: int) -> None:
    classifier.fit(SUPPORT[:count], LABELS[:count])
    probabilities, scores = classifier.predict_proba(TEXTS), classifier.decision_function(TEXTS)
    np.testing.assert_allclose(np.exp(classifier.predict_log_proba(TEXTS)), probabilities, rtol=1e-12)
    expected = expit(scores) if count == 4 else softmax(scores, 1)
    np.testing.assert_allclose(expected, probabilities[:, 1] if count == 4 else probabilities, rtol=1e-9)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    for row, top in enumerate(classifier.predict_top(TEXTS, 2)):
        assert [label for label, _ in top] == classifier.classes_[order[row, :2]].tolist()
        assert [p for _, p in top] == probabilities[row, order[row, :2]].tolist()
    assert len(classifier.predict_top("bal", 9)[0]) == count // 2
    for k in (np.int64(1), torch.tensor(1)):
        assert classifier.predict_top(TEXTS, k) == classifier.predict_top(TEXTS, 1)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="k must be a whole number from 1, given 0"):
        classifier.predict_top(TEXTS, 0)


def test_features_tell_the_classes_and_have_names(classifier: FewShotClassifier, plain: Corpus) -> None:
    texts, labels, queries, true = task(plain, list(plain.class_names), 8)
    features = classifier.fit_transform(texts, labels)
    assert features.shape == (40, len(classifier.get_feature_names_out()))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    assert LogisticRegression().fit(features, labels).score(classifier.transform(queries), true) > 0.6
    assert classifier.transform([]).shape == (0, features.shape[1])
    frame = classifier.set_output(transform="pandas").transform(queries)
    assert frame.columns.tolist() == classifier.get_feature_names_out().tolist()


@pytest.mark.parametrize("settings", [{}, {"adapt": "none", "head": "prototype"}], ids=["ridge", "prototype"])
def test_examples_count_by_their_weights(tiny_model: str, settings: dict[str, Any]) -> None:
    one = FewShotClassifier(adapter_of(tiny_model, **settings))
    expected = one.fit(SUPPORT, LABELS).predict_proba(TEXTS)
    one.fit(SUPPORT, LABELS, sample_weight=[1.0, np.float32(1), Fraction(1), True, 1, 1])
    np.testing.assert_array_equal(one.predict_proba(TEXTS), expected)
    texts, labels = [*SUPPORT, "fim fon"], [*LABELS, "b"]  # the last is wrong
    without = one.fit(texts, labels, sample_weight=[1] * 6 + [0]).predict_proba(TEXTS)
    np.testing.assert_array_equal(without, expected)
    assert one.support_ == list(zip(SUPPORT, LABELS, strict=True))
    wrong = [one.fit(texts, labels, sample_weight=[1] * 6 + [w]).predict_proba("fim fon")[0, 0] for w in (0.01, 1, 9)]
    assert wrong == sorted(wrong)
    assert wrong[0] < 0.9 * wrong[2]


def test_weights_count_beside_one_another(classifier: FewShotClassifier) -> None:
    for weights in ([1.0] * 6, [1.0, 2, 1, 3, 1, 1]):
        expected = classifier.fit(SUPPORT, LABELS, sample_weight=weights).predict_proba(TEXTS)
        for scale in (1e-320, 1e-3, 7, 1e300):
            scaled = classifier.fit(SUPPORT, LABELS, sample_weight=[scale * weight for weight in weights])
            np.testing.assert_allclose(scaled.predict_proba(TEXTS), expected, rtol=0, atol=2e-4)  # 1e-320 is rounded
    assert np.isfinite(classifier.fit(SUPPORT, LABELS, sample_weight=[1e8, *[1] * 5]).predict_proba(TEXTS)).all()
    with pytest.raises(DataError, match=r"fit, sample_weight: expected the largest to be at most 1e\+09 times"):
        classifier.fit(SUPPORT, LABELS, sample_weight=[1e300, *[1] * 5])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1] * 5, "5 weights for 6 texts"),
        ([1] * 5 + [-1], "row 5: expected a finite number from 0, given -1"),
        ([1] * 5 + [10**400], "row 5: expected a finite number from 0, given 1000"),
        ([1] * 5 + [float("nan")], "row 5: expected a finite number from 0, given nan"),
        ([1] * 5 + ["2"], "row 5: expected a finite number from 0, given .2."),
        ([0] * 6, "all weights are 0"),
        (3, "expected a list, or one column, of numbers, given int 3"),
    ],
)
def test_unusable_weights_are_named(classifier: FewShotClassifier, weights: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^sample_weight.*{message}"):
        classifier.fit(SUPPORT, LABELS, sample_weight=weights)


def test_weights_are_routed(shared: FewShotClassifier) -> None:
    with config_context(enable_metadata_routing=True):
        one = (
            FewShotClassifier(shared.adapter).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        )
        weights = [1, 1, 1, 1, 1, 0]
        pipeline = make_pipeline(FunctionTransformer(), one).fit(SUPPORT, LABELS, sample_weight=weights)
    assert len(pipeline[-1].support_) == 5


def test_tools_of_scikit_learn_take_it(shared: FewShotClassifier, plain: Corpus) -> None:
    texts, labels, queries, true = task(plain, ["b", "d", "f"], 12)
    one = FewShotClassifier(shared.adapter)
    lower = FunctionTransformer(lambda rows: [text.lower() for text in rows])
    pipeline = make_pipeline(lower, one).fit([text.upper() for text in texts], labels)
    assert pipeline.score(queries, true) > 0.7
    assert cross_val_score(one, np.array(texts), labels, cv=3).mean() > 0.7
    search = GridSearchCV(one, {"adapt": ["none", "pooling"], "steps": [0, 3]}, cv=2).fit(pd.Series(texts), labels)
    assert search.score(queries, true) > 0.7
    calibrated = CalibratedClassifierCV(one, cv=2, ensemble=False).fit(texts, labels)
    assert calibrated.score(queries, true) > 0.7
    other = FewShotClassifier(shared.adapter, adapt="none")
    voting = VotingClassifier([("one", one), ("other", other)], voting="soft").fit(texts, labels)
    assert voting.score(queries, true) > 0.7
    _, train, valid = learning_curve(one, texts, labels, train_sizes=[9, 18], cv=2, shuffle=True, random_state=0)
    assert train.shape == valid.shape == (2, 2)
    assert np.isfinite(valid).all()


# Copies, processes and threads


def test_copies_and_pickles_answer_the_same(fitted: FewShotClassifier) -> None:
    for fit in (lambda: fitted, lambda: fitted.fit(SUPPORT[2:], LABELS[2:]), lambda: fitted.fit(label_names=NAMES)):
        expected = fit().predict_proba(TEXTS)
        file = io.BytesIO()
        joblib.dump(fitted, file)
        file.seek(0)
        for copied in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted)), joblib.load(file)):  # noqa: S301
            np.testing.assert_array_equal(copied.predict_proba(TEXTS), expected)
            assert copied.support_ == fitted.support_
    unfitted = pickle.loads(pickle.dumps(FewShotClassifier(fitted.adapter)))  # noqa: S301
    other = unfitted.fit(SUPPORT, LABELS).predict_proba(TEXTS)
    np.testing.assert_array_equal(copied.fit(SUPPORT, LABELS).predict_proba(TEXTS), other)  # and it is a copy
    np.testing.assert_array_equal(fitted.predict_proba(TEXTS), expected)


def test_a_process_that_is_spawned_predicts(fitted: FewShotClassifier, tmp_path: Path) -> None:
    fitted.set_params(precision="no").save_pretrained(tmp_path)
    load = f"__import__('textmeta').FewShotClassifier.from_pretrained({str(tmp_path)!r}, precision='no')"
    # as many threads as here: sums are split over threads, and round differently with another number
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, [torch.get_num_threads()]) as pool:
        np.testing.assert_array_equal(pool.apply(fitted.predict_proba, [TEXTS]), fitted.predict_proba(TEXTS))
        found = pool.apply(eval, [f"{load}.predict_proba({TEXTS!r})"])
        np.testing.assert_array_equal(found, fitted.predict_proba(TEXTS))
