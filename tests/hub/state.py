"""The state of the local Hub, who may see and change it, and how tests arrange it."""

import re
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode

from tests.hub.store import ATTRIBUTES, INITIAL, Blobs, Commit, File, Repo, wants_large
from tests.hub.wire import Fault, HubError, Reply, Request

USER = "tester"
TOKEN = "hf_" + "writes" * 5
READ_TOKEN = "hf_" + "reads" * 6
TOKENS = {TOKEN: "write", READ_TOKEN: "read"}  # of the user, with what they may be used for

REPO = r"(?P<kind>model|dataset)s/(?P<id>[^/]+(?:/[^/]+)?)"  # as the API names a repository
PAGE = r"(?:(?P<kind>dataset)s/)?(?P<id>[^/]+(?:/[^/]+)?)"  # as web pages and files do

Handler = Callable[..., Reply]  # called with the server, the request and the groups of the route's expression, decoded


class Route(NamedTuple):
    """Who answers a request: the method, an expression for all of the encoded path, and the handler."""

    method: str
    path: str
    handler: Handler


def check_repo_id(repo_id: str) -> None:
    """Refuse what is not a name of a repository."""
    namespace, _, name = repo_id.rpartition("/")
    for part in [namespace, name] if namespace else [name]:
        if not re.fullmatch(r"\w(?:[\w.-]{0,94}\w)?", part, re.ASCII) or "--" in part or ".." in part:
            raise HubError(400, f"Invalid repository name: {repo_id}")
    if name.endswith((".git", ".ipynb")):
        raise HubError(400, f"Invalid repository name: {repo_id}")


class Hub:
    """Repositories and large files; what tests arrange is set up by its methods, without a request."""

    def __init__(self, url: str, storage_url: str) -> None:
        self.url = url
        self.storage_url = storage_url
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind and name
        self.blobs = Blobs()
        self.uploads: dict[str, dict[int, bytes]] = {}  # parts that arrived, by the name of the upload
        self.faults: list[Fault] = []
        self.page_size = 1000
        self.multipart_over = 64 << 20
        self.part_size = 16 << 20
        self.lock = threading.RLock()
        self._signature = secrets.token_hex(8)

    # what tests arrange

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Create a repository with these files beside the Hub's own .gitattributes; the hash of its last commit."""
        check_repo_id(repo_id)
        with self.lock:
            repo = Repo(repo_type, repo_id, private, gated)
            self.repos[repo_type, repo_id] = repo
            repo.commit("main", {path: self.store(path, data) for path, data in INITIAL.items()}, "initial commit")
            if files:
                self.commit(repo_id, files, repo_type=repo_type)
            return repo.branches["main"]

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        *,
        repo_type: str = "model",
        revision: str = "main",
        title: str = "Commit",
    ) -> str:
        """Commit files to a branch, where None deletes one; the hash of the commit."""
        with self.lock:
            repo = self.repos[repo_type, repo_id]
            head = repo.commits[repo.branches[revision]]
            kept = {path: file for path, file in head.files.items() if path not in files}
            new = {path: self.store(path, data, head) for path, data in files.items() if data is not None}
            return repo.commit(revision, {**kept, **new}, title).id

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """All files of a revision, with the Hub's own .gitattributes."""
        with self.lock:
            commit = self.repos[repo_type, repo_id].find(revision)
            assert commit is not None, f"no revision {revision} in {repo_id}"
            return {path: self.blobs[file.sha256] for path, file in commit.files.items()}

    def branch(self, repo_id: str, name: str, revision: str = "main", *, repo_type: str = "model") -> None:
        """Let a branch point to a revision."""
        self._point(repo_id, repo_type, revision, lambda repo, commit: repo.branches.update({name: commit.id}))

    def tag(self, repo_id: str, name: str, revision: str = "main", *, repo_type: str = "model") -> None:
        """Let a tag point to a revision."""
        self._point(repo_id, repo_type, revision, lambda repo, commit: repo.tags.update({name: commit.id}))

    def _point(self, repo_id: str, repo_type: str, revision: str, act: Callable[[Repo, Commit], None]) -> None:
        with self.lock:
            repo = self.repos[repo_type, repo_id]
            commit = repo.find(revision)
            assert commit is not None, f"no revision {revision} in {repo_id}"
            act(repo, commit)

    # what handlers share

    def store(self, path: str, data: bytes, head: Commit | None = None) -> File:
        """Keep a content and describe the file, whose kind the attributes in a commit determine."""
        attributes = head.files.get(ATTRIBUTES) if head is not None else None
        sha256 = self.blobs.put(data)
        if data and wants_large(path, len(data), data[:512], self.blobs[attributes.sha256] if attributes else b""):
            return File.large(sha256, len(data))
        return File.regular(sha256, data)

    def role(self, request: Request) -> str | None:
        """What the token of a request allows; None for a request without a token."""
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        role = TOKENS.get(authorization.removeprefix("Bearer "))
        if role is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return role

    def readable(self, request: Request, kind: str | None, repo_id: str) -> Repo:
        """The repository, if the sender may know of it."""
        role = self.role(request)
        repo = self.repos.get((kind or "model", repo_id))
        if repo is not None and not (repo.private and (role is None or repo.namespace != USER)):
            return repo
        if role is None:  # who is not known learns nothing, not even whether it exists
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def downloadable(self, request: Request, kind: str | None, repo_id: str) -> Repo:
        """The repository, if the sender may have its files."""
        repo = self.readable(request, kind, repo_id)
        if repo.gated and self.role(request) is None:
            raise HubError(401, f"Access to {repo.kind} {repo.id} is restricted. Please log in.", "GatedRepo")
        if repo.gated and repo.namespace != USER:
            raise HubError(403, f"Access to {repo.kind} {repo.id} is restricted to an authorized list.", "GatedRepo")
        return repo

    def writable(self, request: Request, kind: str | None, repo_id: str) -> Repo:
        """The repository, if the sender may change it."""
        repo = self.readable(request, kind, repo_id)
        self.check_write(request, repo.namespace)
        return repo

    def check_write(self, request: Request, namespace: str) -> None:
        """Refuse those who may not write in a namespace."""
        role = self.role(request)
        if role is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if namespace != USER:
            raise HubError(403, f'You have no rights to write under the namespace "{namespace}"')

    def revision(self, repo: Repo, revision: str) -> Commit:
        """The commit that a client names."""
        commit = repo.find(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def storage_link(self, sha256: str, **parameters: Any) -> str:
        """A signed address in the storage of large files."""
        return f"{self.storage_url}/storage/{sha256}?{urlencode({**parameters, 'signature': self._signature})}"

    def check_storage(self, request: Request) -> None:
        """Refuse addresses that were made up, and clients that give their token away."""
        if request.parameter("signature") != self._signature:
            raise HubError(403, "The signature of the address is wrong")
        if "authorization" in request.headers:
            raise HubError(400, "The address is signed: no Authorization header is allowed")

    def take_fault(self, request: Request, *kinds: str) -> Fault | None:
        """The fault to be played for a request, which is used up once by this."""
        for fault in self.faults:
            if fault.kind in kinds and fault.matches(request):
                fault.times -= 1
                return fault
        return None
