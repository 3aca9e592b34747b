"""The benchmarks run end to end, on the tiny encoder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from textmeta import Corpus

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_engine(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    rows = [{"text": t, "label": corpus.class_names[c]} for t, c in zip(corpus.texts, corpus.labels, strict=True)]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(ROOT / "benchmarks" / "engine.py"), "--data", str(tmp_path / "toy.jsonl")]
    command += ["--quick", "true", "--encoder.model", tiny_model, "--tasks", "[1,6]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    line = done.stdout.split("over the norm): ")[1].split(".\n")[0]
    distances = [float(part.split(": ")[-1]) for part in line.split("; ")]
    assert len(distances) == 8  # two algorithms, two numbers of tasks, two rivals
    assert max(distances) < 1e-3
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("| ")
    ]
    speed = [row for row in rows if row[0] in ("fomaml", "maml") and row[1] in ("1", "6")]
    assert len(speed) == 4
    for row in speed:
        loop, _, own, filled, ratio, _ = map(float, row[2:])
        assert 0 < filled <= own
        assert 0.5 < ratio / (filled / loop) < 2  # medians of ratios are near ratios of medians
    memory = {
        (row[0], row[1], row[2]): float(row[3]) for row in rows if row[0] in ("loop", "textmeta", "textmeta-kept")
    }
    assert len(memory) == 7
    assert memory["textmeta", "maml", "8"] < memory["textmeta-kept", "maml", "8"]
    growth = {row[0]: row for row in rows if row[0] in ("tasks", "steps", "ways", "tokens", "rank")}
    assert len(growth) == 5


@pytest.mark.slow
def test_task_embedding(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    rows = [{"text": t, "label": corpus.class_names[c]} for t, c in zip(corpus.texts, corpus.labels, strict=True)]
    trained = ("banking77", "clinc150", "stackoverflow", "dbpedia14", "snips")
    for name in (*trained, "huffpost", "20news", "trec6", "tweeteval_emotion"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fold = {"train": corpus.class_names[:7], "valid": [], "test": corpus.class_names[7:]}
    (tmp_path / "clinc150.splits.json").write_text(json.dumps({"01": fold}))
    command = [sys.executable, str(ROOT / "benchmarks" / "task_embedding.py"), "--data-dir", str(tmp_path), "--quick"]
    command += ["--encoder.model", tiny_model, "--results", str(tmp_path / "results.jsonl")]

    def run(*more: str) -> str:
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run("--parts", "[report,transfer]")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 6
    run()  # the other parts, and nothing twice
    everything = (tmp_path / "results.jsonl").read_text().splitlines()
    assert everything[:6] == lines
    assert len(everything) == 6 + 6 + 1  # variants with one corpus left out, one training of the task encoder
    tables = run("--tables")
    assert first.split("## transfer")[1] in tables
    assert [tables.count(f"## {part}") for part in ("choose", "report", "retrieval", "transfer")] == [1, 1, 1, 1]
    found = {line["key"].get("variant"): line["result"] for line in map(json.loads, lines)}
    assert set(found["not trained"]["huffpost 1"]["mean"]) == {"start"}
    cell = found["banks"]["clinc150 5"]
    assert {"true", "within", "between", "mean"} <= set(cell)
    assert cell["queries"] == 25
    assert all(0 <= right <= 25 for right in cell["true"]["adapted"]["right"])
