"""A corpus: labelled texts, whatever they were loaded from."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textmeta.data.labels import checked_texts, column, few, whole_number
from textmeta.data.texts import ENDINGS, open_texts
from textmeta.errors import DataError, SettingsError, logger
from textmeta.files import at_home, is_folder

if TYPE_CHECKING:  # loading it takes half a second, which a classifier should not wait for
    import datasets

FILES = (*ENDINGS, ".parquet")  # endings of what is read


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
        if self.rows is not None:
            whole_number("rows", self.rows, 1)
        if self.text_column == self.label_column:
            raise SettingsError(f"text_column and label_column are the same: {self.text_column!r}")

    @property
    def is_file(self) -> bool:
        """Whether ``dataset`` names a local file."""
        return Path(self.dataset).suffix.lower() in FILES

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
    def from_pairs(cls, name: str, texts: Any, labels: Any) -> "Corpus":
        """Make a corpus of texts and labels, each a list, an array, a series, or a column of a data frame or a table.

        Labels are strings, or whole numbers, which become strings; the classes are sorted. DataError, naming the row,
        for a text that is missing, empty or no string, and a label that is missing, empty or neither.
        """
        named = []
        for row, given in enumerate(column(labels, f"corpus {name!r}", "labels")):
            label = given.item() if getattr(given, "ndim", None) == 0 else given
            # bool is an int to Python, but a column of flags is hardly ever meant as classes' numbers
            if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
                shown = "null" if label is None else f"{type(label).__name__} {label!r:.60}"
                told = f"label is {shown}, expected a string or a whole number; none is empty"
                raise DataError(f"corpus {name!r}, row {row}: {told}")
            named.append(str(label))
        class_names = tuple(sorted(set(named)))
        index = {label: i for i, label in enumerate(class_names)}
        read = list(column(texts, f"corpus {name!r}", "texts"))
        return cls(name, read, np.array([index[label] for label in named], dtype=np.int64), class_names)

    @classmethod
    def from_dataset(
        cls, dataset: "datasets.Dataset", *, name: str, text_column: str = "text", label_column: str = "label"
    ) -> "Corpus":
        """Make a corpus of a ``datasets.Dataset`` in hand: :meth:`from_pairs` of two of its columns.

        A ``ClassLabel`` feature gives the class names. DataError for a missing column, too.
        """
        for role, own in (("text_column", text_column), ("label_column", label_column)):
            if own not in dataset.column_names:
                told = f"has no column {own!r} ({role}); its columns are {dataset.column_names}"
                raise DataError(f"corpus {name!r} {told}")
        # at once: row by row takes many times as long
        texts, labels = dataset[text_column][:], dataset[label_column][:]
        class_names = getattr(dataset.features[label_column], "names", None)  # of a ClassLabel
        if class_names is None or None in labels:
            return cls.from_pairs(name, texts, labels)
        return cls(name, texts, np.asarray(labels, dtype=np.int64), tuple(class_names))


Source = str | Path | CorpusSettings  # of one corpus or, a folder, of several


def load_corpora(sources: Source | Iterable[Source]) -> list[Corpus]:
    """Load one or several corpora: ids of the Hub, files, and folders, of which each data file is a corpus.

    What else is in a folder, as further folders, is left, and a warning names it. DataError as of :func:`load_corpus`,
    or if a folder has no data file.
    """
    return list(map(load_corpus, each_source(sources)))


def each_source(sources: Source | Iterable[Source]) -> Iterator[CorpusSettings]:
    """Yield the settings of every corpus, those of a folder in the order of its files' names."""
    for source in [sources] if isinstance(sources, Source) else sources:
        settings = source if isinstance(source, CorpusSettings) else CorpusSettings(str(source))
        folder = Path(at_home(settings.dataset))
        if not is_folder(folder):
            yield settings
            continue
        there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        files = [p for p in there if p.is_file() and p.suffix.lower() in FILES and not p.stem.endswith(".splits")]
        if not files:
            raise DataError(f"folder {folder} has no corpus: no file there ends in {', '.join(FILES)}")
        left = [path.name for path in there if path not in files]
        if left:
            logger.warning("folder %s: %d corpora; not read: %s", folder, len(files), few(left))
        yield from (replace(settings, dataset=str(path)) for path in files)


def load_corpus(settings: CorpusSettings | str) -> Corpus:
    """Load a corpus from a local file or from the Hub; a string names the dataset alone.

    DataError, naming the file, if it cannot be read, is empty, lacks a column, or has a row that cannot be used.
    """
    settings = CorpusSettings(settings) if isinstance(settings, str) else settings
    found: dict[str, Any] = {}
    if settings.is_file:
        file = at_home(settings.dataset)
        if not Path(file).is_file():
            raise DataError(f"no such file: {file}")
        try:
            corpus = _read_file(file, settings)
        except (DataError, OSError) as error:
            raise DataError(str(error) if str(error).startswith(file) else f"{file}: {error}") from error
    else:
        from textmeta.data.sources import read_hub  # noqa: PLC0415 - it loads `datasets`

        dataset, found = read_hub(settings)
        corpus = _of_dataset(dataset, settings)
    if settings.rows is not None:  # the first rows of a sorted dataset have few of its classes
        names = corpus.class_names
        present = [name for number, name in enumerate(names) if len(corpus.rows_of(number))]
        if len(present) < len(names):
            said = "corpus %s: the first %d rows have %d of its %d classes"
            logger.warning(said, corpus.name, settings.rows, len(present), len(names))
            corpus = corpus.restrict(present)
    # the settings that are not the defaults, without this machine's folders
    defaults = asdict(CorpusSettings(""))
    source = {key: value for key, value in asdict(settings).items() if value != defaults[key]}
    for key in ("dataset", "splits") if settings.is_file else ("splits",):
        path = Path(at_home(source.get(key, "")))
        if path.is_absolute() or ".." in path.parts:
            source[key] = path.name
    return replace(corpus, source={**found, **source})


def _read_file(path: str, settings: CorpusSettings) -> Corpus:
    """Read a JSON, JSON Lines, CSV, TSV or Parquet file, by its ending."""
    if path.lower().endswith(".parquet"):
        from textmeta.data.sources import read_parquet  # noqa: PLC0415 - as above

        return _of_dataset(read_parquet(path), settings)
    text, label = settings.text_column, settings.label_column
    with open_texts(path, column=text, label_column=label) as (_, rows):
        pairs = [(row[text], row[label]) for row in itertools.islice(rows, settings.rows)]
    return Corpus.from_pairs(settings.display_name, *([pair[i] for pair in pairs] for i in (0, 1)))


def _of_dataset(dataset: "datasets.Dataset", settings: CorpusSettings) -> Corpus:
    first = dataset.select(range(min(len(dataset), settings.rows or len(dataset))))
    columns = {name: getattr(settings, name) for name in ("text_column", "label_column")}
    return Corpus.from_dataset(first, name=settings.display_name, **columns)
