"""Writing files so that what is said to be written is on the disk."""

import os
from pathlib import Path

__all__ = ["is_folder", "sync_folder", "write_atomically", "write_synced"]


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it.

    Raises:
        OSError: naming the file, which an error in writing (a full disk) does not by itself.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after a crash at any moment it holds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content)
    os.replace(temporary, path)
    sync_folder(path.parent)
