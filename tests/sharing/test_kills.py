"""A save killed at any moment leaves the old folder or the new one, never a mixture.

The kills are real (SIGKILL), of forked processes that save; the disk's part (what a power cut leaves) is fsync's, whose
calls are counted among the moments.
"""

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from textmeta.errors import AdapterError
from textmeta.sharing.folder import read_folder, write_folder

OLD = {"a.dat": b"old a" * 1000, "b.json": b"old b", "c.json": b"both"}
NEW = {"a.dat": b"new a" * 1000, "c.json": b"both", "d.json": b"new d", "e.json": b"new e"}


# what the interpreter reports of itself, and fsync, which it does not
MOMENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.copyfile", "fsync"}


def kill_at(nth: int) -> None:
    """Let this process die right before the nth of its moments; of a file that was not synced half is lost."""
    count, sync = itertools.count(1), os.fsync

    def moment(event: str, arguments: tuple[Any, ...]) -> None:
        if event in MOMENTS and next(count) == nth:
            with suppress(OSError):  # of a folder
                if event == "fsync":
                    os.ftruncate(*arguments, os.fstat(*arguments).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_sync(descriptor: int) -> None:
        moment("fsync", (descriptor,))
        sync(descriptor)

    sys.addaudithook(moment)
    os.fsync = dying_sync  # type: ignore[assignment]


def killed_saves(folder: Path) -> Iterator[int]:
    """Save the new files in a forked process that dies at the first of its moments, then the second, to the last."""
    nth, killed = 0, True
    while killed:
        nth += 1
        child = os.fork()
        if child == 0:
            try:
                kill_at(nth)
                write_folder(folder, NEW)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        if killed:
            yield nth


def test_kill_at_every_write_fsync_and_rename(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    outcomes = []

    def start() -> None:
        write_folder(folder, OLD)
        (folder / "notes.txt").write_text("mine")

    start()
    for _ in killed_saves(folder):
        outcomes.append(read_folder(folder))
        write_folder(folder, NEW)  # goes through, and leaves nothing behind
        assert read_folder(folder) == NEW
        assert (folder / "notes.txt").read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        start()
    assert len(outcomes) > 15, "5 files opened and synced, 2 folders synced, 2 renames"
    news = outcomes.index(NEW)
    assert news > 0
    assert outcomes == [OLD] * news + [NEW] * (len(outcomes) - news), "old until the new one is whole, new from then on"


def test_kill_of_the_first_save_at_every_moment(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    outcomes = []
    for _ in killed_saves(folder):
        outcomes.append(folder.exists())
        if folder.exists():
            assert read_folder(folder) == NEW
        else:
            with pytest.raises(AdapterError, match="no such adapter folder"):
                read_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)  # not the litter: the next save has to clear it away
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
