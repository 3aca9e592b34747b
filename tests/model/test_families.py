"""Every family of encoders: cached prefix, per-task factors and second order, on tiny random models."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    EuroBertConfig,
    MegatronBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from tests.conftest import WORDS, save_tiny_model
from tests.meta.test_adaptation import INNER, moved_parameters, named
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.errors import EncoderError
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import (
    EVIDENCE_SLOPES,
    LORA,
    STRENGTH_PRIOR,
    TEMPERATURE_SLOPES,
    lora_factors,
)
from textmeta.model.lora import LoraSettings

SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "xlm-roberta": XLMRobertaConfig(**SIZES),
    "distilbert": DistilBertConfig(
        vocab_size=160, dim=32, n_layers=4, n_heads=4, hidden_dim=64, max_position_embeddings=64, initializer_range=0.2
    ),
    "mpnet": MPNetConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=32),
    "electra-small": ElectraConfig(**SIZES, embedding_size=16),  # embeddings narrower than the layers
    "deberta-v2": DebertaV2Config(**SIZES, **RELATIVE, type_vocab_size=0),
    "deberta-v3": DebertaV2Config(
        **SIZES,
        **RELATIVE,
        type_vocab_size=0,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    "modernbert": ModernBertConfig(
        **SIZES, global_attn_every_n_layers=3, local_attention=8, cls_token_id=2, sep_token_id=3
    ),
}
TEXTS = [" ".join(WORDS[start : start + 1 + start % 20]) for start in range(40)]
PLAN = MetaGradientSettings()
SMOOTH = replace(INNER, lora_epsilon=1e-2, offset_epsilon=1e-2)  # smooth on the scale of a finite difference
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save_tiny_model(tmp_path, AutoModel.from_config(FAMILIES[family]))


@pytest.fixture
def family_encoder(folder: str, caplog: pytest.LogCaptureFixture) -> Encoder:
    with caplog.at_level(logging.WARNING):
        encoder = Encoder(EncoderSettings(folder, max_length=32), LoraSettings(layers=2, rank=4))
    assert "cannot be split" not in caplog.text
    return encoder


@each_family
def test_cached_states_give_the_features_of_the_whole_model(family: str, folder: str, family_encoder: Encoder) -> None:
    """Against PEFT's own model, all layers, one text at a time."""
    assert family_encoder._prefix is not None
    parameters = moved_parameters(family_encoder)
    features = family_encoder.features(family_encoder.prepare(TEXTS), lora_factors(parameters))
    whole = get_peft_model(AutoModel.from_pretrained(folder, dtype=torch.float32), family_encoder.peft_config).eval()
    loaded = 0
    for name, value in whole.named_parameters():
        key = LORA + name.removeprefix("base_model.model.").replace(".default", "")
        if key in parameters:
            value.data = parameters[key].clone()
            loaded += 1
    assert loaded == len(family_encoder.factor_shapes)
    for text, feature in zip(TEXTS, features, strict=True):
        ids = torch.tensor([family_encoder.tokenizer(text, truncation=True, max_length=32)["input_ids"]])
        with torch.no_grad():
            pooled = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0)
        torch.testing.assert_close(feature, pooled / pooled.norm(), rtol=1e-4, atol=1e-5)


@each_family
def test_tasks_carry_factors_of_their_own(family: str, family_encoder: Encoder) -> None:
    one, two = (lora_factors(moved_parameters(family_encoder)) for _ in range(2))
    two = {name: value * 1.5 for name, value in two.items()}
    prepared, row_task = family_encoder.prepare(TEXTS), torch.arange(len(TEXTS)) % 2
    both = family_encoder.features(prepared, {n: torch.stack([one[n], two[n]]) for n in one}, row_task)
    alone = [family_encoder.features(prepared, factors) for factors in (one, two)]
    torch.testing.assert_close(both, torch.where(row_task[:, None] == 0, *alone), rtol=1e-4, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.01


@each_family
def test_second_order_gradients_are_exact(family: str, family_encoder: Encoder, corpus: Corpus) -> None:
    """Along the gradient of all LoRA factors together, against a central difference in float64."""
    family_encoder._prefix.double()  # type: ignore[union-attr]
    family_encoder._suffix.double()
    episodes = EpisodeSampler(corpus, EpisodeSettings(2, 2, 2), seed=0).take(1)
    parameters = {name: value.double() for name, value in moved_parameters(family_encoder).items()}

    def loss(scale: float, along: dict[str, torch.Tensor]) -> float:
        moved = {name: value + scale * along.get(name, 0.0) for name, value in parameters.items()}
        return float(ALGORITHMS["maml"].gradient(family_encoder, moved, episodes, SMOOTH, PLAN).loss)

    found = ALGORITHMS["maml"].gradient(family_encoder, parameters, episodes, SMOOTH, PLAN).gradient
    along = {name: value for name, value in found.items() if name.startswith(LORA)}
    norm = torch.cat([value.flatten() for value in along.values()]).norm()
    along = {name: value / norm for name, value in along.items()}
    # ModernBERT rotates queries and keys in float32, whatever the rest is in
    h, tolerance = (1e-5, 2e-3) if family == "modernbert" else (1e-6, 1e-4)
    slope = (loss(h, along) - loss(-h, along)) / (2 * h)
    assert abs(slope - float(norm)) < tolerance * float(norm)
    first_order = ALGORITHMS["fomaml"].gradient(family_encoder, parameters, episodes, SMOOTH, PLAN).gradient
    assert abs(slope - sum(float((first_order[name] * value).sum()) for name, value in along.items())) > 0.01 * slope


def test_another_family_runs_unsplit_with_a_warning(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MegatronBERT has a layer norm inside its encoder, after the layers, that both halves would run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = save_tiny_model(tmp_path, AutoModel.from_config(MegatronBertConfig(**SIZES)))
    with pytest.raises(EncoderError, match=r"set lora targets to endings of these: encoder\.layer\.2"):
        Encoder(EncoderSettings(folder, max_length=32), LoraSettings(layers=2))
    with caplog.at_level(logging.WARNING):
        encoder = Encoder(EncoderSettings(folder, max_length=32), LoraSettings(layers=2, targets=("query", "value")))
    assert "MegatronBertModel cannot be split" in caplog.text
    assert encoder._prefix is None
    episodes = [named(e) for e in EpisodeSampler(corpus, EpisodeSettings(2, 2, 2), seed=0).take(2)]
    parameters = moved_parameters(encoder)
    found = ALGORITHMS["maml"].gradient(encoder, parameters, episodes, SMOOTH, PLAN).gradient
    assert all(value.isfinite().all() for value in found.values())
    assert {name for name, value in found.items() if not value.any()} == {
        TEMPERATURE_SLOPES,
        EVIDENCE_SLOPES,
        STRENGTH_PRIOR,
    }, "calibrated"


def test_heads_that_share_keys_and_values(corpus: Corpus, tmp_path: Path) -> None:
    """EuroBERT's grouped queries, in first and second order, against the eager attention of its own."""
    config = EuroBertConfig(**SIZES, num_key_value_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = save_tiny_model(tmp_path, AutoModel.from_config(config))
    encoder = Encoder(EncoderSettings(folder, max_length=32), LoraSettings(layers=2, targets=("q_proj", "v_proj")))
    episodes = EpisodeSampler(corpus, EpisodeSettings(2, 3, 2), seed=0).take(2)
    parameters = moved_parameters(encoder)
    found = {}
    for name in ("fomaml", "maml"):
        switched = ALGORITHMS[name].gradient(encoder, parameters, episodes, SMOOTH, PLAN).gradient
        encoder._suffix.set_attn_implementation("eager")  # type: ignore[operator]
        eager = ALGORITHMS[name].gradient(encoder, parameters, episodes, SMOOTH, PLAN).gradient
        encoder._suffix.set_attn_implementation("textmeta_switched")  # type: ignore[operator]
        for key, value in switched.items():
            torch.testing.assert_close(value, eager[key], rtol=1e-3, atol=1e-3 * float(value.abs().max()))
        found[name] = switched
    assert not torch.allclose(found["fomaml"]["log_temperature"], found["maml"]["log_temperature"])
