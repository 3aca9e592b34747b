"""The model card: valid for the Hub, and true to the adapter and its record."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.hub.server import HubServer
from textmeta.encoder.encoder import EncoderSettings
from textmeta.meta.adapter import Adapter
from textmeta.sharing.card import model_card
from textmeta.sharing.store import adapter_files, save_adapter

COMMIT = "c0ffee" * 6 + "cafe"


def row(accuracy: float) -> dict[str, Any]:
    return {"episodes": 600, "accuracy": accuracy, "accuracy_ci95": 0.0079, "macro_f1": 0.5, "nll": 1.0, "ece": 0.031}


def record() -> dict[str, Any]:
    """What training writes, on a data set of the Hub and a local file, with results."""
    paired = {"difference": 0.0209, "low": 0.0162, "high": 0.0256}
    return {
        "settings": {
            "algorithm": "fomaml",
            "episodes": 1200,
            "corpora": [
                {"name": "intents", "texts": 200, "classes": 20, "sha256": "0" * 64},
                {"name": "mine", "texts": 70, "classes": 7, "sha256": "0" * 64},
            ],
        },
        "sources": [
            {"dataset": "lab/intents", "split": "train", "commit": COMMIT, "license": "cc-by-4.0"},
            {"dataset": "mine.jsonl"},
        ],
        "results": {"5-way 1-shot": {"frozen": row(0.8527), "meta_trained": row(0.8736), "paired": paired}},
    }


@pytest.fixture
def trained(adapter: Adapter) -> Adapter:
    """An adapter of an encoder on the Hub."""
    return replace(
        adapter, encoder=EncoderSettings("lab/tiny"), commit=COMMIT, record=record(), versions={"torch": "2.13.0"}
    )


def card_of(adapter: Adapter, **classifier: Any) -> str:
    """Return the card of an adapter, and of what ``classifier.json`` holds of a classifier."""
    return model_card(json.loads(adapter_files(adapter)["textmeta.json"]), classifier or None)


def check(card: str) -> ModelCard:
    """Let the Hub judge the card's metadata block."""
    loaded = ModelCard(card, ignore_metadata_errors=False)
    loaded.validate(repo_type="model")
    return loaded


def test_it_says_what_becomes_of_long_texts(trained: Adapter) -> None:
    windows = replace(trained, encoder=replace(trained.encoder, long_texts="window"))
    for adapter, whole in ((trained, False), (windows, True)):
        card = card_of(adapter)
        assert ("are cut at 256 tokens" in card) is not whole
        assert ("are read in windows of 256 tokens" in card) is whole
        assert "first 256 tokens" not in card


def test_metadata_is_what_the_hub_accepts_and_says_what_it_is(hub: HubServer, trained: Adapter) -> None:
    data = check(card_of(trained)).data
    assert (data.library_name, data.pipeline_tag) == ("textmeta", "text-classification")
    assert (data.base_model, data["base_model_relation"]) == ("lab/tiny", "adapter")
    assert data.datasets == ["lab/intents"], "local files are none on the Hub"
    assert data.metrics == ["accuracy"]
    assert {"few-shot", "meta-learning", "lora", "peft", "fomaml"} <= set(data.tags or [])
    for less in ({"record": {}}, {"encoder": EncoderSettings("/a/b c"), "commit": None}):
        check(card_of(replace(trained, **less)))


def test_card_tells_of_encoder_training_and_results(trained: Adapter) -> None:
    card = card_of(trained)
    assert f"`lab/tiny`, revision `{COMMIT}`, sha256 of its weights `{trained.weights_sha256}`" in card
    assert "LoRA: rank 4, alpha 16" in card
    assert 'layers 2, 3, 4 of the encoder, in 2\n  steps (`adapt="pooling"`), with a ridge head' in card
    assert "fomaml, 1200 episodes" in card
    link = "[intents](https://huggingface.co/datasets/lab/intents) at `c0ffeec0ffee`"
    assert f"| {link} | 200 | 20 | cc-by-4.0 |" in card
    assert "| mine | 70 | 7 | not known |" in card
    assert "| 5-way 1-shot | 600 | 85.27 ± 0.79 | 87.36 ± 0.79 | +2.09 [+1.62, +2.56] | 3.1 |" in card
    assert f'from_pretrained("lab/tiny", revision="{COMMIT}")' in card
    assert "Written with torch 2.13.0." in card
    assert not re.search(r"\{[{%]", card)
    assert "\n\n\n" not in card
    assert "Results" not in card_of(replace(trained, record={}))


def test_card_says_what_of_others_is_stored(trained: Adapter) -> None:
    assert "**The names of the 3 classes that it was trained on are stored in `textmeta.json`**" in card_of(trained)
    assert "classes that it was trained on" not in card_of(replace(trained, index=None))
    assert "texts that it was fitted on are not stored" in card_of(trained, classes=["a", "b"], support=None)
    support = {"kind": "texts", "examples": [["x", 0, 1.0]] * 6, "unlabelled": ["u"]}
    stored = card_of(trained, classes=["a", "b"], support=support)
    assert "**The 7 texts that it was fitted on, with their labels, are stored in `classifier.json`.**" in stored
    assert "Classes (2): `a`, `b`." in stored


@pytest.mark.filterwarnings("ignore:(fit|predict). most tokens:UserWarning")
def test_python_of_the_card_runs(adapter: Adapter, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", adapter)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("path/to/this/folder", str(tmp_path / "adapter")), "README.md", "exec"), {})


def test_labels_and_names_cannot_write_the_card(trained: Adapter) -> None:
    evil = "x`\n# Free money <script>|"
    told = record()
    told["settings"]["corpora"][1]["name"] = told["settings"]["algorithm"] = evil
    card = card_of(replace(trained, record=told), classes=["a`b", evil, "\ud800", 10**5000], support=None)
    assert "\n# Free" not in card
    assert "<script>" not in card
    card.encode("utf-8")


ODD = ({"settings": 3}, {"results": {"x": 3}}, {"settings": {"algorithm": "maml", "episodes": "x"}}, {"sources": [3]})


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_record_that_training_did_not_write_is_left_out(trained: Adapter, odd: dict[str, Any]) -> None:
    assert "Not meta-trained, or nothing is recorded of it" in card_of(replace(trained, record=odd))
