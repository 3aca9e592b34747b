"""What was read, told before training: what of each corpus is left out and why, and what is alike."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from textmeta.data.corpus import Corpus
from textmeta.data.labels import few
from textmeta.data.mixed_episodes import QUERIES
from textmeta.errors import logger

MOST_LINES = 20  # corpora that have a line each, however little there is to say of them
ODD = 0.1  # share of a corpus that is left out or alike, from which on it has a line of its own among many
ALIKE = "alike but for case, spaces, punctuation and digits"


class _Letters(dict[int, int | None]):
    """Letters and marks stay, all else goes."""

    def __missing__(self, code: int) -> int | None:
        self[code] = code if unicodedata.category(chr(code))[0] in "LM" else None
        return self[code]


LETTERS = _Letters()


def _key(text: str) -> str:
    """Return what alike texts have in common; a text without a letter is like itself alone."""
    return text.casefold().translate(LETTERS) or text


def log_corpora(corpora: Sequence[Corpus], used: Sequence[Corpus]) -> None:
    """Log texts and classes of each corpus, how many are left out of what is used and why, and how many are alike.

    Of many corpora the sum is logged, with a line for each of which much is left out or alike.
    """
    lines, total, everywhere = [], Counter[str](), Counter[str]()
    for corpus, rest in zip(corpora, used, strict=True):
        classes_of = Counter(text for text, _ in set(zip(corpus.texts, corpus.labels.tolist(), strict=True)))
        several = sum(count > 1 for count in classes_of.values())
        small = [name for name in corpus.class_names if name not in rest.class_names]
        keys = set(map(_key, rest.texts))
        everywhere.update(keys)
        told = {
            "repeated": len(corpus) - len(classes_of),
            "of several classes": several,
            f"of classes with fewer than {QUERIES + 1}": len(classes_of) - several - len(rest),
            ALIKE: len(rest) - len(keys),
        }
        total.update(told)
        if len(corpora) <= MOST_LINES or small or len(keys) < (1 - ODD) * len(corpus):
            lines.append(_line(f"corpus {corpus.name}", len(corpus), len(corpus.class_names), told, small))
    if len(corpora) > 1:
        texts, classes = sum(map(len, corpora)), sum(len(corpus.class_names) for corpus in corpora)
        total[f"in several corpora, {ALIKE}"] = sum(count > 1 for count in everywhere.values())
        lines.append(_line(f"{len(corpora)} corpora", texts, classes, total))
    logger.info("\n".join(lines))


def _line(what: str, texts: int, classes: int, told: Mapping[str, int], small: Sequence[str] = ()) -> str:
    said = "".join(f"; {count:,} {kind}" for kind, count in told.items() if count)
    return f"{what}: {texts:,} texts, {classes:,} classes{said}{f' (not used: {few(small)})' * bool(small)}"


def warn_of_overlap(corpora: Sequence[Corpus], held_out: Sequence[Corpus], purpose: str) -> None:
    """Warn if texts that are held out for a purpose are alike to some that are trained on; say how many, and where."""
    home: dict[str, str] = {}
    for corpus in corpora if held_out else ():
        home |= dict.fromkeys(map(_key, corpus.texts), corpus.name)
    found = []
    for corpus in held_out:
        places = Counter(home[key] for key in map(_key, dict.fromkeys(corpus.texts)) if key in home)
        where = ", ".join(f"{count} in {name}" for name, count in places.most_common(3))
        if places:
            found.append((-places.total(), f"{places.total()} of {len(corpus)} of {corpus.name} ({where})"))
    if found:
        told = "; ".join(line for _, line in sorted(found)[:8]) + "; …" * (len(found) > 8)
        logger.warning("held out to %s, but trained on, too, %s: %s", purpose, ALIKE, told)
