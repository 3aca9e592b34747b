"""Shared fixtures: a tiny random encoder with a tokenizer of its own, and a corpus in its words."""

import importlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

# before any library reads them: no test may reach a network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"  # the Hub of the tests has it not
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="textmeta-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.given import LABELS, SUPPORT, Patch, adapter_of, doubled
from tests.hub.fixture import hub  # noqa: F401 - a fixture
from textmeta import Adapter, Corpus, EpisodeSampler, EpisodeSettings, FewShotClassifier, estimator
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings

torch.set_num_threads(1)  # the tiny encoder has no work for two
estimator.best_precision = lambda device: "no"  # on every machine

CLASSES = [f"class{c}" for c in range(12)]
WORDS = ["".join(letters) for letters in itertools.product("bdfgk", "aeiou", "lmnrst")][:144]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def save_tiny_model(folder: Path, model: torch.nn.Module) -> str:
    """Save a model with the tiny tokenizer as a folder that transformers loads."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT with 4 layers and random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=160,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=512,
            initializer_range=0.2,  # large enough for texts to differ
        )
        return save_tiny_model(tmp_path_factory.mktemp("tiny-bert"), BertModel(config, add_pooling_layer=False))


@pytest.fixture
def encoder(tiny_model: str) -> Encoder:
    """A fresh encoder, LoRA of rank 4 on the upper two layers."""
    return Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4))


@pytest.fixture
def encoder64(encoder: Encoder) -> Encoder:
    """The same in float64, for checks of gradients."""
    return doubled(encoder)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """12 classes of 16 texts; a text has two words of its class's twelve among other words, 3 to 14 in all."""
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for number, name in enumerate(CLASSES):
        own = WORDS[12 * number : 12 * number + 12]
        for _ in range(16):
            words = [*rng.choice(own, 2), *rng.choice(WORDS, rng.integers(1, 13))]
            texts.append(" ".join(rng.permutation(words)))
            labels.append(name)
    return Corpus.from_pairs("toy", texts, labels)


@pytest.fixture
def sampler(corpus: Corpus) -> EpisodeSampler:
    """3-way 3-shot episodes of the toy corpus."""
    return EpisodeSampler(corpus, EpisodeSettings(3, 3, 4), seed=0)


@pytest.fixture(scope="session")
def adapter(tiny_model: str) -> Adapter:
    """An adapter of the tiny encoder, as meta-training leaves one."""
    return adapter_of(tiny_model)


@pytest.fixture(scope="session")
def shared(adapter: Adapter) -> FewShotClassifier:
    """A classifier that has loaded its encoder."""
    return FewShotClassifier(adapter).fit(SUPPORT, LABELS)


@pytest.fixture
def classifier(shared: FewShotClassifier) -> FewShotClassifier:
    """One that is not fitted, with the encoder of the shared one."""
    return FewShotClassifier(shared.adapter)


@pytest.fixture
def fitted(classifier: FewShotClassifier) -> FewShotClassifier:
    return classifier.fit(SUPPORT, LABELS)


@pytest.fixture(scope="session")
def plain() -> Corpus:
    """5 classes of 24 texts, each of words from its class's own three: random weights are enough to tell them apart."""
    rng = np.random.default_rng(0)
    own = {letter: [letter + ending for ending in ("al", "er", "os")] for letter in "bdfgk"}
    labels = [letter for letter in own for _ in range(24)]
    texts = [" ".join(rng.choice(own[label], rng.integers(3, 9))) for label in labels]
    return Corpus.from_pairs("plain", texts, labels)


def write_rows(path: Path, corpus: Corpus, names: Sequence[str] | None = None) -> Path:
    """Write a corpus as JSON Lines, into a folder that is made; its classes may have other names."""
    names = names or corpus.class_names
    rows = [{"text": t, "label": names[c]} for t, c in zip(corpus.texts, corpus.labels, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def benchmark(monkeypatch: Patch) -> Callable[[str], ModuleType]:
    """Import a benchmark by its name, as it finds others when it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def run_script(monkeypatch: Patch) -> Callable[..., None]:
    """Run the main function of a recipe or a benchmark that is imported, as a command line with arguments would."""

    def run(module: ModuleType, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(module.__file__), *map(str, arguments)])
        module.main()

    return run
