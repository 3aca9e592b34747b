"""Label a file or a data set of the Hub with a saved classifier, shard by shard, by as many processes as there are.

    python recipes/predict_dataset.py cards texts.csv --output answers
    torchrun --nproc_per_node 2 recipes/predict_dataset.py cards texts.csv --output answers
    python recipes/predict_dataset.py cards texts.csv --output answers --ray

OUTPUT gets a file for each shard, with the columns of its rows, ``predicted`` and ``probability``, and settings.json,
which says what made them. The same command goes on where another was stopped, in whichever of these ways. ``--ray``
(extra ray) uses the cluster that RAY_ADDRESS names, or this machine; machines share OUTPUT and the files that are read.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import datasets

from textmeta import CorpusSettings, FewShotClassifier, TextMetaError
from textmeta.commands import DIGITS, PREDICTED, PROBABILITY, check_free
from textmeta.data.labels import label_to_json
from textmeta.data.sources import read_hub
from textmeta.data.texts import separator
from textmeta.errors import DataError, SettingsError
from textmeta.files import at_home, read_json, write_atomically
from textmeta.meta.initialisation import whole_number
from textmeta.processes import exchange, join_processes
from textmeta.sharing.folder import MANIFEST
from textmeta.sharing.locate import read_located


class Labeller:
    """Labels shards of a data set; that and the classifier are loaded once."""

    def __init__(self, options: argparse.Namespace, device: str | None = None) -> None:
        given = self.options = options
        settings = CorpusSettings(given.data, given.config, given.split, given.revision, text_column=given.text_column)
        rows, self.made = (read_file(given.data, given.text_column), {}) if settings.is_file else read_hub(settings)
        if given.text_column not in rows.column_names:
            raise DataError(f"{given.data} has no column {given.text_column!r}; its columns are {rows.column_names}")
        check_free(rows.column_names, given.data)
        count = -(-len(rows) // whole_number("--shard-rows", given.shard_rows, 1))
        self.shards = [rows.shard(count, number, contiguous=True) for number in range(count)]
        self.paths = [given.output / f"{number:05d}-of-{count:05d}.{given.to}" for number in range(count)]
        if settings.is_file:
            self.made["data_sha256"] = hashlib.sha256(Path(given.data).read_bytes()).hexdigest()
        hashes = (read_located(given.classifier)[1].folder / MANIFEST).read_bytes()
        self.made |= {"classifier_sha256": hashlib.sha256(hashes).hexdigest(), "textmeta": version("textmeta")}
        self.made["data"] = Path(given.data).name if settings.is_file else given.data
        self.made |= {
            name: vars(given)[name] for name in ("config", "split", "text_column", "shard_rows", "precision", "to")
        }
        self.how = {"device": device, "precision": given.precision, "errors": "replace"}
        self.classifier: FewShotClassifier | None = None

    def label(self, number: int) -> str:
        """Write the answers of a shard, whole or not at all; return what has been done."""
        datasets.disable_progress_bars()
        self.classifier = self.classifier or FewShotClassifier.from_pretrained(self.options.classifier, **self.how)
        path, rows = self.paths[number], self.shards[number]
        try:
            tops = [top[0] for top in self.classifier.predict_stream(rows[self.options.text_column])]
        except DataError as error:
            raise DataError(f"shard {number} of {len(self.paths)}: {error}") from error
        rows = rows.add_column(PREDICTED, [label_to_json(label) for label, _ in tops])
        rows = rows.add_column(PROBABILITY, [round(probability, DIGITS) for _, probability in tops])
        unfinished = path.with_suffix(".unfinished")
        rows.to_parquet(unfinished) if self.options.to == "parquet" else rows.to_json(unfinished, force_ascii=False)
        os.replace(unfinished, path)
        return f"{path}: {len(tops)} rows"

    def __call__(self, row: dict[str, int]) -> dict[str, str]:
        """Label the shard that a row of Ray's names."""
        return {"done": self.label(row["shard"])}


def read_file(name: str, column: str) -> datasets.Dataset:
    """Read a file with all of its columns, by its ending; texts of a CSV stay as they are, "null" and "01", too."""
    path, options = Path(at_home(name)), {}
    kind = {".jsonl": "json", ".tsv": "csv"}.get(path.suffix.lower(), path.suffix.lower()[1:])
    try:
        if kind == "csv":
            with path.open(encoding="utf-8-sig", errors="replace") as file:
                between = separator(file.readline(), {column}, tabs=path.suffix.lower() == ".tsv")
            options = {"sep": between, "keep_default_na": False, "converters": {column: str}}
        # not through the user's cache: it tells files apart by name, size and time, and would keep a copy
        with tempfile.TemporaryDirectory() as cache:
            options |= {"data_files": str(path), "cache_dir": cache, "keep_in_memory": True}
            return datasets.load_dataset(kind, split="train", **options)
    except Exception as error:  # `datasets` raises many unrelated types
        raise DataError(f"cannot read {path}: {error.__cause__ or error}") from error


def whole(name: str) -> str:
    """Return the whole path of what is here, for workers that are elsewhere; an id on the Hub as it is."""
    return str(path.absolute()) if (path := Path(at_home(name))).exists() else name


def label_by_ray(options: argparse.Namespace, numbers: list[int]) -> None:
    """Let workers of Ray do these shards; one that dies is started again, and does its shard again."""
    import ray  # noqa: PLC0415 - an extra

    ray.init()
    kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    workers = min(len(numbers), int(ray.cluster_resources()[kind]))

    shards = ray.data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
    how = {f"num_{kind.lower()}s": 1, "compute": ray.data.ActorPoolStrategy(size=workers)}
    for row in shards.map(Labeller, fn_constructor_args=[options], **how).iter_rows():
        print(row["done"], flush=True)


def label_all(options: argparse.Namespace) -> None:
    """Label the shards that are missing."""
    state = join_processes(timedelta(days=30))  # for the first one to be done waits for the last
    labeller = Labeller(options, str(state.device))
    made, output, record = labeller.made, options.output, options.output / "settings.json"
    before = read_json(record.read_bytes(), record, SettingsError) if record.exists() else made
    for name in sorted({*made, *before}):
        if made.get(name) != before.get(name):
            told = f"{name} is {before.get(name)!r} there, {made.get(name)!r} here"
            raise SettingsError(f"{output} holds answers that were made otherwise: {told}; give another folder")
    output.mkdir(parents=True, exist_ok=True)
    missing = [number for number, path in enumerate(labeller.paths) if not path.exists()]
    with exchange():
        state.wait_for_everyone()  # until all have found the same ones missing
    if state.is_main_process:
        write_atomically(record, json.dumps(made, indent=2).encode())
    if options.ray and missing:
        label_by_ray(options, missing)
    else:
        for number in missing[state.process_index :: state.num_processes]:
            print(labeller.label(number), flush=True)
    with exchange():
        state.wait_for_everyone()
    if state.is_main_process:
        print(f"{sum(map(len, labeller.shards))} rows are labelled, in {len(labeller.paths)} files of {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", type=whole, help="fitted: a folder, or owner/name on the Hub")
    parser.add_argument("data", type=whole, help="JSON Lines, CSV, TSV or Parquet file, or id of a data set on the Hub")
    parser.add_argument("--output", type=lambda name: at_home(Path(name)).absolute(), required=True, help="folder")
    parser.add_argument("--text-column", default="text", metavar="NAME")
    for name, default in {"config": None, "split": "train", "revision": None}.items():
        parser.add_argument(f"--{name}", default=default, help="of a data set on the Hub")
    parser.add_argument("--shard-rows", type=int, default=10_000, help="rows of a shard, at most")
    parser.add_argument("--precision", choices=["auto", "bf16", "no"], default="auto", help="of the encoder")
    parser.add_argument("--to", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--ray", action="store_true", help="by workers of Ray")
    try:
        label_all(parser.parse_args())
    except TextMetaError as error:
        sys.exit(str(error))
