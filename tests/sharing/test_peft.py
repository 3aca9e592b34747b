"""The ecosystem's formats: plain PEFT both ways, transformers, sentence-transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from tests.given import LABELS, SUPPORT, adapter_of
from tests.hub.server import TOKEN, HubServer
from textmeta import Adapter, FewShotClassifier
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError
from textmeta.heads.pooling import pool
from textmeta.sharing.merged import write_merged
from textmeta.sharing.push import push_adapter

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


@pytest.mark.parametrize("way", ["folder", "hub"])
def test_peft_and_transformers_make_the_features_of_the_adapter(
    hub: HubServer, reader: TokenStateReader, adapter: Adapter, saved: Path, tiny_model: str, way: str
) -> None:
    encoder, name = tiny_model, str(saved)
    if way == "hub":
        encoder, name = "lab/tiny", "tester/adapter"
        hub.add_repo(encoder, {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
        push_adapter(adapter, None, name, token=TOKEN, base_model=encoder)
    expected = our_features(reader, adapter.initialisation.lora)
    for model in (PeftModel.from_pretrained(AutoModel.from_pretrained(encoder), name), AutoModel.from_pretrained(name)):
        torch.testing.assert_close(mean_features(model, encoder), expected, rtol=0, atol=1e-5)
    plain = mean_features(AutoModel.from_pretrained(encoder), encoder)
    assert not torch.allclose(plain, expected, atol=1e-2), "the factors matter"


@pytest.mark.parametrize("adapt", ["pooling", "lora"], ids=["shared", "own"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within sentence-transformers
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sentence_transformers_loads_the_merged_encoder(tiny_model: str, tmp_path: Path, adapt: Any) -> None:
    one = FewShotClassifier(adapter_of(tiny_model, adapt=adapt), max_length=6).fit(SUPPORT, LABELS)
    factors = {name: value[0] for name, value in one._fitted.task.factors.items()} or one._adapter.initialisation.lora
    expected = our_features(one._learner.reader, factors)
    one.merge(tmp_path / "merged")
    found = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    unadapted = our_features(one._learner.reader, {name: 0 * value for name, value in factors.items()})
    assert not np.allclose(found, unadapted.numpy(), atol=1e-2)
    assert torch.equal(our_features(one._learner.reader, factors), expected), "the encoder in hand is as it was"
    assert not list((tmp_path / "merged").rglob("*.bin"))
    with pytest.raises(AdapterError, match="is there already, and is not empty"):
        one.merge(tmp_path / "merged")


def test_merge_that_cannot_be_written_says_so(reader: TokenStateReader, adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"cannot write a merged encoder to .*file/merged"):
        write_merged(tmp_path / "file" / "merged", reader, adapter.initialisation.lora)
