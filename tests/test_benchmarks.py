"""The benchmarks run on the tiny encoder: the engine beside the plain loop, speed, training of an arm."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import write_rows
from tests.given import Patch, Shown, adapter_of
from textmeta.data.corpus import Corpus
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.errors import AdapterError
from textmeta.meta import trainer as trainer_module
from textmeta.meta.initialisation import LearnerSettings
from textmeta.sharing.store import load_adapter, save_adapter


@pytest.fixture
def toy(corpus: Corpus, tmp_path: Path) -> Path:
    """The toy corpus as a file."""
    return write_rows(tmp_path / "toy.jsonl", corpus)


@pytest.mark.parametrize("adapt", ["pooling", "lora"])
def test_the_engine_returns_the_gradient_of_a_plain_loop(
    adapt: str, benchmark, run_script, toy: Path, tiny_model: str, capsys: Shown
) -> None:
    arguments = ["--data", toy, "--model", tiny_model, "--tasks=2", "--repeats=1", "--adapt", adapt, "--threads=1"]
    run_script(benchmark("engine"), *arguments)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows[2:]] == [["fomaml", "2"], ["maml", "2"]]
    for *_, fresh, cached, distance in rows[2:]:
        assert float(fresh) > 0
        assert float(cached) > 0
        assert float(distance) < 1e-4


@pytest.mark.slow
def test_an_arm_is_trained_and_another_goes_on_from_it(
    benchmark, run_script, toy: Path, tiny_model: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    core = benchmark("ablation")
    monkeypatch.setattr(trainer_module, "CALIBRATION_EPISODES", 5)
    small = {"encoder": EncoderSettings(tiny_model, max_length=32), "lora": LoraSettings(rank=4), "episodes": 4}
    two = {"layers": (2, 4)}
    arms = {name: replace(arm, **small, learner=replace(arm.learner, **two)) for name, arm in core.ARMS.items()}
    arms["no-centre"] = replace(arms["no-centre"], learner=LearnerSettings(layers=(2, 4), steps=1))
    monkeypatch.setattr(core, "ARMS", arms)
    (tmp_path / "corpora.csv").write_text("corpus,source,licence\none,here,MIT\n")
    monkeypatch.setattr(sys.modules["general"], "CORPORA", tmp_path / "corpora.csv")
    (tmp_path / "one.jsonl").write_text(toy.read_text())

    def trained(arm: str) -> dict[str, torch.Tensor]:
        places = ["--data-dir", tmp_path, "--folder", tmp_path, "--cache", tmp_path / "frozen"]
        run_script(core, "--train", arm, *places)
        return load_adapter(tmp_path / arm)[0].initialisation.tensors()

    with pytest.raises(AdapterError, match="no-names"):  # which comes before
        trained("names-after")
    before, after = trained("no-names"), trained("names-after")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "name_gate" in changed
    assert changed <= {name for name in after if "name" in name} | {"log_zero_shot_scale"}
    without = trained("no-centre")
    assert without["log_centre_strength"] == -30
    assert not without["centre"].any()


def test_scopes_tell_other_classes(benchmark, run_script, toy: Path, tiny_model: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "choose").mkdir()
    toy.rename(tmp_path / "choose" / "toy.jsonl")
    adapter = adapter_of(tiny_model, scope=torch.eye(8)[0])  # the largest probability alone tells
    save_adapter(tmp_path / "adapter", adapter)
    arguments = ["--data-dir", tmp_path, "--table=scope", "--episodes=2", "--adapter", tmp_path / "adapter"]
    run_script(benchmark("other_classes"), *arguments)
    _, name, _, scope, largest, _ = capsys.readouterr().out.splitlines()[2].split("|")
    assert name.strip() == "toy"
    assert scope == largest != " 50.0 "
    save_adapter(tmp_path / "adapter", replace(adapter, scope=None))
    with pytest.raises(SystemExit):
        run_script(benchmark("other_classes"), *arguments)
