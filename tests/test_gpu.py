"""What is learned on a GPU is what is learned on the CPU."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.given import LABELS, SUPPORT, TEXTS, adapter_of
from textmeta import Adapter, Corpus, EpisodeSampler, FewShotClassifier, MetaTrainer
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.initialisation import Adapt, Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner

pytestmark = pytest.mark.gpu


def gradient(encoder: Encoder, algorithm: str, adapt: Adapt, sampler: EpisodeSampler) -> torch.Tensor:
    """The meta-gradient of four episodes, away from the start, where LoRA's A has none."""
    settings = ALGORITHMS[algorithm].learner(LearnerSettings(layers=(2, 3, 4), steps=3, adapt=adapt))
    start = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, settings, seed=0)
    generator = torch.Generator().manual_seed(0)
    leaves = {
        name: (value + 0.05 * torch.randn(value.shape, generator=generator)).to(encoder.device).requires_grad_()
        for name, value in start.tensors().items()
    }
    adapter = Adapter.of(TokenStateReader(encoder, settings.layers), settings, start)
    learner = TaskLearner(
        TokenStateReader(encoder, settings.layers), replace(adapter, initialisation=start.with_tensors(leaves))
    )
    found = ALGORITHMS[algorithm].gradient(learner, sampler.take(4), leaves).gradient
    return torch.cat([found[name].detach().cpu().flatten() for name in sorted(found)])


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("adapt", ["pooling", "pooling+lora"])
@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_meta_gradients(
    algorithm: str, adapt: Adapt, precision: str, tiny_model: str, encoder: Encoder, sampler: EpisodeSampler
) -> None:
    on_gpu = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4), "cuda", precision)
    expected, found = (gradient(which, algorithm, adapt, sampler) for which in (encoder, on_gpu))
    assert (found - expected).norm() < (1e-2 if precision == "no" else 0.3) * expected.norm()


def test_an_adapter_trained_on_a_gpu_is_used_on_the_cpu(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    trainer = MetaTrainer(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4), episodes=4)
    FewShotClassifier(trainer.train([corpus], output=tmp_path / "run")).save_pretrained(tmp_path / "adapter")
    texts, labels = ["bal bel", "bel bal", "dil dol", "dol dil"], ["one", "one", "two", "two"]
    found = [
        FewShotClassifier(tmp_path / "adapter", device=device).fit(texts, labels).predict_proba(["bal", "dil bal"])
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adapt", ["pooling", "lora"])
def test_a_fitted_classifier_moves_and_its_pickle_holds_no_tensor_of_the_gpu(adapt: str, tiny_model: str) -> None:
    adapter = adapter_of(tiny_model, adapt=adapt).to(torch.device("cuda"))
    fitted = FewShotClassifier(adapter).fit(SUPPORT, LABELS)
    assert fitted._learner.reader.encoder.device.type == "cuda", "what there is"
    expected = fitted.predict_proba(TEXTS)
    np.testing.assert_allclose(fitted.to("cpu").predict_proba(TEXTS), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(fitted.to("cuda").predict_proba(TEXTS), expected, rtol=1e-5, atol=1e-5)
    general = FewShotClassifier(adapter=None, encoder=tiny_model).fit(SUPPORT, LABELS)
    pickled = [pickle.dumps(one) for one in (fitted, general)]
    for content in pickled:
        assert b"cuda:" not in content
        copied = pickle.loads(content)  # noqa: S301
        assert copied.to("cpu").predict_proba(TEXTS).shape == (6, 3)
