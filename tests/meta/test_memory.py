"""Nothing is left behind by a step of the outer loop."""

import gc

import psutil
import pytest
import torch

from tests.meta.test_adaptation import INNER, moved_parameters
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.model.encoder import Encoder

STEPS, WARM_UP = 200, 50


@pytest.mark.parametrize(("name", "checkpointed"), [("fomaml", False), ("maml", False), ("maml", True)])
def test_memory_stays_the_same_over_200_steps(name: str, checkpointed: bool, encoder: Encoder, corpus: Corpus) -> None:
    algorithm = ALGORITHMS[name]
    sampler = EpisodeSampler(corpus, EpisodeSettings(2, 2, 2), seed=0)
    parameters = moved_parameters(encoder, algorithm.inner(INNER))
    encoder.prepare(list(corpus.texts))  # fills the cache, which is meant to grow
    tensors, resident = [], []
    for step in range(STEPS):
        plan = MetaGradientSettings(checkpointed=checkpointed)
        found = algorithm.gradient(encoder, parameters, [sampler[step]], INNER, plan).gradient
        parameters = {key: value - 1e-3 * found[key] for key, value in parameters.items()}
        if step in (WARM_UP, STEPS - 1):
            gc.collect()
            tensors.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
            resident.append(psutil.Process().memory_info().rss)
    assert tensors[0] == tensors[1]
    # the activations of one step are about 1 MiB: kept, they would come to 150
    assert resident[1] - resident[0] < 10 * 2**20
