"""Meta-train on everyday requests, see what it brings on unseen domains, then classify with a few examples.

python recipes/demo.py

Uses the corpus that comes with textmeta and takes about two minutes on two cores. Writes the adapter and
results.json to demo-output/.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from textmeta import FewShotClassifier
from textmeta.artifact.store import save_adapter
from textmeta.cli import run_recipe
from textmeta.data.bundled import load_bundled
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.meta.evaluation import compare_with_frozen, format_table
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.training import CHECKPOINT, train
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.tasks import index_tasks

SUPPORT = {  # a new task: messages to a bicycle rental
    "rent a bike": ["two city bikes for Saturday, please", "Do you have a tandem free next weekend?"],
    "bike broken": ["the chain came off and I'm stuck by the river", "Brakes don't grip any more, what now?"],
    "give a bike back": ["Can I leave it at the station instead of your shop?", "we'll bring them back an hour late"],
}
QUERIES = ["flat tyre, halfway up the hill", "Is a child's bike available tomorrow?", "where do I drop it off tonight?"]


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo.

    Args:
        output: folder for the adapter and the results.
        test_episodes: episodes on unseen domains, for 1 shot and for 5 shots.
        encoder: the encoder.
        episodes: what training and validation episodes look like.
        inner: the inner loop.
        training: the outer loop.
    """

    output: Path = Path("demo-output")
    test_episodes: int = 600
    encoder: EncoderSettings = field(default_factory=lambda: EncoderSettings(max_length=64))
    episodes: EpisodeSettings = field(default_factory=lambda: EpisodeSettings(ways=10, shots=(1, 5), queries=4))
    inner: InnerLoopSettings = field(default_factory=lambda: InnerLoopSettings(conditioning=ConditioningSettings()))
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            algorithm="protonet", steps=100, tasks_per_step=2, learning_rate=2e-3, validate_every=50
        )
    )


def main(settings: DemoSettings) -> None:
    """Train, evaluate, save, then fit and predict."""
    corpus, split = load_bundled()
    encoder = Encoder(settings.encoder)
    seed = settings.training.seed
    train_episodes, valid_episodes = (
        EpisodeSampler(corpus.restrict(classes), settings.episodes, seed + number)
        for number, classes in enumerate((split.train, split.valid))
    )
    (settings.output / CHECKPOINT).unlink(missing_ok=True)  # always from the start
    print(f"Meta-training on {len(split.train)} classes; {len(split.test)} others, of unseen domains, are for testing")
    result = train(encoder, train_episodes, valid_episodes, settings.training, settings.inner, settings.output)

    results = {}
    for shots in (1, 5):
        test = EpisodeSampler(corpus.restrict(split.test), EpisodeSettings(5, shots, 5), seed + 2)
        name = f"unseen domains, 5-way {shots}-shot"
        episodes = test.take(settings.test_episodes)
        results[name] = compare_with_frozen(encoder, result.parameters, episodes, result.inner, name)
    known = index_tasks(encoder, train_episodes.corpora)
    record = {**result.record, "results": results}
    save_adapter(settings.output, encoder, result.parameters, result.inner, record, known_tasks=known)
    (settings.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{format_table(results)}\n\nAdapter and results.json are in {settings.output}/\n")

    classifier = FewShotClassifier.from_pretrained(settings.output)
    texts = [text for examples in SUPPORT.values() for text in examples]
    classifier.fit(texts, [label for label, examples in SUPPORT.items() for _ in examples])
    print(f"A new task, {len(SUPPORT)} classes, {len(texts)} examples:")
    for query, label, row in zip(QUERIES, classifier.predict(QUERIES), classifier.predict_proba(QUERIES), strict=True):
        shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(classifier.classes_, row, strict=True))
        print(f"  {query!r} → {label}   ({shares})")
    print(f"Of what the adapter was trained on, it looks most like {classifier.nearest_tasks()[0]}")


if __name__ == "__main__":
    run_recipe(main, DemoSettings, __doc__)
