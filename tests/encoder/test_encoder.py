"""The encoder: its settings, what is frozen, precision, and what it says of a model it cannot use."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.encoder.given import TEXTS, assert_close, moved_factors, save_family
from tests.given import Logged, Patch
from textmeta.encoder import encoder as module
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import EncoderError, SettingsError


def test_what_an_encoder_says_of_itself(tiny_model: str, monkeypatch: Patch) -> None:
    monkeypatch.chdir(Path(tiny_model).parent)
    encoder = Encoder(EncoderSettings(Path(tiny_model).name, max_length=20), LoraSettings(layers=1))
    assert encoder.settings == EncoderSettings(tiny_model, max_length=20), "good from any folder"
    assert (encoder.hidden_size, encoder.total_layers, encoder.frozen_layers) == (32, 4, 3)
    assert (encoder.commit, encoder.source) == (None, (tiny_model, None))


def test_the_digest_is_of_the_transformer_without_lora(tiny_model: str, tmp_path: Path) -> None:
    one, two = (Encoder(EncoderSettings(tiny_model), LoraSettings(layers, rank=layers)) for layers in (1, 3))
    assert one.weights_sha256 == two.weights_sha256
    other = Encoder(EncoderSettings(save_family(tmp_path, "bert"), max_length=32))
    assert other.weights_sha256 != one.weights_sha256


def test_nothing_but_the_factors_gets_a_gradient(encoder: Encoder) -> None:
    for half in (encoder._prefix, encoder._suffix):
        assert not any(parameter.requires_grad for parameter in half.parameters())
        assert not half.training


def test_a_model_that_cannot_be_split_works_and_warns(encoder: Encoder, caplog: Logged, monkeypatch: Patch) -> None:
    class Wrong(torch.nn.Module):
        """Stands in for embeddings that add something of their own: the halves are not the whole."""

        def forward(self, *, inputs_embeds: Tensor, **_: object) -> Tensor:
            return inputs_embeds + 0.1

    monkeypatch.setattr(module, "_PassThrough", Wrong)
    with caplog.at_level(logging.WARNING):
        whole = Encoder(encoder.settings, encoder.lora)
    assert whole.frozen_layers is None
    assert "BertModel cannot be split" in caplog.text
    assert "not cached" in caplog.text
    found, expected = (TokenStateReader(one).read(TEXTS, moved_factors(one)).unpadded() for one in (whole, encoder))
    assert_close(found, expected)


def test_fp16_is_refused(tiny_model: str) -> None:
    with pytest.raises(SettingsError, match=r"'fp16': .*gradients vanish"):
        Encoder(EncoderSettings(tiny_model), precision="fp16")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no-such/model"):
        Encoder(EncoderSettings("no-such/model"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match="cannot load the encoder"):
        Encoder(EncoderSettings(str(tmp_path)))


@pytest.mark.parametrize(("family", "positions"), [("bert", 64), ("roberta", 62)])
def test_more_tokens_than_positions_are_refused(family: str, positions: int, tmp_path: Path) -> None:
    """RoBERTa's first positions are those of padding."""
    folder = save_family(tmp_path, family)
    encoder = Encoder(EncoderSettings(folder, max_length=positions))
    assert TokenStateReader(encoder).read([" ".join(TEXTS)]).batches[0].mask.shape == (1, positions)
    with pytest.raises(SettingsError, match=rf"max_length is {positions + 1}, but .* has {positions} positions"):
        Encoder(EncoderSettings(folder, max_length=positions + 1))
