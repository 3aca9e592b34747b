import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

import textmeta.model.encoder as encoder_module
from tests.conftest import WORDS
from textmeta.errors import EncoderError, SettingsError
from textmeta.model import splitting
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings, zero_start

TEXTS = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(40)]


def moved_factors(encoder: Encoder) -> dict[str, Tensor]:
    """A start whose B is not zero, so that LoRA counts."""
    return {name: value + 0.1 for name, value in zero_start(encoder.factor_shapes, seed=0).items()}


def features(encoder: Encoder, texts: list[str]) -> Tensor:
    return encoder.features(encoder.prepare(texts), moved_factors(encoder))


def test_features_have_length_one_and_do_not_depend_on_the_company(encoder: Encoder) -> None:
    together = features(encoder, TEXTS)
    assert together.shape == (40, 32)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(40))
    alone = torch.cat([features(encoder, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_frozen_states_are_the_same_bits_in_any_company_cached_or_not(encoder: Encoder, tiny_model: str) -> None:
    fresh = Encoder(EncoderSettings(tiny_model, max_length=32, cache_mb=0), LoraSettings(rank=4))
    encoder.prepare(TEXTS[:7])  # some cached, in other groups than below
    one = encoder._states(TEXTS, remember=True)
    two = fresh._states(TEXTS[::-1], remember=True)[::-1]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not fresh._states_cache._tensors


def test_a_text_goes_through_the_frozen_layers_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder.prepare(TEXTS)
    monkeypatch.setattr(encoder, "_in_equal_batches", lambda rows, run: pytest.fail("ran again"))
    encoder.prepare(TEXTS[::-1])


def test_texts_that_will_not_come_again_are_not_kept(encoder: Encoder) -> None:
    encoder.prepare(TEXTS, remember=False)
    assert not encoder._states_cache._tensors


def test_the_cache_keeps_to_its_limit_and_forgets_the_oldest(tiny_model: str) -> None:
    encoder = Encoder(EncoderSettings(tiny_model, cache_mb=1))
    long_text = " ".join(WORDS[:60])  # 62 tokens of 32 floats: 7,936 bytes
    texts = [f"{WORDS[i]} {WORDS[j]} {long_text}" for i in range(20) for j in range(20)]
    encoder.prepare(texts)
    held = sum(state.nbytes for state in encoder._states_cache._tensors.values())
    assert held == encoder._states_cache._bytes
    assert 2**20 - 8000 < held <= 2**20
    assert texts[-1] in encoder._states_cache._tensors
    assert texts[0] not in encoder._states_cache._tensors


def test_long_texts_are_cut(tiny_model: str) -> None:
    encoder = Encoder(EncoderSettings(tiny_model, max_length=6))
    assert torch.equal(features(encoder, [" ".join(WORDS[:4])]), features(encoder, [" ".join(WORDS[:30])]))


def test_cls_pooling_takes_the_first_token(tiny_model: str) -> None:
    mean, cls = (Encoder(EncoderSettings(tiny_model, pooling=kind)) for kind in ("mean", "cls"))
    start = zero_start(cls.factor_shapes, seed=0)
    hidden = cls._run_suffix(cls._states(["bal bel bil"], False)[0][None], torch.ones(1, 5, dtype=torch.long))
    expected = torch.nn.functional.normalize(hidden[:, 0], dim=1)
    torch.testing.assert_close(cls.features(cls.prepare(["bal bel bil"]), start), expected)
    assert not torch.allclose(mean.features(mean.prepare(["bal bel bil"]), start), expected)


def test_a_checkpointed_batch_has_the_same_gradients(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[Tensor]:
        factors = {name: value.requires_grad_() for name, value in moved_factors(encoder).items()}
        out = encoder.features(encoder.prepare(TEXTS), factors)
        loss = (out * torch.arange(32.0)).sum(1).square().sum()
        return list(torch.autograd.grad(loss, list(factors.values())))

    plain = gradients()
    monkeypatch.setattr(encoder_module, "CHECKPOINT_ROWS", 10)
    calls = []
    monkeypatch.setattr(
        encoder_module, "checkpoint", lambda *a, **k: calls.append(1) or torch.utils.checkpoint.checkpoint(*a, **k)
    )
    for one, two in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, two)
    assert calls


def test_nothing_but_the_factors_gets_a_gradient(encoder: Encoder) -> None:
    assert not any(p.requires_grad for p in encoder._suffix.parameters())
    assert not encoder._suffix.training


def test_bf16_keeps_features_in_float32(tiny_model: str) -> None:
    half = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4), precision="bf16")
    full = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4))
    one, two = features(half, TEXTS), features(full, TEXTS)
    assert one.dtype == torch.float32
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=0, atol=0.03)


def test_fp16_is_refused(tiny_model: str) -> None:
    with pytest.raises(SettingsError, match=r"'fp16': .*gradients vanish"):
        Encoder(EncoderSettings(tiny_model), precision="fp16")


def test_a_family_that_cannot_be_split_works_with_a_warning(
    tmp_path: Path, tiny_model: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4))

    class Wrong(torch.nn.Module):
        """Stands in for embeddings that add something of their own: the halves are not the whole."""

        def forward(self, *, inputs_embeds: Tensor, **_: object) -> Tensor:
            return inputs_embeds + 0.1

    monkeypatch.setattr(splitting, "_PassThrough", Wrong)
    with caplog.at_level(logging.WARNING):
        encoder = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4))
    assert encoder._prefix is None
    assert "not cached" in caplog.text
    torch.testing.assert_close(features(encoder, TEXTS), features(whole, TEXTS))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no-such/model"):
        Encoder(EncoderSettings("no-such/model"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match="cannot load the encoder"):
        Encoder(EncoderSettings(str(tmp_path)))


def test_more_tokens_than_positions_are_refused(tiny_model: str) -> None:
    with pytest.raises(SettingsError, match=r"max_length is 161, but .* has 160 positions"):
        Encoder(EncoderSettings(tiny_model, max_length=161))


def test_an_unknown_device_is_named(tiny_model: str) -> None:
    with pytest.raises(SettingsError, match="no such device: 'gpu'"):
        Encoder(EncoderSettings(tiny_model), device="gpu")


@pytest.mark.parametrize("wrong", [{"pooling": "max"}, {"max_length": 2}, {"cache_mb": -1}])
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        EncoderSettings(**wrong)  # type: ignore[arg-type]
