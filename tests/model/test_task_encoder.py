"""The task encoder: what it must not depend on, and its derivatives."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from textmeta.errors import SettingsError
from textmeta.model.task_encoder import (
    TaskEncoderSettings,
    class_embeddings,
    class_moments,
    task_embedding,
    task_encoder_shapes,
    task_encoder_start,
    task_statistics,
)

KINDS = ("statistics", "set_transformer", "graph")
HIDDEN = 12
each_kind = pytest.mark.parametrize("kind", KINDS)


def settings_of(kind: str, label_names: bool = False) -> TaskEncoderSettings:
    return TaskEncoderSettings(kind, size=6, width=8, label_names=label_names)  # type: ignore[arg-type]


def weights_of(settings: TaskEncoderSettings) -> dict[str, Tensor]:
    """Weights that have learned something, in float64."""
    generator = torch.Generator().manual_seed(1)
    start = task_encoder_start(settings, HIDDEN, generator)
    return {
        name: (value + 0.2 * torch.randn(value.shape, generator=generator)).double() for name, value in start.items()
    }


def task(shots: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One task: features (1, n, d) of length 1, labels and ways."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(shots)), shots)
    features = rng.normal(size=(len(shots), HIDDEN))[labels] + rng.normal(size=(len(labels), HIDDEN))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return torch.tensor(features)[None], torch.tensor(labels)[None], torch.tensor([len(shots)])


@each_kind
def test_the_order_of_examples_and_of_classes_does_not_matter(kind: str) -> None:
    settings = settings_of(kind)
    weights = weights_of(settings)
    features, labels, ways = task([3, 1, 5, 2])
    expected = task_embedding(weights, settings, features, labels, ways)
    rng = np.random.default_rng(3)
    for _ in range(5):
        order, renamed = rng.permutation(11), torch.tensor(rng.permutation(4))
        found = task_embedding(weights, settings, features[:, order], renamed[labels][:, order], ways)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        classes = class_embeddings(weights, features[:, order], renamed[labels][:, order], ways)
        torch.testing.assert_close(classes[:, renamed], class_embeddings(weights, features, labels, ways))
    swapped = labels.clone()
    swapped[0, 0], swapped[0, 5] = 2, 0  # which example is of which class does matter
    assert not torch.allclose(task_embedding(weights, settings, features, swapped, ways), expected, atol=1e-3)


@each_kind
def test_tasks_of_any_size_go_together_and_do_not_see_each_other(kind: str) -> None:
    settings = settings_of(kind)
    weights = weights_of(settings)
    tasks = [task([1] * 2), task([7, 1, 2], 1), task([1] * 40, 2), task([3], 3)]
    alone = torch.cat([task_embedding(weights, settings, *one) for one in tasks])
    width = max(labels.shape[1] for _, labels, _ in tasks)
    features = torch.cat([torch.nn.functional.pad(f, (0, 0, 0, width - f.shape[1])) for f, _, _ in tasks])
    labels = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for _, part, _ in tasks])
    ways = torch.cat([w for _, _, w in tasks])
    torch.testing.assert_close(task_embedding(weights, settings, features, labels, ways), alone)
    torch.testing.assert_close(
        task_statistics(features, labels, ways), torch.cat([task_statistics(*one) for one in tasks])
    )
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(4, dtype=alone.dtype))


@each_kind
@pytest.mark.parametrize("shots", [[1, 1], [1] * 300, [300, 1, 2], [40] * 20])
def test_from_two_classes_to_hundreds(kind: str, shots: list[int]) -> None:
    settings = TaskEncoderSettings(kind)  # type: ignore[arg-type]
    weights = task_encoder_start(settings, HIDDEN, torch.Generator().manual_seed(0))
    features, labels, ways = task(shots)
    embedding = task_embedding(weights, settings, features.float(), labels, ways)
    assert embedding.isfinite().all()
    assert float(embedding.norm()) == pytest.approx(1, abs=1e-5)


@each_kind
def test_equal_examples_and_equal_classes_have_finite_derivatives(kind: str) -> None:
    settings = settings_of(kind)
    weights = {name: value.requires_grad_() for name, value in weights_of(settings).items()}
    features = torch.ones(1, 4, HIDDEN, dtype=torch.float64) / math.sqrt(HIDDEN)
    embedding = task_embedding(weights, settings, features, torch.tensor([[0, 0, 1, 1]]), torch.tensor([2]))
    found = torch.autograd.grad(embedding.sum(), list(weights.values()), allow_unused=True)
    assert all(part is None or part.isfinite().all() for part in found)


@each_kind
def test_first_and_second_derivatives(kind: str) -> None:
    settings = settings_of(kind, label_names=True)
    weights = weights_of(settings)
    features, labels, ways = task([2, 1, 3])
    names = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def embed(*tensors: Tensor) -> Tensor:
        given = dict(zip(weights, tensors, strict=True))
        return task_embedding(given, settings, features, labels, ways, names)

    leaves = [value.requires_grad_() for value in weights.values()]
    assert torch.autograd.gradcheck(embed, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(embed, leaves, fast_mode=True)


@each_kind
def test_before_learning_it_is_nearly_the_mean_of_the_class_embeddings(kind: str) -> None:
    settings = TaskEncoderSettings(kind)  # type: ignore[arg-type]
    weights = task_encoder_start(settings, HIDDEN, torch.Generator().manual_seed(0))
    features, labels, ways = task([2, 3, 1])
    mean = class_embeddings(weights, features.float(), labels, ways).mean(1)
    found = task_embedding(weights, settings, features.float(), labels, ways)
    assert float(torch.cosine_similarity(mean, found)) > 0.98


@each_kind
def test_names_are_seen_by_those_that_can(kind: str) -> None:
    settings = settings_of(kind, label_names=True)
    weights = weights_of(settings)
    one = task([2, 1, 3])
    names = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    without = task_embedding(weights, settings, *one)
    assert not torch.allclose(task_embedding(weights, settings, *one, names), without, atol=1e-3)
    assert torch.equal(task_embedding(weights, settings, *one, torch.zeros_like(names)), without)


@each_kind
def test_the_shapes_are_those_of_the_start(kind: str) -> None:
    for names in (False, True):
        settings = settings_of(kind, names)
        start = task_encoder_start(settings, HIDDEN, torch.Generator().manual_seed(0))
        assert {name: tuple(value.shape) for name, value in start.items()} == task_encoder_shapes(settings, HIDDEN)


@pytest.mark.parametrize("copies", [2, 3, 5, 7])
def test_copies_of_one_text_are_no_scatter(copies: int) -> None:
    """Rounding leaves a little of it, whose logarithm would be as large as that of a real one."""
    features, _, ways = task([1, 1])
    repeated = features.float().repeat_interleave(copies, 1)
    labels = torch.arange(2).repeat_interleave(copies)[None]
    assert task_statistics(repeated, labels, ways)[0, -1] == 0


def test_moments_and_statistics_against_numpy() -> None:
    features, labels, ways = task([3, 1, 4])
    rows, of = features[0].numpy(), labels[0].numpy()
    means = np.stack([rows[of == c].mean(0) for c in range(3)])
    spread = np.stack([rows[of == c].std(0, ddof=1) if (of == c).sum() > 1 else np.zeros(HIDDEN) for c in range(3)])
    found = class_moments(features, labels, 3)
    np.testing.assert_allclose(found[0][0], means)
    np.testing.assert_allclose(found[1][0], spread, atol=1e-12)
    within = np.mean([(spread[c] ** 2).sum() for c in (0, 2)])
    between = ((means - means.mean(0)) ** 2).sum() / 2
    expected = [np.log(3), np.log([3, 1, 4]).mean(), within, between, np.log(between / within)]
    np.testing.assert_allclose(task_statistics(features, labels, ways)[0], expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "mlp"}, "kind must be"),
        ({"size": 0}, "size must be from 1"),
        ({"width": 10**9}, "width must be from 1"),
        ({"kind": "set_transformer", "width": 6}, "multiple of 4"),
    ],
)
def test_settings_out_of_range(given: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        TaskEncoderSettings(**given)
