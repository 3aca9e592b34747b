"""What bfloat16 and int8 cost: an adapter on the same episodes, its encoder in float32, bfloat16, and int8 by ONNX.

    python benchmarks/precision.py --data-dir DATA --run    # records what is missing, then prints the table

The task is learned on the states of each, as ``export_onnx`` does it. Episodes are those of choose.py: 5 ways and
shots, 5 queries a class, names read. All tasks have one int8 graph, that of the adapter.
"""

from pathlib import Path

import scores
from cells import cells_of, choose_corpora
from choose import RESULTS, SHIPPED
from contestants import Contestant, contestant_runs
from measure import Options, markdown
from runs import do_missing, read_lines

from textmeta.export.graph import GraphReader, quantized, states_graph

SHOTS, VARIANT = (5,), "names"
LEAST = {" bf16": -0.1, " int8": -0.3}  # points that each may cost


def main() -> None:
    """Print the table, after recording what is missing."""
    parser = Options(__doc__)
    parser.add_argument("--run", action="store_true", help="record what is missing")
    parser.add_argument("--adapter", type=Path, default=SHIPPED)
    parser.add_argument("--corpora", nargs="+", help="some of them; by default all")
    parser.add_argument("--episodes", type=int, default=24, help="of a corpus")
    parser.add_argument("--results", type=Path, default=RESULTS / "precision.jsonl")
    arguments = parser.parsed()
    lines = read_lines(arguments.results)
    if arguments.run:
        float32, int8 = (Contestant(arguments.adapter, suffix=suffix) for suffix in ("", " int8"))
        bf16 = Contestant(arguments.adapter, precision="bf16", suffix=" bf16")
        graph = quantized(states_graph(int8.reader, int8.adapter.initialisation.lora), int8.reader.encoder)
        int8.reader = GraphReader(graph, int8.reader.encoder)
        float32.check_alone(lines)
        cells = cells_of(choose_corpora(arguments.data_dir, arguments.corpora), SHOTS)
        runs = contestant_runs(cells, [float32, bf16, int8], [VARIANT], arguments.episodes, arguments.episodes)
        do_missing(runs, lines, arguments.results)
    found = scores.accuracies(lines)
    methods = {suffix: f"{VARIANT}{suffix} @ {arguments.adapter.name}" for suffix in ("", *LEAST)}
    print(markdown(scores.mean_rows(found, {name: name for name in methods.values()}, SHOTS)))
    table = [scores.GOALS]
    for name, least in LEAST.items():
        told = scores.differences(found, methods[name], [methods[""]], SHOTS)[0]
        table.append(scores.goal_row(f"{name.strip()} over float32, points", told, least))
    print("\n" + markdown(table))


if __name__ == "__main__":
    main()
