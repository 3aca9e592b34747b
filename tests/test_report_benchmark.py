"""The benchmarks that report: recorded once and resumed, equal to what users get; figures in documents are theirs."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import WORDS, write_rows
from tests.given import Patch, adapter_of
from textmeta import Corpus, FewShotClassifier
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.meta.evaluation import frozen_prototypes
from textmeta.meta.initialisation import LearnerSettings
from textmeta.sharing.store import load_adapter, save_adapter

ROOT = Path(__file__).parents[1]
FIGURE = r"[+−-]?\d+\.\d+"


@pytest.fixture(autouse=True)
def tiny_baselines(benchmark: Callable[[str], ModuleType], monkeypatch: Patch, tiny_model: str) -> None:
    monkeypatch.setattr(benchmark("baselines"), "encoder_folder", lambda: tiny_model)


@pytest.fixture
def data_dir(corpus: Corpus, tmp_path: Path) -> Path:
    names = WORDS[::12]  # that the tiny encoder knows
    split = {"train": names[:3], "valid": names[3:6], "test": names[6:]}
    (tmp_path / "clinc150.splits.json").write_text(json.dumps({"01": split, "02": split}))
    outside = [{"text": f"{text} {text}", "label": "oos", "split": "test"} for text in corpus.texts[:40]]
    for name in ("toy", "clinc150"):
        write_rows(tmp_path / f"{name}.jsonl", corpus, names)
    (tmp_path / "clinc150_oos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in outside))
    return tmp_path


@pytest.fixture
def accuracy(benchmark: Callable[[str], ModuleType], monkeypatch: Patch) -> ModuleType:
    """The benchmark on one corpus, 6 episodes a cell, 3 a line."""
    module = benchmark("accuracy")
    for name, value in {"EPISODES": 6, "CHUNK": 3, "LONG_EPISODES": 3, "QUICK_EPISODES": 3}.items():
        monkeypatch.setattr(module, name, value)
    for name in ("HEADLINE", "REPORT", "LONG"):
        monkeypatch.setattr(module, name, ("toy",))
        monkeypatch.setattr(benchmark("pictures"), name, ("toy",), raising=False)
    return module


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_cells_are_recorded_once_and_are_what_users_get(
    accuracy: ModuleType, run_script: Callable[..., None], data_dir: Path, tiny_model: str, capsys
) -> None:
    save_adapter(data_dir / "tiny", adapter_of(tiny_model))
    command = ["--data-dir", data_dir, "--adapter", data_dir / "tiny", "--results", data_dir]
    command += ["--parts", "frozen", "textmeta", "long", "--run"]
    run_script(accuracy, *command)
    lines, table = lines_of(data_dir / "report.jsonl"), capsys.readouterr().out
    run_script(accuracy, *command, "--draw")
    assert lines_of(data_dir / "report.jsonl") == lines
    assert capsys.readouterr().out in table
    assert all((data_dir / f"{name}.png").exists() for name in ("accuracy_over_shots", "reliability", "gain_by_corpus"))
    rights = {}
    for line in lines:
        key = line["key"]
        rights.setdefault((key["method"], key["shots"]), []).extend(line["result"]["right"])
    assert {len(rights["plain", 5]), len(rights["names-alone", 1]), len(rights["logistic-views-names-256", 10])} == {6}
    assert ("plain-64", 2) in rights

    (cell,) = accuracy.cells_of(accuracy.report_corpora(data_dir, ["toy"]), [5])
    episodes = [cell.episode(number) for number in range(6)]
    adapter, _ = load_adapter(data_dir / "tiny")
    for method, names in (("prototypes-last-256", None), ("prototypes-last-names-256", True)):
        own = [replace(e, label_names=e.class_names) for e in episodes] if names else episodes
        expected = frozen_prototypes(adapter.load_reader(), own).accuracy
        assert np.array(rights[method, 5]) / 25 == pytest.approx(expected)
    expected = []
    for e in episodes:
        clf = FewShotClassifier(data_dir / "tiny").fit(e.support_texts, e.support_labels)
        expected.append(int((clf.predict(e.query_texts) == e.query_labels).sum()))
    assert rights["plain", 5] == expected
    shown = re.search(r"^\| \*\*textmeta\*\* \|(?:[^|]*\|){2}\s*([\d.]+)±", table, re.MULTILINE)
    assert shown
    assert float(shown[1]) == pytest.approx(4 * np.mean(expected), abs=0.006)


def test_a_quick_run_has_a_file_of_its_own(
    accuracy: ModuleType, run_script: Callable[..., None], data_dir: Path, tiny_model: str, monkeypatch
) -> None:
    save_adapter(data_dir / "tiny", adapter_of(tiny_model))
    monkeypatch.chdir(data_dir)
    run_script(accuracy, "--quick", "--data-dir=.", "--adapter=tiny")
    lines = lines_of(data_dir / "runs" / "quick" / "report.jsonl")
    assert {line["key"]["shots"] for line in lines} == {1, 5, 10}
    assert not (data_dir / "report.jsonl").exists()


def test_a_line_of_many_episodes_stands_for_shorter_ones(benchmark: Callable[[str], ModuleType]) -> None:
    runs = benchmark("runs")

    def key(first: int, count: int, shots: int = 1) -> dict:
        return {"method": "x", "shots": shots, "first": first, "episodes": count}

    asked = [key(0, 5), key(5, 5), key(10, 5), key(0, 5, shots=2)]
    left = runs.missing([runs.Run(part, dict) for part in asked], [{"key": key(0, 12)}])
    assert [run.key for run in left] == asked[2:]


def test_folds_are_trained_and_recorded_once(
    benchmark, run_script, data_dir: Path, tiny_model: str, monkeypatch: Patch
) -> None:
    module = benchmark("unseen_classes")
    small = {"encoder": EncoderSettings(tiny_model, max_length=32), "lora": LoraSettings(rank=4)}
    small |= {"learner": LearnerSettings(layers=(2, 4), steps=1), "precision": "no"}
    folds, few = ("01", "02"), ((1, 5), 4)
    for name, value in {
        **{"CORPORA": ("clinc150",), "FOLDS": folds, "ADAPTERS": {"own": folds, "beside": folds[:1]}, "CHUNK": 2},
        **{"TRAINING": {"clinc150": 2, "beside": 2}, "FIVE_WAY": few, "ALL_WAY": ((1,), 2), "SCOPE": ((1,), 2)},
        **{"GENERAL": replace(module.GENERAL, **small), "CALIBRATION_EPISODES": 20, "AIMS": {("clinc150", 1): 50.0}},
        **{"training_corpora": lambda data_dir: [module.whole(str(data_dir / "toy.jsonl"))]},
    }.items():
        monkeypatch.setattr(module, name, value)
    command = ["--data-dir", data_dir, "--folder", data_dir / "folds", "--cache", data_dir / "frozen", "--run"]
    command += ["--results", data_dir / "lines.jsonl"]
    run_script(module, *command)
    lines = lines_of(data_dir / "lines.jsonl")
    tables = module.tables(lines)
    run_script(module, *command)
    assert lines_of(data_dir / "lines.jsonl") == lines
    sources = load_adapter(data_dir / "folds" / "clinc150-02-own")[0].record["settings"]["corpora"]
    assert [(source["name"], source["classes"]) for source in sources] == [("clinc150-02", 3)]
    rights = [
        line["result"]["right"]
        for line in lines
        if line["key"].get("adapter") == "own" and line["key"]["method"] == "names" and line["key"]["shots"] == 5
    ]
    mean = 4 * np.mean(rights)
    assert "| **names: textmeta** |" in tables["five-way"]
    row = next(line for line in tables["five-way"].splitlines() if line.startswith("| **names: textmeta**"))
    assert float(row.split("|")[3].split("±")[0]) == pytest.approx(mean, abs=0.06)
    areas = [line["result"]["auroc"] for line in lines if line["key"]["method"] == "scope-plain"]
    assert len(areas) == 3
    assert all(0 <= area <= 10**4 for part in areas for area in part)


def test_arms_are_trained_and_judged_once_and_compared_with_the_base_arm(
    benchmark, run_script, data_dir: Path, tiny_model: str, monkeypatch: Patch
) -> None:
    module = benchmark("ablation")
    small = {"encoder": EncoderSettings(tiny_model, max_length=32), "lora": LoraSettings(rank=4), "precision": "no"}
    base = replace(module.GENERAL, **small, learner=LearnerSettings(layers=(2, 4), steps=1), episodes=2)
    arms = {"base": base, "views": replace(base, learner=replace(base.learner, adapt="none"), fixed=("lora.",))}
    for name, value in {"ARMS": arms, "REPORTED": tuple(arms), "HEADLINE": ("toy",), "SHOTS": (1, 5)}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "RESULTS", data_dir / "lines.jsonl")
    monkeypatch.setattr(module, "training_corpora", lambda data_dir: list(module.report_corpora(data_dir, ["toy"])))
    command = ["--data-dir", data_dir, "--folder", data_dir / "arms", "--cache", data_dir / "frozen", "--run"]
    run_script(module, *command, "--episodes=4")
    lines, rights = lines_of(data_dir / "lines.jsonl"), {}
    for line in lines:
        rights[line["key"]["adapter"], line["key"]["method"], line["key"]["shots"]] = line["result"]["right"]
    shutil.rmtree(data_dir / "arms")  # what is recorded needs no adapter
    run_script(module, *command, "--episodes=4")
    assert lines_of(data_dir / "lines.jsonl") == lines

    table = {row.split("|")[1].strip(): re.findall(FIGURE, row) for row in module.tables()["ablation"].splitlines()}
    assert list(table) == ["4 episodes a cell", "---", "base", "views", "base, with names"]
    mean = 4 * np.mean(rights["base", "plain", 5])
    assert float(table["base"][2]) == pytest.approx(mean, abs=0.006)
    for row, one in (("views", ("views", "plain")), ("base, with names", ("base", "names"))):
        apart = 4 * np.mean(np.subtract(rights[*one, 5], rights["base", "plain", 5]))
        assert float(table[row][2]) == pytest.approx(apart, abs=0.006)


def recorded_tables(benchmark: Callable[[str], ModuleType]) -> dict[str, str]:
    accuracy, unseen, runs = benchmark("accuracy"), benchmark("unseen_classes"), benchmark("runs")
    lines = runs.read_lines(unseen.RESULTS)
    made = accuracy.tables(accuracy.recorded(accuracy.RESULTS)) | unseen.tables(lines)
    return made | benchmark("ablation").tables()


PAGES = [ROOT / name for name in ("README.md", "benchmarks/README.md", "docs/core.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_in_documents_are_recorded(benchmark: Callable[[str], ModuleType], page: Path) -> None:
    tables, text = recorded_tables(benchmark), page.read_text(encoding="utf-8")
    assert benchmark("measure").filled(text, tables) == text, "python benchmarks/accuracy.py --write, and the other"
    assert set(re.findall(r"<!-- ([\w-]+) -->", text)) <= {*tables, "end"}
    text = re.sub(r"<!-- [\w-]+ -->.*?<!-- end -->", "", text, flags=re.DOTALL)
    if page.parent.name == "docs":  # beside the default adapter's table it tells of trials that no line has
        text = text.partition("choose.py --data-dir DATA\n```\n")[2].partition("\n\nNames alone")[0]
        assert "| over 0.1" in text
    choose, scores, runs = benchmark("choose"), benchmark("scores"), benchmark("runs")
    lines = [line for path in (choose.BASELINES, choose.CORE) for line in runs.read_lines(path)]
    printed = "\n".join([*tables.values(), *choose.table(scores.accuracies(lines))]).splitlines()
    rows = [[float(figure) for figure in re.findall(FIGURE, row)] for row in printed]
    for line in text.splitlines():
        told = re.findall(r"[+−-]\d+\.\d+|\d+\.\d+(?= ?(?:%|±|points))", line)
        if line.startswith("|"):  # all but the row's title
            told = re.findall(FIGURE, line.split("|", 2)[2])
        assert not told or any(stands_in(told, row) for row in rows), f"{line!r}: no recorded row has {told}"


def stands_in(told: list[str], row: list[float]) -> bool:
    """Whether figures stand in a row, in this order, rounded as they are."""
    left = iter(row)
    figures = [(float(figure.replace("−", "-")), len(figure.partition(".")[2])) for figure in told]
    return all(any(abs(value - other) <= 0.51 * 10**-places for other in left) for value, places in figures)
