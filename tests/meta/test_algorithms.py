"""One contract for every algorithm; what is particular to one; and what a step leaves to the machine.

The meta-gradients are checked in ``test_meta_gradients.py`` and, against other libraries, in ``test_peer.py``.
"""

import gc
import random
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function

from tests.given import Patch
from tests.meta.given import LAYERS, ROWS, episode_of, leaves_of, make_learner, make_task, texts_of, with_values
from textmeta import Corpus, Episode, EpisodeSampler, EpisodeSettings
from textmeta.data.episodes import OUTSIDE
from textmeta.encoder.attention import SWITCHED
from textmeta.encoder.encoder import Encoder
from textmeta.meta import learner as learner_module
from textmeta.meta.algorithms import ALGORITHMS, MetaGradient, query_losses
from textmeta.meta.batch import TaskBatch
from textmeta.meta.initialisation import Adapt, LearnerSettings
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


def random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()  # noqa: NPY002


@each_row
def test_gradients_are_finite_whole_repeatable_and_change_nothing(row: str, encoder: Encoder, corpus: Corpus) -> None:
    learner, leaves = leaves_of(learner_of(row, encoder, torch.float32))  # as in training
    before = {name: value.detach().clone() for name, value in leaves.items()}
    weights = {name: value.clone() for name, value in encoder._suffix.state_dict().items()}
    before_random = random_states()
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
    assert random_states() == before_random


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


# What a step leaves to the machine: nothing to wait for, and nothing behind. Inner steps never ask a device for a
# value: on a GPU the host would wait for it, and the GPU then for the host.


# values that the host asks for, and what it sends
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave", "lift_fresh"}


class Waits(TorchDispatchMode):
    """Remembers the operations for which a host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            part.dtype == torch.bool
            for part in args[1:2]
            if isinstance(part, list)
            for part in part
            if part is not None
        )
        if name in WAITS or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("adapt", ["pooling", "pooling+lora", "offset"])
def test_inner_steps_never_wait(
    adapt: Adapt, second_order: bool, encoder: Encoder, sampler: EpisodeSampler, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_: False)  # on a CPU
    learner = make_learner(encoder, LearnerSettings((2, 4), adapt, steps=2), torch.float32)
    inside, around, plain = Waits(), Waits(), learner_module.inner_steps

    def watched(*given: Any, **how: Any) -> dict[str, torch.Tensor]:
        with inside:
            return plain(*given, **how)

    monkeypatch.setattr(learner_module, "inner_steps", watched)
    with around:
        learner.learn(TaskBatch.of_episodes(sampler.take(2)), second_order)
    assert around.names, "that it sees them"
    assert inside.names == []


def test_a_mask_is_not_looked_at_but_on_a_cpu() -> None:
    given = {"batch_size": 2, "q_length": 3, "kv_length": 3, "mask_function": bidirectional_mask_function}
    given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}  # as for every bidirectional encoder
    of = AttentionMaskInterface()[SWITCHED]
    made = {}
    for device in ("cpu", "meta"):  # a meta tensor has no values
        mask = torch.ones(2, 3, dtype=torch.bool, device=device)
        made[device] = of(attention_mask=mask, device=device, **given)
    assert made["cpu"] is None, "the faster kernel"
    assert made["meta"].shape == (2, 1, 3, 3)


STEPS, WARM_UP = 200, 50
# the ways that a step of the outer loop goes: (algorithm, adapted parameters, texts whose activations are kept)
WAYS = (("maml", "pooling", 512), ("maml", "lora", 0))


@pytest.mark.slow
def test_memory_stays_the_same_over_200_steps(encoder: Encoder, corpus: Corpus, monkeypatch: Patch) -> None:
    sampler = EpisodeSampler(corpus, EpisodeSettings(2, 2, 1), seed=0)
    learners = [
        make_learner(encoder, LearnerSettings(LAYERS, adapt, steps=1), torch.float32)  # type: ignore[arg-type]
        for _, adapt, _ in WAYS
    ]
    learners[0].reader.cache(corpus.texts)  # type: ignore[attr-defined]
    tensors, resident = [], []
    for step in range(STEPS):
        name, _, kept = WAYS[step % len(WAYS)]
        monkeypatch.setattr(learner_module, "KEPT_TEXTS", kept)
        learner, leaves = leaves_of(learners[step % len(WAYS)])
        found = ALGORITHMS[name].gradient(learner, [sampler[step]], leaves).gradient
        moved = {key: value.detach() - 1e-3 * found[key].detach() for key, value in leaves.items()}
        learners[step % len(WAYS)] = with_values(learner, moved)
        del learner, leaves, found
        if step in (WARM_UP, STEPS - 1):
            gc.collect()
            tensors.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
            resident.append(psutil.Process().memory_info().rss)
    assert tensors[0] == tensors[1]
    # the activations of one step are about 1 MiB: kept, they would come to 150
    assert resident[1] - resident[0] < 10 * 2**20
