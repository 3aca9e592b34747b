"""Texts that are longer than what is read of them: told, or read in windows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.given import LABELS, SUPPORT, Patch, adapter_of
from textmeta import Adapter, FewShotClassifier
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.token_states import TokenStateReader
from textmeta.heads.pooling import pool, to_length_one

LENGTH = 10  # tokens: 8 words between [CLS] and [SEP]
LONG = "bal bel fim fon kut kon bal kel fim gur dal kes dis dur bel bol bun bam ban"  # 19 words
SHORT = "fim fon"


def of(adapter: Adapter, **settings: Any) -> FewShotClassifier:
    return FewShotClassifier(adapter, max_length=LENGTH, **settings)


@pytest.fixture(scope="module")
def fitted(adapter: Adapter) -> FewShotClassifier:
    return of(adapter).fit(SUPPORT, LABELS)


METHODS = ("predict", "predict_proba", "predict_top", "decision_function", "transform", "scope_score")


@pytest.mark.parametrize("method", METHODS)
def test_cut_texts_are_told_once_a_call(fitted: FewShotClassifier, method: str) -> None:
    told = (
        rf"^predict: 2 of 5 texts are cut at 10 tokens, first of row 1, '{LONG[:40]}.*"
        "max_length reads more of them, long_texts='window' all"
    )
    for batch_size in (2, 512):
        fitted.set_params(batch_size=batch_size)
        for _ in range(2):  # however often
            with pytest.warns(UserWarning, match=told) as found:
                getattr(fitted, method)([SHORT, LONG, "", SHORT, LONG])
            assert len(found) == 1


def test_cut_examples_are_told_once_with_their_rows_as_given(tiny_model: str) -> None:
    texts, labels = [*SUPPORT, LONG, LONG + " bal"], [*LABELS, "b", "f"]
    told = r"^fit: 2 of 9 texts are cut at 10 tokens, first of row {}, "
    one = of(adapter_of(tiny_model, adapt="lora"))  # reads its examples many times
    for weights, more, row in (([1] * 8, SHORT, 6), ([0, *[1] * 5, 0, 1], "kel " * 9, 7)):
        with pytest.warns(UserWarning, match=told.format(row)) as found:
            one.fit(texts, labels, sample_weight=weights, unlabelled=[more])
        assert [warning.filename for warning in found] == [__file__]


def test_each_text_is_tokenized_once(adapter: Adapter, monkeypatch: Patch) -> None:
    one, seen = of(adapter), []
    tokenizer = one._learner.reader.encoder.tokenizer
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, texts, **more: seen.extend(texts) or call(self, texts, **more)
    )
    one.fit(SUPPORT, LABELS, label_names=None, unlabelled=["gur"]).predict([SHORT])
    assert sorted(seen) == sorted([*SUPPORT, "gur", SHORT])


def test_what_fits_is_not_told_and_training_tells_nothing(fitted: FewShotClassifier) -> None:
    words = LONG.split()
    fitted.predict(["", " ".join(words[:8])])  # warnings are errors here
    fitted._learner.reader.read([LONG, "卡"])
    with pytest.warns(UserWarning, match="1 of 1 texts are cut"):
        fitted.predict([" ".join(words[:9])])


# In windows


def windows_of(words: list[str]) -> list[str]:
    """Cut words as they should be read: 8 of them, 2 of which the window before has had."""
    starts = [start for start in range(0, len(words), 6) if start == 0 or start + 2 < len(words)]
    return [" ".join(words[start : start + 8]) for start in starts]


def test_a_long_text_is_the_mean_of_its_windows(adapter: Adapter) -> None:
    reader = of(adapter, long_texts="window")._learner.reader
    queries = adapter.initialisation.queries
    texts = [SHORT, LONG, "", " ".join(LONG.split()[:8]), "bal " * 70]
    found = pool(reader.read(texts), queries)
    for text, view in zip(texts, found, strict=True):
        parts = windows_of(text.split()) or [""]
        pooled = []
        for states in reader.read(parts).unpadded():  # each by the attention that it would have alone
            rms = (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            scores = (states * rms * queries[:, None]).sum(-1, keepdim=True) / states.shape[-1] ** 0.5
            pooled.append((scores.softmax(1) * states).sum(1))
        torch.testing.assert_close(view, to_length_one(torch.stack(pooled).mean(0)), rtol=0, atol=1e-5)
    assert len(windows_of(LONG.split())) == 3


@pytest.mark.parametrize("settings", [{}, {"adapt": "pooling+lora"}, {"adapt": "offset"}], ids=str)
def test_what_stands_late_in_a_text_decides(tiny_model: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The first eight words say nothing; the steps, names and unlabelled texts go by windows, too."""
    early = "gur dal kes dis dur gul dil gos"
    texts = [
        f"{early} {end} {end}" for end in ("bal bel bil ban", "bam ben bol bun", "fim fon fal fel", "fil fol fem fur")
    ]
    labels, names = ["b", "b", "f", "f"], {"b": f"{early} bal bel", "f": f"{early} fim fon"}
    queries = [f"{early} bal ban ben bam bel bil", f"{early} fim fal fol fil fel fon"]
    one = of(adapter_of(tiny_model, **settings), long_texts="window")
    probabilities = one.fit(texts, labels, label_names=names, unlabelled=[queries[0]]).predict_proba(queries)
    assert one.predict(queries).tolist() == ["b", "f"]
    with pytest.warns(UserWarning, match="are cut"):
        cut = one.set_params(long_texts="cut").fit(texts, labels, label_names=names).predict_proba(queries)
    np.testing.assert_allclose(cut[0], cut[1], rtol=0, atol=1e-6)
    one.set_params(long_texts="window").fit(texts, labels, label_names=names, unlabelled=[queries[0]])
    one.save_pretrained(tmp_path)
    loaded = FewShotClassifier.from_pretrained(tmp_path)
    assert loaded._adapter.encoder.long_texts == "window"
    np.testing.assert_array_equal(loaded.predict_proba(queries), probabilities)


def test_texts_that_fit_are_read_as_ever_and_order_does_not_matter(adapter: Adapter, fitted: FewShotClassifier) -> None:
    one = of(adapter, long_texts="window").fit(SUPPORT, LABELS)
    np.testing.assert_array_equal(one.predict_proba(SUPPORT), fitted.predict_proba(SUPPORT))
    alone = np.concatenate([one.predict_proba([text]) for text in (LONG, SHORT, LONG + " bal")])
    found = one.set_params(batch_size=2).predict_proba([LONG, SHORT, LONG + " bal"])
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)


def test_an_adapter_has_its_own_way_with_long_texts(adapter: Adapter, tmp_path: Path) -> None:
    windows = replace(adapter, encoder=replace(adapter.encoder, max_length=LENGTH, long_texts="window"))
    expected = of(adapter, long_texts="window").fit(SUPPORT, LABELS).predict_proba([LONG])
    FewShotClassifier(windows).save_pretrained(tmp_path)
    for one in (FewShotClassifier(windows), FewShotClassifier(tmp_path), FewShotClassifier.from_pretrained(tmp_path)):
        np.testing.assert_array_equal(one.fit(SUPPORT, LABELS).predict_proba([LONG]), expected)
    with pytest.warns(UserWarning, match="are cut"):
        FewShotClassifier(windows, long_texts="cut").fit(SUPPORT, LABELS).predict([LONG])


def test_unknown_texts_are_told_by_all_their_windows(adapter: Adapter) -> None:
    one = of(adapter, long_texts="window").fit(SUPPORT, LABELS)
    with pytest.warns(UserWarning, match=r"most tokens of 1 of 2 texts .*row 1"):
        one.predict(["我 " * 8 + "bal " * 9, "bal " * 8 + "我 " * 9])


def test_windows_can_be_cached_and_chosen_from(adapter: Adapter, tmp_path: Path) -> None:
    settings = replace(adapter.encoder, max_length=LENGTH, long_texts="window")
    one = TokenStateReader(Encoder(settings, adapter.lora))
    texts, init = [SHORT, LONG, "bal", "kel " * 8], adapter.initialisation
    queries, factors = init.queries, init.lora
    expected = pool(one.read(texts, factors), queries)
    part = one.read(texts, factors).where(torch.tensor([2, 1]))
    torch.testing.assert_close(pool(part, queries), expected[[2, 1]], rtol=0, atol=1e-6)
    one.cache(texts[:3], folder=tmp_path)
    torch.testing.assert_close(pool(one.read(texts, factors), queries), expected, rtol=0, atol=1e-3)  # in halves
    cut = TokenStateReader(Encoder(replace(settings, long_texts="cut"), adapter.lora))
    cut.cache(texts[:3], folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert not torch.allclose(pool(cut.read(texts, factors), queries)[1], expected[1], atol=0.01)
