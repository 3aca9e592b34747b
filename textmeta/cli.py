"""The command `textmeta`: fit, predict and evaluate; meta-train an adapter, say what one is, push one to the Hub.

Each command imports what it needs when it is run, so that `textmeta --help` is there at once.
"""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from textmeta.errors import AdapterError, TextMetaError, TrainingInterrupted, logger
from textmeta.progress import is_first_process

EXIT_CODES = (
    "Exit codes: 0 done, also where the reader of a pipe has had enough; 1 a fault of textmeta's own; 2 wrong usage or "
    "input, told in one line; 130 interrupted (SIGINT); 143 terminated (SIGTERM)."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``textmeta`` on arguments, by default the process's; an error of our own ends it as ``--help`` says."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    logging.basicConfig(format="%(message)s")
    level = logging.INFO if given[:1] == ["train"] else logging.WARNING
    speaks = is_first_process()
    logger.setLevel(level if speaks else logging.ERROR)
    told: set[str] = set()

    def show_once(message: Warning | str, *_: Any, **__: Any) -> None:
        """Show a warning in one line, and others of its words not again, whatever their numbers."""
        beginning = re.split(r"\d", str(message))[0]
        if speaks and beginning not in told:
            told.add(beginning)
            print(f"textmeta: {' '.join(str(message).split())}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_once
            if given[:1] == ["train"]:
                from textmeta.training import train  # noqa: PLC0415

                train(given[1:])
            else:
                _run(_parser().parse_args(given))
    except (TextMetaError, OSError) as error:
        print(f"textmeta: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(128 + error.signum if isinstance(error, TrainingInterrupted) else 2)
    except KeyboardInterrupt:
        print("textmeta: interrupted", file=sys.stderr)
        sys.exit(130)


def _run(options: argparse.Namespace) -> None:
    """Run any command but ``train``."""
    try:
        if options.command in ("info", "push"):
            {"info": _info, "push": _push}[options.command](options)
        else:
            from textmeta.commands import evaluate, fit, predict  # noqa: PLC0415

            {"fit": fit, "predict": predict, "evaluate": evaluate}[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has had enough; Python would complain when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; ``train`` has one of its own, which takes time to make."""
    what = "Few-shot text classification: fit, predict, evaluate; meta-train adapters and share them."
    parser = argparse.ArgumentParser("textmeta", description=what, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"textmeta {version('textmeta')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fit = commands.add_parser("fit", help="fit a classifier to a file of examples", allow_abbrev=False)
    predict = commands.add_parser("predict", help="predict the labels of any number of texts", allow_abbrev=False)
    evaluate = commands.add_parser("evaluate", help="compare predictions with a file of examples", allow_abbrev=False)
    examples = "CSV, TSV, JSON Lines or Parquet file, with a text and its label in each row"
    fit.add_argument("examples", nargs="?", help=f"{examples}; none where --label-names alone tell the classes")
    fit.add_argument("--output", required=True, metavar="FOLDER", help="for the classifier; no text is stored in it")
    fit.add_argument("--adapter", help="folder or Hub id; by default the one that comes with textmeta")
    names = "auto (the default) reads labels that are words, none nothing, a JSON file maps each label to its name"
    fit.add_argument("--label-names", default="auto", metavar="auto|none|FILE", help=names)
    fit.add_argument("--unlabelled", metavar="FILE", help="further texts: one a line, or CSV or JSON Lines")
    predict.add_argument("folder", help="a fitted classifier: a folder, or owner/name on the Hub")
    predict.add_argument("texts", nargs="?", default="-", help="one a line, or CSV or JSON Lines; by default stdin")
    predict.add_argument("--output", metavar="FILE", help="by default stdout")
    predict.add_argument("--from", dest="from_", choices=["lines", "csv", "jsonl"], help="by default by the ending")
    predict.add_argument("--to", choices=["csv", "jsonl"], help="by default by the ending of --output, or as --from")
    predict.add_argument("--probabilities", action="store_true", help="of all classes, not of the predicted one alone")
    evaluate.add_argument("folder", help="a fitted classifier, as for predict")
    evaluate.add_argument("examples", help=examples)
    evaluate.add_argument("--json", action="store_true", help="all numbers, as one JSON object")
    for command in (fit, predict, evaluate):
        command.add_argument("--text-column", default="text", metavar="NAME", help="column of the texts")
        if command is not predict:
            command.add_argument("--label-column", default="label", metavar="NAME", help="column of the labels")
        command.add_argument("--encoder", help="folder or Hub id, if not where the adapter says")
        command.add_argument("--device", help="where the encoder runs, such as cuda")
    commands.add_parser("train", help="meta-train an adapter on labelled texts", add_help=False)
    about = commands.add_parser("info", help="say what an adapter is and what it was trained on")
    about.add_argument("name", help="a folder, an adapter that comes with textmeta, or owner/name on the Hub")
    to = commands.add_parser("push", help="push an adapter folder to the Hub, in one commit or not at all")
    to.add_argument("folder", help="that `textmeta train` or save_pretrained wrote")
    to.add_argument("repo", help="owner/name; made if there is none")
    for command, revision in ((about, "branch, tag or commit"), (to, "branch; made if there is none")):
        command.add_argument("--revision", help=revision)
        command.add_argument("--subfolder", help="of the folder or repository")
    yes_or_no = argparse.BooleanOptionalAction
    to.add_argument("--private", action=yes_or_no, help="a new repository; by default as its owner has set it")
    to.add_argument("--message", dest="commit_message", help="of the commit")
    to.add_argument("--base-model", help="id on the Hub of the encoder, where the adapter names a folder")
    return parser


def _push(options: argparse.Namespace) -> None:
    from textmeta.sharing.push import push_folder  # noqa: PLC0415

    given = {name: vars(options)[name] for name in ("base_model", "revision", "subfolder", "private", "commit_message")}
    print(push_folder(options.folder, options.repo, **given).commit_url)


def _info(options: argparse.Namespace) -> None:
    from jinja2 import TemplateError  # noqa: PLC0415

    from textmeta.data.labels import plain  # noqa: PLC0415
    from textmeta.files import read_json  # noqa: PLC0415
    from textmeta.sharing.card import adapter_info  # noqa: PLC0415
    from textmeta.sharing.folder import CLASSIFIER, META  # noqa: PLC0415
    from textmeta.sharing.locate import read_located  # noqa: PLC0415

    files, found = read_located(options.name, revision=options.revision, subfolder=options.subfolder)
    parts = (name for name in (META, CLASSIFIER) if name in files)
    told = [read_json(files[name], found.folder / name, AdapterError) for name in parts]
    where = plain(f"{found.folder} ({found.kind}{f', commit {found.commit}' if found.commit else ''})")
    try:
        print(adapter_info(*told, where=where, size=f"{sum(map(len, files.values())) / 2**20:.1f} MiB"), end="")
    except (KeyError, TypeError, ValueError, AttributeError, TemplateError):  # a description may be anybody's, too
        print(f"what       an adapter, whose description is not as textmeta writes it\nwhere      {where}")
