"""Calibration finds what synthetic tasks were made with, and measures what adaptation makes of real ones."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.meta.test_adaptation import INNER, moved_parameters, named
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.errors import DataError, SettingsError
from textmeta.meta.adaptation import adapt, left_out_logits, query_logits, start_parameters, task_size, task_weights
from textmeta.meta.calibration import (
    CALIBRATED,
    CalibrationSettings,
    as_used,
    calibrate,
    calibrated,
    calibration_episodes,
    recalibrate,
)
from textmeta.meta.evaluation import score_episodes
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.task_measures import TaskMeasures, leave_out_classes, measure_adapted_tasks, measure_tasks
from textmeta.meta.tasks import query_batch, support_batch, task_batch
from textmeta.meta.training import TrainingResult
from textmeta.model.conditioning import ConditioningSettings
from textmeta.encoder.encoder import Encoder
from textmeta.model.heads import HEADS
from textmeta.model.initialisation import (
    EVIDENCE_SLOPES,
    LOG_ADAPTED_FACTOR,
    LORA,
    SCOPE,
    STRENGTH_PRIOR,
    TEMPERATURE_SLOPES,
    Parameters,
)
from textmeta.model.scope import RULE_SIZE, rule_of_task, scope_probability, task_inputs, text_inputs

PLAIN = replace(INNER, steps=0)
PARAMETERS = {"log_temperature": torch.tensor(1.0), "lora.x": torch.ones(2)}  # what calibrate looks at, and leaves


def measures(
    rng: np.random.Generator,
    strengths: int = 1,
    true: int = 0,
    temperature: Callable[[np.ndarray], float] = lambda size: 4.0,
    queries: int = 60,
    told: np.ndarray | None = None,
) -> TaskMeasures:
    """Return a task whose labels are drawn from softmax(t · logits) at its true strength, and tell of no other.

    What its support set is told to say of it has no part in that, by default.
    """
    told = np.zeros((strengths, 2)) if told is None else told
    ways, shots = int(rng.integers(2, 12)), int(rng.integers(1, 9))
    size = np.array([math.log(shots), math.log(ways / 5)])
    logits = rng.normal(size=(strengths, queries, ways))
    left_out = rng.normal(size=(strengths, ways * shots, ways))

    def drawn(of: np.ndarray) -> np.ndarray:
        return (temperature(size) * of[true] + rng.gumbel(size=of[true].shape)).argmax(1)  # a sample of the softmax

    counts, outside = np.full(ways * shots, shots > 1), np.empty((strengths, 0, ways))
    return TaskMeasures(size, left_out, drawn(left_out), counts, told, logits, drawn(logits), outside)


@pytest.mark.parametrize(("shots", "ways"), [(0.0, 0.0), (0.5, -0.3), (-0.4, 0.6)])
def test_temperature_is_that_of_the_labels(shots: float, ways: float) -> None:
    rng = np.random.default_rng(0)
    tasks = [measures(rng, temperature=lambda size: 3 * math.exp(size @ [shots, ways])) for _ in range(100)]
    found = calibrate(PARAMETERS, tasks)
    assert float(found["log_temperature"]) == pytest.approx(math.log(3), abs=0.1)
    assert found[TEMPERATURE_SLOPES].tolist() == pytest.approx([shots, ways], abs=0.1)
    assert found[STRENGTH_PRIOR].tolist() == [0.0]


def test_slope_of_the_loss_is_that_of_differences() -> None:
    task, h = measures(np.random.default_rng(9), strengths=2), 1e-6
    for strength in (0, 1):
        up, down = (task.query_nll(strength, 3 * math.exp(step)) for step in (h, -h))
        assert task.query_nll_slope(strength, 3.0) == pytest.approx((up - down) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("slopes", [(0.0, 0.0), (-0.5, 1.2)])
def test_temperature_grows_with_evidence_as_it_does_in_the_labels(slopes: tuple[float, float]) -> None:
    rng, tasks = np.random.default_rng(8), []
    for _ in range(150):
        share = rng.uniform()
        told = np.array([[share, share * rng.uniform()]])
        tasks.append(measures(rng, temperature=lambda _, told=told: 3 * math.exp(told[0] @ slopes), told=told))
    found = calibrate(PARAMETERS, tasks)
    assert float(found["log_temperature"]) == pytest.approx(math.log(3), abs=0.15)
    assert found[EVIDENCE_SLOPES].tolist() == pytest.approx(slopes, abs=0.25)
    assert found[TEMPERATURE_SLOPES].tolist() == pytest.approx([0, 0], abs=0.1)


@pytest.mark.parametrize("true", [0, 1, 2])
def test_prior_finds_the_strength_that_is_better(true: int) -> None:
    rng = np.random.default_rng(1)
    found = calibrate(PARAMETERS, [measures(rng, strengths=3, true=true, queries=20) for _ in range(40)])
    prior = found[STRENGTH_PRIOR]
    assert int(prior.argmax()) == true, "which decides at 1 shot"
    assert prior.max() == 0
    assert float(found["log_temperature"]) == pytest.approx(math.log(4), abs=0.2), "fitted on those that were chosen"


def test_prior_leaves_the_choice_to_the_examples_where_they_can_tell() -> None:
    """Half of the tasks are better at one strength, half at the other, and their support sets say at which."""
    rng = np.random.default_rng(2)
    tasks = [measures(rng, strengths=2, true=number % 2, queries=20) for number in range(80)]
    tasks = [task for task in tasks if task.counts.sum() > 20]
    found = calibrate(PARAMETERS, tasks)
    temperature = float(found["log_temperature"].exp())
    assert temperature == pytest.approx(4, rel=0.2)
    each = np.full(2, temperature)
    chosen = [(t.support_log_likelihoods(each) + found[STRENGTH_PRIOR].numpy()).argmax() for t in tasks]
    best = [np.argmin([t.query_nll(s, temperature) for s in (0, 1)]) for t in tasks]
    assert set(best) == {0, 1}
    assert np.mean(np.equal(chosen, best)) > 0.95


def test_ridge_weight_is_that_of_the_labels() -> None:
    rng = np.random.default_rng(3)
    tasks = []
    for _ in range(25):
        task = measures(rng, queries=40)
        ridge = tuple(rng.normal(size=part.shape) for part in (task.left_out, task.queries, task.outside))
        own = replace(task, ridge=ridge).with_more_ridge(0.8)  # measured at 0.2, the labels are of 1
        drawn = (4.0 * own.queries[0] + rng.gumbel(size=own.queries[0].shape)).argmax(1)
        tasks.append(replace(task, ridge=ridge, query_labels=drawn))
    found = calibrate({**PARAMETERS, "log_ridge_weight": torch.tensor(0.2).log()}, tasks)
    assert float(found["log_ridge_weight"].exp()) == pytest.approx(1.0)
    assert float(found["log_temperature"].exp()) == pytest.approx(4, rel=0.3)
    assert "log_ridge_weight" not in calibrate(PARAMETERS, tasks)


def with_outside(rng: np.random.Generator) -> TaskMeasures:
    """Return a task whose queries are near a class, and as many texts that are not; how near, differs by the task."""
    task, level = measures(rng, queries=30), rng.normal()
    inside = 0.3 * rng.normal(size=task.queries.shape) + level
    inside[0, np.arange(30), task.query_labels] += 2
    outside = 0.3 * rng.normal(size=(1, 10, inside.shape[2])) + level
    left_out = 0.3 * rng.normal(size=task.left_out.shape) + level
    left_out[0, np.arange(len(task.labels)), task.labels] += 2
    return replace(task, queries=inside, outside=outside, left_out=left_out)


def probabilities(rule: Tensor, task: TaskMeasures, logits: np.ndarray) -> Tensor:
    one = torch.tensor(1.0, dtype=torch.float64)
    left_out, counts = torch.from_numpy(task.left_out[0]), torch.from_numpy(task.counts)
    of_task = task_inputs(left_out, torch.from_numpy(task.labels), counts, torch.from_numpy(task.size), one)
    return scope_probability(rule_of_task(rule.double(), of_task), text_inputs(torch.from_numpy(logits[0]), one))


def test_scope_separates_inside_from_outside() -> None:
    rng = np.random.default_rng(4)
    rule = calibrate(PARAMETERS, [with_outside(rng) for _ in range(40)])[SCOPE]
    assert rule.shape == (RULE_SIZE,)
    others = [with_outside(rng) for _ in range(30)]
    inside = torch.cat([probabilities(rule, task, task.queries) for task in others])
    outside = torch.cat([probabilities(rule, task, task.outside) for task in others])
    assert (inside > 0.5).float().mean() > 0.95
    assert (outside < 0.5).float().mean() > 0.95, "inside and outside weigh the same, though there are more inside"


def test_scope_looks_at_what_is_usual_in_the_task() -> None:
    """Without margin or energy to go by, only the examples tell how near is near."""
    rng = np.random.default_rng(5)
    tasks = [task for task in (with_outside(rng) for _ in range(40)) if task.counts.all()]
    rule = calibrate(PARAMETERS, tasks)[SCOPE]
    higher = replace(tasks[0], left_out=tasks[0].left_out + 1)
    assert (probabilities(rule, higher, tasks[0].queries) < probabilities(rule, tasks[0], tasks[0].queries)).all()


def test_no_scope_without_anything_outside() -> None:
    rng = np.random.default_rng(6)
    assert SCOPE not in calibrate(PARAMETERS, [measures(rng) for _ in range(5)])
    some = calibrate(PARAMETERS, [*(measures(rng) for _ in range(5)), *(with_outside(rng) for _ in range(5))])
    assert some[SCOPE].isfinite().all()


def test_everything_else_is_left_alone(encoder: Encoder, corpus: Corpus) -> None:
    inner = replace(PLAIN, head="readout", strengths=(0.0, 1.0))
    parameters = moved_parameters(encoder, inner)
    before = {name: value.clone() for name, value in parameters.items()}
    episodes = EpisodeSampler(corpus, EpisodeSettings((3, 6), (1, 4), 3), seed=0).take(6)
    found = calibrate(parameters, measure_tasks(encoder, parameters, inner, episodes))
    fitted = set(CALIBRATED)
    temperature = {"log_temperature", TEMPERATURE_SLOPES, EVIDENCE_SLOPES, LOG_ADAPTED_FACTOR}
    assert fitted == {*temperature, "log_ridge_weight", STRENGTH_PRIOR, SCOPE}
    assert found.keys() == parameters.keys() | {SCOPE}
    assert all(torch.equal(value, before[name]) for name, value in parameters.items()), "what was given"
    assert all(torch.equal(found[name], before[name]) for name in before.keys() - fitted)
    assert sum(name.startswith(LORA) for name in before.keys() - fitted) == len(encoder.factor_shapes)
    assert all(found[name].dtype == torch.float32 for name in fitted & found.keys())


# Episodes


@pytest.mark.parametrize(("ways", "kept"), [(2, 2), (3, 2), (4, 3), (6, 4), (11, 8)])
@pytest.mark.parametrize("names", [False, True])
def test_a_third_of_the_classes_is_left_out(ways: int, kept: int, names: bool, corpus: Corpus) -> None:
    whole = EpisodeSampler(corpus, EpisodeSettings(ways, (1, 3), 4, unbalanced=True), seed=0)[0]
    whole = named(whole) if names else whole
    task, outside = leave_out_classes(whole)
    assert (task.ways, task.corpus) == (kept, whole.corpus)
    assert task.class_names == whole.class_names[:kept]
    assert task.label_names == (whole.label_names[:kept] if whole.label_names else None)
    rows = {text: int(label) for text, label in zip(whole.support_texts, whole.support_labels, strict=True)}
    assert dict(zip(task.support_texts, task.support_labels.tolist(), strict=True)) == {
        text: label for text, label in rows.items() if label < kept
    }
    rows = {text: int(label) for text, label in zip(whole.query_texts, whole.query_labels, strict=True)}
    assert dict(zip(task.query_texts, task.query_labels.tolist(), strict=True)) == {
        text: label for text, label in rows.items() if label < kept
    }
    assert sorted(outside) == sorted(text for text, label in rows.items() if label >= kept)
    assert len(outside) == 4 * (ways - kept)


def texts_of(episodes: list[Episode]) -> list[tuple[str, ...]]:
    return [e.support_texts + e.query_texts for e in episodes]


def test_episodes_are_the_same_each_time_and_of_few_texts(corpus: Corpus) -> None:
    settings = CalibrationSettings(episodes=31, rows=9, ways=(3, 40), shots=(1, 5), queries=4)
    episodes = calibration_episodes(corpus, settings, seed=3)
    assert len(episodes) == 31
    assert texts_of(episodes) == texts_of(calibration_episodes(corpus, settings, seed=3))
    assert texts_of(episodes) != texts_of(calibration_episodes(corpus, settings, seed=4))
    shots = [len(e.support_labels) // e.ways for e in episodes]
    assert set(shots[:16]) == {1, 2}
    assert max(shots[16:]) == 5
    assert {e.ways for e in episodes} <= set(range(3, 13)), "there are 12 classes"
    used = {text for texts in texts_of(episodes) for text in texts}
    of_class = dict(zip(corpus.texts, corpus.labels, strict=True))
    assert max(np.bincount([of_class[text] for text in used])) <= 9
    one = calibration_episodes(corpus, replace(settings, shots=1), seed=3)
    assert {len(e.support_labels) // e.ways for e in one} == {1}


def test_thinned_keeps_different_rows_of_every_class(corpus: Corpus) -> None:
    twice = Corpus.from_pairs(
        "twice", [*corpus.texts, *corpus.texts], [corpus.class_names[c] for c in corpus.labels] * 2
    )
    few = twice.thinned(5, seed=0)
    assert few.class_names == twice.class_names
    assert np.bincount(few.labels).tolist() == [5] * 12
    assert len(set(few.texts)) == 60
    given = set(zip(corpus.texts, corpus.labels, strict=True))
    assert set(zip(few.texts, few.labels, strict=True)) <= given
    assert list(few.texts) != list(twice.thinned(5, seed=1).texts)
    assert len(corpus.thinned(100, seed=0).texts) == len(set(corpus.texts))


def test_coarse_tasks_have_unions_of_classes(corpus: Corpus) -> None:
    settings = CalibrationSettings(episodes=40, rows=20, ways=(3, 40), shots=(1, 3), queries=4, coarse=0.5)
    episodes = calibration_episodes(corpus, settings, seed=3)
    assert len(episodes) == 40
    assert texts_of(episodes) == texts_of(calibration_episodes(corpus, settings, seed=3))
    plain = calibration_episodes(corpus, replace(settings, episodes=20, coarse=0.0), seed=3)
    assert texts_of(episodes[:20]) == texts_of(plain)
    sizes = {name.count(" / ") + 1 for e in episodes[20:] for name in e.class_names}
    assert sizes == {2, 3, 6}, "12 classes: six of 2, four of 3, two of 6"
    of = dict(zip(corpus.texts, corpus.labels, strict=True))
    for e in episodes:
        for text, label in zip(e.support_texts + e.query_texts, [*e.support_labels, *e.query_labels], strict=True):
            assert corpus.class_names[of[text]] in e.class_names[label].split(" / ")
    two = corpus.restrict(corpus.class_names[:2])
    assert texts_of(calibration_episodes(two, settings, 3)) == texts_of(
        calibration_episodes(two, replace(settings, coarse=0.0), 3)
    ), "there is nothing to merge"


@pytest.mark.parametrize(("size", "left"), [(2, 6), (3, 4), (5, 2), (7, 2), (100, 2)])
def test_merged_classes_hold_what_they_are_of(size: int, left: int, corpus: Corpus) -> None:
    found = corpus.merged(size, seed=1)
    assert (len(found.class_names), found.texts, found.name) == (left, corpus.texts, corpus.name)
    parts = [name.split(" / ") for name in found.class_names]
    assert sorted(name for part in parts for name in part) == sorted(corpus.class_names)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(corpus.class_names[a] in parts[b] for a, b in zip(corpus.labels, found.labels, strict=True))
    assert found.class_names == corpus.merged(size, seed=1).class_names
    assert found.class_names != corpus.merged(size, seed=2).class_names
    with pytest.raises(DataError, match="has 2 classes: to be merged it needs at least 3"):
        corpus.restrict(corpus.class_names[:2]).merged(2, seed=0)


def test_unusable_settings_and_small_classes_are_errors(corpus: Corpus) -> None:
    for name in ("episodes", "rows", "adapted_episodes"):
        with pytest.raises(SettingsError, match=f"calibration {name} must be at least 1, given 0"):
            CalibrationSettings(**{name: 0})
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(SettingsError, match="calibration coarse is a share, from 0 to 1, given"):
            CalibrationSettings(coarse=share)
    with pytest.raises(DataError, match="has 8 rows"):
        calibration_episodes(corpus, CalibrationSettings(rows=8, shots=(1, 5), queries=4), seed=0)
    with pytest.raises(SettingsError, match="shots must be"):
        calibration_episodes(corpus, CalibrationSettings(shots=(0, 5)), seed=0)


# Measures


def told(left_out: np.ndarray, task: TaskMeasures) -> tuple[float, float]:
    """Return the evidence of leave-one-out logits (n, C), counted."""
    right = [logits.argmax() == label for logits, label, c in zip(left_out, task.labels, task.counts, strict=True) if c]
    share, chance = len(right) / (len(right) + 10), 1 / left_out.shape[1]
    return share, share * (np.mean(right or [0]) - chance) / (1 - chance)


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("names", [False, True])
def test_measures_are_those_of_adapt(head: Any, names: bool, encoder: Encoder, corpus: Corpus) -> None:
    """At a temperature of 1, of an adapter with so much of B, adapted to what is left of the task."""
    inner = replace(PLAIN, head=head, strengths=(0.0, 0.5, 2.0))
    parameters = {**moved_parameters(encoder, inner), TEMPERATURE_SLOPES: torch.tensor([0.4, -0.3])}
    episodes = EpisodeSampler(corpus, EpisodeSettings((2, 6), (1, 3), 4), seed=1).take(5)
    episodes = [*map(named, episodes)] if names else episodes
    found = measure_tasks(encoder, parameters, inner, episodes)
    assert len({task.queries.shape[2] for task in found}) > 1
    for whole, task in zip(episodes, found, strict=True):
        e, outside = leave_out_classes(whole)
        support, query = support_batch(encoder, [e]), query_batch(encoder, [e])
        np.testing.assert_allclose(task.size, task_size(support.labels, support.ways)[0], rtol=1e-6)
        assert task.query_labels.tolist() == e.query_labels.tolist()
        assert task.labels.tolist() == support.labels[0].tolist()
        assert task.outside.shape[1] == len(outside)
        for number, strength in enumerate(inner.strengths):
            scaled = {n: strength * value if "lora_B" in n else value for n, value in parameters.items()}
            with torch.no_grad():
                adapted = adapt(encoder, scaled, support, replace(inner, strengths=(1.0,)))
                weights, t = task_weights(encoder, adapted, support), adapted.scalars["temperature"]
                features = support.pad(encoder.features(support.texts, adapted.factors, support.row_task))
                left_out, counts = left_out_logits(adapted, features, support)
                expected = query_logits(encoder, adapted, weights, query)
            np.testing.assert_allclose(task.queries[number], expected[0] / t, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(task.left_out[number], left_out[0] / t, rtol=1e-4, atol=1e-4)
            assert task.counts.tolist() == counts[0].tolist()
            np.testing.assert_allclose(task.evidence[number], told(task.left_out[number], task), rtol=1e-6)
            np.testing.assert_array_equal(task.inputs[number], [*task.size, *task.evidence[number]])
            if outside:
                others = task_batch(encoder, [outside], [[0] * len(outside)], [e.ways])
                with torch.no_grad():
                    expected = query_logits(encoder, adapted, weights, others)
                np.testing.assert_allclose(task.outside[number], expected[0] / t, rtol=1e-4, atol=1e-4)


def test_measures_at_another_ridge_weight(encoder: Encoder, corpus: Corpus) -> None:
    inner = replace(PLAIN, head="readout", strengths=(0.5, 1.0))
    parameters = {**moved_parameters(encoder, inner), "log_ridge_weight": torch.tensor(2.0).log()}
    episodes = EpisodeSampler(corpus, EpisodeSettings((3, 6), (1, 3), 4), seed=1).take(3)
    more = {**parameters, "log_ridge_weight": torch.tensor(0.5).log()}
    for one, two in zip(*(measure_tasks(encoder, p, inner, episodes) for p in (parameters, more)), strict=True):
        found = one.with_more_ridge(-1.5)
        for name in ("left_out", "queries", "outside", "evidence"):
            np.testing.assert_allclose(getattr(found, name), getattr(two, name), rtol=1e-4, atol=1e-4)
            assert name == "evidence" or not np.allclose(getattr(one, name), getattr(two, name), atol=1e-2)
    plain = measure_tasks(encoder, moved_parameters(encoder, PLAIN), PLAIN, episodes)[0]
    assert plain.ridge is None
    assert plain.with_more_ridge(1.0) is plain


@pytest.mark.parametrize(
    "conditioning",
    [ConditioningSettings("gates"), ConditioningSettings("none", temperature=True)],
    ids=["start", "temperature"],
)
def test_tasks_that_share_no_features_are_refused(
    conditioning: ConditioningSettings, encoder: Encoder, corpus: Corpus
) -> None:
    inner = replace(PLAIN, conditioning=conditioning)
    parameters = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    episodes = EpisodeSampler(corpus, EpisodeSettings(3, 2, 2), seed=0).take(1)
    with pytest.raises(SettingsError, match=r"inner loops without conditions, given ConditioningSettings"):
        measure_tasks(encoder, parameters, inner, episodes)


@pytest.mark.parametrize("steps", [0, 2])
def test_adapted_measures_are_at_the_strength_and_after_the_steps(steps: int, encoder: Encoder, corpus: Corpus) -> None:
    inner = replace(INNER, steps=steps, head="readout", strengths=(0.0, 1.0, 2.0))
    moved = moved_parameters(encoder, inner)
    parameters = {**moved, TEMPERATURE_SLOPES: torch.tensor([0.4, -0.3]), STRENGTH_PRIOR: torch.tensor([0.0, 0.1, 0.2])}
    parameters |= {EVIDENCE_SLOPES: torch.tensor([-0.2, 0.9]), LOG_ADAPTED_FACTOR: torch.tensor(0.7)}
    episodes = EpisodeSampler(corpus, EpisodeSettings((2, 6), (1, 3), 4), seed=1).take(4)
    found = measure_adapted_tasks(encoder, parameters, inner, episodes)
    for whole, task in zip(episodes, found, strict=True):
        e, outside = leave_out_classes(whole)
        assert (len(task.queries), task.outside.shape[1], task.ridge) == (1, len(outside), None)
        assert task.labels.tolist() == e.support_labels.tolist()
        assert task.counts.tolist() == [np.sum(e.support_labels == label) > 1 for label in e.support_labels]
        assert task.query_labels.tolist() == e.query_labels.tolist()
        support, query = support_batch(encoder, [e]), query_batch(encoder, [e])
        with torch.no_grad():
            adapted = adapt(encoder, parameters, support, inner)
            logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)[0]
        temperature = 10 * np.exp(task.inputs[0] @ [0.4, -0.3, -0.2, 0.9] + 0.7 * bool(steps and task.counts.any()))
        np.testing.assert_allclose(temperature * task.queries[0], logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(task.size, task_size(support.labels, support.ways)[0], rtol=1e-6)
    if not steps:  # they are among the measures of all strengths
        for task, each in zip(found, measure_tasks(encoder, parameters, inner, episodes), strict=True):
            for name in ("queries", "left_out", "outside", "evidence"):
                one, all_ = getattr(task, name)[0], getattr(each, name)
                assert any(np.allclose(one, other, rtol=1e-4, atol=1e-4) for other in all_)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
def test_recalibration_finds_the_factor_of_tasks_that_took_steps(factor: float) -> None:
    """The others are as they were before; so are all numbers but the factor, and the scope's rule."""
    rng, slopes = np.random.default_rng(7), np.array([0.5, -0.3])

    def temperature(size: np.ndarray, after: float) -> float:
        return 3 * math.exp(size @ slopes) * (after if size[0] > 0 else 1.0)  # one example a class: no step

    before = calibrate(PARAMETERS, [measures(rng, temperature=partial(temperature, after=1.0)) for _ in range(150)])
    before |= {SCOPE: torch.ones(RULE_SIZE)}
    tasks = [measures(rng, temperature=partial(temperature, after=factor)) for _ in range(150)]
    assert {bool(task.counts.any()) for task in tasks} == {True, False}
    found = recalibrate(before, tasks)
    assert found.keys() == before.keys() | {LOG_ADAPTED_FACTOR}
    assert float(found[LOG_ADAPTED_FACTOR]) == pytest.approx(math.log(factor), abs=0.05)
    assert all(torch.equal(found[name], value) for name, value in before.items()), "no text is outside"


def test_recalibration_without_steps_finds_no_factor() -> None:
    rng = np.random.default_rng(7)
    tasks = [task for task in (measures(rng) for _ in range(60)) if not task.counts.any()]
    assert recalibrate(calibrate(PARAMETERS, tasks), tasks)[LOG_ADAPTED_FACTOR] == 0


def test_recalibration_fits_the_scope_at_the_temperatures_after_the_steps() -> None:
    """Whatever they were before: the factor makes up for it."""
    rng = np.random.default_rng(7)
    tasks = [task for task in (with_outside(rng) for _ in range(40)) if task.counts.any()]
    drawn = [(2 * task.queries[0] + rng.gumbel(size=task.queries[0].shape)).argmax(1) for task in tasks]
    tasks = [replace(task, query_labels=labels) for task, labels in zip(tasks, drawn, strict=True)]
    before = {**calibrate(PARAMETERS, tasks), TEMPERATURE_SLOPES: torch.zeros(2), EVIDENCE_SLOPES: torch.zeros(2)}
    before["log_temperature"] = torch.tensor(0.5)
    higher = {**before, "log_temperature": torch.tensor(1.5)}
    one, other = recalibrate(before, tasks), recalibrate(higher, tasks)
    assert float(one[LOG_ADAPTED_FACTOR] - other[LOG_ADAPTED_FACTOR]) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(one[SCOPE], other[SCOPE], rtol=0.01, atol=0.01)
    assert not torch.allclose(one[SCOPE], recalibrate(before, tasks[:-1])[SCOPE], rtol=1e-3, atol=1e-3)


# The whole


@pytest.mark.parametrize("used", [None, replace(PLAIN, head="readout"), INNER], ids=["as trained", "readout", "steps"])
def test_calibration_lowers_the_loss(used: InnerLoopSettings | None, encoder: Encoder, corpus: Corpus) -> None:
    used = used and replace(used, strengths=(0.0, 2.0))
    result = TrainingResult(moved_parameters(encoder, PLAIN), PLAIN, {"steps": 3})
    settings = CalibrationSettings(
        episodes=12, rows=16, ways=(3, 9), shots=(1, 5), queries=4, inner=used, adapted_episodes=6
    )
    found = calibrated(encoder, result, [corpus], settings, seed=0)
    assert found.inner == (used or PLAIN)
    assert found.record == {"steps": 3, "calibration": asdict(settings)}
    episodes = [leave_out_classes(e)[0] for e in calibration_episodes(corpus, settings, seed=0)]
    start, _ = as_used(result.parameters, PLAIN, settings)
    before, after = (score_episodes(encoder, p, episodes, found.inner).nll.mean() for p in (start, found.parameters))
    assert after < before - 0.01
    assert (LOG_ADAPTED_FACTOR in found.parameters) == bool(found.inner.steps)
    assert calibrated(encoder, result, [corpus], None, seed=0) is result


@pytest.mark.parametrize("after", sorted(HEADS))
@pytest.mark.parametrize("before", sorted(HEADS))
def test_an_adapter_as_used_has_what_its_inner_loop_has(before: Any, after: Any, encoder: Encoder) -> None:
    """And what it had learned of that; the rest starts as in learning."""
    inner, settings = replace(PLAIN, head=before), CalibrationSettings(inner=replace(INNER, head=after))
    parameters: Parameters = {
        name: value + 0.1 for name, value in start_parameters(encoder.factor_shapes, inner, 32).items()
    }
    found, used = as_used(parameters, inner, settings)
    expected = start_parameters(encoder.factor_shapes, used, 32)
    assert used == settings.inner
    assert found.keys() == expected.keys()
    for name, value in found.items():
        learned = name in parameters and parameters[name].shape == expected[name].shape
        assert torch.equal(value, parameters[name] if learned else expected[name])
    more = as_used(parameters, inner, CalibrationSettings(inner=replace(PLAIN, strengths=(0.5, 1.0))))[0]
    assert more[STRENGTH_PRIOR].tolist() == [0.0, 0.0]
    same, unchanged = as_used(parameters, inner, CalibrationSettings())
    assert (same, unchanged) == (parameters, inner)


def test_the_task_encoder_is_kept_as_used(encoder: Encoder) -> None:
    inner = replace(PLAIN, conditioning=ConditioningSettings("none"))
    parameters = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    found, used = as_used(parameters, inner, CalibrationSettings(inner=replace(PLAIN, head="readout")))
    assert used == replace(inner, head="readout")
    assert found.keys() == parameters.keys() | {"log_ridge", "log_ridge_weight"}
    assert all(torch.equal(found[name], value) for name, value in parameters.items())
