"""Draw a map of tasks: a point for each, near to those that its embedding says are alike.

python recipes/task_map.py

Trains a task encoder by self-supervision alone, on training classes of the corpus that comes with textmeta, and draws
tasks of its 15 domains, 7 of which training never saw; in about a minute on two cores, with the extras demo and plot.

python recipes/task_map.py --adapter runs/banking77 --data "[banking77.jsonl,clinc150.jsonl]"

draws tasks of other corpora, as the task encoder of an adapter sees them. Writes task-map.png, .svg and .csv.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from map_drawing import Group, Point, Projection, check_drawing, draw, place

from textmeta.artifact.locate import load_from
from textmeta.cli import run_recipe
from textmeta.data import bundled
from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.data.local_file import read_local_file
from textmeta.errors import AdapterError, SettingsError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.self_supervision import SelfSupervisionSettings, train_task_encoder
from textmeta.meta.tasks import support_batch
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import Parameters
from textmeta.tasks import TaskEmbedding, embed_task, similarity

EVERYDAY = Path(bundled.__file__).with_name("everyday.jsonl")


@dataclass(frozen=True)
class TaskMapSettings:
    """Settings of this recipe.

    Args:
        output: folder for the pictures and the coordinates.
        data: local files or Hub datasets, with columns text and label, to draw tasks of.
        bundled: whether to draw the corpus that comes with textmeta; by default only where no data is given.
        domain_column: of files that have it: the classes of a task are of one domain, and the colours are the domains'.
        adapter: folder, adapter shipped with textmeta or id on the Hub, whose task encoder makes the embeddings.
        ways: classes of a task.
        shots: examples of each class.
        tasks: of each corpus, or of each domain.
        projection: pca (the first two principal components), umap, or auto: umap where umap-learn is installed.
        seed: of all that is drawn at random.
        steps: of training, without an adapter; 0 leaves the task encoder as it starts.
        encoder: without an adapter, the encoder.
        conditioning: without an adapter, its task encoder.
        self_supervision: without an adapter, what trains it.
    """

    output: Path = Path("task-map")
    data: list[str] = field(default_factory=list)
    bundled: bool | None = None
    domain_column: str = "domain"
    adapter: str | None = None
    ways: int = 3
    shots: int = 5
    tasks: int = 20
    projection: Projection = "auto"
    seed: int = 0
    steps: int = 100
    encoder: EncoderSettings = field(default_factory=lambda: EncoderSettings(max_length=64))
    conditioning: ConditioningSettings = field(default_factory=ConditioningSettings)
    self_supervision: SelfSupervisionSettings = field(default_factory=SelfSupervisionSettings)

    def __post_init__(self) -> None:
        """Check what would otherwise fail only after training."""
        check_drawing(self.projection)
        for name, least in (("tasks", 1), ("steps", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, given {getattr(self, name)}")


def main(settings: TaskMapSettings) -> None:
    """Draw tasks of every group, embed them, draw the map, say which groups are near."""
    samplers = task_samplers(settings)
    encoder, parameters, inner, made_by = task_encoder(settings)
    points, embeddings = [], []
    for group, sampler in samplers.items():
        for task in sampler.take(settings.tasks):
            support = support_batch(encoder, [task])
            encoder.frozen_features(task.support_texts)  # texts come again in other tasks
            embedding = embed_task(encoder, parameters, inner, support, task.class_names)
            assert embedding is not None, "checked by task_encoder"
            embeddings.append(embedding)
            points.append(Point(embedding.vector, group, task.class_names))
    positions, axes = place(np.stack([point.vector for point in points]), settings.projection, settings.seed)
    title = f"{len(points)} tasks, each of {settings.ways} classes with {settings.shots} examples"
    draw(points, positions, axes, title, f"a point for each task embedding; {made_by}", settings.output / "task-map")
    print(nearest_groups(points, embeddings))
    print(f"\nThe map is in {settings.output}: task-map.png, task-map.svg, and task-map.csv with its coordinates")


def task_samplers(settings: TaskMapSettings) -> dict[Group, EpisodeSampler]:
    """Return what draws the tasks of each group."""
    wanted = EpisodeSettings(settings.ways, settings.shots, queries=1)
    everyday, split = bundled.load_bundled()
    sources = [CorpusSettings(name) for name in settings.data]
    corpora = [(load_corpus(source), source) for source in sources]
    if settings.bundled or (settings.bundled is None and not corpora):
        corpora.insert(0, (everyday, CorpusSettings(str(EVERYDAY))))
    samplers: dict[Group, EpisodeSampler] = {}
    for corpus, source in corpora:
        name = corpus.name
        while name in {group.corpus for group in samplers}:  # two files may share a name
            name += "'"
        for domain, classes in by_domain(corpus, source, settings.domain_column).items():
            trained = corpus is everyday and set(classes) <= set(split.train)
            group = Group(name, domain or name, None if settings.adapter or not settings.steps else trained)
            part = replace(corpus.restrict(classes), name=f"{name}, {domain}" if domain else name)  # as errors tell it
            samplers[group] = EpisodeSampler(part, wanted, settings.seed + len(samplers))
    if not samplers:
        raise SettingsError("nothing to draw: give data, or do not leave out the bundled corpus")
    return samplers


def by_domain(corpus: Corpus, source: CorpusSettings, column: str) -> dict[str, list[str]]:
    """Return the classes of each domain; all of them under "", where the corpus does not tell their domains."""
    table = read_local_file(Path(source.dataset), source.text_column, source.label_column) if source.is_file else None
    if table is None or column not in table.column_names:
        return {"": list(corpus.class_names)}
    domains: dict[str, list[str]] = {}
    for domain, label in dict.fromkeys(zip(map(str, table[column]), map(str, table[source.label_column]), strict=True)):
        domains.setdefault(domain, []).append(label)
    return domains


def task_encoder(settings: TaskMapSettings) -> tuple[Encoder, Parameters, InnerLoopSettings, str]:
    """Return an encoder, weights and settings of a task encoder on it, and where these are from, for the picture."""
    if settings.adapter:
        adapter, where = load_from(settings.adapter)
        if adapter.inner.conditioning is None:
            raise AdapterError(
                f"the adapter {settings.adapter!r} has no task encoder, so it makes no task embeddings: name one that "
                "was trained with inner.conditioning, or none, to have a task encoder trained for this map"
            )
        where.check_encoder(adapter.encoder.model)
        name = Path(settings.adapter).resolve().name if where.kind == "folder" else settings.adapter
        return adapter.load_encoder(), adapter.parameters, adapter.inner, f"task encoder of the adapter {name}"
    inner = InnerLoopSettings(conditioning=settings.conditioning)
    encoder = Encoder(settings.encoder)
    start = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size, settings.seed)
    if not settings.steps:
        return encoder, start, inner, "task encoder without any training"
    corpus, split = bundled.load_bundled()
    sampler = EpisodeSampler(corpus.restrict(split.train), EpisodeSettings(5, 5, 5), settings.seed)
    teaching = settings.self_supervision
    parameters = train_task_encoder(encoder, start, sampler, inner, teaching, steps=settings.steps)
    told = f"task encoder trained by self-supervision on {len(split.train)} classes of everyday requests"
    return encoder, parameters, inner, told


def nearest_groups(points: Sequence[Point], embeddings: Sequence[TaskEmbedding]) -> str:
    """Say for the first task of each group which tasks of other groups are most like it, the nearest of each group."""
    lines = ["\nNearest tasks of others, by the similarity of their classes (1 for the same):"]
    firsts = dict(reversed([(point.group, number) for number, point in enumerate(points)]))
    for own, first in reversed(firsts.items()):
        near: dict[Group, float] = {}
        for point, embedding in zip(points, embeddings, strict=True):
            if point.group != own:
                near[point.group] = max(similarity(embeddings[first], embedding), near.get(point.group, -1.0))
        best = sorted(near, key=lambda group: -near[group])[:3]
        told = ", ".join(f"{group.name} {near[group]:.2f}" for group in best) or "none: it is alone"
        lines.append(f"  {own.name} ({', '.join(points[first].classes)}): nearest are {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_recipe(main, TaskMapSettings, __doc__)
