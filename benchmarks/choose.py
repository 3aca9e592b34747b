"""How adapters and frozen baselines do on the choose corpora, from recorded episodes; --run records what is missing.

    python benchmarks/choose.py --data-dir DATA                        # the table
    python benchmarks/choose.py --data-dir DATA --by-corpus
    python benchmarks/choose.py --data-dir DATA --run --adapters runs/core/base-0 --variants plain names

Episodes are the same for every method: 5 ways (all classes of a corpus with fewer), 5 queries a class, 256 tokens (0.1
at its own 64). Differences are paired by episode; intervals are of 95 %, over episodes, of means over corpora.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choose_episodes import EPISODE_SEED, SHOTS, Cell, ChooseCorpora, result_of, with_unlabelled
from runs import Line, Run, do_missing, read_lines
from scipy import stats
from torch import Tensor

from textmeta.data.episodes import Episode
from textmeta.data.labels import readable_name
from textmeta.encoder.pretrained import tensors_digest
from textmeta.encoder.token_states import TokenStateReader, TokenStates
from textmeta.heads.common import Examples
from textmeta.heads.pooling import pool
from textmeta.heads.unlabelled import soft_labelled_ridge
from textmeta.meta import learner as learner_module
from textmeta.meta.batch import Rows, TaskBatch
from textmeta.meta.evaluation import in_parts
from textmeta.meta.learner import LearnedTask, TaskLearner
from textmeta.sharing.store import load_adapter, save_adapter

RESULTS = Path(__file__).parent / "results"
BASELINES, CORE = RESULTS / "v0_1.jsonl", RESULTS / "choose.jsonl"
SHIPPED = Path(__file__).parents[1] / "textmeta" / "adapters" / "minilm-general"
FIRST = "first-settled"  # the adapter that came with textmeta before
CHUNK, EPISODES = 50, 200  # of a line; of a cell
OTHER_DRAWS = 3  # third number of the seed that wrong names are drawn by


def named(episode: Episode, names: Sequence[str]) -> Episode:
    """Return an episode that comes with names."""
    return replace(episode, label_names=tuple(names))


def true_names(episode: Episode) -> Episode:
    """Return an episode with the names of its classes."""
    return named(episode, [readable_name(name) for name in episode.class_names])


def permuted(episode: Episode, cell: Cell, number: int) -> Episode:
    """Return an episode with the names of its classes in another order: each class has another's name."""
    rng = np.random.default_rng((EPISODE_SEED, number, OTHER_DRAWS))
    cycle = rng.permutation(episode.ways)
    names = [""] * episode.ways
    for own, other in zip(cycle, np.roll(cycle, 1), strict=True):
        names[own] = readable_name(episode.class_names[other])
    return named(episode, names)


def codes(episode: Episode, cell: Cell, number: int) -> Episode:
    """Return an episode whose classes have random codes of three letters for names."""
    rng = np.random.default_rng((EPISODE_SEED, number, OTHER_DRAWS))
    return named(episode, ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 3)) for _ in range(episode.ways)])


def without_examples(episode: Episode) -> Episode:
    """Return an episode without a support set."""
    return replace(episode, support_texts=(), support_labels=episode.support_labels[:0])


def unlabelled(mixture: str) -> Callable[[Episode, Cell, int], Episode]:
    """Return what adds unlabelled texts to an episode."""
    return lambda e, cell, number: with_unlabelled(e, cell.corpus, EPISODE_SEED, number, mixture=mixture)


Variant = Callable[[Episode, Cell, int], Episode]
VARIANTS: dict[str, Variant] = {
    "plain": lambda e, cell, number: e,
    "names": lambda e, cell, number: true_names(e),
    "permuted": permuted,
    "codes": codes,
    "unlabelled": unlabelled("same"),
    "unlabelled-skewed": unlabelled("skewed"),
    "unlabelled-others": unlabelled("others"),
    "names-unlabelled": lambda e, cell, number: true_names(unlabelled("same")(e, cell, number)),
    "names-unlabelled-skewed": lambda e, cell, number: true_names(unlabelled("skewed")(e, cell, number)),
    "names-unlabelled-others": lambda e, cell, number: true_names(unlabelled("others")(e, cell, number)),
    "names-alone": lambda e, cell, number: true_names(without_examples(e)),
    "names-alone-unlabelled": lambda e, cell, number: without_examples(VARIANTS["names-unlabelled"](e, cell, number)),
}


class KnownStates:
    """Token states of the texts of one corpus, each read once."""

    def __init__(self, reader: TokenStateReader, factors: Mapping[str, Tensor]) -> None:
        self.reader, self.factors = reader, factors
        self.states: dict[str, Tensor] = {}

    @torch.no_grad()
    def know(self, texts: Sequence[str]) -> None:
        """Read the texts that are not known yet."""
        new = sorted({text for text in texts if text not in self.states})
        for start in range(0, len(new), 512):
            part = new[start : start + 512]
            found = self.reader.read(part, self.factors).unpadded()
            self.states.update({text: state.clone() for text, state in zip(part, found, strict=True)})

    def read(self, texts: Sequence[str], factors: object = None, row_task: Tensor | None = None) -> TokenStates:
        """Return the states of texts that are known."""
        if row_task is not None:
            return self.reader.read(texts, factors, row_task)  # type: ignore[arg-type]
        return TokenStates.padded([self.states[text] for text in texts], overhead=512)


class EvidenceAfter(TaskLearner):
    """Learns tasks with the mixture by evidence from after the steps, which have seen what the folds leave out."""

    def learn(self, batch: TaskBatch, second_order: bool = False) -> LearnedTask:
        """Learn tasks; their texts are read twice."""
        support = self._read(batch, {})[0]
        queries, rows = self.adapter.initialisation.queries, batch.support.row_task
        examples = Examples.of(batch.labels, batch.ways, queries.dtype)
        adapted = self._adapt_features(batch, support, examples, second_order).queries
        self.after = batch.support.pad(pool(support, adapted, rows if adapted.ndim == 3 else None))
        return super().learn(batch, second_order)

    def _evidence(self, views: Tensor, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
        return super()._evidence(self.after, examples)


class Contestant:
    """An adapter and what it has read of a corpus."""

    def __init__(
        self,
        folder: Path,
        changes: Mapping[str, Any],
        learner: type[TaskLearner] = TaskLearner,
        precision: str = "no",
        cache: Path | None = None,
    ) -> None:
        adapter, _ = load_adapter(folder)
        self.learner = learner
        self.name = folder.name
        told = f"{tensors_digest(adapter.initialisation.tensors())} {adapter.learner}"
        self.digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        self.reader, self.cache = adapter.load_reader(precision=precision), cache
        self.adapter = replace(adapter, learner=replace(adapter.learner, **changes))
        self.corpus, self.states = "", KnownStates(self.reader, {})

    def answers(self, cell: Cell, episodes: Sequence[Episode]) -> tuple[list[np.ndarray], float]:
        """Return the class probabilities of each episode's queries, and the seconds of an episode, its texts read."""
        if cell.corpus.name != self.corpus:
            self.corpus, self.states = cell.corpus.name, KnownStates(self.reader, self.adapter.initialisation.lora)
            if self.cache:
                self.reader.cache(cell.corpus.texts, folder=self.cache)
        texts = [[*e.support_texts, *e.query_texts, *e.unlabelled_texts, *(e.label_names or ())] for e in episodes]
        self.states.know([text for part in texts for text in part])
        if "lora" in self.adapter.learner.adapt:  # these steps read the support set again and again
            self.reader.cache([text for part in texts for text in part])
        learner = self.learner(self.states, self.adapter)
        start, answers = time.perf_counter(), []
        for together in in_parts(episodes):
            answers += probabilities(learner, together)
        return answers, (time.perf_counter() - start) / len(episodes)


@torch.no_grad()
def probabilities(learner: TaskLearner, episodes: Sequence[Episode]) -> list[np.ndarray]:
    """Learn the tasks of episodes together, and classify their queries."""
    task = learner.learn(TaskBatch.of_episodes(episodes))
    queries = Rows.of([e.query_texts for e in episodes], torch.device("cpu"))
    found = learner.answer(task, queries).logits.double().softmax(-1).numpy()
    return [rows[: len(e.query_texts), : e.ways] for rows, e in zip(found, episodes, strict=True)]


def runs(
    corpora: ChooseCorpora,
    contestants: Sequence[Contestant],
    variants: Sequence[str],
    episodes: int,
    shots: Sequence[int],
    suffix: str,
) -> Iterator[Run]:
    """Yield the runs of some contestants, corpus by corpus."""
    for cell in corpora.cells(shots):
        for who in contestants:
            for first in range(0, episodes, CHUNK):
                for variant in variants:
                    if "others" in variant and len(cell.corpus.class_names) <= 5:
                        continue
                    if "alone" in variant and cell.shots != 1:
                        continue
                    key = {**cell.key(variant + suffix, first, CHUNK), "adapter": who.name}
                    yield Run(key, lambda c=cell, w=who, v=variant, f=first: one(c, w, v, f))


def one(cell: Cell, who: Contestant, variant: str, first: int) -> dict[str, Any]:
    """Score a chunk of episodes."""
    episodes = [VARIANTS[variant](cell.episode(n), cell, n) for n in range(first, first + CHUNK)]
    answers, seconds = who.answers(cell, episodes)
    return {**result_of(answers, episodes), "adapter_sha256": who.digest, "episode_seconds": round(seconds, 4)}


Cells = dict[tuple[str, int], np.ndarray]  # (corpus, shots) -> accuracy of each episode, in percent


def accuracies(lines: Sequence[Line], measure: str = "accuracy") -> dict[str, Cells]:
    """Return of each method its cells; a core method is VARIANT @ ADAPTER. Accuracy and F1 in percent, NLL in nats."""
    parts: dict[tuple[str, str, int], dict[int, np.ndarray]] = {}
    classes: dict[tuple[str, int], tuple[int, str]] = {}
    for line in lines:
        key, result = line["key"], line["result"]
        drawn_from = (key["classes"], key["sha256"])
        if classes.setdefault((key["corpus"], key["shots"]), drawn_from) != drawn_from:
            raise SystemExit(f"{key['corpus']} at {key['shots']} shots was recorded on two versions of the corpus")
        method = key["method"] + (f" @ {key['adapter']}" if "adapter" in key else "")
        values = 100 * np.array(result["right"]) / np.array(result["queries"])
        if measure != "accuracy":
            values = np.array(result[measure]) / {"nll": 1000, "f1": 10}[measure]
        parts.setdefault((method, key["corpus"], key["shots"]), {})[key["first"]] = values
    found: dict[str, Cells] = {}
    for (method, corpus, shots), chunks in parts.items():
        whole, at = [], 0
        while at in chunks:  # a gap ends what can be paired
            whole.append(chunks[at])
            at += len(chunks[at])
        if whole:
            found.setdefault(method, {})[corpus, shots] = np.concatenate(whole)
    return found


def calibration_errors(lines: Sequence[Line]) -> dict[tuple[str, int], float]:
    """Return the expected calibration error, in percent, of each core method at each number of shots."""
    bins: dict[tuple[str, int], np.ndarray] = {}
    for line in lines:
        key, result = line["key"], line["result"]
        if "bins" in result:
            name = (f"{key['method']} @ {key['adapter']}", key["shots"])
            bins[name] = bins.get(name, 0) + np.array(result["bins"])
    return {
        name: 100 * float(np.abs(part[:, 1] - part[:, 2] / 1000).sum() / part[:, 0].sum())
        for name, part in sorted(bins.items())
    }


def difference(one: Cells, other: Cells, keys: Sequence[tuple[str, int]]) -> tuple[float, float] | None:
    """Return the mean over cells of the paired differences, and half its 95 % interval."""
    pairs = [(one[key], other[key]) for key in keys if key in one and key in other]
    rows = [a[: min(len(a), len(b))] - b[: min(len(a), len(b))] for a, b in pairs]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        return None
    error = np.sqrt(sum(row.var(ddof=1) / len(row) for row in rows)) / len(rows)
    freedom = sum(len(row) - 1 for row in rows)
    return float(np.mean([row.mean() for row in rows])), float(stats.t.ppf(0.975, freedom) * error)


def keys_at(found: Mapping[str, Cells], shots: int) -> list[tuple[str, int]]:
    """Return the cells at a number of shots that any method has."""
    return sorted({key for cells in found.values() for key in cells if key[1] == shots})


def better_baseline(found: Mapping[str, Cells], shots: int) -> str:
    """Return which of prototypes and logistic regression (last layer, 256 tokens) has the higher mean."""
    names = [name for name in ("prototypes-last-256", "logistic-last-256") if name in found]
    return max(names, key=lambda name: np.mean([v.mean() for key, v in found[name].items() if key[1] == shots]))


def table(found: Mapping[str, Cells]) -> Iterator[str]:
    """Yield the lines of the table: mean accuracy at each number of shots, and the difference to three others."""
    width = max(36, *map(len, found)) + 2
    yield f"{'method':{width}}" + "".join(f"{k:>2} shots".rjust(16) for k in SHOTS) + "  (corpora x episodes)"
    for method in sorted(found, key=lambda name: ("@" in name, name)):
        cells = found[method]
        parts = []
        for k in SHOTS:
            own = [values.mean() for key, values in cells.items() if key[1] == k]
            parts.append(f"{np.mean(own):.2f}" if own else "-")
        sizes = [len(v) for v in cells.values()]
        yield (
            f"{method:{width}}" + "".join(p.rjust(16) for p in parts) + f"  {len({c for c, _ in cells})} x {min(sizes)}"
        )
    yield ""
    yield "Paired differences, points ± 95 %"
    yield f"{'':{width}}" + "".join(f"{k:>2} shots".rjust(16) for k in SHOTS) + "pooled".rjust(16)
    for method in sorted(name for name in found if "@" in name):
        variant, _, adapter = method.partition(" @ ")
        rivals = {
            "better of prototypes and logistic": None,
            "logistic-views-256": "logistic-views-256",
            "textmeta-0.1": "textmeta-0.1",
        }
        if variant != "plain":  # with names or without, unlabelled texts are compared with none
            other = variant.partition("unlabelled")[0].rstrip("-") or "plain"
            other = "plain" if other == variant else other
            rivals = {other: f"{other} @ {adapter}"}
        if variant == "names-alone":
            rivals = {"cosine of text and name": "names-last-256"}
        if not adapter.startswith("first"):
            rivals["the first meta-training"] = f"{variant} @ {FIRST}"
        yield method
        for title, rival in rivals.items():
            parts, pooled_one, pooled_other = [], {}, {}
            for k in SHOTS:
                other = rival or better_baseline(found, k)
                keys = keys_at(found, k)
                told = difference(found[method], found.get(other, {}), keys)
                parts.append("-" if told is None else f"{told[0]:+.2f} ± {told[1]:.2f}")
                for key in keys:
                    if key in found[method] and key in found.get(other, {}):
                        pooled_one[key], pooled_other[key] = found[method][key], found[other][key]
            whole = difference(pooled_one, pooled_other, list(pooled_one))
            parts.append("-" if whole is None else f"{whole[0]:+.2f} ± {whole[1]:.2f}")
            yield f"{'  over ' + title:{width}}" + "".join(p.rjust(16) for p in parts)


def by_corpus(found: Mapping[str, Cells], method: str) -> Iterator[str]:
    """Yield, for each corpus, the accuracy of a method and its difference to the better baseline."""
    yield f"{method}: accuracy (difference to the better of prototypes and logistic ± 95 %; ! is wholly below -1)"
    for corpus in sorted({key[0] for key in found[method]}):
        parts = []
        for k in SHOTS:
            key = (corpus, k)
            if key not in found[method]:
                parts.append("-")
                continue
            told = difference(found[method], found[better_baseline(found, k)], [key])
            below = told is not None and told[0] + told[1] < -1
            parts.append(
                f"{found[method][key].mean():.1f}"
                + ("" if told is None else f" ({told[0]:+.1f} ± {told[1]:.1f}){'!' * below}")
            )
        yield f"{corpus:24}" + "".join(p.rjust(22) for p in parts)


def results_of(found: Mapping[str, Cells], errors: Mapping[tuple[str, int], float], name: str) -> dict[str, Any]:
    """Return, as a model card takes it, how an adapter does beside prototypes, with names and without."""
    results = {}
    for variant, told in (("plain", ""), ("names", ", names read")):
        for k in SHOTS:
            method = f"{variant} @ {name}"
            own = {key: values for key, values in found.get(method, {}).items() if key[1] == k}
            rival = {key: found["prototypes-last-256"][key][: len(values)] for key, values in own.items()}
            rows = [difference(one, {key: 0 * v for key, v in own.items()}, list(own)) for one in (own, rival)]
            paired = difference(own, rival, list(own))
            if paired is None or None in rows:
                continue
            ours, frozen = ({"accuracy": row[0] / 100, "accuracy_ci95": row[1] / 100} for row in rows if row)
            mean, half = (value / 100 for value in paired)
            results[f"{len(own)} other corpora, 5-way {k}-shot{told}"] = {
                "frozen": frozen,
                "meta_trained": {**ours, "episodes": sum(map(len, own.values())), "ece": errors[method, k] / 100},
                "paired": {"difference": mean, "low": mean - half, "high": mean + half},
            }
    return results


def main() -> None:
    """Print the table, after recording what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--run", action="store_true", help="record what is missing of the adapters and variants named")
    parser.add_argument(
        "--adapters", type=Path, nargs="+", help="folders, or names of recorded ones; by default the shipped one"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--corpora", nargs="+", help="some of them; by default all")
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS))
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument(
        "--adapt", choices=("none", "pooling", "lora", "pooling+lora"), help="instead of the adapter's own"
    )
    parser.add_argument("--rounds", type=int, help="of soft labels for unlabelled texts; by default 3")
    parser.add_argument("--evidence-after", action="store_true", help="the mixture is told after the steps, not before")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of the encoder's matrix products")
    parser.add_argument("--cache", type=Path, help="folder for the states of the frozen layers, which adapters share")
    parser.add_argument("--by-corpus", action="store_true")
    parser.add_argument("--measure", choices=("accuracy", "f1", "nll"), default="accuracy")
    parser.add_argument("--results", type=Path, default=CORE)
    parser.add_argument("--card", type=Path, help="adapter folder whose card shall have its recorded figures")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = read_lines(arguments.results)
    if arguments.run:
        changes = {"adapt": arguments.adapt} if arguments.adapt else {}
        learner = EvidenceAfter if arguments.evidence_after else TaskLearner
        contestants = [
            Contestant(folder, changes, learner, arguments.precision, arguments.cache)
            for folder in arguments.adapters or [SHIPPED]
        ]
        for who in contestants:
            if any(
                line["key"]["adapter"] == who.name and line["result"]["adapter_sha256"] != who.digest for line in lines
            ):
                raise SystemExit(f"{arguments.results} has lines of another adapter named {who.name}: rename this one")
        suffix = f" adapt={arguments.adapt}" if arguments.adapt else ""
        if arguments.rounds is not None:
            suffix += f" rounds={arguments.rounds}"
            learner_module.soft_labelled_ridge = partial(soft_labelled_ridge, rounds=arguments.rounds)
        if arguments.evidence_after:
            suffix += " evidence-after"
        corpora = ChooseCorpora(arguments.data_dir, arguments.corpora)
        do_missing(
            list(runs(corpora, contestants, arguments.variants, arguments.episodes, arguments.shots, suffix)),
            lines,
            arguments.results,
        )
    names = [FIRST, *(folder.name for folder in arguments.adapters or [SHIPPED])]
    found = {
        method: cells
        for method, cells in accuracies(read_lines(BASELINES, mend=False) + lines, arguments.measure).items()
        if "@" not in method or method.partition(" @ ")[2] in names
    }
    print("\n".join(table(found)))
    errors = calibration_errors([line for line in lines if line["key"]["adapter"] in names])
    if errors:
        print("\nExpected calibration error, percent")
    for method in dict.fromkeys(method for method, _ in errors):
        parts = [f"{errors[method, k]:.1f}" if (method, k) in errors else "-" for k in SHOTS]
        print(f"{method:38}" + "".join(part.rjust(16) for part in parts))
    if arguments.card:
        adapter, _ = load_adapter(arguments.card)
        results = results_of(found, errors, arguments.card.name)
        save_adapter(arguments.card, replace(adapter, record={**adapter.record, "results": results}))
    if arguments.by_corpus:
        for method in sorted(name for name in found if name.startswith(("plain @", "names @"))):
            print("", *by_corpus(found, method), sep="\n")


if __name__ == "__main__":
    main()
