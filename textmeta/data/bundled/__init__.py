"""The corpus that comes with the package: everyday requests, written for it, in the public domain (CC0 1.0).

120 classes of 22 utterances in 15 domains; training, validation and test classes come from different domains.
"""

from dataclasses import replace
from importlib.resources import as_file, files

from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.splits import ClassSplit, read_class_split


def load_bundled() -> tuple[Corpus, ClassSplit]:
    """Return the bundled corpus and its class split by domain."""
    folder = files(__name__)
    with as_file(folder / "everyday.jsonl") as corpus, as_file(folder / "everyday.splits.json") as splits:
        # its origin is the package, which a recipe cannot name
        loaded = replace(load_corpus(CorpusSettings(str(corpus))), source={"license": "cc0-1.0"})
        return loaded, read_class_split(splits)
