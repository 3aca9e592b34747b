"""Folders that are written whole or not at all, with a manifest of their files' hashes."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from textmeta.errors import AdapterError
from textmeta.files import sync_folder, write_synced

__all__ = ["MANIFEST", "check_destination", "read_folder", "write_folder"]

MANIFEST = "SHA256SUMS"


def write_folder(folder: Path, files: Mapping[str, bytes], unlisted: frozenset[str] = frozenset()) -> None:
    """Write files into a folder, replacing those of the old manifest, so that a crash leaves the old or the new.

    The new folder is written and synced beside the old one, the old one set aside, the new one renamed into place,
    and the old one removed. :func:`read_folder` puts back what a crash between the renames set aside. Other files
    that the folder holds (a checkpoint, results, a user's own) are carried over.

    Args:
        folder: where to.
        files: name to content.
        unlisted: names that the manifest leaves out, because people may edit them.

    Raises:
        AdapterError: see :func:`check_destination`; or the folder holds folders or a manifest that is no adapter's,
            which cannot be carried over.
    """
    folder = folder.resolve()
    check_destination(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    _put_back(folder)
    for litter in (new, old):
        shutil.rmtree(litter, ignore_errors=True)
    carried = _carried_over(folder, files)
    listed = {name: content for name, content in sorted(files.items()) if name not in unlisted}
    manifest = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in listed.items())
    new.mkdir()
    for name, content in {**files, MANIFEST: manifest.encode()}.items():
        write_synced(new / name, content)
    for path in carried:
        _link_or_copy(path, new / path.name)
    sync_folder(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_destination(folder: Path) -> None:
    """Check, before long work, that a folder can be replaced as a whole.

    Raises:
        AdapterError: if it is a file, the working folder (or holds it), or a mount point.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"cannot write an adapter folder to {folder}: there is a file of that name")
    if Path.cwd().is_relative_to(folder) or folder.is_mount():
        raise AdapterError(
            f"cannot write an adapter to {folder}, which is the working folder or a mount point: it is replaced as a "
            "whole; give a folder inside it"
        )


def read_folder(folder: Path) -> dict[str, bytes]:
    """Read every file that a folder's manifest lists, and check it against its hash.

    Raises:
        AdapterError: if the folder, its manifest or a listed file is missing, or a file is not what was written.
    """
    folder = folder.resolve()
    _put_back(folder)
    if not folder.is_dir():
        raise AdapterError(f"no such adapter folder: {folder}")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        found = sorted(path.name for path in folder.iterdir())
        raise AdapterError(f"{folder} is no textmeta adapter: it has no {MANIFEST}; it holds {found[:10]}")
    contents = {}
    for number, line in enumerate(manifest.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        expected, separator, name = line.partition("  ")
        if not separator or Path(name).name != name or name in ("", ".", ".."):
            raise AdapterError(
                f"{manifest}, line {number}: expected a sha256, two spaces and a file name: {line!r:.90}"
            )
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise AdapterError(f"{folder} lacks the file {name}, which its {MANIFEST} lists")
        contents[name] = path.read_bytes()
        found_hash = hashlib.sha256(contents[name]).hexdigest()
        if found_hash != expected:
            raise AdapterError(f"{path} is damaged: its sha256 is {found_hash}, but {MANIFEST} says {expected}")
    return contents


def _carried_over(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Return what an existing folder holds beside an adapter's files."""
    if not folder.exists():
        return []
    replaced = {*files, MANIFEST}
    if (folder / MANIFEST).is_file():
        lines = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines()
        listed = {line.partition("  ")[2] for line in lines}
        present = {name for name in listed if name and (folder / name).is_file()}
        if present and not present & files.keys():
            raise AdapterError(f"cannot write an adapter to {folder}: it holds another {MANIFEST}, which would be lost")
        replaced |= listed
    carried = [path for path in folder.iterdir() if path.name not in replaced]
    folders = sorted(path.name for path in carried if path.is_dir())
    if folders:
        raise AdapterError(
            f"cannot write an adapter to {folder}: it holds other folders ({', '.join(folders[:5])}); give a folder of "
            "its own"
        )
    return carried


def _link_or_copy(path: Path, to: Path) -> None:
    try:
        os.link(path, to)  # the same file under both names until the old one goes
    except OSError:  # a file system without hard links
        shutil.copy2(path, to)


def _put_back(folder: Path) -> None:
    old = _sibling(folder, "old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")
