"""Files: written so that what is said to be written is on the disk, and JSON that may be anybody's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic_core import from_json

from textmeta.errors import SettingsError, TextMetaError

P = TypeVar("P", bound=str | Path)
CHECKPOINT = "checkpoint.safetensors"  # of a run of training


def read_json(content: bytes, path: Path, error: type[TextMetaError], *, allow_nan: bool = False) -> dict[str, Any]:
    """Return the JSON object that a file's content is; an error, naming the path, if it is none, or nested too deep."""
    try:
        parsed = from_json(content, allow_inf_nan=allow_nan)
    except ValueError as cause:
        raise error(f"{path} is no JSON: {cause}") from cause
    if not isinstance(parsed, dict):
        raise error(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it; OSError names the file, which that of a full disk does not."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def at_home(path: P) -> P:
    """Return a path with the user's home folder in place of a ``~`` at its start; SettingsError if it is no path."""
    if not isinstance(path, str | Path):
        raise SettingsError(f"expected a path, given {type(path).__name__} {path!r:.60}")
    return type(path)(os.path.expanduser(str(path)))


def destination(path: str | Path) -> Path:
    """Return :func:`at_home` of what is to be written; SettingsError if no file system takes the name."""
    found = Path(at_home(path))
    try:
        found.exists()
        return found.resolve()
    except (OSError, ValueError) as error:
        raise SettingsError(f"nothing can be written to {str(path)!r:.60}: {error!s:.60}") from error


def is_folder(name: str | Path) -> bool:
    """Whether there is a folder of this name; a name that no file system takes is none."""
    try:
        return name != "" and Path(name).is_dir()
    except (OSError, ValueError):
        return False


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names of a folder's files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other thread or process is in such a block for a folder, where its file system can tell."""
    import fcntl  # noqa: PLC0415 - not on every system

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes, before: Path | None = None) -> None:
    """Write a file so that after a crash at any moment it holds the old content or the new, never a part.

    ``before`` is what the old one becomes; a crash may leave it alone.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content)
    if before and path.exists():
        os.replace(path, before)
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def open_to_replace(path: Path, **how: Any) -> Iterator[IO[str]]:
    """Open a file to write text: beside the old one, which it replaces when all is written; after an error it is gone.

    A pipe or a device is written as it is.
    """
    path = destination(path)
    whole = path.is_file() or not path.exists()
    written = path.with_name(f"{path.name}.part") if whole else path
    try:
        with written.open("w", **how) as file:
            yield file
        if whole:
            os.replace(written, path)
    finally:
        if whole:
            written.unlink(missing_ok=True)
