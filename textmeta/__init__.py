"""Few-shot text classification: a frozen encoder, a meta-learned LoRA initialisation, a few gradient steps."""

from importlib.metadata import version

from textmeta.classifier import FewShotClassifier
from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.errors import TextMetaError

__all__ = [
    "Corpus",
    "CorpusSettings",
    "Episode",
    "EpisodeSampler",
    "EpisodeSettings",
    "FewShotClassifier",
    "TextMetaError",
    "load_corpus",
]
__version__ = version("textmeta")
