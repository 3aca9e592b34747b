"""What a task embedding is worth: conditioned starts against their controls, retrieval, and nearness against transfer.

python benchmarks/task_embedding.py --data-dir DIR

DIR holds NAME.jsonl (text, label) and NAME.splits.json of the corpora in task_corpora.py. Every finished run is a line
of the results file, and is not repeated: the same command goes on where it was interrupted, and prints the tables.
--quick is a small version of everything (its own results file), --tables prints what there is and runs nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from runs import Run, do_missing, read_lines
from task_arms import ARMS, INNER, score_arm, swap, task_conditions, train_model
from task_corpora import TRAINED, Corpora, episodes_of, load_corpora
from task_retrieval import retrieval, transfer
from task_tables import print_tables
from tqdm import tqdm

from textmeta.cli import run_recipe
from textmeta.errors import SettingsError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import without_conditioning
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings
from textmeta.model.task_encoder import TaskEncoderSettings

EPISODE_SEED = 11
PARTS = ("choose", "report", "retrieval", "transfer")
BANKS = ConditioningSettings("banks")
# what is chosen among, by leaving out one of the training corpora at a time
VARIANTS = {
    "banks": BANKS,
    "banks, set transformer": replace(BANKS, task_encoder=TaskEncoderSettings("set_transformer")),
    "banks, graph": replace(BANKS, task_encoder=TaskEncoderSettings("graph")),
    "banks, own temperature": replace(BANKS, temperature=True),
    "gates": ConditioningSettings("gates"),
    "own temperature": ConditioningSettings("none", temperature=True),
}
# and what is reported, with which arms
REPORTED = {
    "banks": ARMS,
    "banks, swapped in training": ("true",),
    "one bank of the same size": ("mean",),
    "own temperature": ("true", "between", "mean"),
}
RANK = 8
# B of rank 8 and four banks of it, with one A, are as many numbers as A and B of rank 24
SAME_SIZE_RANK = 24


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of this benchmark.

    Args:
        data_dir: folder with the corpora.
        quick: a small version of everything.
        parts: which parts to run: choose, report, retrieval, transfer.
        seeds: of the training runs that are reported.
        steps: outer steps of a reported run.
        choosing_steps: outer steps of a run that leaves out a corpus.
        episodes: of each corpus and number of shots.
        rows: texts of a class that are used.
        results: file of results; by default benchmarks/results/task_embedding.jsonl, or …_quick.jsonl.
        tables: print the tables of what there is, and run nothing.
        encoder: the encoder.
    """

    data_dir: Path
    quick: bool = False
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    steps: int = 150
    choosing_steps: int = 60
    episodes: int = 50
    rows: int = 60
    results: Path | None = None
    tables: bool = False
    encoder: EncoderSettings = field(default_factory=lambda: EncoderSettings(max_length=32, cache_mb=8192))

    def __post_init__(self) -> None:
        """Check what would otherwise fail only later."""
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise SettingsError(f"parts must be some of {PARTS}, given {unknown[0]!r}")

    def scaled(self) -> "BenchmarkSettings":
        """Return what --quick means."""
        name = "task_embedding_quick.jsonl" if self.quick else "task_embedding.jsonl"
        results = self.results or Path(__file__).parent / "results" / name
        if not self.quick:
            return replace(self, results=results)
        return replace(self, results=results, seeds=[0], steps=10, choosing_steps=5, episodes=10, rows=20)


class Bench:
    """The encoders and corpora that all runs share."""

    def __init__(self, settings: BenchmarkSettings) -> None:
        self.settings = settings
        self._encoders: dict[int, Encoder] = {}

    @cached_property
    def corpora(self) -> Corpora:
        """The corpora, loaded when the first run needs them."""
        return load_corpora(self.settings.data_dir, self.settings.rows)

    def encoder(self, rank: int = RANK) -> Encoder:
        """Return an encoder with LoRA of some rank; all have the frozen layers' states in common."""
        if rank not in self._encoders:
            made = Encoder(self.settings.encoder, LoraSettings(rank=rank, alpha=2 * rank))
            for other in self._encoders.values():
                made._states_cache, made._frozen_cache = other._states_cache, other._frozen_cache
            self._encoders[rank] = made
        return self._encoders[rank]

    def runs(self) -> Iterator[Run]:
        """Yield all runs that the settings ask for."""
        settings = self.settings
        encoder = {"encoder": settings.encoder.model, "max_length": settings.encoder.max_length, "rows": settings.rows}
        common = {"episodes": settings.episodes, **encoder}
        if "choose" in settings.parts:
            for left_out in TRAINED[-1:] if settings.quick else TRAINED:
                for variant in VARIANTS:
                    key = {"part": "choose", "left_out": left_out, "variant": variant, "seed": 0}
                    yield Run(key | common | {"steps": settings.choosing_steps}, lambda k=key: self.choose(k))
        if "report" in settings.parts:
            key = {"part": "report", "variant": "not trained", "seed": None, "steps": 0}
            yield Run(key | common, lambda: self.report("not trained", 0))
            for seed in settings.seeds:
                for variant in REPORTED:
                    key = {"part": "report", "variant": variant, "seed": seed, "steps": settings.steps}
                    yield Run(key | common, lambda v=variant, s=seed: self.report(v, s))
        if "retrieval" in settings.parts:
            for seed in settings.seeds:
                key = {"part": "retrieval", "seed": seed, "quick": settings.quick, **encoder}
                yield Run(key, lambda s=seed: retrieval(self.encoder(), self.corpora, s, settings.quick))
        if "transfer" in settings.parts:
            key = {"part": "transfer", "quick": settings.quick, **encoder}
            yield Run(key, lambda: transfer(self.encoder(), self.corpora, settings.quick))

    def choose(self, key: dict[str, Any]) -> dict[str, Any]:
        """Train without one corpus, and score on the classes of that corpus that others would be trained on."""
        others = [corpus for name, corpus in self.corpora.train.items() if name != key["left_out"]]
        conditioning = VARIANTS[key["variant"]]
        steps = self.settings.choosing_steps
        trained = train_model(self.encoder(), others, conditioning, steps=steps, seed=key["seed"])
        return self.scores(self.encoder(), *trained, "train", [key["left_out"]], ("true", "between", "mean"))

    def report(self, variant: str, seed: int) -> dict[str, Any]:
        """Train on all training corpora, and score on their other classes and on the unseen corpora."""
        encoder = self.encoder(SAME_SIZE_RANK if variant == "one bank of the same size" else RANK)
        if variant == "not trained":
            trained = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size), INNER
        else:
            trained = train_model(
                encoder,
                list(self.corpora.train.values()),
                None if "one bank" in variant else VARIANTS[variant.partition(", swapped")[0]],
                steps=self.settings.steps,
                seed=seed,
                swapped="swapped" in variant,
            )
        arms = REPORTED.get(variant, ("mean",))
        return self.scores(encoder, *trained, "test", list(self.corpora.test), arms)

    def scores(
        self, encoder: Encoder, parameters: Any, inner: Any, classes: str, names: Sequence[str], arms: Sequence[str]
    ) -> dict[str, Any]:
        """Return right answers and NLL of every episode, by corpus, shots, arm and stage."""
        shots_of = (1, 5)
        everywhere = getattr(self.corpora, classes)
        count = self.settings.episodes
        episodes = {shots: episodes_of(everywhere, shots, count, EPISODE_SEED) for shots in shots_of}
        conditions = task_conditions(encoder, parameters, inner, episodes) if inner.conditioning else {}
        found: dict[str, Any] = {}
        for name in tqdm(names, desc="corpora", unit="corpus", leave=False):
            for shots in shots_of:
                cell = {"queries": len(episodes[shots][name][0].query_texts)}
                for arm in arms:
                    loop = without_conditioning(inner) if arm == "mean" else inner
                    given = None if arm == "mean" else swap(conditions, shots, name, arm)
                    cell[arm] = score_arm(encoder, parameters, loop, episodes[shots][name], given)
                    if shots == 1:  # there is nothing to learn from, so no step is taken
                        del cell[arm]["adapted"]
                found[f"{name} {shots}"] = cell
        return found


def main(settings: BenchmarkSettings) -> None:
    """Do the runs that are not done yet, then print the tables."""
    settings = settings.scaled()
    path = settings.results
    assert path is not None
    lines = read_lines(path)
    runs = list(Bench(settings).runs())
    if not settings.tables:
        do_missing(runs, lines, path)
    wanted = [run.key for run in runs]  # of other settings, a file may hold lines too
    print_tables([line for line in lines if line["key"] in wanted])


if __name__ == "__main__":
    run_recipe(main, BenchmarkSettings, __doc__)
