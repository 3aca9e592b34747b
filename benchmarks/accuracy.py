"""Accuracy on unseen classes and unseen corpora, beside every baseline, on the same encoder and the same episodes.

python benchmarks/accuracy.py --data-dir DIR

DIR holds NAME.jsonl (text, label), and NAME.splits.json of the corpora with folds. Every finished run is a line of the
results file, and is not repeated: the same command goes on where it was interrupted, and prints the tables. With more
episodes than a line has, those alone that it lacks are run, and a line of all is added. --quick is
a small version of everything, whose figures are of no worth; --tables prints what there is and runs nothing.

Two processes can share the work, if each has corpora (or folds) of its own, and a file of its own:

python benchmarks/accuracy.py --data-dir DIR --corpora "[banking77, clinc150]" --results runs/one.jsonl
python benchmarks/accuracy.py --data-dir DIR --folds "[01, 02]" --corpora "[huffpost]" --results runs/two.jsonl

When both have ended, `cat runs/one.jsonl runs/two.jsonl >> benchmarks/results/accuracy.jsonl` puts them together, and
--tables prints all. Where several lines are of the same run, the first one counts.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accuracy_bench import Bench, ending
from accuracy_cache import DiskCache
from accuracy_episodes import EPISODE_SEED, PARTS, QUERIES, Cell, Corpora
from accuracy_methods import METHODS
from accuracy_scope import SCOPE_METHODS
from accuracy_scope_tables import print_scope_tables
from accuracy_scores import joined
from accuracy_tables import print_tables
from accuracy_training import RecipeSettings, Trainer, digest, read_recipe

# where a folder `runs` lies beside, ruff sorts benchmarks/runs.py elsewhere
# isort: split
from runs import Line, Run, do_missing, read_lines

# isort: split
from textmeta.cli import run_recipe
from textmeta.data.class_splits import read_class_split
from textmeta.errors import DataError, SettingsError

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "recipes" / "configs"
UNSEEN = ("huffpost", "20news", "trec6", "tweeteval_emotion")
VERSIONS = ("textmeta", "torch", "transformers", "setfit")
# --quick: corpora of each part (any two, where the folder has none of them), and episodes of what is dear
QUICK_FOLDED, QUICK_UNSEEN = ("banking77", "huffpost"), ("trec6", "huffpost")
QUICK_CORPORA = {
    "classes": QUICK_FOLDED,
    "all_way": QUICK_FOLDED,
    "corpora": QUICK_UNSEEN,
    "curve": QUICK_UNSEEN,
    "scope": ("clinc150",),
}
QUICK_MOST = {"setfit": 2, "sentence-transformers": 2, "lora": 2}
QUICK_SETFIT = ("classes", (1, 5))  # a fit at 5 shots takes half a minute
QUICK_ADAPTED, QUICK_SCOPE, QUICK_CALIBRATION, QUICK_VALIDATION = 8, 5, 30, 10


@dataclass(frozen=True)
class AccuracySettings:
    """Settings of this benchmark.

    Args:
        data_dir: folder with the corpora.
        quick: a small version of everything.
        tables: print the tables of what there is, and run nothing.
        parts: which parts to run: classes, all_way, corpora, curve, scope.
        corpora: names of the corpora that are used; by default all of the folder.
        folds: that are used; YAML takes 01 for a number, so a number means its two digits.
        methods: that are run; by default all.
        unseen: corpora that are for reporting alone, as wholes.
        seeds: of meta-training; figures are means over them, episode by episode.
        adapters: for unseen corpora: folders, or names of adapters in the package; figures are means over them. What a
            name ends in tells them apart.
        protonet_adapters: the same for the ProtoNet baseline.
        episodes: of each cell, instead of the protocol's numbers.
        rows: texts of a class that are used, instead of all.
        steps: outer steps, instead of the recipe's.
        all_episodes: of a cell, for the dear methods, too, as a GPU can afford.
        device: that everything runs on: cpu, cuda.
        recipe: YAML with the sections encoder, lora, episodes, inner, training.
        protonet: the same, of the ProtoNet baseline; its number of steps follows from the time that ours takes.
        runs: folder of meta-training runs.
        cache: folder of frozen features and states.
        states_mb: states of a corpus that take more than so many MiB are not kept on the disk.
        results: file of results; by default benchmarks/results/accuracy.jsonl, with --quick runs/accuracy-quick.jsonl.
    """

    data_dir: Path
    quick: bool = False
    tables: bool = False
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    corpora: list[str] | None = None
    folds: list[str | int] = field(default_factory=lambda: ["01", "02", "03", "04", "05"])
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    unseen: list[str] = field(default_factory=lambda: list(UNSEEN))
    seeds: list[int] = field(default_factory=lambda: [0])
    adapters: list[str] = field(default_factory=lambda: ["textmeta/minilm-general"])
    protonet_adapters: list[str] = field(default_factory=list)
    episodes: int | None = None
    rows: int | None = None
    steps: int | None = None
    all_episodes: bool = False
    device: str = "cpu"
    recipe: Path = HERE / "accuracy.yaml"
    protonet: Path = CONFIGS / "banking77_protonet.yaml"
    runs: Path = Path("runs/accuracy")
    cache: Path = Path("runs/cache")
    states_mb: int = 2048
    results: Path | None = None

    def __post_init__(self) -> None:
        """Check what would otherwise fail only later."""
        folds = [f"{fold:02d}" if isinstance(fold, int) else fold for fold in self.folds]
        object.__setattr__(self, "folds", folds)
        for kind, given, known in (("parts", self.parts, PARTS), ("methods", self.methods, METHODS)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise SettingsError(f"{kind} must be some of {list(known)}, given {unknown[0]!r}")
        for adapters in (self.adapters, self.protonet_adapters):
            ends = list(map(ending, adapters))
            twice = next((name for name, end in zip(adapters, ends, strict=True) if ends.count(end) > 1), None)
            if twice is not None:
                raise SettingsError(f"adapters must end in different names, given {twice!r} and another like it")

    def scaled(self) -> "AccuracySettings":
        """Return what --quick means, and where results go."""
        if not self.quick:
            return replace(self, results=self.results or HERE / "results" / "accuracy.jsonl")
        return replace(
            self,
            folds=self.folds[:1],
            seeds=self.seeds[:1],
            episodes=self.episodes or 20,
            rows=self.rows or 30,
            steps=self.steps or 20,
            results=self.results or Path("runs/accuracy-quick.jsonl"),
        )


class Runs:
    """All runs that the settings ask for."""

    def __init__(self, settings: AccuracySettings, lines: list[Line]) -> None:
        self.settings = settings
        self.lines = lines
        self.told = {"versions": _versions(), "device": settings.device}
        cache = DiskCache(settings.cache, settings.states_mb)
        recipe = read_recipe(settings.recipe)
        protonet = read_recipe(settings.protonet)
        if settings.steps:
            recipe = recipe.with_steps(settings.steps, 0)
        if settings.quick:
            recipe, protonet = _quick(recipe), _quick(protonet)
        self.bench = Bench(
            corpora=Corpora(settings.data_dir, settings.rows),
            cache=cache,
            trainer=Trainer(settings.runs, cache),
            recipe=recipe,
            protonet=replace(protonet, encoder=recipe.encoder),
            seeds=settings.seeds,
            adapters={"textmeta": settings.adapters, "protonet": settings.protonet_adapters},
            device=settings.device,
        )

    def __iter__(self) -> Iterator[Run]:
        """Yield them, those of a corpus and fold together."""
        for cell in self._cells():
            ways = min(cell.ways or 10**9, len(self.bench.corpora.reported(cell).class_names))
            methods = SCOPE_METHODS if cell.part == "scope" else METHODS
            for name in [name for name in self.settings.methods if name in methods]:
                method = methods[name]
                if (method.parts and cell.part not in method.parts) or not (cell.shots or method.has_names):
                    continue
                count = cell.episodes if self.settings.all_episodes else method.count(ways * cell.shots, cell)
                if self.settings.quick:
                    count = min(count, _quick_count(name, cell))
                for variant in method.variants(self.bench, cell) if count else []:
                    own = replace(cell, episodes=count)
                    key = self._key(own, name, variant)
                    yield Run(key, lambda k=key, c=own, n=name, v=variant: self._work(k, c, n, v))

    def _cells(self) -> Iterator[Cell]:
        settings, corpora = self.settings, self.bench.corpora
        said = set()
        for part in settings.parts:
            used = self._used(part)
            for cell in corpora.cells(part, used, settings.folds, settings.unseen, settings.episodes):
                try:
                    corpora.episodes(replace(cell, episodes=1))
                except DataError as error:
                    word = f"left out: {part}, {cell.corpus}, {cell.shots} shots: {error}"
                    if word not in said:  # of one fold, where it is the same of all
                        print(word)
                    said.add(word)
                else:
                    yield cell

    def _used(self, part: str) -> list[str]:
        """Return the corpora of a part."""
        settings, corpora = self.settings, self.bench.corpora
        used = [name for name in corpora.names if settings.corpora is None or name in settings.corpora]
        if not settings.quick:
            return used
        able = [name for name in used if name in (settings.unseen if part in ("corpora", "curve") else corpora.folded)]
        return [name for name in able if name in QUICK_CORPORA[part]] or able[:2]

    def _key(self, cell: Cell, method: str, variant: dict[str, Any]) -> dict[str, Any]:
        bench, corpus = self.bench, self.bench.corpora.corpus(cell.corpus)
        encoder = bench.encoder(bench.recipe.lora)
        key = {**asdict(cell), "method": method, "queries": QUERIES, "episode_seed": EPISODE_SEED}
        if cell.fold is not None:
            split = read_class_split(self.settings.data_dir / f"{cell.corpus}.splits.json", cell.fold)
            key["classes"] = digest(asdict(split))
        key |= {"data": corpus.sha256[:12], "encoder": encoder.weights_sha256[:12]}
        for outside in bench.corpora.sources(cell)[1:]:
            key["outside"] = outside.sha256[:12]
        return key | {"pooling": encoder.settings.pooling, "max_length": encoder.settings.max_length, **variant}

    def _work(self, key: dict[str, Any], cell: Cell, method: str, variant: dict[str, Any]) -> dict[str, Any]:
        for line in self.lines:  # the same episodes may be in two parts
            if {**line["key"], "part": None} == {**key, "part": None} and self._is_made_here(line):
                return line["result"]
        before = self._first_episodes(key)
        episodes = self.bench.corpora.episodes(cell)[before["key"]["episodes"] if before else 0 :]
        methods = SCOPE_METHODS if cell.part == "scope" else METHODS
        result = methods[method].run(self.bench, cell, episodes, variant).result
        return joined(before["result"], result) if before else result

    def _first_episodes(self, key: dict[str, Any]) -> Line | None:
        """Return, of the lines of the same run on fewer episodes, and made alike, the one with the most."""
        key = {**key, "part": None}
        shorter = [
            line
            for line in self.lines
            if self._is_made_here(line)
            and line["key"]["episodes"] < key["episodes"]
            and {**line["key"], "part": None, "episodes": key["episodes"]} == key
        ]
        return max(shorter, key=lambda line: line["key"]["episodes"], default=None)

    def _is_made_here(self, line: Line) -> bool:
        """Return whether what a line says of device and versions is true of this process, too."""
        return {"versions": line["versions"], "device": line.get("device", "cpu")} == self.told


def main(settings: AccuracySettings) -> None:
    """Do the runs that are not done yet, then print the tables."""
    settings = settings.scaled()
    path = settings.results
    assert path is not None
    lines = first_lines(read_lines(path))
    if not settings.tables:
        runs = Runs(settings, lines)
        try:
            do_missing(runs, lines, path, {**runs.told, "date": datetime.now(UTC).date().isoformat()})
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command goes on from here")
    wanted = {
        "part": settings.parts,
        "corpus": settings.corpora,
        "fold": [None, *settings.folds],
        "method": settings.methods,
    }
    chosen = [line for line in lines if all(v is None or line["key"][k] in v for k, v in wanted.items())]
    chosen = [line for line in chosen if _is_of(line["key"], settings)]
    print_tables(chosen, quick=settings.quick, pictures=None if settings.quick else path.parent)
    print_scope_tables(chosen)


def _is_of(key: dict[str, Any], settings: AccuracySettings) -> bool:
    """Return whether a run is of the seeds and adapters that are asked for; what is not meta-trained always is."""
    model = key.get("model")
    if model is None:
        return True
    if "adapter" in key:
        asked = settings.protonet_adapters if model == "protonet" else settings.adapters
        return key["adapter"] in map(ending, asked)
    return key["seed"] in settings.seeds


def first_lines(lines: list[Line]) -> list[Line]:
    """Return the first line of each key: files of several processes may have been put together."""
    found: dict[str, Line] = {}
    for line in lines:
        found.setdefault(json.dumps(line["key"], sort_keys=True), line)
    return list(found.values())


def _quick(recipe: RecipeSettings) -> RecipeSettings:
    """Return a recipe that is validated and calibrated on few episodes."""
    few = min(recipe.training.validation_episodes, QUICK_VALIDATION)
    calibration = recipe.calibration
    if calibration is not None:
        calibration = replace(calibration, episodes=min(calibration.episodes, QUICK_CALIBRATION))
    return replace(recipe, training=replace(recipe.training, validation_episodes=few), calibration=calibration)


def _quick_count(method: str, cell: Cell) -> int:
    """Return how many episodes --quick runs a method on, at most."""
    if cell.part == "scope":
        return QUICK_SCOPE
    if method == "setfit" and not (cell.part == QUICK_SETFIT[0] and cell.shots in QUICK_SETFIT[1]):
        return 0
    if cell.fold is None and method.startswith("textmeta"):  # whose adapter takes steps
        return QUICK_ADAPTED
    return QUICK_MOST.get(method, cell.episodes)


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    run_recipe(main, AccuracySettings, __doc__)
