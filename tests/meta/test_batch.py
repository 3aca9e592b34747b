from dataclasses import replace

import torch

from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.meta.batch import Rows, TaskBatch


def test_rows_are_laid_out_by_task():
    rows = Rows.of([["a", "b"], [], ["c"]], torch.device("cpu"))
    assert rows.texts == ("a", "b", "c")
    assert rows.row_task.tolist() == [0, 0, 2]
    assert rows.there.tolist() == [[True, True], [False, False], [True, False]]
    flat = torch.tensor([[1.0], [2.0], [3.0]])
    assert rows.pad(flat)[..., 0].tolist() == [[1, 2], [0, 0], [3, 0]]


def test_rows_without_texts():
    rows = Rows.of([[], []], torch.device("cpu"))
    assert rows.there.shape == (2, 0)
    assert rows.pad(torch.zeros(0, 3)).shape == (2, 0, 3)


def test_support_is_in_an_order_of_its_own_and_labels_go_with_it():
    texts, labels = ["d", "a", "c", "b"], [0, 1, 0, 2]
    one = TaskBatch.of([texts], [labels], [3])
    other = TaskBatch.of([texts[::-1]], [labels[::-1]], [3])
    assert one.support.texts == other.support.texts
    assert torch.equal(one.labels, other.labels)
    assert dict(zip(one.support.texts, one.labels[0].tolist(), strict=True)) == dict(zip(texts, labels, strict=True))


def test_tasks_are_padded_and_come_with_what_they_have():
    batch = TaskBatch.of(
        [["a", "b", "c"], [], ["d"]], [[0, 1, 1], [], [0]], [2, 3, 1], [None, ["x", "y", "z"], None], [[], ["u"], []]
    )
    assert (batch.labels >= 0).sum(1).tolist() == [3, 0, 1]
    assert batch.ways.tolist() == [2, 3, 1]
    assert batch.names.there.any(1).tolist() == [False, True, False]
    assert batch.names.texts == ("x", "y", "z")
    assert batch.unlabelled.texts == ("u",)


def test_episodes_bring_names_and_unlabelled_texts(corpus):
    episode = EpisodeSampler(corpus, EpisodeSettings(3, 2, 1, label_names=1.0), seed=0)[0]
    batch = TaskBatch.of_episodes([replace(episode, unlabelled_texts=("bal", "fim"))])
    assert sorted(batch.support.texts) == sorted(episode.support_texts)
    assert batch.names.texts == episode.label_names
    assert batch.unlabelled.texts == ("bal", "fim")
