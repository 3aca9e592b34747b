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
    command += ["--quick", "true", "--encoder.model", tiny_model, "--tasks", "[1,2]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    distances = [
        float(part.split(": ")[-1]) for part in done.stdout.split("over the norm): ")[1].split(".\n")[0].split("; ")
    ]
    assert len(distances) == 8  # two algorithms, two numbers of tasks, two rivals
    assert max(distances) < 1e-3
    assert done.stdout.count("| maml | ") >= 3
