"""The adapter folder: all that meta-training makes, and a fitted classifier with it, as safetensors and JSON alone.

``adapter_config.json`` and ``adapter_model.safetensors`` are LoRA as PEFT has it. The former follows from everything
else, so loading compares it with what it must be: it can hold nothing that PEFT would act on. ``textmeta.safetensors``
holds all other tensors, ``textmeta.json`` settings and record. A fitted classifier adds ``classifier.safetensors`` and
``classifier.json``, and ``support.safetensors`` where token states are stored with it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from textmeta.data.labels import checked_labels, label_to_json, read_labels
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LORA_B, LoraSettings
from textmeta.errors import AdapterError, HubError
from textmeta.files import destination, is_folder, read_json
from textmeta.hub import check_revision, is_repo_id
from textmeta.meta.adapter import PROBES, Adapter, ClassIndex
from textmeta.meta.initialisation import LORA, Adapt, Initialisation, LearnerSettings
from textmeta.meta.learner import LearnedTask
from textmeta.meta.shared import shared
from textmeta.sharing.card import is_edited, model_card
from textmeta.sharing.folder import CARD, CLASSIFIER, CONFIG, FORMAT, HEAD, META, STATES, TENSORS, WEIGHTS, write_folder
from textmeta.sharing.locate import read_located
from textmeta.sharing.support import FitInputs, StoredSupport, Strict, read_support, stored_support

M = TypeVar("M", bound=Strict)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
OLD_CARD = "README.old.md"
PREFIX = "base_model.model."  # of LoRA's factors in PEFT
PROBE, SCOPE, INDEX = "probe", "scope", "index"  # tensors beside those of the initialisation
SCOPE_SIZE = 8
BYTE = 127  # the largest entry of a class vector in the index, whose direction alone counts
# Axes of each tensor of one learned task: C classes, V views, d dimensions. Truth values are stored as 0 and 1.
TASK_AXES = {
    **{"queries": "1Vd", "centre": "1Vd", "weights": "1VdC", "scale": "1", "names": "1CVd", "name_centre": "1Vd"},
    **{"name_scale": "1", "class_means": "1VdC", "class_vectors": "1Cd", "mixture": "1V", "classes": "1C"},
    **{"present": "1C", "nll": "1", "view_nll": "1V", "name_evidence": "1", "shots": "1"},
}
TRUTHS = ("classes", "present")
# of an adapter, what is stored under its own name
SAME = ("encoder", "lora", "learner", "record", "versions", "prompt", "first_token")
SETTINGS = {"adapt": None, "steps": None, "class_weight": "balanced"}  # of a fit, as they are by default


@dataclass(frozen=True, eq=False)
class Fitted:
    """What ``fit`` made of one task."""

    task: LearnedTask  # T = 1
    classes: list[Any]  # the labels, in the order of the task's classes
    inputs: FitInputs | None = None  # what it was learned from, where that is kept
    settings: Mapping[str, Any] = field(default_factory=lambda: {**SETTINGS})  # it was learned with, which are stored
    weights_sha256: str = ""  # of the encoder that it was learned with
    arguments: tuple[str, ...] = ()  # of the estimator, as they read then


class _Corpus(Strict):
    name: Annotated[str, Field(min_length=1)]
    classes: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class _Meta(Strict):
    """The content of ``textmeta.json``."""

    format_version: int
    versions: dict[str, str]
    encoder: EncoderSettings
    encoder_commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None
    encoder_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    lora: LoraSettings
    learner: LearnerSettings
    record: dict[str, Any]
    prompt: str = ""  # an adapter without a prompt may be older than these two
    first_token: bool = False
    index: Annotated[list[_Corpus], Field(min_length=1)] | None


class _Classifier(Strict):
    """The content of ``classifier.json``."""

    classes: Annotated[list[Any], Field(min_length=2)]
    support: StoredSupport | None
    adapt: Adapt | None = None  # a task without these three may be older than they are
    steps: Annotated[int, Field(ge=0)] | None = None
    class_weight: Literal["balanced"] | list[tuple[Any, Positive]] | None = "balanced"


def save_adapter(folder: str | Path, adapter: Adapter, fitted: Fitted | None = None) -> None:
    """Write an adapter folder in place of what was there; a crash leaves the old one or the new one, whole.

    A model card that somebody wrote or edited is kept beside the new one, as ``README.old.md``. AdapterError if a value
    is not finite or cannot be stored, or the folder cannot be replaced (:func:`~textmeta.sharing.folder.write_folder`).
    """
    folder = destination(folder)
    files = adapter_files(adapter, fitted)
    if (folder / CARD).is_file():
        old = (folder / CARD).read_bytes()
        if is_edited(old.decode("utf-8", "replace")):
            files[OLD_CARD] = old
    write_folder(folder, files, unlisted=frozenset({CARD, OLD_CARD}))


def adapter_files(adapter: Adapter, fitted: Fitted | None = None) -> dict[str, bytes]:
    """Return the files of an adapter folder but its manifest, name to content; AdapterError if none would load them."""
    init, index = adapter.initialisation, adapter.index
    others = {name: value for name, value in init.tensors().items() if not name.startswith(LORA)}
    others[PROBE] = adapter.probe
    if adapter.scope is not None:
        others[SCOPE] = adapter.scope
    if index is not None and index.classes:
        vectors = torch.from_numpy(np.concatenate([index.vectors[corpus] for corpus in index.classes]))
        others[INDEX] = (BYTE * vectors / vectors.abs().amax(1, keepdim=True)).nan_to_num().round().to(torch.int8)
    same = {name: getattr(adapter, name) for name in SAME}
    meta = {
        **{name: value if isinstance(value, str | bool | Mapping) else asdict(value) for name, value in same.items()},
        "format_version": FORMAT,
        "encoder_commit": adapter.commit,
        "encoder_sha256": adapter.weights_sha256,
        "index": index and [{"name": name, "classes": list(classes)} for name, classes in index.classes.items()],
    }
    files = {
        CONFIG: _config_file(adapter),
        WEIGHTS: _write_tensors({PREFIX + name: value for name, value in init.lora.items()}),
        TENSORS: _write_tensors(others),
        META: write_json(meta),
    }
    content: dict[str, Any] | None = None
    if fitted is not None:
        factors = {LORA + name: value for name, value in fitted.task.factors.items()}
        files[HEAD] = _write_tensors({name: getattr(fitted.task, name) for name in TASK_AXES} | factors)
        inputs, settings = fitted.inputs, dict(fitted.settings)
        if isinstance(by_class := settings.get("class_weight"), Mapping):
            keys = map(label_to_json, checked_labels(list(by_class), "class_weight, key"))
            settings["class_weight"] = list(zip(keys, map(float, by_class.values()), strict=True))
        support = inputs and stored_support(inputs, fitted.classes)
        content = {"classes": list(map(label_to_json, fitted.classes)), "support": support, **settings}
        files[CLASSIFIER] = write_json(content)
        if inputs and inputs.states:
            files[STATES] = _write_tensors(inputs.states, torch.float16)
    try:
        _parse(files, Path())
    except AdapterError as error:
        raise AdapterError(f"not saved: {error}") from error
    return {**files, CARD: model_card(meta, content).encode("utf-8", "replace")}


def _config_file(adapter: Adapter) -> bytes:
    """Return the content of ``adapter_config.json``."""
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": adapter.encoder.model,
        "revision": adapter.commit or adapter.encoder.revision,
        "inference_mode": True,
        "r": adapter.lora.rank,
        "lora_alpha": adapter.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".lora_")[0] for name in adapter.initialisation.lora}),
    }
    return write_json(config)


def write_json(content: Any) -> bytes:
    """Return JSON, sorted, so that equal content has equal bytes."""
    try:
        return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:  # no value of JSON, or half of a character
        raise AdapterError(f"not saved: what is to be stored as JSON cannot be: {error}") from error


def _write_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> bytes:
    """Return the content of a safetensors file; whole numbers stay such."""
    stored = {}
    for name, value in tensors.items():
        own = value.detach().to("cpu", value.dtype if value.dtype == torch.int8 else dtype)
        # copies, because safetensors refuses tensors that share memory
        stored[name] = own.clone(memory_format=torch.contiguous_format)
    return save(stored, metadata={"format": "pt"})  # which PEFT and transformers ask for


def load_adapter(name: str | Path, *, encoder: str | None = None, **place: Any) -> tuple[Adapter, Fitted | None]:
    """Load an adapter by its name, checking hashes, settings, and names, shapes and numbers of all tensors.

    The same adapter is one object, however often it is loaded. Nothing in it is run or imported, and nothing outside
    its folder is read but the contents of the Hub's cache. Place and errors are those of
    :func:`~textmeta.sharing.locate.read_located`; without ``encoder``, which the caller will load in place of the
    adapter's, an adapter from the Hub that names a folder of this machine is refused.
    """
    files, where = read_located(name, **place)
    adapter, fitted = _parse(files, where.folder)
    model = adapter.encoder.model
    if encoder is None and where.kind == "hub" and (not is_repo_id(model) or is_folder(model)):
        told = "no folder of this machine is opened because somebody else's adapter says so: name the encoder yourself"
        raise AdapterError(f"the adapter in {where.folder}, from the Hub, names {model!r:.80} as its encoder; {told}")
    return shared(adapter.digest, lambda: adapter), fitted


def _parse(files: Mapping[str, bytes], folder: Path) -> tuple[Adapter, Fitted | None]:
    meta = read_model(_Meta, files[META], folder / META)
    # what names the encoder leads nowhere else
    if ".." in PurePosixPath(meta.encoder.model).parts:
        raise AdapterError(f"{folder / META}: encoder.model is {meta.encoder.model!r:.80}: no path upwards is followed")
    try:
        check_revision(meta.encoder.revision)
    except HubError as error:
        raise AdapterError(f"{folder / META}: encoder.revision: {error}") from error
    path, lora = folder / TENSORS, _read_factors(files[WEIGHTS], meta.lora.rank, folder / WEIGHTS)
    tensors = _read_tensors(files[TENSORS], path)
    queries = tensors.get("queries", torch.empty(0))
    if not meta.learner.layers:
        raise AdapterError(f"{folder / META}: learner.layers names no layer")
    if queries.ndim != 2:
        raise AdapterError(f"{path}: queries has shape {tuple(queries.shape)}, expected views and dimensions")
    with torch.device("meta"):  # shapes alone: a size that somebody made up must not take memory
        shapes = {name: tuple(value.shape) for name, value in lora.items()}
        start = Initialisation.start(shapes, queries.shape[1], meta.learner, seed=0)
    views, hidden = start.queries.shape
    expected = {name: tuple(value.shape) for name, value in start.tensors().items() if not name.startswith(LORA)}
    expected |= {PROBE: (len(PROBES), views * hidden), **({SCOPE: (SCOPE_SIZE,)} if SCOPE in tensors else {})}
    if meta.index is not None:
        expected[INDEX] = (sum(len(corpus.classes) for corpus in meta.index), hidden)
    _check_shapes(tensors, expected, path)
    for name, value in tensors.items():
        if "log_" in name and not (value.exp().isfinite() & (value.exp() > 0)).all():
            raise AdapterError(f"{path}: {name}: the exponential of one of its numbers is no positive number")
    probe, scope, vectors = tensors.pop(PROBE), tensors.pop(SCOPE, None), tensors.pop(INDEX, None)
    init = start.with_tensors({**{LORA + name: value for name, value in lora.items()}, **tensors})
    adapter = Adapter(
        **{name: getattr(meta, name) for name in SAME},
        weights_sha256=meta.encoder_sha256,
        initialisation=init,
        probe=probe,
        scope=scope,
        commit=meta.encoder_commit,
        index=None if meta.index is None or vectors is None else _index(meta.index, vectors, path),
    )
    if files[CONFIG] != _config_file(adapter):  # so it can hold nothing else that PEFT would act on
        raise AdapterError(f"{folder / CONFIG} does not say what follows from {META} and {WEIGHTS}")
    return adapter, _fitted(files, folder, init)


def read_model(kind: type[M], content: bytes, path: Path) -> M:
    """Return JSON as a model; errors name its path."""
    read_json(content, path, AdapterError)  # refuses NaN, too
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdapterError(f"{path}: {where:.200}: {first['msg']}, found {first['input']!r:.60}") from error


def _read_tensors(content: bytes, path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, all of one type and finite; AdapterError names its path."""
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error
    for name, value in tensors.items():
        expected = torch.int8 if name == INDEX else dtype
        if value.dtype != expected:
            raise AdapterError(f"{path}: tensor {name!r:.300} is {value.dtype}, expected {expected}")
        if not value.isfinite().all():
            raise AdapterError(f"{path}: tensor {name!r:.300} has values that are not finite")
    return tensors


def _read_factors(content: bytes, rank: int, path: Path) -> dict[str, Tensor]:
    """Return the LoRA factors that ``adapter_model.safetensors`` holds by the encoder's names."""
    factors = {}
    for name, value in sorted(_read_tensors(content, path).items()):
        if not re.fullmatch(re.escape(PREFIX) + r".+\.lora_[AB]\.weight", name):
            raise AdapterError(f"{path}: unexpected tensor {name!r:.300}, expected LoRA factors alone")
        if value.ndim != 2 or 0 in value.shape or value.shape[1 if LORA_B in name else 0] != rank:
            raise AdapterError(f"{path}: {name} has shape {tuple(value.shape)}, expected a factor of rank {rank}")
        factors[name.removeprefix(PREFIX)] = value
    return factors


def _check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Check that tensors have the names and shapes that are expected, None for one that is not there."""
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise AdapterError(f"{path}: {name:.200} has shape {found.get(name)}, expected {expected.get(name)}")


def _index(corpora: Sequence[_Corpus], vectors: Tensor, path: Path) -> ClassIndex:
    classes = {corpus.name: tuple(corpus.classes) for corpus in corpora}
    if len(classes) < len(corpora) or any(len(set(names)) < len(names) for names in classes.values()):
        raise AdapterError(f"{path.with_name(META)}: a corpus, or a class of one, is in the index twice")
    lengths = vectors.float().norm(dim=1, keepdim=True)
    if not lengths.all():
        raise AdapterError(f"{path}: expected no row of zeros in {INDEX}")
    parts = np.split((vectors / lengths).numpy(), np.cumsum([len(names) for names in classes.values()])[:-1])
    return ClassIndex(classes, dict(zip(classes, parts, strict=True)))


def _fitted(files: Mapping[str, bytes], folder: Path, init: Initialisation) -> Fitted | None:
    if HEAD not in files:
        return None
    content = read_model(_Classifier, files[CLASSIFIER], folder / CLASSIFIER)
    classes = read_labels(content.classes, folder / CLASSIFIER)
    task = _learned_task(_read_tensors(files[HEAD], folder / HEAD), len(classes), init, folder / HEAD)
    inputs, hidden = None, init.queries.shape[1]
    states = _read_tensors(files[STATES], folder / STATES, torch.float16) if STATES in files else {}
    if content.support is not None:
        inputs = read_support(content.support, states, classes, hidden, folder / CLASSIFIER)
    elif states:
        raise AdapterError(f"{folder / STATES} holds token states, but {CLASSIFIER} no support")
    settings = {name: getattr(content, name) for name in SETTINGS}
    if isinstance(content.class_weight, list):
        keys = read_labels([label for label, _ in content.class_weight], folder / CLASSIFIER)
        settings["class_weight"] = dict(zip(keys, (weight for _, weight in content.class_weight), strict=True))
    return Fitted(task, classes, inputs, settings)


def _learned_task(tensors: Mapping[str, Tensor], ways: int, init: Initialisation, path: Path) -> LearnedTask:
    """Return the learned task that tensors make, if they have the names and shapes of one."""
    sizes = {"1": 1, "C": ways, "V": init.queries.shape[0], "d": init.queries.shape[1]}
    expected = {name: tuple(sizes[axis] for axis in axes) for name, axes in TASK_AXES.items()}
    if "queries" in tensors and tensors["queries"].ndim == 2:
        expected["queries"] = expected["queries"][1:]  # where no step was taken they are the initial ones
    if any(name.startswith(LORA) for name in tensors):  # LoRA was adapted, all of it
        expected |= {LORA + name: (1, *value.shape) for name, value in init.lora.items()}
    _check_shapes(tensors, expected, path)
    for name in TRUTHS:
        if not ((tensors[name] == 0) | (tensors[name] == 1)).all():
            raise AdapterError(f"{path}: {name} holds something else than 0 and 1")
    plain = {name: value.bool() if name in TRUTHS else value for name, value in tensors.items() if name in TASK_AXES}
    factors = {name.removeprefix(LORA): value for name, value in tensors.items() if name not in TASK_AXES}
    return LearnedTask(**plain, factors=factors)
