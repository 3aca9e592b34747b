"""Corpora in local files."""

import tempfile
from pathlib import Path
from typing import Any

import datasets

from textmeta.errors import DataError

__all__ = ["FILE_BUILDERS", "read_local_file", "root_cause"]

# File ending → builder of `datasets`.
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def read_local_file(path: Path, text_column: str, label_column: str) -> datasets.Dataset:
    """Read a JSON, JSON Lines, CSV, TSV or Parquet file, by its ending.

    Raises:
        DataError: if there is no such file, it is empty, or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise DataError(f"file is empty: {path}")
    builder = FILE_BUILDERS[path.suffix.lower()]
    options: dict[str, Any] = {}
    if builder == "csv":
        # CSV has no types: a cell stays the string that it is, "null", "01" and "True" too
        options["keep_default_na"] = False
        options["converters"] = {text_column: str, label_column: str}
        if path.suffix.lower() == ".tsv":
            options["sep"] = "\t"
    try:
        # not through the user's cache: it tells files apart by name, size and time, and would keep a copy
        with tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(
                builder, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
    except Exception as error:  # `datasets` raises many unrelated types; the deepest one says what is wrong
        cause = root_cause(error)
        raise DataError(
            f"file has no rows: {path}" if "no data" in cause else f"cannot read {path} as {builder}: {cause}"
        ) from error


def root_cause(error: BaseException) -> str:
    """Return type and message of the deepest error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
