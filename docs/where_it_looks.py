"""Draw where each layer looks in a sentence, before and after the steps of a task: docs/where_it_looks.png.

python docs/where_it_looks.py            # needs the extra demo, and matplotlib
"""

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import torch

from textmeta import EpisodeSampler, EpisodeSettings
from textmeta.data.bundled import load_bundled
from textmeta.encoder.token_states import StateBatch
from textmeta.meta.batch import TaskBatch
from textmeta.meta.learner import TaskLearner
from textmeta.sharing.locate import DEFAULT_ADAPTER
from textmeta.sharing.store import load_adapter

mpl.use("Agg")
from matplotlib import pyplot as plt

EPISODE = 3  # of those of seed 0


def shares(text: StateBatch, queries: torch.Tensor) -> torch.Tensor:
    """Return (V, L) the share of each token of one text in each view, by queries (V, d), as pooling has it."""
    scores = torch.einsum("vld,vd->vl", text.states[0], queries) * text.inverse_rms[0]
    return (scores / math.sqrt(queries.shape[-1])).softmax(-1)


@torch.no_grad()
def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default=DEFAULT_ADAPTER)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"))
    arguments = parser.parse_args()
    adapter = load_adapter(arguments.adapter)[0]
    reader = adapter.load_reader()
    corpus, split = load_bundled()
    episode = EpisodeSampler(corpus.restrict(split.test), EpisodeSettings(5, 5, 5), seed=0)[EPISODE]
    learned = TaskLearner(reader, adapter).learn(TaskBatch.of_episodes([episode]))
    text = episode.query_texts[0]
    (states,) = reader.read([text], adapter.initialisation.lora).batches
    tokens = reader.encoder.tokenizer.tokenize(text, add_special_tokens=True)
    figure, axes = plt.subplots(2, 1, figsize=(1.5 + 0.6 * len(tokens), 4.2), layout="constrained")
    looks = {"before": shares(states, adapter.initialisation.queries), "after": shares(states, learned.queries[0])}
    most = float(max(part.max() for part in looks.values()))
    for axis, (title, part) in zip(axes, looks.items(), strict=True):
        axis.imshow(part, cmap="Blues", vmin=0, vmax=most, aspect="auto")
        axis.set_title(f"{title} the steps", loc="left")
        axis.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right")
        axis.set_yticks(range(len(part)), [f"layer {layer}" for layer in reader.layers])
        for row, column in torch.cartesian_prod(torch.arange(len(part)), torch.arange(len(tokens))).tolist():
            share = float(part[row, column])
            axis.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center", color="w" if share > most / 2 else "k"
            )
    figure.suptitle(
        f"Classes: {', '.join(name.replace('_', ' ') for name in episode.class_names)}. In % of the text", fontsize=9
    )
    figure.savefig(arguments.output, dpi=110)
    print(f"{arguments.output}: {text!r}")


if __name__ == "__main__":
    main()
