"""Adapter folders from an enemy: each is refused by name and with the reason, and nothing of it is run.

Every folder is loaded through the public entry points while the interpreter's own audit events are watched: nothing may
be unpickled, imported, started, written, or read from the folder of secrets beside it, and memory and time are limited.
"""

import json
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.given import Patch
from tests.sharing import made
from textmeta.cli import main
from textmeta.errors import TextMetaError
from textmeta.sharing.folder import MANIFEST
from textmeta.sharing.store import load_adapter, save_adapter

META, TENSORS, CLASSES, HEAD = "textmeta.json", "textmeta.safetensors", "classifier.json", "classifier.safetensors"
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
ENCODER_CONFIG, TOKENIZER_CONFIG, TOKENIZER = "config.json", "tokenizer_config.json", "tokenizer.json"
ENCODER_WEIGHTS = "model.safetensors"
PLANTED = "planted_by_the_enemy"  # a module on sys.path that nothing may import
MEMORY = 2**29  # bytes that a load may take beyond what the process has
SECONDS = 20.0  # far more than any load takes

Damage = Callable[["Scene"], object]


class Scene(NamedTuple):
    """What lies in the working folder of a test, all of it the enemy's but ``secrets``."""

    root: Path
    adapter: Path  # a fitted classifier with an index, that names ``encoder`` as its encoder
    encoder: Path
    secrets: Path  # copies of all of the above, of which nothing may be read

    @classmethod
    def at(cls, root: Path) -> "Scene":
        return cls(root, *(root / name for name in cls._fields[1:]))


@pytest.fixture(scope="module")
def world(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good scene, to be copied."""
    scene = Scene.at(tmp_path_factory.mktemp("world"))
    shutil.copytree(tiny_model, scene.encoder)
    reader = made.make_reader(str(scene.encoder))
    adapter = made.make_adapter(reader, adapt="pooling+lora")
    save_adapter(scene.adapter, adapter, made.fit(reader, adapter, keep=True))
    for name in ("adapter", "encoder"):
        shutil.copytree(scene.root / name, scene.secrets / name)
    words = json.loads((scene.encoder / TOKENIZER).read_text())["model"]["vocab"]
    (scene.secrets / "encoder" / "vocab.txt").write_text("\n".join(words))
    (scene.root / "planted").mkdir()
    (scene.root / "planted" / f"{PLANTED}.py").write_text(
        f"import os\nos.environ[{PLANTED.upper()!r}] = '1'\nopen('canary', 'w').close()\n"
    )
    return scene.root


@pytest.fixture
def scene(world: Path, tmp_path: Path, monkeypatch: Patch) -> Scene:
    """A good scene, to be damaged; the working folder is its root, and the planted module can be imported."""
    root = tmp_path / "scene"
    for name in ("adapter", "encoder"):
        shutil.copytree(world / name, root / name)
    for name in ("secrets", "planted"):
        (root / name).symlink_to(world / name)
    scene = Scene.at(root)
    renamed(str(scene.encoder))(scene)
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [str(root / "planted"), *sys.path])
    return scene


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


def ready(scene: Scene) -> str:
    """Load the adapter and its encoder; return the message of the refusal, "" if it loads."""

    def load() -> None:
        adapter, _ = load_adapter(scene.adapter)
        adapter.load_reader()

    return refusal(load)


def told(scene: Scene) -> str:
    """Have the command line say what the adapter is."""
    try:
        main(["info", str(scene.adapter)])
    except SystemExit as ended:
        return f"exit code {ended.code}"
    return ""


def refusal(load: Callable[[], object]) -> str:
    try:
        load()
    except TextMetaError as error:
        return str(error)
    return ""


# Tools for damage


class Payload:
    """Imports the planted module when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, (PLANTED,)


PICKLE = pickle.dumps(Payload())
NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


def all_of(*damages: Damage) -> Damage:
    return lambda scene: [damage(scene) for damage in damages]


def put(name: str, content: bytes) -> Damage:
    """Give a listed file of the adapter another content and the right hash."""
    return lambda scene: made.rewrite(scene.adapter, name, content)


def change(name: str, place: str = "", **new: object) -> Damage:
    """Change members of a listed JSON file, at a place such as "learner"."""

    def update(found: dict[str, Any]) -> None:
        for part in place.split(".") if place else ():
            found = found[part]
        found.update(new)

    return lambda scene: made.rewrite_json(scene.adapter, name, update)


meta, classes, config = partial(change, META), partial(change, CLASSES), partial(change, CONFIG)


def tensors(name: str, act: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda scene: made.rewrite_tensors(scene.adapter, name, act)


def raw(path: str, content: bytes) -> Damage:
    """Write a file that no manifest lists, or not with this content."""
    return lambda scene: (scene.root / path).write_bytes(content)


def loose_json(path: str, **new: object) -> Damage:
    """Change a JSON file that no manifest lists."""

    def damage(scene: Scene) -> None:
        file = scene.root / path
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **new}))

    return damage


def replaced(path: str, make: Callable[[Path], object]) -> Damage:
    """Put something that is no plain file into a file's place."""

    def damage(scene: Scene) -> None:
        (scene.root / path).unlink(missing_ok=True)
        make(scene.root / path)

    return damage


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def manifest(edit: Callable[[str], str]) -> Damage:
    def damage(scene: Scene) -> None:
        path = scene.adapter / MANIFEST
        path.write_bytes(edit(path.read_bytes().decode()).encode())

    return damage


def listed(name: str) -> Damage:
    """Add a line to the manifest."""
    return manifest(lambda text: text + f"{'0' * 64}  {name}\n")


def safetensors(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def nested(wrapped: Callable[[object], object]) -> object:
    value: object = 1
    for _ in range(400):
        value = wrapped(value)
    return value


def renamed(model: str) -> Damage:
    """Let the adapter name another encoder."""
    return all_of(meta("encoder", model=model), config(base_model_name_or_path=model))


def own_code(**config: object) -> Damage:
    """Give the encoder code of its own, and have its files name that."""
    return all_of(
        raw("encoder/modeling.py", f"import {PLANTED}\n".encode()),
        loose_json(
            f"encoder/{ENCODER_CONFIG}", auto_map={"AutoModel": "modeling.M", "AutoConfig": "modeling.C"}, **config
        ),
        loose_json(f"encoder/{TOKENIZER_CONFIG}", auto_map={"AutoTokenizer": ["modeling.T", None]}),
    )


# The table: what is done to a folder, and the refusal, which names the file and the reason

NO_JSON, VOCABULARY = "is no JSON: ", "secrets/encoder/vocab.txt"
# fmt: off
ADAPTERS: dict[str, tuple[Damage, str]] = {
    # code
    "pickle beside the files": (raw("adapter/a.pickle", PICKLE), r"a\.pickle is of a kind that can run code"),
    "pickle named as weights": (put(WEIGHTS, PICKLE), f"{WEIGHTS} cannot be read as safetensors"),
    "pickle named as JSON": (put(META, PICKLE), f"{META} {NO_JSON}"),
    "pickle named as manifest": (raw(f"adapter/{MANIFEST}", PICKLE), f"{MANIFEST}, line 1: expected a sha256"),
    "class that PEFT imports": (config(auto_mapping={"base_model_class": "Canary", "parent_library": PLANTED}),
        f"{CONFIG} does not say what follows"),
    "code that is trusted": (meta("encoder", trust_remote_code=True), rf"{META}: encoder\.trust_remote_code"),
    # names, hashes and links
    "file that is none of ours": (all_of(raw("adapter/notes.txt", b""), listed("notes.txt")),
        r"notes\.txt does not belong"),
    "manifest cut": (manifest(lambda text: text[:-1]), "SHA256SUMS, line 6: expected"),
    "link": (replaced(f"adapter/{WEIGHTS}", lambda path: path.symlink_to(f"../secrets/adapter/{WEIGHTS}")),
        rf"{WEIGHTS} is a link out of the folder, to .*secrets"),
    "link to a device": (replaced(f"adapter/{META}", lambda path: path.symlink_to("/dev/zero")),
        f"{META} is a link out of"),
    "loop of links": (replaced(f"adapter/{META}", lambda path: path.symlink_to(path.name)), META),
    "pipe": (replaced(f"adapter/{META}", os.mkfifo), f"{META} is no plain file"),
    # sizes
    "header of 2^63 bytes": (put(WEIGHTS, safetensors({}, length=2**63)), f"{WEIGHTS} cannot be read as safetensors"),
    "header that is nested": (put(HEAD, safetensors(NESTED)), f"{HEAD} cannot be read as safetensors"),
    "1 TB claimed": (
        put(TENSORS, safetensors({"pull": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}})),
        f"{TENSORS} cannot be read as safetensors"),
    "10^5 layers": (meta("learner", layers=list(range(10**5))), rf"{TENSORS}: .* expected \(100000"),
    "steps 10^30": (meta("learner", steps=10**30), rf"{META}: learner: .*steps"),
    "largest sizes": (all_of(meta("learner", steps=50, entry_step_sizes=True),
        tensors(TENSORS, lambda found: found.update(queries=torch.zeros(0, 2**50)))), f"{TENSORS}: "),
    # tensors
    "factor of another shape": (tensors(WEIGHTS, lambda found: found.update({made.LORA_A: torch.zeros(2**40, 0)})),
        rf"{WEIGHTS}: .*{2**40}"),
    # JSON and settings
    "JSON that is nested": (put(META, NESTED), f"{META} {NO_JSON}"),
    "JSON of 5,000 digits": (put(CLASSES, b'{"a": ' + b"9" * 5000 + b"}"), f"{CLASSES} {NO_JSON}"),
    "setting that is nested": (meta("learner", layers=nested(lambda value: [value])), f"{META}"),
    "alpha 10^400": (all_of(meta("lora", alpha=10**400), config(lora_alpha=10**400)), f"{META}: lora.*alpha"),
    "rank of no factor": (all_of(meta("lora", rank=64), config(r=64)), rf"{WEIGHTS}: .* has shape .*64"),
    # labels, support and index
    "label twice": (classes(classes=[1, True]), f"{CLASSES}.*label"),
    "label that is nested": (classes(classes=["a", nested(lambda value: {"tuple": [value]})]), CLASSES),
    "300,000 classes": (classes(classes=list(range(300_000))), f"{HEAD}: .* expected .*300000"),
}
ENCODERS: dict[str, tuple[Damage, str]] = {
    "of its own code": (own_code(model_type="planted"), "encoder'.*trust_remote_code"),
    "weights elsewhere": (
        loose_json(f"encoder/{ENCODER_CONFIG}", transformers_weights=f"../secrets/encoder/{ENCODER_WEIGHTS}"),
        f"{ENCODER_CONFIG}: 'transformers_weights' is"),
    "vocabulary elsewhere": (all_of(lambda scene: (scene.encoder / TOKENIZER).unlink(),
        loose_json(f"encoder/{TOKENIZER_CONFIG}", tokenizer_class="BertTokenizer", vocab=VOCABULARY)), "vocab"),
    "that has a pipe": (replaced(f"encoder/{ENCODER_WEIGHTS}.index.json", os.mkfifo), "no plain file"),
    "of width 10^9": (loose_json(f"encoder/{ENCODER_CONFIG}", hidden_size=10**9), r"encoder\b"),
    "tokenizer that panics": (
        loose_json(f"encoder/{TOKENIZER}", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "encoder'"),
    "tokenizer of other words": (loose_json(f"encoder/{TOKENIZER}", added_tokens=[],
        model={"type": "WordLevel", "vocab": {"[UNK]": 10**6, "[CLS]": 2, "[SEP]": 3}, "unk_token": "[UNK]"}),
        "encoder .* cannot be used: "),
    "name with a null": (renamed("a\x00b"), "encoder 'a"),
}
# fmt: on


@pytest.mark.parametrize("name", [*ADAPTERS, *ENCODERS])
def test_hostile_folder_is_refused_and_harmless(scene: Scene, name: str) -> None:
    damage, message = {**ADAPTERS, **ENCODERS}[name]
    damage(scene)
    with contained(scene):
        found = ready(scene)
    assert found or pytest.fail("it loads")
    assert re.search(message, found, re.DOTALL), found


FORBIDDEN: dict[str, tuple[Callable[[Scene], object], type[BaseException]]] = {
    "pickle": (lambda scene: pickle.loads(PICKLE), AssertionError),  # noqa: S301 - what the watch is for
    "write": (lambda scene: (scene.root / "new").write_text("x"), AssertionError),
    "secrets": (lambda scene: (scene.adapter / ".." / "secrets" / "adapter" / CONFIG).read_text(), AssertionError),
    "process": (lambda scene: os.system("true"), AssertionError),
    "network": (lambda scene: socket.getaddrinfo("localhost", 1), AssertionError),
    "memory": (lambda scene: torch.zeros(MEMORY), RuntimeError),
    "time": (lambda scene: signal.pause(), TimeoutError),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_watch_sees_what_may_not_happen(scene: Scene, name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.05 if name == "time" else SECONDS)
    act, raises = FORBIDDEN[name]
    with pytest.raises(raises), contained(scene):
        act(scene)
    sys.modules.pop(PLANTED, None)
    os.environ.pop(PLANTED.upper(), None)


HARMLESS: dict[str, Damage] = {
    "nothing": lambda scene: None,
    "pickled card": raw(f"adapter/{CARD}", PICKLE),
    "card that is a pipe": replaced(f"adapter/{CARD}", os.mkfifo),
    "card of 1 TiB": replaced(f"adapter/{CARD}", sparse),
    "pickle beside an encoder's weights": raw("encoder/pytorch_model.bin", PICKLE),
    "encoder with code that it does not need": own_code(),
    "record that is none of ours": meta(record={"settings": {"training": 3}, "results": {"x": 3}}),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_nothing_reads_has_no_effect(scene: Scene, name: str) -> None:
    HARMLESS[name](scene)
    for way in (ready, told):
        with contained(scene):
            assert way(scene) == ""


def test_subfolder_that_is_a_link_out_is_not_followed(scene: Scene) -> None:
    (scene.encoder / "sub").symlink_to(scene.secrets / "adapter")
    with contained(scene), pytest.raises(TextMetaError, match="sub"):
        load_adapter(scene.encoder, subfolder="sub")


# At random


NUMBERS = (0, -1, 1, 2, 3, 7, 10**9, 10**30, -(10**30), 10**400, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63)
TEXTS = ("", "x", "../x", "/etc/hostname", "\x00", "\ud800", "\x1b[2J", "a" * 300, "Infinity", "lora", "ridge", "none")
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


@pytest.mark.parametrize("name", [*made.LISTED, *made.FITTED])
def test_file_changed_at_random_is_refused_or_loaded(scene: Scene, name: str) -> None:
    rng, path = random.Random(0), scene.adapter / name
    good, hashes = path.read_bytes(), (scene.adapter / MANIFEST).read_bytes()
    with at_most(MEMORY), in_time(60):
        for _ in range(40):
            as_json = name.endswith(".json")
            content = json.dumps(changed_json(rng, json.loads(good))).encode() if as_json else changed_header(rng, good)
            if content == good:
                continue
            made.rewrite(scene.adapter, name, content)
            message = refusal(lambda: load_adapter(scene.adapter))
            assert not message or re.search(r"\.json|\.safetensors", message), content[:3000]
            path.write_bytes(good)
            (scene.adapter / MANIFEST).write_bytes(hashes)
