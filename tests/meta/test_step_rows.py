"""Which rows of a support set a step is on."""

import numpy as np
import torch
from torch import Tensor

from textmeta.data.episodes import EpisodeSampler
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.step_rows import EXAMPLES_A_STEP, rows_in_turn, rows_taking_part
from textmeta.meta.tasks import support_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import membership
from textmeta.model.initialisation import lora_factors


def rows_of_step(labels: Tensor, is_name: Tensor | None, ways: Tensor, step: int) -> Tensor:
    """The rows that a step is on."""
    return rows_taking_part(labels, ways) & rows_in_turn(labels, is_name, ways, step)


def counted(rows: list[int], step: int = 0) -> tuple[Tensor, list[int]]:
    """The rows of a step, and how many of each class, for a task with so many rows of each class, in a mixed order."""
    labels = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(len(rows)), rows)))[None]
    kept = rows_of_step(labels, None, torch.tensor([len(rows)]), step)
    return kept, (membership(labels, len(rows)) * kept[..., None]).sum((0, 1)).tolist()


def test_a_balanced_task_has_all_its_rows() -> None:
    for rows in ([1, 1], [5] * 5, [EXAMPLES_A_STEP] * 4, [2] * 150):
        assert counted(rows)[1] == rows


def test_classes_with_less_than_half_of_the_mean_take_no_part() -> None:
    assert counted([8, 6, 4, 4, 2])[1] == [8, 6, 4, 4, 0]  # the mean is 4.8
    assert counted([10, 5])[1] == [10, 5]
    assert counted([3, 1])[1] == [3, 1]  # exactly half
    assert counted([6, 6, 1])[1] == [6, 6, 0]


def test_a_single_class_is_nothing_to_learn_from() -> None:
    assert counted([15, 3])[1] == [0, 0]
    assert counted([9, 1, 1])[1] == [0, 0, 0]


def test_a_step_has_so_many_examples_of_a_class_and_all_have_their_turn() -> None:
    for rows in ([50, 50, 50], [25, 13], [11] * 12):
        seen = torch.zeros(1, sum(rows), dtype=torch.bool)
        for step in range(6):
            kept, counts = counted(rows, step)
            assert counts == [EXAMPLES_A_STEP] * len(rows)
            seen |= kept
        assert seen.all()
    one, other = (counted([50, 50], step)[0] for step in (0, 1))
    assert not (one & other).any(), "the next step is on the next rows"


def test_names_are_rows_and_in_every_step() -> None:
    labels = torch.tensor([[0] * 30 + [1] * 30 + [0, 1]])
    is_name = torch.arange(62)[None] >= 60
    for step in range(4):
        kept = rows_of_step(labels, is_name, torch.tensor([2]), step)
        assert kept[0, 60:].all()
        assert kept.sum() == 2 * EXAMPLES_A_STEP + 2
    # a class that has nothing but its name, beside classes of ten examples
    labels, is_name = torch.tensor([[0] * 10 + [1] * 10 + [0, 1, 2]]), torch.arange(23)[None] >= 20
    assert rows_of_step(labels, is_name, torch.tensor([3]), 0).tolist() == [[True] * 22 + [False]]


def test_padding_is_no_row_and_tasks_are_apart() -> None:
    labels = torch.tensor([[0, 0, 1, 1, -1], [0, 1, 0, 0, 0], [2, 1, 0, 2, 2]])
    kept = rows_of_step(labels, None, torch.tensor([2, 2, 3]), 0)
    assert kept.tolist() == [[True] * 4 + [False], [False] * 5, [True] * 5]


def test_a_batch_of_some_of_its_rows_is_as_if_made_of_them(encoder: Encoder, sampler: EpisodeSampler) -> None:
    episodes = sampler.take(3)
    batch = support_batch(encoder, episodes)
    factors = lora_factors(start_parameters(encoder.factor_shapes, InnerLoopSettings(), encoder.hidden_size))
    kept = torch.from_numpy(np.random.default_rng(1).random(tuple(batch.labels.shape)) < 0.5) & (batch.labels >= 0)
    part = batch.where(kept)
    features = part.pad(encoder.features(part.texts, factors))
    assert part.labels.shape[1] == kept.sum(1).max()
    for number, episode in enumerate(episodes):
        own = kept[number, : len(episode.support_texts)].numpy()
        texts = [text for text, is_kept in zip(episode.support_texts, own, strict=True) if is_kept]
        torch.testing.assert_close(features[number, : len(texts)], encoder.features(encoder.prepare(texts), factors))
        assert not features[number, len(texts) :].any()
        assert part.labels[number, : len(texts)].tolist() == episode.support_labels[own].tolist()
        assert (part.labels[number, len(texts) :] == -1).all()
    assert batch.where(batch.labels >= 0) is batch
