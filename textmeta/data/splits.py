"""Class splits: which classes are for training, for choosing, and for reporting."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from textmeta.data.corpus import Corpus, Source, each_source, load_corpus
from textmeta.data.labels import few
from textmeta.errors import DataError, logger
from textmeta.files import at_home, read_json

PARTS = ("train", "valid", "test")
MIN_CLASSES = 8  # from which on every part of a drawn split has the two classes that an episode needs


@dataclass(frozen=True)
class ClassSplit:
    """Disjoint lists of class names; DataError if a class stands in two parts, or twice in one."""

    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        for name, times in Counter(self.train + self.valid + self.test).items():
            if times > 1:
                parts = " and ".join(part for part in PARTS if name in getattr(self, part))
                raise DataError(f"class split: class {name!r} is given {times} times, in {parts}; expected once")


def load_parts(sources: Source | Iterable[Source], fold: str | None = None, texts: int = 10) -> dict[str, list[Corpus]]:
    """Load corpora and split each by class, from its file of splits or drawn: one corpus a source in each part.

    Where these files have several splits, ``fold`` says which. Only classes of so many different ``texts`` are held out
    (to choose or to test by); one of several corpora that has too few of them is for training, whole, and a line says
    so. DataError if a corpus cannot be loaded, or none can be split.
    """
    parts: dict[str, list[Corpus]] = {part: [] for part in PARTS}
    whole = []
    for source in each_source(sources):
        corpus = load_corpus(source)
        sizes = {name: len(corpus.rows_of(number)) for number, name in enumerate(corpus.class_names)}
        large = [name for name, size in sizes.items() if size >= texts]
        if source.splits is not None:
            split = read_class_split(source.splits, fold)
            corpus = replace(corpus, source={**corpus.source, **({"fold": fold} if fold else {})})
            short = [name for name in split.valid + split.test if sizes.get(name, texts) < texts]
            if short:
                raise DataError(f"{source.dataset}: fewer than {texts} texts of {few(short)}, which are held out")
        elif len(large) < MIN_CLASSES:
            whole.append(f"{corpus.name} ({len(large)} of its {len(sizes)} classes)")
            parts["train"].append(corpus)
            continue
        else:
            split = draw_class_split(sizes)
            if not {*split.valid, *split.test} <= {*large}:  # drawn anew, of those that can be held out
                split = draw_class_split(large)
                split = replace(split, train=split.train + tuple(name for name in sizes if name not in large))
        for part, corpora in parts.items():
            corpora.append(corpus.restrict(getattr(split, part)))
    if whole:
        told = f"fewer than {MIN_CLASSES} classes of {texts} different texts: {', '.join(whole):.500}"
        if not parts["valid"]:
            trained = "`--hold_out false` trains on all classes, and tests nothing"
            raise DataError(f"no class can be held out where there are {told}; {trained}")
        logger.info("%d of %d corpora are trained on whole, with %s", len(whole), len(parts["train"]), told)
    return parts


def read_class_split(path: str | Path, fold: str | None = None) -> ClassSplit:
    """Read a class split from JSON: ``{"train": [...], "valid": [...], "test": [...]}``, or one such object a fold.

    DataError if the file cannot be read, has no such fold (as ``"01"``) or part, or the parts overlap.
    """
    path = at_home(Path(path))
    try:
        content = read_json(path.read_bytes(), path, DataError)
    except OSError as error:
        raise DataError(f"cannot read class splits from {path}: {error}") from error
    folds: dict[Any, Any] = {None: content} if content.keys() >= set(PARTS) else content
    if fold not in folds:
        raise DataError(f"{path} has no fold {fold!r}, but {'one split' if None in folds else sorted(content)}")
    parts = folds[fold]
    for part in PARTS:
        names = parts.get(part) if isinstance(parts, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path}, fold {fold}: {part!r} must be a list of class names, found {names!r:.80}")
    return ClassSplit(*(tuple(parts[part]) for part in PARTS))


def draw_class_split(class_names: Iterable[str], seed: int = 0) -> ClassSplit:
    """Draw a class split: half of the classes to train on, a quarter to choose by, a quarter to test on, in any order.

    DataError if there are fewer than 8, for episodes need two of each part.
    """
    names = sorted(class_names)
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    if len(names) < MIN_CLASSES:
        raise DataError(f"{len(names)} classes are too few to draw a class split of; expected at least {MIN_CLASSES}")
    first, second = round(0.5 * len(names)), round(0.75 * len(names))
    return ClassSplit(tuple(shuffled[:first]), tuple(shuffled[first:second]), tuple(shuffled[second:]))
