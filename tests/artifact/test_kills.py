"""A save killed at any moment leaves a folder that loads: the old one or the new one, never a mixture.

The kills are real (SIGKILL), of forked processes that save; the disk's part (what a power cut leaves) is fsync's, whose
calls are counted among the moments.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textmeta.artifact.store import load_adapter, save_adapter
from textmeta.errors import AdapterError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder

INNER = InnerLoopSettings(steps=1)
Save = Callable[[str], None]


@pytest.fixture
def save(encoder: Encoder, tmp_path: Path) -> Save:
    """Saves one of two adapters into the folder ``adapter``."""
    start = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size)
    shift = {"old": 1.0, "new": 2.0}

    def save(which: str) -> None:
        parameters = {name: value + shift[which] for name, value in start.items()}
        save_adapter(tmp_path / "adapter", encoder, parameters, INNER, {"which": which})

    return save


def found(folder: Path, encoder: Encoder) -> str:
    """Load the adapter; return which of the two it is, with everything that belongs to it."""
    adapter = load_adapter(folder)
    which = str(adapter.record["which"])
    shift = {"old": 1.0, "new": 2.0}[which]
    for name, value in start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size).items():
        assert torch.equal(adapter.parameters[name], value + shift), name
    return which


def killed(work: Callable[[], None], after: float | None = None) -> bool:
    """Do the work in a forked process, killed after some seconds unless it kills itself; return whether it was."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


class DyingFile:
    """A file whose write may be the last thing that its process does, half done."""

    def __init__(self, file: Any, moment: Callable[[], bool]) -> None:
        self._file, self._moment = file, moment

    def write(self, content: bytes) -> None:
        if self._moment():
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            die()
        self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "DyingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(nth: int) -> None:
    """Let this process die at its nth write, fsync, rename, link or making or removing of a folder."""
    calls = 0

    def moment() -> bool:
        nonlocal calls
        calls += 1
        return calls == nth

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if moment():
                die()
            return original(*arguments, **options)

        return call

    for target, name in ((os, "fsync"), (os, "link"), (os, "rmdir"), (os, "unlink"), (Path, "rename"), (Path, "mkdir")):
        setattr(target, name, dying(getattr(target, name)))
    opened = Path.open

    def open_dying(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = opened(path, mode, *arguments, **options)
        return DyingFile(file, moment) if "w" in mode else file

    Path.open = open_dying  # type: ignore[method-assign, assignment]


def kills_at_every_moment(save: Save, check: Callable[[], None]) -> int:
    """Kill a save of the new adapter at each of its moments in turn; return how many there were."""
    nth = 0
    while True:
        nth += 1

        def work(nth: int = nth) -> None:
            kill_at(nth)
            save("new")

        if not killed(work):
            return nth - 1
        check()


def test_kill_at_every_write_fsync_and_rename(save: Save, encoder: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    outcomes = []

    def start() -> None:
        save("old")
        (folder / "notes.txt").write_text("mine")

    def check() -> None:
        outcomes.append(found(folder, encoder))
        save("new")  # goes through, and leaves nothing behind
        assert found(folder, encoder) == "new"
        assert (folder / "notes.txt").read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        start()

    start()
    moments = kills_at_every_moment(save, check)
    assert moments > 15, "6 files with a write and a sync each, 2 folders synced, 2 renames"
    assert outcomes == sorted(outcomes, reverse=True), "old until the new one is whole, new from then on"
    assert {"old", "new"} == set(outcomes)


def test_kill_of_the_first_save_at_every_moment(save: Save, encoder: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    outcomes = []

    def check() -> None:
        if folder.exists():
            outcomes.append(found(folder, encoder))
        else:
            outcomes.append("none")
            with pytest.raises(AdapterError, match="no such adapter folder"):
                load_adapter(folder)
        shutil.rmtree(folder, ignore_errors=True)  # not the litter: the next save has to clear it away

    kills_at_every_moment(save, check)
    assert outcomes == sorted(outcomes, reverse=True)
    assert {"none", "new"} == set(outcomes)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_kill_at_random(save: Save, encoder: Encoder, tmp_path: Path) -> None:
    draw = random.Random(0)
    save("new")
    began = time.monotonic()
    save("old")
    took = time.monotonic() - began  # on a busy machine many times as long
    outcomes = []

    def work() -> None:
        for which in ("new", "old") * 1000:
            save(which)

    for _ in range(50):
        assert killed(work, after=draw.uniform(0.1, 4) * took)
        outcomes.append(found(tmp_path / "adapter", encoder))
    assert {"old", "new"} == set(outcomes)
    save("new")
    assert found(tmp_path / "adapter", encoder) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
