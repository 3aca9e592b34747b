"""Datasets of the Hugging Face Hub, whole or streamed, with errors that say what to do."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, constants
from tqdm import tqdm

from textmeta.data.local_file import FILE_BUILDERS, root_cause
from textmeta.errors import DataError, HubError, HubUnreachableError
from textmeta.hub import clear_hub_errors

__all__ = ["read_hub_dataset"]

logger = logging.getLogger(__name__)

*OTHERS, LAST = FILE_BUILDERS
FOR_A_FILE = f". For a local file, give a path that ends in {', '.join(OTHERS)} or {LAST}"


def read_hub_dataset(
    dataset: str,
    config: str | None,
    split: str,
    revision: str | None,
    *,
    columns: Sequence[str],
    streaming: bool = False,
    rows: int | None = None,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Read a split of a dataset at the commit that its revision is now; offline, what `datasets` has in its cache.

    Args:
        dataset: id on the Hub.
        config: configuration, where it has several.
        split: name of a split; ``train+test`` joins two.
        revision: branch, tag or commit.
        columns: that are wanted.
        streaming: read row by row as they come, and only the wanted columns.
        rows: of a stream, stop after so many.

    Returns:
        The rows; and ``commit``, and ``license`` where the dataset's card has one.

    Raises:
        DataError: no such dataset, configuration, split or column, no right to it, no answer and not in the cache, or a
            dataset that needs a script of its own.
    """
    if Path(dataset).exists():
        raise DataError(
            f"there is a file or folder {dataset!r} here, so the dataset of that id on the Hub cannot be told from it: "
            "start from another working folder, or give the path of a data file"
        )
    if streaming and "[" in split:
        raise DataError(f"a stream has whole splits alone, given {split!r}: set rows instead")
    where = f"dataset {dataset!r} (config {config}, split {split!r}, revision {revision or 'main'})"
    try:
        found = _look_up(dataset, revision)
        options = {"revision": found.get("commit", revision)}
        if not streaming:
            return datasets.load_dataset(dataset, config, split=split, **options), found
        parts = [_streamed(dataset, config, part.strip(), options, columns, rows) for part in split.split("+")]
        return datasets.concatenate_datasets(parts), found
    except DataError:
        raise
    except Exception as error:  # `datasets` raises many unrelated types; the deepest one says what is wrong
        raise DataError(f"cannot load {where} from the Hub: {root_cause(error)}{_advice(error, dataset)}") from error


def _look_up(dataset: str, revision: str | None) -> dict[str, Any]:
    """Return commit and licence; nothing where the Hub cannot be reached, and the cache may yet have the dataset."""
    try:
        with clear_hub_errors(dataset, revision, kind="dataset"):
            info = HfApi().dataset_info(dataset, revision=revision, timeout=10)
    except HubUnreachableError:
        logger.info("the Hub cannot be reached: looking for %s in the cache of `datasets`", dataset)
        return {}
    except HubError as error:
        raise DataError(f"{error}{FOR_A_FILE}") from error
    card = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
    license_ = card.get("license_name") if card.get("license") == "other" else card.get("license")
    names = [str(name) for name in (license_ if isinstance(license_, list) else [license_]) if name is not None]
    return {"commit": info.sha, **({"license": ", ".join(names)} if names else {})}


def _streamed(
    dataset: str, config: str | None, split: str, options: dict[str, Any], columns: Sequence[str], rows: int | None
) -> datasets.Dataset:
    stream = datasets.load_dataset(dataset, config, split=split, streaming=True, **options)
    features = stream.features and {name: kind for name, kind in stream.features.items() if name in columns}
    taken: list[dict[str, Any]] = []
    for row in tqdm(itertools.islice(stream, rows), desc=f"{dataset} {split}", unit="row", total=rows):
        missing = [column for column in columns if column not in row]
        if missing:
            raise DataError(
                f"dataset {dataset!r}, split {split!r} has no column {missing[0]!r}; its columns are {list(row)}"
            )
        taken.append({column: row[column] for column in columns})
    if not taken:
        raise DataError(f"dataset {dataset!r}, split {split!r} is empty: 0 rows, expected at least 1")
    return datasets.Dataset.from_list(taken, features=features and datasets.Features(features))


def _advice(error: BaseException, dataset: str) -> str:
    if "scripts are no longer supported" in str(error):
        return (
            ". It needs a script of its own, which is never run. The Hub keeps a converted copy of many such datasets: "
            "try the revision refs/convert/parquet. Or look for another copy, or save it as JSON Lines and give that"
        )
    if "gated dataset" in str(error):  # everybody may look a gated one up, so that this comes late
        return f" Ask for access at {constants.ENDPOINT}/datasets/{dataset}, then log in with `hf auth login`"
    return FOR_A_FILE if isinstance(error, datasets.exceptions.DatasetNotFoundError | ConnectionError) else ""
