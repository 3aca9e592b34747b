"""Learning with a conditioned start: every algorithm reaches what the start is made of, and tasks stay apart."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.meta.test_adaptation import INNER as PLAIN
from tests.meta.test_meta_gradients import SMOOTH, objective, relative_errors, tasks
from tests.meta.test_training import SETTINGS, assert_same, samplers
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler
from textmeta.errors import SettingsError
from textmeta.meta import training
from textmeta.meta.adaptation import (
    TaskConditions,
    adapt,
    embed_tasks,
    query_logits,
    start_parameters,
    task_weights,
)
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.evaluation import score_episodes
from textmeta.meta.inner_loop import InnerLoopSettings, without_conditioning
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.meta.self_supervision import SelfSupervisionSettings, by_condition
from textmeta.meta.tasks import query_batch, support_and_query_batch, support_batch
from textmeta.meta.training import TrainingResult, train
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.conditioning import BANK, GATES, KEYS, TASK_TEMPERATURE, ConditioningSettings, routing
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.heads import cross_entropy_per_task
from textmeta.model.initialisation import LORA, Parameters
from textmeta.model.lora import LoraSettings
from textmeta.model.task_encoder import TASK_ENCODER, TaskEncoderSettings

SMALL = TaskEncoderSettings(size=8, width=8)
CONDITIONED = {
    "banks": ConditioningSettings("banks", banks=3, task_encoder=SMALL),
    "gates": ConditioningSettings("gates", task_encoder=SMALL),
    "banks and temperature": ConditioningSettings("banks", temperature=True, task_encoder=replace(SMALL, kind="graph")),
    "temperature": ConditioningSettings("none", temperature=True, task_encoder=replace(SMALL, kind="set_transformer")),
}
INNER = replace(PLAIN, conditioning=CONDITIONED["banks"])
each_algorithm = pytest.mark.parametrize("name", sorted(ALGORITHMS))


def moved(encoder: Encoder, inner: InnerLoopSettings, scale: float = 0.05) -> Parameters:
    """Parameters that have learned something, in float64."""
    generator = torch.Generator().manual_seed(2)
    start = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    return {k: (v + scale * torch.randn(v.shape, generator=generator)).double() for k, v in start.items()}


@pytest.mark.parametrize(
    ("name", "title"),
    [("maml", "banks"), ("maml", "banks and temperature"), ("anil", "gates"), ("protonet", "temperature")],
)
def test_meta_gradients_against_finite_differences(name: str, title: str, encoder64: Encoder, corpus: Corpus) -> None:
    inner = ALGORITHMS[name].inner(replace(SMOOTH, conditioning=CONDITIONED[title]))
    parameters, episodes, plan = moved(encoder64, inner), tasks(corpus), MetaGradientSettings()
    found = ALGORITHMS[name].gradient(encoder64, parameters, episodes, inner, plan).gradient
    errors = relative_errors(lambda p: objective(encoder64, p, episodes, inner), parameters, found)
    assert max(errors.values()) < 1e-5, errors
    assert any(key.startswith(TASK_ENCODER) and value.norm() > 1e-4 for key, value in found.items())


@each_algorithm
def test_every_algorithm_teaches_memory_and_task_encoder(
    name: str, encoder64: Encoder, sampler: EpisodeSampler
) -> None:
    algorithm = ALGORITHMS[name]
    inner = algorithm.inner(INNER)
    found = algorithm.gradient(
        encoder64, moved(encoder64, inner), sampler.take(3), inner, MetaGradientSettings()
    ).gradient
    assert all(found[key].any() for key in found if key.startswith((KEYS, BANK)))
    assert found[TASK_ENCODER + "prototype"].any()
    assert found[TASK_ENCODER + "hidden"].any()


@each_algorithm
def test_tasks_together_are_tasks_apart(name: str, encoder64: Encoder, corpus: Corpus) -> None:
    algorithm = ALGORITHMS[name]
    inner = algorithm.inner(replace(INNER, conditioning=CONDITIONED["banks and temperature"]))
    parameters, episodes = moved(encoder64, inner), tasks(corpus)
    together = algorithm.gradient(encoder64, parameters, episodes, inner, MetaGradientSettings())
    apart = [algorithm.gradient(encoder64, parameters, [e], inner, MetaGradientSettings()) for e in episodes]
    torch.testing.assert_close(together.loss, torch.cat([part.loss for part in apart]))
    for key, value in together.gradient.items():
        expected = sum((part.gradient[key] for part in apart), torch.zeros_like(value))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6 * float(value.norm()) + 1e-12)


def test_reptiles_gradient_of_a_bank_is_its_share_of_what_the_tasks_moved(
    encoder64: Encoder, sampler: EpisodeSampler
) -> None:
    inner = ALGORITHMS["reptile"].inner(INNER)
    parameters, episodes = moved(encoder64, inner), sampler.take(3)
    found = ALGORITHMS["reptile"].gradient(encoder64, parameters, episodes, inner, MetaGradientSettings()).gradient
    both = support_and_query_batch(encoder64, episodes)
    with torch.no_grad():
        conditions = embed_tasks(encoder64, parameters, both, inner)
        assert conditions is not None
        start = adapt(encoder64, parameters, both, replace(inner, steps=0)).factors
        end = adapt(encoder64, parameters, both, inner).factors
    shares = routing(parameters, conditions.embedding)
    groups = shares.shape[1]
    names = [name for name in start if "lora_B" in name]
    for number, name in enumerate(names):
        layer = number * 2 // len(names)  # two layers carry LoRA, in this order
        away = start[name] - end[name]
        torch.testing.assert_close(found[LORA + name], away.sum(0))
        share = shares[:, layer * groups // 2] - 1 / 3
        torch.testing.assert_close(found[BANK + name], torch.einsum("tk,tor->kor", share, away))


def test_conditions_can_be_given(encoder64: Encoder, sampler: EpisodeSampler) -> None:
    parameters, support = moved(encoder64, INNER, 0.3), support_batch(encoder64, sampler.take(3))
    own = embed_tasks(encoder64, parameters, support, INNER)
    assert own is not None
    by_itself, given = (adapt(encoder64, parameters, support, INNER, c) for c in (None, own))
    swapped = adapt(encoder64, parameters, support, INNER, TaskConditions(own.embedding.roll(1, 0), own.statistics))
    for name, factor in by_itself.factors.items():
        assert torch.equal(factor, given.factors[name])
        assert "lora_A" in name or not torch.allclose(factor, swapped.factors[name], atol=1e-4)


@pytest.mark.parametrize("title", ["banks and temperature", "temperature"])
@pytest.mark.parametrize("steps", [0, 2])
def test_scores_of_conditioned_episodes_do_not_depend_on_each_other(
    title: str, steps: int, encoder: Encoder, sampler: EpisodeSampler
) -> None:
    inner = replace(INNER, conditioning=CONDITIONED[title], steps=steps)
    parameters = {key: value.float() for key, value in moved(encoder, inner, 0.3).items()}
    episodes = sampler.take(5)
    together = score_episodes(encoder, parameters, episodes, inner)
    alone = [score_episodes(encoder, parameters, [episode], inner).nll[0] for episode in episodes]
    np.testing.assert_allclose(together.nll, alone, rtol=1e-4)
    support, query = support_batch(encoder, episodes), query_batch(encoder, episodes)
    with torch.no_grad():
        adapted = adapt(encoder, parameters, support, inner)
        logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)
    expected = cross_entropy_per_task(logits, query.labels, query.labels >= 0)
    np.testing.assert_allclose(together.nll, expected, rtol=1e-4)
    plain = score_episodes(encoder, parameters, episodes, without_conditioning(inner))
    assert not np.allclose(plain.nll, together.nll, rtol=1e-3)


def run(tiny_model: str, corpus: Corpus, output: Path, settings: TrainingSettings) -> TrainingResult:
    encoder = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4))
    return train(encoder, *samplers(corpus), settings, replace(INNER, steps=2), output)


@pytest.mark.parametrize("algorithm", ["anil", "reptile"])
def test_a_conditioned_run_goes_on_to_the_same_bits(
    algorithm: str, tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervision = SelfSupervisionSettings(episodes=4)
    settings = replace(SETTINGS, algorithm=algorithm, self_supervision=supervision, unconditioned=0.4)
    whole = run(tiny_model, corpus, tmp_path / "whole", settings)
    original, count = training.outer_step, iter(range(100))

    def dying(*arguments: object) -> object:
        if next(count) == 3:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "outer_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, corpus, tmp_path / "parts", settings)
    assert_same(run(tiny_model, corpus, tmp_path / "parts", settings), whole)


def test_self_supervision_and_dropped_conditions_change_a_run(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    plain = replace(
        SETTINGS, algorithm="protonet", self_supervision=SelfSupervisionSettings(episodes=0), unconditioned=0.0
    )
    results = {
        "plain": run(tiny_model, corpus, tmp_path / "a", plain),
        "contrastive": run(
            tiny_model, corpus, tmp_path / "b", replace(plain, self_supervision=SelfSupervisionSettings(episodes=4))
        ),
        "never conditioned": run(tiny_model, corpus, tmp_path / "c", replace(plain, unconditioned=1.0)),
    }
    learned = {title: result.parameters for title, result in results.items()}
    assert not torch.equal(learned["plain"][KEYS], learned["contrastive"][KEYS])
    start = start_parameters(
        {name.removeprefix(LORA): tuple(v.shape) for name, v in learned["plain"].items() if name.startswith(LORA)},
        ALGORITHMS["protonet"].inner(INNER),
        32,
    )
    assert torch.equal(learned["never conditioned"][KEYS], start[KEYS])
    assert not torch.equal(learned["plain"][KEYS], start[KEYS])


def test_the_share_of_unconditioned_episodes_depends_on_their_numbers_alone() -> None:
    def dropped(indices: range) -> set[int]:
        found = by_condition(INNER, 0.25, 0, indices)
        loops = {loop.conditioning is None: part for loop, part in found}
        assert sorted(index for part in loops.values() for index in part) == list(indices)
        return set(loops.get(True, []))

    everything = dropped(range(2000))
    assert 420 < len(everything) < 580
    assert everything == dropped(range(0, 2000, 2)) | dropped(range(1, 2000, 2))  # two processes drop the same
    assert [found for _, found in by_condition(PLAIN, 0.25, 0, range(5))] == [list(range(5))]


def test_settings_out_of_range() -> None:
    with pytest.raises(SettingsError, match="unconditioned must be a share"):
        TrainingSettings(unconditioned=1.5)


def test_gates_and_temperature_are_learned(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    encoder = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4))
    conditioning = replace(CONDITIONED["gates"], temperature=True)
    settings = replace(SETTINGS, algorithm="protonet", unconditioned=0.0)
    result = train(encoder, *samplers(corpus), settings, replace(INNER, conditioning=conditioning), tmp_path)
    assert result.parameters[TASK_TEMPERATURE].any()
    start = start_parameters(encoder.factor_shapes, result.inner, encoder.hidden_size)
    assert not torch.equal(result.parameters[GATES], start[GATES])
