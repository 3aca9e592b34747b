import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from textmeta.artifact.folder import MANIFEST, read_folder
from textmeta.artifact.saving import check_destination, write_folder
from textmeta.errors import AdapterError

OLD = {"a.dat": b"old a", "b.json": b"old b"}
NEW = {"a.dat": b"new a", "c.json": b"new c"}


class Killed(BaseException):
    """Stands in for whatever stops a save: an interrupt, or memory that runs out."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def kill_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, nth: int) -> None:
    """Let the nth call of a function raise instead."""
    original = getattr(target, name)
    calls = 0

    def counted(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(target, name, counted)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    assert read_folder(tmp_path / "adapter") == OLD
    assert names(tmp_path) == {"adapter"}


def test_folder_above_is_made(tmp_path: Path) -> None:
    write_folder(tmp_path / "runs" / "first" / "adapter", OLD)
    assert read_folder(tmp_path / "runs" / "first" / "adapter") == OLD


def test_path_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("adapter"), OLD)
    write_folder(Path("adapter"), NEW)
    assert read_folder(Path("adapter")) == NEW


def test_manifest_is_that_of_sha256sum(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", {"b": b"", "a": b"abc"}, unlisted=frozenset({"none"}))
    assert (tmp_path / "adapter" / MANIFEST).read_text().splitlines() == [
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  a",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  b",
    ]


def test_unlisted_file_may_be_edited_or_removed(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", {**OLD, "README.md": b"card"}, unlisted=frozenset({"README.md"}))
    (tmp_path / "adapter" / "README.md").write_text("my own words")
    assert read_folder(tmp_path / "adapter") == OLD
    (tmp_path / "adapter" / "README.md").unlink()
    assert read_folder(tmp_path / "adapter") == OLD


def test_second_save_replaces_the_files_of_the_first(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    write_folder(tmp_path / "adapter", NEW)
    assert read_folder(tmp_path / "adapter") == NEW
    assert names(tmp_path / "adapter") == {"a.dat", "c.json", MANIFEST}
    assert names(tmp_path) == {"adapter"}


def test_other_files_survive_a_save(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    write_folder(folder, OLD)
    (folder / "results.json").write_text("{}")
    write_folder(folder, NEW)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "results.json").read_text() == "{}"
    assert read_folder(folder) == NEW


def test_folder_that_holds_folders_is_refused_and_unharmed(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "code.py").write_text("print()")
    (folder / "a.dat").write_text("mine")
    with pytest.raises(AdapterError, match=r"holds other folders \(src\)"):
        write_folder(folder, NEW)
    assert names(folder) == {"src", "a.dat"}
    assert (folder / "a.dat").read_text() == "mine"
    assert (folder / "src" / "code.py").read_text() == "print()"
    assert names(tmp_path) == {"project"}


def test_file_of_that_name_is_refused_and_unharmed(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(AdapterError, match="there is a file of that name"):
        write_folder(tmp_path / "adapter", NEW)
    assert (tmp_path / "adapter").read_text() == "mine"
    assert names(tmp_path) == {"adapter"}


@pytest.mark.parametrize("name", sorted(OLD))
def test_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)
    content = bytearray(OLD[name])
    for position in range(len(content)):
        content[position] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(AdapterError, match=f"{name} is damaged"):
            read_folder(folder)
        content[position] ^= 1


def test_truncated_file_is_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    (tmp_path / "adapter" / "a.dat").write_bytes(OLD["a.dat"][:-1])
    with pytest.raises(AdapterError, match=r"a\.dat is damaged"):
        read_folder(tmp_path / "adapter")


def test_missing_file_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    (tmp_path / "adapter" / "b.json").unlink()
    with pytest.raises(AdapterError, match=r"lacks the file b\.json"):
        read_folder(tmp_path / "adapter")


def test_missing_manifest_is_named_with_what_there_is(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    (tmp_path / "adapter" / MANIFEST).unlink()
    with pytest.raises(AdapterError, match=rf"no {MANIFEST}; it holds a\.dat, b\.json"):
        read_folder(tmp_path / "adapter")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no such adapter folder: .*nowhere"):
        read_folder(tmp_path / "nowhere")


def test_file_instead_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(AdapterError, match=r"no such adapter folder: .*adapter"):
        read_folder(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["../x", "/etc/hosts", "sub/x", "..", ".", "", "a.dat/"])
def test_manifest_entry_that_is_no_plain_name_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)
    (tmp_path / "x").write_bytes(b"outside")
    with (folder / MANIFEST).open("a") as manifest:
        manifest.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(AdapterError, match=f"{MANIFEST}, line 3"):
        read_folder(folder)


def test_manifest_line_without_a_name_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    (tmp_path / "adapter" / MANIFEST).write_text("nonsense\n")
    with pytest.raises(AdapterError, match=f"{MANIFEST}, line 1"):
        read_folder(tmp_path / "adapter")


def test_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    (tmp_path / "outside").write_bytes(OLD["a.dat"])
    (tmp_path / "adapter" / "a.dat").unlink()
    (tmp_path / "adapter" / "a.dat").symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterError, match=r"a\.dat"):
        read_folder(tmp_path / "adapter")


def test_save_repairs_a_damaged_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    (tmp_path / "adapter" / MANIFEST).write_text("nonsense\n")
    write_folder(tmp_path / "adapter", OLD)
    assert read_folder(tmp_path / "adapter") == OLD


CRASHES = [(Path, "rename"), (Path, "open"), (Path, "mkdir"), (os, "fsync"), (os, "link"), (shutil, "rmtree")]


@pytest.mark.parametrize(("target", "name"), CRASHES, ids=[name for _, name in CRASHES])
def test_an_error_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, name: str
) -> None:
    crashes = 0
    for nth in range(1, 20):
        folder = tmp_path / str(nth) / "adapter"
        write_folder(folder, OLD)
        (folder / "notes.txt").write_text("mine")
        with monkeypatch.context() as patch:
            kill_at(patch, target, name, nth)
            try:
                write_folder(folder, NEW)
                finished = True
            except Killed:
                finished = False
                crashes += 1
        assert read_folder(folder) in ([NEW] if finished else [OLD, NEW])
        assert (folder / "notes.txt").read_text() == "mine"
        # and the next save goes through, and leaves nothing behind
        write_folder(folder, NEW)
        assert read_folder(folder) == NEW
        assert (folder / "notes.txt").read_text() == "mine"
        assert names(folder.parent) == {"adapter"}
        if finished:
            break
    assert finished
    assert crashes > 0


@pytest.fixture
def set_aside(tmp_path: Path) -> Path:
    """A folder as a process killed between the two renames leaves it."""
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)
    (folder / "notes.txt").write_text("mine")
    folder.rename(tmp_path / ".adapter.textmeta-old")
    (tmp_path / ".adapter.textmeta-new").mkdir()
    return folder


def test_folder_set_aside_by_a_crash_is_read_where_it_lies(set_aside: Path) -> None:
    assert read_folder(set_aside) == OLD
    assert names(set_aside.parent) == {".adapter.textmeta-old", ".adapter.textmeta-new"}, "reading writes nothing"


def test_folder_set_aside_by_a_crash_is_mended_by_the_next_save(set_aside: Path) -> None:
    write_folder(set_aside, NEW)
    assert read_folder(set_aside) == NEW
    assert (set_aside / "notes.txt").read_text() == "mine"
    assert names(set_aside.parent) == {"adapter"}


def test_folder_set_aside_by_a_crash_is_put_back_before_long_work(set_aside: Path) -> None:
    check_destination(set_aside)
    assert read_folder(set_aside) == OLD
    assert (set_aside / "notes.txt").read_text() == "mine"


def test_an_error_in_the_first_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    with monkeypatch.context() as patch:
        kill_at(patch, Path, "rename", 1)
        with pytest.raises(Killed):
            write_folder(folder, NEW)
    with pytest.raises(AdapterError, match="no such adapter folder"):
        read_folder(folder)
    write_folder(folder, NEW)
    assert read_folder(folder) == NEW


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for content in (OLD, NEW):
        write_folder(tmp_path / "link", content)
        assert read_folder(tmp_path / "real") == content
    assert (tmp_path / "link").is_symlink()


def test_without_hard_links_other_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "adapter", OLD)
    (tmp_path / "adapter" / "notes.txt").write_text("mine")

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    write_folder(tmp_path / "adapter", NEW)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


def test_the_working_folder_is_refused_unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path.parent):
        with pytest.raises(AdapterError, match="working folder"):
            write_folder(folder, OLD)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_manifest_that_is_no_adapters_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    (tmp_path / "adapter" / MANIFEST).write_text(f"{'0' * 64}  notes.txt\n")
    with pytest.raises(AdapterError, match="holds another"):
        write_folder(tmp_path / "adapter", OLD)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


def test_full_or_refusing_disk_is_named_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(AdapterError, match=r"cannot write the adapter .*/adapter: .*a\.dat: No space left"):
            write_folder(folder, NEW)
    assert read_folder(folder) == OLD
    assert names(tmp_path) == {"adapter"}


def test_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here, which takes root")
    try:
        write_folder(disk / "adapter", OLD)
        with pytest.raises(AdapterError, match=r"cannot write the adapter .*/adapter: .*big\.dat: No space left"):
            write_folder(disk / "adapter", {"a.dat": b"new", "big.dat": b"x" * 2**18})
        assert read_folder(disk / "adapter") == OLD
        assert names(disk) == {"adapter"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    (tmp_path / "adapter" / "a.dat").unlink()
    os.mkfifo(tmp_path / "adapter" / "a.dat")
    with pytest.raises(AdapterError, match=r"a\.dat is no plain file"):
        read_folder(tmp_path / "adapter")


def test_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter", OLD)
    os.truncate(tmp_path / "adapter" / "a.dat", 2**40)  # takes no place on the disk
    with pytest.raises(AdapterError, match=r"a\.dat has 1099511627776 bytes, expected at most 67108864"):
        read_folder(tmp_path / "adapter")


@pytest.mark.parametrize("bit", range(8))
def test_flipped_bit_of_the_manifest_is_found_wherever_it_is(tmp_path: Path, bit: int) -> None:
    folder = tmp_path / "adapter"
    write_folder(folder, OLD)
    content = bytearray((folder / MANIFEST).read_bytes())
    for position in range(len(content)):
        content[position] ^= 1 << bit
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(AdapterError):
            read_folder(folder)
        content[position] ^= 1 << bit
