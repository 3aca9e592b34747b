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


@pytest.mark.parametrize(
    ("name", "adapt", "checkpointed"), [("maml", "pooling", False), ("maml", "lora", True), ("reptile", "lora", False)]
)
def test_memory_stays_the_same_over_200_steps(
    name: str, adapt: str, checkpointed: bool, encoder: Encoder, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checkpointed:
        monkeypatch.setattr(learner_module, "KEPT_TEXTS", 0)
    sampler = EpisodeSampler(corpus, EpisodeSettings(2, 2, 1), seed=0)
    learner = make_learner(encoder, LearnerSettings(LAYERS, adapt, steps=1), torch.float32)  # type: ignore[arg-type]
    learner.reader.cache(corpus.texts)  # type: ignore[attr-defined]
    tensors, resident = [], []
    for step in range(STEPS):
        learner, leaves = leaves_of(learner)
        found = ALGORITHMS[name].gradient(learner, [sampler[step]], leaves).gradient
        learner = with_values(learner, {key: value.detach() - 1e-3 * found[key] for key, value in leaves.items()})
        if step in (WARM_UP, STEPS - 1):
            gc.collect()
            tensors.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
            resident.append(psutil.Process().memory_info().rss)
    assert tensors[0] == tensors[1]
    # the activations of one step are about 1 MiB: kept, they would come to 150
    assert resident[1] - resident[0] < 10 * 2**20
