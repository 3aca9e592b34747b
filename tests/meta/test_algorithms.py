"""One contract for every algorithm; what is particular to one stands at the end.

The meta-gradients are checked in ``test_meta_gradients.py`` and, against other libraries, in ``test_peer.py``.
"""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.given import Patch
from tests.meta.given import LAYERS, ROWS, episode_of, leaves_of, make_learner, make_task, texts_of
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.encoder.encoder import Encoder
from textmeta.meta.algorithms import ALGORITHMS, MetaGradient, query_losses
from textmeta.meta.batch import TaskBatch
from textmeta.meta.initialisation import LearnerSettings
from textmeta.meta.learner import TaskLearner

each_row = pytest.mark.parametrize("row", ROWS)


def learner_of(row: str, encoder: Encoder, dtype: torch.dtype = torch.float64) -> TaskLearner:
    return make_learner(encoder, ROWS[row][1], dtype)


def meta_gradient(row: str, learner: TaskLearner, episodes: list[Episode]) -> MetaGradient:
    differentiated, leaves = leaves_of(learner)
    return ALGORITHMS[ROWS[row][0]].gradient(differentiated, episodes, leaves)


def assert_equal(one: MetaGradient, two: MetaGradient, tolerance: float) -> None:
    torch.testing.assert_close(one.loss, two.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.accuracy, two.accuracy)
    assert one.gradient.keys() == two.gradient.keys()
    for name, value in one.gradient.items():
        atol = tolerance * float(value.detach().abs().amax()) if value.numel() else 0.0
        torch.testing.assert_close(
            value, two.gradient[name], rtol=tolerance, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def mixed_episodes(corpus: Corpus) -> list[Episode]:
    """Of 2 to 5 ways: names, unlabelled texts, classes of one example or of none, names alone, a query of no class."""
    tasks = [
        make_task(corpus, (1, 3, 4), names=True, unlabelled=4),
        make_task(corpus, (0, 0, 0), names=True, first=3),
        make_task(corpus, (1, 1, 1, 1), first=8),
        make_task(corpus, (2, 0, 3, 1, 2), names=True, first=2),
        make_task(corpus, (2, 3), unlabelled=5, first=6),
    ]
    *episodes, last = (episode_of(task) for task in tasks)
    texts, labels = (*last.query_texts, texts_of(corpus, 11)[0]), np.append(last.query_labels, OUTSIDE)
    return [*episodes, replace(last, query_texts=texts, query_labels=labels)]


@each_row
def test_gradients_are_finite_whole_repeatable_and_change_nothing(row: str, encoder: Encoder, corpus: Corpus) -> None:
    learner, leaves = leaves_of(learner_of(row, encoder, torch.float32))  # as in training
    before = {name: value.detach().clone() for name, value in leaves.items()}
    weights = {name: value.clone() for name, value in encoder._suffix.state_dict().items()}
    random_state = torch.get_rng_state()
    one, two = (ALGORITHMS[ROWS[row][0]].gradient(learner, mixed_episodes(corpus), leaves) for _ in range(2))
    assert one.gradient.keys() == leaves.keys()
    for name, value in one.gradient.items():
        assert value.shape == leaves[name].shape
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert not value.requires_grad
        assert torch.equal(value, two.gradient[name])
        assert value.any() or not name.startswith("lora.")
    assert one.loss.shape == one.accuracy.shape == (5,)
    assert one.loss.isfinite().all()
    assert ((one.accuracy >= 0) & (one.accuracy <= 1)).all()
    assert all(torch.equal(leaves[name], value) and leaves[name].grad is None for name, value in before.items())
    assert all(torch.equal(encoder._suffix.state_dict()[name], value) for name, value in weights.items())
    assert all(weight.grad is None for weight in encoder._suffix.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


@each_row
def test_tasks_together_are_the_sum_of_tasks_alone(row: str, encoder64: Encoder, corpus: Corpus) -> None:
    episodes, learner = mixed_episodes(corpus), learner_of(row, encoder64)
    together = meta_gradient(row, learner, episodes)
    alone = [meta_gradient(row, learner, [e]) for e in episodes]
    sums = {name: torch.stack([part.gradient[name] for part in alone]).sum(0) for name in together.gradient}
    losses, accuracies = (torch.cat([getattr(part, name) for part in alone]) for name in ("loss", "accuracy"))
    assert_equal(together, MetaGradient(sums, losses, accuracies), 1e-6)


@each_row
def test_threads_do_not_disturb_each_other(row: str, encoder64: Encoder, corpus: Corpus) -> None:
    """Second-order steps in one thread beside steps of any order in another, on one encoder."""
    rows = [row, "maml-pooling+lora"]
    learners = [learner_of(each, encoder64) for each in rows]
    episodes = [[mixed_episodes(corpus)[number]] for number in (3, 0)]
    alone = [meta_gradient(*given) for given in zip(rows, learners, episodes, strict=True)]
    found: dict[tuple[int, int], MetaGradient] = {}

    def work(i: int) -> None:
        for repeat in range(2):
            found[i, repeat] = meta_gradient(rows[i], learners[i], episodes[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for (i, _), result in found.items():
        assert_equal(alone[i], result, 1e-12)


@each_row
def test_bfloat16_stays_near_float32(row: str, encoder: Encoder, corpus: Corpus) -> None:
    """Of the transformer's matrix products; all that is learned or compared stays in float32."""
    half = Encoder(encoder.settings, encoder.lora, precision="bf16")
    found = []
    for each in (encoder, half):
        gradient = meta_gradient(row, learner_of(row, each, torch.float32), mixed_episodes(corpus)).gradient
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in gradient.values())
        found.append(torch.cat([value.flatten() for name, value in gradient.items() if name.startswith("lora.")]))
    difference = float((found[0] - found[1]).norm() / found[0].norm())
    assert 1e-5 < difference < 0.3  # it did run in bfloat16, and rounding is all that it changed


# ---------------------------------------------------------------------------------------------- one algorithm or two


@pytest.mark.parametrize("adapt", ["pooling", "lora", "pooling+lora"])
def test_a_reptile_step_is_interpolation(encoder64: Encoder, corpus: Corpus, adapt: str) -> None:
    """θ + ε mean_i(θ_i - θ), from where the steps on support and queries together end; the rest is first order."""
    settings = LearnerSettings(LAYERS, adapt, steps=3)  # type: ignore[arg-type]
    learner = make_learner(encoder64, settings)
    init = learner.adapter.initialisation
    episodes = [episode_of(make_task(corpus, sizes, names=True)) for sizes in ((2, 2), (1, 2, 3), (1, 1))]
    differentiated, leaves = leaves_of(learner)
    found, first = (ALGORITHMS[n].gradient(differentiated, episodes, leaves).gradient for n in ("reptile", "fomaml"))
    together = TaskBatch.of(
        [[*e.support_texts, *e.query_texts] for e in episodes],
        [[*e.support_labels.tolist(), *e.query_labels.tolist()] for e in episodes],
        [e.ways for e in episodes],
    )
    with torch.no_grad():
        task = learner.learn(together)
    ends: dict[str, Tensor] = {"queries": task.queries} if "pooling" in adapt else {}
    ends |= {f"lora.{name}": value for name, value in task.factors.items() if ".lora_B." in name}
    start, epsilon = init.tensors(), 0.4
    for name, value in start.items():
        if name in ends:
            expected = (1 - epsilon) * value + epsilon * ends[name].mean(0)
            torch.testing.assert_close(value - epsilon * found[name] / len(episodes), expected)
            assert not torch.allclose(expected, value)
        else:
            assert torch.equal(found[name], first[name])
    assert len(ends) == ("pooling" in adapt) + 4 * ("lora" in adapt)


@pytest.mark.parametrize("name", ["anil", "maml"])
def test_steps_read_each_text_once(name: str, encoder: Encoder, corpus: Corpus, monkeypatch: Patch) -> None:
    learner = learner_of(f"{name}-{'offset' if name == 'anil' else 'pooling'}", encoder, torch.float32)
    read: list[str] = []
    original = learner.reader.read
    monkeypatch.setattr(learner.reader, "read", lambda texts, *rest: read.extend(texts) or original(texts, *rest))
    episode = mixed_episodes(corpus)[0]
    meta_gradient(f"{name}-{learner.adapter.learner.adapt}", learner, [episode])
    every = [*episode.support_texts, *episode.label_names, *episode.unlabelled_texts, *episode.query_texts]
    assert sorted(read) == sorted(every)


def test_a_query_of_no_class_has_no_part_in_the_loss(encoder64: Encoder, corpus: Corpus) -> None:
    learner = make_learner(encoder64, LearnerSettings(LAYERS, "pooling", steps=2))
    *_, more = mixed_episodes(corpus)
    fewer = replace(more, query_texts=more.query_texts[:-1], query_labels=more.query_labels[:-1])
    one, other = (query_losses(learner, [e], second_order=False) for e in (fewer, more))
    torch.testing.assert_close(one, other)
