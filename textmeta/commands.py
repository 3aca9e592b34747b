"""What `textmeta fit`, `predict` and `evaluate` do."""

import csv
import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from scipy.stats import binomtest
from sklearn.metrics import classification_report, precision_recall_fscore_support

from textmeta.classifier import FewShotClassifier
from textmeta.data.corpus import CorpusSettings, load_corpus
from textmeta.data.labels import few, label_to_json, plain
from textmeta.data.texts import ENDINGS, open_texts, text_format
from textmeta.errors import AdapterError, DataError, SettingsError
from textmeta.files import at_home, open_to_replace, read_json
from textmeta.sharing.folder import check_destination

DIGITS = 6  # of a probability that is written
PREDICTED, PROBABILITY, PROBABILITIES, OF = "predicted", "probability", "probabilities", "probability of "


def fit(options: Namespace) -> None:
    """Fit a classifier to the examples of a file, to names of classes, or to both, and save it."""
    output = at_home(Path(options.output))
    check_destination(output)  # what might fail goes before what takes long
    texts, labels = _examples(options) if options.examples else ([], [])
    names: Any = None if options.label_names == "none" else options.label_names
    if names not in (None, "auto"):
        path = at_home(Path(names))
        names = read_json(path.read_bytes(), path, DataError)
    more: list[str] = []
    if options.unlabelled:
        with open_texts(options.unlabelled, None, options.text_column) as (_, rows):
            more = [text for row in rows if (text := row[options.text_column]).strip()]
    classifier = FewShotClassifier(**_given(options, "adapter", "encoder", "device"))
    classifier.fit(texts, labels, label_names=names, unlabelled=more)
    classifier.save_pretrained(output)
    print(f"{len(texts)} examples, {len(classifier.classes_)} classes: the classifier is in {output}")


def predict(options: Namespace) -> None:
    """Predict the label of each text, however many there are."""
    source, column, output = options.texts, options.text_column, options.output and at_home(Path(options.output))
    if output and source != "-" and output.exists() and output.samefile(at_home(source)):
        raise SettingsError(f"--output {output} is the file of the texts itself")
    if output and not options.to and output.suffix.lower() not in ("", ".txt", *ENDINGS):
        raise SettingsError(f"--output {output}: expected {', '.join(ENDINGS)} or .txt, or --to csv or jsonl")
    form = options.to or (text_format(options.output) if output else options.from_ or text_format(source))
    with open_texts(source, options.from_, column) as (columns, rows):
        check_free(columns, source)
        classifier = _fitted(options, progress=bool(output) or not sys.stdout.isatty())
        how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        if not output:  # whoever waits at the other end of a pipe has each answer at once
            sys.stdout.reconfigure(**how, line_buffering=True)  # type: ignore[union-attr]
        with open_to_replace(output, **how) if output else nullcontext(sys.stdout) as file:
            if form == "csv":
                every = [OF + str(label) for label in classifier.classes_.tolist()] if options.probabilities else []
                kind = "excel-tab" if output and output.suffix.lower() == ".tsv" else "excel"
                named = [*columns, PREDICTED, PROBABILITY, *every]
                table = csv.DictWriter(file, named, extrasaction="ignore", dialect=kind, lineterminator="\n")
                table.writeheader()
            kept, read = itertools.tee(rows)  # of which a batch is in memory
            texts, count = (row[column] for row in read), len(classifier.classes_) if options.probabilities else 1
            for row, top in zip(kept, classifier.predict_stream(texts, count), strict=True):
                check_free(row, source)
                answer = _answer(top, options.probabilities, flat=form == "csv")
                if form == "csv":
                    table.writerow({**row, **answer})
                else:
                    print(json.dumps({**row, **answer}, ensure_ascii=False), file=file)


def evaluate(options: Namespace) -> None:
    """Print how often a classifier is right on the examples of a file, and of each class."""
    texts, labels = _examples(options)
    classifier = _fitted(options)
    known = [str(label) for label in classifier.classes_.tolist()]
    if not set(known) & set(labels):
        raise DataError(f"{options.examples} has none of the labels that the classifier knows: {few(known)}")
    predicted = [str(label) for label in classifier.predict(texts).tolist()]
    right = sum(given == true for given, true in zip(predicted, labels, strict=True))
    interval = binomtest(right, len(labels)).proportion_ci(method="wilson")
    classes, settings = sorted({*labels, *predicted}), {"zero_division": 0.0}
    table = precision_recall_fscore_support(labels, predicted, labels=classes, **settings)
    accuracy, macro = right / len(labels), float(table[2].mean())
    if options.json:
        rows = zip(classes, *(values.tolist() for values in table), strict=True)
        of_class = {name: dict(zip(("precision", "recall", "f1", "support"), row, strict=True)) for name, *row in rows}
        told = {"texts": len(labels), "accuracy": accuracy, "accuracy_interval": list(interval), "macro_f1": macro}
        print(json.dumps({**told, "classes": of_class}))
        return
    low, high = (100 * end for end in interval)
    print(f"accuracy  {100 * accuracy:.2f} % [{low:.2f}, {high:.2f}], 95 % confidence, {len(labels)} texts")
    print(f"macro-F1  {100 * macro:.2f} %\n")
    print(classification_report(labels, predicted, labels=classes, target_names=list(map(plain, classes)), **settings))


def _given(options: Namespace, *names: str) -> dict[str, Any]:
    """Return the options of these names that were given."""
    return {name: vars(options)[name] for name in names if vars(options)[name] is not None}


def _examples(options: Namespace) -> tuple[list[str], list[str]]:
    """Return texts and labels of a file."""
    columns = {"text_column": options.text_column, "label_column": options.label_column}
    corpus = load_corpus(CorpusSettings(options.examples, **columns))
    return list(corpus.texts), [corpus.class_names[number] for number in corpus.labels]


def _fitted(options: Namespace, progress: bool = True) -> FewShotClassifier:
    """Load a classifier that was saved fitted."""
    settings = {"errors": "replace", "progress": progress, **_given(options, "encoder", "device")}
    found = FewShotClassifier.from_pretrained(options.folder, **settings)
    if not found.__sklearn_is_fitted__():
        raise AdapterError(f"{options.folder} is an adapter without a task: `textmeta fit` makes a classifier of it")
    return found


def check_free(columns: Iterable[str], source: str) -> None:
    """Raise DataError if a column is where an answer goes."""
    lost = {PREDICTED, PROBABILITY, PROBABILITIES}.intersection(columns)
    if lost:
        raise DataError(f"{source} has a column {min(lost)!r}, in the place of an answer: rename it")


def _answer(top: list[tuple[Any, float]], every: bool, *, flat: bool) -> dict[str, Any]:
    """Return what is told of a text: of its labels and their probabilities, the most probable first."""
    label, probability = top[0]
    of_class = {OF * flat + str(name): round(value, DIGITS) for name, value in top} if every else {}
    told = {PREDICTED: label_to_json(label), PROBABILITY: round(probability, DIGITS)}
    return {**told, **of_class} if flat or not every else {**told, PROBABILITIES: of_class}
