"""How alike tasks are, the index of training corpora, and the nearest of them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.sharing.made import unit
from textmeta import Adapter, Corpus, Episode
from textmeta.errors import DataError
from textmeta.meta.adapter import ClassIndex
from textmeta.meta.batch import TaskBatch
from textmeta.meta.learner import TaskLearner
from textmeta.nearest import TaskEmbedding, index_corpora, nearest_tasks, similarity, task_embedding

SIZE = 8


@pytest.fixture(scope="module")
def learner(adapter: Adapter) -> TaskLearner:
    return TaskLearner(adapter.load_reader(), adapter)


def task(rows: int, seed: int, size: int = SIZE) -> TaskEmbedding:
    return TaskEmbedding(unit(rows, seed, size), tuple(f"c{i}" for i in range(rows)), np.zeros(3), 0.0, 1.0)


def by_brute_force(one: np.ndarray, two: np.ndarray) -> float:
    """Try every way to pair the classes of the smaller task with some of the larger."""
    small, large = sorted((one, two), key=len)
    chosen = itertools.permutations(range(len(large)), len(small))
    best = max(sum(float(small[i] @ large[j]) for i, j in enumerate(order)) for order in chosen)
    return best / len(large)


@pytest.mark.parametrize(("ways", "others"), [*itertools.product([1, 2, 3, 5], [1, 2, 4, 6])])
def test_similarity_is_the_best_of_all_pairings(ways: int, others: int) -> None:
    for seed in range(5):
        one, two = task(ways, seed), task(others, 100 + seed)
        expected = by_brute_force(one.classes, two.classes)
        assert similarity(one, two) == pytest.approx(expected, abs=1e-5)
        assert similarity(two, one) == pytest.approx(expected, abs=1e-5)


def test_tasks_of_different_encoders_are_not_compared() -> None:
    with pytest.raises(DataError, match="class vectors have 8 and 9 numbers: they are of different encoders"):
        similarity(task(3, 0), task(3, 0, size=9))
    with pytest.raises(DataError, match="8 and 9 numbers"):
        nearest_tasks(ClassIndex({"x": ("a",)}, {"x": unit(1, 0, size=9)}), task(3, 0))


def test_classes_that_a_corpus_has_too_few_of_are_missing() -> None:
    index = ClassIndex({"x": ("a", "b")}, {"x": unit(2, 0, SIZE)})
    given = replace(task(4, 0), classes=np.concatenate([unit(2, 0, SIZE), unit(2, 1, SIZE)]))
    (found,) = nearest_tasks(index, given)
    assert len(found.matches) == 2
    assert found.similarity == pytest.approx(by_brute_force(given.classes, unit(2, 0, SIZE)), abs=1e-5)
    cosines = [match.cosine for match in found.matches]
    assert cosines == sorted(cosines, reverse=True)


def test_index_has_every_class_and_depends_on_the_seed_alone(learner: TaskLearner, corpus: Corpus) -> None:
    corpora = [corpus.restrict(corpus.class_names[:4]), corpus.restrict(corpus.class_names[4:9])]
    one, two, other = (index_corpora(learner, corpora, rows=5, seed=seed) for seed in (0, 0, 1))
    assert dict(one.classes) == {"toy": corpora[0].class_names, "toy'": corpora[1].class_names}
    for name, vectors in one.vectors.items():
        assert vectors.shape == (len(one.classes[name]), 32)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert np.array_equal(two.vectors[name], vectors)
        assert not np.allclose(other.vectors[name], vectors, atol=1e-3)


def test_vectors_of_the_index_are_those_of_a_task_with_the_same_texts(learner: TaskLearner, corpus: Corpus) -> None:
    """The index goes its own way to them, so that this compares two ways."""
    part = corpus.restrict(corpus.class_names[:3])
    rows = [row for index in range(3) for row in part.rows_of(index)]
    whole = Episode("", part.class_names, tuple(part.texts[row] for row in rows), part.labels[rows], (), np.zeros(0))
    found = index_corpora(learner, [part], rows=1000).vectors["toy"]
    with torch.no_grad():
        task = learner.learn(TaskBatch.of_episodes([whole]))
    np.testing.assert_allclose(task_embedding(task, whole.class_names).classes, found, atol=1e-5)
