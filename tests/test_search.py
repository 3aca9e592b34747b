"""The search for settings of meta-training, on the tiny encoder."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import write_rows
from tests.test_recipes import recipe
from textmeta import Corpus
from textmeta.meta import outer_loop
from textmeta.meta import trainer as trainer_module
from textmeta.meta.trainer import MetaTrainer

optuna = pytest.importorskip("optuna")


def test_values_are_put_where_they_belong() -> None:
    search = recipe("search")
    values = {name: part.high if hasattr(part, "high") else part.choices[-1] for name, part in search.SPACE.items()}
    changed = search.with_values(MetaTrainer(), values)
    assert (changed.lora_rate, changed.lora.rank, changed.learner.steps) == (3e-3, 16, 8)
    assert changed.encoder == MetaTrainer().encoder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # optuna's
def test_a_search_goes_on_in_the_middle_of_a_trial(
    corpus: Corpus, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search, output, data = recipe("search"), tmp_path / "search", tmp_path / "toy.jsonl"
    write_rows(data, corpus)
    for name, value in {"CALIBRATION_EPISODES": 5, "WARMUP": 1, "VALIDATE_EVERY": 1, "VALIDATION_EPISODES": 4}.items():
        monkeypatch.setattr(outer_loop if hasattr(outer_loop, name) else trainer_module, name, value)

    def run(*more: str) -> str:
        arguments = ["--data", str(data), "--output", str(output), "--encoder.model", tiny_model, "--episodes=6"]
        monkeypatch.setattr(sys, "argv", ["search.py", *arguments, *more])
        search.main()
        return capsys.readouterr().out

    first = run("--trials=1")
    record = (output / "trial-000" / "record.jsonl").read_text().splitlines()
    best = max(json.loads(line)["valid_accuracy"] for line in record)
    assert f"The best told {100 * best:.2f} %" in first
    # as if killed in a second trial, once it was drawn
    left = optuna.load_study(study_name="search", storage=f"sqlite:///{output / 'study.db'}").ask(search.SPACE)
    assert f"trial 2 of 2: {left.params}" in run("--trials=2")
    assert sorted(path.name for path in output.glob("trial-*")) == ["trial-000", "trial-001"]
    assert "trial " not in run("--trials=2")
    with pytest.raises(SystemExit, match="another folder"):
        run("--trials=2", "--seed=1")
