"""The files of an adapter folder: their names, the number of their format, and JSON in them."""

import json
from pathlib import Path
from typing import Any

from textmeta.errors import AdapterError
from textmeta.files import read_json
from textmeta.sharing.folder import read_file, read_folder

__all__ = ["ADAPTER_FILES", "CARD", "FORMAT", "read_adapter_files", "write_json"]

FORMAT = 8  # of what is written, and all that is read
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # LoRA, as PEFT has it
META, TENSORS = "textmeta.json", "textmeta.safetensors"  # everything else that was learned
CLASSIFIER, HEAD = "classifier.json", "classifier.safetensors"  # of a fitted classifier
SUPPORT = "support.safetensors"  # token states of what it was fitted on, if they are stored
REQUIRED = frozenset({CONFIG, WEIGHTS, META, TENSORS})
ADAPTER_FILES = REQUIRED | {CLASSIFIER, HEAD, SUPPORT}  # all that a manifest may list
CARD = "README.md"  # not in the manifest, because people edit it


def read_adapter_files(folder: Path) -> dict[str, bytes]:
    """Read the files of an adapter folder, checked against their hashes: name to content.

    Raises:
        AdapterError: if it was made by another version of textmeta, is damaged, or is no adapter.
    """
    try:
        found = read_json(read_file(folder, META), folder / META, AdapterError).get("format_version")
    except AdapterError:
        found = FORMAT  # whatever is wrong will be found, and named, in its turn
    # first of all: that another version has other files, too, would else be called damage
    if type(found) is not int or found != FORMAT:
        newer = type(found) is int and found > FORMAT
        raise AdapterError(
            f"{folder / META} has format version {found!r:.40}, this textmeta reads {FORMAT}: the adapter was "
            f"made by {'a newer textmeta' if newer else 'textmeta 0.1: train it again'}"
        )
    files = read_folder(folder, ADAPTER_FILES)
    required = ADAPTER_FILES - {SUPPORT} if files.keys() - REQUIRED else REQUIRED
    for name in sorted(required - files.keys()):
        raise AdapterError(f"{folder} is no whole textmeta adapter: it has no {name}")
    return files


def write_json(content: Any) -> bytes:
    """Return JSON as every file of an adapter has it: sorted, so that equal content has equal bytes.

    Raises:
        AdapterError: if JSON has no such value, or a text has half of a character.
    """
    try:
        return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"not saved: what is to be stored as JSON cannot be: {error}") from error
