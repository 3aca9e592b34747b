"""What a step leaves to the machine: nothing to wait for, and nothing behind.

Inner steps never ask a device for a value: on a GPU the host would wait for it, and the GPU then for the host.
"""

import gc
from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function

from tests.given import Patch
from tests.meta.given import LAYERS, leaves_of, make_learner, with_values
from textmeta import Corpus, EpisodeSampler, EpisodeSettings
from textmeta.encoder.attention import NAME
from textmeta.encoder.encoder import Encoder
from textmeta.meta import learner as learner_module
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.batch import TaskBatch
from textmeta.meta.initialisation import Adapt, LearnerSettings

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
    of = AttentionMaskInterface()[NAME]
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
