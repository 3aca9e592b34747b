"""The recipe that labels a data set: shard by shard, by one process, several, or workers of Ray."""

import csv
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest

from tests.hub.server import HubServer
from tests.test_classifier import LABELS, SUPPORT, adapter_of
from tests.test_recipes import RECIPES
from textmeta import FewShotClassifier

WORDS = ["bal", "bel", "fim", "fon", "gur", "dal", "kes", "dis", "dur", "kel"]
ROWS = [{"id": n, "text": " ".join(WORDS[int(digit)] for digit in str(n)), "note": 'ü, "b"'} for n in range(25)]
PATH = RECIPES / "predict_dataset.py"


@pytest.fixture(scope="module")
def folder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted classifier."""
    path = tmp_path_factory.mktemp("predict-dataset") / "fitted"
    FewShotClassifier(adapter_of(tiny_model)).fit(SUPPORT, LABELS).save_pretrained(path)
    return path


@pytest.fixture
def label(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the recipe in this process."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")

    def run(data: Any, *more: Any, classifier: Path = folder) -> None:
        given = [PATH, classifier, data, "--output", tmp_path / "out", "--shard-rows", 10, *more]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        runpy.run_path(str(PATH), run_name="__main__")

    return run


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(folder: Path, form: str = "json") -> list[dict[str, Any]]:
    """Read all shards in order, with a reader of others."""
    files = [str(path) for path in sorted(folder.glob("*-of-*"))]
    return datasets.load_dataset(form, data_files=files, split="train", cache_dir=str(folder / ".read")).to_list()


def expected(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tops = FewShotClassifier.from_pretrained(folder).predict_top([row["text"] for row in rows], 1)
    told = [{"predicted": label, "probability": pytest.approx(p, abs=2e-6)} for ((label, p),) in tops]
    return [{**row, **more} for row, more in zip(rows, told, strict=True)]


@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet", "hub"])
def test_every_row_is_answered(
    label: Any, folder: Path, tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    data: Any = write(tmp_path / "rows.jsonl", ROWS)
    if source == "csv":
        with (data := tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            (table := csv.DictWriter(file, ROWS[0])).writeheader()
            table.writerows(ROWS)
    elif source == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(data := tmp_path / "rows.parquet")
    elif source == "hub":
        hub.add_repo(data := "lab/rows", {"train.jsonl": (tmp_path / "rows.jsonl").read_bytes()}, repo_type="dataset")
    label(data, *(["--to", "parquet"] if source == "parquet" else []))
    out = tmp_path / "out"
    assert f"25 rows are labelled, in 3 files of {out}\n" in capsys.readouterr().out
    assert answers(out, "parquet" if source == "parquet" else "json") == expected(folder, ROWS)
    assert sorted(path.name[:14] for path in out.glob("[!.]*")) == [
        *(f"0000{n}-of-00003" for n in range(3)),
        "settings.json",
    ]


def test_what_is_there_is_not_done_again(
    label: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write(tmp_path / "rows.jsonl", [*ROWS[:-1], {**ROWS[-1], "text": None}]), tmp_path / "out"
    with pytest.raises(SystemExit, match="shard 2 of 3: predict, row 7: text is null"):
        label(data)
    assert [path.name for path in sorted(out.iterdir())] == [
        "00000-of-00003.jsonl",
        "00001-of-00003.jsonl",
        "settings.json",
    ]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    (out / "00002-of-00003.unfinished").write_text('{"id": 2')  # of a process that was killed
    write(data, ROWS)
    with pytest.raises(SystemExit, match="made otherwise: data_sha256 is '.*' there, '.*' here; give another folder"):
        label(data)
    write(data, [*ROWS[:-1], {**ROWS[-1], "text": None}])
    with pytest.raises(SystemExit, match="shard_rows is 10 there, 5 here"):
        label(data, "--shard-rows", 5)
    FewShotClassifier.from_pretrained(folder).fit(SUPPORT, LABELS[::-1]).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="classifier_sha256"):
        label(data, classifier=tmp_path / "other")
    (out / "00001-of-00003.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="shard 2 of 3"):
        label("rows.jsonl")  # the same file
    first = out / "00000-of-00003.jsonl"
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before[first]
    assert (out / "00001-of-00003.jsonl").read_bytes() == before[out / "00001-of-00003.jsonl"][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"said": "bal"}, "no column 'text'; its columns are"),
        ({"text": "bal", "predicted": "b"}, "a column 'predicted'"),
    ],
)
def test_columns_are_checked_first(label: Any, tmp_path: Path, row: dict[str, str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        label(write(tmp_path / "rows.jsonl", [row]))
    assert not (tmp_path / "out").exists()


def start(*command: Any, **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    given = [sys.executable, *map(str, command)]
    return subprocess.Popen(given, stdout=subprocess.PIPE, text=True, env=environment, **more)


@pytest.mark.slow
def test_two_processes_share_the_shards(folder: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    launch = ["-m", "accelerate.commands.launch", "--num_processes", 2, "--cpu", "--main_process_port", 0]
    done = start(*launch, PATH, folder, data, "--output", out, "--shard-rows", 5)
    shown = done.communicate(timeout=300)[0]
    assert done.returncode == 0
    assert shown.count(": 5 rows\n") == 5
    assert shown.endswith(f"25 rows are labelled, in 5 files of {out}\n")
    assert answers(out) == expected(folder, ROWS)


@pytest.mark.slow
def test_the_shard_of_a_worker_that_dies_is_done_again(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    rows = [{"id": n, "text": " ".join(WORDS[int(digit)] for digit in str(n))} for n in range(60_000)]
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    running = start(PATH, folder, data, "--output", out, "--shard-rows", 10_000, "--ray")
    while not list(out.glob("*.jsonl")) and running.poll() is None:
        time.sleep(0.05)
    workers = [one for one in psutil.Process(running.pid).children(recursive=True) if "Labeller" in one.name()]
    busy = [one for one in workers if one.is_running()]
    assert busy
    assert len(list(out.glob("*.jsonl"))) < 5
    for one in busy:
        one.kill()
    shown = running.communicate(timeout=300)[0]
    assert running.returncode == 0, shown
    assert f"60000 rows are labelled, in 6 files of {out}\n" in shown
    assert answers(out) == expected(folder, rows)
