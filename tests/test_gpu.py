"""The engine on a GPU gives what it gives on the CPU."""

import pytest
import torch

from tests.meta.test_adaptation import INNER, moved_parameters
from textmeta.data.episodes import EpisodeSampler
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_meta_gradients(
    name: str, checkpointed: bool, precision: str, tiny_model: str, encoder: Encoder, sampler: EpisodeSampler
) -> None:
    settings = EncoderSettings(tiny_model, max_length=32)
    on_gpu = Encoder(settings, LoraSettings(rank=4), device="cuda", precision=precision)
    algorithm, plan = ALGORITHMS[name], MetaGradientSettings(checkpointed=checkpointed)
    inner = algorithm.inner(INNER)
    parameters = moved_parameters(encoder, inner)
    expected = algorithm.gradient(encoder, parameters, sampler.take(4), inner, plan).gradient
    moved = {key: value.to("cuda") for key, value in parameters.items()}
    found = algorithm.gradient(on_gpu, moved, sampler.take(4), inner, plan).gradient
    flat = [torch.cat([part[key].cpu().flatten() for key in sorted(expected)]) for part in (expected, found)]
    assert (flat[0] - flat[1]).norm() < (1e-2 if precision == "no" else 0.3) * flat[0].norm()


def test_prefix_states_do_not_depend_on_the_company(tiny_model: str) -> None:
    texts = [f"bal bel {'bil ' * (number % 5)}" for number in range(40)]
    one, two = (Encoder(EncoderSettings(tiny_model, max_length=32), device="cuda") for _ in range(2))
    forwards, backwards = one._states(texts, remember=False), two._states(texts[::-1], remember=False)[::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
