"""An adapter and the encoder that it belongs to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.models import WordLevel

from tests.conftest import WORDS, tiny_tokenizer
from tests.sharing.made import make_adapter
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError
from textmeta.meta.adapter import Adapter
from textmeta.meta.initialisation import LearnerSettings


@pytest.fixture
def adapter(encoder: Encoder) -> Adapter:
    """With LoRA that does something."""
    reader = TokenStateReader(encoder)
    return Adapter.of(reader, LearnerSettings(steps=2), make_adapter(reader).initialisation)


def test_an_adapter_knows_its_encoder(encoder: Encoder, adapter: Adapter) -> None:
    for found, expected in (("encoder", "settings"), ("lora", "lora"), ("weights_sha256", "weights_sha256")):
        assert getattr(adapter, found) == getattr(encoder, expected)
    assert adapter.learner.layers == (2, 3, 4)  # which the settings left open
    assert adapter.probe.shape == (3, 3 * 32)
    torch.testing.assert_close(adapter.probe.norm(dim=1), torch.ones(3))
    assert adapter.scope is None
    assert set(adapter.versions) == {"textmeta", "torch", "transformers", "peft"}


def other_tokenizer(folder: Path) -> None:
    """Words that it does not know have become a word."""
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    vocabulary["[UNK]"], vocabulary[WORDS[0]] = vocabulary[WORDS[0]], vocabulary["[UNK]"]
    tokenizer.backend_tokenizer.model = WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer.save_pretrained(folder)


def other_configuration(folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "hidden_act": "relu"}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_tokenizer, "makes other features of the same texts .*: its tokenizer or configuration has changed"),
        (other_configuration, "makes other features of the same texts"),
    ],
)
def test_another_encoder_is_refused(
    change: Any, named: str, encoder: Encoder, adapter: Adapter, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(encoder.settings.model, folder)
    change(folder)
    with pytest.raises(AdapterError, match=named):
        adapter.load_reader(model=str(folder))


def test_a_probe_that_says_nothing_and_tensors_that_do_not_fit_are_refused(adapter: Adapter) -> None:
    for probe in (torch.full_like(adapter.probe, torch.nan), adapter.probe[:, :32], torch.zeros(3, 0)):
        with pytest.raises(AdapterError, match="other features"):
            replace(adapter, probe=probe).load_reader()
    init = replace(adapter.initialisation, queries=torch.zeros(2, 32))
    with pytest.raises(AdapterError, match=r"queries is \(2, 32\), expected \(3, 32\)"):
        replace(adapter, initialisation=init).load_reader()


def test_an_adapter_goes_to_a_device_with_all_of_its_tensors(adapter: Adapter) -> None:
    calibrated = replace(adapter, scope=torch.zeros(8))
    moved = calibrated.to(torch.device("meta"))
    assert all(value.is_meta for value in moved.initialisation.tensors().values())
    assert moved.scope.is_meta
    assert not any(value.is_meta for value in calibrated.initialisation.tensors().values())
    assert replace(moved, initialisation=calibrated.initialisation, scope=calibrated.scope) == calibrated
