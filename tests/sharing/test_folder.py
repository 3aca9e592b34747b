"""Adapter folders: whole, the old one or the new, whatever happens while they are written; and what they may hold."""

import errno
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.given import Patch
from textmeta.errors import AdapterError
from textmeta.sharing.folder import MANIFEST, check_destination, read_folder, write_folder

OLD = {"a.dat": b"old a", "b.json": b"old b"}
NEW = {"a.dat": b"new a", "c.json": b"new c"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "adapter"
    write_folder(folder, {**OLD, "README.md": b"card"}, unlisted=frozenset({"README.md"}))
    (folder / "README.md").write_text("my own words")
    assert read_folder(folder) == OLD
    (folder / "README.md").unlink()
    assert read_folder(folder) == OLD
    assert names(tmp_path) == {"runs"}
    assert names(tmp_path / "runs") == {"adapter"}


def test_manifest_is_that_of_sha256sum(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", {"b": b"", "a": b"abc"}, unlisted=frozenset({"none"}))
    assert (tmp_path / "adapter" / MANIFEST).read_text().splitlines() == [
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  a",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  b",
    ]


def test_second_save_replaces_the_files_of_the_first_and_others_survive(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("adapter")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    write_folder(folder, OLD)
    (folder / "results.json").write_text("{}")
    write_folder(folder, NEW)
    assert (folder / "notes.txt").read_text() == "mine"
    assert names(folder) == {"a.dat", "c.json", MANIFEST, "notes.txt", "results.json"}
    assert read_folder(folder) == NEW
    (folder / MANIFEST).write_text("nonsense\n")
    write_folder(folder, OLD)
    assert read_folder(folder) == OLD, "a save repairs a damaged folder"
    assert names(tmp_path) == {"adapter"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "src").mkdir(), r"holds other folders \(src\)"),
        (lambda folder: (folder / MANIFEST).write_text(f"{'0' * 64}  notes.txt\n"), "holds another SHA256SUMS"),
        (lambda folder: (folder / "run.py").write_text(""), "kind that can run code"),
        (os.chdir, "working folder"),
    ],
)
def test_folder_that_is_no_place_for_an_adapter_is_refused_unharmed(
    tmp_path: Path, monkeypatch: Patch, make: Callable[[Path], object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # and back afterwards
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    make(folder)
    before = names(folder)
    if "another" not in message:  # which depends on the files
        with pytest.raises(AdapterError, match=message):
            check_destination(folder)
    with pytest.raises(AdapterError, match=message):
        write_folder(folder, NEW)
    assert names(folder) == before
    with pytest.raises(AdapterError, match="there is a file of that name"):
        write_folder(folder / "notes.txt", NEW)
    assert (folder / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == {"project"}


@pytest.mark.parametrize("name", ["../x", "/etc/hosts", "sub/x", "..", "", "a.dat/"])
def test_manifest_entry_that_is_no_plain_name_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)
    (tmp_path / "x").write_bytes(b"outside")
    with (folder / MANIFEST).open("a") as manifest:
        manifest.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(AdapterError, match=f"{MANIFEST}, line 3"):
        read_folder(folder)


def test_disk_has_all_of_the_new_folder_before_it_replaces_the_old(tmp_path: Path, monkeypatch: Patch) -> None:
    write_folder(tmp_path / "adapter", OLD)
    events: list[str] = []

    def noted(original: Callable[..., Any], event: str) -> Callable[..., Any]:
        return lambda *arguments: (events.append(event), original(*arguments))[1]

    monkeypatch.setattr(os, "fsync", noted(os.fsync, "sync"))
    monkeypatch.setattr(Path, "rename", noted(Path.rename, "rename"))
    write_folder(tmp_path / "adapter", NEW)
    assert events == ["sync"] * (len(NEW) + 2) + ["rename"] * 2 + ["sync"], "files, manifest, folder; the folder above"


def test_folder_set_aside_by_a_crash_is_read_and_mended(tmp_path: Path) -> None:
    """As a process killed between the two renames leaves it; what a save makes of it is below."""
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)
    (folder / "notes.txt").write_text("mine")
    folder.rename(tmp_path / ".adapter.textmeta-old")
    (tmp_path / ".adapter.textmeta-new").mkdir()
    assert read_folder(folder) == OLD
    assert names(tmp_path) == {".adapter.textmeta-old", ".adapter.textmeta-new"}, "reading writes nothing"
    check_destination(folder)
    assert read_folder(folder) == OLD
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for content in (OLD, NEW):
        write_folder(tmp_path / "link", content)
        assert read_folder(tmp_path / "real") == content
    assert (tmp_path / "link").is_symlink()


def test_full_or_refusing_disk_is_named_and_harms_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)

    full, refused = OSError(errno.ENOSPC, "No space left on device"), r"cannot write the adapter .*/adapter: .*a\.dat"
    for target, name, error, kind, message in (
        (os, "fsync", full, AdapterError, f"{refused}: No space left"),
        (Path, "rename", KeyboardInterrupt(), KeyboardInterrupt, None),
        (shutil, "copy2", MemoryError(), MemoryError, None),
    ):
        (folder / "notes.txt").write_text("mine")
        with monkeypatch.context() as patch:
            patch.setattr(target, name, Mock(side_effect=error))
            with pytest.raises(kind, match=message):
                write_folder(folder, NEW)
        assert read_folder(folder) == OLD
        assert names(tmp_path) == {"adapter"}


def test_reading_while_others_write_gives_one_or_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)
    stop = threading.Event()

    def write_again_and_again() -> None:
        while not stop.is_set():
            write_folder(folder, NEW)
            write_folder(folder, OLD)

    writer = threading.Thread(target=write_again_and_again)
    writer.start()
    try:
        found = [read_folder(folder) for _ in range(300)]
    finally:
        stop.set()
        writer.join()
    assert all(content in (OLD, NEW) for content in found)
    assert OLD in found
    assert NEW in found


def test_saves_at_once_go_one_after_the_other(tmp_path: Path, monkeypatch: Patch) -> None:
    folder, listdir, rename = tmp_path / "adapter", os.listdir, os.rename  # slow, so that others come in between:
    monkeypatch.setattr(os, "listdir", lambda path: (time.sleep(0.005), listdir(path))[1])
    monkeypatch.setattr(os, "rename", lambda *paths: (rename(*paths), time.sleep(0.005)))
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda number: write_folder(folder, (OLD, NEW)[number % 2]), range(60)))
    assert read_folder(folder) in (OLD, NEW)
    assert names(tmp_path) == {"adapter"}


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "weights.pt", "head.joblib", "data.PKL", "modeling.py", "lib.so"]
)
def test_file_that_can_run_code_is_refused(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "adapter", OLD)
    (tmp_path / "adapter" / name).write_bytes(b"")
    with pytest.raises(AdapterError, match=rf"{name} is of a kind that can run code"):
        read_folder(tmp_path / "adapter")


def test_links_into_the_hubs_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--a--b"
    folder = repo / "snapshots" / "c0ffee"
    write_folder(folder, OLD)
    (repo / "blobs").mkdir()
    shared = tmp_path / "hub" / "blobs" / "ab" / "abcdef"
    shared.parent.mkdir(parents=True)
    (folder / "a.dat").rename(repo / "blobs" / "1234")
    (folder / "a.dat").symlink_to("../../blobs/1234")
    (folder / "b.json").rename(shared)
    (folder / "b.json").symlink_to("../../../blobs/ab/abcdef")
    assert read_folder(folder) == OLD
    (tmp_path / "secret").write_bytes(OLD["a.dat"])
    for outside in ("../../../../secret", "/etc/hostname", "../../refs"):
        (folder / "a.dat").unlink()
        (folder / "a.dat").symlink_to(outside)
        with pytest.raises(AdapterError, match=r"a\.dat"):
            read_folder(folder)


def test_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    os.truncate(tmp_path / "adapter" / "a.dat", 2**40)  # takes no place on the disk
    with pytest.raises(AdapterError, match=r"a\.dat has 1099511627776 bytes, expected at most 67108864"):
        read_folder(tmp_path / "adapter")


# A save killed at any moment leaves the old folder or the new one, never a mixture. The kills are real (SIGKILL), of
# forked processes that save; the disk's part (what a power cut leaves) is fsync's, whose calls are among the moments.


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
    assert len(outcomes) > 11, "3 files opened and synced, 2 folders synced, 2 renames"
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
