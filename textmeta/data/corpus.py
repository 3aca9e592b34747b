"""A corpus: labelled texts, whatever they were loaded from."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textmeta.data.labels import checked_texts, few, whole_number
from textmeta.errors import DataError, SettingsError
from textmeta.files import at_home

if TYPE_CHECKING:  # loading it takes half a second, which a classifier should not wait for
    import datasets

__all__ = ["Corpus", "CorpusSettings", "load_corpus"]

logger = logging.getLogger(__name__)

# File ending → builder of `datasets`.
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class CorpusSettings:
    """Where a corpus comes from.

    Args:
        dataset: id of a Hub dataset, or path of a local JSON, JSON Lines, CSV, TSV (quoted as CSV is) or Parquet file.
            Cells may be separated by a semicolon, too.
        config: configuration (subset) of a Hub dataset, where it has several.
        split: split of a Hub dataset; ``train+test`` joins two.
        revision: branch, tag or commit of a Hub dataset.
        rows: at most so many first rows; of a Hub dataset no more are downloaded.
        text_column: column that holds the texts.
        label_column: column that holds the labels (strings, integers, or a ``ClassLabel`` feature).
        name: what records and tables call it; by default the id or the file's name.
        license: of the texts, for model cards; by default what the Hub says of a dataset.
        splits: JSON file with its class split; without one, the split is drawn.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    rows: int | None = None
    text_column: str = "text"
    label_column: str = "label"
    name: str | None = None
    license: str | None = None
    splits: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rows is not None:
            whole_number("rows", self.rows, 1)
        if self.text_column == self.label_column:
            raise SettingsError(f"text_column and label_column are the same: {self.text_column!r}")

    @property
    def is_file(self) -> bool:
        """Whether ``dataset`` names a local file."""
        return Path(self.dataset).suffix.lower() in FILE_BUILDERS

    @property
    def display_name(self) -> str:
        """The corpus's name in records and tables."""
        return self.name or (Path(self.dataset).stem if self.is_file else self.dataset)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Labelled texts; DataError, naming the row, if one is missing, empty or no string, or a label is out of range."""

    name: str  # what records and tables call it
    texts: Sequence[str]
    labels: np.ndarray  # (n,) int64, index into class_names
    class_names: tuple[str, ...]  # unique
    # its settings but for defaults and this machine's folders; of a Hub dataset its commit, and its licence where known
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every row once, so that nothing downstream has to."""
        where, names = f"corpus {self.name!r}", self.class_names
        if not self.texts:
            raise DataError(f"{where} is empty: 0 rows, expected at least 1")
        if len(self.texts) != len(self.labels):
            raise DataError(f"{where}: {len(self.texts)} texts but {len(self.labels)} labels")
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise DataError(f"{where}: class names given more than once: {twice}")
        checked_texts(self.texts, where)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(names)))
        if outside.size:
            told = f"label is {self.labels[outside[0]]}, expected 0 to {len(names) - 1} ({outside.size} such rows)"
            raise DataError(f"{where}, row {outside[0]}: {told}")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.texts)

    @cached_property
    def _rows_by_class(self) -> list[np.ndarray]:
        rows: list[list[int]] = [[] for _ in self.class_names]
        seen: set[tuple[int, str]] = set()
        for row, key in enumerate(zip(self.labels.tolist(), self.texts, strict=True)):
            if key not in seen:
                seen.add(key)
                rows[key[0]].append(row)
        return [np.array(part, dtype=np.int64) for part in rows]

    @cached_property
    def sha256(self) -> str:
        """Hash of all texts, labels and class names: two corpora with the same hash give the same episodes."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        digest.update(np.asarray(self.labels, dtype="<i8").tobytes())
        for text in self.texts:
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()

    @property
    def summary(self) -> dict[str, Any]:
        """What records say of it, without a text or a label."""
        return {"name": self.name, "texts": len(self), "classes": len(self.class_names), "sha256": self.sha256}

    def rows_of(self, class_index: int) -> np.ndarray:
        """Return the rows of a class, ascending, int64; of rows with equal texts the first, lest one be drawn twice."""
        return self._rows_by_class[class_index]

    def restrict(self, class_names: Iterable[str]) -> "Corpus":
        """Return the corpus of these classes alone, in the order given, without rows of equal text.

        DataError if a class is not in the corpus, or none is given.
        """
        wanted = tuple(class_names)
        if not wanted:
            raise DataError(f"corpus {self.name!r}: no classes to restrict it to; is a part of the class split empty?")
        index = {name: i for i, name in enumerate(self.class_names)}
        missing = [name for name in wanted if name not in index]
        if missing:
            told = f"({len(missing)} of the {len(wanted)} asked for are missing); it has {len(index)}: {few([*index])}"
            raise DataError(f"corpus {self.name!r} has no class {missing[0]!r} {told}")
        rows = [self.rows_of(index[name]) for name in wanted]
        labels = np.repeat(np.arange(len(wanted)), [len(r) for r in rows])
        return Corpus(self.name, [self.texts[row] for part in rows for row in part], labels, wanted, self.source)

    @classmethod
    def from_pairs(cls, name: str, texts: Sequence[str], labels: Sequence[str]) -> "Corpus":
        """Make a corpus of texts and label names, of which the classes are sorted; DataError if one is no string."""
        for row, label in enumerate(labels):
            if not isinstance(label, str):
                raise DataError(f"corpus {name!r}, row {row}: label is {label!r:.60}, expected a string")
        class_names = tuple(sorted(set(labels)))
        index = {label: i for i, label in enumerate(class_names)}
        return cls(name, texts, np.array([index[label] for label in labels], dtype=np.int64), class_names)

    @classmethod
    def from_dataset(
        cls, dataset: "datasets.Dataset", *, name: str, text_column: str = "text", label_column: str = "label"
    ) -> "Corpus":
        """Make a corpus of a ``datasets.Dataset`` in hand.

        ``ClassLabel`` features give the class names; strings are kept as they are; other integers become strings.
        DataError for a missing column, null or non-string text, or a label that is null or no string or integer.
        """
        for role, column in (("text_column", text_column), ("label_column", label_column)):
            if column not in dataset.column_names:
                told = f"has no column {column!r} ({role}); its columns are {dataset.column_names}"
                raise DataError(f"corpus {name!r} {told}")
        texts = checked_texts(dataset[text_column][:], f"corpus {name!r}, column {text_column!r}")
        labels = dataset[label_column][:]  # at once: row by row takes many times as long
        class_names = getattr(dataset.features[label_column], "names", None)  # of a ClassLabel
        for row, label in enumerate(labels):
            # bool is an int to Python, but a column of flags is hardly ever meant as classes' numbers
            if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
                given = "null" if label is None else f"{type(label).__name__} {label!r}"
                told = f"label in column {label_column!r} is {given}, expected a string or an integer; none is empty"
                raise DataError(f"corpus {name!r}, row {row}: {told}")
        if class_names is not None:
            return cls(name, texts, np.asarray(labels, dtype=np.int64), tuple(class_names))
        return cls.from_pairs(name, texts, [str(label) for label in labels])


def load_corpus(settings: CorpusSettings | str) -> Corpus:
    """Load a corpus from a local file or from the Hub; a string names the dataset alone.

    DataError if it cannot be read, is empty, lacks a column, or has a row that cannot be used.
    """
    from textmeta.data.sources import read_file, read_hub  # noqa: PLC0415 - they load `datasets`

    settings = CorpusSettings(settings) if isinstance(settings, str) else settings
    dataset, found = (read_file(settings), {}) if settings.is_file else read_hub(settings)
    corpus = Corpus.from_dataset(
        dataset.select(range(min(len(dataset), settings.rows or len(dataset)))),
        name=settings.display_name,
        text_column=settings.text_column,
        label_column=settings.label_column,
    )
    if settings.rows is not None:  # the first rows of a sorted dataset have few of its classes
        names = corpus.class_names
        present = [name for number, name in enumerate(names) if len(corpus.rows_of(number))]
        if len(present) < len(names):
            said = "corpus %s: the first %d rows have %d of its %d classes"
            logger.warning(said, corpus.name, settings.rows, len(present), len(names))
            corpus = corpus.restrict(present)
    logger.info("corpus %s: %d texts, %d classes", corpus.name, len(corpus), len(corpus.class_names))
    # the settings that are not the defaults, without this machine's folders
    defaults = asdict(CorpusSettings(""))
    source = {key: value for key, value in asdict(settings).items() if value != defaults[key]}
    for key in ("dataset", "splits") if settings.is_file else ("splits",):
        path = Path(at_home(source.get(key, "")))
        if path.is_absolute() or ".." in path.parts:
            source[key] = path.name
    return replace(corpus, source={**found, **source})
