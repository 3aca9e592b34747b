"""bfloat16 in the transformer's matrix products; everything that is learned or compared stays in float32."""

import pytest
import torch

from tests.meta.test_adaptation import INNER, moved_parameters
from textmeta.data.episodes import EpisodeSampler
from textmeta.meta.adaptation import adapt, task_weights
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.meta.tasks import support_batch
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import LORA, Parameters
from textmeta.model.lora import LoraSettings


@pytest.fixture
def half(tiny_model: str) -> Encoder:
    return Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4), precision="bf16")


def flat(gradient: Parameters) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in sorted(gradient.items()) if name.startswith(LORA)])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_meta_gradients(
    name: str, checkpointed: bool, encoder: Encoder, half: Encoder, sampler: EpisodeSampler
) -> None:
    algorithm = ALGORITHMS[name]
    inner = algorithm.inner(INNER)
    parameters, plan = moved_parameters(encoder, inner), MetaGradientSettings(checkpointed=checkpointed)
    one, two = (algorithm.gradient(each, parameters, sampler.take(2), inner, plan).gradient for each in (encoder, half))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in two.values())
    difference = (flat(one) - flat(two)).norm() / flat(one).norm()
    assert 1e-5 < difference < 0.3  # it did run in bfloat16, and rounding is all that it changed


def test_adapted_parameters_and_prototypes_are_float32(half: Encoder, sampler: EpisodeSampler) -> None:
    support = support_batch(half, sampler.take(2))
    assert all(bucket.inputs.dtype == torch.float32 for bucket in support.texts.buckets)
    adapted = adapt(half, moved_parameters(half), support, INNER)
    weights = task_weights(half, adapted, support)
    assert {value.dtype for value in (*adapted.factors.values(), adapted.offset, weights)} == {torch.float32}
