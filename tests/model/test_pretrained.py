import hashlib
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import textmeta.model.pretrained as pretrained
from tests.conftest import tiny_tokenizer
from textmeta.errors import EncoderError


@pytest.fixture
def carried(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries the tiny model, in place of the demo extra's, and an empty Hub cache."""
    folder = tmp_path / "site" / "carrying_package" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    AutoModel.from_pretrained(tiny_model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(pretrained, "CARRIED_PACKAGE", "carrying_package")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    weights = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(pretrained, "CARRIED_SHA256", hashlib.sha256(weights).hexdigest())
    yield folder
    sys.modules.pop("carrying_package", None)


def test_the_carried_copy_is_used_where_the_hub_is_out_of_reach(
    carried: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = pretrained.load_pretrained(pretrained.DEFAULT_ENCODER).model
    assert "using the copy carried by the package carrying_package" in caplog.text
    assert model.config.hidden_size == 32
    assert model.dtype == torch.float32


def test_a_carried_copy_that_is_not_the_published_file_is_refused(carried: Path) -> None:
    weights = carried / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EncoderError, match=r"model\.safetensors is not the published file"):
        pretrained.load_pretrained(pretrained.DEFAULT_ENCODER)


def test_a_revision_that_was_asked_for_is_not_replaced_by_the_carried_copy(carried: Path) -> None:
    with pytest.raises(EncoderError, match="revision abc"):
        pretrained.load_pretrained(pretrained.DEFAULT_ENCODER, "abc")


def test_without_the_extra_the_message_says_what_to_install(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "CARRIED_PACKAGE", "no_such_package")
    with pytest.raises(EncoderError, match=r"pip install 'textmeta\[demo\]'"):
        pretrained.load_pretrained(pretrained.DEFAULT_ENCODER)


def test_only_the_default_encoder_is_carried(carried: Path) -> None:
    with pytest.raises(EncoderError, match=r"'some/other'.*the Hub .* cannot be reached"):
        pretrained.load_pretrained("some/other")


def test_the_digest_sees_every_weight_and_not_the_storage(tiny_model: str) -> None:
    model = pretrained.load_pretrained(tiny_model).model
    before = pretrained.weights_digest(model)
    assert pretrained.weights_digest(model.double()) == before
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 5] += 1e-6
    assert pretrained.weights_digest(model) != before
