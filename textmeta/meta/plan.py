"""What a run will do and take, told before it starts, and what may be in its way.

Time and memory are those of one step that is taken, and thrown away.
"""

import hashlib
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import constants
from torch import Tensor

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode
from textmeta.errors import DataError, SettingsError, TextMetaError
from textmeta.files import CHECKPOINT, write_atomically
from textmeta.meta.checkpoint import TrainingState
from textmeta.meta.initialisation import LORA
from textmeta.meta.learner import KEPT_TEXTS, QUERIES

if TYPE_CHECKING:
    from textmeta.meta.outer_loop import Run

LOOKED_AT = 1000  # episodes of a run, among whose steps the largest is looked for
NAMED = 3  # corpora that are told one by one
CHARACTERS = 6  # of a token, where lengths are told without a tokenizer
REMEMBERED = Path(constants.HF_HOME, "textmeta", "plans")
STATUS = Path("/proc/self/status")


def plan_of(run: "Run", state: TrainingState, *, keep: bool = True, remember: bool = False) -> str:
    """Return what a run does and takes from a state on, a line each; ``keep``: whether memory keeps frozen states.

    What was measured is remembered, in the folder of the Hub library's cache, for who asks again for the same.
    """
    trainer, learner, encoder = run.trainer, run.adapter.learner, run.reader.encoder
    processes, left = run.accelerator.num_processes, 0 if run.is_over(state) else trainer.steps - state.step
    found, when = _remembered(run, state) if remember else (_measured(run, state), "")
    step_seconds, peak, texts, frozen_seconds, kept = found
    whole, first = (timedelta(seconds=round(s)) for s in (frozen_seconds + left * step_seconds, frozen_seconds))
    tensors = run.adapter.initialisation.tensors()
    threads = f" of {torch.get_num_threads()} threads" * (encoder.device.type == "cpu")
    held = f"{_size(peak + kept * keep)} at most in a process, in a step of {texts} texts"
    lines = {
        "corpora": _told_corpora(run.corpora),
        "chosen by": _told_corpora(run.valid) if run.valid else "nothing: the last tensors are the result",
        "encoder": f"{encoder.settings.model}, texts cut at {encoder.settings.max_length} tokens",
        "learned": _told_numbers({name: tensors[name] for name in run.learned}),
        "algorithm": f"{trainer.algorithm}, {learner.steps} steps on {learner.adapt}, head {learner.head}",
        "episodes": f"{trainer.episodes:,}: {trainer.steps:,} steps of {trainer.tasks_per_step}, {left:,} of them left",
        "device": f"{encoder.device}, precision {trainer.precision}; processes: {processes}{threads}",
        "time": f"{whole}: {first} for frozen layers, about {step_seconds:.2g} s a step{when}; validation comes on top",
        "memory": f"{held}; frozen states of all texts are {_size(kept)}" + " of it" * keep,
    }
    if run.output is not None:
        free = check_room(run.output, bytes_of(run))
        lines["disk"] = f"{_size(bytes_of(run))} at most in {run.output}, where {_size(free)} are free"
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


def _remembered(run: "Run", state: TrainingState) -> tuple[Sequence[float], str]:
    """Return what :func:`_measured` finds, or found when it was asked for the same on this machine, and when."""
    process, device = run.accelerator, run.reader.encoder.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.node()
    where = [name, str(device), process.num_processes, process.process_index, torch.get_num_threads()]
    libraries = [version(library) for library in ("torch", "transformers", "textmeta")]
    told = json.dumps([run.fingerprint, state.step, where, libraries])
    path = REMEMBERED / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, TypeError):  # there is none, or none that is whole
        step_seconds, peak, texts, frozen_seconds, kept = map(float, json.loads(path.read_text()))
        when = f" (measured {datetime.fromtimestamp(path.stat().st_mtime).astimezone():%Y-%m-%d %H:%M})"
        return (step_seconds, int(peak), int(texts), frozen_seconds, int(kept)), when
    found = _measured(run, state)
    with suppress(OSError):  # then it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found).encode())
    return found, ""


def _measured(run: "Run", state: TrainingState) -> tuple[float, int, int, float, int]:
    """Take the step that holds most among the next ones, and throw it away.

    Returns the seconds of one of the usual length, by their lengths; the most bytes that the process held at the end of
    this one, and its texts; seconds and bytes of what the frozen layers make of all texts.
    """
    trainer, learner, encoder = run.trainer, run.adapter.learner, run.reader.encoder
    each, most = trainer.tasks_per_step, CHARACTERS * encoder.settings.max_length
    with_lora, second_order = "lora" in learner.adapt, trainer.algorithm not in ("fomaml", "reptile")

    def length(texts: Sequence[str]) -> int:
        return sum(min(len(text), most) + CHARACTERS for text in texts)

    def texts_of(step: Mapping[int, Episode]) -> list[str]:
        parts = ((e.support_texts, e.query_texts, e.label_names or (), e.unlabelled_texts) for e in step.values())
        return [text for own in parts for part in own for text in part]

    def held(step: Mapping[int, Episode]) -> int:  # about
        support = [text for episode in step.values() for text in episode.support_texts]
        kept = min(learner.steps, max(1.0, KEPT_TEXTS / max(1, len(support)))) if second_order else 1.0  # steps
        return int(length(texts_of(step)) + 2 * with_lora * length(support) * kept)

    begin = min(state.step, trainer.steps - 1) * each
    starts = range(begin, min(begin + max(LOOKED_AT, each), trainer.episodes), each)
    numbers = [range(s, min(s + each, trainer.episodes))[:: run.accelerator.num_processes] for s in starts]
    steps = [{n: run.episodes[n] for n in own} for own in numbers]
    sizes = [held(step) for step in steps]
    largest = steps[sizes.index(max(sizes))]
    copies = {n: v.detach().clone().requires_grad_(v.requires_grad) for n, v in state.parameters.items()}
    if encoder.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(encoder.device)
    reader, texts, share, kept, began = run.reader, texts_of(largest), 0.0, 0, time.perf_counter()
    if encoder.frozen_layers is not None:
        states = reader.frozen_states(texts)
        kept = sum(state.nbytes for state in states)
        share = sum(length(corpus.texts) for corpus in run.corpora) / length(texts)
        reader = reader.having(dict(zip(texts, states, strict=True)))
    read = time.perf_counter()
    replace(run, reader=reader).own_share(replace(state, parameters=copies), largest)
    seconds = (time.perf_counter() - read) * sum(sizes) / len(sizes) / max(sizes)
    peak = _peak_memory(encoder.device) - kept
    return seconds, peak, len(texts), share * (read - began), int(share * kept)


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: of a GPU's memory since that was reset, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage begins with what the parent of the process held
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    if not found:
        import resource  # noqa: PLC0415 - not on every system

        found = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)]
    return found[0]


def _told_corpora(corpora: Sequence[Corpus]) -> str:
    if len(corpora) <= NAMED:
        return "; ".join(f"{c.name}, {len(c):,} texts of {len(c.class_names)} classes" for c in corpora)
    least, *_, most = sorted(corpora, key=lambda corpus: len(corpus.class_names))
    total = f"{sum(map(len, corpora)):,} texts of {sum(len(c.class_names) for c in corpora):,} classes"
    return f"{len(corpora)}, {total}: {len(least.class_names)} ({least.name}) to {len(most.class_names)} ({most.name})"


def _told_numbers(tensors: Mapping[str, Tensor]) -> str:
    counts = {"LoRA": 0, "pooling queries": 0, "others": 0}
    for name, value in tensors.items():
        counts["LoRA" if name.startswith(LORA) else "pooling queries" if name == QUERIES else "others"] += value.numel()
    parts = ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count)
    return f"{sum(counts.values()):,} numbers in {len(tensors)} tensors: {parts}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def bytes_of(run: "Run") -> int:
    """Return what a run writes, about: two checkpoints and the adapter, and another of each while it is replaced."""
    tensors = run.adapter.initialisation.tensors()
    all_, learned = (4 * sum(tensors[name].numel() for name in names) for names in (tensors, run.learned))
    return 3 * (all_ + 2 * learned + all_ * bool(run.validation)) + 2 * all_ + 200 * run.trainer.steps


def check_room(folder: Path, needed: int) -> int:
    """Return how many bytes are free where a folder is to be written; SettingsError if too few, or nothing can be.

    Checkpoints in the folder count as free: a run that goes on writes over them.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
            file.flush()
        free = shutil.disk_usage(there).free
        free += sum(path.stat().st_size for path in folder.glob(f"{Path(CHECKPOINT).stem}.*"))
    except OSError as error:
        raise SettingsError(f"nothing can be written to {folder}: {there}: {error.strerror}") from error
    if free < needed:
        told = f"checkpoint and adapter take about {_size(needed)}, but {there} has {_size(free)} free"
        raise SettingsError(f"nothing is written to {folder}: {told}")
    return free


@contextmanager
def naming_rows(run: "Run") -> Iterator[None]:
    """Raise DataError for the text that the tokenizer fails on, where an error that is not ours came of one."""
    try:
        yield
    except BaseException as error:  # a panic of Rust is no Exception
        ours = isinstance(error, TextMetaError | KeyboardInterrupt)
        for corpus in () if ours else (*run.corpora, *run.valid):
            for row, text in enumerate(corpus.texts):
                try:
                    run.reader.encoder.tokenize([text])
                except BaseException as fault:
                    told = f"corpus {corpus.name!r}, row {row}: the tokenizer fails on {text!r:.60}: {fault!s:.100}"
                    raise DataError(told) from fault
        raise


def is_memory_full(error: BaseException) -> bool:
    """Whether an error says that there is no more memory: of a GPU, of the CPU, or for CUDA's libraries."""
    told = ("out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(words in str(error) for words in told)
