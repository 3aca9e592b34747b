"""The commands of a classifier: `textmeta fit`, `predict` and `evaluate`."""

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from tests.given import LABELS, NAMES, SUPPORT, TEXTS, Patch, Shown
from tests.test_cli import failure
from tests.test_readme import ROOT
from textmeta import FewShotClassifier
from textmeta.cli import main
from textmeta.encoder.pretrained import CARRIED_PACKAGE
from textmeta.errors import TrainingInterrupted

ROWS = [{"id": str(number), "text": text, "note": 'a "b", ü'} for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(shared: FewShotClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted classifier."""
    path = tmp_path_factory.mktemp("commands") / "fitted"
    shared.save_pretrained(path)
    return path


def write_table(path: Path, columns: dict[str, list[Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def run(*arguments: Any) -> None:
    main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("given", "how"),
    [
        ({}, {}),
        ({"--label-names": "none"}, {"label_names": None}),
        ({"--label-names": json.dumps(NAMES)}, {"label_names": NAMES}),
        ({"--unlabelled": "bal bel\n\nfim fon\r\nkil\n"}, {"unlabelled": ["bal bel", "fim fon", "kil"]}),
    ],
    ids=["plain", "no names", "names", "unlabelled"],
)
def test_fit_is_that_of_python(folder: Path, tmp_path: Path, capsys: Shown, given: Any, how: Any) -> None:
    examples = write_table(tmp_path / "e.csv", {"said": SUPPORT, "meant": LABELS}, ";")
    for name, content in given.items():
        if content != "none":
            (tmp_path / "given.txt").write_text(content, encoding="utf-8")
            given = {name: tmp_path / "given.txt"}
    options = [part for pair in given.items() for part in pair]
    columns = ["--text-column", "said", "--label-column", "meant"]
    output = tmp_path / "made"
    run("fit", examples, "--output", output, "--adapter", folder, *columns, *options)
    assert capsys.readouterr().out == f"6 examples, 3 classes: the classifier is in {output}\n"
    made, expected = FewShotClassifier.from_pretrained(output), FewShotClassifier(folder).fit(SUPPORT, LABELS, **how)
    np.testing.assert_array_equal(made.predict_proba(TEXTS), expected.predict_proba(TEXTS))
    assert made.support_ is None


def test_fit_by_names_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(NAMES), encoding="utf-8")
    run("fit", "--output", tmp_path / "made", "--adapter", folder, "--label-names", tmp_path / "names.json")
    assert FewShotClassifier.from_pretrained(tmp_path / "made").classes_.tolist() == sorted(NAMES)


@pytest.mark.parametrize(
    ("source", "to", "piped"),
    [
        *(("lines", "jsonl", True), ("lines", "csv", False), ("csv", "csv", True), ("csv", "jsonl", False)),
        *(("tsv", "tsv", False), ("jsonl", "jsonl", True), ("jsonl", "csv", False)),
    ],
)
def test_predict_answers_each_row(
    folder: Path, tmp_path: Path, capsys: Shown, monkeypatch: Patch, source: str, to: str, piped: bool
) -> None:
    monkeypatch.setitem(FewShotClassifier.__init__.__kwdefaults__, "batch_size", 4)
    texts = tmp_path / f"texts.{source}"
    if source == "lines":
        texts.write_bytes("\r\n".join(TEXTS).encode() + b"\n")  # the last one is empty
    elif source == "jsonl":
        texts.write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    else:
        write_table(texts, {name: [row[name] for row in ROWS] for name in ROWS[0]}, "\t" if source == "tsv" else ";")
    if piped:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts.read_bytes()), encoding="ascii"))
        run("predict", folder, "--from", source, "--to", to, "--probabilities")
        shown = capsys.readouterr().out
    else:
        run("predict", folder, texts, "--output", tmp_path / f"answers.{to}", "--probabilities")
        shown = (tmp_path / f"answers.{to}").read_bytes().decode()
    assert "\r" not in shown
    table = csv.DictReader(shown.splitlines(), delimiter="\t" if to == "tsv" else ",")
    found: list[Any] = [json.loads(line) for line in shown.splitlines()] if to == "jsonl" else list(table)

    classifier = FewShotClassifier.from_pretrained(folder)
    expected, labels = classifier.predict_proba(TEXTS), classifier.classes_.tolist()
    assert [row["predicted"] for row in found] == classifier.predict(TEXTS).tolist()
    for row, numbers in zip(found, expected, strict=True):
        every = [row["probabilities"][c] if to == "jsonl" else float(row[f"probability of {c}"]) for c in labels]
        np.testing.assert_allclose([*every, float(row["probability"])], [*numbers, numbers.max()], atol=1e-6)
    kept = ["text"] if source == "lines" or (source, to) == ("jsonl", "csv") else list(ROWS[0])
    assert [{name: value for name, value in row.items() if name[0] != "p"} for row in found] == [
        {name: row[name] for name in kept} for row in ROWS
    ]


def test_predict_without_options(folder: Path, tmp_path: Path, capsys: Shown) -> None:
    """What goes out has the form of what comes in; half of a character does no harm; no row, no answer."""
    for name, content, form in (
        ("a.txt", "bal bel bil\n", '{"text": "bal bel bil", "predicted": "b", "probability": N}\n'),
        ("a.csv", "text,n\n\nbal bel bil,1\n", "text,n,predicted,probability\nbal bel bil,1,b,N\n"),
        ("a.csv", "text,n\n", "text,n,predicted,probability\n"),
        ("a.jsonl", r'{"text": "bal \ud800"}', r'{"text": "bal \ud800", "predicted": "b", "probability": N}' + "\n"),
        ("a.jsonl", "", ""),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        run("predict", folder, tmp_path / name)
        shown = capsys.readouterr().out
        number = shown.rstrip("}\n").rpartition(" " if "{" in shown else ",")[2]
        assert shown == (form.replace("N", number) if "N" in form else form)


def test_predict_writes_into_a_pipe_that_is_named_as_output(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR)
    (tmp_path / "a.txt").write_text("bal bel bil\n", encoding="utf-8")
    run("predict", folder, tmp_path / "a.txt", "--output", tmp_path / "pipe")
    assert b'"predicted": "b"' in os.read(reader, 1000)
    os.close(reader)


def test_labels_keep_their_type_in_json(classifier: FewShotClassifier, tmp_path: Path, capsys: Shown) -> None:
    numbers = [ord(label) for label in LABELS]
    classifier.fit(SUPPORT, numbers).save_pretrained(tmp_path / "m")
    (tmp_path / "a.txt").write_text("bal bel bil\n", encoding="utf-8")
    run("predict", tmp_path / "m", tmp_path / "a.txt")
    assert json.loads(capsys.readouterr().out)["predicted"] == ord("b")
    run("evaluate", tmp_path / "m", write_table(tmp_path / "e.csv", {"text": SUPPORT, "label": numbers}), "--json")
    assert json.loads(capsys.readouterr().out)["classes"].keys() == {"98", "102", "107"}


@pytest.mark.filterwarnings("default:predict:UserWarning")
def test_a_warning_is_one_line_once(folder: Path, tmp_path: Path, capsys: Shown, monkeypatch: Patch) -> None:
    monkeypatch.setitem(FewShotClassifier.__init__.__kwdefaults__, "batch_size", 2)
    (tmp_path / "a.txt").write_text("你好\n世界\n你好 世界\n", encoding="utf-8")
    run("predict", folder, tmp_path / "a.txt")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("textmeta: predict: most tokens of 2 of the first 2 texts are unknown")


def shell(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script that knows the command ``textmeta``."""
    command = f'textmeta() {{ {shlex.quote(sys.executable)} -m textmeta "$@"; }}\n{script}'
    run = ["bash", "-eo", "pipefail", "-c", command]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(run, capture_output=True, text=True, check=True, timeout=300, env=environment, **options)


def test_a_pipe_that_ends_is_no_error(folder: Path) -> None:
    """Of texts without end, as many are read as somebody wants answers for."""
    done = shell(f"(yes bal bel bil || true) | textmeta predict {folder} | head -3\n textmeta info {folder} | true")
    assert [json.loads(line)["predicted"] for line in done.stdout.splitlines()] == ["b"] * 3
    assert not done.stderr


@pytest.mark.slow  # for it takes the encoder of the demo extra
def test_the_commands_of_the_guide_run(tmp_path: Path) -> None:
    pytest.importorskip(CARRIED_PACKAGE)
    section = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("## On the command line")[2]
    shown = section.partition("```console\n")[2].partition("```")[0]
    done = shell(shown, cwd=tmp_path)
    assert "3 classes: the classifier is in cards" in done.stdout
    assert '"text": "someone took my wallet", "predicted": "lost card", "probability": 0.' in done.stdout
    assert "accuracy  100.00 % [" in done.stdout


def test_evaluate(folder: Path, tmp_path: Path, capsys: Shown) -> None:
    labels = [*"bfbbk", "other"]
    texts = [text or "gur" for text in TEXTS]
    examples = write_table(tmp_path / "e.csv", {"text": texts, "label": labels})
    predicted = FewShotClassifier.from_pretrained(folder).predict(texts).tolist()
    right = sum(map(str.__eq__, predicted, labels))
    interval = binomtest(right, 6).proportion_ci(method="wilson")
    assert 0 < right < 6

    run("evaluate", folder, examples, "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["texts"], found["accuracy"]) == (6, right / 6)
    assert found["accuracy_interval"] == pytest.approx([interval.low, interval.high])
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["classes"]["other"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    of_b = [given for given, label in zip(predicted, labels, strict=True) if label == "b"]
    assert found["classes"]["b"]["recall"] == of_b.count("b") / len(of_b)

    run("evaluate", folder, examples)
    shown = capsys.readouterr().out
    low, high = (100 * end for end in interval)
    assert f"accuracy  {100 * right / 6:.2f} % [{low:.2f}, {high:.2f}], 95 % confidence, 6 texts\n" in shown
    assert f"macro-F1  {100 * found['macro_f1']:.2f} %\n" in shown
    assert re.search(r"^ +other +0\.00 +0\.00 +0\.00 +1$", shown, re.M)


# Errors and exit codes


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["fit", "file.csv", "--output", "file.csv"], "text,label\na,b\n", "there is a file of that name"),
        (["fit", "no-such.csv", "--output", "m"], "", "no such file: no-such.csv"),
        (["fit", "file.csv", "--output", "m"], "text,lable\na,b\n", "no column 'label'"),
        (["fit", "--output", "m"], "", "fit without examples needs label_names"),
        (["fit", "file.csv", "--output", "m", "--label-names", "nmes.json"], "text,label\na,b\n", "nmes.json"),
        (["fit", "file.csv", "--outptu", "m"], "", "required: --output"),
        (["predict", "no-such", "file.txt"], "", "no-such"),
        (["predict", "M", "no-such.txt"], "", "no-such.txt"),
        (["predict", "M", "file.csv"], "said,n\na,1\n", "a column 'text', and none twice; its columns are 'said', 'n'"),
        (["predict", "M", "file.csv"], "n,text\n1,a\n2\n", "file.csv, line 3: expected a string as 'text'"),
        (["predict", "M", "file.csv"], "text,predicted\na,1\n", "has a column 'predicted'"),
        (["predict", "M", "file.csv"], "text\n" + "a" * 200_000, "file.csv, line 2: field larger"),
        (["predict", "M", "file.csv"], '"text"x,n\na,1\n', "file.csv, line 1: "),
        (["predict", "M", "file.jsonl"], '{"text": "a"}\n\n{"text": null}\n', "file.jsonl, line 3: expected"),
        (["predict", "M", "file.jsonl"], "[" * 100_000, "file.jsonl, line 1: "),
        (["predict", "M", "file.jsonl"], '{"text": "a", "n": NaN}\n', "file.jsonl, line 1: NaN is no number of JSON"),
        (["predict", "M", "file.jsonl"], '{"text": "a", "n": -1e999}\n', "file.jsonl, line 1: -1e999 is no number"),
        (["predict", "M", "file.csv", "--output", "file.jsonl"], "text\na\nb,2\n", "file.csv, line 3: expected"),
        (["predict", "M", "file.csv", "--output", "o.xlsx"], "", "o.xlsx: expected .json, .jsonl, .csv, .tsv or .txt"),
        (["predict", "M", "file.txt"], "good\ncaf\udce9\n", "file.txt, line 2: expected lines, CSV or JSON"),
        (["predict", "M", "file.txt", "--output", "file.txt"], "a\n", "is the file of the texts itself"),
        (["predict", "M", "file.txt", "--output", "no/such"], "a\n", "no/such"),
        (["predict", "textmeta/minilm-general", "file.txt", "--encoder", "M"], "a\n", "textmeta: "),
        (["evaluate", "M", "file.csv"], "text,label\na,no\n", "none of the labels that the classifier knows: 'b'"),
    ],
)
def test_what_cannot_be_used_ends_in_a_line(
    folder: Path, tmp_path: Path, capsys: Shown, monkeypatch: Patch, arguments: list[str], content: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written = content.encode(errors="surrogateescape")
    files = {Path(argument) for argument in arguments if argument.startswith("file.")}
    for file in files:
        file.write_bytes(written)
    assert message in failure([folder if argument == "M" else argument for argument in arguments], capsys)
    assert set(Path().iterdir()) == files, "nothing is made, not even a part"
    assert [file.read_bytes() for file in files] == [written] * len(files)


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (TrainingInterrupted("stopped"), 130), (TrainingInterrupted("stopped", 15), 143)],
)
def test_interrupted_has_a_code_of_its_own(
    folder: Path, tmp_path: Path, capsys: Shown, monkeypatch: Patch, error: BaseException, code: int
) -> None:
    monkeypatch.setattr(FewShotClassifier, "predict_stream", Mock(side_effect=error))
    (tmp_path / "a.txt").write_text("bal bel\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        run("predict", folder, tmp_path / "a.txt")
    assert ended.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1
