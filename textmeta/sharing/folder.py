"""Folders of an adapter's files: read without running anything in them, and saved whole or not at all.

A manifest, ``SHA256SUMS``, lists every file with the hash of its content. It is what ``sha256sum -c`` reads.
"""

import hashlib
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from textmeta.errors import AdapterError, DamagedAdapterError
from textmeta.files import CHECKPOINT, alone_in, is_folder, read_json, sync_folder, write_synced

FORMAT = 8  # of what is written, and all that is read
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # LoRA, as PEFT has it
META, TENSORS = "textmeta.json", "textmeta.safetensors"  # everything else that was learned
CLASSIFIER, HEAD = "classifier.json", "classifier.safetensors"  # of a fitted classifier
STATES = "support.safetensors"  # token states of what it was fitted on, if they are stored
REQUIRED = frozenset({CONFIG, WEIGHTS, META, TENSORS})
ADAPTER_FILES = REQUIRED | {CLASSIFIER, HEAD, STATES}  # all that a manifest may list
CARD = "README.md"  # not in the manifest, because people edit it
MANIFEST = "SHA256SUMS"
MANIFEST_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)\n")
MAX_BYTES, MAX_TEXT_BYTES = 2**30, 2**26  # of a file of tensors, and of another; a larger one is not read
ONNX = "onnx.json"  # which a classifier as ONNX has
TRIES = 20  # to read a folder while others write it
OTHERS = {  # files of what is often taken for an adapter
    "config_setfit.json": "is a SetFit model and no textmeta adapter. Its head is a pickle, which is never loaded: "
    "give the examples that it was trained on to FewShotClassifier().fit(texts, labels)",
    "config.json": "is an encoder and no textmeta adapter: write FewShotClassifier(encoder={!r})",
}
# What can run code when it is loaded or imported, by somebody if not by textmeta.
CODE_ENDINGS = (
    *(".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".skops", ".dill", ".npy", ".npz", ".h5", ".hdf5"),
    *(".keras", ".msgpack", ".onnx", ".pb", ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat"),
)


def manifest_of(files: Mapping[str, bytes]) -> bytes:
    """Return the manifest of files (name to content), in the format of ``sha256sum``."""
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    return "".join(lines).encode()


def is_there(folder: str | Path) -> bool:
    """Whether there is a folder of this name, or one that a killed save set aside."""
    return is_folder(folder) or (folder != "" and is_folder(_sibling(Path(folder).absolute(), "old")))


def read_adapter_files(folder: Path, repo_id: str | None = None) -> dict[str, bytes]:
    """Read the files of an adapter folder, checked against their hashes: name to content.

    AdapterError if it was made by another version of textmeta, is damaged, or is no adapter; it names the repository
    on the Hub that the folder is a copy of, if any.
    """
    try:
        found = read_json(read_file(folder, META), folder / META, AdapterError).get("format_version")
    except AdapterError:
        found = FORMAT  # whatever is wrong will be found, and named, in its turn
    # first of all: that another version has other files, too, would else be called damage
    if type(found) is not int or found != FORMAT:
        maker = "a newer textmeta" if type(found) is int and found > FORMAT else "textmeta 0.1: train it again"
        told = f"format version {found!r:.40}, this textmeta reads {FORMAT}: the adapter was made by {maker}"
        raise AdapterError(f"{folder / META} has {told}")
    files = read_folder(folder, ADAPTER_FILES, repo_id)
    required = ADAPTER_FILES - {STATES} if files.keys() - REQUIRED else REQUIRED
    for name in sorted(required - files.keys()):
        raise AdapterError(f"{folder} is no whole textmeta adapter: it has no {name}")
    return files


def read_folder(folder: Path, known: Collection[str] | None = None, repo_id: str | None = None) -> dict[str, bytes]:
    """Read every file that a folder's manifest lists, name to content, checked against its hash; nothing is written.

    A folder in the Hub's cache may hold links to the cache's own files. AdapterError if anything is missing or not what
    was written, leads elsewhere out of the folder, can run code, or is not among the known names, if these are given.
    """
    folder = folder.resolve()
    for _ in range(TRIES):
        source = folder if folder.is_dir() else _sibling(folder, "old")
        before = _identity(source)
        if before is None and repo_id is None and not folder.is_dir():
            raise AdapterError(f"no such adapter folder: {folder}")
        try:
            return _read_checked(source, known, repo_id)
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


def _read_checked(folder: Path, known: Collection[str] | None, repo_id: str | None) -> dict[str, bytes]:
    present = sorted(path.name for path in folder.glob("*"))  # none, where the Hub has no file that was asked for
    if ONNX in present and ONNX not in (known or ()):
        how = f"FewShotClassifier.from_pretrained({str(folder)!r}, backend='onnx')"
        raise AdapterError(f"{folder} is a classifier as ONNX and no adapter: write {how}")
    if MANIFEST not in present:
        hint = "one in a folder below it is loaded with subfolder=…"
        if CHECKPOINT in present:
            hint = "it is a run's: `FewShotClassifier(adapter).save_pretrained` keeps the adapter that train returns"
        told = f"is no textmeta adapter: it has no {MANIFEST}, but {present[:10]}; {hint}"
        told = next((other.format(repo_id or str(folder)) for name, other in OTHERS.items() if name in present), told)
        raise AdapterError(f"{folder if repo_id is None else f'{repo_id!r} on the Hub'} {told}")
    _check_no_code(folder, set(present).difference(known or ()))
    contents = {}
    for name, expected in _manifest(read_file(folder, MANIFEST), folder / MANIFEST).items():
        if known is not None and name not in known:
            raise AdapterError(f"{folder / name} does not belong to an adapter, but its {MANIFEST} lists it")
        contents[name] = read_file(folder, name)
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != expected:
            told = f"is damaged: its sha256 is {found}, but {MANIFEST} says {expected} ({len(contents[name])} bytes)"
            raise DamagedAdapterError(f"{folder / name} {told}")
    return contents


def _check_no_code(folder: Path, names: Iterable[str]) -> None:
    code = sorted(name for name in names if Path(name).suffix.lower() in CODE_ENDINGS)
    if code:
        told = "has no place in an adapter, which is safetensors and JSON alone: remove it if you know what it is"
        raise AdapterError(f"{folder / code[0]} is of a kind that can run code when it is loaded, and {told}")


def _manifest(content: bytes, path: Path) -> dict[str, str]:
    """Return name to sha256; the manifest must be, to the byte, what textmeta writes."""
    entries: dict[str, str] = {}
    lines = content.decode("ascii", errors="backslashreplace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        match = MANIFEST_LINE.fullmatch(line)
        if match is None or match[2] in entries:
            told = f"expected a sha256, two spaces and a plain file name not given before: {line!r:.90}"
            raise DamagedAdapterError(f"{path}, line {number}: {told}")
        entries[match[2]] = match[1]
    return entries


def read_file(folder: Path, name: str) -> bytes:
    """Read a plain file of a folder, following no link out of it but those of the Hub's cache to its own files."""
    path = folder / name
    try:
        target = path.resolve(strict=True)
        status = target.stat()
        if target.parent not in _allowed_parents(folder.resolve(), target):
            raise AdapterError(f"{path} is a link out of the folder, to {target}; it is not followed")
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{path} is no plain file")
        limit = MAX_BYTES if name.endswith((".safetensors", ".onnx")) else MAX_TEXT_BYTES
        if status.st_size > limit:
            raise AdapterError(f"{path} has {status.st_size} bytes, expected at most {limit}")
        return target.read_bytes()
    except FileNotFoundError as error:
        raise DamagedAdapterError(f"{folder} lacks the file {name}") from error
    except (OSError, RuntimeError) as error:  # the latter for links that go round
        raise AdapterError(f"cannot read {path}: {error}") from error


def _allowed_parents(source: Path, target: Path) -> Iterator[Path]:
    """Yield the folders in which a file may really lie: its own, or those where the Hub's cache keeps contents."""
    yield source
    for snapshots in source.parents:
        repo = snapshots.parent
        if snapshots.name == "snapshots" and repo.name.startswith("models--"):
            yield repo / "blobs"
            shared = repo.parent / "blobs"  # files of several repositories, in folders of two letters
            if target.parent.parent == shared:
                yield target.parent


def write_folder(folder: Path, files: Mapping[str, bytes], unlisted: frozenset[str] = frozenset()) -> None:
    """Write files into a folder, in place of those of its old manifest, so that a crash leaves the old or the new.

    The new folder is written and synced beside the old one, the old one set aside, the new one renamed into place. What
    a crash between the renames set aside, :func:`read_folder` reads where it lies. Other files in the folder are
    carried over. Saves at once wait for one another. The manifest leaves out ``unlisted`` names, because people may
    edit these files. AdapterError as :func:`check_destination`; or if something cannot be carried over, or the disk is
    full or refuses.
    """
    folder = folder.resolve()
    manifest = manifest_of({name: content for name, content in files.items() if name not in unlisted})
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(folder.parent):
            _check_replaceable(folder, files)
            _replace(folder, files, manifest)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _replace(folder: Path, files: Mapping[str, bytes], manifest: bytes) -> None:
    """Write files in place of a folder's; whatever stops it leaves the old folder in its place, and no litter."""
    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    try:
        for litter in (new, old):
            shutil.rmtree(litter, ignore_errors=True)
        carried = _carried_over(folder, files)
        new.mkdir()
        for name, content in {**files, MANIFEST: manifest}.items():
            write_synced(new / name, content)
        for path in carried:
            shutil.copy2(path, new / path.name)
        sync_folder(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        _put_back(folder)
        raise


def check_destination(folder: Path, known: Collection[str] = ()) -> None:
    """Check, before long work, that a folder can be replaced as a whole; put back what a crash set aside.

    AdapterError if it is a file, the working folder (or holds it), a mount point, or holds other folders or what can
    run code; files of the known names may be of any kind.
    """
    folder = folder.resolve()
    if is_folder(folder.parent):
        try:
            with alone_in(folder.parent):
                _check_replaceable(folder, known)
        except OSError as error:
            raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> AdapterError:
    what = f"{error.filename or _sibling(folder, 'new')}: {error.strerror or error}"
    return AdapterError(f"cannot write the adapter {folder}: {what}")


def _check_replaceable(folder: Path, known: Collection[str]) -> None:
    """Do what :func:`check_destination` says, while no other save is under way: one moves the folder away."""
    _put_back(folder)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"cannot write an adapter folder to {folder}: there is a file of that name")
    if Path.cwd().is_relative_to(folder) or folder.is_mount():
        told = "which is the working folder or a mount point: it is replaced as a whole; give a folder inside it"
        raise AdapterError(f"cannot write an adapter to {folder}, {told}")
    if folder.exists():
        _check_no_code(folder, {path.name for path in folder.iterdir()}.difference(known))
        if folders := sorted(path.name for path in folder.iterdir() if path.is_dir()):
            told = f"it holds other folders ({', '.join(folders[:5])}); give a folder of its own"
            raise AdapterError(f"cannot write an adapter to {folder}: {told}")


def _carried_over(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Return what an existing folder holds beside an adapter's files."""
    if not folder.exists():
        return []
    replaced = {*files, MANIFEST}
    if (folder / MANIFEST).is_file():
        lines = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines()
        listed = {line.partition("  ")[2] for line in lines}
        present = {name for name in listed if name and (folder / name).is_file()}
        if present and not present & files.keys():
            raise AdapterError(f"cannot write an adapter to {folder}: it holds another {MANIFEST}, which would be lost")
        replaced |= listed
    return [path for path in folder.iterdir() if path.name not in replaced]


def _put_back(folder: Path) -> None:
    old = _sibling(folder, "old")
    if is_folder(old) and not folder.exists():
        old.rename(folder)


def _sibling(folder: Path, kind: str) -> Path:
    """Return where a save keeps the "new" folder, and sets the "old" one aside."""
    return folder.with_name(f".{folder.name}.textmeta-{kind}")
