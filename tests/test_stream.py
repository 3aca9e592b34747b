"""Any number of texts: a stream of them, and a data set, shard by shard."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from tqdm import tqdm

from tests.given import LABELS, SUPPORT, TEXTS, Patch, Shown
from tests.hub.server import HubServer
from tests.test_long_texts import LONG
from tests.test_recipes import RECIPES
from textmeta import Adapter, FewShotClassifier, progress
from textmeta.classifier import NotFittedError
from textmeta.errors import DataError, SettingsError

MANY = [f"{first} {second}" for first in TEXTS for second in TEXTS]  # 36


@pytest.fixture
def fitted(adapter: Adapter) -> FewShotClassifier:
    return FewShotClassifier(adapter, batch_size=5).fit(SUPPORT, LABELS)


@pytest.mark.parametrize("batch_size", [1, 5, 36, 512])
def test_answers_are_those_of_the_whole_list(fitted: FewShotClassifier, batch_size: int) -> None:
    for k in (1, 2, 9):
        expected = fitted.set_params(batch_size=512).predict_top(MANY, k)
        found = list(fitted.set_params(batch_size=batch_size).predict_stream(iter(MANY), k))
        assert [[label for label, _ in row] for row in found] == [[label for label, _ in row] for row in expected]
        numbers = [[[p for _, p in row] for row in rows] for rows in (found, expected)]
        np.testing.assert_allclose(*numbers, rtol=0, atol=1e-6)
        assert found == fitted.predict_top(MANY, k), "in the same batches"


def test_whatever_holds_texts_is_taken_or_refused(fitted: FewShotClassifier) -> None:
    for texts in (np.array(TEXTS), pd.DataFrame({"text": TEXTS}), "bal bel", iter(())):
        assert list(fitted.predict_stream(texts)) == fitted.predict_top(texts, 1)
    for wrong in (pd.DataFrame({"text": TEXTS, "n": 1}), {"bal", "fim"}, 7):
        with pytest.raises(DataError, match="predict_stream: expected a list, or one column, of texts"):
            fitted.predict_stream(wrong)  # type: ignore[arg-type]
    for k, total in ((0, None), (1, -1)):
        with pytest.raises(SettingsError, match="given"):
            fitted.predict_stream(TEXTS, k, total=total)
    with pytest.raises(NotFittedError):
        FewShotClassifier().predict_stream(TEXTS)


def test_a_batch_is_read_ahead_and_closing_is_clean(fitted: FewShotClassifier) -> None:
    read: list[str] = []
    bars = len(getattr(tqdm, "_instances", ()))
    stream = fitted.predict_stream(read.append(text) or text for text in MANY)  # type: ignore[func-returns-value]
    assert read == []
    expected = fitted.predict_top(MANY, 1)
    fitted.fit(SUPPORT, LABELS[::-1])  # the stream goes on by the task that it began with
    for number, row in enumerate(expected[:12]):
        assert next(stream) == row
        assert len(read) == 5 * (number // 5 + 1)
        assert not torch.is_inference_mode_enabled()
    stream.close()  # type: ignore[attr-defined]
    assert len(getattr(tqdm, "_instances", ())) == bars
    assert list(stream) == []
    assert len(read) == 15


def test_errors_name_the_row_of_the_stream(fitted: FewShotClassifier) -> None:
    stream = fitted.predict_stream(iter([*MANY[:13], None, "bal"]))  # type: ignore[list-item]
    assert [next(stream) for _ in range(10)] == fitted.predict_top(MANY[:10], 1)
    with pytest.raises(DataError, match="predict, row 13: text is null"):
        next(stream)


def test_warnings_come_once_and_soon(fitted: FewShotClassifier) -> None:
    """With the first batch that has such texts: a stream may be long, or have no end."""
    fitted.set_params(max_length=10).fit(SUPPORT, LABELS)
    stream = fitted.predict_stream(["bal"] * 6 + [LONG, "bal", LONG, "bal", LONG, "卡"] * 3)
    assert len([next(stream) for _ in range(5)]) == 5  # warnings are errors here
    with pytest.warns(UserWarning, match="predict: 2 of the first 10 texts are cut at 10 .* row 6, 'bal") as found:
        next(stream)
    assert [warning.filename for warning in found] == [__file__]
    with pytest.warns(UserWarning, match="most tokens of 1 of the first 15 .* row 11") as found:
        assert len(list(stream)) == 18
    assert len(found) == 1


def test_a_bar_has_rate_and_remaining_time(fitted: FewShotClassifier, capsys: Shown, monkeypatch: Patch) -> None:
    list(fitted.predict_stream(MANY))
    assert capsys.readouterr().err == "", "not before it takes long"
    monkeypatch.setattr(progress, "BAR_AFTER", 1e-9)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    for texts, total in ((MANY, None), (map(str, MANY), 36), (map(str, MANY), None)):
        assert len(list(fitted.predict_stream(texts, total=total))) == 36
        shown = capsys.readouterr().err
        assert " texts/s" in shown
        assert ("/36 [" in shown) == (texts is MANY or total is not None)
    fitted.predict(MANY)
    assert "predict:" in capsys.readouterr().err
    list(fitted.set_params(progress=False).predict_stream(MANY))
    assert capsys.readouterr().err == ""


MEMORY = """
import resource, sys
from textmeta import FewShotClassifier
words = ["bal", "bel", "fim", "fon", "gur", "dal", "kes", "dis", "dur", "你"]
texts = (" ".join(words[int(digit)] for digit in str(number)) for number in range(int(sys.argv[1])))
classifier = FewShotClassifier.from_pretrained("fitted", progress=False)
assert sum(1 for _ in classifier.predict_stream(texts, 2)) == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_texts(run: Any) -> None:
    command = [sys.executable, "-c", MEMORY]
    counts = ("10000", os.environ.get("TEXTMETA_TEXTS", "100000"))
    runs = (subprocess.run([*command, count], stdout=subprocess.PIPE, check=True) for count in counts)
    few, many = (float(run.stdout) for run in runs)
    print(f"{few:.0f} MiB for {counts[0]} texts, {many:.0f} for {counts[1]}")
    assert many - few < 25, "MiB: a list of the answers alone would be some 50"


# recipes/predict_dataset.py

WORDS = ["bal", "bel", "fim", "fon", "gur", "dal", "kes", "dis", "dur", "kel"]
ROWS = [{"id": n, "text": " ".join(WORDS[int(digit)] for digit in str(n)), "note": 'ü, "b"'} for n in range(30_000)]
FEW = ROWS[:25]
PATH = str(RECIPES / "predict_dataset.py")


@pytest.fixture
def run(fitted: FewShotClassifier, tmp_path: Path, monkeypatch: Patch) -> Any:
    """Runs the recipe in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    fitted.save_pretrained("fitted")

    def label(data: str, *more: str, classifier: str = "fitted") -> None:
        monkeypatch.setattr(sys, "argv", [PATH, classifier, data, "--output", "out", "--shard-rows=10", *more])
        runpy.run_path(PATH, run_name="__main__")

    return label


def write(rows: list[dict[str, Any]]) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "rows.jsonl"


def check(rows: list[dict[str, Any]], form: str = "json") -> None:
    """Check the answers of all shards in order, by a reader of others."""
    files = [str(path) for path in sorted(Path("out").glob("*-of-*"))]
    found = datasets.load_dataset(form, data_files=files, split="train", cache_dir="read").to_list()
    tops = FewShotClassifier.from_pretrained("fitted").predict_top([row["text"] for row in rows], 1)
    told = [{"predicted": label, "probability": pytest.approx(p, abs=2e-6)} for ((label, p),) in tops]
    assert found == [{**row, **more} for row, more in zip(rows, told, strict=True)]


@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet", "hub"])
def test_every_row_is_answered(run: Any, hub: HubServer, capsys: Shown, source: str) -> None:
    data, form = write(FEW), "parquet" if source == "parquet" else "jsonl"
    if source == "hub":
        hub.add_repo("lab/rows", {"train.jsonl": Path(data).read_bytes()}, repo_type="dataset")
        data = "lab/rows"
    elif source != "jsonl":
        getattr(datasets.Dataset.from_list(FEW), f"to_{source}")(data := f"rows.{source}")
    run(data, "--to", form)
    assert f"25 rows are labelled, in 3 files of {Path('out').absolute()}\n" in capsys.readouterr().out
    shards = [f"0000{number}-of-00003.{form}" for number in range(3)]
    assert sorted(path.name for path in Path("out").iterdir()) == [*shards, "settings.json"]
    check(FEW, form.removesuffix("l"))


def test_shards_that_are_there_are_not_done_again(run: Any) -> None:
    wrong = [*FEW[:-1], {**FEW[-1], "text": None}]
    for row in ({"said": "bal"}, {"text": "bal", "predicted": "b"}):
        with pytest.raises(SystemExit, match=r"no column 'text'; its columns are|a column 'predicted'"):
            run(write([row]))
    assert not Path("out").exists()
    with pytest.raises(SystemExit, match="shard 2 of 3: predict, row 7: text is null"):
        run(write(wrong))
    first, second = sorted(Path("out").glob("*-of-*"))
    before = first.read_bytes(), first.stat().st_mtime_ns, second.read_bytes()
    Path("out/00002-of-00003.unfinished").write_text('{"id": 2')  # of a process that was killed
    with pytest.raises(SystemExit, match=r"made otherwise: data_sha256 is '.*' there, '.*' here; give another folder"):
        run(write(FEW))
    with pytest.raises(SystemExit, match="shard_rows is 10 there, 5 here"):
        run(write(wrong), "--shard-rows=5")
    FewShotClassifier("fitted").fit(SUPPORT, LABELS[::-1]).save_pretrained("other")
    with pytest.raises(SystemExit, match="classifier_sha256"):
        run(write(wrong), classifier="other")
    second.unlink()
    with pytest.raises(SystemExit, match="shard 2 of 3"):
        run(str(Path(write(wrong)).absolute()))  # the same file
    assert (first.read_bytes(), first.stat().st_mtime_ns, second.read_bytes()) == before


def start(*command: str, rows: int) -> subprocess.Popen[str]:
    given = [*command, "fitted", write(ROWS[:rows]), "--output", "out", f"--shard-rows={rows // 5}", "--precision=no"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen([sys.executable, *given], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_processes_share_the_shards(run: Any) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    shown = start(*launch, PATH, rows=25).communicate(timeout=300)[0]
    assert shown.count(": 5 rows\n") == 5
    assert shown.endswith(f"25 rows are labelled, in 5 files of {Path('out').absolute()}\n")
    check(FEW)


@pytest.mark.slow
def test_the_shard_of_a_worker_that_dies_is_done_again(run: Any) -> None:
    pytest.importorskip("ray")
    running = start(PATH, "--ray", rows=30_000)
    while running.poll() is None and not list(Path("out").glob("*.jsonl")):
        time.sleep(0.05)
    workers = [
        one for one in psutil.Process(running.pid).children(recursive=True) if "MapWorker" in " ".join(one.cmdline())
    ]
    assert workers
    assert len(list(Path("out").glob("*.jsonl"))) < 4
    for worker in workers:
        worker.kill()
    assert "30000 rows are labelled, in 5 files" in running.communicate(timeout=300)[0]
    check(ROWS)
