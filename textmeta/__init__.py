"""Few-shot text classification with meta-learned adapters: learn a task from a handful of texts, in a moment.

The public names are loaded when they are first asked for, so that ``import textmeta`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textmeta.classifier import FewShotClassifier
    from textmeta.data.corpus import Corpus, CorpusSettings, load_corpora, load_corpus
    from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
    from textmeta.errors import TextMetaError
    from textmeta.many import predict_many
    from textmeta.meta.adapter import Adapter
    from textmeta.meta.trainer import MetaTrainer
    from textmeta.nearest import similarity

    __version__: str

__all__ = [
    "Adapter",
    "Corpus",
    "CorpusSettings",
    "Episode",
    "EpisodeSampler",
    "EpisodeSettings",
    "FewShotClassifier",
    "MetaTrainer",
    "TextMetaError",
    "__version__",
    "load_corpora",
    "load_corpus",
    "predict_many",
    "similarity",
]

_PUBLIC = {
    "classifier": ("FewShotClassifier",),
    "data.corpus": ("Corpus", "CorpusSettings", "load_corpora", "load_corpus"),
    "data.episodes": ("Episode", "EpisodeSampler", "EpisodeSettings"),
    "errors": ("TextMetaError",),
    "many": ("predict_many",),
    "meta.adapter": ("Adapter",),
    "meta.trainer": ("MetaTrainer",),
    "nearest": ("similarity",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name; the next time it is there already."""
    if name == "__version__":
        value = import_module("importlib.metadata").version("textmeta")
    elif name in _HOME:
        value = getattr(import_module(f"textmeta.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'textmeta' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
