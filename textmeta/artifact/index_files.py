"""The index of the tasks that an adapter was trained on, as two files: names in JSON, vectors in safetensors.

It holds no text, but the names of corpora and classes, which may be anybody's: they are data, and nothing acts on them.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from textmeta.artifact.parsing import check_members, member, read_json, read_tensors, write_json
from textmeta.errors import AdapterError
from textmeta.tasks import KnownTasks

__all__ = ["INDEX_FILES", "NAMES", "UNIT_TOLERANCE", "VECTORS", "index_files", "read_index"]

NAMES, VECTORS = "tasks.json", "tasks.safetensors"
INDEX_FILES = frozenset({NAMES, VECTORS})
UNIT_TOLERANCE = 1e-3  # of a length of 1; other machines' rounding is far less


def index_files(known: KnownTasks, hidden_size: int | None) -> dict[str, bytes]:
    """Return the files of an index: name to content.

    Args:
        known: the index.
        hidden_size: length of the encoder's features; None, where the adapter has no task encoder.

    Raises:
        AdapterError: if it would not be read again (:func:`read_index`).
    """
    _check(known, hidden_size, "not saved: the index of training tasks")
    corpora = [{"name": name, "classes": list(classes)} for name, classes in known.classes.items()]
    # a tensor's name is the corpus's number: the names of corpora are not for headers
    tensors = {
        str(number): torch.from_numpy(np.ascontiguousarray(known.vectors[name], np.float32))
        for number, name in enumerate(known.classes)
    }
    return {NAMES: write_json({"corpora": corpora}), VECTORS: save_tensors(tensors)}


def read_index(files: Mapping[str, bytes], folder: Path, hidden_size: int | None) -> KnownTasks | None:
    """Return the index that an adapter folder holds; None, if it has none.

    Args:
        files: of the folder, name to content.
        folder: to name in errors.
        hidden_size: see :func:`index_files`.

    Raises:
        AdapterError: if one of its two files is missing, a name or a number is not what it must be, the two do not
            belong together, or the adapter has no task encoder.
    """
    if not files.keys() & INDEX_FILES:
        return None
    for name in sorted(INDEX_FILES - files.keys()):
        raise AdapterError(f"{folder} has half an index of training tasks: it has no {name}")
    content = read_json(files[NAMES], folder / NAMES)
    check_members(content, ("corpora",), folder / NAMES)
    classes: dict[str, tuple[str, ...]] = {}
    for number, corpus in enumerate(member(content, "corpora", list, folder / NAMES)):
        match corpus:
            case {"name": str(name), "classes": [str(), *_] as names} if len(corpus) == 2 and name not in classes:
                classes[name] = tuple(names)
                continue
        raise AdapterError(
            f"{folder / NAMES}, corpus {number}: expected a name not given before, and the names of its classes, found "
            f"{corpus!r:.80}"
        )
    tensors = read_tensors(files[VECTORS], folder / VECTORS)
    if tensors.keys() != {str(number) for number in range(len(classes))}:
        raise AdapterError(
            f"{folder / VECTORS}: expected a tensor for each of {len(classes)} corpora, found {sorted(tensors)!r:.80}"
        )
    vectors = {name: tensors[str(number)].numpy() for number, name in enumerate(classes)}
    known = KnownTasks(classes, vectors)
    _check(known, hidden_size, f"{folder / NAMES} and {VECTORS}")
    return known


def _check(known: KnownTasks, hidden_size: int | None, what: str) -> None:
    if hidden_size is None:
        raise AdapterError(f"{what}: the adapter has no task encoder that new tasks could be compared by")
    if not known.classes:
        raise AdapterError(f"{what}: no corpus is in it")
    for corpus, names in known.classes.items():
        where = f"{what}, corpus {corpus!r:.60}"
        if not all(isinstance(name, str) and name for name in (corpus, *names)):
            raise AdapterError(f"{where}: expected names of one character or more")
        if len(set(names)) < len(names):
            raise AdapterError(f"{where}: a class is given twice")
        vectors, shape = known.vectors[corpus], (len(names), hidden_size)
        if vectors.shape != shape:
            raise AdapterError(f"{where}: the class vectors have shape {vectors.shape}, expected {shape}")
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        if not (np.abs(lengths - 1) <= UNIT_TOLERANCE).all():  # which NaN is not, either
            raise AdapterError(f"{where}: expected class vectors of length 1, found {lengths.tolist()!s:.80}")
