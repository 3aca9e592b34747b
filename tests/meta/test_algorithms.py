"""One contract for every algorithm, in float64; what is particular to one stands at the end.

The meta-gradients are checked in ``test_meta_gradients.py`` and, against another library, in ``test_peer.py``.
"""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import textmeta.model.encoder as encoder_module
from tests.meta.test_adaptation import INNER, moved_parameters, named
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.errors import SettingsError
from textmeta.meta.adaptation import adapt
from textmeta.meta.algorithms import ALGORITHMS, MetaGradient, episode_chunks
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.meta.tasks import support_and_query_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS
from textmeta.model.initialisation import (
    EVIDENCE_SLOPES,
    LOG_NAME_WEIGHT,
    LORA,
    STRENGTH_PRIOR,
    TEMPERATURE_SLOPES,
    Parameters,
)

EVALUATE = MetaGradientSettings()
CALIBRATED = (TEMPERATURE_SLOPES, EVIDENCE_SLOPES, STRENGTH_PRIOR)  # set by no gradient
each_algorithm = pytest.mark.parametrize("name", sorted(ALGORITHMS))
INNER_LOOPS = {
    "prototype": INNER,
    "ridge": replace(INNER, head="ridge"),
    "readout": replace(INNER, head="readout"),
    "clipped": replace(INNER, max_gradient_norm=1),
}


def meta_gradient(
    name: str,
    encoder: Encoder,
    parameters: Parameters,
    episodes: list[Episode],
    inner: InnerLoopSettings = INNER,
    plan: MetaGradientSettings | None = None,
) -> MetaGradient:
    algorithm = ALGORITHMS[name]
    return algorithm.gradient(encoder, parameters, episodes, algorithm.inner(inner), plan or MetaGradientSettings())


def start_for(name: str, encoder: Encoder, inner: InnerLoopSettings = INNER) -> Parameters:
    """A float64 start for an algorithm."""
    return {key: value.double() for key, value in moved_parameters(encoder, ALGORITHMS[name].inner(inner)).items()}


def assert_equal(one: MetaGradient, two: MetaGradient, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one.loss, two.loss, rtol=tolerance, atol=tolerance)
    assert one.gradient.keys() == two.gradient.keys()
    for key, value in one.gradient.items():
        atol = tolerance * float(value.abs().amax()) if value.numel() else 0.0
        torch.testing.assert_close(value, two.gradient[key], rtol=tolerance, atol=atol)


def mixed_episodes(corpus: Corpus) -> list[Episode]:
    """Tasks of 2 to 5 ways, some with classes of a single example, one with nothing but those; three with names.

    Of these three, one has classes without examples, one names alone.
    """
    settings = EpisodeSettings((2, 5), (1, 4), 3, unbalanced=True)
    unbalanced = EpisodeSampler(corpus, settings, seed=5).take(4)
    one_shot = EpisodeSampler(corpus, EpisodeSettings(3, 1, 2), seed=6).take(1)
    few = EpisodeSampler(corpus, replace(settings, shots=(0, 2), label_names=1.0), seed=5).take(20)
    some = next(e for e in few if {0, 2} <= set(np.bincount(e.support_labels, minlength=e.ways)))
    none = EpisodeSampler(corpus, EpisodeSettings(3, 0, 2, label_names=1.0), seed=7)[0]
    episodes = [*unbalanced[:2], *one_shot, unbalanced[2], *map(named, (unbalanced[3], some, none))]
    assert len({e.ways for e in episodes}) > 2
    assert any(1 in np.bincount(e.support_labels) and max(np.bincount(e.support_labels)) > 1 for e in episodes)
    return episodes


@each_algorithm
def test_parameters_and_frozen_weights_are_left_alone(name: str, encoder64: Encoder, sampler: EpisodeSampler) -> None:
    parameters = start_for(name, encoder64)
    before = {key: value.clone() for key, value in parameters.items()}
    weights = {key: value.clone() for key, value in encoder64._suffix.state_dict().items()}
    meta_gradient(name, encoder64, parameters, sampler.take(2))
    assert all(torch.equal(parameters[key], value) for key, value in before.items())
    assert not any(value.requires_grad for value in parameters.values())
    assert all(torch.equal(encoder64._suffix.state_dict()[key], value) for key, value in weights.items())
    assert all(weight.grad is None for weight in encoder64._suffix.parameters())


@pytest.mark.parametrize("inner", INNER_LOOPS.values(), ids=INNER_LOOPS)
@each_algorithm
def test_gradients_are_finite_complete_and_repeatable(
    name: str, inner: InnerLoopSettings, encoder: Encoder, sampler: EpisodeSampler
) -> None:
    parameters = moved_parameters(encoder, ALGORITHMS[name].inner(inner))  # float32, as in training
    episodes = [sampler[0], named(sampler[1])]
    one, two = (meta_gradient(name, encoder, parameters, episodes, inner).gradient for _ in range(2))
    assert one.keys() == parameters.keys()
    for key, value in one.items():
        assert value.shape == parameters[key].shape
        assert value.isfinite().all()
        assert torch.equal(value, two[key])
        if key in CALIBRATED:
            assert not value.any()
        else:
            assert value.any() or name in ("protonet", "reptile") or not value.numel()
    assert all(one[key].any() for key in one if key.startswith(LORA))


@pytest.mark.parametrize("head", sorted(HEADS))
@each_algorithm
def test_the_name_weight_is_learned_from_names_alone(
    name: str, head: Any, encoder: Encoder, sampler: EpisodeSampler
) -> None:
    inner = replace(INNER, head=head)
    parameters = moved_parameters(encoder, ALGORITHMS[name].inner(inner))
    without, with_names = (
        meta_gradient(name, encoder, parameters, episodes, inner).gradient
        for episodes in (sampler.take(2), [sampler[0], named(sampler[1])])
    )
    assert not without[LOG_NAME_WEIGHT].any()
    assert with_names[LOG_NAME_WEIGHT].any() == (name != "reptile")  # which learns no scalars


@pytest.mark.parametrize("inner", INNER_LOOPS.values(), ids=INNER_LOOPS)
@each_algorithm
def test_tasks_together_are_the_sum_of_tasks_alone(
    name: str, inner: InnerLoopSettings, encoder64: Encoder, corpus: Corpus
) -> None:
    episodes = mixed_episodes(corpus)
    parameters = start_for(name, encoder64, inner)
    together = meta_gradient(name, encoder64, parameters, episodes, inner)
    alone = [meta_gradient(name, encoder64, parameters, [e], inner) for e in episodes]
    sums = {key: torch.stack([part.gradient[key] for part in alone]).sum(0) for key in together.gradient}
    assert_equal(together, MetaGradient(sums, torch.cat([part.loss for part in alone]), together.accuracy))


@pytest.mark.parametrize("texts_at_once", [1, 40])
@each_algorithm
def test_the_result_does_not_depend_on_chunks(
    name: str, texts_at_once: int, encoder64: Encoder, corpus: Corpus
) -> None:
    episodes = mixed_episodes(corpus)
    parameters = start_for(name, encoder64)
    plan = MetaGradientSettings(texts_at_once=texts_at_once)
    assert 1 < len(list(episode_chunks(episodes, texts_at_once))) <= len(episodes)
    assert_equal(
        meta_gradient(name, encoder64, parameters, episodes),
        meta_gradient(name, encoder64, parameters, episodes, plan=plan),
        1e-9,
    )


@each_algorithm
def test_the_order_of_classes_and_examples_does_not_matter(name: str, encoder64: Encoder, corpus: Corpus) -> None:
    rng = np.random.default_rng(0)

    def shuffled(e: Episode) -> Episode:
        new_label = rng.permutation(e.ways)
        names = e.label_names and tuple(e.label_names[i] for i in np.argsort(new_label))
        support, query = rng.permutation(len(e.support_texts)), rng.permutation(len(e.query_texts))
        return replace(
            e,
            support_texts=tuple(e.support_texts[i] for i in support),
            support_labels=new_label[e.support_labels][support],
            query_texts=tuple(e.query_texts[i] for i in query),
            query_labels=new_label[e.query_labels][query],
            label_names=names,
        )

    episodes = mixed_episodes(corpus)
    parameters = start_for(name, encoder64)
    one = meta_gradient(name, encoder64, parameters, episodes)
    assert_equal(one, meta_gradient(name, encoder64, parameters, [shuffled(e) for e in episodes]))


@each_algorithm
def test_padding_does_not_matter(
    name: str, encoder64: Encoder, sampler: EpisodeSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = start_for(name, encoder64)
    buckets = meta_gradient(name, encoder64, parameters, sampler.take(2))
    monkeypatch.setattr(encoder_module, "length_buckets", lambda lengths, *_: [list(range(len(lengths)))])
    assert len(encoder64.prepare(["bal bel", "bal " * 20]).buckets) == 1
    assert_equal(buckets, meta_gradient(name, encoder64, parameters, sampler.take(2)))


@each_algorithm
def test_loss_falls_on_a_toy_problem(name: str, encoder: Encoder, corpus: Corpus) -> None:
    algorithm = ALGORITHMS[name]
    episodes = EpisodeSampler(corpus, EpisodeSettings(4, 3, 3), seed=0).take(4)
    inner = algorithm.inner(replace(INNER, lora_epsilon=1e-2, offset_epsilon=1e-2))
    parameters = moved_parameters(encoder, inner)

    def query_loss(parameters: Parameters) -> float:  # after the inner steps, for Reptile too
        as_fomaml = ALGORITHMS["fomaml"].gradient(encoder, parameters, episodes, inner, EVALUATE)
        return float(as_fomaml.loss.mean())

    before = query_loss(parameters)
    for _ in range(30):
        found = algorithm.gradient(encoder, parameters, episodes, inner, EVALUATE).gradient
        scale = 1.0 / len(episodes) if algorithm.optimiser == "sgd" else 0.03 / max(v.norm() for v in found.values())
        parameters = {key: value - scale * found[key] for key, value in parameters.items()}
    assert query_loss(parameters) < 0.9 * before


@pytest.mark.parametrize("name", ["anil", "fomaml", "maml", "meta_sgd"])
def test_without_steps_an_algorithm_is_protonet(name: str, encoder64: Encoder, sampler: EpisodeSampler) -> None:
    inner = replace(INNER, steps=0)
    parameters = start_for("fomaml", encoder64, inner)
    one, two = (
        ALGORITHMS[each].gradient(encoder64, parameters, sampler.take(3), inner, EVALUATE)
        for each in (name, "protonet")
    )
    assert torch.equal(one.loss, two.loss)
    assert all(torch.equal(value, two.gradient[key]) for key, value in one.gradient.items())


@each_algorithm
def test_threads_do_not_disturb_each_other(name: str, encoder64: Encoder, sampler: EpisodeSampler) -> None:
    """Second-order steps in one thread beside first-order ones in others, all on one encoder."""
    names = [name, "fomaml", "maml"]
    starts = {each: start_for(each, encoder64) for each in names}
    alone = [meta_gradient(each, encoder64, starts[each], [sampler[i]]) for i, each in enumerate(names)]
    found: dict[tuple[int, int], MetaGradient] = {}

    def work(i: int) -> None:
        for repeat in range(3):
            found[i, repeat] = meta_gradient(names[i], encoder64, starts[names[i]], [sampler[i]])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    for (i, _), result in found.items():
        assert_equal(alone[i], result, 1e-12)


def test_a_reptile_step_is_interpolation(encoder: Encoder, sampler: EpisodeSampler) -> None:
    """θ + ε mean_i(θ_i - θ), from the adapted parameters themselves."""
    inner = ALGORITHMS["reptile"].inner(INNER)
    episodes, epsilon = sampler.take(3), 0.4
    parameters = moved_parameters(encoder, inner)
    found = meta_gradient("reptile", encoder, parameters, episodes).gradient
    adapted = adapt(encoder, parameters, support_and_query_batch(encoder, episodes), inner)
    for name, factors in adapted.factors.items():
        start = parameters[LORA + name]
        expected = (1 - epsilon) * start + epsilon * factors.mean(0)
        torch.testing.assert_close(start - epsilon * found[LORA + name] / 3, expected)
        assert not torch.allclose(expected, start)
    assert all(not value.any() for key, value in found.items() if not key.startswith(LORA))


def test_what_each_algorithm_adapts() -> None:
    given = InnerLoopSettings()
    assert ALGORITHMS["reptile"].inner(given).adapt == ("lora_A", "lora_B", "offset")
    assert ALGORITHMS["anil"].inner(given).adapt == ("offset",)
    assert ALGORITHMS["meta_sgd"].inner(given).step_sizes == "tensor"
    assert ALGORITHMS["protonet"].inner(given).steps == 0
    assert ALGORITHMS["maml"].inner(given) == ALGORITHMS["fomaml"].inner(given) == given


def test_anil_runs_the_encoder_on_the_support_set_once(
    encoder: Encoder, sampler: EpisodeSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = encoder.features
    monkeypatch.setattr(encoder, "features", lambda *args: calls.append(1) or original(*args))
    meta_gradient("anil", encoder, moved_parameters(encoder, ALGORITHMS["anil"].inner(INNER)), sampler.take(2))
    assert len(calls) == 2  # support and query


@pytest.mark.parametrize("wrong", [{"second_order_steps": -1}, {"texts_at_once": 0}])
def test_settings_out_of_range_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        MetaGradientSettings(**wrong)


@pytest.mark.parametrize("checkpointed", [False, True])
@each_algorithm
def test_the_result_does_not_depend_on_what_is_recomputed(
    name: str, checkpointed: bool, encoder64: Encoder, sampler: EpisodeSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole inner steps, and forwards of many texts, with each other and alone."""
    parameters = start_for(name, encoder64)
    kept = meta_gradient(name, encoder64, parameters, sampler.take(2), plan=MetaGradientSettings(checkpointed=False))
    monkeypatch.setattr(encoder_module, "CHECKPOINT_ROWS", 4)
    plan = MetaGradientSettings(checkpointed=checkpointed)
    random_state = torch.get_rng_state()
    assert_equal(kept, meta_gradient(name, encoder64, parameters, sampler.take(2), plan=plan), 1e-12)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_random_state_of_the_process_is_left_alone(
    checkpointed: bool, encoder: Encoder, sampler: EpisodeSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even set to what it was: another thread may have drawn from it meanwhile."""
    monkeypatch.setattr(torch, "set_rng_state", lambda _: pytest.fail("set"))
    monkeypatch.setattr(encoder_module, "CHECKPOINT_ROWS", 4 if checkpointed else 1024)
    plan = MetaGradientSettings(checkpointed=checkpointed)
    meta_gradient("maml", encoder, moved_parameters(encoder), sampler.take(1), plan=plan)


def test_large_second_order_steps_are_recomputed() -> None:
    assert not MetaGradientSettings().saves_memory(texts=100, steps=5)
    assert MetaGradientSettings().saves_memory(texts=100, steps=6)
    assert not MetaGradientSettings(checkpointed=False).saves_memory(texts=100, steps=60)
    assert MetaGradientSettings(checkpointed=True).saves_memory(texts=1, steps=1)
