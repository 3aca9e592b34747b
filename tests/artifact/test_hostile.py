"""Adapter folders from an enemy: each is refused by name and with the reason, and nothing of it is run.

Every folder is loaded through the public entry points while the interpreter's own audit events are watched: nothing may
be unpickled, imported, started, written, or read from the folder of secrets beside it, and memory and time are limited.
"""

import hashlib
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tests.artifact.test_store import (
    CONDITIONED,
    known_tasks,
    make_encoder,
    random_parameters,
    rewrite,
    rewrite_json,
    rewrite_tensors,
    unit,
)
from textmeta import FewShotClassifier
from textmeta.artifact.adapter import FittedHead
from textmeta.artifact.describe import describe
from textmeta.artifact.folder import MANIFEST
from textmeta.artifact.locate import Location
from textmeta.artifact.start import load_start
from textmeta.artifact.store import load_adapter, save_adapter
from textmeta.cli import info as show_info
from textmeta.cli import main
from textmeta.errors import TextMetaError
from textmeta.model.initialisation import lora_factors
from textmeta.tasks import TaskEmbedding

META, SCALARS, CLASSES, HEAD = "textmeta.json", "textmeta.safetensors", "classifier.json", "classifier.safetensors"
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
NAMES, VECTORS = "tasks.json", "tasks.safetensors"
LISTED = (CONFIG, WEIGHTS, CLASSES, HEAD, META, SCALARS, NAMES, VECTORS)
ENCODER_CONFIG, TOKENIZER_CONFIG, TOKENIZER = "config.json", "tokenizer_config.json", "tokenizer.json"
ENCODER_WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LORA_A = "base_model.model.encoder.layer.3.attention.self.query.lora_A.weight"
PLANTED = "planted_by_the_enemy"  # a module on sys.path that nothing may import
MEMORY = 2**29  # bytes that a load may take beyond what the process has
SECONDS = 20.0  # far more than any load takes
RECORD = {"episodes": 40, "settings": {"training": {"algorithm": "fomaml"}}}

Damage = Callable[["Scene"], object]


@dataclass(frozen=True)
class Scene:
    """What lies in the working folder of a test, all of it the enemy's but ``secrets``."""

    root: Path

    @property
    def adapter(self) -> Path:
        """A fitted classifier with task encoder, memory and index, that names ``encoder`` as its encoder."""
        return self.root / "adapter"

    @property
    def encoder(self) -> Path:
        return self.root / "encoder"

    @property
    def peft(self) -> Path:
        """The same LoRA as a plain PEFT adapter, without a manifest."""
        return self.root / "peft"

    def copy_all(self) -> None:
        """Make the encoder and the PEFT adapter, links to those of all tests, this scene's own."""
        for folder in (self.encoder, self.peft):
            source = folder.resolve()
            folder.unlink()
            shutil.copytree(source, folder)
        config = json.loads((self.peft / CONFIG).read_text())
        (self.peft / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(self.encoder)}))

    @property
    def secrets(self) -> Path:
        """Nothing in here may be read: copies of all of the above."""
        return self.root / "secrets"


@pytest.fixture(scope="module")
def world(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good scene, to be copied."""
    scene = Scene(tmp_path_factory.mktemp("world"))
    shutil.copytree(tiny_model, scene.encoder)
    encoder = make_encoder(str(scene.encoder))
    parameters = random_parameters(encoder, inner=CONDITIONED)
    support, task = [("bal bel", 0), ("fim", 1)], TaskEmbedding(unit(1, size=8)[0], unit(2), ("a", "b"))
    fitted = FittedHead(
        lora_factors(parameters), torch.ones(2, 32), ["a", "b"], support, temperature=torch.tensor(7.0), task=task
    )
    save_adapter(scene.adapter, encoder, parameters, CONDITIONED, RECORD, fitted, known_tasks())
    scene.peft.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(scene.adapter / name, scene.peft)
    for name in ("adapter", "encoder", "peft"):
        shutil.copytree(scene.root / name, scene.secrets / name)
    shutil.copy(scene.encoder / TOKENIZER, scene.secrets / "encoder" / "tokenizer.5.0.0.json")
    words = json.loads((scene.encoder / TOKENIZER).read_text())["model"]["vocab"]
    (scene.secrets / "encoder" / "vocab.txt").write_text("\n".join(words))
    (scene.root / "planted").mkdir()
    (scene.root / "planted" / f"{PLANTED}.py").write_text(
        f"import os\nos.environ[{PLANTED.upper()!r}] = '1'\nopen('canary', 'w').close()\n"
    )
    return scene.root


@pytest.fixture
def scene(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A good scene, to be damaged; the working folder is its root, and the planted module can be imported."""
    root = tmp_path / "scene"
    shutil.copytree(world / "adapter", root / "adapter")
    for name in ("encoder", "peft", "secrets", "planted"):
        (root / name).symlink_to(world / name)
    renamed(str(root / "encoder"))(Scene(root))
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [str(root / "planted"), *sys.path])
    return Scene(root)


# What may not happen


class Watch:
    """Lists what the interpreter reports while it is on; an audit hook cannot be removed."""

    EVENTS = (
        *("pickle.find_class", "marshal.loads", "ctypes.dlopen", "os.system", "os.exec", "os.fork", "os.posix_spawn"),
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
        *("subprocess.Popen", "socket.connect", "socket.getaddrinfo", "shutil.rmtree", "shutil.copyfile"),
    )

    def __init__(self) -> None:
        self.secrets: str | None = None  # of the scene that is watched; None where none is
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.secrets is None:
            return
        if event == "open":
            path, flags = str(arguments[0]), arguments[2]
            written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "__pycache__" not in path
            if written or os.path.realpath(path).startswith(self.secrets):
                self.seen.append(f"{'wrote' if written else 'read'} {path}")
        elif event in self.EVENTS and not (event == "marshal.loads" or "__pycache__" in str(arguments)):
            self.seen.append(f"{event} {arguments!r:.200}")


WATCH = Watch()


@contextmanager
def contained(scene: Scene) -> Iterator[None]:
    """Limit memory and time, and check afterwards that nothing happened but reading."""
    before = tree(scene.root)
    WATCH.seen.clear()
    WATCH.secrets = os.path.realpath(scene.secrets)
    try:
        with at_most(MEMORY), in_time(SECONDS):
            yield
    finally:
        WATCH.secrets = None
    assert not WATCH.seen
    assert not (scene.root / "canary").exists()
    assert PLANTED not in sys.modules
    assert PLANTED.upper() not in os.environ
    assert tree(scene.root) == before


def tree(root: Path) -> dict[str, tuple[int, int, int]]:
    """Return all that lies below a folder, links not followed."""
    found = {str(path.relative_to(root)): path.lstat() for path in root.rglob("*")}
    return {name: (status.st_mode, status.st_size, status.st_mtime_ns) for name, status in found.items()}


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """Let every allocation fail that would take the process beyond what it has and ``more`` bytes."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    rung = False

    def late(number: int, frame: object) -> None:
        nonlocal rung
        rung = True
        raise TimeoutError(f"not done after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    if rung:  # and somebody caught it
        raise TimeoutError(f"not done after {seconds} s")


# The ways in


def from_pretrained(scene: Scene) -> str:
    """Load the adapter and its encoder; return the message of the refusal, "" if it loads."""
    return refusal(lambda: FewShotClassifier.from_pretrained(scene.adapter))


def start(scene: Scene) -> str:
    return refusal(lambda: load_start(scene.adapter))


def foreign(scene: Scene) -> str:
    """Load the plain PEFT adapter and fit it to the encoder."""
    encoder = make_encoder(str(scene.encoder))
    return refusal(lambda: load_start(scene.peft).fitted_to(encoder))


def info(scene: Scene) -> str:
    return refusal(lambda: show_info(str(scene.adapter)))


def refusal(load: Callable[[], object]) -> str:
    try:
        load()
    except TextMetaError as error:
        return str(error)
    return ""


Way = Callable[[Scene], str]
ADAPTER: tuple[Way, ...] = (from_pretrained, info, start)
ENCODER: tuple[Way, ...] = (from_pretrained,)
FOREIGN: tuple[Way, ...] = (foreign,)


@dataclass(frozen=True)
class Case:
    """A kind of hostile folder.

    Args:
        name: of the test.
        damage: makes it of a good one.
        message: pattern of the refusal: the file, and the reason.
        ways: it is loaded by.
    """

    name: str
    damage: Damage
    message: str
    ways: Sequence[Way] = ADAPTER


# Tools for damage


class Payload:
    """Imports the planted module when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, (PLANTED,)


def pickled(name: str) -> bytes:
    return pickle.dumps(Payload()) if not name.endswith((".npy", ".npz")) else numpy_pickle(Path(name).suffix)


def numpy_pickle(suffix: str) -> bytes:
    """Return an array of objects, which NumPy stores as a pickle."""
    file, array = BytesIO(), np.array([Payload()], dtype=object)
    if suffix == ".npy":
        np.save(file, array, allow_pickle=True)
    else:
        np.savez(file, array=array)
    return file.getvalue()


def put(name: str, content: bytes) -> Damage:
    """Give a listed file another content and the right hash."""
    return lambda scene: rewrite(scene.adapter, name, content)


def raw(folder: str, name: str, content: bytes) -> Damage:
    """Write a file that no manifest lists."""
    return lambda scene: (scene.root / folder / name).write_bytes(content)


def meta(part: str, **change: object) -> Damage:
    """Change one part of textmeta.json, or its top level ("")."""
    return lambda scene: rewrite_json(
        scene.adapter, META, lambda found: (found[part] if part else found).update(change)
    )


def classes(**change: object) -> Damage:
    return lambda scene: rewrite_json(scene.adapter, CLASSES, lambda found: found.update(change))


def index(*corpora: object, **change: object) -> Damage:
    """Change the names of the index: its corpora, or its top level."""
    found = {"corpora": list(corpora)} if corpora else change
    return lambda scene: rewrite_json(scene.adapter, NAMES, lambda content: content.update(found))


def conditioning(**change: object) -> Damage:
    return lambda scene: rewrite_json(scene.adapter, META, lambda found: found["inner"]["conditioning"].update(change))


def task_encoder(**change: object) -> Damage:
    return lambda scene: rewrite_json(
        scene.adapter, META, lambda found: found["inner"]["conditioning"]["task_encoder"].update(change)
    )


def config(**change: object) -> Damage:
    return lambda scene: rewrite_json(scene.adapter, CONFIG, lambda found: found.update(change))


def change_json(folder: str, name: str, **change: object) -> Damage:
    """Change a JSON file that no manifest lists."""

    def damage(scene: Scene) -> None:
        path = scene.root / folder / name
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}))

    return damage


def tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda scene: rewrite_tensors(scene.adapter, name, change)


def encoder_tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(scene: Scene) -> None:
        found = load_file(scene.encoder / ENCODER_WEIGHTS)
        change(found)
        save_file(found, scene.encoder / ENCODER_WEIGHTS, metadata={"format": "pt"})

    return damage


def peft_tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(scene: Scene) -> None:
        found = load_file(scene.peft / WEIGHTS)
        change(found)
        save_file(found, scene.peft / WEIGHTS)

    return damage


def first_set_to(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: next(iter(found.values())).view(-1)[:1].fill_(value)


def replaced(folder: str, name: str, make: Callable[[Path], object]) -> Damage:
    """Put something that is no plain file into a file's place."""

    def damage(scene: Scene) -> None:
        path = scene.root / folder / name
        path.unlink(missing_ok=True)
        make(path)

    return damage


def link_out(folder: str, name: str) -> Damage:
    """Put a link into a file's place, to the same content among the secrets."""
    return replaced(folder, name, lambda path: path.symlink_to(path.parents[1] / "secrets" / folder / name))


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))  # short: a socket's path has a limit


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def listed(name: str, sha256: str = "0" * 64) -> Damage:
    """Add a line to the manifest."""

    def damage(scene: Scene) -> None:
        with (scene.adapter / MANIFEST).open("a", encoding="utf-8", errors="surrogateescape") as manifest:
            manifest.write(f"{sha256}  {name}\n")

    return damage


def manifest(change: Callable[[str], str]) -> Damage:
    def damage(scene: Scene) -> None:
        path = scene.adapter / MANIFEST
        path.write_bytes(change(path.read_bytes().decode()).encode())

    return damage


def unlist(*names: str) -> Damage:
    """Remove files and their lines in the manifest."""

    def damage(scene: Scene) -> None:
        for name in names:
            (scene.adapter / name).unlink()
        text = (scene.adapter / MANIFEST).read_text().splitlines(keepends=True)
        kept = [line for line in text if not line.endswith(tuple(f"  {name}\n" for name in names))]
        (scene.adapter / MANIFEST).write_text("".join(kept))

    return damage


def all_of(*damages: Damage) -> Damage:
    return lambda scene: [damage(scene) for damage in damages]


def safetensors(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def one_tensor(shape: list[int], offsets: list[int], dtype: str = "F32", name: str = LORA_A) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def replaced_text(name: str, old: str, new: str) -> Damage:
    """Change the text of a JSON file where Python would not write such JSON."""

    def damage(scene: Scene) -> None:
        text = (scene.adapter / name).read_text(encoding="utf-8")
        assert old in text
        rewrite(scene.adapter, name, text.replace(old, new, 1).encode())

    return damage


def planted_code(scene: Scene, name: str) -> None:
    (scene.encoder / name).write_text(f"import {PLANTED}\n")


def sharded(file: str, index: str = INDEX) -> Damage:
    """Say in an index that the encoder's weights are in another file."""

    def damage(scene: Scene) -> None:
        names = load_file(scene.encoder / ENCODER_WEIGHTS)
        (scene.encoder / ENCODER_WEIGHTS).unlink()
        content = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (scene.encoder / index).write_text(json.dumps(content))

    return damage


def without(folder: str, *names: str) -> Damage:
    return lambda scene: [(scene.root / folder / name).unlink() for name in names]


def secret(scene: Scene, *parts: str) -> str:
    return str(scene.secrets.joinpath(*parts))


# The table


def pickles() -> Iterator[Case]:
    names = ("pytorch_model.bin", "adapter_model.bin", "model.pt", "MODEL.PTH", "head.joblib", "state.pkl", "a.pickle")
    for name in (*names, "last.ckpt", "weights.npy", "weights.npz", "head.skops", "modeling.py", "lib.so"):
        content = pickled(name)
        message = rf"{re.escape(name)} is of a kind that can run code"
        yield Case(f"{name} beside the files", raw("adapter", name, content), message)
        sha256 = hashlib.sha256(content).hexdigest()
        yield Case(f"{name} in the manifest", all_of(raw("adapter", name, content), listed(name, sha256)), message)
    for name in (WEIGHTS, SCALARS, HEAD, VECTORS):
        yield Case(f"pickle named {name}", put(name, pickled(name)), rf"{name} cannot be read as safetensors")
    for name in (META, CONFIG, CLASSES, NAMES):
        yield Case(f"pickle named {name}", put(name, pickled(name)), rf"{name} is no JSON")
    yield Case(
        "pickle named SHA256SUMS", raw("adapter", MANIFEST, pickled("")), "SHA256SUMS, line 1: expected a sha256"
    )


def peft_keys() -> Iterator[Case]:
    """Keys of adapter_config.json that PEFT acts on, or would import something for."""
    keys: dict[str, object] = {
        "auto_mapping": {"base_model_class": "Canary", "parent_library": PLANTED},
        "auto_map": {"AutoModel": f"{PLANTED}.Canary"},
        "trust_remote_code": True,
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "../encoder",
        "revision": "../../secrets",
        "inference_mode": False,
        "r": 64,
        "lora_alpha": 10**30,
        "target_modules": ".*",
        "exclude_modules": ["query"],
        "fan_in_fan_out": True,
        "bias": "all",
        "use_rslora": True,
        "modules_to_save": ["embeddings"],
        "init_lora_weights": "pissa",
        "layers_to_transform": [0],
        "layers_pattern": "layer",
        "rank_pattern": {"query": 64},
        "alpha_pattern": {"query": 64},
        "megatron_config": {"tensor_model_parallel_size": 2},
        "megatron_core": PLANTED,
        "trainable_token_indices": [1],
        "loftq_config": {"loftq_bits": 4},
        "eva_config": {"rho": 2.0},
        "corda_config": {"corda_method": "kpm"},
        "runtime_config": {"ephemeral_gpu_offload": True},
        "use_dora": True,
        "alora_invocation_tokens": [1],
        "use_qalora": True,
        "layer_replication": [[0, 4], [0, 4]],
        "lora_bias": True,
        "target_parameters": ["weight"],
        "arrow_config": {"top_k": 3},
        "unknown": {"import": PLANTED},
    }
    for key, value in keys.items():
        yield Case(f"adapter_config {key}", config(**{key: value}), rf"adapter_config\.json: '{key}' is .*, expected")
    acted_on = {"auto_map", "trust_remote_code", "fan_in_fan_out", "bias", "rank_pattern", "alpha_pattern"}
    acted_on |= {"megatron_config", "trainable_token_indices", "eva_config", "corda_config", "runtime_config"}
    acted_on |= {"use_dora", "alora_invocation_tokens", "use_qalora", "layer_replication", "lora_bias", "unknown"}
    for key in sorted(acted_on | {"target_parameters", "arrow_config"}):
        message = rf"adapter_config\.json: '{key}' is .*, which textmeta's LoRA does not know"
        yield Case(f"foreign {key}", change_json("peft", CONFIG, **{key: keys[key]}), message, FOREIGN)


def foreign_adapters() -> Iterator[Case]:
    def case(name: str, damage: Damage, message: str) -> Case:
        return Case(f"foreign {name}", damage, message, FOREIGN)

    yield case(
        "pickled weights alone",
        all_of(without("peft", WEIGHTS), raw("peft", "adapter_model.bin", pickled(""))),
        r"peft has no adapter_model\.safetensors; pickled weights \(adapter_model\.bin\) are never loaded",
    )
    yield case(
        "pickle named as weights", raw("peft", WEIGHTS, pickled("")), rf"{WEIGHTS} cannot be read as safetensors"
    )
    for name in (CONFIG, WEIGHTS):
        yield case(f"link {name}", link_out("peft", name), rf"{name} is a link out of the folder")
        yield case(f"pipe {name}", replaced("peft", name, os.mkfifo), rf"{name} is no plain file")
    yield case("peft_type", change_json("peft", CONFIG, peft_type="LOHA"), r"adapter_config\.json: peft_type is 'LOHA'")
    yield case("list", raw("peft", CONFIG, b"[]"), r"adapter_config\.json: expected a JSON object")
    for rank in (0, -1, "4", None, 4.0, 10**30, 3):
        yield case(f"rank {rank!r}", change_json("peft", CONFIG, r=rank), rf"adapter_config\.json.*rank r = {rank!r}")
    yield case("alpha", change_json("peft", CONFIG, lora_alpha="16"), r"adapter_config\.json.*lora_alpha = '16'")
    yield case(
        "alpha too large",
        change_json("peft", CONFIG, lora_alpha=10**400),
        r"adapter_config\.json.*lora_alpha",
    )
    yield case(
        "alpha that makes factors infinite",
        change_json("peft", CONFIG, lora_alpha=1e300),
        r"(adapter_config\.json|adapter_model\.safetensors).*(lora_alpha|not finite)",
    )
    yield case(
        "rank 0 with factors of rank 0",
        all_of(
            change_json("peft", CONFIG, r=0),
            peft_tensors(lambda found: found.update({n: empty_rank(n, v) for n, v in found.items()})),
        ),
        r"adapter_config\.json.*rank",
    )
    yield case("NaN", peft_tensors(first_set_to(float("nan"))), rf"{WEIGHTS}: tensor .* not finite")
    yield case(
        "integers", peft_tensors(lambda found: found.update({LORA_A: torch.ones(4, 32).int()})), rf"{WEIGHTS}.*int32"
    )
    yield case(
        "8-bit floats",
        peft_tensors(lambda found: found.update({LORA_A: torch.ones(4, 32).to(torch.float8_e4m3fn)})),
        rf"{WEIGHTS}.*float8",
    )
    yield case(
        "missing factor", peft_tensors(lambda found: found.pop(LORA_A)), "does not fit the encoder: expected a factor"
    )


def empty_rank(name: str, value: Tensor) -> Tensor:
    return torch.zeros(0, value.shape[1]) if ".lora_A." in name else torch.zeros(value.shape[0], 0)


def names_and_links() -> Iterator[Case]:
    zeros = hashlib.sha256(b"").hexdigest()
    for name in (
        "../secrets/x",
        "/etc/hostname",
        "..",
        ".",
        "a/b",
        "a\\b",
        "a\x00b",
        ".hidden",
        "-x",
        "größe",
        "~root",
    ):
        yield Case(f"manifest names {name!r}", listed(name), r"SHA256SUMS, line 9: expected a sha256.*plain file name")
    for name in (MANIFEST, CARD, "notes.txt", "config.json"):
        damage = all_of(
            raw("adapter", name, b"") if name == "notes.txt" or name == "config.json" else lambda scene: None
        )
        yield Case(
            f"manifest lists {name}",
            all_of(damage, listed(name, zeros)),
            rf"{re.escape(name)} (is damaged|does not belong)",
        )
    yield Case("manifest lists what is not there", listed("none.json"), "none.json")
    yield Case("manifest name too long", listed("a" * 5000), "a{50}")
    yield Case(
        "manifest twice", manifest(lambda text: text + text.splitlines()[0] + "\n"), "SHA256SUMS, line 9: .*not given"
    )
    yield Case("manifest CRLF", manifest(lambda text: text.replace("\n", "\r\n")), "SHA256SUMS, line 1: expected")
    yield Case(
        "manifest upper case", manifest(lambda text: text[:64].upper() + text[64:]), "SHA256SUMS, line 1: expected"
    )
    yield Case("manifest binary marks", manifest(lambda text: text.replace("  ", " *")), "SHA256SUMS, line 1: expected")
    yield Case("manifest with a comment", manifest(lambda text: "# x\n" + text), "SHA256SUMS, line 1: expected")
    yield Case("manifest cut", manifest(lambda text: text[:-1]), "SHA256SUMS is cut off")
    yield Case("manifest empty", manifest(lambda text: ""), "SHA256SUMS is cut off")
    yield Case("manifest BOM", manifest(lambda text: "\ufeff" + text), "SHA256SUMS, line 1: expected")
    yield Case("manifest of nothing", manifest(lambda text: "\n"), "SHA256SUMS, line 1: expected")
    for name in (*LISTED, MANIFEST):
        yield Case(f"link {name}", link_out("adapter", name), rf"{name} is a link out of the folder, to .*secrets")
        yield Case(f"pipe {name}", replaced("adapter", name, os.mkfifo), rf"{name} is no plain file")
        yield Case(f"folder {name}", replaced("adapter", name, Path.mkdir), rf"{name} is no plain file")
        # without a manifest it is a plain PEFT adapter, and can be a start
        ways = ADAPTER if name != MANIFEST else (from_pretrained, info)
        yield Case(f"gone {name}", without("adapter", name), rf"(lacks the file|it has no) {name}", ways)
    yield Case(
        "device", replaced("adapter", META, lambda path: path.symlink_to("/dev/zero")), f"{META} is a link out of"
    )
    yield Case("socket", replaced("adapter", META, listen), rf"{META} is no plain file")
    for name in (META, MANIFEST):
        damage = replaced("adapter", name, lambda path: path.symlink_to(path.name))
        ways = ADAPTER if name != MANIFEST else (from_pretrained, info)
        yield Case(f"loop of links {name}", damage, rf"{name}", ways)
    yield Case(
        "file set aside",
        replaced("adapter", WEIGHTS, lambda path: path.symlink_to("none")),
        f"lacks the file {WEIGHTS}",
    )


def sizes() -> Iterator[Case]:
    for name in (META, WEIGHTS, MANIFEST):
        damage = replaced("adapter", name, partial(sparse, size=2**40))
        yield Case(f"1 TiB {name}", damage, rf"{name} has {2**40} bytes, expected at most")
    for name in (META, MANIFEST):
        damage = replaced("adapter", name, partial(sparse, size=2**30))
        yield Case(f"1 GiB {name}", damage, rf"{name} ")
    damage = all_of(replaced("adapter", "surplus.json", partial(sparse, size=2**30)), listed("surplus.json"))
    yield Case("1 GiB of a file that is none", damage, r"surplus\.json does not belong")
    for name in (WEIGHTS, SCALARS, HEAD, VECTORS):
        unreadable = rf"{name} cannot be read as safetensors"
        for label, content in {
            "empty": b"",
            "7 bytes": b"1234567",
            "header of 2^63 bytes": safetensors({}, length=2**63),
            "header of 2^40 bytes": safetensors({}, length=2**40),
            "header of 99 MB": safetensors({}, length=99_000_000),
            "header cut": safetensors(b'{"a":'),
            "header no object": safetensors([]),
            "header no UTF-8": safetensors(b'{"\xff":1}'),
            "header nested": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
            "1 TB claimed": safetensors(one_tensor([2**38], [0, 2**40])),
            "overflow": safetensors(one_tensor([2**62, 2**62], [0, 4])),
            "negative shape": safetensors(one_tensor([-1], [0, 4]), b"1234"),
            "negative offsets": safetensors(one_tensor([1], [-4, 0]), b"1234"),
            "overlap": safetensors({**one_tensor([1], [0, 4]), **one_tensor([1], [0, 4], name="b")}, b"1234"),
            "hole": safetensors(one_tensor([1], [4, 8]), b"12345678"),
            "surplus": safetensors(one_tensor([1], [0, 4]), b"12345678"),
            "too short for its shape": safetensors(one_tensor([2], [0, 4]), b"1234"),
            "unknown type": safetensors(one_tensor([1], [0, 4], "F99"), b"1234"),
            "metadata no text": safetensors({"__metadata__": {"a": 1}}),
            "fraction": safetensors(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', b"1234"),
        }.items():
            yield Case(f"{name} {label}", put(name, content), unreadable)
        yield Case(f"{name} has no tensors", put(name, safetensors({})), rf"{name}|classes|target_modules")
    twice = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    yield Case("name twice", put(WEIGHTS, safetensors(twice, b"1234")), WEIGHTS)
    for kind, size in {"I64": 8, "BOOL": 1, "F64": 8, "BF16": 2, "C64": 8, "F8_E4M3": 1}.items():
        content = safetensors(one_tensor([1], [0, size], kind), bytes(size))
        yield Case(f"type {kind}", put(WEIGHTS, content), rf"{WEIGHTS}")
    for kind, count, size in (("F8_E8M0", 1, 1), ("F4", 2, 1), ("F6_E2M3", 4, 3), ("F6_E3M2", 4, 3)):
        content = safetensors(one_tensor([count], [0, size], kind), bytes(size))
        yield Case(f"type {kind}", put(WEIGHTS, content), WEIGHTS)
    for shape in ([], [4], [4, 0], [0, 0], [2**40, 0], [2, 2, 2]):
        damage = tensors(WEIGHTS, with_factor(torch.zeros(shape)))
        yield Case(f"factor of shape {shape}", damage, r"\.safetensors")


def wrong_tensors() -> Iterator[Case]:
    for name in (WEIGHTS, SCALARS, HEAD, VECTORS):
        for value in ("nan", "inf", "-inf"):
            message = rf"{name}: tensor .* has values that are not finite"
            yield Case(f"{name} {value}", tensors(name, first_set_to(float(value))), message)
        halves = tensors(name, lambda found: found.update({key: value.half() for key, value in found.items()}))
        yield Case(f"{name} float16", halves, rf"{name}: tensor .* is torch\.float16, expected torch\.float32")
        yield Case(
            f"{name} with another", tensors(name, lambda found: found.update(surprise=torch.zeros(1))), rf"{name}.*"
        )
        yield Case(
            f"{name} lacks one",
            tensors(name, lambda found: found.pop(sorted(found)[0])),
            r"\.safetensors|adapter_config\.json",
        )
        yield Case(f"{name} misshapen", tensors(name, misshapen), r"\.safetensors")
    yield Case(
        "name with a line end",
        tensors(WEIGHTS, lambda found: found.update({LORA_A + "\n": torch.ones(4, 32)})),
        WEIGHTS,
    )
    yield Case(
        "factor under two names",
        tensors(HEAD, lambda found: found.update({n.removeprefix("lora."): v.clone() for n, v in found.items()})),
        HEAD,
    )
    yield Case(
        "weights 0 rows",
        all_of(
            classes(classes=[], support=None), tensors(HEAD, lambda found: found.update(weights=torch.zeros(0, 32)))
        ),
        rf"({CLASSES}|{HEAD}).*class",
    )
    yield Case(
        "1 class",
        all_of(
            classes(classes=["a"], support=None), tensors(HEAD, lambda found: found.update(weights=torch.zeros(1, 32)))
        ),
        rf"({CLASSES}|{HEAD}).*class",
    )
    yield Case(
        "weights 1 column",
        tensors(HEAD, lambda found: found.update(weights=torch.zeros(2, 1))),
        rf"{HEAD}: weights have 1 columns",
        ENCODER,
    )
    for shape in ([], [3], [0, 32], [1, 32], [10**4, 32]):
        change = tensors(SCALARS, with_probe(torch.ones(shape)))
        yield Case(f"probe of shape {shape}", change, r"probe|makes other features", ENCODER)
    huge = tensors(SCALARS, lambda found: found.update(log_temperature=torch.tensor(1e30)))
    yield Case("temperature that is infinite", huge, rf"{SCALARS}: log_temperature: .*no positive number")
    huge = tensors(SCALARS, lambda found: found.update(log_adapted_factor=torch.tensor(1e30)))
    yield Case("factor that is infinite", huge, rf"{SCALARS}: log_adapted_factor: .*no positive number")
    tiny = tensors(SCALARS, lambda found: found.update(log_name_weight=torch.tensor(-200.0)))
    yield Case("name weight that is 0", tiny, rf"{SCALARS}: log_name_weight: .*no positive number")


def with_factor(value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.update({LORA_A: value})


def with_probe(value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.update(probe=value)


def misshapen(found: dict[str, Tensor]) -> None:
    name = sorted(found)[0]
    found[name] = torch.zeros(*found[name].shape, 2)


def json_texts() -> Iterator[Case]:
    for name in (META, CONFIG, CLASSES, NAMES):
        no_json = rf"{name} is no JSON: "
        for label, content in {
            "empty": b"",
            "cut": b'{"a": ',
            "two": b"{} {}",
            "comment": b"{} // x",
            "UTF-16": '{"a": 1}'.encode("utf-16"),
            "BOM": b"\xef\xbb\xbf{}",
            "invalid UTF-8": b'{"a": "\xff"}',
            "nested lists": b"[" * 100_000 + b"]" * 100_000,
            "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
            "nested and cut": b"[" * 100_000,
            "key twice": b'{"a": 1, "a": 1}',
            "key twice below": b'{"b": [{"a": 1, "a": 1}]}',
            "NaN": b'{"a": NaN}',
            "Infinity": b'{"a": -Infinity}',
            "1e999": b'{"a": 1e999}',
            "integer of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
        }.items():
            yield Case(f"{name} {label}", put(name, content), no_json)
        for content in (b"[]", b"3", b'"x"', b"null", b"true"):
            yield Case(f"{name} {content!r}", put(name, content), rf"{name}: expected a JSON object")
        yield Case(f"{name} {{}}", put(name, b"{}"), rf"{name}|{HEAD}")
    for version in (0, -1, 1.5, True, "2", None, [2], {}, 8, 10**30, 7.0):
        yield Case(
            f"version {version!r:.20}", meta("", format_version=version), rf"{META} has format version .*reads 1 to 7"
        )
    yield Case(
        "version 1e999", replaced_text(META, '"format_version": 7', '"format_version": 1e999'), f"{META} is no JSON"
    )
    older = meta("", format_version=1, encoder=[["model", "encoder"]])
    yield Case("version 1 of another kind", older, rf"{META} is not what format version 1 is")
    # what it learned came later: without it, it would be an adapter of another kind
    yield Case("version 2 with a task encoder", meta("", format_version=2), rf"{META} is not what format version 2 is")
    nameless = tensors(SCALARS, lambda found: found.pop("log_name_weight"))
    came_later = ("log_name_weight", "temperature_slopes", "strength_prior", "evidence_slopes")
    without_those = tensors(SCALARS, lambda found: [found.pop(name) for name in came_later])
    older = all_of(*(without_setting("inner", name) for name in ("strengths", "loss", "schedule")))
    none = all_of(meta("", format_version=2), without_setting("inner", "conditioning"), older, without_those)
    yield Case("version 2 with a task encoder's weights", none, rf"{SCALARS}: expected tensors")
    later = all_of(meta("", format_version=3), older)
    yield Case("version 3 with what came later", later, rf"{SCALARS} is not what format version 3")
    yield Case("version 3 with later settings", meta("", format_version=3), rf"{META} is not what format version 3 is")
    yield Case("version 7 without what it has", nameless, rf"{SCALARS}: expected tensors")


def settings() -> Iterator[Case]:
    wrong: dict[str, dict[str, list[object]]] = {
        "inner": {
            "steps": [True, 2.5, "3", -1, None, [2]],
            "adapt": ["lora_A", [], ["nothing"], [["lora_A"]], None, {"lora_A": 1}, ["lora_.*"]],
            "head": ["evil", 3, None, ["prototype"]],
            "loss": ["evil", 3, None, ["head"], "neighbours"],
            "schedule": ["evil", 3, None, ["linear"]],
            "lora_step_size": [0, -1, "x", True],
            "step_sizes": ["all", 1],
            "normalise": [1, "true", None],
            "max_gradient_norm": [0, -1, "x", False],
            "strengths": [[], [-1.0], [11.0], [True], ["1"], [1.0] * 17, 1.0, None, {"1": 1}, [[1.0]], [10**400]],
            "conditioning": [3, "banks", [], True, [{}], {"unknown": 1}, {"task_encoder": {"unknown": 1}}],
            "unknown": [1],
        },
        "lora": {
            "rank": [0, -1, True, "4", 4.0, None],
            "alpha": [None, "x", 1.5],
            "layers": [0, -1, "2", 1.5],
            "targets": ["query", ".*", [1], [["query"]], {"query": 1}],
            "megatron_core": [PLANTED],
            "use_dora": [True],
        },
        "encoder": {
            "model": [None, 3, ["encoder"], "../encoder", "a/../../encoder", ".."],
            "revision": [3, ["main"]],
            "commit": [3, ["a"], {}],
            "weights_sha256": [None, 3, []],
            "pooling": ["max", 3, None],
            "max_length": [0, 2, -1, True, "32", 32.0, None],
            "trust_remote_code": [True],
            "auto_map": [{"AutoModel": f"{PLANTED}.Canary"}],
            "custom_code": ["modeling.py"],
        },
    }
    for part, names in wrong.items():
        for name, values in names.items():
            for value in values:
                yield Case(f"{part}.{name} {value!r:.30}", meta(part, **{name: value}), rf"{META}: .*({part}|{name})")
        for value in ([], None, "x", 3):
            yield Case(f"{part} {value!r}", meta("", **{part: value}), rf"{META}.*{part}")
    nested: list[tuple[str, Callable[..., Damage], dict[str, list[object]]]] = [
        (
            "inner.conditioning",
            conditioning,
            {
                "start": ["evil", None, 3, ["banks"]],
                "banks": [0, -1, True, 3.0, "3", None, 257, 10**9, 10**30],
                "groups": [0, -1, True, 2.0, "2", None, 257, 10**30],
                "temperature": [1, "true", None],
                "task_encoder": [None, 3, "graph", [], [{}]],
                "unknown": [1],
                "trust_remote_code": [True],
            },
        ),
        (
            "inner.conditioning.task_encoder",
            task_encoder,
            {
                "kind": ["evil", None, 3, ["graph"]],
                "size": [0, -1, True, 8.0, "8", None, 4097, 10**9, 10**30],
                "width": [0, -1, True, 8.0, "8", None, 4097, 10**9, 10**30],
                "label_names": [1, "true", None],
                "unknown": [1],
            },
        ),
    ]
    for part, damage, names in nested:
        for name, values in names.items():
            for value in values:
                yield Case(f"{part}.{name} {value!r:.30}", damage(**{name: value}), rf"{META}: .*{part}\.{name}\b")
    deep: object = 1
    for _ in range(400):
        deep = {"task_encoder": deep}
    yield Case("nested settings", meta("inner", conditioning=deep), rf"{META}: .*inner\.conditioning\.task_encoder")
    # of these sizes the file's tensors are not, and nothing may be made of these sizes before that is found
    for damage, name, value in (
        (conditioning, "start", "gates"),
        (conditioning, "start", "none"),
        (conditioning, "banks", 256),
        (conditioning, "groups", 1),
        (conditioning, "temperature", False),
        (task_encoder, "kind", "statistics"),
        (task_encoder, "kind", "set_transformer"),
        (task_encoder, "size", 4096),
        (task_encoder, "width", 4096),
        (task_encoder, "label_names", False),
    ):
        yield Case(f"{name} {value} that is not there", damage(**{name: value}), rf"{SCALARS}: expected tensors")
    largest = all_of(conditioning(banks=256, groups=256), task_encoder(size=4096, width=4096))
    yield Case("the largest sizes", largest, rf"{SCALARS}: expected tensors")
    yield Case("conditioning of defaults", meta("inner", conditioning={}), rf"{SCALARS}: expected tensors")
    yield Case("no conditioning", meta("inner", conditioning=None), rf"{SCALARS}: expected tensors")
    unknown = {"trust_remote_code": True, "auto_map": {"AutoModel": f"{PLANTED}.M"}}
    yield Case("unknown members", meta("", **unknown), rf"{META}: unexpected 'auto_map'")
    yield Case("unknown members of the classifier", classes(**unknown), rf"{CLASSES}: unexpected 'auto_map'")
    for part in ("record", "versions"):
        for value in ([], None, "x"):
            yield Case(f"{part} {value!r}", meta("", **{part: value}), rf"{META}: '{part}' is .*, expected")
    yield Case("strengths without a prior", meta("inner", strengths=[0.0, 1.0]), rf"{SCALARS}: expected tensors")
    yield Case("steps 5", meta("inner", steps=5), rf"{SCALARS}: expected tensors")
    yield Case("step size 10^400", meta("inner", lora_step_size=10**400), rf"{META}.*lora_step_size")
    yield Case("steps 10^9", meta("inner", steps=10**9), rf"({META}|{SCALARS}).*")
    yield Case("steps 10^30", meta("inner", steps=10**30), rf"({META}|{SCALARS}).*")
    yield Case(
        "another encoder",
        meta("encoder", model="other"),
        rf"{CONFIG}: 'base_model_name_or_path' is .*, expected 'other'",
    )
    both = all_of(meta("lora", rank=64), config(r=64))
    yield Case("rank of no factor", both, r"(lora|rank|shape).*64", ENCODER)
    both = all_of(meta("lora", rank=10**9), config(r=10**9))
    yield Case("rank 10^9", both, "rank", ENCODER)
    both = all_of(meta("lora", alpha=10**400), config(lora_alpha=10**400))
    yield Case("alpha 10^400", both, f"{META}.*alpha", ENCODER)
    yield Case("layers 10^9", meta("lora", layers=10**9), r"lora layers is 1000000000, but the encoder has 4", ENCODER)
    yield Case("targets of nothing", meta("lora", targets=[".*"]), r"no linear layer .* ends in \('\.\*',\)", ENCODER)
    yield Case("max_length 10^30", meta("encoder", max_length=10**30), "max_length is 1000.*160 positions", ENCODER)
    yield Case("cache of 1 PiB", meta("encoder", cache_mb=2**30), rf"{META}.*cache_mb")


def labels_and_support() -> Iterator[Case]:
    for value in (None, "ab", {"a": 0, "b": 1}, 2, ["a"], ["a", "b", "c"], [str(i) for i in range(1000)]):
        yield Case(f"classes {value!r:.30}", classes(classes=value), rf"{CLASSES} lists|{CLASSES}: 'classes' is")
    label = rf"{CLASSES}.*label"
    for value in (
        ["a", None],
        ["a", {"b": 1}],
        ["a", ["b"]],
        ["a", {"tuple": [None]}],
        ["a", {"float": "nan"}],
        [{}, []],
    ):
        yield Case(f"label {value!r}", classes(classes=value), label)
    for value in (["a", "a"], [1, True], [0, 0.0], [{"tuple": [1]}, {"tuple": [1]}]):
        yield Case(f"label twice {value!r}", classes(classes=value), label)
    yield Case("300,000 classes", classes(classes=list(range(300_000))), rf"{CLASSES} lists 300000 classes")
    nested: object = "x"
    for _ in range(400):
        nested = {"tuple": [nested]}
    yield Case("nested label", classes(classes=["a", nested]), rf"{CLASSES}.*")
    row = rf"{CLASSES}, support 1: expected a text and a class"
    for value in (-1, 2, 10**30, True, "0", None, 0.0, [0], {"a": 0}):
        yield Case(f"support of class {value!r}", classes(support=[["x", 0], ["x", value]]), row)
    for value in (["x"], "x0", [0, "x"], ["x", 0, 0], {"x": 0}, None, [None, 0]):
        yield Case(f"support {value!r}", classes(support=[["x", 0], value]), row)
    for value in ("x", 3, {"x": 0}, True):
        yield Case(f"support is {value!r}", classes(support=value), rf"{CLASSES}: 'support' is .*, expected")
    yield Case("half a fitted classifier", unlist(CLASSES), f"no whole fitted classifier: it has no {CLASSES}")


def task_encoders() -> Iterator[Case]:
    """Tensors of task encoder, memory and fitted task that are not what the settings say."""
    for name in ("task_encoder.centre", "task_encoder.class", "memory.keys", MEMORY_BANK, "task_temperature"):
        message = rf"{SCALARS}: expected tensors"
        yield Case(f"{name} gone", tensors(SCALARS, popped(name)), message)
        yield Case(f"{name} one-dimensional", tensors(SCALARS, having(name, torch.zeros(3))), message)
        yield Case(f"{name} empty", tensors(SCALARS, having(name, torch.zeros(0))), message)
    yield Case("gates beside a memory", tensors(SCALARS, having("gates", torch.zeros(2, 8))), SCALARS)
    yield Case(
        "bank of no factor", tensors(SCALARS, having("memory.bank.x", torch.zeros(3, 32, 4))), rf"{SCALARS}: expected"
    )
    others = {"task_encoder.centre": (31,), "task_encoder.class": (8, 31)}
    others |= {f"task_encoder.{name}": (12, 31) for name in ("prototype", "spread", "name")}
    change = all_of(*(tensors(SCALARS, having(name, torch.zeros(shape))) for name, shape in others.items()))
    yield Case("task encoder of other features", change, rf"{HEAD}: task_classes must have shape \(2, 31\)")
    for value in (torch.tensor(0.0), torch.tensor(-1.0), torch.ones(1), torch.zeros(0), torch.ones(2, 2)):
        change = tensors(HEAD, having("temperature", value))
        yield Case(f"fitted temperature {value!r:.40}", change, rf"{HEAD}: temperature must be one positive number")
    for name in ("task_vector", "task_classes"):
        yield Case(f"{name} gone", tensors(HEAD, popped(name)), rf"{HEAD}: {name} must have shape")
        for shape in ((), (0,), (8,), (7,), (2, 8), (3, 8), (2, 7), (0, 8), (2, 8, 1)):
            change = tensors(HEAD, having(name, torch.ones(shape)))  # some of a right shape, none of length 1
            yield Case(f"{name} of shape {shape}", change, rf"{HEAD}: {name} must have shape .* and length 1")
        for number in (0.0, 3e38):
            change = tensors(HEAD, lambda found, name=name, number=number: found[name].fill_(number))
            yield Case(f"{name} of {number}", change, rf"{HEAD}: {name} must have shape .* and length 1")


def calibrations() -> Iterator[Case]:
    """Numbers that calibration sets, and the rule for what is out of scope: of the adapter, and of a fitted task."""
    for name, size in (
        ("temperature_slopes", (2,)),
        ("evidence_slopes", (2,)),
        ("log_adapted_factor", ()),
        ("strength_prior", (1,)),
    ):
        if name != "log_adapted_factor":  # which not every adapter has
            yield Case(f"{name} gone", tensors(SCALARS, popped(name)), rf"{SCALARS}: expected tensors")
        yield Case(f"{name} of 3", tensors(SCALARS, having(name, torch.zeros(3))), rf"{SCALARS}: expected tensors")
        nan = having(name, torch.full(size, float("nan")))
        yield Case(f"{name} of nan", tensors(SCALARS, nan), rf"{SCALARS}: tensor '{name}' has values that are not")
    rule = tensors(SCALARS, having("scope", torch.zeros(8)))
    yield Case("rule of 7", tensors(SCALARS, having("scope", torch.zeros(7))), rf"{SCALARS}: expected tensors")
    yield Case("rule of 10^6", tensors(SCALARS, having("scope", torch.zeros(10**6))), rf"{SCALARS}: expected tensors")
    for value in ("nan", "inf"):
        broken = having("scope", torch.full((8,), float(value)))
        yield Case(f"rule of {value}", tensors(SCALARS, broken), rf"{SCALARS}: tensor 'scope' has values that are not")
        broken = having("scope", torch.full((4,), float(value)))
        message = rf"{HEAD}: tensor 'scope' has values that are not"
        yield Case(f"rule of a task of {value}", all_of(rule, tensors(HEAD, broken)), message)
    yield Case("rule of no task", rule, rf"{HEAD}: scope has shape \(0,\), expected \(4,\)")
    wide = tensors(HEAD, having("scope", torch.zeros(8)))
    yield Case("rule of a task of 8", all_of(rule, wide), rf"{HEAD}: scope has shape \(8,\), expected \(4,\)")
    alone = tensors(HEAD, having("scope", torch.zeros(4)))
    yield Case("rule of a task alone", alone, rf"{HEAD} does not hold the adapter's LoRA factors")


MEMORY_BANK = "memory.bank.encoder.layer.3.attention.self.value.lora_B.weight"


def having(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.update({name: value})


def popped(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.pop(name)


def without_setting(part: str, name: str) -> Damage:
    return lambda scene: rewrite_json(scene.adapter, META, lambda found: found[part].pop(name))


def no_task_encoder(scene: Scene) -> None:
    """Make the adapter one without a task encoder, whose index is left."""
    meta("inner", conditioning=None)(scene)
    task = ("task_vector", "task_classes")
    for file, names in ((SCALARS, ("task_encoder.", "memory.", "task_temperature")), (HEAD, task)):
        rewrite_tensors(
            scene.adapter, file, lambda found, names=names: [found.pop(n) for n in [*found] if n.startswith(names)]
        )


def indexes() -> Iterator[Case]:
    """Indexes of training tasks; the good one has two corpora, of two classes and of one."""
    two, one = {"name": "two", "classes": ["a", "b"]}, {"name": "one", "classes": ["a"]}
    for value in (None, 3, "x", {}, True):
        yield Case(f"corpora {value!r}", index(corpora=value), rf"{NAMES}: 'corpora' is .*, expected")
    row = rf"{NAMES}, corpus 1: expected a name not given before, and the names of its classes"
    for value in (
        *(None, 3, "one", [], {}, {"name": "one"}, {"classes": ["a"]}, {**one, "texts": ["secret"]}),
        *({**one, "name": name} for name in (None, 3, ["one"], {"a": 1}, "two")),
        *({**one, "classes": names} for names in (None, 3, "a", {}, {"a": 1}, [], [3], [None], [["a"]])),
    ):
        yield Case(f"corpus {value!r}", index(two, value), row)
    short = rf"{NAMES}.*expected names of one character or more"
    for names in (["a", 3], ["a", None], ["a", ["b"]], ["a", {}], ["a", ""]):
        yield Case(f"known classes {names!r}", index({**two, "classes": names}, one), short)
    yield Case("corpus without a name", index({**two, "name": ""}, one), short)
    yield Case("known class twice", index({**two, "classes": ["a", "a"]}, one), rf"{NAMES}.*a class is given twice")
    yield Case("no corpora", index(corpora=[]), rf"{VECTORS}: expected a tensor for each of 0 corpora")
    nothing = all_of(index(corpora=[]), put(VECTORS, safetensors({})))
    yield Case("no corpora and no tensors", nothing, rf"{NAMES}.*no corpus is in it")
    counts = rf"{VECTORS}: expected a tensor for each of \d+ corpora"
    yield Case("a corpus too many", index(two, one, {**one, "name": "three"}), counts)
    yield Case("a corpus too few", index(two), counts)
    yield Case("100,000 corpora", index(*({**one, "name": str(i)} for i in range(100_000))), counts)
    yield Case("known class too many", index({**two, "classes": ["a", "b", "c"]}, one), rf"{NAMES}.*shape \(2, 32\)")
    many = index({**two, "classes": [str(i) for i in range(300_000)]}, one)
    yield Case("300,000 known classes", many, rf"{NAMES}.*shape \(2, 32\), expected \(300000, 32\)")
    for name in ("2", "00", "-0", "../0", "one", "0\n"):
        change = tensors(VECTORS, lambda found, name=name: found.update({name: found.pop("0")}))
        yield Case(f"corpus of tensor {name!r}", change, counts)
    for shape in ((), (32,), (2, 8), (2, 33), (3, 32), (0, 32), (2, 0), (2**40, 0), (2, 32, 1)):
        message = rf"{VECTORS}.*shape \(.*\), expected \(2, 32\)"
        yield Case(f"class vectors of shape {shape}", tensors(VECTORS, having("0", torch.ones(shape))), message)
    for number in (0.0, 1.0, -1.0, 1e-30, 3e38):
        change = tensors(VECTORS, lambda found, number=number: found["1"].fill_(number))
        yield Case(f"class vectors of {number}", change, rf"{VECTORS}.*class vectors of length 1")
    for name in (NAMES, VECTORS):
        half = rf"half an index of training tasks: it has no {name}"
        yield Case(f"half an index, without {name}", unlist(name), half)
    yield Case("index without a task encoder", no_task_encoder, rf"{NAMES}.*the adapter has no task encoder")
    unknown = index(corpora=[two, one], trust_remote_code=True)
    yield Case("unknown members of the index", unknown, rf"{NAMES}: unexpected 'trust_remote_code'")


def encoders() -> Iterator[Case]:
    def case(name: str, damage: Damage, message: str) -> Case:
        return Case(f"encoder {name}", damage, message, ENCODER)

    refused = r"encoder'.*"
    code = {key: f"modeling.{key}" for key in ("AutoConfig", "AutoModel")}
    planted = partial(planted_code, name="modeling.py")
    yield case(
        "of its own code",
        all_of(planted, change_json("encoder", ENCODER_CONFIG, model_type="planted", auto_map=code)),
        refused + "trust_remote_code",
    )
    yield case("unknown", change_json("encoder", ENCODER_CONFIG, model_type="planted"), refused + "planted")
    yield case("pickled", pickled_encoder, refused + r"pickled weights \(pytorch_model\.bin\) are never loaded")
    yield case("that is an adapter", raw("encoder", CONFIG, b"{}"), "encoder' is an adapter, not an encoder")
    yield case(
        "weights changed",
        encoder_tensors(lambda found: next(iter(found.values())).add_(1)),
        "belongs to .*encoder with",
    )
    yield case(
        "hash changed", meta("encoder", weights_sha256="0" * 64), "belongs to .*encoder with weights 000000000000"
    )
    yield case("gone", lambda scene: shutil.rmtree(scene.encoder), "encoder'")
    outside = rf"{INDEX}: expected safetensors files of its folder, found "
    yield case("sharded upwards", sharded("../secrets/encoder/model.safetensors"), outside + r"'\.\./secrets")
    yield case("sharded elsewhere", sharded("/etc/hostname"), outside + "'/etc/hostname")
    yield case(
        "sharded number", all_of(sharded("x"), raw("encoder", INDEX, b'{"weight_map": {"a": 3}}')), outside + "'3"
    )
    yield case("sharded nowhere", raw("encoder", INDEX, b"[]"), rf"{INDEX}: expected a JSON object")
    yield case("sharded pickle", pickled_shard, r"safetensors")
    names_it = change_json("encoder", ENCODER_CONFIG, transformers_weights="x.safetensors.index.json")
    yield case(
        "sharded by another index",
        all_of(sharded("../secrets/encoder/model.safetensors", "x.safetensors.index.json"), names_it),
        "outside|transformers_weights",
    )
    upwards = change_json("encoder", ENCODER_CONFIG, transformers_weights="../secrets/encoder/model.safetensors")
    yield case("weights elsewhere", upwards, rf"{ENCODER_CONFIG}: 'transformers_weights' is")
    for key, value in {
        "fast_tokenizer_files": ["../secrets/encoder/tokenizer.5.0.0.json"],
        "vocab": "secrets/encoder/vocab.txt",
        "init_inputs": ["secrets/encoder/vocab.txt"],
        "gguf_file": "secrets/encoder/vocab.txt",
    }.items():
        change = change_json("encoder", TOKENIZER_CONFIG, tokenizer_class="BertTokenizer", **{key: value})
        yield case(f"tokenizer {key}", all_of(without("encoder", TOKENIZER), change), key)
    change = change_json("encoder", TOKENIZER_CONFIG, tokenizer_class="BertTokenizer")
    yield case("tokenizer without words", all_of(without("encoder", TOKENIZER), change), "tokenizer")
    for name in (ENCODER_CONFIG, ENCODER_WEIGHTS, TOKENIZER):
        yield case(f"pipe {name}", replaced("encoder", name, os.mkfifo), r"encoder\b")
    yield case(f"pipe {INDEX}", replaced("encoder", INDEX, os.mkfifo), INDEX)
    yield case(f"folder {INDEX}", replaced("encoder", INDEX, Path.mkdir), INDEX)
    for label, change in {
        "heads 0": {"num_attention_heads": 0},
        "layers text": {"num_hidden_layers": "x"},
        "layers 0": {"num_hidden_layers": 0},
        "layers -1": {"num_hidden_layers": -1},
        "other width": {"hidden_size": 64},
        "width 10^9": {"hidden_size": 10**9},
        "type": {"dtype": "evil"},
        "labels": {"id2label": 3},
        "tuples": {"return_dict": False},
        "padding": {"pad_token_id": 10**9},
        "attention": {"attn_implementation": 3},
        "quantized": {"quantization_config": {"quant_method": "fp8"}},
        "decoder": {"is_decoder": True},
        "another family": {"model_type": "t5"},
    }.items():
        yield case(f"config {label}", change_json("encoder", ENCODER_CONFIG, **change), r"encoder\b")
    yield case("config 10^9 layers", change_json("encoder", ENCODER_CONFIG, num_hidden_layers=10**9), "layers")
    yield case("config 10^9 labels", change_json("encoder", ENCODER_CONFIG, num_labels=10**9), "labels")
    for name in (ENCODER_CONFIG, TOKENIZER_CONFIG, TOKENIZER, INDEX):
        nested = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
        yield case(f"nested {name}", raw("encoder", name, nested), rf"{name}|encoder")
    yield case("tokenizer no model", change_json("encoder", TOKENIZER, model={}), refused)
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    yield case(
        "tokenizer that panics",
        change_json("encoder", TOKENIZER, normalizer=charsmap),
        refused,
    )
    for key in ("tokenizer_file", "vocab_file", "vocab"):
        change = raw("encoder", "special_tokens_map.json", json.dumps({key: f"secrets/encoder/{TOKENIZER}"}).encode())
        damage = all_of(without("encoder", TOKENIZER), change)
        yield case(f"special tokens with {key}", damage, rf"special_tokens_map\.json.*{key}|tokenizer")
    yield case(
        "special tokens with entity_vocab_file", entities_elsewhere, r"special_tokens_map\.json.*entity_vocab_file"
    )
    yield case("of texts and images", clip, r"encoder\b")
    words = change_json("encoder", TOKENIZER_CONFIG, fast_tokenizer_files=3)
    yield case("tokenizer files 3", words, rf"{TOKENIZER_CONFIG}.*fast_tokenizer_files")
    model = {"type": "WordLevel", "vocab": {"[UNK]": 10**6, "[CLS]": 2, "[SEP]": 3}, "unk_token": "[UNK]"}
    yield case(
        "tokenizer of other words", change_json("encoder", TOKENIZER, model=model, added_tokens=[]), r"encoder\b"
    )
    model = {"type": "WordLevel", "vocab": {"[CLS]": 2, "[SEP]": 3}, "unk_token": "none"}
    yield case("tokenizer without unknown", change_json("encoder", TOKENIZER, model=model), r"encoder\b")
    nothing = {"type": "Replace", "pattern": {"Regex": ".*"}, "content": ""}
    change = change_json("encoder", TOKENIZER, normalizer=nothing, post_processor=None)
    yield case("tokenizer that gives nothing", change, r"encoder\b")
    yield case("name too long", renamed("a" * 5000), "'a{50}")
    yield case("name empty", renamed(""), "encoder ''")
    yield case("name with a null", renamed("a\x00b"), "encoder 'a")
    yield case("name with half a character", renamed("\ud800"), "encoder '")


def renamed(model: str) -> Damage:
    """Let the adapter name another encoder."""
    return all_of(meta("encoder", model=model), config(base_model_name_or_path=model))


def entities_elsewhere(scene: Scene) -> None:
    """Let a tokenizer with a file of its own look for that elsewhere."""
    (scene.encoder / "vocab.txt").write_bytes((scene.secrets / "encoder" / "vocab.txt").read_bytes())
    tokens = json.dumps({"entity_vocab_file": "secrets/encoder/vocab.txt"})
    change_json("encoder", TOKENIZER_CONFIG, tokenizer_class="LukeTokenizer")(scene)
    all_of(without("encoder", TOKENIZER), raw("encoder", "special_tokens_map.json", tokens.encode()))(scene)


def clip(scene: Scene) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = {**sizes, "vocab_size": 160}, {**sizes, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(scene.encoder)


def pickled_shard(scene: Scene) -> None:
    weights = load_file(scene.encoder / ENCODER_WEIGHTS)
    sharded("weights.bin")(scene)
    torch.save(weights, scene.encoder / "weights.bin")


def pickled_encoder(scene: Scene) -> None:
    (scene.encoder / ENCODER_WEIGHTS).unlink()
    (scene.encoder / "pytorch_model.bin").write_bytes(pickled(""))


def revisions() -> Iterator[Case]:
    """Revisions of an encoder that lead out of the Hub's cache, where each is the name of a file."""
    for key in ("revision", "commit"):

        def damage(scene: Scene, key: str = key) -> None:
            path = str(scene.secrets / "encoder" / "vocab.txt")
            all_of(renamed("lab/tiny"), meta("encoder", **{key: path}), config(revision=path))(scene)

        yield Case(f"{key} that is a path", damage, rf"{META}.*{key}", ENCODER)
    change = all_of(renamed("lab/tiny"), meta("encoder", revision="/dev/zero"), config(revision="/dev/zero"))
    yield Case("revision that is a device", change, rf"{META}.*revision", ENCODER)


TABLE = [
    *pickles(),
    *peft_keys(),
    *foreign_adapters(),
    *names_and_links(),
    *sizes(),
    *wrong_tensors(),
    *json_texts(),
    *settings(),
    *labels_and_support(),
    *task_encoders(),
    *calibrations(),
    *indexes(),
    *encoders(),
    *revisions(),
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_hostile_folder_is_refused_and_harmless(scene: Scene, case: Case) -> None:
    if case.ways is not ADAPTER:
        scene.copy_all()
    case.damage(scene)
    for way in case.ways:
        with contained(scene):
            message = way(scene)
        assert message or pytest.fail(f"{way.__name__} loads it")
        assert re.search(case.message, message, re.DOTALL), message


FORBIDDEN: dict[str, tuple[Callable[[Scene], object], type[BaseException]]] = {
    "pickle": (lambda scene: pickle.loads(pickled("")), AssertionError),  # noqa: S301 - what the watch is for
    "import": (lambda scene: __import__(PLANTED), AssertionError),
    "write": (lambda scene: (scene.root / "new").write_text("x"), AssertionError),
    "remove": (lambda scene: (scene.adapter / CARD).unlink(), AssertionError),
    "secrets": (lambda scene: (scene.secrets / "encoder" / "vocab.txt").read_text(), AssertionError),
    "link to secrets": (lambda scene: (scene.adapter / ".." / "secrets" / "peft" / CONFIG).read_text(), AssertionError),
    "process": (lambda scene: os.system("true"), AssertionError),
    "network": (lambda scene: socket.getaddrinfo("localhost", 1), AssertionError),
    "memory": (lambda scene: bytes(2 * MEMORY), MemoryError),
    "tensor": (lambda scene: torch.zeros(MEMORY), RuntimeError),
    "time": (lambda scene: signal.pause(), TimeoutError),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_watch_sees_what_may_not_happen(scene: Scene, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.05 if name == "time" else SECONDS)
    act, raises = FORBIDDEN[name]
    with pytest.raises(raises), contained(scene):
        act(scene)
    sys.modules.pop(PLANTED, None)
    os.environ.pop(PLANTED.upper(), None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "kernels-community/flash-attn2"),
        ("_attn_implementation", "somebody/kernel"),
        ("attn_implementation", "flash_attention_2"),
    ],
)
def test_encoder_cannot_ask_for_kernels(scene: Scene, key: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are code from the Hub, which transformers runs if it finds the package of that name."""
    asked: list[str] = []

    def load_kernel(name: str, **options: object) -> None:
        asked.append(name)
        raise ImportError(name)

    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", load_kernel)
    monkeypatch.setattr(transformers.modeling_utils, "is_kernels_available", lambda: True)
    scene.copy_all()
    change_json("encoder", ENCODER_CONFIG, **{key: value})(scene)
    message = from_pretrained(scene)
    assert not asked
    assert "attn_implementation" in message


# What is no damage, and has no effect


def code_of_its_own(**change: object) -> Damage:
    return all_of(
        partial(planted_code, name="modeling.py"),
        partial(planted_code, name="tokenization.py"),
        change_json("encoder", ENCODER_CONFIG, auto_map={"AutoModel": "modeling.M", "AutoConfig": "modeling.C"}),
        change_json("encoder", TOKENIZER_CONFIG, auto_map={"AutoTokenizer": ["tokenization.T", None]}, **change),
    )


ENTRY = {"name": "x", "texts": 1, "classes": 1}
NO_ACCURACY = {"frozen": {"accuracy": "x"}, "meta_trained": {"accuracy": 1}, "paired": {"low": 0, "high": 0}}
# Training records that textmeta does not write: nothing acts on them, and what is shown leaves them out.
RECORDS: tuple[dict[str, object], ...] = (
    {"settings": 3},
    {"settings": {"training": 3}},
    {"settings": {"training": {}}},
    {"settings": {"training": {"algorithm": "x"}, "train": {"corpora": [3]}}},
    {"settings": {"training": {"algorithm": "x"}, "train": {"corpora": [ENTRY]}}, "sources": [3]},
    {"results": []},
    {"results": {"x": 3}},
    {"results": {"x": NO_ACCURACY}},
    {"\ud800": "\ud800"},
)

HARMLESS: dict[str, tuple[Damage, Sequence[Way]]] = {
    "nothing": (lambda scene: None, (*ADAPTER, foreign)),
    "pickled card": (raw("adapter", CARD, pickled("")), ADAPTER),
    "card that is a link": (replaced("adapter", CARD, lambda path: path.symlink_to("/etc/hostname")), ADAPTER),
    "card that is a pipe": (replaced("adapter", CARD, os.mkfifo), ADAPTER),
    "card of 1 TiB": (replaced("adapter", CARD, partial(sparse, size=2**40)), ADAPTER),
    "user's folder": (lambda scene: (scene.adapter / "sub").mkdir(), ADAPTER),
    "pickle beside a plain PEFT adapter": (raw("peft", "adapter_model.bin", pickled("")), FOREIGN),
    "pickle beside an encoder's weights": (raw("encoder", "pytorch_model.bin", pickled("")), ENCODER),
    "encoder with code that it does not need": (code_of_its_own(), ENCODER),
    "encoder with a chat template": (code_of_its_own(chat_template="{{ ''.__class__.__mro__[1] }}"), ENCODER),
    "encoder with pipelines": (
        change_json("encoder", ENCODER_CONFIG, custom_pipelines={"x": {"impl": f"{PLANTED}.Pipeline"}}),
        ENCODER,
    ),
    **{f"record {number}": (meta("", record=record), ADAPTER) for number, record in enumerate(RECORDS)},
    **{
        f"foreign {key}": (change_json("peft", CONFIG, **{key: value}), FOREIGN)
        for key, value in {
            "auto_mapping": {"base_model_class": "Canary", "parent_library": PLANTED},
            "megatron_core": PLANTED,
            "modules_to_save": ["embeddings"],
            "loftq_config": {"loftq_bits": 4},
            "target_modules": "(a+)+$",
            "peft_version": "evil",
        }.items()
    },
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_nothing_reads_has_no_effect(scene: Scene, name: str) -> None:
    damage, ways = HARMLESS[name]
    scene.copy_all()
    damage(scene)
    for way in ways:
        with contained(scene):
            assert way(scene) == ""


def test_command_ends_with_the_message(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("textmeta"), "level", logging.WARNING)  # put back afterwards
    meta("inner", steps=-1)(scene)
    with contained(scene), pytest.raises(SystemExit, match=rf"^AdapterError: .*{META}: .*steps"):
        main(["info", str(scene.adapter)])


def test_info_prints_no_control_characters(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    classes(classes=["a\x1b[2J", "b\rwhole"])(scene)
    index({"name": "two\x1b[2J\r", "classes": ["a\x1b[2J", "b"]}, {"name": "one", "classes": ["a"]})(scene)
    assert info(scene) == ""
    shown = capsys.readouterr().out
    assert "whole" in shown
    assert not re.search(r"[^\n -~\xa1-\U0010ffff]", shown)


def test_subfolder_that_is_a_link_out_is_not_followed(scene: Scene) -> None:
    scene.copy_all()
    (scene.encoder / "sub").symlink_to(scene.secrets / "adapter")
    with contained(scene), pytest.raises(TextMetaError, match="sub"):
        FewShotClassifier.from_pretrained(scene.encoder, subfolder="sub")


# At random


def test_each_of_200_flipped_bits_is_refused(scene: Scene) -> None:
    load_adapter(scene.adapter)
    rng = random.Random(0)
    for _ in range(200):
        name = rng.choice([*LISTED, MANIFEST])
        content = (scene.adapter / name).read_bytes()
        bit = rng.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (scene.adapter / name).write_bytes(flipped)
        with pytest.raises(TextMetaError) as caught:
            load_adapter(scene.adapter)
        assert name in str(caught.value) or name == MANIFEST, (name, bit)
        (scene.adapter / name).write_bytes(content)


NUMBERS = (0, -1, 1, 2, 3, 7, 10**9, 10**30, -(10**30), 10**400, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63)
TEXTS = ("", "x", "../x", "/etc/hostname", "\x00", "\ud800", "\x1b[2J", "a" * 300, "Infinity", "lora_B", "ridge", "cls")
OTHERS = (None, True, False, [], {}, [[]], [{}], {"": None}, {"tuple": [1]}, {"float": "inf"}, [0, "x"], ["x", 0])


def changed_json(rng: random.Random, value: Any) -> Any:
    """Return JSON with one value, key or type changed."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        place, below = rng.choice(items)
        what = rng.random()
        if what < 0.1:
            items.remove((place, below))
        elif what < 0.2:
            items.append((rng.choice(TEXTS), rng.choice(OTHERS)))
        else:
            items[items.index((place, below))] = (place, changed_json(rng, below))
        return dict(items) if isinstance(value, dict) else [item for _, item in items]
    return rng.choice([*NUMBERS, *TEXTS, *OTHERS])


def changed_header(rng: random.Random, content: bytes) -> bytes:
    """Return a safetensors file whose header was changed, its length put right."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.8:
        return safetensors(changed_json(rng, json.loads(header)), body)
    text = bytearray(header)
    for _ in range(rng.randint(1, 3)):
        text[rng.randrange(length)] = rng.choice(b'0123456789{}[]:,"-.eE FIB')
    return safetensors(bytes(text), body)


def fuzz(scene: Scene, seed: int, cases: int, names: Sequence[str], use: Callable[[Path], object]) -> list[str]:
    """Change files at random, with the right hashes; return what was neither refused nor loaded."""
    rng, faults = random.Random(seed), []
    good = {name: (scene.adapter / name).read_bytes() for name in (*names, MANIFEST)}
    with at_most(MEMORY), in_time(60):
        for case in range(cases):
            name = rng.choice(names)
            if name.endswith(".json"):
                content = json.dumps(changed_json(rng, json.loads(good[name]))).encode()
            else:
                content = changed_header(rng, good[name])
            if content == good[name]:
                continue
            rewrite(scene.adapter, name, content)
            try:
                use(scene.adapter)
            except TextMetaError as error:
                if name not in str(error) and ".json" not in str(error) and ".safetensors" not in str(error):
                    faults.append(f"{case} {name}: no file in {error!s:.200}")
            except Exception as error:
                faults.append(f"{case} {name}: {type(error).__name__}: {error!s:.100}: {content!r:.3000}")
            for file, before in good.items():
                (scene.adapter / file).write_bytes(before)
    return faults


@pytest.mark.parametrize("name", LISTED)
def test_file_changed_at_random_is_refused_or_loads(scene: Scene, name: str) -> None:
    assert not fuzz(scene, 0, 40, [name], load_adapter)


def test_adapter_changed_at_random_is_refused_or_shown(scene: Scene) -> None:
    def show(folder: Path) -> None:
        describe(load_adapter(folder), Location(folder, "folder"))

    assert not fuzz(scene, 0, 60, [META, CLASSES, NAMES], show)
