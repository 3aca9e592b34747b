import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import pytest

from textmeta.data import bundled
from textmeta.data.bundled import load_bundled
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.data.splits import PARTS, ClassSplit


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, ClassSplit]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
        return load_bundled()


@pytest.fixture(scope="module")
def domains() -> dict[str, str]:
    """Domain of each class."""
    lines = (files(bundled) / "everyday.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = {(row["label"], row["domain"]) for row in map(json.loads, lines)}
    assert len(pairs) == len({label for label, _ in pairs}), "a class has one domain"
    return dict(pairs)


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def test_module_docstring_counts_right(loaded: tuple[Corpus, ClassSplit], domains: dict[str, str]) -> None:
    corpus, _ = loaded
    each = set(np.bincount(corpus.labels).tolist())
    assert len(each) == 1
    said = f"{len(corpus.class_names)} classes of {each.pop()} utterances in {len(set(domains.values()))} domains"
    assert said in (bundled.__doc__ or "")
    assert set(domains) == set(corpus.class_names)


def test_texts_are_unique_whatever_their_case_and_punctuation(loaded: tuple[Corpus, ClassSplit]) -> None:
    count = Counter(" ".join(words(text)) for text in loaded[0].texts)
    assert [text for text, number in count.items() if number > 1] == []


def test_split_parts_are_disjoint_and_complete(loaded: tuple[Corpus, ClassSplit]) -> None:
    corpus, split = loaded
    assert sorted(split.train + split.valid + split.test) == sorted(corpus.class_names)


def test_no_domain_is_in_two_parts(loaded: tuple[Corpus, ClassSplit], domains: dict[str, str]) -> None:
    parts: dict[str, set[str]] = {}
    for part in PARTS:
        for name in getattr(loaded[1], part):
            parts.setdefault(domains[name], set()).add(part)
    assert {domain: found for domain, found in parts.items() if len(found) > 1} == {}


def test_each_part_is_large_enough_for_episodes(loaded: tuple[Corpus, ClassSplit]) -> None:
    corpus, split = loaded
    for part in PARTS:
        EpisodeSampler(corpus.restrict(getattr(split, part)), EpisodeSettings(5, (1, 5), 5), seed=0)[0]


def test_license_of_the_texts_is_shipped() -> None:
    assert "CC0" in (Path(str(files(bundled))) / "LICENSE").read_text(encoding="utf-8")
