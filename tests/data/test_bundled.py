import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np

from textmeta.data import bundled
from textmeta.data.bundled import load_bundled
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.data.splits import PARTS

CORPUS, SPLIT = load_bundled()
ROWS = map(json.loads, (files(bundled) / "everyday.jsonl").read_text(encoding="utf-8").splitlines())
DOMAINS = {(row["label"], row["domain"]) for row in ROWS}


def test_module_docstring_counts_right() -> None:
    (each,) = set(np.bincount(CORPUS.labels).tolist())
    domains = {domain for _, domain in DOMAINS}
    said = f"{len(CORPUS.class_names)} classes of {each} utterances in {len(domains)} domains"
    assert said in (bundled.__doc__ or "")
    assert sorted(label for label, _ in DOMAINS) == sorted(CORPUS.class_names), "a class has one domain"


def test_texts_are_unique_whatever_their_case_and_punctuation() -> None:
    count = Counter(" ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())) for text in CORPUS.texts)
    assert [text for text, number in count.items() if number > 1] == []


def test_parts_are_complete_large_enough_for_episodes_and_share_no_domain() -> None:
    parts = [getattr(SPLIT, part) for part in PARTS]
    assert sorted(sum(parts, ())) == sorted(CORPUS.class_names)
    domains = [{dict(DOMAINS)[name] for name in part} for part in parts]
    assert len(set.union(*domains)) == sum(map(len, domains))
    for part in parts:
        EpisodeSampler(CORPUS.restrict(part), EpisodeSettings(5, (1, 5), 5), seed=0)[0]


def test_license_of_the_texts_is_shipped() -> None:
    assert "CC0" in (Path(str(files(bundled))) / "LICENSE").read_text(encoding="utf-8")
