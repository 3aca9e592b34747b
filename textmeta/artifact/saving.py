"""Saving a folder whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: there two savers of one folder must not meet
    fcntl = None  # type: ignore[assignment]

from textmeta.artifact.folder import MANIFEST, check_no_code, manifest_of, sibling
from textmeta.errors import AdapterError
from textmeta.files import is_folder, sync_folder, write_synced

__all__ = ["check_destination", "write_folder"]


def write_folder(folder: Path, files: Mapping[str, bytes], unlisted: frozenset[str] = frozenset()) -> None:
    """Write files into a folder, replacing those of the old manifest, so that a crash leaves the old or the new.

    The new folder is written and synced beside the old one, the old one set aside, the new one renamed into place,
    and the old one removed. What a crash between the renames set aside is read where it lies
    (:func:`~textmeta.artifact.folder.read_folder`). Other files that the folder holds (a checkpoint, results, a user's
    own) are carried over.

    Args:
        folder: where to.
        files: name to content.
        unlisted: names that the manifest leaves out, because people may edit them.

    Raises:
        AdapterError: see :func:`check_destination`; or the folder holds folders or a manifest that is no adapter's,
            which cannot be carried over; or the disk refuses (it is full, or not to be written to).
    """
    folder = folder.resolve()
    check_destination(folder)
    new, old = sibling(folder, "new"), sibling(folder, "old")
    manifest = manifest_of({name: content for name, content in files.items() if name not in unlisted})
    with _alone(folder.parent), _cleaned_up(folder, new):
        _put_back(folder)
        for litter in (new, old):
            shutil.rmtree(litter, ignore_errors=True)
        carried = _carried_over(folder, files)
        new.mkdir()
        for name, content in {**files, MANIFEST: manifest}.items():
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
    """Check, before long work, that a folder can be replaced as a whole; put back what a crash set aside.

    Raises:
        AdapterError: if it is a file, the working folder (or holds it), or a mount point, or holds files for which it
            would be refused when it is read.
    """
    folder = folder.resolve()
    if is_folder(sibling(folder, "old")):
        with _alone(folder.parent):
            _put_back(folder)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"cannot write an adapter folder to {folder}: there is a file of that name")
    if Path.cwd().is_relative_to(folder) or folder.is_mount():
        raise AdapterError(
            f"cannot write an adapter to {folder}, which is the working folder or a mount point: it is replaced as a "
            "whole; give a folder inside it"
        )
    if folder.exists():
        check_no_code(folder, sorted(path.name for path in folder.iterdir()))


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


@contextmanager
def _cleaned_up(folder: Path, new: Path) -> Iterator[None]:
    """Leave the old folder in its place and no litter, whatever stops a save; name the path that the disk refused."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        _put_back(folder)
        if isinstance(error, OSError):
            raise AdapterError(
                f"cannot write the adapter {folder}: {error.filename or new}: {error.strerror or error}"
            ) from error
        raise


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Wait until no other process or thread saves into the same parent folder; the lock goes with its holder."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        descriptor = None if fcntl is None else os.open(parent, os.O_RDONLY)
    except OSError as error:
        raise AdapterError(f"cannot write to the folder {parent}: {error.strerror}") from error
    if descriptor is None:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _link_or_copy(path: Path, to: Path) -> None:
    try:
        os.link(path, to)  # the same file under both names until the old one goes
    except OSError:  # a file system without hard links
        shutil.copy2(path, to)


def _put_back(folder: Path) -> None:
    old = sibling(folder, "old")
    if is_folder(old) and not folder.exists():
        old.rename(folder)
