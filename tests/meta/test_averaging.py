"""The average of adapters: of what LoRA adds to the weights, and of every other tensor."""

from dataclasses import replace

import pytest
import torch

from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import SettingsError
from textmeta.meta.adapter import Adapter
from textmeta.meta.averaging import average
from textmeta.meta.initialisation import Initialisation, LearnerSettings

TEXTS = ["the train to paris", "is my card lost", "rain"]


def trained(tiny_model: str, seed: int, **changes: object) -> Adapter:
    """An adapter whose every tensor differs from that of another seed."""
    encoder = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4, alpha=8))
    reader = TokenStateReader(encoder)
    learner = LearnerSettings(layers=reader.layers, **changes)  # type: ignore[arg-type]
    init = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, learner, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in init.tensors().items()}
    return Adapter.of(reader, learner, init.with_tensors(tensors))


def added(adapter: Adapter) -> dict[str, torch.Tensor]:
    """What LoRA adds to each weight."""
    lora, scale = adapter.initialisation.lora, adapter.lora.alpha / adapter.lora.rank
    names = [name for name in lora if ".lora_B." in name]
    return {name: scale * lora[name] @ lora[name.replace(".lora_B.", ".lora_A.")] for name in names}


def test_average_is_of_what_lora_adds_and_of_every_other_tensor(tiny_model: str) -> None:
    parts = [trained(tiny_model, seed) for seed in range(3)]
    whole = average(parts)
    assert whole.lora.rank == 12
    each = [added(part) for part in parts]
    for name, value in added(whole).items():
        torch.testing.assert_close(value, sum(part[name] for part in each) / 3, atol=1e-6, rtol=1e-5)
    for name, value in replace(whole.initialisation, lora={}).tensors().items():
        expected = sum(part.initialisation.tensors()[name] for part in parts) / 3
        torch.testing.assert_close(value, expected)


def test_average_of_one_is_itself(tiny_model: str) -> None:
    one = trained(tiny_model, 0)
    for adapter in (average([one]), average([one, one], rank=4)):
        old, new = (a.load_reader().read(TEXTS, a.initialisation.lora).unpadded() for a in (one, adapter))
        for before, after in zip(old, new, strict=True):
            torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_a_smaller_rank_is_the_nearest_there_is(tiny_model: str) -> None:
    parts = [trained(tiny_model, seed) for seed in range(2)]
    whole, small = added(average(parts)), average(parts, rank=3)
    assert small.lora.rank == 3
    assert all(value.shape[1 if ".lora_B." in name else 0] == 3 for name, value in small.initialisation.lora.items())
    for name, value in added(small).items():
        lost = torch.linalg.svdvals(whole[name].double())[3:].norm()  # no matrix of rank 3 is nearer
        assert float((value - whole[name]).norm()) == pytest.approx(float(lost), rel=1e-4)


def test_what_does_not_fit_together_is_an_error(tiny_model: str) -> None:
    one = trained(tiny_model, 0)
    with pytest.raises(SettingsError, match="no adapters to average"):
        average([])
    with pytest.raises(SettingsError, match="adapter 2 has another learner than the first"):
        average([one, trained(tiny_model, 1, steps=2)])
    with pytest.raises(SettingsError, match="rank must be from 1 to 4, the sum of the adapters' ranks, given 5"):
        average([one], rank=5)
