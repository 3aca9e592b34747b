import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.hub.server import TOKEN, HubServer
from textmeta import FewShotClassifier
from textmeta.data.corpus import Corpus
from textmeta.errors import AdapterError, DataError, NotFittedError
from textmeta.meta.adaptation import adapt, query_logits, start_parameters, task_weights
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import task_batch
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.heads import HEADS
from textmeta.model.initialisation import Parameters, head_scalars, lora_factors
from textmeta.model.lora import LoraSettings
from textmeta.model.task_encoder import TaskEncoderSettings
from textmeta.tasks import index_tasks, similarity

INNER = InnerLoopSettings(steps=3)
TASK_ENCODER = TaskEncoderSettings("set_transformer", size=8, width=16)
CONDITIONED = replace(
    INNER, conditioning=ConditioningSettings("banks", banks=2, groups=2, temperature=True, task_encoder=TASK_ENCODER)
)
TEXTS = ["bal bel", "fim fon gur dal kes", "bal", "kut kut dal fim bel bol bun bam ban"]
SUPPORT = ["bal bel bil", "bam ben", "fim fon", "fal fel fil fol", "kut kon", "kel kas kim"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small take many times as long on several threads when the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain() -> Corpus:
    """5 classes of 24 texts, each of words from its class's own three: random weights are enough to tell them apart."""
    rng = np.random.default_rng(0)
    own = {letter: [letter + ending for ending in ("al", "er", "os")] for letter in "bdfgk"}
    labels = [letter for letter in own for _ in range(24)]
    texts = [" ".join(rng.choice(own[label], rng.integers(3, 9))) for label in labels]
    return Corpus.from_pairs("plain", texts, labels)


@pytest.fixture(scope="module")
def encoder(tiny_model: str) -> Encoder:
    return Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4))


@pytest.fixture(scope="module")
def parameters(encoder: Encoder) -> Parameters:
    """An initialisation with B other than zero, as after meta-training."""
    start = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size)
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) if ".lora_B." in name else value
        for name, value in start.items()
    }


@pytest.fixture
def classifier(encoder: Encoder, parameters: Parameters) -> FewShotClassifier:
    return FewShotClassifier(encoder, parameters, INNER, {"episodes": 0})


@pytest.fixture
def fitted(classifier: FewShotClassifier) -> FewShotClassifier:
    return classifier.fit(SUPPORT, list("bbffkk"))


def task(corpus: Corpus, names: list[str], shots: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """Return support texts and labels, and the other texts of the classes with theirs."""
    support, query = [], []
    for name in names:
        rows = corpus.rows_of(corpus.class_names.index(name)).tolist()
        support += [(corpus.texts[row], name) for row in rows[:shots]]
        query += [(corpus.texts[row], name) for row in rows[shots:]]
    return [t for t, _ in support], [n for _, n in support], [t for t, _ in query], [n for _, n in query]


@pytest.mark.parametrize(("shots", "least"), [(1, 0.5), (8, 0.7)])
def test_accuracy_is_clearly_above_chance(
    classifier: FewShotClassifier, plain: Corpus, shots: int, least: float
) -> None:
    # 5 classes: chance is 0.2
    texts, labels, queries, true = task(plain, list(plain.class_names), shots)
    assert classifier.fit(texts, labels).score(queries, true) > least


def test_fit_returns_the_classifier(classifier: FewShotClassifier) -> None:
    assert classifier.fit(["bal", "fim"], ["b", "f"]) is classifier


def test_probabilities_sum_to_one(fitted: FewShotClassifier) -> None:
    probabilities = fitted.predict_proba(TEXTS)
    assert probabilities.shape == (4, 3)
    assert probabilities.dtype == np.float64
    assert (probabilities > 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)


def test_columns_are_in_the_order_of_classes(classifier: FewShotClassifier) -> None:
    classifier.fit(["kut kon", "bal bel bil", "fim fon"], ["k", "b", "f"])
    assert classifier.classes_.tolist() == ["b", "f", "k"]
    # each support text is its own class's prototype
    assert classifier.predict_proba(["bal bel bil", "fim fon", "kut kon"]).argmax(1).tolist() == [0, 1, 2]
    assert classifier.predict(["bal bel bil", "fim fon", "kut kon"]).tolist() == ["b", "f", "k"]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["b", "f", "k"], "U"),
        ([3, 1, 2], "i"),
        ([0.5, -1.5, 2.0], "f"),
        (["b", 2.5, True], "O"),
        ([1, "1", 2.5], "O"),
    ],
    ids=["str", "int", "float", "mixed", "int and str"],
)
def test_labels_come_back_as_they_went_in(classifier: FewShotClassifier, labels: list, kind: str) -> None:
    texts = ["bal bel bil", "fim fon", "kut kon"]
    classifier.fit(texts, labels)
    predicted = classifier.predict(texts)
    assert predicted.shape == (3,)
    assert predicted.tolist() == labels
    assert [type(label) for label in predicted.tolist()] == [type(label) for label in labels]
    assert classifier.classes_.dtype.kind == kind
    assert classifier.classes_.shape == (3,)
    assert set(classifier.classes_.tolist()) == set(labels)
    assert classifier.score(texts, labels) == 1.0


def test_truth_values_come_back_as_they_went_in(classifier: FewShotClassifier) -> None:
    classifier.fit(["bal bel bil", "fim fon"], [True, False])
    assert classifier.classes_.dtype == np.bool_
    assert classifier.predict(["bal bel bil", "fim fon"]).tolist() == [True, False]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (np.array([3, 1, 2]), "i"),
        (np.array([3, 1, 2], dtype=np.uint8), "i"),
        (np.array(["k", "b", "f"]), "U"),
        ([np.int64(3), np.int64(1), 2], "i"),
    ],
    ids=["int64", "uint8", "str", "list of scalars"],
)
def test_numpy_labels(classifier: FewShotClassifier, labels: Any, kind: str) -> None:
    texts = ["bal bel bil", "fim fon", "kut kon"]
    predicted = classifier.fit(texts, labels).predict(texts)
    assert predicted.tolist() == list(labels)
    assert predicted.dtype.kind == kind
    assert classifier.score(texts, labels) == 1.0


def test_labels_in_a_tensor_are_numbers(classifier: FewShotClassifier) -> None:
    # a tensor's items are hashable, by identity: each would be a class of its own
    classifier.fit(SUPPORT, torch.tensor([3, 3, 1, 1, 2, 2]))
    assert classifier.classes_.tolist() == [1, 2, 3]


def test_labels_of_a_series(classifier: FewShotClassifier) -> None:
    labels = pd.Series(list("bbffkk"), index=range(10, 16), dtype="category")
    assert classifier.fit(pd.Series(SUPPORT), labels).classes_.tolist() == ["b", "f", "k"]


@pytest.mark.parametrize("labels", [[2**70, 1], [2**63, -1], [2**63 + 1, 1]])
def test_integer_too_large_for_numpy_comes_back(classifier: FewShotClassifier, labels: list[int]) -> None:
    predicted = classifier.fit(["bal bel bil", "fim fon"], labels).predict(["bal bel bil", "fim fon"])
    assert repr(predicted.tolist()) == repr(labels)  # 2.0**63 would be equal to 2**63


def test_string_label_with_a_trailing_null_comes_back(classifier: FewShotClassifier) -> None:
    # NumPy's own strings lose it
    labels = ["a\0", "a"]
    assert classifier.fit(["bal bel bil", "fim fon"], labels).predict(["bal bel bil", "fim fon"]).tolist() == labels


def test_classes_are_in_the_order_given_where_they_cannot_be_sorted(classifier: FewShotClassifier) -> None:
    classifier.fit(["bal bel bil", "fim fon", "kut kon", "bal"], ["z", 1, 2.5, "z"])
    assert classifier.classes_.tolist() == ["z", 1, 2.5]


def test_texts_may_be_any_sequence(fitted: FewShotClassifier) -> None:
    expected = fitted.predict_proba(TEXTS)
    np.testing.assert_array_equal(fitted.predict_proba(tuple(TEXTS)), expected)
    np.testing.assert_array_equal(fitted.predict_proba(np.array(TEXTS)), expected)


def test_answer_does_not_depend_on_the_other_texts(fitted: FewShotClassifier, corpus: Corpus) -> None:
    others = list(corpus.texts[:60])
    alone = np.concatenate([fitted.predict_proba([text]) for text in TEXTS])
    np.testing.assert_allclose(fitted.predict_proba(TEXTS), alone, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fitted.predict_proba([*others, *TEXTS])[60:], alone, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fitted.predict_proba(TEXTS[::-1])[::-1], alone, rtol=0, atol=1e-6)


def test_answers_beyond_one_pass_are_in_order(
    fitted: FewShotClassifier, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = list(corpus.texts[:20])
    expected = fitted.predict_proba(texts)
    monkeypatch.setattr("textmeta.meta.task_learner.CHUNK", 7)
    np.testing.assert_allclose(fitted.predict_proba(texts), expected, rtol=0, atol=1e-6)


def test_answer_does_not_depend_on_the_order_of_the_examples(classifier: FewShotClassifier, corpus: Corpus) -> None:
    names = ["class0", "class1", "class2"]
    texts, labels, queries, _ = task(corpus, names, 4)
    expected = classifier.fit(texts, labels).predict_proba(queries)
    order = np.random.default_rng(0).permutation(len(texts))
    classifier.fit([texts[i] for i in order], [labels[i] for i in order])
    assert classifier.classes_.tolist() == names
    np.testing.assert_allclose(classifier.predict_proba(queries), expected, rtol=0, atol=1e-4)


def test_answer_does_not_depend_on_the_names_of_the_classes(classifier: FewShotClassifier, corpus: Corpus) -> None:
    texts, labels, queries, _ = task(corpus, ["class0", "class1", "class2"], 4)
    expected = classifier.fit(texts, labels).predict_proba(queries)
    renamed = {"class0": "z", "class1": "y", "class2": "x"}
    classifier.fit(texts, [renamed[label] for label in labels])
    assert classifier.classes_.tolist() == ["x", "y", "z"]
    np.testing.assert_allclose(classifier.predict_proba(queries)[:, ::-1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("text", ["", "   ", "bal " * 500, "…", "\0", "é" * 2000], ids=range(6))
def test_any_string_can_be_predicted(fitted: FewShotClassifier, text: str) -> None:
    probabilities = fitted.predict_proba(["bal bel", text])
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities[0], fitted.predict_proba(["bal bel"])[0], rtol=0, atol=1e-6)


def test_text_is_cut_at_the_longest_length(fitted: FewShotClassifier) -> None:
    # 32 tokens with [CLS] and [SEP]
    words = ["bal", "fim"] * 15
    np.testing.assert_array_equal(
        fitted.predict_proba([" ".join(words)]), fitted.predict_proba([" ".join([*words, "kut", "kon"])])
    )


NAMES = {"b": "bum", "f": "fon", "k": "kel"}


def test_names_alone_make_a_classifier(classifier: FewShotClassifier, encoder: Encoder, parameters: Parameters) -> None:
    assert classifier.fit(label_names={"k": "kel", "b": "bum", "f": "fon"}) is classifier
    assert classifier.classes_.tolist() == ["b", "f", "k"]
    assert classifier.support_ == []
    assert classifier.predict(list(NAMES.values())).tolist() == ["b", "f", "k"]
    with torch.no_grad():
        names, texts = (
            encoder.features(encoder.prepare(part), lora_factors(parameters)) for part in (list(NAMES.values()), TEXTS)
        )
    expected = (10 * texts @ names.T).softmax(1)  # the start's temperature
    np.testing.assert_allclose(classifier.predict_proba(TEXTS), expected, rtol=0, atol=1e-5)


def test_names_and_examples_together(classifier: FewShotClassifier, encoder: Encoder, parameters: Parameters) -> None:
    """Some classes have both, one a name alone, one examples alone: as evaluation has it."""
    texts, labels = [*SUPPORT[:2], SUPPORT[2], SUPPORT[4]], [2, 2, 0, 3]
    found = classifier.fit(texts, labels, label_names={2: "bum", 0: "fon", 1: "kel"}).predict_proba(TEXTS)
    assert classifier.classes_.tolist() == [0, 1, 2, 3]
    assert classifier.support_ == list(zip(texts, labels, strict=True))
    support = task_batch(encoder, [texts], [labels], [4], [["fon", "kel", "bum", None]])
    query = task_batch(encoder, [TEXTS], [[0] * 4], [4])
    with torch.no_grad():
        adapted = adapt(encoder, parameters, support, INNER)
        logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)[0]
    assert adapted.offset.any(), "it has taken steps"
    np.testing.assert_allclose(found, logits.double().softmax(-1).numpy(), rtol=0, atol=1e-5)


def test_labels_are_names_as_words(classifier: FewShotClassifier) -> None:
    texts = ["bal bel bil", "fim fon", "kut kon"]
    labels = ["balBel", "fim_fon", 7]
    found = classifier.fit(texts, labels, label_names="labels").predict_proba(TEXTS)
    named = classifier.fit(texts, labels, label_names={"balBel": "bal bel", "fim_fon": "fim fon", 7: "7"})
    np.testing.assert_array_equal(found, named.predict_proba(TEXTS))
    assert not np.allclose(found, classifier.fit(texts, labels).predict_proba(TEXTS), atol=1e-4)


@pytest.mark.parametrize("label_names", [None, {}])
def test_without_names_nothing_changes(classifier: FewShotClassifier, label_names: Any) -> None:
    expected = classifier.fit(SUPPORT, list("bbffkk")).predict_proba(TEXTS)
    found = classifier.fit(SUPPORT, list("bbffkk"), label_names=label_names).predict_proba(TEXTS)
    np.testing.assert_array_equal(found, expected)
    named = classifier.fit(SUPPORT, list("bbffkk"), label_names=NAMES).predict_proba(TEXTS)
    assert not np.allclose(named, expected, atol=1e-4)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_names_weigh_as_much_as_was_learned(encoder: Encoder, parameters: Parameters, head: Any) -> None:
    """Almost none is as if they were not there; a very large one as if there were nothing else."""
    inner = replace(INNER, steps=0, head=head)
    start = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size) | lora_of(parameters)
    found = {
        weight: FewShotClassifier(encoder, {**start, "log_name_weight": torch.tensor(weight)}, inner)
        .fit(SUPPORT, list("bbffkk"), label_names=NAMES)
        .predict_proba(TEXTS)
        for weight in (-14.0, 0.0, 14.0)
    }
    none = FewShotClassifier(encoder, start, inner).fit(SUPPORT, list("bbffkk")).predict_proba(TEXTS)
    np.testing.assert_allclose(found[-14.0], none, rtol=0, atol=1e-4)
    assert not np.allclose(found[0.0], none, atol=1e-3)
    if head == "prototype":
        alone = FewShotClassifier(encoder, start, inner).fit(label_names=NAMES).predict_proba(TEXTS)
        np.testing.assert_allclose(found[14.0], alone, rtol=0, atol=1e-4)


def lora_of(parameters: Parameters) -> Parameters:
    return {name: value for name, value in parameters.items() if name.startswith("lora.")}


@pytest.mark.parametrize("labels", [[3, 1], [2.5, "f"], [True, False]])
def test_names_of_labels_of_any_type(classifier: FewShotClassifier, labels: list) -> None:
    classifier.fit(label_names=dict(zip(labels, ["bum", "fon"], strict=True)))
    assert set(classifier.classes_.tolist()) == set(labels)
    assert classifier.predict(["bum", "fon"]).tolist() == labels
    numbers = {np.int64(3): "bum", np.int64(1): "fon"}
    assert classifier.fit(["bal"], np.array([3]), label_names=numbers).classes_.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("texts", "labels", "label_names", "message"),
    [
        ([], [], "labels", r"at least 2 classes, found 0: \[\] \(label_names 'labels' names no further ones"),
        (["bal"], ["b"], "labels", r"at least 2 classes, found 1: \['b'\] \(label_names"),
        ([], [], None, r"at least 2 classes, found 0: \[\]$"),
        ([], [], {}, r"at least 2 classes, found 0: \[\]$"),
        (["bal"], ["b"], {"b": "bum"}, r"at least 2 classes, found 1: \['b'\]$"),
        (["bal", "fim"], ["b", "f"], {"b": ""}, r"^fit, label_names of 'b': text is empty"),
        (["bal", "fim"], ["b", "f"], {"b": " \n"}, r"^fit, label_names of 'b': text is empty"),
        ([], [], {"b": "bum", "f": None}, r"^fit, label_names of 'f': text is null, expected a string"),
        ([], [], {"b": "bum", "f": 3}, r"^fit, label_names of 'f': text is int 3, expected a string"),
        ([], [], {"b": "bum", "f": "fon \ud83d"}, r"^fit, label_names of 'f': text .* is not valid Unicode"),
        (["bal", "fim"], ["", "f"], "labels", r"^fit, label_names of '': text is empty"),
        (
            ["bal", "fim"],
            [1, 2],
            {True: "bum"},
            r"^fit, label_names, key 0: label True equals 1 but is of another type",
        ),
        ([], [], {"b": "bum", None: "fon"}, r"^fit, label_names, key 1: the label is missing"),
        (["bal", "fim"], ["b", "f"], "label", r"label_names must be None, 'labels', or a mapping .* given str 'label'"),
        (["bal", "fim"], ["b", "f"], ["bum", "fon"], r"label_names must be .* given list \['bum', 'fon'\]"),
        (["bal", "fim"], ["b", "f"], np.array(["bum", "fon"]), r"label_names must be .* given ndarray"),
        (["bal", "fim"], ["b", "f"], True, r"label_names must be .* given bool True"),
        (["bal"], [], NAMES, "1 texts but 0 labels"),
    ],
)
def test_unusable_names_are_named(
    fitted: FewShotClassifier, texts: Any, labels: Any, label_names: Any, message: str
) -> None:
    expected = fitted.predict_proba(TEXTS)
    with pytest.raises(DataError, match=message):
        fitted.fit(texts, labels, label_names=label_names)
    np.testing.assert_array_equal(fitted.predict_proba(TEXTS), expected)


@pytest.mark.parametrize("include_support", [False, True])
@pytest.mark.parametrize("examples", [0, 3])
def test_classes_without_examples_can_be_saved(
    classifier: FewShotClassifier, tmp_path: Path, examples: int, include_support: bool
) -> None:
    classifier.fit(SUPPORT[:examples], list("bbf")[:examples], label_names=NAMES)
    classifier.save_pretrained(tmp_path / "adapter", include_support=include_support)
    loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    assert loaded.classes_.tolist() == ["b", "f", "k"]
    assert loaded.support_ == (classifier.support_ if include_support else None)
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    texts = [path.read_text() for path in (tmp_path / "adapter").iterdir() if path.suffix in (".json", ".md")]
    assert not any("bum" in text or "kel" in text for text in texts), "a name is no label: it stays here"


def test_no_texts_give_empty_arrays(fitted: FewShotClassifier) -> None:
    assert fitted.predict_proba([]).shape == (0, 3)
    assert fitted.predict_proba([]).dtype == np.float64
    assert fitted.predict([]).shape == (0,)
    assert fitted.predict([]).dtype == fitted.classes_.dtype


@pytest.mark.parametrize(
    "call",
    [
        lambda classifier: classifier.predict(["bal"]),
        lambda classifier: classifier.predict_proba(["bal"]),
        lambda classifier: classifier.predict([]),
        lambda classifier: classifier.score(["bal"], ["b"]),
    ],
    ids=["predict", "predict_proba", "predict nothing", "score"],
)
def test_not_fitted(classifier: FewShotClassifier, call: Callable[[FewShotClassifier], object]) -> None:
    with pytest.raises(NotFittedError, match="call fit"):
        call(classifier)


def test_classes_are_not_there_before_fit(classifier: FewShotClassifier) -> None:
    assert not hasattr(classifier, "classes_")


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("bal", ["b"], "given one string"),
        (["bal", None], ["b", "f"], "row 1: text is null"),
        (["bal", 7], ["b", "f"], "row 1: text is int 7"),
        (["bal", b"fim"], ["b", "f"], "row 1: text is bytes"),
        (["bal", ""], ["b", "f"], "row 1: text is empty"),
        ([" \n", "bal"], ["b", "f"], "row 0: text is empty"),
        (["bal", "fim"], ["b", None], "row 1: the label is missing"),
        (["bal", "fim"], [float("nan"), "b"], "row 0: the label is missing"),
        (["bal", "fim"], np.array([1.0, np.nan]), "row 1: the label is missing"),
        (["bal", "fim"], ["b", pd.NA], "row 1: label <NA> is of type NAType"),
        (["bal", "fim"], ["b", pd.NaT], "row 1: label NaT is of type NaTType"),
        (["bal", "fim"], ["b", torch.tensor(float("nan"))], "row 1: the label is missing"),
        (["bal", "fim"], ["b", ["f"]], r"row 1: label \['f'\] is of type list; labels are strings, whole numbers"),
        (["bal", "fim"], ["b", {}], "row 1: label .* is of type dict"),
        (["bal", "fim"], [("b", 1), "f"], r"row 0: label \('b', 1\) is of type tuple"),
        (["bal", "fim"], ["b", frozenset("f")], "row 1: label .* is of type frozenset"),
        (["bal", "fim"], ["b", b"f"], "row 1: label b'f' is of type bytes"),
        (["bal", "fim"], ["b", 1j], "row 1: label 1j is of type complex"),
        (["bal", "fim"], ["b", np.datetime64("2020-01-01")], "row 1: label .* is of type datetime64"),
        (["bal", "fim"], ["b", np.array([1, 2])], "row 1: label .* is of type ndarray"),
        (["bal", "fim"], np.eye(2), "row 0: label .* is of type ndarray"),
        (["bal", "fim"], torch.eye(2), "row 0: label .* is of type Tensor"),
        (["bal", "fim"], ["b"], "2 texts but 1 labels"),
        (["bal", "fim"], ["b", "f", "f"], "2 texts but 3 labels"),
        (["bal", "fim"], ["b", "b"], "at least 2 classes, found 1"),
        (["bal", "fim"], [1, True], "at least 2 classes, found 1"),
        ([], [], "at least 2 classes, found 0"),
    ],
)
def test_unusable_examples_are_named(classifier: FewShotClassifier, texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classifier.fit(texts, labels)


@pytest.mark.parametrize("texts", ["bal", ["bal", None], ["bal", 7]], ids=["string", "None", "number"])
def test_unusable_texts_to_predict_are_named(fitted: FewShotClassifier, texts: Any) -> None:
    with pytest.raises(DataError, match="one string" if isinstance(texts, str) else "row 1"):
        fitted.predict(texts)


def test_text_with_half_a_character_is_named(fitted: FewShotClassifier) -> None:
    # half of a surrogate pair, as JSON that was cut inside an emoji holds it; tokenizers cannot take it
    with pytest.raises(DataError, match="row 1"):
        fitted.predict(["bal", "fim \ud83d"])
    with pytest.raises(DataError, match="row 1"):
        fitted.fit(["bal", "fim \ud83d"], ["b", "f"])


def test_long_work_has_a_progress_bar_and_short_work_has_none(
    classifier: FewShotClassifier, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier.fit(SUPPORT, list("bbffkk")).predict(TEXTS)
    assert not capsys.readouterr().err
    for module in ("adaptation", "task_learner"):
        monkeypatch.setattr(f"textmeta.meta.{module}.BAR_AFTER", 0)
    classifier.fit(SUPPORT, list("bbffkk")).predict(TEXTS)
    shown = capsys.readouterr().err
    assert f"fit:   0%|          | 0/{INNER.steps + 1} " in shown  # the last state is wiped away
    assert "predict:   0%" in shown


def test_failed_fit_leaves_the_last_one(fitted: FewShotClassifier) -> None:
    expected = fitted.predict_proba(TEXTS)
    with pytest.raises(DataError):
        fitted.fit(["bal", "fim"], ["x", "x"])
    np.testing.assert_array_equal(fitted.predict_proba(TEXTS), expected)
    assert fitted.classes_.tolist() == ["b", "f", "k"]


def test_second_fit_does_not_depend_on_the_first(
    fitted: FewShotClassifier, encoder: Encoder, parameters: Parameters
) -> None:
    fresh = FewShotClassifier(encoder, parameters, INNER).fit(SUPPORT[2:], list("ffkk"))
    fitted.fit(SUPPORT[2:], list("ffkk"))
    np.testing.assert_array_equal(fitted.predict_proba(TEXTS), fresh.predict_proba(TEXTS))
    assert fitted.classes_.tolist() == ["f", "k"]


def test_fit_does_not_change_the_initialisation(encoder: Encoder, parameters: Parameters) -> None:
    before = {name: value.clone() for name, value in parameters.items()}
    classifier = FewShotClassifier(encoder, parameters, INNER).fit(SUPPORT, list("bbffkk"))
    assert all(torch.equal(parameters[name], value) for name, value in before.items())
    assert all(torch.equal(classifier._parameters[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in parameters.values())


def test_fit_adapts(fitted: FewShotClassifier, encoder: Encoder, parameters: Parameters) -> None:
    unadapted = FewShotClassifier(encoder, parameters, InnerLoopSettings(steps=0)).fit(SUPPORT, list("bbffkk"))
    assert not np.allclose(fitted.predict_proba(TEXTS), unadapted.predict_proba(TEXTS), atol=1e-4)


def test_one_example_of_each_class(classifier: FewShotClassifier) -> None:
    texts = ["bal bel bil", "fim fon", "kut kon"]
    assert classifier.fit(texts, ["b", "f", "k"]).predict(texts).tolist() == ["b", "f", "k"]
    assert np.isfinite(classifier.predict_proba(TEXTS)).all()


def test_classes_of_different_size(classifier: FewShotClassifier) -> None:
    classifier.fit([*SUPPORT[:4], "kut kon"], ["b", "b", "b", "b", "k"])
    assert classifier.predict(["kut kon"]).tolist() == ["k"]
    assert np.isfinite(classifier.predict_proba(TEXTS)).all()


def test_same_text_twice_and_in_two_classes(classifier: FewShotClassifier) -> None:
    classifier.fit(["bal", "bal", "bal", "fim"], ["b", "b", "f", "f"])
    assert np.isfinite(classifier.predict_proba(TEXTS)).all()


def test_many_classes(classifier: FewShotClassifier, corpus: Corpus) -> None:
    texts = list(corpus.texts[:50])
    classifier.fit(texts, range(50))
    assert classifier.predict_proba(texts[:3]).shape == (3, 50)
    assert classifier.predict(texts).tolist() == list(range(50))


def test_score_is_the_share_that_is_right(fitted: FewShotClassifier) -> None:
    texts = ["bal bel bil", "fim fon", "kut kon", "kel kas kim"]
    predicted = fitted.predict(texts).tolist()
    assert fitted.score(texts, predicted) == 1.0
    assert fitted.score(texts, [*predicted[:3], "other"]) == 0.75
    assert fitted.score(texts, ["other"] * 4) == 0.0
    assert isinstance(fitted.score(texts, predicted), float)


@pytest.mark.parametrize(("texts", "labels"), [(["bal"], ["b", "f"]), ([], [])], ids=["lengths", "nothing"])
def test_score_of_unequal_lengths_or_nothing_is_an_error(
    fitted: FewShotClassifier, texts: list[str], labels: list[str]
) -> None:
    with pytest.raises(DataError, match=f"{len(texts)} texts but {len(labels)} labels"):
        fitted.score(texts, labels)


def test_saved_classifier_gives_the_same_answers(fitted: FewShotClassifier, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "adapter")
    loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    assert loaded.classes_.tolist() == fitted.classes_.tolist()
    # and it can be fitted again, from the same initialisation
    loaded.fit(SUPPORT[2:], list("ffkk"))
    fitted.fit(SUPPORT[2:], list("ffkk"))
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), fitted.predict_proba(TEXTS))


def test_saved_classifier_gives_the_same_answers_in_another_process(fitted: FewShotClassifier, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "adapter")
    command = [sys.executable, __file__, str(tmp_path / "adapter")]
    # as many threads as here: sums are split over threads, and round differently with another number
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # JSON holds the shortest digits that give the same number back
    np.testing.assert_array_equal(np.array(json.loads(done.stdout.splitlines()[-1])), fitted.predict_proba(TEXTS))


def test_classifier_that_is_not_fitted_can_be_saved(
    classifier: FewShotClassifier, fitted: FewShotClassifier, encoder: Encoder, parameters: Parameters, tmp_path: Path
) -> None:
    FewShotClassifier(encoder, parameters, INNER).save_pretrained(tmp_path / "adapter")
    loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    with pytest.raises(NotFittedError):
        loaded.predict(["bal"])
    loaded.fit(SUPPORT, list("bbffkk"))
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), fitted.predict_proba(TEXTS))


@pytest.mark.parametrize(
    "labels",
    [
        ["b", "f"],
        [2, 1],
        [True, False],
        [0.1, 1e300],
        ["b", 1],
        [1, 2.5],
        [True, "True"],
        ["ünï\0\n", "\u2028"],
        [float("inf"), 1.0],
    ],
    ids=["str", "int", "bool", "float", "mixed", "int, float", "bool, str", "unusual", "inf"],
)
def test_labels_come_back_from_a_folder(classifier: FewShotClassifier, tmp_path: Path, labels: list) -> None:
    texts = ["bal bel bil", "fim fon"]
    classifier.fit(texts, labels).save_pretrained(tmp_path / "adapter")
    loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    assert loaded.classes_.dtype == classifier.classes_.dtype
    assert repr(loaded.predict(texts).tolist()) == repr(labels)


def test_texts_of_fit_are_not_stored(classifier: FewShotClassifier, tmp_path: Path) -> None:
    classifier.fit(["bal secretword", "fim fon"], ["b", "f"]).save_pretrained(tmp_path / "adapter")
    assert not any(b"secretword" in path.read_bytes() for path in (tmp_path / "adapter").iterdir())


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere"):
        FewShotClassifier.from_pretrained(tmp_path / "nowhere")


def test_predictions_do_not_fill_the_cache(fitted: FewShotClassifier, encoder: Encoder) -> None:
    before = set(encoder._states_cache._tensors)
    fitted.predict(["bal never seen before", "another new text"])
    assert set(encoder._states_cache._tensors) == before


def test_threads_that_share_an_encoder_do_not_mix_their_tasks(
    encoder: Encoder, parameters: Parameters, corpus: Corpus
) -> None:
    classifiers = []
    for first in (0, 3, 6, 9):
        texts, labels, _, _ = task(corpus, [f"class{number}" for number in range(first, first + 3)], 4)
        classifiers.append(FewShotClassifier(encoder, parameters, INNER).fit(texts, labels))
    queries = list(corpus.texts[::4])
    alone = [classifier.predict_proba(queries) for classifier in classifiers]
    assert not np.allclose(alone[0], alone[1], atol=1e-3)
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i, pool.submit(classifiers[i].predict_proba, queries)) for _ in range(5) for i in range(4)]
        for i, job in jobs:
            np.testing.assert_allclose(job.result(), alone[i], rtol=0, atol=1e-6)


def test_threads_that_share_an_encoder_can_fit(encoder: Encoder, parameters: Parameters, corpus: Corpus) -> None:
    tasks = [task(corpus, [f"class{number}" for number in range(first, first + 3)], 4) for first in (0, 3, 6, 9)]
    queries = list(corpus.texts[::8])

    def run(number: int) -> np.ndarray:
        texts, labels, _, _ = tasks[number]
        return FewShotClassifier(encoder, parameters, INNER).fit(texts, labels).predict_proba(queries)

    alone = [run(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(run, range(4)), alone, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_labels_that_are_equal_but_of_other_types_are_refused(classifier: FewShotClassifier) -> None:
    with pytest.raises(DataError, match="row 1: label 1 equals True"):
        classifier.fit(["bal", "bel", "dil"], [True, 1, 2])


@pytest.mark.parametrize(
    "inner",
    [
        replace(INNER, head="ridge"),
        replace(INNER, step_sizes="tensor", adapt=("lora_A", "lora_B", "offset")),
        replace(INNER, step_sizes="layer", max_gradient_norm=1.0),
        replace(INNER, adapt=("offset",), normalise=False, offset_step_size=0.5),
    ],
    ids=["ridge", "tensor", "layer", "offset"],
)
def test_every_inner_loop_classifies_and_comes_back(
    inner: InnerLoopSettings, encoder: Encoder, plain: Corpus, tmp_path: Path
) -> None:
    start = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    texts, labels, queries, true = task(plain, list(plain.class_names), 6)
    fitted = FewShotClassifier(encoder, start, inner).fit(texts, labels)
    assert fitted.score(queries, true) > 0.6  # of 5 classes
    fitted.save_pretrained(tmp_path)
    loaded = FewShotClassifier.from_pretrained(tmp_path)
    assert np.array_equal(loaded.predict_proba(queries), fitted.predict_proba(queries))
    again = FewShotClassifier.from_pretrained(tmp_path).fit(texts, labels)
    np.testing.assert_array_equal(again.predict_proba(queries), fitted.predict_proba(queries))


# Task encoders


@pytest.fixture(scope="module")
def task_parameters(encoder: Encoder) -> Parameters:
    """An initialisation in which task encoder, memory and temperature have a say."""
    start = start_parameters(encoder.factor_shapes, CONDITIONED, encoder.hidden_size)
    generator = torch.Generator().manual_seed(0)
    learned = (".lora_B.", "task_temperature", "task_encoder.task")
    return {
        name: value + 0.2 * torch.randn(value.shape, generator=generator) if any(p in name for p in learned) else value
        for name, value in start.items()
    }


@pytest.fixture
def conditioned(encoder: Encoder, task_parameters: Parameters, plain: Corpus, corpus: Corpus) -> FewShotClassifier:
    known = index_tasks(encoder, [corpus, plain])
    return FewShotClassifier(encoder, task_parameters, CONDITIONED, {}, known)


def test_task_embedding_is_of_the_fitted_task(conditioned: FewShotClassifier, fitted: FewShotClassifier) -> None:
    assert fitted.task_embedding_ is None, "of an adapter without a task encoder"
    assert conditioned.task_embedding_ is None, "before fit"
    found = conditioned.fit(SUPPORT, list("kkffbb")).task_embedding_
    assert found is not None
    assert found.labels == ("b", "f", "k") == tuple(conditioned.classes_)
    assert (found.vector.shape, found.classes.shape) == ((8,), (3, 32))
    np.testing.assert_allclose(np.linalg.norm(found.classes, axis=1), 1, atol=1e-5)
    assert similarity(found, found) == pytest.approx(1, abs=1e-5)


def test_classes_without_examples_have_a_place_in_the_task(
    conditioned: FewShotClassifier, encoder: Encoder, tmp_path: Path
) -> None:
    whole = conditioned.fit(SUPPORT, list("bbffkk")).task_embedding_
    named = conditioned.fit(SUPPORT, list("bbffkk"), label_names=NAMES).task_embedding_
    mixed = conditioned.fit(SUPPORT[:4], list("bbff"), label_names=NAMES).task_embedding_
    zero = conditioned.fit(label_names=NAMES).task_embedding_
    assert whole is not None
    assert named is not None
    assert mixed is not None
    assert zero is not None
    np.testing.assert_allclose(named.vector, whole.vector, rtol=0, atol=1e-6)
    np.testing.assert_allclose(mixed.classes[:2], whole.classes[:2], rtol=0, atol=1e-6)
    names = encoder.frozen_features(list(NAMES.values())).numpy()
    np.testing.assert_allclose(mixed.classes[2], names[2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(zero.classes, names, rtol=0, atol=1e-6)
    assert {match.label for match in conditioned.nearest_tasks()[0].matches} == {"b", "f", "k"}
    conditioned.save_pretrained(tmp_path / "adapter")
    loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter").task_embedding_
    assert loaded is not None
    np.testing.assert_array_equal(loaded.classes, zero.classes)


def test_order_of_examples_and_classes_does_not_matter_to_the_task(
    conditioned: FewShotClassifier, corpus: Corpus
) -> None:
    texts, labels, queries, _ = task(corpus, ["class1", "class5", "class8"], 4)
    one, expected = conditioned.fit(texts, labels).task_embedding_, conditioned.predict_proba(queries)
    order = np.random.default_rng(0).permutation(len(texts))
    renamed = {"class1": "z", "class5": "y", "class8": "x"}  # the other way round
    conditioned.fit([texts[row] for row in order], [renamed[labels[row]] for row in order])
    two = conditioned.task_embedding_
    assert one is not None
    assert two is not None
    np.testing.assert_allclose(two.vector, one.vector, rtol=0, atol=1e-5)
    np.testing.assert_allclose(two.classes[::-1], one.classes, rtol=0, atol=1e-5)
    assert similarity(one, two) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(conditioned.predict_proba(queries)[:, ::-1], expected, rtol=0, atol=1e-4)


def test_conditioned_classifier_does_what_training_and_evaluation_do(
    conditioned: FewShotClassifier, encoder: Encoder, task_parameters: Parameters, corpus: Corpus
) -> None:
    for names, shots in ((["class1", "class5"], 1), (["class0", "class2", "class9"], 5)):
        texts, labels, queries, true = task(corpus, names, shots)
        support, query = (
            task_batch(encoder, [part], [[names.index(name) for name in given]], [len(names)])
            for part, given in ((texts, labels), (queries, true))
        )
        with torch.no_grad():
            adapted = adapt(encoder, task_parameters, support, CONDITIONED)
            logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)[0]
        usual = head_scalars(task_parameters)["temperature"]
        assert not torch.allclose(adapted.scalars["temperature"], usual, rtol=1e-2), "the task has its own"
        expected = logits.double().softmax(-1).numpy()
        found = conditioned.fit(texts, labels).predict_proba(queries)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["folder", "hub"])
def test_conditioned_classifier_comes_back_to_the_bit(
    conditioned: FewShotClassifier, hub: HubServer, tiny_model: str, corpus: Corpus, tmp_path: Path, way: str
) -> None:
    conditioned.fit(SUPPORT, list("bbffkk"))
    if way == "hub":
        hub.add_repo("lab/tiny", {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
        conditioned.push_to_hub("tester/mine", token=TOKEN, base_model="lab/tiny")
        assert {"tasks.json", "tasks.safetensors"} <= hub.files("tester/mine").keys()
        loaded = FewShotClassifier.from_pretrained("tester/mine")
    else:
        conditioned.save_pretrained(tmp_path / "adapter")
        loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    queries = [*TEXTS, *corpus.texts[::9]]
    np.testing.assert_array_equal(loaded.predict_proba(queries), conditioned.predict_proba(queries))
    ours, theirs = conditioned.task_embedding_, loaded.task_embedding_
    assert ours is not None
    assert theirs is not None
    np.testing.assert_array_equal(theirs.vector, ours.vector)
    np.testing.assert_array_equal(theirs.classes, ours.classes)
    assert theirs.labels == ours.labels
    assert loaded.nearest_tasks() == conditioned.nearest_tasks()
    loaded.fit(SUPPORT[:4], list("bbff"))
    conditioned.fit(SUPPORT[:4], list("bbff"))
    np.testing.assert_array_equal(loaded.predict_proba(queries), conditioned.predict_proba(queries))


def test_index_without_a_fitted_task_is_kept(conditioned: FewShotClassifier, tmp_path: Path) -> None:
    conditioned.save_pretrained(tmp_path / "adapter")
    loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    assert loaded.known_tasks_ is not None
    assert dict(loaded.known_tasks_.classes).keys() == {"toy", "plain"}
    with pytest.raises(NotFittedError, match="not been fitted"):
        loaded.nearest_tasks()


def test_nearest_task_is_of_the_corpus_that_the_examples_are_from(
    conditioned: FewShotClassifier, plain: Corpus, corpus: Corpus
) -> None:
    for known, names in ((plain, ["b", "f", "k"]), (corpus, ["class1", "class5", "class8"])):
        texts, labels, _, _ = task(known, names, 12)
        nearest, other = conditioned.fit(texts, labels).nearest_tasks()
        assert nearest.corpus == known.name
        assert other.similarity < nearest.similarity <= 1 + 1e-5
        assert {match.label for match in nearest.matches} == set(names)
        assert len(conditioned.nearest_tasks(1)) == 1
    assert {match.known: match.label for match in nearest.matches} == {name: name for name in names}


def test_nearest_tasks_need_a_task_encoder_and_an_index(
    fitted: FewShotClassifier, encoder: Encoder, task_parameters: Parameters
) -> None:
    with pytest.raises(AdapterError, match=r"no task encoder.*meta-trained with inner\.conditioning"):
        fitted.nearest_tasks()
    with pytest.raises(AdapterError, match=r"no index of the tasks.*index_rows over 0, or give known_tasks"):
        FewShotClassifier(encoder, task_parameters, CONDITIONED).fit(SUPPORT, list("bbffkk")).nearest_tasks()


if __name__ == "__main__":
    print(json.dumps(FewShotClassifier.from_pretrained(sys.argv[1]).predict_proba(TEXTS).tolist()))


@pytest.mark.parametrize("value", [300.0, -300.0])
def test_a_head_that_is_not_finite_is_an_error(value: float, encoder: Encoder, task_parameters: Parameters) -> None:
    broken = {**task_parameters, "task_temperature": torch.full_like(task_parameters["task_temperature"], value)}
    classifier = FewShotClassifier(encoder, broken, CONDITIONED)
    with pytest.raises(AdapterError, match="not finite, or a temperature of"):
        classifier.fit(SUPPORT, list("kkffbb"))
    with pytest.raises(NotFittedError):
        classifier.predict(["bal"])
