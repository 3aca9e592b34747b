"""The ecosystem's formats: plain PEFT both ways, transformers, sentence-transformers."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
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

from tests.conftest import save_tiny_model
from tests.hub.server import TOKEN, HubServer
from tests.sharing.made import fit, make_adapter
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError
from textmeta.heads.pooling import pool
from textmeta.meta.adapter import Adapter
from textmeta.sharing.peft import write_merged
from textmeta.sharing.push import Destination, push_adapter
from textmeta.sharing.store import load_start, save_adapter

TEXTS = ["bal bel", "fim fon gur dal kes", "bal", "kut kut dal fim bel bol bun bam ban"]


def mean_features(model: torch.nn.Module, name: str) -> Tensor:
    """What a user makes of a transformers or PEFT model by hand: normalised means over the tokens."""
    batch = AutoTokenizer.from_pretrained(name)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def our_features(reader: TokenStateReader, factors: dict[str, Tensor]) -> Tensor:
    """What the encoder with these factors makes of the texts in its last layer, mean pooled."""
    with torch.no_grad():
        return pool(reader.read(TEXTS, factors), torch.zeros(reader.views, reader.encoder.hidden_size))[:, -1]


def test_peft_and_transformers_make_the_features_of_the_adapter(
    reader: TokenStateReader, adapter: Adapter, saved: Path, tiny_model: str
) -> None:
    expected = our_features(reader, adapter.initialisation.lora)
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model), saved)
    torch.testing.assert_close(mean_features(by_peft, tiny_model), expected, rtol=0, atol=1e-5)
    by_transformers = AutoModel.from_pretrained(saved)
    torch.testing.assert_close(mean_features(by_transformers, tiny_model), expected, rtol=0, atol=1e-5)
    plain = mean_features(AutoModel.from_pretrained(tiny_model), tiny_model)
    assert not torch.allclose(plain, expected, atol=1e-2), "the factors matter"


def test_peft_and_transformers_load_it_from_the_hub(
    hub: HubServer, reader: TokenStateReader, adapter: Adapter, tiny_model: str
) -> None:
    hub.add_repo("lab/tiny", {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
    push_adapter(adapter, None, Destination("tester/adapter", token=TOKEN), base_model="lab/tiny")
    expected = our_features(reader, adapter.initialisation.lora)
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained("lab/tiny"), "tester/adapter")
    torch.testing.assert_close(mean_features(by_peft, "lab/tiny"), expected, rtol=0, atol=1e-5)
    by_transformers = AutoModel.from_pretrained("tester/adapter")
    torch.testing.assert_close(mean_features(by_transformers, "lab/tiny"), expected, rtol=0, atol=1e-5)


# Merged encoders


@pytest.mark.parametrize("fitted", [False, True], ids=["start", "fitted"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within sentence-transformers
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sentence_transformers_loads_the_merged_encoder(tiny_model: str, tmp_path: Path, fitted: bool) -> None:
    reader = TokenStateReader(Encoder(EncoderSettings(tiny_model, max_length=6), LoraSettings(rank=4)))
    adapter = make_adapter(reader, adapt="lora")
    factors = adapter.initialisation.lora
    if fitted:
        factors = {name: value[0] for name, value in fit(reader, adapter).task.factors.items()}
    expected = our_features(reader, factors)
    write_merged(tmp_path / "merged", reader, factors)
    found = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    unadapted = our_features(reader, {name: 0 * value for name, value in factors.items()})
    assert not np.allclose(found, unadapted.numpy(), atol=1e-2)
    assert torch.equal(our_features(reader, factors), expected), "the encoder in hand is as it was"
    assert not list((tmp_path / "merged").rglob("*.bin"))
    with pytest.raises(AdapterError, match="is there already, and is not empty"):
        write_merged(tmp_path / "merged", reader, factors)


def test_merge_that_cannot_be_written_says_so(reader: TokenStateReader, adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"cannot write a merged encoder to .*file/merged"):
        write_merged(tmp_path / "file" / "merged", reader, adapter.initialisation.lora)


# LoRA adapters that PEFT wrote, as a start


def foreign(
    folder: Path, model: str, change: Callable[[dict[str, Any]], object] = lambda _: None, **options: Any
) -> PeftModel:
    """Write what a user of PEFT has: LoRA on query and value of all layers, after some training."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **options})
    peft = get_peft_model(AutoModel.from_pretrained(model), config)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape)
    peft.save_pretrained(folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    change(content)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return peft


def features_of_start(folder: Path, model: str) -> Tensor:
    lora, tensors = load_start(folder, EncoderSettings(model))
    reader = TokenStateReader(Encoder(EncoderSettings(model), lora))
    return our_features(reader, {name.removeprefix("lora."): value for name, value in tensors.items()})


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"layers_to_transform": [2, 3]}, {"r": 2}], ids=str)
def test_foreign_adapter_makes_the_features_that_peft_makes(
    tiny_model: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    peft = foreign(tmp_path / "foreign", tiny_model, **options)
    expected = mean_features(peft, tiny_model)
    torch.testing.assert_close(features_of_start(tmp_path / "foreign", tiny_model), expected, rtol=0, atol=1e-5)


def test_names_of_layers_may_have_digits(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DistilBertConfig(vocab_size=160, dim=32, n_layers=3, n_heads=4, hidden_dim=64, initializer_range=0.2)
        name = save_tiny_model(tmp_path / "distil", DistilBertModel(config))
    peft = foreign(tmp_path / "foreign", name, target_modules=["q_lin", "v_lin", "lin1", "lin2"])
    expected = mean_features(peft, name)
    torch.testing.assert_close(features_of_start(tmp_path / "foreign", name), expected, rtol=0, atol=1e-5)


def test_head_beside_the_factors_is_left_out(tiny_model: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny_model), config)
    model.save_pretrained(tmp_path / "foreign")
    assert any("classifier" in name for name in load_file(tmp_path / "foreign" / "adapter_model.safetensors"))
    lora, tensors = load_start(tmp_path / "foreign", EncoderSettings(tiny_model))
    shapes = Encoder(EncoderSettings(tiny_model), lora).factor_shapes
    assert {name.removeprefix("lora.") for name in tensors} == set(shapes)


def test_half_precision_factors_are_taken(tiny_model: str, tmp_path: Path) -> None:
    foreign(tmp_path / "foreign", tiny_model)
    path = tmp_path / "foreign" / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    _, tensors = load_start(tmp_path / "foreign", EncoderSettings(tiny_model))
    assert all(value.dtype == torch.float32 for value in tensors.values())


def test_a_start_of_our_own_has_all_tensors_and_is_known_by_the_weights_of_its_encoder(
    saved: Path, adapter: Adapter, tiny_model: str, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(tiny_model, tmp_path / "copied"))
    lora, tensors = load_start(saved, EncoderSettings(str(copied)))
    expected = adapter.initialisation.tensors()
    assert lora == adapter.lora
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    changed = {name: value + 1 for name, value in load_file(copied / "model.safetensors").items()}
    save_file(changed, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"was trained on .* with weights .*, but those of .*copied' are"):
        load_start(saved, EncoderSettings(str(copied)))


def test_a_start_of_another_encoder_is_refused(hub: HubServer, tiny_model: str, tmp_path: Path) -> None:
    hub.add_repo("lab/other", {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
    foreign(tmp_path / "foreign", tiny_model)
    with pytest.raises(AdapterError, match=re.escape(f"was trained on {tiny_model!r}, not on 'lab/other'")):
        load_start(tmp_path / "foreign", EncoderSettings("lab/other"))


def test_factors_of_lower_layers_alone_are_refused(tiny_model: str, tmp_path: Path) -> None:
    foreign(tmp_path / "foreign", tiny_model, layers_to_transform=[0, 1])
    with pytest.raises(AdapterError, match=r"expected a factor encoder\.layer\.2.*textmeta adapts the upper layers"):
        load_start(tmp_path / "foreign", EncoderSettings(tiny_model))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, r"config\.json: 'use_dora' is True"),
        ({"bias": "lora_only"}, r"config\.json: 'bias' is 'lora_only'"),
        ({"rank_pattern": {"layer.3.attention.self.query": 2}}, r"config\.json: 'rank_pattern'"),
        ({"alpha_pattern": {"query": 2}}, r"config\.json: 'alpha_pattern'"),
        ({"init_lora_weights": "pissa"}, r"config\.json: init_lora_weights is 'pissa', which changes the encoder"),
        ({"target_modules": ["query", "word_embeddings"]}, "word_embeddings.lora_embedding_.* is no LoRA factor"),
        ({"modules_to_save": ["LayerNorm"]}, r"model\.safetensors: .*LayerNorm.* is no LoRA factor of a layer"),
    ],
    ids=["dora", "bias", "ranks", "alphas", "pissa", "embeddings", "trained modules"],
)
def test_what_our_lora_does_not_know_is_refused(
    tiny_model: str, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    foreign(tmp_path / "foreign", tiny_model, **options)
    with pytest.raises(AdapterError, match=reason):
        load_start(tmp_path / "foreign", EncoderSettings(tiny_model))


@pytest.mark.parametrize(
    "change",
    [{"r": 0}, {"r": True}, {"r": 10**9}, {"lora_alpha": 10**400}, {"lora_alpha": 1e308}, {"peft_type": "IA3"}],
    ids=lambda change: f"{change!s:.30}",
)
def test_numbers_and_kinds_that_make_no_sense_are_refused(
    tiny_model: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    foreign(tmp_path / "foreign", tiny_model, lambda config: config.update(change))
    with pytest.raises(AdapterError, match=rf"adapter_(config\.json|model\.safetensors): .*{next(iter(change))}"):
        load_start(tmp_path / "foreign", EncoderSettings(tiny_model))


def test_pickled_factors_are_refused(tiny_model: str, tmp_path: Path) -> None:
    foreign(tmp_path / "foreign", tiny_model)
    (tmp_path / "foreign" / "adapter_model.safetensors").rename(tmp_path / "foreign" / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors; pickled weights .* are never loaded"):
        load_start(tmp_path / "foreign", EncoderSettings(tiny_model))


def test_saved_adapter_without_its_manifest_is_a_plain_one(folder: Path, adapter: Adapter, tiny_model: str) -> None:
    save_adapter(folder, replace(adapter, index=None))
    (folder / "SHA256SUMS").unlink()
    _, tensors = load_start(folder, EncoderSettings(tiny_model))
    assert {f"lora.{name}" for name in adapter.initialisation.lora} == tensors.keys()
