"""Settings from YAML files and the command line, for the recipes."""

import difflib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from textmeta.errors import SettingsError, TextMetaError

__all__ = ["parse_settings", "run_recipe"]

T = TypeVar("T")


def parse_settings(kind: type[T], arguments: Sequence[str] | None = None, description: str | None = None) -> T:
    """Make settings of a dataclass from ``--config FILE`` (YAML) and ``--name value``, later ones overriding.

    Nested settings have dotted names: ``--training.steps 100``.

    Args:
        kind: the dataclass; its fields' types and docstring make the options.
        arguments: of the command line; by default those of the process.
        description: first lines of ``--help``.

    Raises:
        SettingsError: for an unknown name, naming the nearest valid one, or a value of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(kind, as_group=False)
    try:
        parsed = parser.parse_args(arguments)
        values = parser.instantiate(parsed).as_dict()
    except ArgumentError as error:
        raise SettingsError(f"{error}{_suggestion(str(error), _names(kind))}") from error
    values.pop("config", None)
    return kind(**values)


def run_recipe(main: Callable[[T], None], kind: type[T], description: str | None) -> None:
    """Run a script's ``main`` with settings from the command line; end with a message on an error of our own."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(parse_settings(kind, description=description))
    except TextMetaError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _names(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting of a dataclass, through nested ones and lists of them."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        for nested in (hint, *get_args(hint)):
            if is_dataclass(nested):
                yield from _names(nested, prefix + name + ".")


def _suggestion(message: str, names: Iterable[str]) -> str:
    """Return the nearest valid name of each unknown one in a parser's message."""
    unknown = re.findall(r"--([\w.]+)", message) + re.findall(r"Option '([\w.]+)' is not accepted", message)
    groups = re.findall(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    unknown += [f"{group}.{name}" for group, name in groups]
    known = list(names)

    def likeness(given: str, name: str) -> float:
        # a name inside a list is reported without its prefix
        ends = (name, name.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, given, end).ratio() for end in ends)

    near = {given: max(known, key=lambda name: likeness(given, name)) for given in unknown if given not in known}
    return "".join(f"\n  {given!r} is not a setting; the nearest is {name!r}" for given, name in near.items())
