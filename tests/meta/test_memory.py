"""Nothing is left behind by a step of the outer loop."""

import gc

import psutil
import pytest
import torch

from tests.meta.given import LAYERS, leaves_of, make_learner, with_values
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.encoder.encoder import Encoder
from textmeta.meta import learner as learner_module
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.initialisation import LearnerSettings

STEPS, WARM_UP = 200, 50


# the ways that a step of the outer loop goes: (algorithm, adapted parameters, texts whose activations are kept)
WAYS = (("maml", "pooling", 512), ("maml", "lora", 0))


@pytest.mark.slow
def test_memory_stays_the_same_over_200_steps(
    encoder: Encoder, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
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
