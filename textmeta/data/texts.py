"""What every list of texts must be, wherever it comes from; and what may be shown of text that is anybody's."""

from collections.abc import Iterable
from typing import Any

from textmeta.errors import DataError

__all__ = ["checked_text", "checked_texts", "plain"]


def checked_texts(texts: Iterable[object], where: str, *, allow_empty: bool = False) -> list[str]:
    """Return texts as a list of strings that a tokenizer can read.

    Args:
        texts: to check.
        where: what the message calls them.
        allow_empty: whether a text may be empty or white space.

    Raises:
        DataError: naming the row, if a text is null, no string, empty, or has half of a character (a lone surrogate).
    """
    if isinstance(texts, str):
        raise DataError(f"{where}: expected a list of texts, given one string; put it into a list")
    return [checked_text(text, f"{where}, row {row}", allow_empty=allow_empty) for row, text in enumerate(texts)]


def checked_text(text: object, where: str, *, allow_empty: bool = False) -> str:
    """Return a text that a tokenizer can read; arguments and errors as for :func:`checked_texts`."""
    if not isinstance(text, str):
        given = "null" if text is None else f"{type(text).__name__} {text!r:.60}"
        raise DataError(f"{where}: text is {given}, expected a string")
    if not allow_empty and not text.strip():
        raise DataError(f"{where}: text is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: text {text!r:.60} is not valid Unicode: {error.reason}") from error
    return text


def plain(value: Any) -> str:
    """Return a value that may be anybody's as text of one line, without what terminals or Markdown act on."""
    text = "a very large number" if isinstance(value, int) and abs(value) >= 2**63 else str(value)
    return "".join(c if c.isprintable() and c not in "`|<>" else "\N{REPLACEMENT CHARACTER}" for c in text)[:500]
