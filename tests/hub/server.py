"""A plain Hugging Face Hub on this machine, in memory, for tests that speak to it with the real clients.

Every file is a regular one, with no storage of large files beside the repository: that is the clients' own affair.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import yaml

USER = "tester"
TOKEN = "hf_" + "writes" * 5
READ_TOKEN = "hf_" + "reads" * 6
ROLES = {TOKEN: "write", READ_TOKEN: "read"}  # of the user's tokens
ATTRIBUTES = {".gitattributes": b"*.safetensors -text\n"}
# the Hub's rules for the metadata at the top of a README.md, as far as our cards go
CARD_TEXTS = ("library_name", "pipeline_tag")
CARD_ID = r"(?!.*(?:--|\.\.))(?:[\w-]+/)?[\w.-]+"
CARD_LISTS = {  # of texts that match; the last three may be one text
    "tags": ".*",
    "metrics": ".*",
    "license": "apache-2.0|mit|bsd-3-clause|cc0-1.0|cc-by(-nc)?(-sa|-nd)?-[234].0|(a|l)?gpl-3.0|other|unknown",
    "datasets": CARD_ID,
    "base_model": CARD_ID,
}
RELATIONS = ("adapter", "finetune", "merge", "quantized")


class Request(NamedTuple):
    """What a client sent."""

    method: str
    path: str  # percent-encoded, with the query
    headers: Mapping[str, str]  # names are in lower case
    body: bytes


class Reply(NamedTuple):
    """What the server answers."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


class HubError(Exception):
    """A request that is refused; `code` is what clients tell the kinds of refusals apart by."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, **headers}
        self.reply = Reply(status, json.dumps({"error": message}).encode(), headers)


def as_json(value: Any, status: int = 200) -> Reply:
    body = json.dumps(value, default=str)  # dates of a YAML header are sent as text
    return Reply(status, body.encode(), {"Content-Type": "application/json"})


@dataclass
class Fault:
    """A failure to be played: the first `times` requests that match are affected.

    In a "truncate" the headers agree with the shorter body, in a "cut" the connection ends before all that they
    announced; with a "stale_parent" someone else commits right before the client's commit is applied; after "silence"
    the client waits for an answer until the server ends.
    """

    kind: Literal["status", "cut", "truncate", "stale_parent", "silence"]
    path: str = ""  # regular expression, searched in the decoded path with its query
    method: str | None = None
    status: int = 503
    times: int = 1
    after: int = 0


def etag(data: bytes) -> str:
    """Return what versions of a file are told apart by: the name that git gives it."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@dataclass
class Repo:
    """A repository of models or of data, with its commits and the branches and tags that point to them."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def web_path(self) -> str:
        return f"/{self.id}" if self.kind == "model" else f"/{self.kind}s/{self.id}"

    def find(self, revision: str) -> str:
        """Return the hash of the commit that a client names."""
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def put(self, branch: str, files: dict[str, bytes]) -> str:
        """Put a commit with these files on a branch."""
        state = [len(self.commits), self.refs.get(branch), sorted((path, etag(data)) for path, data in files.items())]
        commit = hashlib.sha1(json.dumps([self.id, *state]).encode()).hexdigest()
        self.commits[commit], self.refs[branch] = files, commit
        return commit


class Handler(BaseHTTPRequestHandler):
    """Reads a request from a connection and sends what the Hub replies."""

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        with contextlib.suppress(ConnectionError):  # a client may leave at any time
            body = self.rfile.read(int(headers.get("content-length", 0)))
            reply, cut = self.server.hub.answer(Request(self.command, self.path, headers, body))
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[:cut])

    do_GET = do_HEAD = do_POST = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class HubServer:
    """The server, to be used in a `with` statement; its methods arrange what is there, without a request."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind and name
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self._errors: list[Exception] = []  # mistakes of the server itself
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> "HubServer":
        self._listener.hub = self
        threading.Thread(target=self._listener.serve_forever, args=(0.005,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._listener.shutdown()
        self._listener.server_close()
        if self._errors:
            raise self._errors[0]

    # what tests arrange

    def add_repo(
        self, repo_id: str, files: Mapping[str, bytes] | None = None, *, repo_type: str = "model", **rights: bool
    ) -> str:
        """Create a repository, maybe private or gated, with these files and the Hub's own; the hash of its commit."""
        self.repos[repo_type, repo_id] = repo = Repo(repo_type, repo_id, **rights)
        repo.put("main", {})
        return self.commit(repo_id, {**ATTRIBUTES, **(files or {})}, repo_type=repo_type)

    def commit(
        self, repo_id: str, files: Mapping[str, bytes], *, repo_type: str = "model", revision: str = "main"
    ) -> str:
        """Commit files to a branch; the hash of the commit."""
        repo = self.repos[repo_type, repo_id]
        return repo.put(revision, {**repo.commits[repo.refs[revision]], **files})

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        repo = self.repos[repo_type, repo_id]
        return dict(repo.commits[repo.find(revision)])

    def tag(self, repo_id: str, name: str, *, repo_type: str = "model") -> None:
        repo = self.repos[repo_type, repo_id]
        repo.refs[name] = repo.refs["main"]

    # every request

    def answer(self, request: Request) -> tuple[Reply, int | None]:
        """Reply to a request; the number is how many bytes of the body to send before the connection is cut."""
        with self._lock:
            self.requests.append(request)
            silent = self._fault(request, "silence") is not None
        if silent:
            self._ending.wait()
            return Reply(503), None
        with self._lock:
            if fault := self._fault(request, "status"):
                return HubError(fault.status, "A failure that the test ordered").reply, None
            try:
                reply = self._handle(request)
            except HubError as error:
                reply = error.reply
            except Exception as error:
                self._errors.append(error)
                reply = Reply(500)
            if request.method == "HEAD" or reply.status >= 300 or not reply.body:
                return reply, None
            fault = self._fault(request, "cut", "truncate")
            if fault is not None and fault.kind == "truncate":
                return reply._replace(body=reply.body[: fault.after]), None
            return reply, fault and fault.after

    def _fault(self, request: Request, *kinds: str) -> Fault | None:
        """Return the fault to be played for a request, which is used up once by this."""
        for fault in self.faults:
            here = fault.kind in kinds and fault.times > 0 and fault.method in (None, request.method)
            if here and re.search(fault.path, unquote(request.path)):
                fault.times -= 1
                return fault
        return None

    def _handle(self, request: Request) -> Reply:
        method, path = request.method.replace("HEAD", "GET"), request.path.partition("?")[0]
        for wanted, pattern, handler in ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                return handler(self, request, **{name: unquote(part or "") for name, part in match.groupdict().items()})
        raise HubError(404, f"Sorry, nothing is at {path}")

    # who may do what

    def _role(self, request: Request) -> str | None:
        authorization = request.headers.get("authorization")
        if authorization is not None and (token := authorization.removeprefix("Bearer ")) not in ROLES:
            raise HubError(401, "Invalid credentials in Authorization header")
        return ROLES[token] if authorization is not None else None

    def _readable(self, request: Request, kind: str, id: str) -> Repo:
        role, repo = self._role(request), self.repos.get((kind or "model", id))
        if repo is None or (repo.private and not (role and id.startswith(f"{USER}/"))):
            # who is not known learns nothing, not even whether it exists
            raise HubError(404 if role else 401, "Repository not found", "RepoNotFound")
        return repo

    def _check_write(self, request: Request, id: str) -> None:
        role = self._role(request)
        if role != "write" or not id.startswith(f"{USER}/"):
            raise HubError(403 if role else 401, f"Forbidden: a write token of the owner of {id} is needed")

    def _writable(self, request: Request, kind: str, id: str) -> Repo:
        repo = self._readable(request, kind, id)
        self._check_write(request, id)
        return repo

    # reading

    def repo_info(self, request: Request, kind: str, id: str, revision: str) -> Reply:
        repo = self._readable(request, kind, id)
        commit = repo.find(revision or "main")
        info = {"id": id, "sha": commit, "private": repo.private, "gated": repo.gated, "tags": []}
        files = repo.commits[commit]
        if "README.md" in files and (card := card_metadata(files["README.md"].decode())):
            info["cardData"] = card
        return as_json({**info, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, request: Request, kind: str, id: str, revision: str, path: str) -> Reply:
        """Files and folders below a folder."""
        repo = self._readable(request, kind, id)
        files = repo.commits[repo.find(revision)]
        folders = {name[: i.start()] for name in files for i in re.finditer("/", name)}
        if path and path not in folders:
            raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        found: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in folders]
        for name, data in files.items():
            found.append({"type": "file", "oid": etag(data), "size": len(data), "path": name})
        inside = [entry for entry in found if not path or entry["path"].startswith(f"{path}/")]
        if "recursive=true" not in request.path:
            inside = [entry for entry in inside if entry["path"].rpartition("/")[0] == path]
        return as_json(inside)

    def resolve(self, request: Request, kind: str, id: str, revision: str, path: str) -> Reply:
        repo = self._readable(request, kind, id)
        if repo.gated and not (self._role(request) and id.startswith(f"{USER}/")):
            raise HubError(403 if self._role(request) else 401, f"Access to {id} is restricted.", "GatedRepo")
        headers = {"X-Repo-Commit": (commit := repo.find(revision))}
        data = repo.commits[commit].get(path)
        if data is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        return content(request, data, {**headers, "ETag": f'"{etag(data)}"'})

    def validate_card(self, request: Request) -> Reply:
        body = json.loads(request.body)
        errors = card_errors(body["content"]) if body["repoType"] == "model" else []
        return as_json({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    # writing

    def create(self, request: Request) -> Reply:
        """Make a repository; where there is one already, the client learns its address."""
        body = json.loads(request.body)
        kind, id = body.get("type", "model"), f"{body.get('organization') or USER}/{body['name']}"
        self._check_write(request, id)
        if not (exists := (kind, id) in self.repos):
            self.add_repo(id, repo_type=kind, private=bool(body.get("private")) or body.get("visibility") == "private")
        return as_json({"url": self.url + self.repos[kind, id].web_path, "name": id}, 409 if exists else 200)

    def create_branch(self, request: Request, kind: str, id: str, name: str) -> Reply:
        """Let a new branch point to the head of main."""
        repo = self._writable(request, kind, id)
        if name in repo.refs:
            raise HubError(409, f"Reference already exists: refs/heads/{name}")
        repo.refs[name] = repo.refs["main"]
        return as_json({})

    def preupload(self, request: Request, kind: str, id: str, revision: str) -> Reply:
        """Tell how each file is to be sent, and what the repository has at its place."""
        repo = self._writable(request, kind, id)
        head, files = repo.commits[repo.find(revision)], []
        for file in json.loads(request.body)["files"]:
            oid = {"oid": etag(head[file["path"]])} if file["path"] in head else {}
            files.append({"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, **oid})
        return as_json({"files": files, "commitOid": repo.refs[revision]})

    def apply(self, request: Request, kind: str, id: str, revision: str) -> Reply:
        """Put a commit on a branch: a header and the operations, one JSON object per line."""
        repo = self._writable(request, kind, id)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if self._fault(request, "stale_parent"):
            self.commit(id, {"intruder.txt": b"someone else was here\n"}, repo_type=kind, revision=revision)
        if header["value"].get("parentCommit") not in (None, repo.refs[revision]):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.refs[revision]])
        for operation in operations:
            value, key = operation["value"], operation["key"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert key == "deletedFile", key
                del files[value["path"]]
        commit = repo.put(revision, files)
        url = f"{self.url}{repo.web_path}/commit/{commit}"
        return as_json({"success": True, "commitOid": commit, "commitUrl": url})


def content(request: Request, data: bytes, headers: Mapping[str, str]) -> Reply:
    """Return the content of a file, or the range of it that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if match is None:
        return Reply(200, data, headers)
    start, end = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
    if start >= end:
        raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


def card_metadata(content: str) -> dict[str, Any] | None:
    """The metadata of a card; None if it has none."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", content, re.DOTALL)
    value = yaml.safe_load(match[1]) if match else None
    return value if isinstance(value, dict) else None


def card_errors(content: str) -> list[str]:
    """What the Hub refuses the card of a model for."""
    try:
        card = card_metadata(content) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    found = [f'"{key}" must be a string' for key in CARD_TEXTS if not isinstance(card.get(key, ""), str)]
    for number, (key, pattern) in enumerate(CARD_LISTS.items()):
        value = card.get(key, [])
        items = [value] if isinstance(value, str) and number > 1 else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            found.append(f'"{key}" must be an array of strings')
        else:
            found += [f'"{key}" cannot be "{i}"' for i in items if not re.fullmatch(pattern, i, re.ASCII)]
    if card.get("base_model_relation", "adapter") not in RELATIONS:
        found.append(f'"base_model_relation" must be one of {RELATIONS}')
    return found


ID = "(?P<id>[^/]+(?:/[^/]+)?)"
REPO = rf"(?P<kind>model|dataset)s/{ID}"  # as the API names a repository
PAGE = rf"(?:(?P<kind>dataset)s/)?{ID}"  # as web pages and files do
AT = "(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Reply]]] = [  # method, all of the encoded path, who answers
    ("POST", "/api/validate-yaml", HubServer.validate_card),
    ("POST", "/api/repos/create", HubServer.create),
    ("GET", f"/api/{REPO}/tree/{AT}(?:/(?P<path>.+))?", HubServer.tree),
    ("GET", f"/api/{REPO}(?:/revision/{AT})?", HubServer.repo_info),
    ("GET", f"/{PAGE}/resolve/{AT}/(?P<path>.+)", HubServer.resolve),
    ("POST", f"/api/{REPO}/branch/(?P<name>[^/]+)", HubServer.create_branch),
    ("POST", f"/api/{REPO}/preupload/{AT}", HubServer.preupload),
    ("POST", f"/api/{REPO}/commit/{AT}", HubServer.apply),
]
