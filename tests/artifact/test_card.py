"""The model card: valid for the Hub, true to the record, and enough to make the adapter again."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.artifact.test_store import CONDITIONED, known_tasks, random_parameters, save_conditioned
from tests.hub.server import HubServer
from textmeta import FewShotClassifier
from textmeta.artifact.card import model_card
from textmeta.artifact.store import load_adapter, save_adapter
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.encoder import Encoder
from textmeta.tasks import KnownTasks

INNER = InnerLoopSettings(steps=2)
HUB_SOURCE = {"dataset": "lab/intents", "split": "train", "commit": "c0ffee" * 6 + "cafe", "license": "cc-by-4.0"}
FILE_SOURCE = {"dataset": "mine.jsonl", "fold": "01"}


def corpus(name: str, classes: int) -> dict[str, Any]:
    return {"name": name, "texts": 10 * classes, "classes": classes, "sha256": "0" * 64}


def row(accuracy: float, **more: float) -> dict[str, Any]:
    return {"episodes": 600, "accuracy": accuracy, "accuracy_ci95": 0.0079, "macro_f1": 0.5, "nll": 1.0, "ece": 0.031}


def record() -> dict[str, Any]:
    """What the recipe writes of a training on a Hub dataset and a local file."""
    paired = {"difference": 0.0209, "low": 0.0162, "high": 0.0256}
    part = {"episodes": {"ways": 5, "shots": [1, 5], "queries": 5}, "seed": 0}
    return {
        "steps": 300,
        "episodes": 1200,
        "best_step": 250,
        "valid_accuracy": 0.9672,
        "settings": {
            "encoder": {"model": "m", "revision": None, "pooling": "mean", "max_length": 64, "precision": "no"},
            "lora": {"rank": 4, "alpha": 16, "layers": None, "targets": None},
            "inner": {"steps": 2},
            "training": {"algorithm": "fomaml", "steps": 300},
            "train": {**part, "corpora": [corpus("intents", 20), corpus("mine", 7)]},
            "valid": {**part, "corpora": [corpus("intents", 9), corpus("mine", 3)]},
        },
        "sources": [HUB_SOURCE, FILE_SOURCE],
        "test": {"corpora": [{**corpus("intents", 11), "source": HUB_SOURCE}]},
        "results": {
            "5-way 1-shot": {"frozen": row(0.8527), "meta_trained": row(0.8736), "paired": paired},
            "5-way 5-shot": {"frozen": row(0.94), "meta_trained": row(0.95), "paired": paired},
        },
    }


def meta(model: str = "lab/tiny", **changes: Any) -> dict[str, Any]:
    return {
        "versions": {"textmeta": "0.1.0", "torch": "2.13.0"},
        "encoder": {
            "model": model, "revision": None, "commit": "abc" * 13 + "d", "weights_sha256": "12" * 32,
            "pooling": "mean", "max_length": 64,
        },
        "lora": {"rank": 4, "alpha": 16},
        "inner": {"steps": 2, "adapt": ["lora_B", "offset"], "head": "prototype", "loss": "head"},
        "record": record(),
        **changes,
    }  # fmt: skip


def check(card: str) -> ModelCard:
    """Let the Hub judge the card's metadata block."""
    loaded = ModelCard(card, ignore_metadata_errors=False)
    loaded.validate(repo_type="model")
    return loaded


def test_metadata_is_what_the_hub_accepts_and_says_what_it_is(hub: HubServer) -> None:
    card = check(model_card(meta()))
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("textmeta", "text-classification")
    assert (data.base_model, data["base_model_relation"]) == ("lab/tiny", "adapter")
    assert data.datasets == ["lab/intents"], "local files are none on the Hub"
    assert data.metrics == ["accuracy"]
    assert {"few-shot", "meta-learning", "lora", "peft", "fomaml"} <= set(data.tags or [])
    found = {result.dataset_config: result for result in data.eval_results or []}
    assert {name: result.metric_value for name, result in found.items()} == {
        "5-way 1-shot": 0.8736,
        "5-way 5-shot": 0.95,
    }
    one = found["5-way 1-shot"]
    assert (one.dataset_type, one.metric_type, one.metric_name) == (
        "lab/intents",
        "accuracy",
        "accuracy, mean of 600 episodes",
    )
    assert one.dataset_name == "intents, classes never seen in training"


@pytest.mark.parametrize(
    "changes",
    [{"record": {}}, {"record": {"episodes": 3, "settings": {"training": {"algorithm": "maml"}}}}, {"model": "/a/b c"}],
    ids=["no record", "little record", "encoder in a folder"],
)
def test_metadata_is_valid_whatever_is_known(hub: HubServer, changes: dict[str, Any]) -> None:
    check(model_card(meta(**changes)))


def test_results_are_given_with_their_intervals() -> None:
    assert "| 5-way 1-shot | 600 | 85.27 ± 0.79 | 87.36 ± 0.79 | +2.09 [+1.62, +2.56] | 3.1 |" in model_card(meta())


def test_training_is_told_with_corpora_classes_and_licences() -> None:
    card = model_card(meta())
    assert (
        "| [intents](https://huggingface.co/datasets/lab/intents) at `c0ffeec0ffee` | training | 200 | 20 | cc-by-4.0"
        in card
    )
    assert "| mine | training | 70 | 7 | not known |" in card
    assert "| mine | validation | 30 | 3 | not known |" in card
    assert "fomaml, 1200 episodes in 300 outer steps, of which step 250 is kept (validation accuracy 96.72 %)" in card
    seen = record()
    seen["settings"]["valid"] = seen["settings"]["train"]
    card = model_card(meta(record=seen))
    assert "step 250 is kept (accuracy on the training classes 96.72 %)" in card
    assert "validation" not in card
    assert "5 ways, 1 to 5 shots, 5 queries a class" in card
    assert f"`lab/tiny`, revision `{'abc' * 13}d`, sha256 of its weights `{'12' * 32}`" in card
    assert "2 inner steps on lora_B and offset by the loss of the head, prototype head" in card
    assert "textmeta 0.1.0, torch 2.13.0" in card


def test_fitted_classifier_says_whether_its_texts_are_stored() -> None:
    assert "texts that it was fitted on are not stored" in model_card(meta(), ["a", "b"])
    stored = model_card(meta(), ["a", "b"], 7)
    assert "**The 7 texts that it was fitted on, with their labels, are stored in `classifier.json`.**" in stored
    assert "Classes (2): `a`, `b`." in stored


def test_card_of_a_saved_classifier(encoder: Encoder, tmp_path: Path) -> None:
    classifier = FewShotClassifier(encoder, random_parameters(encoder), INNER)
    classifier.fit(["my secret", "bal bel"], ["x", "y"])
    classifier.save_pretrained(tmp_path / "without")
    classifier.save_pretrained(tmp_path / "with", include_support=True)
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    holding = {str(path.relative_to(tmp_path)) for path, content in contents.items() if b"my secret" in content}
    assert holding == {"with/classifier.json"}
    assert "are not stored" in (tmp_path / "without" / "README.md").read_text()
    assert "The 2 texts" in (tmp_path / "with" / "README.md").read_text()
    assert FewShotClassifier.from_pretrained(tmp_path / "with").support_ == [("my secret", "x"), ("bal bel", "y")]
    assert FewShotClassifier.from_pretrained(tmp_path / "without").support_ is None


def test_python_of_the_card_runs(encoder: Encoder, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", encoder, random_parameters(encoder), INNER, {})
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("path/to/this/folder", str(tmp_path / "adapter")), "README.md", "exec"), {})


def test_how_to_remake_it_names_every_setting_and_no_folder_of_the_machine() -> None:
    block = re.search(r"```yaml\n(.*?)```", model_card(meta()), re.DOTALL)
    assert block is not None
    config = yaml.safe_load(block[1])
    assert config["corpora"] == [
        {"dataset": "lab/intents", "split": "train", "license": "cc-by-4.0", "revision": HUB_SOURCE["commit"]},
        FILE_SOURCE,
    ]
    assert config["training"] == {"algorithm": "fomaml", "steps": 300}
    assert config["precision"] == "no"
    assert config["encoder"]["revision"] == meta()["encoder"]["commit"], "the encoder is pinned, too"
    assert f'from_pretrained("lab/tiny", revision="{meta()["encoder"]["commit"]}")' in model_card(meta())


def test_start_is_named_and_pinned() -> None:
    start = {"start": "lab/first", "start_revision": "c0ffee"}
    card = model_card(meta(record={**record(), "start": start}))
    assert "started from the adapter `lab/first` at revision `c0ffee`" in card
    block = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert block is not None
    assert yaml.safe_load(block[1]).items() >= start.items()


def test_labels_cannot_write_the_card() -> None:
    card = model_card(meta(), ["a`b", "# Heading\n# Another", "\ud800", ("x", 1), 10**5000])
    assert "# Another" not in card.splitlines()
    assert "`('x', 1)`" in card
    card.encode("utf-8")


@pytest.mark.parametrize("odd", [{"settings": 3}, {"results": {"x": 3}}, {"settings": {"training": {}, "train": {}}}])
def test_record_that_training_did_not_write_is_left_out(odd: dict[str, Any]) -> None:
    assert "Not meta-trained, or nothing is recorded of it" in model_card(meta(record=odd))


def test_corpus_of_unknown_origin_has_no_recipe() -> None:
    assert "How to remake it" in model_card(meta())
    assert "How to remake it" not in model_card(meta(record={**record(), "sources": [HUB_SOURCE, {}]}))


def test_card_may_be_edited_or_removed(encoder: Encoder, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", encoder, random_parameters(encoder), INNER, {})
    (tmp_path / "adapter" / "README.md").write_text("my own words")
    load_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink()
    load_adapter(tmp_path / "adapter")


def test_index_of_training_tasks_is_told_of(tiny_model: str, tmp_path: Path) -> None:
    save_conditioned(tmp_path / "adapter", tiny_model)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "**The class names of the training corpora (größe: 2, a/b: 1) are stored in `tasks.json`**" in card
    assert "Task encoder: graph, embeddings of 8 numbers; LoRA starts from 3 banks; each task has a temperature" in card
    without = model_card(meta())
    assert "tasks.json" not in without
    assert "Task encoder" not in without


def test_names_of_an_index_cannot_write_the_card() -> None:
    name = "x`\n# Free money <script>|"
    known = KnownTasks({name: ("a",)}, {name: known_tasks().vectors["a/b"]})
    inner = asdict(CONDITIONED)
    card = model_card(meta(inner=inner), known=known)
    assert "\n# Free" not in card
    assert "<script>" not in card


def test_recipe_has_nested_settings(tmp_path: Path) -> None:
    inner, training = asdict(CONDITIONED), asdict(TrainingSettings(unconditioned=0.25))
    given = record()
    given["settings"] |= {"inner": json.loads(json.dumps(inner)), "training": json.loads(json.dumps(training))}
    card = model_card(meta(record={**given, "index_rows": 7}))
    (block,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    config = yaml.safe_load(block)
    assert config["inner"]["conditioning"] == inner["conditioning"]
    assert config["inner"]["conditioning"]["task_encoder"]["kind"] == "graph"
    assert config["training"]["self_supervision"] == training["self_supervision"]
    assert (config["training"]["unconditioned"], config["index_rows"]) == (0.25, 7)
