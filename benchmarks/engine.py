"""How fast the meta-learning engine is, beside the loop that people write and beside torchopt, in one run.

python benchmarks/engine.py --data banking77.jsonl

Prints episodes a second (sides alternating, medians) and whether the sides return the same meta-gradient, peak memory,
how near the engine comes to the machine's matrix products and where the rest of its time goes, and how its time grows
with tasks, steps, ways, text length and rank. ``--device cuda --precision bf16`` measures a GPU; ``--quick true`` tries
the script out. Needs the extra ``bench``.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from gemm import categories_of_time, matrix_product_seconds
from measure import alternate, device_name, distance, print_table, resident, settle, timed
from rivals import Loop, TorchoptLoop
from tqdm import tqdm

from textmeta.cli import run_recipe
from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import LORA, Parameters
from textmeta.model.lora import LoraSettings

RIVALS = {"loop": Loop, "torchopt": TorchoptLoop}
FEW_TASKS = 4  # rivals take one task after another: of more tasks, so many are timed; memory is that of so many
FILL_EPISODES = 1000  # over which the filling of the cache is counted
FILL_TEXTS = 50  # of a timing of the filling, as many as an episode has


@dataclass(frozen=True)
class EngineSettings:
    """Settings of this benchmark.

    Args:
        data: local file with columns text and label.
        device: cpu, or cuda.
        precision: bf16 for bfloat16 matrix products, on all sides.
        tasks: tasks of an outer step.
        ways: classes of an episode.
        shots: support examples of a class.
        queries: query examples of a class.
        repeats: timings of each side; the median counts.
        parts: which parts to run.
        quick: few repeats, few settings: figures of no worth, but every part runs.
        memory_of: measure the peak memory of one "side algorithm steps" in this process, and print it; the
            benchmark calls itself so.
        encoder: the encoder.
        lora: the LoRA on its upper layers.
        inner: the inner loop.
    """

    data: str
    device: str = "cpu"
    precision: Literal["no", "bf16"] = "no"
    tasks: list[int] = field(default_factory=lambda: [1, 4, 16])
    ways: int = 5
    shots: int = 5
    queries: int = 5
    repeats: int = 5
    parts: list[Literal["speed", "memory", "efficiency", "growth"]] = field(default_factory=lambda: list(PARTS))
    quick: bool = False
    memory_of: str | None = None
    encoder: EncoderSettings = field(default_factory=lambda: EncoderSettings(max_length=64))
    lora: LoraSettings = field(default_factory=LoraSettings)
    inner: InnerLoopSettings = field(default_factory=lambda: InnerLoopSettings(steps=5))


def main(settings: EngineSettings) -> None:
    """Measure, and print the tables."""
    if settings.memory_of:
        print(peak_memory(settings, *settings.memory_of.split()))
        return
    if settings.quick:
        settings = replace(settings, repeats=2, tasks=settings.tasks[:2], inner=replace(settings.inner, steps=2))
    corpus = load_corpus(CorpusSettings(settings.data))
    encoder = Encoder(settings.encoder, settings.lora, settings.device, settings.precision)
    print(f"{device_name(encoder)}; torch {torch.__version__}; precision {settings.precision}; {corpus.name}, ", end="")
    print(f"{settings.ways}-way {settings.shots}-shot, {settings.queries} queries a class, ", end="")
    print(f"{settings.inner.steps} inner steps\n")
    for part in settings.parts:
        PARTS[part](settings, corpus, encoder)


def speed(settings: EngineSettings, corpus: Corpus, encoder: Encoder) -> None:
    """Episodes a second of all sides, alternating, and the distance of their meta-gradients."""
    sampler = EpisodeSampler(corpus, EpisodeSettings(settings.ways, settings.shots, settings.queries), seed=0)
    fill, cached = filling(settings, corpus)
    parameters = moved_start(encoder, settings.inner)
    rivals = {name: kind(encoder, settings.inner) for name, kind in RIVALS.items()}
    rows = [
        ("algorithm", "tasks", "loop", "torchopt", "textmeta", "with filling", "ratio to loop", "ratio to torchopt")
    ]
    notes = []
    for algorithm in ("fomaml", "maml"):
        second_order = algorithm == "maml"
        for tasks in settings.tasks:
            episodes = sampler.take(tasks)
            few = episodes[:FEW_TASKS]
            for rival in rivals.values():
                rival.prepare(few)
            sides: dict[str, Callable[[], object]] = {
                name: partial(rival.meta_gradient, parameters, few, second_order) for name, rival in rivals.items()
            }
            sides["textmeta"] = partial(gradient_of, algorithm, encoder, parameters, episodes, settings.inner)
            each = {name: len(episodes if name == "textmeta" else few) for name in sides}
            found = alternate(sides, settings.repeats, encoder, f"{algorithm}, {tasks} tasks")
            rate = {name: each[name] / statistics.median(times) for name, times in found.items()}
            filled = 1 / (1 / rate["textmeta"] + fill)
            ratios = {  # of the same repeat, so that what else the machine did counts on both sides
                name: statistics.median(
                    (mine / each[name]) / (own / tasks + fill)
                    for mine, own in zip(found[name], found["textmeta"], strict=True)
                )
                for name in rivals
            }
            rows.append(
                (algorithm, str(tasks), *(f"{rate[name]:.2f}" for name in (*rivals, "textmeta")), f"{filled:.2f}",
                 *(f"{ratios[name]:.2f}" for name in rivals))
            )  # fmt: skip
            mine = gradient_of(algorithm, encoder, parameters, few, settings.inner)
            for name, rival in rivals.items():
                theirs = rival.meta_gradient(parameters, few, second_order)
                notes.append(f"{algorithm}, {len(few)} tasks, {name}: {distance(mine, theirs):.1e}")
    print("Episodes a second; ratios with the filling of the cache counted, medians over the repeats:\n")
    print_table(rows)
    print(f"\nFilling the cache: {1000 * fill:.1f} ms an episode over the first {FILL_EPISODES:,}; ", end="")
    print(f"it then holds {cached:.0f} MiB.")
    print(f"Distance of the meta-gradients (norm of the difference over the norm): {'; '.join(notes)}.\n")


def memory(settings: EngineSettings, *_: object) -> None:
    """Peak memory above the loaded model, each in a process of its own."""
    steps = settings.inner.steps
    rows = [("side", "algorithm", "inner steps", "peak above the loaded model, MiB")]
    wanted = [("loop", "fomaml", steps), ("textmeta", "fomaml", steps), ("loop", "maml", steps)]
    wanted += [(side, "maml", n) for side in ("textmeta", "textmeta-kept") for n in (steps, 4 * steps)]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "settings.yaml"
        config.write_text(json.dumps({**asdict(settings), "quick": False}), encoding="utf-8")  # JSON is YAML
        for side, algorithm, n in tqdm(wanted, desc="memory", unit="process", leave=False):
            command = [sys.executable, __file__, "--config", str(config)]
            command += ["--memory_of", f"{side} {algorithm} {n}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append((side, algorithm, str(n), f"{float(done.stdout.split()[-1]):.0f}"))
    print(f"Peak memory of {FEW_TASKS} tasks (textmeta checkpoints inner steps here, textmeta-kept does not), ", end="")
    print("without the cached states, named above:\n")
    print_table(rows)
    print()


def peak_memory(settings: EngineSettings, side: str, algorithm: str, steps: str) -> float:
    """Return the MiB that one meta-gradient needs above the loaded model."""
    corpus = load_corpus(CorpusSettings(settings.data))
    encoder = Encoder(settings.encoder, settings.lora, settings.device, settings.precision)
    inner = replace(settings.inner, steps=int(steps))
    parameters = moved_start(encoder, inner)
    episode_settings = EpisodeSettings(settings.ways, settings.shots, settings.queries)
    episodes = EpisodeSampler(corpus, episode_settings, seed=0).take(FEW_TASKS)
    run: Callable[[], object]
    if side == "loop":
        rival = Loop(encoder, inner)
        rival.prepare(episodes)
        run = partial(rival.meta_gradient, parameters, episodes, algorithm == "maml")
    else:
        prepare(encoder, episodes)
        plan = MetaGradientSettings(checkpointed=side == "textmeta")
        run = partial(ALGORITHMS[algorithm].gradient, encoder, parameters, episodes, inner, plan)
    if encoder.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    settle(rival.model if side == "loop" else encoder._suffix)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 2**10


def efficiency(settings: EngineSettings, corpus: Corpus, encoder: Encoder) -> None:
    """Share of an outer step that its matrix products would take alone, and where all of its time goes."""
    episode_settings = EpisodeSettings(settings.ways, settings.shots, settings.queries)
    episodes = EpisodeSampler(corpus, episode_settings, seed=0).take(FEW_TASKS)
    parameters = moved_start(encoder, settings.inner)
    print("Matrix products (the same shapes, as often, alone) as a share of a step, and where a step's time goes:\n")
    rows = [("algorithm", "step", "products alone", "share", "rate", "by kind of operation")]
    for algorithm in ("fomaml", "maml"):
        run = partial(gradient_of, algorithm, encoder, parameters, episodes, settings.inner)
        times, products = [], []
        for _ in range(settings.repeats):  # alternating, as everywhere
            times.append(timed(run, encoder))
            seconds, operations = matrix_product_seconds(run, encoder)
            products.append(seconds)
        share = statistics.median(part / whole for part, whole in zip(products, times, strict=True))
        step, alone = statistics.median(times), statistics.median(products)
        kinds = ", ".join(f"{name} {100 * part:.0f} %" for name, part in categories_of_time(run, encoder).items())
        rate = f"{operations / step / 1e9:.0f} GFLOP/s"
        rows.append((algorithm, f"{step:.3f} s", f"{alone:.3f} s", f"{100 * share:.0f} %", rate, kinds))
    print_table(rows)
    print()


def growth(settings: EngineSettings, corpus: Corpus, encoder: Encoder) -> None:
    """Time of an outer step as one thing grows and the rest stays."""
    base = {"tasks": 1, "steps": settings.inner.steps, "ways": 5, "tokens": 16, "rank": settings.lora.rank}
    values = {"tasks": [1, 4, 16], "steps": [1, 5, 10, 20], "ways": [2, 5, 10, 20], "tokens": [8, 16, 32, 64]}
    values["rank"] = [4, 8, 16, 32]
    if settings.quick:
        values = {name: numbers[:2] for name, numbers in values.items()}
    rows = [("what grows", "values", "FOMAML, s a step", "MAML, s a step")]
    for name, numbers in tqdm(values.items(), desc="growth", leave=False):
        seconds: dict[str, list[str]] = {"fomaml": [], "maml": []}
        for number in numbers:
            now = {**base, name: number}
            changed = encoder
            if now["rank"] != settings.lora.rank:
                lora = replace(settings.lora, rank=now["rank"])
                changed = Encoder(settings.encoder, lora, settings.device, settings.precision)
            inner = replace(settings.inner, steps=now["steps"])
            parameters = moved_start(changed, inner)
            episodes = episodes_of_length(corpus, changed, settings, now["tasks"], now["ways"], now["tokens"])
            prepare(changed, episodes)
            for algorithm, cells in seconds.items():
                run = partial(gradient_of, algorithm, changed, parameters, episodes, inner)
                times = [timed(run, changed) for _ in range(min(3, settings.repeats))]
                cells.append(f"{statistics.median(times):.2f}")
        rows.append((name, " ".join(map(str, numbers)), *(" ".join(part) for part in seconds.values())))
    print(f"Growth (medians of three), from {', '.join(f'{value} {name}' for name, value in base.items())}:\n")
    print_table(rows)


def gradient_of(
    algorithm: str, encoder: Encoder, parameters: Parameters, episodes: Sequence[Episode], inner: InnerLoopSettings
) -> Parameters:
    """Return textmeta's meta-gradient."""
    return ALGORITHMS[algorithm].gradient(encoder, parameters, episodes, inner, MetaGradientSettings()).gradient


def filling(settings: EngineSettings, corpus: Corpus) -> tuple[float, float]:
    """Return the seconds an episode that filling the cache costs over the first episodes, and the MiB it then holds."""
    episode_settings = EpisodeSettings(settings.ways, settings.shots, settings.queries)
    sampler = EpisodeSampler(corpus, episode_settings, seed=0)
    texts = list(
        dict.fromkeys(t for i in range(FILL_EPISODES) for t in (*sampler[i].support_texts, *sampler[i].query_texts))
    )
    fresh = Encoder(settings.encoder, settings.lora, settings.device, settings.precision)
    times = []
    for repeat in range(1 + settings.repeats):  # the first loads what is loaded on first use
        few = texts[repeat * FILL_TEXTS : (repeat + 1) * FILL_TEXTS]
        times.append(timed(partial(fresh.prepare, few, remember=False), fresh) / len(few))
    mebibytes = sum(state.nbytes for state in fresh._states(few, remember=False)) / len(few) * len(texts) / 2**20
    return statistics.median(times[1:]) * len(texts) / FILL_EPISODES, mebibytes


def episodes_of_length(
    corpus: Corpus, encoder: Encoder, settings: EngineSettings, tasks: int, ways: int, tokens: int
) -> list[Episode]:
    """Return episodes whose texts all have about as many tokens: real texts, one after another, cut."""
    episode_settings = EpisodeSettings(ways, settings.shots, settings.queries)
    sampler = EpisodeSampler(corpus, episode_settings, seed=1)
    tokenizer = encoder.tokenizer

    def resized(texts: Sequence[str]) -> tuple[str, ...]:
        long = [" ".join([text, *texts[:20]]) for text in texts]
        rows = tokenizer(long, truncation=True, max_length=tokens - 2, add_special_tokens=False)["input_ids"]
        return tuple(tokenizer.batch_decode(rows))

    return [
        replace(e, support_texts=resized(e.support_texts), query_texts=resized(e.query_texts))
        for e in sampler.take(tasks)
    ]


def moved_start(encoder: Encoder, inner: InnerLoopSettings) -> Parameters:
    """Return a start whose B is not 0, as after some training; at B = 0 A has no gradient to compare."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (value + 0.02 * torch.randn(value.shape, generator=generator) if name.startswith(LORA) else value).to(
            encoder.device
        )
        for name, value in start_parameters(encoder.factor_shapes, inner, encoder.hidden_size).items()
    }


def prepare(encoder: Encoder, episodes: Sequence[Episode]) -> None:
    """Fill the cache."""
    encoder.prepare([text for e in episodes for text in (*e.support_texts, *e.query_texts)])


PARTS: dict[str, Callable[[EngineSettings, Corpus, Encoder], None]] = {
    "speed": speed,
    "memory": memory,
    "efficiency": efficiency,
    "growth": growth,
}

if __name__ == "__main__":
    run_recipe(main, EngineSettings, __doc__)
