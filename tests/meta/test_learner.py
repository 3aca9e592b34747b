"""What a task is learned as, against the plain loops of :mod:`tests.heads.reference`."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.heads import reference
from tests.heads.given import examples_of
from tests.heads.reference import Task
from tests.meta.given import LAYERS, ROWS, batch_of, crowd, leaves_of, make_learner, make_task, odd_tasks
from textmeta.data.corpus import Corpus
from textmeta.encoder.encoder import Encoder
from textmeta.errors import SettingsError
from textmeta.meta.batch import rows_in_turn
from textmeta.meta.initialisation import LearnerSettings
from textmeta.meta.learner import LearnedTask, TaskLearner

ADAPTS = ("none", "pooling", "lora", "pooling+lora")  # what the reference knows
ANIL = LearnerSettings(LAYERS, "offset", steps=3, head="prototype")
# every way of learning: those of the reference, those of the algorithms, and an offset to the ridge
WAYS = {
    **{adapt: LearnerSettings(LAYERS, adapt, steps=2) for adapt in ADAPTS},  # type: ignore[arg-type]
    **{name: settings for name, (_, settings) in ROWS.items() if name.startswith(("anil", "protonet"))},
    "offset": LearnerSettings(LAYERS, "offset", steps=2),
}
each_way = pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)


def settings_of(adapt: str = "pooling", steps: int = 3, **more) -> LearnerSettings:
    return LearnerSettings(LAYERS, adapt, steps, **more)  # type: ignore[arg-type]


def learn(learner: TaskLearner, tasks: Sequence[Task], second_order: bool = False) -> tuple[LearnedTask, Tensor]:
    """Return what is learned, and the logits (T, queries, C)."""
    batch, queries = batch_of(tasks)
    learned = learner.learn(batch, second_order)
    return learned, learner.answer(learned, queries).logits


def plain_read(learner: TaskLearner) -> Callable[[list[str], Mapping[str, Tensor]], list[Tensor]]:
    return lambda texts, factors: learner.reader.read(texts, factors).unpadded()


def in_batch_order(task: Task) -> Task:
    """The task with its texts in the order of a batch, in which folds are made."""
    batch, _ = batch_of([task])
    return dataclasses.replace(task, texts=list(batch.support.texts), labels=batch.labels[0].tolist())


# -------------------------------------------------------------------------------------------- what a task is learned as


SPECIFIED = {
    **{adapt: WAYS[adapt] for adapt in ADAPTS},
    **{name: ROWS[name][1] for name in ("meta_sgd-pooling", "protonet-none")},
}
SIZES = (400, 400), (1,) * 150, (3,) * 150, (300, 1, 0)


@pytest.mark.parametrize("settings", SPECIFIED.values(), ids=SPECIFIED)
def test_tasks_are_learned_as_specified(encoder64: Encoder, corpus: Corpus, settings: LearnerSettings) -> None:
    learner = make_learner(encoder64, settings)
    tasks = odd_tasks(corpus)
    if "lora" in settings.adapt:
        tasks = {name: tasks[name] for name in ("unequal", "unlabelled", "identical")}
    if settings == WAYS["none"]:
        tasks |= {f"{len(sizes)} classes, {sum(sizes)} texts": crowd(corpus, sizes) for sizes in SIZES}
    tensors = learner.adapter.initialisation.tensors()
    for name, task in tasks.items():
        with torch.no_grad():
            found = learn(learner, [task])[1][0]
        given = in_batch_order(task), tensors, settings.adapt, plain_read(learner)
        expected = reference.task_logits(*given, head=settings.head).detach()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def offset_by_hand(learner: TaskLearner, task: Task, learned: LearnedTask) -> Tensor:
    """ANIL in a plain loop: the head's weights (V, d, C) with the offset that its steps come to.

    Centre, mixture and temperature are those that were learned; they do not depend on the steps.
    """
    t = learner.adapter.initialisation.tensors()
    factors = {name.removeprefix("lora."): value for name, value in t.items() if name.startswith("lora.")}
    u = reference.views_of(plain_read(learner)(task.texts, factors), t["queries"])
    z = reference.unit(u - learned.centre[0])
    rows_of = reference.classes_of(task.labels)
    weights = torch.zeros(*z.shape[1:], task.ways, dtype=z.dtype)
    for c, rows in rows_of.items():
        weights[..., c] = learned.mixture[0][:, None] * reference.unit(z[rows].sum(0))
    offset = torch.zeros_like(weights)
    gate = (t["step_gate"][0] + t["step_gate"][1] * math.log(1 + len(task.labels) / len(rows_of))).sigmoid()
    for size in t["offset_log_step_sizes"].exp():
        offset.requires_grad_()
        losses = []
        for i, label in enumerate(task.labels):
            scores = learned.scale[0] * torch.stack([(z[i] * (weights + offset)[..., c]).sum() for c in rows_of])
            losses.append(-scores.log_softmax(0)[list(rows_of).index(label)])
        loss = reference.class_mean(torch.stack(losses), task.labels)
        (g,) = torch.autograd.grad(loss, offset)
        far = gate * min(1.0, float(loss.detach()))
        offset = (offset - far * size * g / (g.square().mean() + 1e-8).sqrt() - t["pull"].sigmoid() * offset).detach()
    return weights + offset


def test_anil_adapts_an_offset_to_the_head_as_a_plain_loop_does(encoder64: Encoder, corpus: Corpus) -> None:
    learner = make_learner(encoder64, ANIL)
    for name in ("five by five", "unequal", "name alone", "named", "misleading"):
        task = odd_tasks(corpus)[name]
        with torch.no_grad():
            learned, _ = learn(learner, [task])
            before = learned.class_means[0]  # the prototypes themselves
        expected = offset_by_hand(learner, in_batch_order(task), learned)
        torch.testing.assert_close(
            learned.weights[0], expected, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (learned.weights[0] - before).abs().max() > 1e-3  # the steps went somewhere
        assert torch.equal(learned.queries, learner.adapter.initialisation.queries)
        assert not learned.factors


# -------------------------------------------------------------------------------------------- together and alone


@pytest.mark.parametrize(
    ("settings", "unlabelled"),
    [*((settings, True) for settings in WAYS.values()), (WAYS["pooling"], False)],
    ids=[*WAYS, "pooling, no unlabelled texts"],
)
def test_tasks_of_a_batch_are_learned_as_one_by_one(
    encoder64: Encoder, corpus: Corpus, settings: LearnerSettings, unlabelled: bool
) -> None:
    learner = make_learner(encoder64, settings)
    tasks = {name: task for name, task in odd_tasks(corpus).items() if unlabelled or not task.unlabelled}
    if "lora" in settings.adapt:  # which takes the longest
        tasks = {name: tasks[name] for name in ("name alone", "unequal", "unlabelled", "one text", "identical")}
    tasks["crowd"] = crowd(corpus, (140, 1, 2))  # of which a step sees a part
    with torch.no_grad():
        found = learn(learner, list(tasks.values()))[1]
        wrong = []
        for row, (name, task) in enumerate(tasks.items()):
            alone = learn(learner, [task])[1][0]
            own = found[row, : len(task.queries), : task.ways]
            if not torch.allclose(own, alone, rtol=1e-6, atol=1e-5 if name == "identical" else 1e-8):
                wrong.append(f"{name}: {float((own - alone).abs().max()):.2e}")
            assert (found[row, :, task.ways :] == -torch.inf).all()
    assert not wrong


LARGE = (16,) * 10  # 160 texts


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [*((settings, (1, 2, 4, 3)) for settings in WAYS.values()), *((WAYS[name], LARGE) for name in ("pooling", "lora"))],
    ids=[*WAYS, "pooling, large", "lora, large"],
)
def test_the_order_of_texts_and_classes_changes_nothing(
    encoder64: Encoder, corpus: Corpus, settings: LearnerSettings, sizes: tuple[int, ...]
) -> None:
    learner = make_learner(encoder64, settings)
    task = make_task(corpus, sizes, names=True, unlabelled=3)
    rng = np.random.default_rng(0)
    to, rows = rng.permutation(len(sizes)), rng.permutation(len(task.texts))
    other = Task(
        [task.texts[row] for row in rows],
        [int(to[task.labels[row]]) for row in rows],
        task.ways,
        [task.names[c] for c in np.argsort(to)],
        tuple(reversed(task.unlabelled)),
        task.queries,
    )
    with torch.no_grad():
        expected, found = learn(learner, [task])[1][0], learn(learner, [other])[1][0]
    torch.testing.assert_close(found[:, to], expected, rtol=1e-8, atol=1e-8)


# -------------------------------------------------------------------------------------------- odd tasks


@each_way
def test_gradients_are_finite_in_odd_tasks(encoder64: Encoder, corpus: Corpus, settings: LearnerSettings) -> None:
    learner, leaves = leaves_of(make_learner(encoder64, settings))
    tasks = odd_tasks(corpus)
    parts = {"all": list(tasks.values())}
    if settings.adapt == "pooling":  # each alone, too
        parts |= {name: [task] for name, task in tasks.items()}
    for name, part in parts.items():
        _, logits = learn(learner, part, second_order=True)
        there = logits > -torch.inf  # other classes a task does not have
        assert logits[there].isfinite().all(), name
        assert there.any(-1).all(), name
        found = torch.autograd.grad(logits[there].square().sum(), list(leaves.values()), allow_unused=True)
        assert all(value is None or value.isfinite().all() for value in found), name


def test_what_tells_the_scope_is_finite_in_odd_tasks(encoder64: Encoder, corpus: Corpus) -> None:
    learner = make_learner(encoder64, settings_of(steps=1))
    tasks = odd_tasks(corpus)
    batch, queries = batch_of(list(tasks.values()))
    with torch.no_grad():
        answers = learner.answer(learner.learn(batch), queries)
    found, learned = answers.scope_inputs, answers.task
    assert found.isfinite().all()
    for row, (name, task) in enumerate(tasks.items()):
        k = len(task.labels) / max(1, len(set(task.labels)))
        to_means = torch.einsum("vd,vdc->c", answers.views[row, 0], learned.class_means[row])[sorted(set(task.labels))]
        expected = [
            float(answers.logits[row, 0].softmax(0).max()),
            float(to_means.max()) if task.labels else 0.0,
            float(answers.to_names[row, 0, : task.ways].max()) if task.names else 0.0,
            *(float(task.names is not None), float(learned.nll[row]), math.log(1 + k), math.log(task.ways)),
        ]
        assert found[row, 0].tolist() == pytest.approx(expected), name


# ---------------------------------------------------------------------------------------------- rows in turn


CROWDS = {
    "two large": [300, 300],
    "one small": [3, 200],
    "with single ones": [50] * 4 + [1] * 30,
    "65 of 3": [3] * 65,
    "77 of 4": [4] * 77,
    "96 of 4": [4] * 96,
    "160 of 4": [4] * 160,
    "200 of 2 to 7": [2 + c % 6 for c in range(200)],
}


@pytest.mark.parametrize("sizes", CROWDS.values(), ids=CROWDS.keys())
def test_a_step_of_a_large_task_is_bounded(sizes: list[int]) -> None:
    """And everything is seen in turn."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    examples = examples_of([labels.tolist()], [len(sizes)])
    several = examples.member[0].sum(0) >= 2
    steps = [rows_in_turn(examples, step)[0] for step in range(40)]
    due = (examples.member[0] * several).sum(-1) > 0
    assert not (due & ~torch.stack(steps).any(0)).any()
    for rows in steps[:12]:
        each = examples.member[0][rows].sum(0)
        assert not each[~several].any()
        chosen = each[each > 0]
        assert 2 <= len(chosen) <= 64
        assert len(chosen) == min(64, int(several.sum()))
        assert int(chosen.min()) >= 2
        assert int(each.sum()) <= 128


@pytest.mark.parametrize(
    "wrong", [{"adapt": "all"}, {"head": "nearest"}, {"steps": -1}, {"steps": 51}, {"layers": ("a",)}, {"layers": 2}]
)
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        LearnerSettings(**wrong)  # type: ignore[arg-type]
