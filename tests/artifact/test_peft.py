"""The ecosystem's formats: plain PEFT both ways, transformers, sentence-transformers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
)

from tests.artifact.test_store import CONDITIONED, TEXTS, random_parameters
from tests.conftest import save_tiny_model
from tests.hub.server import TOKEN, HubServer
from textmeta import Corpus, EpisodeSampler, EpisodeSettings, FewShotClassifier
from textmeta.artifact.start import load_start
from textmeta.errors import AdapterError, SettingsError
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.training import train
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import LORA, lora_factors
from textmeta.model.lora import LoraSettings

INNER = InnerLoopSettings(steps=2, adapt=("lora_A", "offset"), lora_step_size=0.02)


@pytest.fixture
def classifier(encoder: Encoder) -> FewShotClassifier:
    return FewShotClassifier(encoder, random_parameters(encoder), INNER)


@pytest.fixture
def conditioned(encoder: Encoder) -> FewShotClassifier:
    return FewShotClassifier(encoder, random_parameters(encoder, inner=CONDITIONED), CONDITIONED)


def mean_features(model: torch.nn.Module, name: str) -> Tensor:
    """What a user makes of a transformers or PEFT model by hand: normalised means over the tokens."""
    batch = AutoTokenizer.from_pretrained(name)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def start_features(classifier: FewShotClassifier) -> Tensor:
    encoder = classifier._encoder
    return encoder.features(encoder.prepare(TEXTS), lora_factors(classifier._parameters))


def test_peft_and_transformers_make_the_features_of_the_start(
    classifier: FewShotClassifier, tiny_model: str, tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path / "adapter")
    expected = start_features(classifier)
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), tmp_path / "adapter")
    torch.testing.assert_close(mean_features(by_peft, tiny_model), expected, rtol=0, atol=1e-5)
    by_transformers = AutoModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(mean_features(by_transformers, tiny_model), expected, rtol=0, atol=1e-5)
    plain = mean_features(AutoModel.from_pretrained(tiny_model), tiny_model)
    assert not torch.allclose(plain, expected, atol=1e-2), "the factors matter"


@pytest.mark.parametrize("fit", [False, True], ids=["start", "fitted"])
def test_peft_start_is_the_one_that_no_task_has_a_say_in(
    conditioned: FewShotClassifier, tiny_model: str, tmp_path: Path, fit: bool
) -> None:
    if fit:
        conditioned.fit(["bal bel", "fim fon"], ["b", "f"])
        ours = start_features(conditioned)
        encoder = conditioned._encoder
        assert conditioned._learned is not None
        theirs = encoder.features(encoder.prepare(TEXTS), conditioned._learned.factors)
        assert not torch.allclose(theirs, ours, atol=1e-2), "the task's own start is another"
    conditioned.save_pretrained(tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), tmp_path / "adapter")
    expected = start_features(conditioned)
    torch.testing.assert_close(mean_features(by_peft, tiny_model), expected, rtol=0, atol=1e-5)


def test_peft_and_transformers_load_it_from_the_hub(
    hub: HubServer, classifier: FewShotClassifier, tiny_model: str
) -> None:
    hub.add_repo("lab/tiny", {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
    classifier.push_to_hub("tester/adapter", token=TOKEN, base_model="lab/tiny")
    expected = start_features(classifier)
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained("lab/tiny"), "tester/adapter")
    torch.testing.assert_close(mean_features(by_peft, "lab/tiny"), expected, rtol=0, atol=1e-5)
    by_transformers = AutoModel.from_pretrained("tester/adapter")
    torch.testing.assert_close(mean_features(by_transformers, "lab/tiny"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fitted", [False, True], ids=["start", "fitted"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within sentence-transformers
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sentence_transformers_loads_the_merged_encoder(
    tiny_model: str, tmp_path: Path, fitted: bool, pooling: Any
) -> None:
    encoder = Encoder(EncoderSettings(tiny_model, pooling=pooling, max_length=6), LoraSettings(rank=4))
    classifier = FewShotClassifier(encoder, random_parameters(encoder), INNER)
    if fitted:
        classifier.fit(["bal bel", "bil bol", "dal del", "dil dol"], ["b", "b", "d", "d"])
    learned = classifier._learned
    factors = learned.factors if learned else lora_factors(classifier._parameters)
    expected = encoder.features(encoder.prepare(TEXTS), factors)
    classifier.merge(tmp_path / "merged")
    found = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    unadapted = encoder.features(encoder.prepare(TEXTS), {name: 0 * value for name, value in factors.items()})
    assert not np.allclose(found, unadapted.numpy(), atol=1e-2)
    assert not list((tmp_path / "merged").rglob("*.bin"))
    with pytest.raises(AdapterError, match="is there already, and is not empty"):
        classifier.merge(tmp_path / "merged")


def test_merging_leaves_the_classifier_as_it_was(classifier: FewShotClassifier, tmp_path: Path) -> None:
    before = start_features(classifier)
    classifier.merge(tmp_path / "merged")
    assert torch.equal(start_features(classifier), before)


def test_merge_that_cannot_be_written_says_so(classifier: FewShotClassifier, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"cannot write a merged encoder to .*file/merged"):
        classifier.merge(tmp_path / "file" / "merged")


# LoRA adapters that PEFT wrote, as a start


def foreign(
    folder: Path, tiny_model: str, change: Callable[[dict[str, Any]], object] = lambda _: None, **options: Any
) -> PeftModel:
    """Write what a user of PEFT has: LoRA on query and value of all four layers, after some training."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **options})
    model = get_peft_model(AutoModel.from_pretrained(tiny_model), config)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    change(content)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"layers_to_transform": [2, 3]}, {"r": 2}], ids=str)
def test_foreign_adapter_makes_the_features_that_peft_makes(
    tiny_model: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = foreign(tmp_path / "foreign", tiny_model, **options)
    start = load_start(tmp_path / "foreign")
    encoder = Encoder(EncoderSettings(tiny_model), start.lora)
    parameters = start.fitted_to(encoder)
    found = encoder.features(encoder.prepare(TEXTS), lora_factors(parameters))
    torch.testing.assert_close(found, mean_features(model, tiny_model), rtol=0, atol=1e-5)


def test_head_beside_the_factors_is_left_out(tiny_model: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny_model), config)
    model.save_pretrained(tmp_path / "foreign")
    assert any("classifier" in name for name in load_file(tmp_path / "foreign" / "adapter_model.safetensors"))
    start = load_start(tmp_path / "foreign")
    encoder = Encoder(EncoderSettings(tiny_model), start.lora)
    assert {name.removeprefix(LORA) for name in start.fitted_to(encoder)} == set(encoder.factor_shapes)


def test_half_precision_factors_are_taken(tiny_model: str, tmp_path: Path) -> None:
    foreign(tmp_path / "foreign", tiny_model)
    path = tmp_path / "foreign" / "adapter_model.safetensors"
    tensors = {name: value.half() for name, value in load_file(path).items()}
    save_file(tensors, path)
    assert all(value.dtype == torch.float32 for value in load_start(tmp_path / "foreign").parameters.values())


def samplers(corpus: Corpus) -> tuple[EpisodeSampler, EpisodeSampler]:
    settings = EpisodeSettings(3, 2, 2)
    names = corpus.class_names
    return EpisodeSampler(corpus.restrict(names[:8]), settings, 0), EpisodeSampler(
        corpus.restrict(names[8:]), settings, 1
    )


def test_meta_training_starts_from_it(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    foreign(tmp_path / "foreign", tiny_model)
    start = load_start(tmp_path / "foreign")
    encoder = Encoder(EncoderSettings(tiny_model), start.lora)
    given = start.fitted_to(encoder)
    settings = TrainingSettings(steps=1, tasks_per_step=2, learning_rate=1e-6, validation_episodes=2)
    result = train(encoder, *samplers(corpus), settings, INNER, tmp_path / "run", start=given)
    for name, value in given.items():
        torch.testing.assert_close(result.parameters[name], value, rtol=0, atol=1e-5)
        assert not torch.equal(result.parameters[name], value), f"{name} has learned nothing"
    assert torch.equal(given[name], load_start(tmp_path / "foreign").fitted_to(encoder)[name]), "and is not overwritten"
    with pytest.raises(SettingsError, match=r"other settings .*start"):
        train(encoder, *samplers(corpus), settings, INNER, tmp_path / "run")


def test_meta_training_starts_from_an_adapter_of_our_own(
    classifier: FewShotClassifier, corpus: Corpus, tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path / "first")
    start = load_start(tmp_path / "first")
    assert start.name == "first"
    encoder = classifier._encoder
    settings = TrainingSettings(steps=1, tasks_per_step=2, learning_rate=1e-6, scalar_learning_rate=1e-6, warmup=1)
    given = start.fitted_to(encoder)
    for inner, taken in ((INNER, True), (InnerLoopSettings(steps=5), False)):
        output = tmp_path / str(inner.steps)
        found = train(encoder, *samplers(corpus), settings, inner, output, start=given).parameters
        torch.testing.assert_close(found["log_temperature"], given["log_temperature"], rtol=0, atol=1e-5)
        assert torch.allclose(found["log_step_size.lora"][:2], given["log_step_size.lora"], atol=1e-5) is taken


def test_a_start_of_another_encoder_is_refused(
    hub: HubServer, classifier: FewShotClassifier, tiny_model: str, tmp_path: Path
) -> None:
    hub.add_repo("lab/other", {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
    foreign(tmp_path / "foreign", tiny_model)
    start = load_start(tmp_path / "foreign")
    with pytest.raises(AdapterError, match=re.escape(f"was trained on {tiny_model!r}, not on 'lab/other'")):
        start.fitted_to(Encoder(EncoderSettings("lab/other"), start.lora))


def test_factors_of_lower_layers_alone_are_refused(tiny_model: str, tmp_path: Path) -> None:
    foreign(tmp_path / "foreign", tiny_model, layers_to_transform=[0, 1])
    start = load_start(tmp_path / "foreign")
    with pytest.raises(AdapterError, match=r"expected a factor encoder\.layer\.2.*textmeta adapts the upper layers"):
        start.fitted_to(Encoder(EncoderSettings(tiny_model), start.lora))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "'use_dora' is True"),
        ({"bias": "lora_only"}, "'bias' is 'lora_only'"),
        ({"rank_pattern": {"layer.3.attention.self.query": 2}}, "'rank_pattern'"),
        ({"alpha_pattern": {"query": 2}}, "'alpha_pattern'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the encoder itself"),
    ],
    ids=["dora", "bias", "ranks", "alphas", "pissa"],
)
def test_what_our_lora_does_not_know_is_refused(
    tiny_model: str, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    foreign(tmp_path / "foreign", tiny_model, **options)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {reason}"):
        load_start(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target_modules": ["query", "word_embeddings"]}, "word_embeddings.lora_embedding_"),
        ({"modules_to_save": ["LayerNorm"]}, "LayerNorm"),
    ],
    ids=["embeddings", "trained modules"],
)
def test_nothing_of_the_encoder_is_left_out_in_silence(
    tiny_model: str, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    foreign(tmp_path / "foreign", tiny_model, **options)
    with pytest.raises(AdapterError, match=rf"adapter_model\.safetensors: .*{name}.* is no LoRA factor of a layer"):
        load_start(tmp_path / "foreign")


def test_names_of_layers_may_have_digits(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DistilBertConfig(vocab_size=160, dim=32, n_layers=3, n_heads=4, hidden_dim=64, initializer_range=0.2)
        name = save_tiny_model(tmp_path / "distil", DistilBertModel(config))
    model = foreign(tmp_path / "foreign", name, target_modules=["q_lin", "v_lin", "lin1", "lin2"])
    start = load_start(tmp_path / "foreign")
    encoder = Encoder(EncoderSettings(name), start.lora)
    found = encoder.features(encoder.prepare(TEXTS), lora_factors(start.fitted_to(encoder)))
    torch.testing.assert_close(found, mean_features(model, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"r": 0}, {"r": True}, {"lora_alpha": 10**400}, {"lora_alpha": 1e308}, {"r": 3}])
def test_numbers_that_make_no_sense_are_refused(tiny_model: str, tmp_path: Path, change: dict[str, Any]) -> None:
    foreign(tmp_path / "foreign", tiny_model, lambda config: config.update(change))
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_start(tmp_path / "foreign")


def test_a_start_of_our_own_is_compared_by_the_encoders_weights(
    classifier: FewShotClassifier, tiny_model: str, tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path / "first")
    start = load_start(tmp_path / "first")
    copied = Path(shutil.copytree(tiny_model, tmp_path / "copied"))
    start.fitted_to(Encoder(EncoderSettings(str(copied)), start.lora))
    tensors = {name: value + 1 for name, value in load_file(copied / "model.safetensors").items()}
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"the weights differ"):
        start.fitted_to(Encoder(EncoderSettings(str(copied)), start.lora))


def test_other_kinds_of_adapters_are_refused(tiny_model: str, tmp_path: Path) -> None:
    foreign(tmp_path / "foreign", tiny_model, lambda config: config.update(peft_type="IA3"))
    with pytest.raises(AdapterError, match=r"adapter_config\.json: peft_type is 'IA3', expected 'LORA'"):
        load_start(tmp_path / "foreign")


def test_pickled_factors_are_refused(tiny_model: str, tmp_path: Path) -> None:
    foreign(tmp_path / "foreign", tiny_model)
    (tmp_path / "foreign" / "adapter_model.safetensors").rename(tmp_path / "foreign" / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors; pickled weights .* are never loaded"):
        load_start(tmp_path / "foreign")
