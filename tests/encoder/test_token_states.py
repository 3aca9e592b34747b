"""Token states: against transformers' own hidden states, LoRA above, batches, gradients and the cache."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, MegatronBertConfig

from tests.conftest import WORDS, save_tiny_model
from tests.model.test_families import FAMILIES, SIZES
from textmeta.encoder.token_states import TokenStateReader, TokenStates
from textmeta.errors import SettingsError
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings, zero_start

TEXTS = [" ".join(WORDS[start : start + 1 + start * 7 % 20]) for start in range(40)]
ALL = range(5)
MODELS = {**FAMILIES, "megatron-bert": MegatronBertConfig(**SIZES)}  # the last one cannot be split


def moved(encoder: Encoder, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = zero_start(encoder.factor_shapes, seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in start.items()}


def check(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lora_layers", [2, 4])
@pytest.mark.parametrize("family", MODELS)
def test_states_are_the_hidden_states_of_transformers(family: str, lora_layers: int, tmp_path: Path) -> None:
    if family.startswith("deberta") and lora_layers == 4:
        pytest.skip("DeBERTa does not run without layers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = save_tiny_model(tmp_path, AutoModel.from_config(MODELS[family]))
    targets = ("query", "value") if family == "megatron-bert" else None
    encoder = Encoder(EncoderSettings(folder, max_length=16), LoraSettings(lora_layers, rank=4, targets=targets))
    assert (encoder.frozen_layers is None) == (family == "megatron-bert")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [torch.tensor([encoder.tokenizer(text, truncation=True, max_length=16)["input_ids"]]) for text in TEXTS]
    with torch.no_grad():
        expected = [
            torch.cat(model(input_ids=row, attention_mask=torch.ones_like(row), output_hidden_states=True)[-1])
            for row in ids
        ]
    assert max(len(row[0]) for row in ids) == 16, "some are cut"
    factors = zero_start(encoder.factor_shapes, 0)
    for chosen in (list(ALL), [1, 4], [0, 2], [1], [3]):
        for given in (None, factors):
            found = TokenStateReader(encoder, chosen).read(TEXTS, given).unpadded()
            check(found, [states[chosen] for states in expected])


def test_lora_changes_the_states_above_it_alone(encoder: Encoder) -> None:
    reader = TokenStateReader(encoder, ALL)
    plain, adapted = (reader.read(TEXTS, factors).unpadded() for factors in (None, moved(encoder, 0)))
    for one, other in zip(plain, adapted, strict=True):
        assert torch.equal(one[:3], other[:3])
        assert ((one - other).abs().amax((1, 2))[3:] > 1e-3).all()


def test_tasks_carry_factors_of_their_own(encoder: Encoder) -> None:
    reader, factors = TokenStateReader(encoder, ALL), [moved(encoder, seed) for seed in range(3)]
    row_task = torch.arange(len(TEXTS)) % 3
    together = {name: torch.stack([one[name] for one in factors]) for name in factors[0]}
    alone = [reader.read(TEXTS, one).unpadded() for one in factors]
    expected = [alone[task][row] for row, task in enumerate(row_task.tolist())]
    check(reader.read(TEXTS, together, row_task).unpadded(), expected)


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_are_exact(encoder64: Encoder, cached: bool) -> None:
    reader, factors = TokenStateReader(encoder64, [1, 3, 4]), moved(encoder64, 0)
    factors = {name: value.double() for name, value in factors.items()}
    if cached:
        reader.cache(TEXTS)
    generator = torch.Generator().manual_seed(0)
    along = {name: torch.randn(v.shape, generator=generator, dtype=v.dtype) for name, v in factors.items()}

    def loss(scale: float, record: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: (v + scale * along[name]).requires_grad_(record) for name, v in factors.items()}
        states = reader.read(TEXTS, leaves)
        assert all(batch.states.requires_grad == record for batch in states.batches)
        return torch.stack([state.sin().mean((1, 2)) @ state.new_ones(3) for state in states.unpadded()]).sum(), leaves

    value, leaves = loss(0.0, record=True)
    gradient = torch.autograd.grad(value, list(leaves.values()))
    found = sum(float((g * a).sum()) for g, a in zip(gradient, along.values(), strict=True))
    slope = float(loss(1e-5)[0] - loss(-1e-5)[0]) / 2e-5
    assert abs(slope - found) < 1e-6 * abs(slope)
    with torch.no_grad():
        assert not reader.read(TEXTS, leaves).batches[0].states.requires_grad


def test_a_text_does_not_depend_on_the_others_and_order_is_kept(encoder64: Encoder) -> None:
    reader = TokenStateReader(encoder64, ALL)
    states = reader.read([*TEXTS, TEXTS[3]])
    alone = [reader.read([text]).unpadded()[0] for text in TEXTS]
    check(states.unpadded(), [*alone, alone[3]], 1e-12)
    assert sorted(torch.cat([batch.rows for batch in states.batches]).tolist()) == list(range(len(TEXTS) + 1))
    assert any(not batch.mask.all() for batch in states.batches)
    assert not any(batch.states.transpose(1, 2)[~batch.mask].any() for batch in states.batches)


@pytest.mark.parametrize("max_tokens", [1, 20, 64])
def test_batches_are_within_the_cap(encoder: Encoder, max_tokens: int) -> None:
    reader = TokenStateReader(encoder, [4], max_tokens=max_tokens)
    batches = reader.read(TEXTS).batches
    assert all(batch.mask.numel() <= max_tokens or len(batch.mask) == 1 for batch in batches)
    assert (max(len(batch.mask) for batch in batches) == 1) == (max_tokens == 1)
    check(reader.read(TEXTS).unpadded(), TokenStateReader(encoder, [4]).read(TEXTS).unpadded())


def test_padding_undoes_unpadding(encoder: Encoder) -> None:
    states = TokenStateReader(encoder, ALL).read(TEXTS)
    again = TokenStates.padded(states.unpadded())
    assert again.count == states.count
    for one, other in zip(states.batches, again.batches, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.states, other.states)
        assert torch.equal(one.mask, other.mask)


def test_no_texts(encoder: Encoder) -> None:
    reader = TokenStateReader(encoder, ALL)
    reader.cache([])
    assert reader.read([]) == TokenStates.padded([]) == TokenStates(0, ())
    assert reader.read([]).unpadded() == []


@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 4], [1, 4], [0, 1], [2]])
def test_cache_keeps_half_precision(encoder: Encoder, layers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, one, two = (TokenStateReader(encoder, layers) for _ in range(3))
    one.cache(TEXTS)
    two.cache([*reversed(TEXTS), *TEXTS])
    lengths = [state.shape[1] for state in fresh.read(TEXTS).unpadded()]
    kept = 2 if layers in ([1, 4], [0, 1]) else min(len(layers), 3)
    assert one.cached_bytes == two.cached_bytes == 2 * 32 * kept * sum(lengths)
    factors = moved(encoder, 0)
    found = one.read(TEXTS, factors).unpadded()
    check(found, fresh.read(TEXTS, factors).unpadded(), 5e-3)
    assert all(map(torch.equal, found, two.read(TEXTS, factors).unpadded()))
    mixed = [WORDS[100], *TEXTS, WORDS[101]]
    check(one.read(mixed, factors).unpadded(), fresh.read(mixed, factors).unpadded(), 5e-3)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "lower_states", None)  # not called any more
        assert all(map(torch.equal, found, one.read(TEXTS, factors).unpadded()))


def test_cache_in_a_folder_serves_other_runs(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = (TokenStateReader(encoder, layers) for layers in ([1, 4], [1, 4], [0, 4]))
    one.cache(TEXTS, tmp_path)
    found = one.read(TEXTS, moved(encoder, 0)).unpadded()
    assert len(list(tmp_path.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "lower_states", None)  # not called by the second
        two.cache(TEXTS, tmp_path)
        assert all(map(torch.equal, found, two.read(TEXTS, moved(encoder, 0)).unpadded()))
    three.cache(TEXTS, tmp_path)  # of other layers
    two.cache(TEXTS[1:], tmp_path)  # of other texts
    assert len(list(tmp_path.iterdir())) == 3


def test_bfloat16_states_come_as_float32(tiny_model: str, encoder: Encoder) -> None:
    coarse = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4), precision="bf16")
    found, expected = (TokenStateReader(one, ALL).read(TEXTS, moved(one, 0)).unpadded() for one in (coarse, encoder))
    check(found, expected, 0.15)
    assert not torch.equal(found[0], expected[0])


@pytest.mark.parametrize("layers", [[], [0, 5], [-1, 2], [2, 1], [1, 1]])
def test_bad_layers(encoder: Encoder, layers: list[int]) -> None:
    with pytest.raises(SettingsError) as error:
        TokenStateReader(encoder, layers)
    assert str(error.value) == f"layers must be ascending numbers from 0 to 4, given {layers}"


def test_bad_max_tokens(encoder: Encoder) -> None:
    with pytest.raises(SettingsError, match="max_tokens must be at least 1, given 0"):
        TokenStateReader(encoder, [1], max_tokens=0)
