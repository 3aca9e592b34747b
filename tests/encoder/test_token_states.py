"""Token states: batches, gradients and the cache. Against transformers and PEFT: test_families.py."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import WORDS
from tests.encoder.given import TEXTS, assert_close, moved_factors
from tests.given import Patch
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.token_states import TokenStateReader, TokenStates, length_buckets
from textmeta.errors import SettingsError

ALL = range(5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_weights_with_lora_are_made_once_for_factors(encoder: Encoder, precision: str, monkeypatch: Patch) -> None:
    encoder = Encoder(encoder.settings, encoder.lora, precision=precision)
    made: list[int] = []
    add = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *given, **how: made.append(1) or add(*given, **how))
    factors = moved_factors(encoder)
    one, other = (TokenStateReader(encoder) for _ in range(2))
    with torch.inference_mode():
        before = one.read(TEXTS[:2], factors).unpadded()
    count = len(made)
    assert all(map(torch.equal, before, one.read(TEXTS[:2], factors).unpadded()))
    assert len(made) == count == len(factors) // 2
    for value in factors.values():
        value.mul_(2)  # as an optimiser does
    found, expected = (reader.read(TEXTS[:2], factors).unpadded() for reader in (one, other))
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], before[0])


def test_a_text_does_not_depend_on_the_others_and_order_is_kept(encoder64: Encoder) -> None:
    reader = TokenStateReader(encoder64, ALL)
    states = reader.read([*TEXTS, TEXTS[3]])
    alone = [reader.read([text]).unpadded()[0] for text in TEXTS]
    assert_close(states.unpadded(), [*alone, alone[3]], 1e-12)
    assert sorted(torch.cat([batch.rows for batch in states.batches]).tolist()) == list(range(len(TEXTS) + 1))
    assert any(not batch.mask.all() for batch in states.batches)
    assert not any(batch.states.transpose(1, 2)[~batch.mask].any() for batch in states.batches)
    reader.cache([])
    assert reader.read([]) == TokenStates.padded([]) == TokenStates(0, ())
    assert reader.read([]).unpadded() == []


def test_no_forward_is_larger_than_memory_allows(encoder: Encoder) -> None:
    reader = TokenStateReader(encoder)
    text = " ".join(WORDS[:30])  # 32 tokens
    fresh = reader.read([text] * 300).batches
    reader.cache([text])
    for batches in (fresh, reader.read([text] * 300).batches):
        assert [tuple(batch.mask.shape) for batch in batches] == [(60, 32)] * 5


@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 4], [1, 4], [0, 1], [2]])
def test_cache_keeps_halves_for_other_runs(
    encoder: Encoder, layers: list[int], tmp_path: Path, monkeypatch: Patch
) -> None:
    fresh, one, two = (TokenStateReader(encoder, layers) for _ in range(3))
    one.cache(TEXTS, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    kept = load_file(file)["states"]
    number = {(0, 1, 2, 3, 4): 3, (1, 4): 2, (0, 1): 2, (2,): 1}[tuple(layers)]  # what enters layer 3 is of layer 2
    assert kept.shape == (number, sum(state.shape[1] for state in fresh.read(TEXTS).unpadded()), 32)
    assert kept.dtype == torch.float16
    factors = moved_factors(encoder)
    found = one.read(TEXTS, factors).unpadded()
    assert_close(found, fresh.read(TEXTS, factors).unpadded(), 5e-3)
    mixed = [WORDS[100], *TEXTS, WORDS[101]]
    assert_close(one.read(mixed, factors).unpadded(), fresh.read(mixed, factors).unpadded(), 5e-3)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "_prefix", None)  # not called any more
        two.cache([*reversed(TEXTS), *TEXTS], folder=tmp_path)
        for reader in (one, two):
            assert all(map(torch.equal, found, reader.read(TEXTS, factors).unpadded()))
    TokenStateReader(encoder, [0, 3]).cache(TEXTS, folder=tmp_path)  # of other layers
    two.cache(TEXTS, TEXTS[1:], folder=tmp_path)  # of other texts, too
    assert len(list(tmp_path.iterdir())) == 3


def test_an_outlier_is_finite_in_the_cache(encoder: Encoder, monkeypatch: Patch) -> None:
    states = encoder.states
    monkeypatch.setattr(encoder, "states", lambda *given, **how: tuple(1e5 * part for part in states(*given, **how)))
    reader = TokenStateReader(encoder, [2])
    (before,) = reader.read(TEXTS[:1]).unpadded()
    reader.cache(TEXTS[:1])
    (found,) = reader.read(TEXTS[:1]).unpadded()
    assert before.abs().max() > 65504
    torch.testing.assert_close(found, before.clamp(-65504, 65504), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("layers", [[], [0, 5], [-1, 2], [2, 1], [1, 1]])
def test_bad_layers(encoder: Encoder, layers: list[int]) -> None:
    with pytest.raises(SettingsError) as error:
        TokenStateReader(encoder, layers)
    assert str(error.value) == f"layers must be ascending numbers from 0 to 4, given {layers}"


def cost(buckets: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(bucket) * max(lengths[row] for row in bucket) + overhead for bucket in buckets)


def best_cost(lengths: list[int], overhead: int) -> int:
    """Try every way to cut the sorted lengths."""
    ordered, costs = sorted(lengths), []
    for cuts in itertools.product((False, True), repeat=len(ordered) - 1):
        ends = [end for end, cut in enumerate(cuts, 1) if cut] + [len(ordered)]
        parts = itertools.pairwise([0, *ends])
        costs.append(sum((end - start) * ordered[end - 1] + overhead for start, end in parts))
    return min(costs)


@pytest.mark.parametrize("overhead", [0, 3, 10, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_buckets_are_a_partition_of_least_cost(seed: int, overhead: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 20, size=9).tolist()
    buckets = length_buckets(lengths, overhead)
    assert sorted(itertools.chain(*buckets)) == list(range(len(lengths)))
    assert cost(buckets, lengths, overhead) == best_cost(lengths, overhead)
