"""Folders with a manifest of their files' hashes, and reading them: nothing but what was written, and no code."""

import hashlib
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from textmeta.errors import AdapterError, DamagedAdapterError
from textmeta.files import is_folder

__all__ = [
    "MANIFEST",
    "check_no_code",
    "is_there",
    "manifest_of",
    "read_file",
    "read_folder",
    "seems_to_be",
    "sibling",
]

MANIFEST = "SHA256SUMS"
MANIFEST_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")
MAX_BYTES, MAX_TEXT_BYTES = 2**30, 2**26  # of a file of tensors, and of another: what is larger is not read
TRIES = 20  # to read a folder while others write it
# What can run code when it is loaded or imported, by somebody if not by textmeta.
CODE_ENDINGS = (
    *(".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".skops", ".dill", ".npy", ".npz", ".h5", ".hdf5"),
    *(".keras", ".msgpack", ".onnx", ".pb", ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat"),
)

# What a folder without a manifest may be; the first that has one of these files.
KINDS = {
    "a SetFit model": ("config_setfit.json", "model_head.pkl"),
    "a plain PEFT adapter, which can be the start of a meta-training": ("adapter_config.json",),
    "a sentence-transformers model": ("modules.json", "config_sentence_transformers.json"),
    "a transformers model": ("config.json",),
}


def manifest_of(files: Mapping[str, bytes]) -> bytes:
    """Return the manifest of files, in the format of ``sha256sum``."""
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    return "".join(lines).encode()


def is_there(folder: str | Path) -> bool:
    """Whether there is a folder of this name, or one that a killed save set aside."""
    return is_folder(folder) or (folder != "" and is_folder(sibling(Path(folder).absolute(), "old")))


def read_folder(folder: Path, known: Collection[str] | None = None) -> dict[str, bytes]:
    """Read every file that a folder's manifest lists, and check it against its hash; nothing is written.

    A folder in the Hub's cache may hold links to the cache's blobs; any other link out of the folder is refused.

    Args:
        folder: to read.
        known: names that the manifest may list; by default any.

    Raises:
        AdapterError: if the folder, its manifest or a listed file is missing, a file is not what was written, leads out
            of the folder, or is of a kind that can run code.
    """
    folder = folder.resolve()
    for _ in range(TRIES):
        source = folder if folder.is_dir() else sibling(folder, "old")
        before = _identity(source)
        if before is None and not folder.is_dir():
            raise AdapterError(f"no such adapter folder: {folder}")
        try:
            return _read_checked(source, folder, known)
        except (AdapterError, FileNotFoundError):
            # a save may have put another folder into its place between two of our reads
            if _identity(source) == before:
                raise
    raise AdapterError(f"{folder} was being written during each of {TRIES} tries to read it")


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def _read_checked(source: Path, folder: Path, known: Collection[str] | None) -> dict[str, bytes]:
    """Read ``source``, which stands for ``folder``."""
    present = sorted(path.name for path in source.iterdir())
    check_no_code(folder, present)
    if MANIFEST not in present:
        raise AdapterError(f"{folder} is no textmeta adapter: it has no {MANIFEST}; it {seems_to_be(present)}")
    manifest, contents = _manifest(read_file(source, MANIFEST, stands_for=folder), folder), {}
    for name in manifest:
        if known is not None and name not in known:
            raise AdapterError(f"{folder / name} does not belong to an adapter, but its {MANIFEST} lists it")
    for name, expected in manifest.items():
        contents[name] = read_file(source, name, stands_for=folder)
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != expected:
            raise DamagedAdapterError(
                f"{folder / name} is damaged: its sha256 is {found}, but {MANIFEST} says {expected} "
                f"({len(contents[name])} bytes)"
            )
    return contents


def check_no_code(folder: Path, names: Iterable[str]) -> None:
    """Check that none of these files can run code.

    Raises:
        AdapterError: naming one that can.
    """
    code = [name for name in names if Path(name).suffix.lower() in CODE_ENDINGS]
    if code:
        raise AdapterError(
            f"{folder / code[0]} is of a kind that can run code when it is loaded, and has no place in an adapter, "
            "which is safetensors and JSON alone: remove it if you know what it is"
        )


def seems_to_be(names: Collection[str]) -> str:
    """Say what a folder or repository that is no textmeta adapter looks like, by the names of its files."""
    for kind, marks in KINDS.items():
        if any(name in marks for name in names):
            return f"seems to be {kind}"
    return f"holds {', '.join(sorted(names)[:10]) or 'nothing'}"


def _manifest(content: bytes, folder: Path) -> dict[str, str]:
    """Return name to sha256; the manifest must be, to the byte, what textmeta writes."""
    text = content.decode("ascii", errors="backslashreplace")
    entries: dict[str, str] = {}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        match = MANIFEST_LINE.fullmatch(line)
        if match is None or match[2] in entries:
            raise AdapterError(
                f"{folder / MANIFEST}, line {number}: expected a sha256, two spaces and a plain file name not given "
                f"before: {line!r:.90}"
            )
        entries[match[2]] = match[1]
    if not text.endswith("\n"):
        raise DamagedAdapterError(f"{folder / MANIFEST} is cut off: it does not end with a line")
    return entries


def read_file(folder: Path, name: str, *, stands_for: Path | None = None) -> bytes:
    """Read a plain file of a folder, following no link out of it but those of the Hub's cache to its blobs.

    Args:
        folder: that holds it.
        name: of the file.
        stands_for: the folder to name in errors.

    Raises:
        AdapterError: if it is missing, no plain file, too large, or lies elsewhere.
    """
    path, shown = folder / name, stands_for or folder
    try:
        target = path.resolve(strict=True)
        status = target.stat()
        if target.parent not in _allowed_parents(folder.resolve(), target):
            raise AdapterError(f"{shown / name} is a link out of the folder, to {target}; it is not followed")
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{shown / name} is no plain file")
        limit = MAX_BYTES if name.endswith(".safetensors") else MAX_TEXT_BYTES
        if status.st_size > limit:
            raise AdapterError(f"{shown / name} has {status.st_size} bytes, expected at most {limit}")
        return target.read_bytes()
    except FileNotFoundError as error:
        raise DamagedAdapterError(f"{shown} lacks the file {name}") from error
    except (OSError, RuntimeError) as error:  # the latter for links that go round
        raise AdapterError(f"cannot read {shown / name}: {error}") from error


def _allowed_parents(source: Path, target: Path) -> Iterator[Path]:
    """Yield the folders in which a file may really lie: its own, or the blobs of the Hub's cache."""
    yield source
    for snapshots in source.parents:
        repo = snapshots.parent
        if snapshots.name == "snapshots" and repo.name.startswith("models--"):
            yield repo / "blobs"
            shared = repo.parent / "blobs"  # files of several repositories, in folders of two letters
            if target.parent.parent == shared:
                yield target.parent


def sibling(folder: Path, kind: str) -> Path:
    """Return where a save keeps the "new" folder, and sets the "old" one aside."""
    return folder.with_name(f".{folder.name}.textmeta-{kind}")
