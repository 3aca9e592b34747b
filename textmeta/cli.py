"""The command `textmeta`, and settings from YAML files and the command line for the recipes."""

import difflib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, auto_cli

from textmeta.artifact.card import CARD, PLACEHOLDER, usage_name
from textmeta.artifact.describe import describe
from textmeta.artifact.folder import read_file, read_folder
from textmeta.artifact.locate import load_from
from textmeta.artifact.publish import Destination, push_folder
from textmeta.artifact.saving import check_destination, write_folder
from textmeta.errors import SettingsError, TextMetaError
from textmeta.hub import HubAccess

__all__ = ["info", "main", "parse_settings", "pull", "push", "run_recipe"]

T = TypeVar("T")


def parse_settings(kind: type[T], arguments: Sequence[str] | None = None, description: str | None = None) -> T:
    """Make settings of a dataclass from ``--config FILE`` (YAML) and ``--name value``, later ones overriding.

    Nested settings have dotted names: ``--training.steps 100``. A hyphen in a name is as good as an underscore; of a
    switch that is not nested, ``true`` can be left out.

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
        parsed = parser.parse_args(_spelled_out(kind, sys.argv[1:] if arguments is None else arguments))
        values = parser.instantiate(parsed).as_dict()
    except ArgumentError as error:
        raise SettingsError(f"{error}{_suggestion(str(error), _names(kind))}") from error
    values.pop("config", None)
    return kind(**values)


def _spelled_out(kind: type, arguments: Sequence[str]) -> list[str]:
    """Return ``--data-dir=a-b --quick`` as ``--data_dir=a-b --quick=true``."""
    hints = get_type_hints(kind)
    spelled = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        if argument.startswith("--"):
            name, sign, value = argument.partition("=")
            name = "--" + name[2:].replace("-", "_")
            is_switch = not sign and hints.get(name[2:]) is bool and following.startswith("--")
            spelled.append(f"{name}=true" if is_switch else f"{name}{sign}{value}")
        else:
            spelled.append(argument)
    return spelled


def run_recipe(main: Callable[[T], None], kind: type[T], description: str | None) -> None:
    """Run a script's ``main`` with settings from the command line; end with a message on an error of our own."""
    with _messages():
        main(parse_settings(kind, description=description))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command ``textmeta``.

    Args:
        arguments: of the command line; by default those of the process.
    """
    with _messages():
        auto_cli(
            {"push": push, "pull": pull, "info": info},
            args=None if arguments is None else list(arguments),
            prog="textmeta",
        )


def push(
    folder: str,
    repo: str,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    message: str | None = None,
    base_model: str | None = None,
) -> None:
    """Push an adapter folder to the Hub, in one commit or not at all.

    Args:
        folder: that a recipe or save_pretrained wrote.
        repo: owner/name; made if there is none.
        revision: branch; made if there is none.
        subfolder: of the repository.
        token: an access token that may write; by default the one that `hf auth login` stored.
        private: whether a new repository is private; by default as its owner has set it.
        message: of the commit.
        base_model: id on the Hub of the adapter's encoder, where the adapter names a folder of this machine.
    """
    to = Destination(repo, revision, subfolder, token, private, message)
    done = push_folder(folder, to, base_model=base_model)
    print(done.commit_url)


def pull(
    repo: str,
    folder: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> None:
    """Download an adapter, check it, and write it to a folder, which is replaced as a whole.

    Args:
        repo: owner/name.
        folder: where to; by default the repository's name.
        revision: branch, tag or commit.
        subfolder: of the repository.
        token: an access token; by default the one that `hf auth login` stored.
        cache_dir: of the download; by default the Hub library's own.
    """
    destination = Path(folder or repo.rpartition("/")[2])
    check_destination(destination)
    access = HubAccess(token, cache_dir)
    adapter, where = load_from(repo, revision=revision or "main", subfolder=subfolder, access=access)
    where.check_encoder(adapter.encoder.model)
    files = read_folder(where.folder)
    if (where.folder / CARD).exists():
        card = read_file(where.folder, CARD)
        files[CARD] = card.replace(usage_name(repo, subfolder).encode(), PLACEHOLDER.encode())
    write_folder(destination, files, unlisted=frozenset({CARD}))
    print(destination)


def info(
    adapter: str,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> None:
    """Say what an adapter is, whether it is whole, and what it was trained on.

    Args:
        adapter: a folder, an adapter shipped with textmeta, or owner/name on the Hub.
        revision: branch, tag or commit.
        subfolder: of the folder or repository.
        token: an access token; by default the one that `hf auth login` stored.
        cache_dir: of the download; by default the Hub library's own.
        local_files_only: use what the cache holds, and ask nobody.
    """
    access = HubAccess(token, cache_dir, local_files_only)
    found, where = load_from(adapter, revision=revision, subfolder=subfolder, access=access)
    print(describe(found, where))


@contextmanager
def _messages() -> Iterator[None]:
    """Show the log of textmeta alone; end the process with a message, not a traceback, on an error of our own."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("textmeta").setLevel(logging.INFO)
    try:
        yield
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
