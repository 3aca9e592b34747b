"""Classify with a few examples, meta-train an adapter of your own, and see what it brings on classes it has not seen.

    python recipes/demo.py

Needs nothing but what comes with textmeta and its extra demo, and takes two to four minutes on two cores.
"""

import argparse
import sys
from pathlib import Path

from textmeta import EpisodeSampler, EpisodeSettings, FewShotClassifier, MetaTrainer, TextMetaError
from textmeta.data.bundled import load_bundled
from textmeta.data.corpus import Corpus
from textmeta.encoder.encoder import EncoderSettings
from textmeta.meta.adapter import Adapter
from textmeta.meta.evaluation import format_table, frozen_prototypes, paired_difference, score_episodes, summary
from textmeta.meta.learner import TaskLearner
from textmeta.sharing.locate import DEFAULT_ADAPTER
from textmeta.sharing.store import load_adapter, save_adapter

BIKES = {  # messages to a bicycle rental; the labels are read, too
    "rent a bike": ["two city bikes for Saturday, please", "Do you have a tandem free next weekend?"],
    "bike broken": ["the chain came off and I'm stuck by the river", "Brakes don't grip any more, what now?"],
    "give a bike back": ["Can I leave it at the station instead of your shop?", "we'll bring them back an hour late"],
}
ASKED = ["flat tyre, halfway up the hill", "Is a child's bike available tomorrow?", "where do I drop it off tonight?"]
NOTES = {  # what visitors wrote into a museum's book
    "praise": ["The hall of clocks was wonderful", "my kids loved every minute, thank you"],
    "complaint": ["far too crowded and no place to sit", "The audio guide stopped after two rooms"],
    "wish": ["please open on Monday evenings", "More signs in Spanish would help"],
}
WRITTEN = ["best afternoon of our holiday", "the toilets were dirty", "could you show the coins again next year?"]


def show(classifier: FewShotClassifier, support: dict[str, list[str]], texts: list[str]) -> None:
    """Learn a task, and print what the classifier makes of some texts."""
    classifier.fit([text for part in support.values() for text in part], [c for c in support for _ in support[c]])
    for text, label, row in zip(texts, classifier.predict(texts), classifier.predict_proba(texts), strict=True):
        shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(classifier.classes_, row, strict=True))
        print(f"  {text!r} → {label}   ({shares})")


def compared(adapters: dict[str, Adapter], corpus: Corpus, number: int) -> dict[str, dict]:
    """Return the rows of a table: frozen prototypes, and each adapter beside them, at 1 and at 5 examples a class."""
    rows: dict[str, dict] = {}
    readers = {name: adapter.load_reader() for name, adapter in adapters.items()}
    for reader in readers.values():
        reader.cache(corpus.texts)
    for title, shots in (("1 shot", 1), ("5 shots", 5)):
        episodes = EpisodeSampler(corpus, EpisodeSettings(5, shots, 5, label_names=1.0), seed=1).take(number)
        frozen = frozen_prototypes(next(iter(readers.values())), episodes, f"frozen prototypes, {title}")
        rows[f"{title}: frozen prototypes"] = summary(frozen)
        for name, reader in readers.items():
            found = score_episodes(TaskLearner(reader, adapters[name]), episodes, f"{name}, {title}")
            rows[f"{title}: {name}"] = {**summary(found), "paired": paired_difference(found, frozen)}
    return rows


def main(output: Path, encoder: EncoderSettings, shipped: str, episodes: int, tests: int) -> None:
    """Show a task, train, compare, show another task."""
    print("A task of three classes, two examples each, learned by the adapter that comes with textmeta:")
    show(FewShotClassifier(shipped), BIKES, ASKED)

    corpus, split = load_bundled()
    print(f"\nMeta-training an adapter on {len(split.train)} classes of everyday requests, by {episodes} small tasks:")
    # a minute is enough for the learner's numbers; to learn a LoRA takes an hour
    adapter = MetaTrainer(encoder, episodes=episodes, fixed=("lora.",)).train([corpus.restrict(split.train)])
    save_adapter(output, adapter)

    test = corpus.restrict(split.test)
    rows = compared({"the shipped adapter": load_adapter(shipped)[0], "your adapter": adapter}, test, tests)
    print(
        f"\n{tests} tasks of 5 of the {len(split.test)} classes kept for testing, of other domains, with their names:"
    )
    print(format_table(rows))
    print("(The shipped adapter was trained on these classes, among those of 81 other corpora; yours was not.)")

    print("\nA new task, learned by your adapter:")
    show(FewShotClassifier(output), NOTES, WRITTEN)
    print("\nWhat next:")
    print("  FewShotClassifier().fit(texts, labels)      your own task, with the shipped adapter")
    print(f"  {f'FewShotClassifier({str(output)!r})':44}the same with the one just trained")
    print("  textmeta train --data FILE --output FOLDER  an adapter trained on your labelled texts")
    print(f"  {f'textmeta push {output} OWNER/NAME':44}share it on the Hugging Face Hub")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the adapter")
    parser.add_argument("--encoder", type=EncoderSettings, default=EncoderSettings(), help="folder or id on the Hub")
    parser.add_argument("--shipped", default=DEFAULT_ADAPTER, help="adapter to compare with")
    parser.add_argument("--episodes", type=int, default=200, help="of training")
    parser.add_argument("--tests", type=int, default=60, help="tasks of each test")
    try:
        main(**vars(parser.parse_args()))
    except TextMetaError as error:
        sys.exit(str(error))
