"""What the local Hub keeps: contents, and repositories with immutable commits, hashed as git does."""

import fnmatch
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

START = datetime(2024, 1, 1, tzinfo=UTC)  # commits are one second apart, so that hashes are the same each time
REGULAR_LIMIT = 10_000_000  # bytes above which a file must go to the large file storage
ATTRIBUTES = ".gitattributes"
LARGE_PATTERNS = ("*.arrow", "*.bin", "*.gz", "*.npy", "*.npz", "*.parquet", "*.pt", "*.safetensors", "*.zip")
INITIAL = {ATTRIBUTES: "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LARGE_PATTERNS).encode()}


class StoreError(Exception):
    """Something that cannot be stored."""


def git_hash(kind: str, data: bytes) -> str:
    """The name that git gives an object."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file are not text."""
    if b"\0" in sample:
        return True
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.end < len(sample)  # an error at the very end: the sample cuts a character
    return False


class Blobs:
    """Contents by their SHA-256."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}
        self.xet_hashes: dict[str, str] = {}  # by SHA-256, of those contents that Xet storage holds as well

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._contents

    def __getitem__(self, sha256: str) -> bytes:
        return self._contents[sha256]

    def put(self, data: bytes, *, sha256: str | None = None, size: int | None = None, xet: str | None = None) -> str:
        """Keep a content; it must be what `sha256` and `size` say, where given."""
        actual = hashlib.sha256(data).hexdigest()
        if size not in (None, len(data)):
            raise StoreError(f"{len(data)} bytes were sent where {size} were announced")
        if sha256 not in (None, actual):
            raise StoreError(f"the content has the SHA-256 {actual}, not {sha256}")
        self._contents[actual] = data
        if xet is not None:
            self.xet_hashes[actual] = xet
        return actual


class File(NamedTuple):
    """A file in a commit; its content is in the blobs."""

    sha256: str
    size: int
    oid: str  # what git calls it: for a large file, that is the name of a pointer
    pointer: int | None  # size of the pointer of a large file

    @property
    def etag(self) -> str:
        """What the Hub tells versions of the file apart by."""
        return self.oid if self.pointer is None else self.sha256

    @classmethod
    def regular(cls, sha256: str, data: bytes) -> "File":
        """A file that git itself holds."""
        return cls(sha256, len(data), git_hash("blob", data), None)

    @classmethod
    def large(cls, sha256: str, size: int) -> "File":
        """A file that git holds a pointer to."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(sha256, size, git_hash("blob", pointer), len(pointer))


def tree_hashes(files: Mapping[str, File]) -> dict[str, str]:
    """Names that git gives the folders of a commit; the root's path is empty."""
    children: dict[str, dict[str, str]] = {"": {}}  # of each folder: name and the hash of each file
    for path, file in files.items():
        parts = path.split("/")
        for depth in range(len(parts) - 1):
            children.setdefault("/".join(parts[: depth + 1]), {})
        children["/".join(parts[:-1])][parts[-1]] = file.oid
    hashes: dict[str, str] = {}
    for folder in sorted(children, key=lambda path: path.count("/") + bool(path), reverse=True):  # deepest first
        below = {path.rpartition("/")[2]: oid for path, oid in hashes.items() if path.rpartition("/")[0] == folder}
        entries = [(name, "100644", oid) for name, oid in children[folder].items()]
        entries += [(f"{name}/", "40000", oid) for name, oid in below.items()]  # git sorts a folder as if it ended so
        data = b"".join(
            f"{mode} {name.rstrip('/')}\0".encode() + bytes.fromhex(oid) for name, mode, oid in sorted(entries)
        )
        hashes[folder] = git_hash("tree", data)
    return hashes


@dataclass(frozen=True)
class Commit:
    """A state of all files, and what came before it."""

    id: str
    parent: str | None
    files: Mapping[str, File]
    folders: Mapping[str, str]  # path to hash
    title: str
    message: str
    author: str
    date: datetime

    @property
    def timestamp(self) -> str:
        """The date as the API writes it."""
        return f"{self.date:%Y-%m-%dT%H:%M:%S.000Z}"


@dataclass
class Repo:
    """A repository of models or of data."""

    kind: str  # "model" or "dataset"
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """Whose repository it is."""
        return self.id.rpartition("/")[0]

    @property
    def web_path(self) -> str:
        """Path of its page."""
        return f"/{self.id}" if self.kind == "model" else f"/{self.kind}s/{self.id}"

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag or a hash, which may be abbreviated to seven digits."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        known = self.branches.get(name) or self.tags.get(name)
        if known is not None:
            return self.commits[known]
        found = [commit for id, commit in self.commits.items() if len(revision) >= 7 and id.startswith(revision)]
        return found[0] if len(found) == 1 else None

    def history(self, commit: Commit) -> Iterator[Commit]:
        """A commit and those before it."""
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave a file or folder the state that it has in a commit."""

        def state(commit: Commit) -> str | None:
            file = commit.files.get(path)
            return commit.folders.get(path) if file is None else file.oid

        history = list(self.history(commit))
        for newer, older in itertools.pairwise(history):
            if state(newer) != state(older):
                return newer
        return history[-1]

    def commit(
        self, branch: str, files: Mapping[str, File], title: str, message: str = "", author: str = "system"
    ) -> Commit:
        """Put a commit with these files on a branch, which is created if this is the first commit of all."""
        for path in files:
            if any(path.startswith(f"{other}/") for other in files):
                raise StoreError(f"{path} lies below a file")
        parent = self.branches.get(branch)
        folders = tree_hashes(files)
        date = START + timedelta(seconds=len(self.commits))
        who = f"{author} <{author}@localhost> {int(date.timestamp())} +0000"
        lines = [f"tree {folders['']}", *([f"parent {parent}"] if parent else []), f"author {who}", f"committer {who}"]
        id = git_hash("commit", ("\n".join(lines) + f"\n\n{title}\n\n{message}").encode())
        commit = Commit(id, parent, dict(files), folders, title, message, author, date)
        self.commits[id] = commit
        self.branches[branch] = id
        return commit


def wants_large(path: str, size: int, sample: bytes, attributes: bytes) -> bool:
    """Whether a file goes to the large file storage: by its name, its size or because it is not text."""
    for line in attributes.decode().splitlines():
        pattern, *rules = line.split() or [""]
        if "filter=lfs" in rules and fnmatch.fnmatch(path.rpartition("/")[2], pattern):
            return True
    return size > REGULAR_LIMIT or is_binary(sample)
