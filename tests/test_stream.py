"""Any number of texts, a batch at a time."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tqdm import tqdm

from tests.test_classifier import LABELS, SUPPORT, TEXTS, adapter_of
from tests.test_long_texts import LONG
from textmeta import FewShotClassifier
from textmeta import classifier as classifier_module
from textmeta.classifier import NotFittedError
from textmeta.errors import DataError, SettingsError

MANY = [f"{first} {second}" for first in TEXTS for second in TEXTS]  # 36
Shown = pytest.CaptureFixture[str]


@pytest.fixture
def fitted(tiny_model: str) -> FewShotClassifier:
    return FewShotClassifier(adapter_of(tiny_model), batch_size=5).fit(SUPPORT, LABELS)


def given(texts: list[Any], read: list[Any]) -> Iterator[Any]:
    """Yield texts, noting what has been read."""
    for text in texts:
        read.append(text)
        yield text


@pytest.mark.parametrize("batch_size", [1, 5, 36, 512])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_answers_are_those_of_the_whole_list(fitted: FewShotClassifier, batch_size: int, k: int) -> None:
    expected = fitted.set_params(batch_size=512).predict_top(MANY, k)
    found = list(fitted.set_params(batch_size=batch_size).predict_stream(given(MANY, []), k))
    assert [[label for label, _ in row] for row in found] == [[label for label, _ in row] for row in expected]
    numbers = [[[p for _, p in row] for row in rows] for rows in (found, expected)]
    np.testing.assert_allclose(*numbers, rtol=0, atol=1e-6)
    assert list(fitted.predict_stream(MANY, k)) == fitted.predict_top(MANY, k), "in the same batches"


def test_whatever_holds_texts_is_taken_or_refused(fitted: FewShotClassifier) -> None:
    expected = fitted.predict_top(TEXTS, 1)
    for texts in (np.array(TEXTS), pd.Series(TEXTS), pd.DataFrame({"text": TEXTS}), iter(TEXTS)):
        assert list(fitted.predict_stream(texts)) == expected
    assert list(fitted.predict_stream("bal bel")) == fitted.predict_top("bal bel", 1)
    assert list(fitted.predict_stream(iter(()))) == []
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
    stream = fitted.predict_stream(given(MANY, read))
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
    stream = fitted.predict_stream(given([*MANY[:13], None, "bal"], []))
    assert [next(stream) for _ in range(10)] == fitted.predict_top(MANY[:10], 1)
    with pytest.raises(DataError, match="predict, row 13: text is null"):
        next(stream)
    with pytest.raises(DataError, match=r"row 1: text .* half of a character"):
        list(fitted.predict_stream(["bal", "bel bil\ud800"]))
    assert len(list(fitted.set_params(errors="replace").predict_stream(["bal", "bel bil\ud800"]))) == 2


def test_warnings_come_once_and_soon(fitted: FewShotClassifier) -> None:
    """With the first batch that has such texts: a stream may be long, or have no end."""
    fitted.set_params(max_length=10).fit(SUPPORT, LABELS)
    stream = fitted.predict_stream(["bal"] * 6 + [LONG, "bal", LONG, "bal", LONG, "卡"] * 3)
    assert len([next(stream) for _ in range(5)]) == 5  # warnings are errors here
    with pytest.warns(UserWarning, match="predict: 2 of the first 10 texts are cut at 10 .* row 6, 'bal") as found:
        next(stream)
    assert [warning.filename for warning in found] == [__file__]
    assert len([next(stream) for _ in range(4)]) == 4
    with pytest.warns(UserWarning, match="most tokens of 1 of the first 15 .* row 11") as found:
        assert len(list(stream)) == 14
    assert len(found) == 1


@pytest.mark.parametrize(
    ("texts", "total", "known"), [(MANY, None, True), (given(MANY, []), 36, True), (given(MANY, []), None, False)]
)
def test_a_bar_has_rate_and_remaining_time(
    fitted: FewShotClassifier, capsys: Shown, monkeypatch: pytest.MonkeyPatch, texts: Any, total: Any, known: bool
) -> None:
    list(fitted.predict_stream(MANY))
    assert capsys.readouterr().err == "", "not before it takes long"
    monkeypatch.setattr(classifier_module, "BAR_AFTER", 1e-9)
    monkeypatch.setattr(classifier_module, "tqdm", partial(tqdm, mininterval=0))
    list(fitted.predict_stream(texts, total=total))
    shown = capsys.readouterr().err
    assert "text/s" in shown
    assert ("/36 [" in shown) == known
    list(fitted.set_params(progress=False).predict_stream(MANY))
    assert capsys.readouterr().err == ""


MEMORY = """
import resource, sys
from textmeta import FewShotClassifier
clf = FewShotClassifier.from_pretrained(sys.argv[1], progress=False)
words = ["bal", "bel", "fim", "fon", "gur", "dal", "kes", "dis", "dur", "你"]
texts = (" ".join(words[int(digit)] for digit in str(number)) for number in range(int(sys.argv[2])))
assert sum(len(answer) for answer in clf.predict_stream(texts, 2)) == 2 * int(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_texts(fitted: FewShotClassifier, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "c")
    peaks = []
    for count in (10_000, 100_000):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "c"), str(count)]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 25, peaks  # the list of answers alone would be 50 more
