"""The task learner and the outer gradient, against :mod:`tests.heads.reference` and finite differences."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.heads import reference
from tests.heads.reference import Task
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode
from textmeta.encoder.token_states import TokenStateReader, TokenStates
from textmeta.heads.common import Examples
from textmeta.meta import learner as learner_module
from textmeta.meta.batch import Rows, TaskBatch, rows_in_turn
from textmeta.meta.initialisation import ADAPT, Initialisation, LearnerSettings
from textmeta.meta.learner import LearnedTasks, Reader, TaskLearner
from textmeta.meta.trainer import fomaml, maml, query_losses, reptile
from textmeta.model.encoder import Encoder

LAYERS = (1, 3, 4)
CPU = torch.device("cpu")


def make_learner(encoder: Encoder, adapt: str = "pooling", steps: int = 3, **more) -> TaskLearner:
    """A learner with every tensor away from its start, in float64."""
    settings = LearnerSettings(LAYERS, adapt, steps, **more)  # type: ignore[arg-type]
    start = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, settings, seed=0)
    generator = torch.Generator().manual_seed(3)
    sizes = {"queries": 0.5, "centre": 0.05, "name_centre": 0.05}
    tensors = {}
    for name, value in start.tensors().items():
        size = sizes.get(name, 0.1)
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        tensors[name] = value.double() + (0 if ".lora_A." in name else size * noise)
    tensors["loss_log_scale"] -= 1.5  # so that the loss is not at its bound, log C₁
    tensors["lora_log_step_sizes"] += 1.0
    return TaskLearner(TokenStateReader(encoder, LAYERS), start.with_tensors(tensors), settings)


def texts_of(corpus: Corpus, label: int) -> list[str]:
    return [corpus.texts[row] for row in corpus.rows_of(label)]


def make_task(
    corpus: Corpus, sizes: Sequence[int], *, names: bool = False, unlabelled: int = 0, first: int = 0
) -> Task:
    """A task with so many examples of each class; its queries and unlabelled texts are the classes' last texts."""
    pools = [texts_of(corpus, first + c) for c in range(len(sizes))]
    texts = [text for pool, size in zip(pools, sizes, strict=True) for text in pool[:size]]
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    extra = [pools[i % len(pools)][-1 - i // len(pools)] for i in range(unlabelled)]
    queries = [pool[-6] for pool in pools] + [pools[0][-7]]
    own = [texts_of(corpus, first + c)[-8] for c in range(len(sizes))] if names else None
    return Task(texts, labels, len(sizes), own, tuple(extra), tuple(queries))


def odd_tasks(corpus: Corpus) -> dict[str, Task]:
    identical = make_task(corpus, (3, 3))
    identical.texts = [identical.texts[0]] * 6
    misleading = make_task(corpus, (3, 3))
    misleading.texts = [
        *misleading.texts[:3],
        *misleading.texts[1:4],
    ]  # the nearest text is of the other class: the loss is above log C₁
    return {
        "five by five": make_task(corpus, (5, 5, 5, 5, 5)),
        "one shot": make_task(corpus, (1, 1, 1, 1), first=2),
        "zero shot": make_task(corpus, (0, 0, 0), names=True),
        "name alone": make_task(corpus, (3, 0, 2), names=True),
        "unequal": make_task(corpus, (1, 2, 4, 6), first=4),
        "named": make_task(corpus, (2, 3), names=True, first=5),
        "unlabelled": make_task(corpus, (2, 2, 2), names=True, unlabelled=7),
        "unlabelled without names": make_task(corpus, (1, 3), unlabelled=5),
        "no label yet": make_task(corpus, (0, 0, 0), names=True, unlabelled=6),
        "one text": make_task(corpus, (1, 0)),
        "one class": make_task(corpus, (3,)),
        "one of two classes": make_task(corpus, (0, 3), names=True),
        "no class of two but one": make_task(corpus, (3, 1, 1)),
        "identical": identical,
        "misleading": misleading,
    }


def batch_of(tasks: Sequence[Task]) -> tuple[TaskBatch, Rows]:
    batch = TaskBatch.of(
        [t.texts for t in tasks],
        [t.labels for t in tasks],
        [t.ways for t in tasks],
        [t.names for t in tasks],
        [t.unlabelled for t in tasks],
    )
    return batch, Rows.of([t.queries for t in tasks], CPU)


def learn(learner: TaskLearner, tasks: Sequence[Task], second_order: bool = False) -> tuple[LearnedTasks, Tensor]:
    """Return what is learned, and the logits (T, queries, C)."""
    batch, queries = batch_of(tasks)
    states = learner.read(batch, queries)
    learned = learner.learn(batch, states, second_order)
    asked = states.queries
    if learned.factors is not learner.initialisation.lora:
        asked = learner.reader.read(queries.texts, learned.factors, queries.row_task)
    return learned, learner.logits(learned, queries, asked)


def plain_read(learner: TaskLearner) -> reference.Read:
    def read(texts: list[str], factors: Mapping[str, Tensor]) -> list[Tensor]:
        return learner.reader.read(texts, factors).unpadded()  # type: ignore[attr-defined]

    return read


def in_batch_order(task: Task) -> Task:
    """The task with its texts in the order of a batch, in which folds are made."""
    batch, _ = batch_of([task])
    return dataclasses.replace(task, texts=list(batch.support.texts), labels=batch.labels[0].tolist())


# -------------------------------------------------------------------------------------------- what a task is learned as


@pytest.mark.parametrize("adapt", ADAPT)
def test_each_task_is_learned_as_the_specification_says(encoder64: Encoder, corpus: Corpus, adapt: str):
    learner = make_learner(encoder64, adapt, steps=2)
    tasks = odd_tasks(corpus)
    if "lora" in adapt:
        tasks = {name: tasks[name] for name in ("unequal", "unlabelled", "identical")}
    for name, task in tasks.items():
        with torch.no_grad():
            found = learn(learner, [task])[1][0]
        own = in_batch_order(task)
        expected = reference.task_logits(own, learner.initialisation.tensors(), adapt, plain_read(learner)).detach()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_meta_sgd_has_a_step_size_for_each_entry(encoder64: Encoder, corpus: Corpus):
    learner = make_learner(encoder64, steps=2, entry_step_sizes=True)
    task = odd_tasks(corpus)["unequal"]
    expected = reference.task_logits(
        in_batch_order(task), learner.initialisation.tensors(), "pooling", plain_read(learner)
    )
    torch.testing.assert_close(learn(learner, [task])[1][0].detach(), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize(("adapt", "head"), [*((adapt, "ridge") for adapt in ADAPT), ("none", "prototype")])
def test_tasks_of_a_batch_are_learned_as_one_by_one(
    encoder64: Encoder, corpus: Corpus, adapt: str, head: str, unlabelled: bool
):
    learner = make_learner(encoder64, adapt, steps=2, head=head)
    tasks = {name: task for name, task in odd_tasks(corpus).items() if unlabelled or not task.unlabelled}
    with torch.no_grad():
        found = learn(learner, list(tasks.values()))[1]
        wrong = []
        for row, (name, task) in enumerate(tasks.items()):
            alone = learn(learner, [task])[1][0]
            own = found[row, : len(task.queries), : task.ways]
            if not torch.allclose(own, alone, rtol=1e-6, atol=1e-8):
                wrong.append(f"{name}: {float((own - alone).abs().max()):.2e}")
            assert (found[row, :, task.ways :] == -torch.inf).all()
    assert not wrong


@pytest.mark.parametrize("adapt", ADAPT)
def test_tasks_with_unlabelled_texts_are_learned_as_one_by_one(encoder64: Encoder, corpus: Corpus, adapt: str):
    learner = make_learner(encoder64, adapt, steps=2)
    tasks = [task for task in odd_tasks(corpus).values() if task.unlabelled]
    with torch.no_grad():
        found = learn(learner, tasks)[1]
        for row, task in enumerate(tasks):
            own = found[row, : len(task.queries), : task.ways]
            torch.testing.assert_close(own, learn(learner, [task])[1][0], rtol=1e-6, atol=1e-8)


def test_an_answer_does_not_depend_on_the_other_queries(encoder64: Encoder, corpus: Corpus):
    learner = make_learner(encoder64)
    tasks = [odd_tasks(corpus)[name] for name in ("unequal", "named")]
    batch, queries = batch_of(tasks)
    with torch.no_grad():
        states = learner.read(batch, queries)
        learned = learner.learn(batch, states)
        together = learner.logits(learned, queries, states.queries)
        for task, number in ((0, 1), (1, 0), (1, 2)):
            alone = Rows.of([[tasks[i].queries[number]] if i == task else [] for i in range(2)], CPU)
            found = learner.logits(learned, alone, learner.reader.read(alone.texts, learner.initialisation.lora))
            torch.testing.assert_close(found[task, 0], together[task, number], rtol=1e-8, atol=1e-8)


LARGE = (16,) * 10  # 160 texts


@pytest.mark.parametrize(
    ("adapt", "sizes"), [*((adapt, (1, 2, 4, 3)) for adapt in ADAPT), ("pooling", LARGE), ("lora", LARGE)]
)
def test_the_order_of_texts_and_classes_changes_nothing(
    encoder64: Encoder, corpus: Corpus, adapt: str, sizes: tuple[int, ...]
):
    learner = make_learner(encoder64, adapt, steps=2)
    task = make_task(corpus, sizes, names=True, unlabelled=3)
    rng = np.random.default_rng(0)
    to, rows = rng.permutation(len(sizes)), rng.permutation(len(task.texts))
    assert task.names is not None
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


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 1), (4,), (2, 0)])
def test_no_step_where_fewer_than_two_classes_have_two_examples(
    encoder64: Encoder, corpus: Corpus, sizes: tuple[int, ...]
):
    learner = make_learner(encoder64)
    beside = make_task(corpus, (2, 2))  # takes steps
    learned, _ = learn(learner, [make_task(corpus, sizes), beside])
    assert torch.equal(learned.queries[0], learner.initialisation.queries)
    assert not torch.equal(learned.queries[1], learner.initialisation.queries)


def tensors_in(value: object) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [("", value)]
    parts: Mapping[str, object] = {}
    if isinstance(value, Mapping):
        parts = value
    elif dataclasses.is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return [(f"{name}.{rest}", found) for name, part in parts.items() for rest, found in tensors_in(part)]


@pytest.mark.parametrize("adapt", ["pooling", "pooling+lora"])
def test_what_is_kept_of_a_task_does_not_grow_with_its_texts(encoder64: Encoder, corpus: Corpus, adapt: str):
    learner = make_learner(encoder64, adapt, steps=1)
    task = make_task(corpus, (6, 7), names=True, unlabelled=11)
    with torch.no_grad():
        learned, _ = learn(learner, [task])
    assert [name for name, value in tensors_in(learned) if {13, 11, 24} & {*value.shape}] == []


@pytest.mark.parametrize("adapt", ["none", "pooling", "pooling+lora"])
def test_gradients_are_finite_in_odd_tasks(encoder64: Encoder, corpus: Corpus, adapt: str):
    learner = make_learner(encoder64, adapt, steps=2)
    leaves = {n: value.requires_grad_() for n, value in learner.initialisation.tensors().items()}
    for name, task in odd_tasks(corpus).items():
        _, logits = learn(learner, [task], second_order=True)
        assert logits.isfinite().all(), name
        found = torch.autograd.grad(logits.square().sum(), list(leaves.values()), allow_unused=True)
        assert all(part is None or part.isfinite().all() for part in found), name


def test_what_tells_the_scope_is_finite_in_odd_tasks(encoder64: Encoder, corpus: Corpus):
    learner = make_learner(encoder64, steps=1)
    tasks = odd_tasks(corpus)
    batch, queries = batch_of(list(tasks.values()))
    with torch.no_grad():
        states = learner.read(batch, queries)
        found = learner.scope_inputs(learner.learn(batch, states), queries, states.queries)
    assert found.isfinite().all()
    for row, (name, task) in enumerate(tasks.items()):
        k = len(task.labels) / max(1, len(set(task.labels)))
        expected = [float(task.names is not None), math.log(1 + k), math.log(task.ways)]
        assert found[row, 0, [3, 5, 6]].tolist() == pytest.approx(expected), name
        assert task.labels or not found[row, :, 1].any(), name
        assert task.names or not found[row, :, 2].any(), name


# ---------------------------------------------------------------------------------------------- rows in turn


def examples_of(*sizes: Sequence[int]) -> Examples:
    """Tasks whose classes have so many examples, classes interleaved as they come."""
    rng = np.random.default_rng(0)
    labels = [rng.permutation(np.repeat(np.arange(len(part)), part)) for part in sizes]
    width = max(map(len, labels))
    rows = [[*part.tolist(), *[-1] * (width - len(part))] for part in labels]
    return Examples.of(torch.tensor(rows), torch.tensor([len(part) for part in sizes]), torch.float64)


def test_small_tasks_are_seen_whole():
    examples = examples_of([64, 63, 1], [100, 100], [1, 1, 3])
    for step in range(4):
        rows = rows_in_turn(examples, step)
        assert rows[0].sum() == 128
        assert rows[2, :5].all()
        assert not rows[2, 5:].any()
        assert 4 <= rows[1].sum() <= 128


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
def test_a_step_of_a_large_task_is_bounded(sizes: list[int]):
    examples = examples_of(sizes)
    several = examples.member[0].sum(0) >= 2
    for step in range(12):
        each = examples.member[0][rows_in_turn(examples, step)[0]].sum(0)
        assert not each[~several].any()
        chosen = each[each > 0]
        assert 2 <= len(chosen) <= 64
        assert len(chosen) == min(64, int(several.sum()))
        assert int(chosen.min()) >= 2
        assert int(each.sum()) <= 128


@pytest.mark.parametrize("name", CROWDS)
def test_everything_is_seen_in_turn(name: str):
    examples = examples_of(CROWDS[name])
    several = examples.member[0].sum(0) >= 2
    seen = torch.stack([rows_in_turn(examples, step)[0] for step in range(200)]).any(0)
    due = (examples.member[0] * several).sum(-1) > 0
    assert int((due & ~seen).sum()) == 0


def test_turns_do_not_depend_on_the_number_of_a_class():
    examples = examples_of([2 + c % 6 for c in range(100)])
    to = torch.as_tensor(np.random.default_rng(1).permutation(100))
    other = Examples(examples.member[:, :, to], examples.weights, examples.classes)
    for step in range(5):
        assert torch.equal(rows_in_turn(examples, step), rows_in_turn(other, step))


# ---------------------------------------------------------------------------------------------- gradients


def episode_of(task: Task) -> Episode:
    labels = [*range(task.ways), 0]
    names = None if task.names is None else tuple(task.names)
    return Episode(
        "toy",
        tuple(map(str, range(task.ways))),
        tuple(task.texts),
        np.array(task.labels, dtype=np.int64),
        task.queries,
        np.array(labels),
        names,
        task.unlabelled,
    )


def outer_tasks(corpus: Corpus) -> list[Task]:
    """Names, unlabelled texts, unequal classes; nothing but names; neither."""
    return [
        make_task(corpus, (1, 3, 4), names=True, unlabelled=4),
        make_task(corpus, (0, 0), names=True, first=3),
        make_task(corpus, (2, 3), first=6),
    ]


NO_PART = {
    "none": {"log_step_sizes", "lora_log_step_sizes", "pull", "step_gate", "loss_view_weights", "loss_log_scale"},
    "pooling": {"lora_log_step_sizes"},
    "pooling+lora": set(),
}


def with_values(learner: TaskLearner, tensors: Mapping[str, Tensor]) -> TaskLearner:
    return TaskLearner(learner.reader, learner.initialisation.with_tensors(tensors), learner.settings)


class Remembering:
    """Reads token states once, as long as LoRA's factors are these."""

    def __init__(self, reader: Reader, factors: Mapping[str, Tensor]) -> None:
        self.reader, self.factors = reader, factors
        self.known: dict[tuple[str, ...], TokenStates] = {}

    def read(
        self, texts: Sequence[str], factors: Mapping[str, Tensor] | None = None, row_task: Tensor | None = None
    ) -> TokenStates:
        if factors is None or any(
            factors[n].shape != value.shape or factors[n].data_ptr() != value.data_ptr()
            for n, value in self.factors.items()
        ):
            return self.reader.read(texts, factors, row_task)
        if tuple(texts) not in self.known:
            self.known[tuple(texts)] = self.reader.read(texts, factors)
        return self.known[tuple(texts)]


def difference(learner: TaskLearner, episodes: list[Episode], name: str, way: Tensor, width: float = 1e-5) -> float:
    """Central difference of the mean query loss along a direction of one tensor."""
    tensors, losses = learner.initialisation.tensors(), []
    for sign in (1, -1):
        moved = {n: value.detach() for n, value in tensors.items()}
        moved[name] = moved[name] + sign * width * way
        with torch.no_grad():
            losses.append(float(query_losses(with_values(learner, moved), episodes, second_order=False)[0].mean()))
    return (losses[0] - losses[1]) / (2 * width)


def check_gradients(
    learner: TaskLearner,
    episodes: list[Episode],
    gradients: Mapping[str, Tensor],
    without: set[str],
) -> None:
    """Compare a random entry of every tensor, and a random direction of all of its entries."""
    rng = np.random.default_rng(0)
    learner.reader.cache(  # type: ignore[attr-defined]
        [t for e in episodes for t in (*e.support_texts, *e.query_texts, *(e.label_names or ()), *e.unlabelled_texts)]
    )
    learner = TaskLearner(
        Remembering(learner.reader, learner.initialisation.lora), learner.initialisation, learner.settings
    )
    for name, gradient in gradients.items():
        if name in without:
            assert not gradient.any(), name
            continue
        assert gradient.abs().max() > 1e-9, f"{name} has no gradient"
        ways = [torch.as_tensor(rng.standard_normal(gradient.shape))]
        for entry in rng.choice(gradient.numel(), 1) if gradient.ndim else ():
            ways.append(
                torch.zeros_like(gradient).flatten().index_fill(0, torch.tensor([entry]), 1.0).view_as(gradient)
            )
        for way in ways:
            expected, found = difference(learner, episodes, name, way), float((gradient * way).sum())
            assert math.isclose(found, expected, rel_tol=1e-5, abs_tol=2e-8), f"{name}: {found} {expected}"


def leaves_of(learner: TaskLearner) -> tuple[TaskLearner, dict[str, Tensor]]:
    leaves = {n: value.clone().requires_grad_() for n, value in learner.initialisation.tensors().items()}
    return with_values(learner, leaves), leaves


@pytest.mark.parametrize(("adapt", "steps"), [("none", 2), ("pooling", 3), ("pooling+lora", 2)])
def test_maml_is_the_exact_gradient_in_every_tensor(encoder64: Encoder, corpus: Corpus, adapt: str, steps: int):
    learner = make_learner(encoder64, adapt, steps)
    episodes = [episode_of(task) for task in outer_tasks(corpus)]
    differentiated, leaves = leaves_of(learner)
    gradients, _, _ = maml(differentiated, episodes, leaves)
    check_gradients(learner, episodes, gradients, NO_PART[adapt])


def test_first_order_is_exact_through_features(encoder64: Encoder, corpus: Corpus):
    learner = make_learner(encoder64, "none")
    episodes = [episode_of(task) for task in outer_tasks(corpus)]
    differentiated, leaves = leaves_of(learner)
    first, second = fomaml(differentiated, episodes, leaves)[0], maml(differentiated, episodes, leaves)[0]
    for name in leaves:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-12)


def test_lora_learns_through_six_steps_as_in_a_plain_loop(encoder64: Encoder, corpus: Corpus):
    learner, leaves = leaves_of(make_learner(encoder64, steps=6))
    tasks = outer_tasks(corpus)
    found = maml(learner, [episode_of(task) for task in tasks], leaves)[0]
    losses = []
    for task in tasks:
        logits = reference.task_logits(in_batch_order(task), leaves, "pooling", plain_read(learner))
        losses.append(-logits.log_softmax(-1)[range(len(logits)), [*range(task.ways), 0]].mean())
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()), allow_unused=True)
    for (name, value), part in zip(leaves.items(), expected, strict=True):
        part = torch.zeros_like(value) if part is None else part  # noqa: PLW2901
        torch.testing.assert_close(found[name], part, rtol=1e-5, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    assert max(float(found[name].abs().max()) for name in found if name.startswith("lora.")) > 1e-4


@pytest.mark.parametrize("adapt", ["pooling", "pooling+lora"])
def test_fomaml_takes_the_inner_gradients_as_constants(
    encoder64: Encoder, corpus: Corpus, adapt: str, monkeypatch: pytest.MonkeyPatch
):
    """The loss with its inner gradients and losses frozen at what they were has the same finite differences."""
    learner = make_learner(encoder64, adapt, steps=2)
    episodes = [episode_of(task) for task in outer_tasks(corpus)[:2]]
    differentiated, leaves = leaves_of(learner)
    gradients, _, _ = fomaml(differentiated, episodes, leaves)
    exact = maml(differentiated, episodes, leaves)[0]
    assert any(not torch.allclose(gradients[name], exact[name], rtol=1e-3) for name in leaves)

    frozen: list[tuple[dict[str, Tensor], Tensor]] = []
    usual = learner_module.inner_steps

    def recording(loss, start, shared, update, steps, **more):
        def noted(step, fast, found, losses):
            frozen.append(({n: g.detach() for n, g in found.items()}, losses.detach()))
            return update(step, fast, found, losses)

        return usual(loss, start, shared, noted, steps, **more)

    def replaying(loss, start, shared, update, steps, **more):
        fast = dict(start)
        yield fast
        for step in range(steps):
            fast = update(step, fast, *frozen[step])
            yield fast

    monkeypatch.setattr(learner_module, "inner_steps", recording)
    query_losses(learner, episodes, second_order=False)
    monkeypatch.setattr(learner_module, "inner_steps", replaying)
    # the loss of the steps has no part in what follows from constants
    without = NO_PART[adapt] | {"loss_view_weights", "loss_log_scale"}
    check_gradients(learner, episodes, gradients, without)


def test_reptile_moves_to_where_the_steps_end(encoder64: Encoder, corpus: Corpus):
    learner, leaves = leaves_of(make_learner(encoder64, steps=3))
    tasks = outer_tasks(corpus)
    gradients, _, _ = reptile(learner, [episode_of(task) for task in tasks], leaves)
    ends = []
    for task in (tasks[0], tasks[2]):  # the other one has names alone, and takes no steps
        labels = [*task.labels, *range(task.ways), 0]
        both = Task([*task.texts, *task.queries], labels, task.ways)
        ends.append(reference.adapted(in_batch_order(both), leaves, "pooling", plain_read(learner))[0].detach())
    expected = (leaves["queries"] - torch.stack(ends).mean(0)).detach()
    torch.testing.assert_close(gradients["queries"], expected, rtol=1e-6, atol=1e-8)
    first = fomaml(learner, [episode_of(task) for task in tasks], leaves)[0]
    for name in leaves:
        if name != "queries":
            torch.testing.assert_close(gradients[name], first[name])


def test_a_query_of_no_class_has_no_part_in_the_loss(encoder64: Encoder, corpus: Corpus):
    learner = make_learner(encoder64)
    episode = episode_of(outer_tasks(corpus)[2])
    more = dataclasses.replace(
        episode,
        query_texts=(*episode.query_texts, texts_of(corpus, 11)[0]),
        query_labels=np.append(episode.query_labels, -1),
    )
    one, other = (query_losses(learner, [e], second_order=False) for e in (episode, more))
    torch.testing.assert_close(one, other)


def test_one_labelled_class_is_nothing_to_regress_on_with_unlabelled_texts_either(encoder64: Encoder, corpus: Corpus):
    learner = make_learner(encoder64, "none", steps=1)
    texts = corpus.texts[:6]
    batch = TaskBatch.of([texts[:1]], [[0]], [3], None, [texts[1:]])
    queries = Rows.of([texts[:2]], torch.device("cpu"))
    with torch.no_grad():
        states = learner.read(batch, queries)
        found = learner.logits(learner.learn(batch, states), queries, states.queries).softmax(-1)
    torch.testing.assert_close(found, torch.full_like(found, 1 / 3))
