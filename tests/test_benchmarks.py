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
