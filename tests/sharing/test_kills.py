"""A save killed at any moment leaves the old folder or the new one, never a mixture.

The kills are real (SIGKILL), of forked processes that save; the disk's part (what a power cut leaves) is fsync's, whose
calls are counted among the moments.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from textmeta.errors import AdapterError
from textmeta.sharing.folder import read_folder, write_folder

OLD = {"a.dat": b"old a" * 1000, "b.json": b"old b", "c.json": b"both"}
NEW = {"a.dat": b"new a" * 1000, "c.json": b"both", "d.json": b"new d", "e.json": b"new e"}


class DyingFile:
    """A file whose write may be the last thing that its process does, half done."""

    def __init__(self, file: Any, moment: Callable[[], bool]) -> None:
        self._file, self._moment = file, moment

    def write(self, content: bytes) -> None:
        if self._moment():
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "DyingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def kill_at(nth: int) -> None:
    """Let this process die at its nth write, fsync, rename, copy or making or removing of a folder."""
    calls = 0

    def moment() -> bool:
        nonlocal calls
        calls += 1
        return calls == nth

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if moment():
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    for target, name in (
        *((os, "fsync"), (os, "rmdir"), (os, "unlink"), (shutil, "copy2")),
        *((Path, "rename"), (Path, "mkdir")),
    ):
        setattr(target, name, dying(getattr(target, name)))
    opened = Path.open

    def open_dying(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = opened(path, mode, *arguments, **options)
        return DyingFile(file, moment) if "w" in mode else file

    Path.open = open_dying  # type: ignore[method-assign, assignment]


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
    assert len(outcomes) > 15, "5 files with a write and a sync each, 2 folders synced, 2 renames"
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
