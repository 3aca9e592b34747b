"""One contract for every algorithm, and each one's own equation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.meta.test_adaptation import INNER, moved_parameters
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.meta import inner_loop
from textmeta.meta.adaptation import adapt, query_logits, task_weights
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import query_batch, support_and_query_batch, support_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import cross_entropy_per_task
from textmeta.model.initialisation import LORA, Parameters

each_algorithm = pytest.mark.parametrize("name", sorted(ALGORITHMS))


def gradient(name: str, encoder: Encoder, parameters: Parameters, episodes: list[Episode]) -> Parameters:
    algorithm = ALGORITHMS[name]
    return algorithm.gradient(encoder, parameters, episodes, algorithm.inner(INNER)).gradient


def start_for(name: str, encoder: Encoder) -> Parameters:
    return moved_parameters(encoder, ALGORITHMS[name].inner(INNER))


@each_algorithm
def test_parameters_and_frozen_weights_are_left_alone(name: str, encoder: Encoder, sampler: EpisodeSampler) -> None:
    parameters = start_for(name, encoder)
    before = {key: value.clone() for key, value in parameters.items()}
    weights = {key: value.clone() for key, value in encoder._suffix.state_dict().items()}
    gradient(name, encoder, parameters, sampler.take(2))
    assert all(torch.equal(parameters[key], value) for key, value in before.items())
    assert all(torch.equal(encoder._suffix.state_dict()[key], value) for key, value in weights.items())


@each_algorithm
def test_gradients_are_finite_complete_and_repeatable(name: str, encoder: Encoder, sampler: EpisodeSampler) -> None:
    parameters = start_for(name, encoder)
    one, two = (gradient(name, encoder, parameters, sampler.take(2)) for _ in range(2))
    assert one.keys() == parameters.keys()
    for key, value in one.items():
        assert value.shape == parameters[key].shape
        assert value.isfinite().all()
        assert torch.equal(value, two[key])
    assert all(one[key].any() for key in one if key.startswith(LORA))


@each_algorithm
def test_tasks_together_are_the_sum_of_tasks_alone(name: str, encoder: Encoder, corpus: Corpus) -> None:
    episodes = EpisodeSampler(corpus, EpisodeSettings((2, 5), (1, 4), 3, unbalanced=True), seed=5).take(4)
    parameters = start_for(name, encoder)
    together = gradient(name, encoder, parameters, episodes)
    alone = [gradient(name, encoder, parameters, [e]) for e in episodes]
    for key, value in together.items():
        torch.testing.assert_close(value, torch.stack([part[key] for part in alone]).sum(0), rtol=1e-3, atol=1e-5)


@each_algorithm
def test_loss_falls_on_a_toy_problem(name: str, encoder: Encoder, corpus: Corpus) -> None:
    algorithm = ALGORITHMS[name]
    inner = algorithm.inner(INNER)
    episodes = EpisodeSampler(corpus, EpisodeSettings(4, 3, 3), seed=0).take(4)
    parameters = start_for(name, encoder)

    def query_loss(parameters: Parameters) -> float:
        with torch.no_grad():
            support, query = support_batch(encoder, episodes), query_batch(encoder, episodes)
            adapted = adapt(encoder, parameters, support, inner)
            logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)
            return float(cross_entropy_per_task(logits, query.labels, query.labels >= 0).mean())

    before = query_loss(parameters)
    for _ in range(30 if algorithm.optimiser == "sgd" else 12):
        found = gradient(name, encoder, parameters, episodes)
        scale = 1.0 / len(episodes) if algorithm.optimiser == "sgd" else 0.1 / max(v.norm() for v in found.values())
        parameters = {key: value - scale * found[key] for key, value in parameters.items()}
    assert query_loss(parameters) < 0.9 * before


def test_without_steps_fomaml_is_protonet(encoder: Encoder, sampler: EpisodeSampler) -> None:
    inner = replace(INNER, steps=0)
    parameters = moved_parameters(encoder, inner)
    one, two = (
        ALGORITHMS[name].gradient(encoder, parameters, sampler.take(3), inner) for name in ("fomaml", "protonet")
    )
    assert torch.equal(one.loss, two.loss)
    assert all(torch.equal(value, two.gradient[key]) for key, value in one.gradient.items())


def double(encoder: Encoder, parameters: Parameters) -> Parameters:
    """Turn encoder and parameters to float64."""
    encoder._suffix.double()
    assert encoder._prefix is not None
    encoder._prefix.double()
    return {key: value.double() for key, value in parameters.items()}


def test_fomaml_is_the_gradient_with_the_directions_held_constant(encoder: Encoder, sampler: EpisodeSampler) -> None:
    """Against central differences of L_query(θ - Σ α ĝ), with ĝ computed once at θ and then kept."""
    episodes = sampler.take(2)
    inner = INNER
    parameters = double(encoder, moved_parameters(encoder, inner))
    support, query = support_batch(encoder, episodes), query_batch(encoder, episodes)
    recorded: list[dict[str, Tensor]] = []
    original = inner_loop._directions

    def loss(values: Parameters) -> Tensor:
        with torch.no_grad():
            adapted = adapt(encoder, values, support, inner)
            logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)
            return cross_entropy_per_task(logits, query.labels, query.labels >= 0).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner_loop, "_directions", lambda *args: recorded.append(original(*args)) or recorded[-1])
        loss(parameters)
    found = ALGORITHMS["fomaml"].gradient(encoder, parameters, episodes, inner).gradient
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in parameters.items():
            along = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            along /= along.norm()
            ends = []
            for sign in (1, -1):
                kept = iter(recorded)
                patch.setattr(inner_loop, "_directions", lambda *args, kept=kept: next(kept))
                ends.append(loss({**parameters, key: value + sign * 1e-5 * along}))
            expected = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close((found[key] * along).sum(), expected, rtol=1e-4, atol=1e-8)
    assert found["log_temperature"].abs() > 1e-4
    assert all(found[key].abs().max() > 1e-6 for key in found if key.startswith("log_step_size"))


def test_a_reptile_step_is_interpolation(encoder: Encoder, sampler: EpisodeSampler) -> None:
    """θ + ε mean_i(θ_i - θ), from the adapted parameters themselves."""
    algorithm = ALGORITHMS["reptile"]
    inner = algorithm.inner(INNER)
    episodes, epsilon = sampler.take(3), 0.4
    parameters = moved_parameters(encoder, inner)
    found = algorithm.gradient(encoder, parameters, episodes, inner).gradient
    adapted = adapt(encoder, parameters, support_and_query_batch(encoder, episodes), inner)
    for name, factors in adapted.factors.items():
        start = parameters[LORA + name]
        expected = (1 - epsilon) * start + epsilon * factors.mean(0)
        torch.testing.assert_close(start - epsilon * found[LORA + name] / 3, expected)
        assert not torch.allclose(expected, start)
    assert all(not value.any() for key, value in found.items() if not key.startswith(LORA))


def test_reptile_adapts_both_factors(encoder: Encoder, sampler: EpisodeSampler) -> None:
    assert ALGORITHMS["reptile"].inner(InnerLoopSettings()).adapt == ("lora_A", "lora_B", "offset")
