"""A classifier as ONNX: what it answers, with textmeta and without, and what it refuses."""

import copy
import json
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from tests.conftest import WORDS, save_tiny_model
from tests.encoder.given import FAMILIES, UNSPLIT, save_family
from tests.given import LABELS, NAMES, SUPPORT, TEXTS, Patch, adapter_of
from textmeta import Adapter, FewShotClassifier
from textmeta.encoder.pretrained import CARRIED_PACKAGE
from textmeta.errors import AdapterError, DataError, EncoderError, SettingsError
from textmeta.export import graph
from textmeta.meta.learner import TaskLearner

EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_predict.py"
# The first words are of the classes; of every length up to where they are cut, and in any order.
MANY = [" ".join(WORDS[start : start + 1 + start * 11 % 40]) for start in range(60)]
OWN = ("deberta-v3", "modernbert", "eurobert")  # the others are exported as one of these, or as BERT


@pytest.fixture(scope="module")
def fitted(adapter: Adapter) -> FewShotClassifier:
    return FewShotClassifier(adapter).fit(SUPPORT, LABELS, label_names=NAMES)


@pytest.fixture(scope="module")
def folder(fitted: FewShotClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That classifier as ONNX."""
    fitted.export_onnx(made := tmp_path_factory.mktemp("onnx") / "made")
    return made


def load(folder: Path, **settings: Any) -> Any:
    return FewShotClassifier.from_pretrained(folder, backend="onnx", **settings)


def exported(classifier: FewShotClassifier, folder: Path, **how: Any) -> Any:
    classifier.export_onnx(folder, **how)
    return load(folder)


@pytest.mark.filterwarnings("ignore:predict. .* texts are cut")
@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_it_answers_as_the_classifier_does(fitted: FewShotClassifier, folder: Path, batch_size: int) -> None:
    found, texts = load(folder, batch_size=batch_size), MANY + TEXTS
    for ask in ("predict_proba", "predict_log_proba", "decision_function", "scope_score"):
        np.testing.assert_allclose(getattr(found, ask)(texts), getattr(fitted, ask)(texts), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.predict(texts), fitted.predict(texts))
    reject = float(np.median(fitted.scope_score(texts))) + 1e-6
    rejected = found.predict(texts, reject=reject, outside="none")
    assert 0 < (rejected == "none").sum() < len(texts)
    np.testing.assert_array_equal(rejected, fitted.predict(texts, reject=reject, outside="none"))
    assert [label for label, _ in found.predict_top(TEXTS[0], 2)[0]] == [
        label for label, _ in fitted.predict_top(TEXTS[0], 2)[0]
    ]
    assert found.score(SUPPORT, LABELS) == fitted.score(SUPPORT, LABELS)
    np.testing.assert_array_equal(found.classes_, fitted.classes_)


def test_labels_come_back_as_given_and_the_folder_is_replaced(folder: Path, adapter: Adapter, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "onnx")
    fitted = FewShotClassifier(adapter).fit(SUPPORT, [True, 0.5, float("inf")] * 2)
    found, expected = exported(fitted, tmp_path / "onnx").predict(TEXTS), fitted.predict(TEXTS)
    assert [(label, type(label)) for label in found.tolist()] == [(label, type(label)) for label in expected.tolist()]
    assert found.dtype == expected.dtype
    names = sorted(path.name for path in (tmp_path / "onnx").iterdir())
    assert names == ["SHA256SUMS", "model.onnx", "onnx.json", "tokenizer.json"]


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=[pytest.mark.slow] * (one not in OWN)) for one in FAMILIES],
)
def test_encoders_of_every_family(family: str, tmp_path: Path) -> None:
    model = save_family(tmp_path / "model", family)
    if family in UNSPLIT:
        fitted = FewShotClassifier(adapter=None, encoder=model, max_length=32).fit(SUPPORT, LABELS)
    else:
        fitted = FewShotClassifier(adapter_of(model)).fit(SUPPORT, LABELS)
    found, texts = exported(fitted, tmp_path / "onnx"), [*TEXTS, " ".join(WORDS[:24])]
    np.testing.assert_allclose(found.predict_proba(texts), fitted.predict_proba(texts), atol=1e-5)


def test_texts_read_in_windows(adapter: Adapter, tmp_path: Path) -> None:
    own = replace(adapter, encoder=replace(adapter.encoder, long_texts="window"))
    fitted = FewShotClassifier(own).fit(SUPPORT, LABELS)
    texts = [" ".join(WORDS[:90]), "bal", " ".join(WORDS[40:140]), *TEXTS]
    found = exported(fitted, tmp_path / "onnx")
    np.testing.assert_allclose(found.predict_proba(texts), fitted.predict_proba(texts), atol=1e-5)
    printed = without_torch(tmp_path / "onnx", texts)
    np.testing.assert_allclose([row["probability"] for row in printed], fitted.predict_proba(texts).max(1), atol=1e-5)


@pytest.mark.parametrize(("adapt", "int8"), [("pooling+lora", True), ("lora", False)])
def test_whatever_was_adapted(adapt: str, int8: bool, tiny_model: str, tmp_path: Path) -> None:
    adapter = adapter_of(tiny_model, adapt=adapt)
    fitted = FewShotClassifier(adapter).fit(SUPPORT, LABELS)
    found = exported(fitted, tmp_path / "onnx", int8=int8)
    np.testing.assert_allclose(found.predict_proba(TEXTS), fitted.predict_proba(TEXTS), atol=0.15 if int8 else 1e-5)
    plain = FewShotClassifier(adapter, adapt="none").fit(SUPPORT, LABELS)
    assert not np.allclose(fitted.predict_proba(TEXTS), plain.predict_proba(TEXTS), atol=1e-3)


def test_without_examples_or_a_rule_and_with_unlabelled_texts(tiny_model: str, tmp_path: Path) -> None:
    fitted = FewShotClassifier(adapter_of(tiny_model, scope=None)).fit(label_names=NAMES, unlabelled=TEXTS[:-1])
    found = exported(fitted, tmp_path / "onnx", int8=True)
    np.testing.assert_allclose(found.predict_proba(TEXTS), fitted.predict_proba(TEXTS), atol=0.1)
    with pytest.raises(AdapterError, match="no rule for what is out of scope"):
        found.predict(TEXTS, reject=True)


def test_a_prompt_and_the_first_token(tmp_path: Path) -> None:
    model = Path(save_family(tmp_path / "model", "bert"))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    told = {"prompts": {"q": "bal bel "}, "default_prompt_name": "q"}
    (model / "config_sentence_transformers.json").write_text(json.dumps(told))
    fitted = FewShotClassifier(adapter=None, encoder=str(model), max_length=32).fit(SUPPORT, LABELS)
    assert fitted._learner.reader.encoder.prompt
    assert fitted._learner.reader.encoder.first_token
    found = exported(fitted, tmp_path / "onnx")
    np.testing.assert_allclose(found.predict_proba(TEXTS), fitted.predict_proba(TEXTS), atol=1e-5)


def test_texts_are_checked_and_warned_of_alike(fitted: FewShotClassifier, folder: Path) -> None:
    found, told = load(folder), []
    for one in (fitted, found):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one.predict(["bal", " ".join(WORDS[:50]), "xyz zyx yzx"])
        told.append([str(warning.message) for warning in caught])
        assert all(warning.filename == __file__ for warning in caught)
    assert told[0] == told[1]
    assert len(told[0]) == 2
    with pytest.raises(DataError, match="predict, row 1: text is null"):
        found.predict(["bal", None])
    with pytest.raises(DataError, match="half of a character"):
        found.predict(["\ud800"])
    assert load(folder, errors="replace").predict("\ud800 bal").shape == (1,)
    assert found.predict([]).shape == (0,)
    assert found.predict_proba([]).shape == (0, 3)


def test_a_classifier_in_bfloat16_is_exported_in_float32(adapter: Adapter, tmp_path: Path) -> None:
    fitted = FewShotClassifier(adapter, precision="bf16").fit(SUPPORT, LABELS)
    found = exported(fitted, tmp_path / "onnx").predict_proba(TEXTS)
    assert 1e-5 < abs(found - fitted.predict_proba(TEXTS)).max() < 0.1
    fitted.precision = "no"
    np.testing.assert_allclose(found, fitted.predict_proba(TEXTS), atol=1e-5)


def test_threads_and_copies(fitted: FewShotClassifier, folder: Path) -> None:
    found = copy.deepcopy(load(folder, threads=2))  # by what a pickle holds
    assert found.session.get_session_options().intra_op_num_threads == 2
    expected = found.predict_proba(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for other in pool.map(lambda _: found.predict_proba(TEXTS), range(8)):
            np.testing.assert_array_equal(other, expected)


# int8


def test_the_head_is_fitted_on_the_int8_states(fitted: FewShotClassifier, tmp_path: Path, monkeypatch: Patch) -> None:
    made: list[Any] = []
    write = graph._task_graph
    monkeypatch.setattr(graph, "_task_graph", lambda *given: made.append(given) or write(*given))
    found = exported(fitted, tmp_path / "onnx", int8=True)
    ((states, adapter, task, _),) = made
    assert any(node.op_type == "MatMulInteger" for node in states.graph.node)
    assert not torch.equal(task.weights, fitted._now().task.weights)
    # what the task learner says of the states of this graph is what the exported one says
    learner = TaskLearner(graph.GraphReader(states, fitted._learner.reader.encoder), adapter)
    logits = learner.answer_all(task, TEXTS).logits[0]
    np.testing.assert_allclose(found.predict_proba(TEXTS), logits.softmax(-1), atol=1e-5)
    np.testing.assert_allclose(found.predict_proba(TEXTS), fitted.predict_proba(TEXTS), atol=0.1)


def test_a_few_large_channels_do_not_spoil_the_others(tmp_path: Path, monkeypatch: Patch) -> None:
    model = AutoModel.from_pretrained(save_family(tmp_path / "model", "bert"))
    for layer in model.encoder.layer:  # as trained encoders have them
        layer.attention.output.LayerNorm.weight.data[3] *= 60
        layer.intermediate.dense.weight.data[:, 3] /= 60
        layer.output.dense.weight.data[3] = 0
    adapter = adapter_of(save_tiny_model(tmp_path / "large", model))
    reader, factors = adapter.load_reader(), adapter.initialisation.lora

    def states(reader: Any) -> torch.Tensor:
        return torch.cat([own[..., 4:].flatten() for own in reader.read(SUPPORT, factors).unpadded()])

    def error() -> float:
        found = states(graph.GraphReader(graph.quantized(copy.deepcopy(whole), reader.encoder), reader.encoder))
        return float((found - expected).norm() / expected.norm())

    monkeypatch.setattr(graph, "USUAL", 0.9)  # of 32 channels
    whole, expected = graph.states_graph(reader, factors), states(reader)
    levelled = error()
    monkeypatch.setattr(graph, "_level", lambda *_: None)
    assert levelled < 0.5 * error()


def test_int8_needs_the_texts(fitted: FewShotClassifier, tmp_path: Path) -> None:
    for include in ("states", False, "texts"):
        fitted.save_pretrained(tmp_path / "saved", include_support=include)  # type: ignore[arg-type]
        loaded = FewShotClassifier.from_pretrained(tmp_path / "saved")
        if include != "texts":
            with pytest.raises(AdapterError, match='include_support="texts"'):
                loaded.export_onnx(tmp_path / "onnx", int8=True)
    found = exported(loaded, tmp_path / "onnx", int8=True)
    np.testing.assert_allclose(found.predict_proba(TEXTS), fitted.predict_proba(TEXTS), atol=0.1)


# Without PyTorch

BLOCKED = """
import runpy, sys
for name in ("torch", "transformers", "textmeta", "onnx", "sklearn"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_torch(folder: Path, texts: list[str], *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", BLOCKED, str(EXAMPLE), str(folder), *options]
    done = subprocess.run(
        command, input="".join(f"{text}\n" for text in texts), capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_example_answers_as_predict_does(fitted: FewShotClassifier, folder: Path) -> None:
    texts = [text for text in MANY + TEXTS if text]
    printed = without_torch(folder, texts, "--reject", "0.5")
    with pytest.warns(UserWarning, match="texts are cut"):
        expected = fitted.predict(texts, reject=0.5)
    assert [row["predicted"] for row in printed] == expected.tolist()
    assert [row["text"] for row in printed] == texts
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_the_default_adapter(int8: bool, tmp_path: Path) -> None:
    pytest.importorskip(CARRIED_PACKAGE)
    support = ["I lost my card", "my card was stolen", "what is my balance?", "how much money do I have?"]
    fitted = FewShotClassifier(device="cpu", precision="no").fit(support, ["lost", "lost", "balance", "balance"])
    found = exported(fitted, tmp_path / "onnx", int8=int8)
    texts = [f"{text} {'and then some more ' * n}" for n in (0, 1, 3, 7, 20, 60) for text in (*support, "hello", "")]
    np.testing.assert_allclose(found.predict_proba(texts), fitted.predict_proba(texts), atol=0.1 if int8 else 1e-4)


# What it refuses


def test_what_it_cannot_do_is_an_error(fitted: FewShotClassifier, folder: Path) -> None:
    found = load(folder)
    for name in ("fit", "transform", "partial_fit", "add_class", "save_pretrained", "task_embedding_", "merge"):
        with pytest.raises(AdapterError, match=f"{name}: a classifier as ONNX predicts"):
            getattr(found, name)
        assert not hasattr(found, name)


def test_folders_that_hold_none(fitted: FewShotClassifier, folder: Path, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"no classifier that export_onnx wrote: it has no onnx\.json"):
        load(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="backend='onnx'"):
        FewShotClassifier.from_pretrained(folder)
    for name in ("model.onnx", "tokenizer.json", "onnx.json"):
        shutil.copytree(folder, broken := tmp_path / name)
        content = bytearray((broken / name).read_bytes())
        content[len(content) // 2] ^= 1
        (broken / name).write_bytes(content)
        with pytest.raises(AdapterError, match="is damaged"):
            load(broken)
    with pytest.raises(SettingsError, match="backend must be one of"):
        FewShotClassifier.from_pretrained(folder, backend="onxx")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="revision"):
        load(folder, revision="main")
    with pytest.raises(SettingsError, match="threads"):
        load(folder, threads=0)


def test_a_graph_that_makes_other_states_is_not_written(adapter: Adapter, tmp_path: Path, monkeypatch: Patch) -> None:
    fitted = FewShotClassifier(adapter).fit(SUPPORT, LABELS)
    monkeypatch.setattr(graph, "HIDDEN", -3.0)  # padding is looked at
    with pytest.raises(EncoderError, match="as ONNX makes other states"):
        fitted.export_onnx(tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
