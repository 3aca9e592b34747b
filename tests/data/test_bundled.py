import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import pytest

from textmeta.data import bundled
from textmeta.data.bundled import load_bundled
from textmeta.data.class_splits import PARTS, ClassSplit
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings

# Bounds on what the utterances of one class share. Utterances of one intent share its nouns, so some likeness is
# natural; utterances that fill one template share most of their words, and those of a few templates share openings.
MOST_PAIR = 0.5  # likeness of the two most alike
MOST_MEAN = 0.12  # mean likeness of all pairs
MOST_OPENINGS = 2  # utterances that begin with the same two words


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


def likenesses(texts: Sequence[str]) -> list[float]:
    """Share of the words that two texts have in common (Jaccard), for each pair."""
    sets = [set(words(text)) for text in texts]
    return [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]


def template_signs(texts: Sequence[str]) -> list[str]:
    """Say which bounds the texts of a class break."""
    values = likenesses(texts)
    openings = Counter(tuple(words(text)[:2]) for text in texts)
    signs = []
    if max(values) > MOST_PAIR:
        signs.append("pair")
    if np.mean(values) > MOST_MEAN:
        signs.append("mean")
    if max(openings.values()) > MOST_OPENINGS:
        signs.append("openings")
    return signs


def texts_by_class(corpus: Corpus) -> dict[str, list[str]]:
    return {name: [corpus.texts[row] for row in corpus.rows_of(i)] for i, name in enumerate(corpus.class_names)}


def test_at_least_64_classes_of_20_utterances_in_8_domains(
    loaded: tuple[Corpus, ClassSplit], domains: dict[str, str]
) -> None:
    corpus, _ = loaded
    assert len(corpus.class_names) >= 64
    assert min(np.bincount(corpus.labels)) >= 20
    assert set(domains) == set(corpus.class_names)
    assert len(set(domains.values())) >= 8


def test_module_docstring_counts_right(loaded: tuple[Corpus, ClassSplit], domains: dict[str, str]) -> None:
    corpus, _ = loaded
    each = set(np.bincount(corpus.labels).tolist())
    assert len(each) == 1
    said = f"{len(corpus.class_names)} classes of {each.pop()} utterances in {len(set(domains.values()))} domains"
    assert said in (bundled.__doc__ or "")


def test_texts_are_unique_whatever_their_case_and_punctuation(loaded: tuple[Corpus, ClassSplit]) -> None:
    count = Counter(" ".join(words(text)) for text in loaded[0].texts)
    assert [text for text, number in count.items() if number > 1] == []


def test_split_parts_are_disjoint_and_complete(loaded: tuple[Corpus, ClassSplit]) -> None:
    corpus, split = loaded
    names = [name for part in PARTS for name in getattr(split, part)]
    assert len(names) == len(set(names))
    assert set(names) == set(corpus.class_names)


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


def test_no_class_is_made_of_templates(loaded: tuple[Corpus, ClassSplit]) -> None:
    signs = {name: template_signs(texts) for name, texts in texts_by_class(loaded[0]).items()}
    assert {name: found for name, found in signs.items() if found} == {}


def test_no_utterance_is_a_near_copy_of_one_in_another_class(loaded: tuple[Corpus, ClassSplit]) -> None:
    # short texts share all their words by chance; from five different words on, a share of 0.7 is a copy
    sets = [set(words(text)) for text in loaded[0].texts]
    rows = [row for row, found in enumerate(sets) if len(found) >= 5]
    vocabulary = {word: i for i, word in enumerate(sorted(set.union(*sets)))}
    present = np.zeros((len(rows), len(vocabulary)), dtype=np.float32)
    for i, row in enumerate(rows):
        present[i, [vocabulary[word] for word in sets[row]]] = 1
    both = present @ present.T
    sizes = present.sum(1)
    share = np.triu(both / (sizes[:, None] + sizes - both), k=1)
    copies = [(loaded[0].texts[rows[a]], loaded[0].texts[rows[b]]) for a, b in np.argwhere(share >= 0.7)]
    assert copies == []


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (["I want to book a {} for tomorrow please"], {"pair", "mean", "openings"}),
        (
            [
                "Could you book a {} for me tomorrow?",
                "hey there, I need that {} tonight",
                "Is it possible to reserve one {} on Sunday",
                "what does any {} cost these days?",
                "reserve {} now",
                "My uncle asked whether your {} is free next weekend.",
                "two weeks from today we shall want some {} again",
                "how much notice before getting another {}",
                "Put our family down for this {} at noon",
                "still waiting since Monday because nobody confirmed which {} it will be",
            ],
            {"pair"},
        ),
        (
            [
                "Could you book a {} for me tomorrow?",
                "hey there, I need a {} tonight",
                "Is it possible to reserve the {} on Sunday",
                "what does a {} cost these days?",
                "reserve {} now",
            ],
            {"pair", "mean", "openings"},
        ),
    ],
    ids=["one template", "ten templates", "five templates"],
)
def test_class_made_of_templates_would_be_found(templates: list[str], expected: set[str]) -> None:
    fillings = "table room car bike boat tent seat ticket flight train bus hall court lane desk van cab hut pool stage"
    filled = [templates[i % len(templates)].format(word) for i, word in enumerate(fillings.split())]
    assert len(filled) == 20
    assert expected <= set(template_signs(filled))


def test_lengths_vary_within_each_class(loaded: tuple[Corpus, ClassSplit]) -> None:
    for name, texts in texts_by_class(loaded[0]).items():
        lengths = [len(words(text)) for text in texts]
        assert min(lengths) <= 6, name
        assert max(lengths) >= 18, name
        assert np.std(lengths) >= 4, name
        assert len(set(lengths)) >= 8, name


def test_punctuation_and_case_vary(loaded: tuple[Corpus, ClassSplit]) -> None:
    texts = loaded[0].texts
    for share in (
        np.mean([text[0].isupper() for text in texts]),
        np.mean([text[-1] in ".!?" for text in texts]),
    ):
        assert 0.2 < share < 0.9


def test_license_of_the_texts_is_shipped() -> None:
    assert "CC0" in (Path(str(files(bundled))) / "LICENSE").read_text(encoding="utf-8")
