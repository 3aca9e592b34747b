"""Where corpora come from: local files and datasets of the Hugging Face Hub, with errors that say what to do."""

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
from datasets.table import InMemoryTable
from huggingface_hub import HfApi, constants
from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

from textmeta.data.corpus import FILES, CorpusSettings
from textmeta.errors import DataError, HubError, HubUnreachableError, logger
from textmeta.files import at_home
from textmeta.hub import DEADLINE, clear_hub_errors
from textmeta.progress import progress_bar

*OTHERS, LAST = FILES
OTHER_ENDINGS = (".txt", ".xlsx", ".xls", ".ods", ".xml", ".gz", ".zip")  # of what people keep texts in, too
FOR_A_FILE = f". For a local file, give a path that ends in {', '.join(OTHERS)} or {LAST}"


def read_parquet(path: str) -> datasets.Dataset:
    """Read a Parquet file; DataError if it is none."""
    try:
        return datasets.Dataset(InMemoryTable(parquet.read_table(path)))
    except ArrowException as error:
        raise DataError(f"{type(error).__name__}: {error}") from error


def read_hub(settings: CorpusSettings) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Read a split of a dataset; return its rows, and commit and licence, as far as these are known.

    Of a Hub that does not answer, what `datasets` has in its cache. DataError: no such dataset, configuration, split or
    column, no right to it, no answer and not in the cache, or a dataset that needs a script of its own.
    """
    dataset, config, split = settings.dataset, settings.config, settings.split
    path = Path(at_home(dataset))
    if path.is_file() or path.suffix.lower() in OTHER_ENDINGS:
        sheet = "a sheet can be saved as CSV, with the texts in one column and their labels in another"
        raise DataError(f"cannot read {path}: expected a file that ends in {', '.join(OTHERS)} or {LAST}; {sheet}")
    if path.exists():
        from_it = "the dataset of that id on the Hub cannot be told from it: start from another working folder"
        raise DataError(f"there is a file or folder {dataset!r} here, so {from_it}, or give the path of a data file")
    if settings.rows is not None and "[" in split:
        raise DataError(f"corpus {dataset!r}: with rows, a split must be a whole one, given {split!r}")
    where = f"dataset {dataset!r} (config {config}, split {split!r}, revision {settings.revision or 'main'})"
    found, silence = {}, None
    try:
        found = _look_up(dataset, settings.revision)
    except HubUnreachableError as error:
        logger.info("the Hub cannot be reached: looking for %s in the cache of `datasets`", dataset)
        silence = error
    except HubError as error:
        raise DataError(f"{error}{FOR_A_FILE}") from error
    try:
        with ExitStack() as after:
            if silence is not None:  # `datasets` would wait without a limit
                after.callback(setattr, datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
                datasets.config.HF_HUB_OFFLINE = True
            options = {"revision": found.get("commit", settings.revision)}
            if settings.rows is None:
                return datasets.load_dataset(dataset, config, split=split, **options), found
            columns, splits = (settings.text_column, settings.label_column), map(str.strip, split.split("+"))
            parts = [_streamed(dataset, config, part, options, columns, settings.rows) for part in splits]
            return datasets.concatenate_datasets(parts), found
    except DataError:
        raise
    except Exception as error:  # as above
        told = f"cannot load {where} from the Hub" if silence is None else silence
        raise DataError(f"{told}: {_root_cause(error)}{_advice(error, dataset)}") from error


def _look_up(dataset: str, revision: str | None) -> dict[str, Any]:
    """Return commit and licence."""
    with clear_hub_errors(dataset, revision, kind="dataset"):
        info = HfApi().dataset_info(dataset, revision=revision, timeout=DEADLINE)
    card = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
    license_ = card.get("license_name") if card.get("license") == "other" else card.get("license")
    names = [str(name) for name in (license_ if isinstance(license_, list) else [license_]) if name is not None]
    return {"commit": info.sha, **({"license": ", ".join(names)} if names else {})}


def _streamed(
    dataset: str, config: str | None, split: str, options: dict[str, Any], columns: Sequence[str], rows: int
) -> datasets.Dataset:
    """Download the first rows of a split alone, and of these the wanted columns."""
    stream = datasets.load_dataset(dataset, config, split=split, streaming=True, **options)
    features = stream.features and {name: kind for name, kind in stream.features.items() if name in columns}
    taken: list[dict[str, Any]] = []
    for row in progress_bar(rows, f"{dataset} {split}", "row", over=itertools.islice(stream, rows)):
        missing = [column for column in columns if column not in row]
        if missing:
            told = f"dataset {dataset!r}, split {split!r} has no column {missing[0]!r}; its columns are {list(row)}"
            raise DataError(told)
        taken.append({column: row[column] for column in columns})
    if not taken:
        raise DataError(f"dataset {dataset!r}, split {split!r} is empty: 0 rows, expected at least 1")
    return datasets.Dataset.from_list(taken, features=features and datasets.Features(features))


def _root_cause(error: BaseException) -> str:
    """Return type and message of the deepest error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _advice(error: BaseException, dataset: str) -> str:
    if "scripts are no longer supported" in str(error):
        return (
            ". It needs a script of its own, which is never run. The Hub keeps a converted copy of many such datasets: "
            "try the revision refs/convert/parquet. Or look for another copy, or save it as JSON Lines and give that"
        )
    if "gated dataset" in str(error):  # everybody may look a gated one up, so that this comes late
        return f" Ask for access at {constants.ENDPOINT}/datasets/{dataset}, then log in with `hf auth login`"
    return FOR_A_FILE if isinstance(error, datasets.exceptions.DatasetNotFoundError | ConnectionError) else ""
