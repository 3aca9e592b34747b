"""What is out of scope: scores, rejection, and the rule's way through a folder; and the adapter by default."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.artifact.test_store import rewrite_tensors
from textmeta import FewShotClassifier
from textmeta.artifact import locate
from textmeta.artifact.store import load_adapter, save_adapter
from textmeta.errors import AdapterError, DataError, HubError, NotFittedError, SettingsError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import SCOPE, TEMPERATURE_SLOPES, Parameters, lora_factors
from textmeta.model.lora import LoraSettings

INNER = InnerLoopSettings(steps=0)
RULE = torch.tensor([4.0, 3.0, 2.0, -5.0, 0.3, 0.5, -0.4, -1.0])
SUPPORT = ["bal bel bil", "bam ben", "fim fon", "fal fel fil fol", "kut kon", "kel kas kim"]
LABELS = list("bbffkk")
TEXTS = ["bal bel", "fim fon gur dal kes", "bal", "kut kut dal fim bel bol bun bam ban", "dis dur", ""]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder(tiny_model: str) -> Encoder:
    return Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4))


@pytest.fixture(scope="module")
def parameters(encoder: Encoder) -> Parameters:
    """Of an adapter with LoRA, a temperature for each size of task, and a rule."""
    start = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size)
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) if ".lora_B." in name else value
        for name, value in start.items()
    }
    return {**moved, TEMPERATURE_SLOPES: torch.tensor([0.3, -0.2]), SCOPE: RULE}


@pytest.fixture
def classifier(encoder: Encoder, parameters: Parameters) -> FewShotClassifier:
    return FewShotClassifier(encoder, parameters, INNER)


@pytest.fixture
def fitted(classifier: FewShotClassifier) -> FewShotClassifier:
    return classifier.fit(SUPPORT, LABELS)


def without_rule(encoder: Encoder, parameters: Parameters) -> FewShotClassifier:
    rest = {name: value for name, value in parameters.items() if name != SCOPE}
    return FewShotClassifier(encoder, rest, INNER).fit(SUPPORT, LABELS)


def cosines(encoder: Encoder, parameters: Parameters, support: list[str], labels: list[str]) -> tuple[np.ndarray, ...]:
    """Return cosines (n, C) of TEXTS to class means, and those of the examples to their own class without them."""
    with torch.no_grad():
        factors = lora_factors(parameters)
        features, texts = (encoder.features(encoder.prepare(part), factors).numpy() for part in (support, TEXTS))
    classes = np.array([[label == name for label in labels] for name in sorted(set(labels))], dtype=float)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    own = []
    for row, label in enumerate(labels):
        others = [i for i, other in enumerate(labels) if other == label and i != row]
        own += [features[row] @ unit(features[others].sum(0))] if others else []
    return texts @ unit(classes @ features).T, np.array(own)


@pytest.mark.parametrize("shots", [1, 2])
def test_score_is_the_formula(
    classifier: FewShotClassifier, encoder: Encoder, parameters: Parameters, shots: int
) -> None:
    support, labels = (SUPPORT, LABELS) if shots == 2 else (SUPPORT[::2], LABELS[::2])
    found = classifier.fit(support, labels).scope_score(TEXTS)
    products, own = cosines(encoder, parameters, support, labels)
    temperature = 10 * np.exp(0.3 * np.log(shots) - 0.2 * np.log(3 / 5))
    energy = np.log(np.exp(temperature * products).sum(1)) / temperature
    largest = np.sort(products, axis=1)
    inputs = [largest[:, -1], largest[:, -1] - largest[:, -2], energy]
    of_task = [own.mean() if shots > 1 else 0.0, float(shots > 1), np.log(shots), np.log(3 / 5)]
    assert len(own) == (6 if shots > 1 else 0)
    total = sum(weight * part for weight, part in zip(RULE.tolist(), [*inputs, *of_task, 1.0], strict=True))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-total)), rtol=1e-4, atol=1e-6)
    assert found.dtype == np.float64
    expected = np.exp(temperature * products) / np.exp(temperature * products).sum(1, keepdims=True)
    np.testing.assert_allclose(classifier.predict_proba(TEXTS), expected, rtol=1e-4, atol=1e-6)


def test_scores_are_probabilities_of_each_text_alone(
    fitted: FewShotClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = fitted.scope_score(TEXTS)
    assert scores.shape == (len(TEXTS),)
    assert ((scores > 0) & (scores < 1)).all()
    assert len(set(scores.round(4))) > 3
    alone = np.concatenate([fitted.scope_score([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, scores, rtol=0, atol=1e-6)
    monkeypatch.setattr("textmeta.meta.task_learner.CHUNK", 2)
    np.testing.assert_allclose(fitted.scope_score(TEXTS), scores, rtol=0, atol=1e-6)
    empty = fitted.scope_score([])
    assert (empty.shape, empty.dtype) == ((0,), np.float64)


def between(scores: np.ndarray) -> float:
    """Return a threshold that rejects some, and is none of the scores."""
    ordered = np.sort(scores)
    return float(ordered[2] + ordered[3]) / 2


def test_what_is_below_the_number_is_rejected(fitted: FewShotClassifier) -> None:
    scores, plain = fitted.scope_score(TEXTS), fitted.predict(TEXTS)
    threshold = between(scores)
    for outside in (None, "none of these"):
        found = fitted.predict(TEXTS, reject=threshold, outside=outside)
        expected = [outside if score < threshold else label for score, label in zip(scores, plain, strict=True)]
        assert found.tolist() == expected
        assert found.shape == (len(TEXTS),)
    assert fitted.predict(TEXTS, reject=threshold).tolist().count(None) == 3
    assert fitted.predict(TEXTS, reject=0.0).tolist() == fitted.predict(TEXTS, reject=0).tolist() == plain.tolist()
    assert fitted.predict(TEXTS, reject=np.float32(1)).tolist() == [None] * len(TEXTS), "a number of numpy"
    assert fitted.predict(TEXTS, reject=1.0).tolist() == fitted.predict(TEXTS, reject=1).tolist() == [None] * len(TEXTS)
    assert fitted.predict([], reject=True).shape == (0,)
    for reject in (True, False):
        assert fitted.predict(TEXTS, reject=np.bool_(reject)).tolist() == fitted.predict(TEXTS, reject=reject).tolist()


@pytest.mark.parametrize("constant", [-30.0, 30.0])
def test_true_is_one_half(encoder: Encoder, parameters: Parameters, constant: float) -> None:
    rule = torch.cat([RULE[:-1], torch.tensor([constant])])
    fitted = FewShotClassifier(encoder, {**parameters, SCOPE: rule}, INNER).fit(SUPPORT, LABELS)
    found, plain = fitted.predict(TEXTS, reject=True), fitted.predict(TEXTS)
    assert found.tolist() == ([None] * len(TEXTS) if constant < 0 else plain.tolist())
    middle = FewShotClassifier(encoder, {**parameters, SCOPE: 0 * RULE}, INNER).fit(SUPPORT, LABELS)
    assert middle.predict(TEXTS, reject=True).tolist() == middle.predict(TEXTS).tolist(), "0.5 is not below it"


def test_false_changes_nothing(fitted: FewShotClassifier, encoder: Encoder, parameters: Parameters) -> None:
    found = fitted.predict(TEXTS, reject=False, outside="x")
    assert found.dtype == fitted.classes_.dtype
    assert found.tolist() == fitted.predict(TEXTS).tolist()
    assert found.tolist() == without_rule(encoder, parameters).predict(TEXTS).tolist()


@pytest.mark.parametrize("reject", [-0.1, 1.1, 2, float("nan"), float("inf"), None, "0.5", [0.5]])
def test_unusable_threshold_is_named(fitted: FewShotClassifier, reject: Any) -> None:
    with pytest.raises(DataError, match=r"reject must be True, False or a number from 0 to 1, given "):
        fitted.predict(TEXTS, reject=reject)


@pytest.mark.parametrize(
    ("labels", "outside"),
    [
        ([3, 1, 2], None),
        ([3, 1, 2], -1),
        ([True, "b", 2.5], "outside"),
        (["b", "f", "k"], ("none",)),
        ([1, "1", 2.5], 0),
        (["b", "f", "k"], frozenset()),
    ],
    ids=["int, None", "int", "mixed", "str, tuple", "int and str", "str, set"],
)
def test_labels_keep_their_type_beside_what_is_rejected(
    classifier: FewShotClassifier, labels: list, outside: Any
) -> None:
    classifier.fit(SUPPORT, [label for label in labels for _ in range(2)])
    plain, scores = classifier.predict(TEXTS).tolist(), classifier.scope_score(TEXTS)
    threshold = between(scores)
    found = classifier.predict(TEXTS, reject=threshold, outside=outside)
    expected = [outside if score < threshold else label for score, label in zip(scores, plain, strict=True)]
    assert found.shape == (len(TEXTS),)
    assert repr(found.tolist()) == repr(expected)


def test_an_adapter_without_a_rule_says_what_to_do(encoder: Encoder, parameters: Parameters) -> None:
    fitted = without_rule(encoder, parameters)
    for call in (lambda: fitted.scope_score(TEXTS), lambda: fitted.predict(TEXTS, reject=0.3)):
        with pytest.raises(AdapterError, match=r"no rule for what is out of scope: calibrate it .*minilm-general"):
            call()


def test_scores_need_a_fitted_task_and_texts(classifier: FewShotClassifier) -> None:
    with pytest.raises(NotFittedError, match="call fit"):
        classifier.scope_score(TEXTS)
    with pytest.raises(NotFittedError, match="call fit"):
        classifier.predict(TEXTS, reject=True)
    with pytest.raises(DataError, match="row 1"):
        classifier.fit(SUPPORT, LABELS).scope_score(["bal", None])  # type: ignore[list-item]


def test_the_rule_comes_back_to_the_bit(fitted: FewShotClassifier, parameters: Parameters, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "adapter")
    loaded = FewShotClassifier.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded._parameters[SCOPE], RULE)
    assert torch.equal(loaded._parameters[TEMPERATURE_SLOPES], parameters[TEMPERATURE_SLOPES])
    np.testing.assert_array_equal(loaded.scope_score(TEXTS), fitted.scope_score(TEXTS))
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    loaded.fit(SUPPORT[:4], LABELS[:4])
    fitted.fit(SUPPORT[:4], LABELS[:4])
    np.testing.assert_array_equal(loaded.scope_score(TEXTS), fitted.scope_score(TEXTS))
    loaded.save_pretrained(tmp_path / "again")
    again = FewShotClassifier.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(again.scope_score(TEXTS), fitted.scope_score(TEXTS))


def test_no_rule_comes_back_as_none(encoder: Encoder, parameters: Parameters, tmp_path: Path) -> None:
    without_rule(encoder, parameters).save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert SCOPE not in adapter.parameters
    assert adapter.fitted is not None
    assert adapter.fitted.scope is None


@pytest.mark.parametrize("value", [torch.ones(7), torch.ones(9), torch.ones(8, 1), torch.ones(()), torch.empty(0)])
def test_rule_of_another_shape_is_refused(fitted: FewShotClassifier, tmp_path: Path, value: torch.Tensor) -> None:
    fitted.save_pretrained(tmp_path / "adapter")
    rewrite_tensors(tmp_path / "adapter", "textmeta.safetensors", lambda found: found.update(scope=value))
    with pytest.raises(AdapterError, match=r"textmeta\.safetensors: expected tensors .*'scope': \(8,\)"):
        load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    "value", [None, torch.ones(3), torch.ones(5), torch.ones(8), torch.ones(4, 1), torch.ones(())], ids=range(6)
)
def test_task_rule_of_another_shape_is_refused(fitted: FewShotClassifier, tmp_path: Path, value: Any) -> None:
    fitted.save_pretrained(tmp_path / "adapter")

    def change(found: dict[str, torch.Tensor]) -> None:
        del found["scope"]
        found.update({} if value is None else {"scope": value})

    rewrite_tensors(tmp_path / "adapter", "classifier.safetensors", change)
    with pytest.raises(AdapterError, match=r"classifier\.safetensors: scope has shape .*, expected \(4,\)"):
        load_adapter(tmp_path / "adapter")


# FewShotClassifier()


@pytest.fixture
def shipped(encoder: Encoder, parameters: Parameters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(locate, "SHIPPED", tmp_path / "adapters")
    folder = tmp_path / "adapters" / "minilm-general"
    save_adapter(folder, encoder, parameters, INNER, {"episodes": 7})
    return folder


@pytest.mark.usefixtures("shipped")
def test_without_arguments_it_has_the_shipped_adapter(fitted: FewShotClassifier, tmp_path: Path) -> None:
    found = FewShotClassifier()
    np.testing.assert_array_equal(found.fit(SUPPORT, LABELS).predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    np.testing.assert_array_equal(found.scope_score(TEXTS), fitted.scope_score(TEXTS))
    found.save_pretrained(tmp_path / "again")
    assert load_adapter(tmp_path / "again").record == {"episodes": 7}
    named = FewShotClassifier.from_pretrained("textmeta/minilm-general").fit(SUPPORT, LABELS)
    np.testing.assert_array_equal(named.predict_proba(TEXTS), fitted.predict_proba(TEXTS))


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("missing", ["encoder", "parameters", "inner"])
def test_some_of_its_arguments_are_not_enough(encoder: Encoder, parameters: Parameters, missing: str) -> None:
    given: dict[str, Any] = {"encoder": encoder, "parameters": parameters, "inner": INNER}
    rest = {name: value for name, value in given.items() if name != missing}
    for part in (rest, {missing: given[missing]}):
        with pytest.raises(SettingsError, match="needs encoder, parameters and inner, or none of them"):
            FewShotClassifier(**part)


def test_where_none_is_shipped_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "SHIPPED", tmp_path)
    with pytest.raises((AdapterError, HubError), match="textmeta/minilm-general"):
        FewShotClassifier()
