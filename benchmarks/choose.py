"""How adapters and frozen baselines do on the choose corpora, from recorded episodes; --run records what is missing.

    python benchmarks/choose.py --data-dir DATA                        # the table
    python benchmarks/choose.py --data-dir DATA --by-corpus
    python benchmarks/choose.py --data-dir DATA --run --adapters runs/core/base-0 --variants plain names
    python benchmarks/choose.py --data-dir DATA --run --ways 20 --variants plain names   # corpora of so many classes

Episodes are the same for every method: 5 ways (all classes of a corpus with fewer), 5 queries a class, 256 tokens (0.1
at its own 64). Differences are paired by episode; intervals are of 95 %, over episodes, of means over corpora.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import scores
from cells import SHOTS, VARIANTS, WAYS, cells_of, choose_corpora
from contestants import Contestant, contestant_runs
from measure import Options, markdown
from runs import do_missing, read_lines

from textmeta.sharing.store import load_adapter, save_adapter

RESULTS = Path(__file__).parent / "results"
BASELINES, CORE = RESULTS / "v0_1.jsonl", RESULTS / "choose.jsonl"
SHIPPED = Path(__file__).parents[1] / "textmeta" / "adapters" / "minilm-general"
FIRST = "first-settled"  # the adapter that came with textmeta before
CHUNK, EPISODES = 50, 200  # of a line; of a cell
LAST_LAYER = ("prototypes-last-256", "logistic-last-256")  # the rivals of whose means the better one counts


def table(found: Mapping[str, scores.Cells]) -> Iterator[str]:
    """Yield the tables: mean accuracy at each number of shots, and paired differences to others, in points."""
    names = sorted(found, key=lambda name: ("@" in name, name))
    yield markdown(scores.mean_rows(found, dict(zip(names, names, strict=True)), SHOTS))
    rows = [scores.heads(SHOTS, "pooled")]
    for method in [name for name in names if "@" in name and " ways=" not in name]:  # which are of other episodes
        variant, _, adapter = method.partition(" @ ")
        rivals: dict[str, Sequence[str]] = {
            "better of prototypes and logistic": LAST_LAYER,
            "logistic-views-256": ["logistic-views-256"],
            "textmeta-0.1": ["textmeta-0.1"],
        }
        if variant != "plain":  # with names or without, unlabelled texts are compared with none
            other = variant.partition("unlabelled")[0].rstrip("-") or "plain"
            other = "plain" if other == variant else other
            rivals = {other: [f"{other} @ {adapter}"]}
        if variant == "names-alone":
            rivals = {"cosine of text and name": ["names-last-256"]}
        if " " in variant:  # what is done otherwise is compared with what is usual
            usual = variant.partition(" ")[0]
            rivals = {usual: [f"{usual} @ {adapter}"]}
        if not adapter.startswith("first"):
            rivals["the first meta-training"] = [f"{variant} @ {FIRST}"]
        for title, others in rivals.items():
            rows.append(
                [f"{method} over {title}", *map(scores.shown, scores.differences(found, method, others, SHOTS))]
            )
    yield "\n" + markdown(rows)


def results_of(found: Mapping[str, scores.Cells], errors: Mapping[tuple[str, int], float], name: str) -> dict[str, Any]:
    """Return, as a model card takes it, how an adapter does beside prototypes, with names and without."""
    results = {}
    for (variant, told), k in product((("plain", ""), ("names", ", names read")), SHOTS):
        method = f"{variant} @ {name}"
        own = {key: values for key, values in found.get(method, {}).items() if key[1] == k}
        rival = {key: found["prototypes-last-256"][key][: len(values)] for key, values in own.items()}
        ours, frozen, paired = scores.mean(own, k), scores.mean(rival, k), scores.difference(own, rival, list(own))
        if ours and frozen and paired:
            before, after = ({"accuracy": row[0] / 100, "accuracy_ci95": row[1] / 100} for row in (frozen, ours))
            mean, half = (value / 100 for value in paired)
            results[f"{len(own)} other corpora, 5-way {k}-shot{told}"] = {
                "frozen": before,
                "meta_trained": {**after, "episodes": sum(map(len, own.values())), "ece": errors[method, k] / 100},
                "paired": {"difference": mean, "low": mean - half, "high": mean + half},
            }
    return results


def main() -> None:
    """Print the table, after recording what is asked for."""
    parser = Options(__doc__)
    parser.add_argument("--run", action="store_true", help="record what is missing of the adapters and variants named")
    parser.add_argument(
        "--adapters", type=Path, nargs="+", help="folders, or names of recorded ones; by default the shipped one"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--corpora", nargs="+", help="some of them; by default all")
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS))
    parser.add_argument("--ways", type=int, default=WAYS, help="other than the usual, of corpora with so many classes")
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--adapt", choices=("none", "pooling", "lora", "pooling+lora"), help="not the adapter's own")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of the encoder's matrix products")
    parser.add_argument("--cache", type=Path, help="folder for the states of the frozen layers, which adapters share")
    parser.add_argument("--by-corpus", action="store_true")
    parser.add_argument("--measure", choices=("accuracy", "f1", "nll"), default="accuracy")
    parser.add_argument("--results", type=Path, default=CORE)
    parser.add_argument("--card", type=Path, help="adapter folder whose card shall have its recorded figures")
    arguments = parser.parsed()
    lines = read_lines(arguments.results)
    if arguments.run:
        changes = {"adapt": arguments.adapt} if arguments.adapt else {}
        folders = arguments.adapters or [SHIPPED]
        suffix = f" adapt={arguments.adapt}" if arguments.adapt else ""
        suffix += f" ways={arguments.ways}" if arguments.ways != WAYS else ""
        contestants = [
            Contestant(folder, changes, arguments.precision, arguments.cache, suffix=suffix) for folder in folders
        ]
        for who in contestants:
            who.check_alone(lines)
        cells = cells_of(choose_corpora(arguments.data_dir, arguments.corpora), arguments.shots, arguments.ways)
        if arguments.ways != WAYS:
            cells = (cell for cell in cells if len(cell.corpus.class_names) >= arguments.ways)
        runs = contestant_runs(cells, contestants, arguments.variants, arguments.episodes, CHUNK)
        do_missing(runs, lines, arguments.results)
    names = [FIRST, *(folder.name for folder in arguments.adapters or [SHIPPED])]
    found = {
        method: cells
        for method, cells in scores.accuracies(read_lines(BASELINES) + lines, arguments.measure).items()
        if "@" not in method or method.partition(" @ ")[2] in names
    }
    print("\n".join(table(found)))
    errors = scores.calibration_errors([line for line in lines if line["key"]["adapter"] in names])
    rows = [
        [method, *(f"{errors[method, k]:.1f}" if (method, k) in errors else "–" for k in SHOTS)]
        for method in dict.fromkeys(method for method, _ in errors)
    ]
    print("\nExpected calibration error, percent\n", markdown([scores.heads(SHOTS), *rows]), sep="\n")
    if arguments.card:
        adapter, _ = load_adapter(arguments.card)
        results = results_of(found, errors, arguments.card.name)
        save_adapter(arguments.card, replace(adapter, record={**adapter.record, "results": results}))
    if arguments.by_corpus:
        sides = {name: (name, LAST_LAYER) for name in sorted(found) if name.startswith(("plain @", "names @"))}
        corpora = sorted({corpus for cells in found.values() for corpus, _ in cells})
        print("\n" + markdown(scores.corpus_rows(found, sides, SHOTS, corpora)))


if __name__ == "__main__":
    main()
