"""Tasks as things to compare: similarity, the index of training tasks, the nearest of them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.meta.test_adaptation import named
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.errors import AdapterError, DataError
from textmeta.meta.adaptation import embed_tasks, start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import support_batch
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import Parameters
from textmeta.model.task_encoder import TASK_ENCODER, TaskEncoderSettings
from textmeta.tasks import ClassMatch, KnownTask, KnownTasks, TaskEmbedding, embed_task, index_tasks, similarity

SIZE = 8
INNER = InnerLoopSettings(
    conditioning=ConditioningSettings("banks", task_encoder=TaskEncoderSettings(size=SIZE, width=16))
)


@pytest.fixture
def parameters(encoder: Encoder) -> Parameters:
    return start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size)


def unit(rows: int, seed: int, size: int = SIZE) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(rows, size))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def task(rows: int, seed: int, size: int = SIZE) -> TaskEmbedding:
    return TaskEmbedding(unit(1, seed, size)[0], unit(rows, seed, size), tuple(f"c{i}" for i in range(rows)))


def by_brute_force(one: np.ndarray, two: np.ndarray) -> float:
    """Try every way to pair the classes of the smaller task with some of the larger."""
    small, large = sorted((one, two), key=len)
    chosen = itertools.permutations(range(len(large)), len(small))
    best = max(sum(float(small[i] @ large[j]) for i, j in enumerate(order)) for order in chosen)
    return best / len(large)


@pytest.mark.parametrize("ways", [1, 2, 5, 40])
def test_a_task_is_like_itself(ways: int) -> None:
    assert similarity(task(ways, 0), task(ways, 0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("ways", "others"), [*itertools.product([1, 2, 3, 5], [1, 2, 4, 6])])
def test_similarity_is_the_best_of_all_pairings(ways: int, others: int) -> None:
    for seed in range(5):
        one, two = task(ways, seed), task(others, 100 + seed)
        expected = by_brute_force(one.classes, two.classes)
        assert similarity(one, two) == pytest.approx(expected, abs=1e-5)
        assert similarity(two, one) == pytest.approx(expected, abs=1e-5)
        assert similarity(one, two) <= 1 + 1e-5


def test_order_of_the_classes_does_not_matter() -> None:
    one, two = task(5, 0), task(7, 1)
    order = np.random.default_rng(0).permutation(7)
    shuffled = replace(two, classes=two.classes[order])
    assert similarity(one, shuffled) == pytest.approx(similarity(one, two), abs=1e-6)


def test_part_of_a_task_is_like_it_by_its_share() -> None:
    whole = task(8, 0)
    assert similarity(replace(whole, classes=whole.classes[[5, 2]]), whole) == pytest.approx(2 / 8, abs=1e-5)


def test_tasks_of_different_encoders_are_not_compared() -> None:
    with pytest.raises(DataError, match="class vectors have 8 and 9 numbers: they are of different encoders"):
        similarity(task(3, 0), task(3, 0, size=9))
    with pytest.raises(DataError, match="8 and 9 numbers"):
        KnownTasks({"x": ("a",)}, {"x": unit(1, 0, size=9)}).nearest(task(3, 0))


def test_nearest_finds_the_corpus_and_its_classes() -> None:
    known = KnownTasks(
        {name: tuple(f"{name}{i}" for i in range(6)) for name in "xyz"},
        {name: unit(6, seed) for seed, name in enumerate("xyz")},
    )
    classes = known.vectors["y"][[4, 0, 3]]
    found = known.nearest(TaskEmbedding(classes[0], classes, ("p", "q", "r")))
    assert found[0].corpus == "y"
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    assert {match.label: match.known for match in found[0].matches} == {"p": "y4", "q": "y0", "r": "y3"}
    assert [one.similarity for one in found] == sorted((one.similarity for one in found), reverse=True)
    assert str(found[0]).startswith("y (1.00): ")
    assert [len(known.nearest(task(3, 9), count)) for count in (0, 1, 2, 5)] == [0, 1, 2, 3]


def test_classes_that_a_corpus_has_too_few_of_are_missing() -> None:
    known = KnownTasks({"x": ("a", "b")}, {"x": unit(2, 0)})
    given = np.concatenate([unit(2, 0), unit(2, 1)])
    (found,) = known.nearest(TaskEmbedding(given[0], given, (1, 2, 3, 4)))
    assert len(found.matches) == 2
    assert found.similarity <= 2 / 4 + 1e-5
    assert found.similarity == pytest.approx(by_brute_force(given, unit(2, 0)), abs=1e-5)
    cosines = [match.cosine for match in found.matches]
    assert cosines == sorted(cosines, reverse=True)


def test_embedding_of_a_task_is_what_adaptation_starts_from(
    encoder: Encoder, parameters: Parameters, sampler: EpisodeSampler
) -> None:
    support = support_batch(encoder, [sampler[0]])
    found = embed_task(encoder, parameters, INNER, support, ("a", "b", "c"))
    conditions = embed_tasks(encoder, parameters, support, INNER)
    assert found is not None
    assert conditions is not None
    np.testing.assert_allclose(found.vector, conditions.embedding[0].numpy(), rtol=0, atol=1e-6)
    assert found.classes.shape == (3, encoder.hidden_size)
    np.testing.assert_allclose(np.linalg.norm(found.classes, axis=1), 1, atol=1e-5)
    assert found.labels == ("a", "b", "c")
    without = replace(INNER, conditioning=None)
    assert embed_task(encoder, parameters, without, support, ("a", "b", "c")) is None


def test_embedding_of_a_task_is_the_same_with_names(
    encoder: Encoder, parameters: Parameters, sampler: EpisodeSampler
) -> None:
    """But of a class without examples, of which its name is all there is."""
    e = sampler[0]
    one, two = (embed_task(encoder, parameters, INNER, support_batch(encoder, [part]), "abc") for part in (e, named(e)))
    assert one is not None
    assert two is not None
    np.testing.assert_allclose(two.vector, one.vector, rtol=0, atol=1e-6)
    np.testing.assert_allclose(two.classes, one.classes, rtol=0, atol=1e-6)
    kept = e.support_labels > 0
    texts = tuple(text for text, keep in zip(e.support_texts, kept, strict=True) if keep)
    zero = named(replace(e, support_texts=texts, support_labels=e.support_labels[kept]))
    found = embed_task(encoder, parameters, INNER, support_batch(encoder, [zero]), "abc")
    assert found is not None
    assert zero.label_names is not None
    np.testing.assert_allclose(found.classes[0], encoder.frozen_features(zero.label_names[:1])[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.classes[1:], one.classes[1:], rtol=0, atol=1e-6)


def test_index_has_every_class_of_every_corpus_and_depends_on_the_seed_alone(encoder: Encoder, corpus: Corpus) -> None:
    corpora = [corpus.restrict(corpus.class_names[:4]), corpus.restrict(corpus.class_names[4:9])]
    one, two, other = (index_tasks(encoder, corpora, rows=5, seed=seed) for seed in (0, 0, 1))
    assert dict(one.classes) == {"toy": corpora[0].class_names, "toy'": corpora[1].class_names}
    for name, vectors in one.vectors.items():
        assert vectors.shape == (len(one.classes[name]), encoder.hidden_size)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert np.array_equal(two.vectors[name], vectors)
        assert not np.allclose(other.vectors[name], vectors, atol=1e-3)
    named = index_tasks(encoder, corpora, rows=5, label_names=True).vectors["toy"]
    names = encoder.frozen_features(list(corpora[0].class_names)).numpy()
    expected = one.vectors["toy"] + names
    np.testing.assert_allclose(named, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_a_task_of_a_corpus_is_nearest_to_it(encoder: Encoder, parameters: Parameters, corpus: Corpus) -> None:
    parts = {"first": corpus.restrict(corpus.class_names[:6]), "second": corpus.restrict(corpus.class_names[6:])}
    corpora = [replace(part, name=name) for name, part in parts.items()]
    known = index_tasks(encoder, corpora, rows=16)
    for name, part in parts.items():
        episode = EpisodeSampler(part, EpisodeSettings(3, 12, 4), seed=0)[0]
        found = embed_task(encoder, parameters, INNER, support_batch(encoder, [episode]), tuple("abc"))
        assert found is not None
        assert known.nearest(found)[0].corpus == name


def test_texts_of_an_index_do_not_fill_the_cache(encoder: Encoder, corpus: Corpus) -> None:
    index_tasks(encoder, [corpus])
    assert not len(encoder._frozen_cache)
    with torch.no_grad():
        encoder.frozen_features(["bal"])
    assert len(encoder._frozen_cache)


def test_weights_that_are_too_large_are_an_error_of_ours(encoder: Encoder, sampler: EpisodeSampler) -> None:
    parameters = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size)
    wild = {name: value * 3e38 if name.startswith(TASK_ENCODER) else value for name, value in parameters.items()}
    with pytest.raises(AdapterError, match="not finite"):
        embed_task(encoder, wild, INNER, support_batch(encoder, sampler.take(1)), range(3))


def test_names_in_a_known_task_cannot_move_a_terminals_cursor() -> None:
    known = KnownTask("bank\x1b[2J", 0.5, (ClassMatch("card", "lost\ncard", 0.9),))
    assert str(known).isprintable()
