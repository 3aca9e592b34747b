"""What a run shows, and how it ends early: callbacks, trackers, curves, patience, and checkpoints that are damaged."""

import builtins
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trackio
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import write_rows
from tests.given import Logged, Patch, Shown
from tests.meta.runs import Died, Train, assert_same, on_each_step, rows_of, set_constants, trainer_of
from textmeta import Corpus, progress
from textmeta.errors import AdapterError, SettingsError, TrainingInterrupted
from textmeta.files import CHECKPOINT
from textmeta.meta import outer_loop, watching
from textmeta.meta import trainer as trainer_module
from textmeta.meta.evaluation import paired_difference
from textmeta.progress import progress_bar

BEFORE = "checkpoint.before.safetensors"


def test_a_bar_is_plain_lines_where_there_is_no_terminal(capsys: Shown, monkeypatch: Patch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress_bar(4, "maml", "step") as bar:
        for _ in range(4):
            bar.set_postfix({"loss": 0.5}, refresh=False)
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) >= 3
    assert not [line for line in lines if "\r" in line or "\x1b" in line or "|" in line]
    assert "100% 4/4 [00:00<00:00," in lines[-2]
    assert "step/s, loss=0.5]" in lines[-2]
    monkeypatch.setattr(progress, "LINE_EVERY", 30.0)
    assert list(progress_bar(9, "rows", "row", over=range(9))) == [*range(9)]
    assert len(capsys.readouterr().err.splitlines()) == 2, "its beginning and its end"
    list(progress_bar(9, "rows", "row", over=range(9), brief=True))
    list(progress_bar(9, None, "row", over=range(9)))
    assert capsys.readouterr().err == ""


def test_a_bar_moves_on_a_terminal(capsys: Shown, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress_bar(4, "maml", "step").close()
    assert "\rmaml:   0%|" in capsys.readouterr().err


def test_a_callback_sees_each_row_and_may_end_the_training(train: Train, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    train(tmp_path / "whole", callback=seen.append)
    assert seen == rows_of(tmp_path / "whole")
    assert len(seen) == 6
    short = train(tmp_path / "short", callback=lambda row: row["step"] == 3)
    assert len(rows_of(tmp_path / "short")) == 3
    assert short.scope is not None, "it is a whole adapter"
    train(tmp_path / "short")  # goes on
    assert rows_of(tmp_path / "short") == seen


def test_trackers_get_each_row_once(train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    for module in (trackio.sqlite_storage, trackio.utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    output, track = tmp_path / "some-run", ["tensorboard", "trackio"]
    with monkeypatch.context() as patch:
        on_each_step(patch, "maml", dies_at(3))
        with pytest.raises(Died):
            train(output, track=track)
    train(output, track=track)
    rows = rows_of(output)
    found = EventAccumulator(str(output)).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in found.Scalars("loss")] == [(r["step"], r["loss"]) for r in rows]
    (kept,) = trackio.Api().runs("some-run")
    logged = trackio.sqlite_storage.SQLiteStorage.get_logs("some-run", kept.name)
    assert {row["step"]: row["loss"] for row in logged if "loss" in row} == {row["step"]: row["loss"] for row in rows}
    assert not [path for path in output.iterdir() if path.is_dir()], "an adapter's folder has none"


def test_a_tracker_that_is_not_there_is_named(train: Train, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"track: .*tensorbord"):
        train(tmp_path / "run", track="tensorbord")
    with pytest.raises(SettingsError, match=r"track names 'comet_ml', which is not installed: pip install"):
        train(tmp_path / "run", track="comet_ml")
    assert not (tmp_path / "run").exists()


def test_curves_are_drawn_at_ends_and_stops(train: Train, tmp_path: Path, monkeypatch: Patch, caplog: Logged) -> None:
    monkeypatch.setattr(outer_loop, "draw_curves", watching.draw_curves)
    monkeypatch.setattr(trainer_module, "VALIDATION_EPISODES", 2)
    picture = tmp_path / "curves.png"
    with monkeypatch.context() as patch:
        on_each_step(patch, "maml", lambda n, _: os.kill(os.getpid(), signal.SIGTERM) if n == 2 else None)
        with pytest.raises(TrainingInterrupted):
            train(tmp_path, valid=3)
    stopped = picture.read_bytes()
    train(tmp_path, valid=3)
    assert picture.read_bytes() != stopped
    with Image.open(picture) as drawn:
        assert drawn.size == (800, 600)
        assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    picture.unlink()

    usual = builtins.__import__
    absent = lambda name, *rest: usual("no_such_module" if name.startswith("matplotlib") else name, *rest)  # noqa: E731
    monkeypatch.setattr(builtins, "__import__", absent)
    with caplog.at_level(logging.INFO, "textmeta"):
        for _ in range(2):
            watching.draw_curves(tmp_path / "record.jsonl")
    assert not picture.exists()
    assert [r.message for r in caplog.records] == [
        "there is no curves.png without matplotlib: pip install 'textmeta[plot]'"
    ]


def dies_at(step: int) -> Any:
    def die(begun: int, _: object) -> None:
        if begun == step:
            raise Died

    return die


def validated(monkeypatch: Patch, accuracies: Sequence[Sequence[float]]) -> None:
    """Validate after each step, with these accuracies of the episodes."""
    given = iter(accuracies)
    scores = lambda *_, **__: SimpleNamespace(accuracy=np.array(next(given)))  # noqa: E731
    monkeypatch.setattr(outer_loop, "score_episodes", scores)
    monkeypatch.setattr(outer_loop, "VALIDATE_EVERY", 1)
    monkeypatch.setattr(trainer_module, "VALIDATION_EPISODES", len(accuracies[0]))


START, NOISE, SURE = [0.4, 0.5, 0.6, 0.5], [0.9, 0.4, 0.6, 0.5], [0.5, 0.6, 0.7, 0.6]
SMALL = [[0.42, 0.5, 0.61, 0.53], [0.44, 0.52, 0.63, 0.54]]  # the second is a gain on START, not on the first


@pytest.mark.parametrize(
    ("accuracies", "steps"),
    [
        ([START, NOISE, START, SURE], 3),
        ([START, NOISE, SURE, NOISE, NOISE], 5),
        ([START, *SMALL, START, START], 5),
        ([START, SURE, START, SURE], 4),
    ],
    ids=["noise is no gain", "a gain", "small gains add up", "the best again is none"],
)
def test_training_ends_after_so_many_validations_without_a_gain(
    train: Train, accuracies: list[list[float]], steps: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    validated(monkeypatch, accuracies)
    found = train(tmp_path, valid=3, patience=2)
    rows = rows_of(tmp_path)
    assert [row["valid_accuracy"] for row in rows] == pytest.approx([np.mean(a) for a in accuracies[:steps]])
    first = SimpleNamespace(accuracy=np.array(START))
    expected = paired_difference(first, SimpleNamespace(accuracy=np.zeros(4)))["high"] - 0.5  # type: ignore[arg-type]
    assert rows[0]["valid_accuracy_ci95"] == pytest.approx(expected)
    assert_same(train(tmp_path, valid=3, patience=2), found)  # it is over, and validates no more


def test_patience_goes_on_to_the_bit_where_a_run_was_stopped(train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    order = [START, SURE, NOISE, START, SURE]
    validated(monkeypatch, order)
    whole = train(tmp_path / "whole", valid=3, patience=3)
    validated(monkeypatch, order[:3])
    with monkeypatch.context() as patch:
        on_each_step(patch, "maml", dies_at(3))
        with pytest.raises(Died):
            train(tmp_path / "parts", valid=3, patience=3)
    validated(monkeypatch, order[2:])  # the checkpoint is of the second step
    assert_same(train(tmp_path / "parts", valid=3, patience=3), whole)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert len(rows_of(tmp_path / "whole")) == 5
    left, right = (load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "parts"))
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


def test_patience_needs_corpora_to_validate_on(train: Train) -> None:
    with pytest.raises(SettingsError, match="patience is 2, but there are no corpora to validate on"):
        train(patience=2)


def test_a_damaged_checkpoint_gives_way(train: Train, tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    whole = train(tmp_path)
    record = rows_of(tmp_path)
    newest = (tmp_path / CHECKPOINT).read_bytes()
    flipped = newest[:-9] + bytes([newest[-9] ^ 64]) + newest[-8:]  # which safetensors does not notice
    for damaged in (newest[:5000], b"", flipped):
        (tmp_path / CHECKPOINT).write_bytes(damaged)
        with (tmp_path / "record.jsonl").open("a") as file:  # torn
            file.write('{"step": 7, "dropped": [{"episode": 6}')
        with pytest.warns(UserWarning, match=rf"{CHECKPOINT}: .*goes on from .*{BEFORE}"):
            trainer_of(tiny_model).plan(corpus.restrict(corpus.class_names[:5]), output=tmp_path)
        assert (tmp_path / CHECKPOINT).read_bytes() == damaged, "a plan changes nothing"
        with pytest.warns(UserWarning, match=rf"{CHECKPOINT}: .*goes on from .*{BEFORE}"):
            assert_same(train(tmp_path), whole)
        assert rows_of(tmp_path) == record
    (tmp_path / CHECKPOINT).unlink()  # killed between two renames
    assert_same(train(tmp_path), whole)
    for name in (CHECKPOINT, BEFORE):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="goes on"), pytest.raises(AdapterError, match=BEFORE):
        train(tmp_path)
    (tmp_path / BEFORE).unlink()
    with pytest.raises(AdapterError, match=CHECKPOINT):
        train(tmp_path)


SCRIPT = """
import sys
from pathlib import Path
import tests.conftest  # as many threads as here: their number changes the last bits
from tests.meta import runs
from textmeta.data.corpus import load_corpus
from textmeta.errors import TrainingInterrupted
for module in (runs.outer_loop, runs.trainer_module):
    vars(module).update(runs.SHORT, VALIDATE_EVERY=3, VALIDATION_EPISODES=3)
model, data, output, episodes = sys.argv[1:]
try:
    runs.train_on(model, load_corpus(data), Path(output), valid=3, episodes=int(episodes), patience=30)
except TrainingInterrupted as stop:
    sys.exit(128 + stop.signum)
"""


@pytest.mark.parametrize("stops", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_stopped_at_random_ends_in_the_same_bits(
    train: Train, stops: int, tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: Patch
) -> None:
    """By SIGKILL and SIGTERM in turn."""
    points = np.sort(np.random.default_rng(31).choice(np.arange(1, 16 * stops - 10), stops, replace=False)).tolist()
    output, data = tmp_path / "parts", write_rows(tmp_path / "toy.jsonl", corpus)
    arguments = [sys.executable, "-c", SCRIPT, tiny_model, str(data), str(output), str(16 * stops)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    record = output / "record.jsonl"
    for point, number in zip(points, itertools.cycle((signal.SIGKILL, signal.SIGTERM)), strict=False):
        process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
        while not (record.exists() and len(record.read_text().splitlines()) >= point) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait() == (-9 if number == signal.SIGKILL else 143)
        assert len(record.read_text().splitlines()) < 16 * stops
    set_constants(monkeypatch, VALIDATE_EVERY=3, VALIDATION_EPISODES=3)
    whole = train(tmp_path / "whole", valid=3, episodes=16 * stops, patience=30)
    assert_same(train(output, valid=3, episodes=16 * stops, patience=30), whole)
    assert record.read_text() == (tmp_path / "whole" / "record.jsonl").read_text()
