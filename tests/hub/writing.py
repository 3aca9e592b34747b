"""Requests that write: creating repositories and branches, uploads and commits."""

import base64
import binascii
import hashlib
import json
import secrets
from typing import Any

from tests.hub import cards
from tests.hub.state import PAGE, REPO, USER, Hub, Route, check_repo_id
from tests.hub.store import ATTRIBUTES, REGULAR_LIMIT, Commit, File, Repo, wants_large
from tests.hub.wire import HubError, Reply, Request


def create(hub: Hub, request: Request) -> Reply:
    """A new repository; where there is one already, the client learns its address."""
    body = request.json()
    namespace, kind = body.get("organization") or USER, body.get("type", "model")
    hub.check_write(request, namespace)
    repo_id = f"{namespace}/{body['name']}"
    check_repo_id(repo_id)
    if kind not in ("model", "dataset"):
        raise HubError(400, f"Repositories of type {kind} are not supported here")
    exists = (kind, repo_id) in hub.repos
    if not exists:
        hub.add_repo(repo_id, repo_type=kind, private=bool(body.get("private")) or body.get("visibility") == "private")
    answer = {"url": hub.url + hub.repos[kind, repo_id].web_path, "name": repo_id}
    if exists:
        return Reply.json({**answer, "error": f"You already created this {kind} repo"}, 409)
    return Reply.json(answer)


def check_ref(name: str) -> None:
    """Refuse names that no branch or tag may have."""
    if (
        not name
        or name.startswith(("refs/", "/", "-"))
        or ".." in name
        or any(c.isspace() or c in "~^:?*[\\" for c in name)
    ):
        raise HubError(400, f"Invalid reference name: {name}")


def create_branch(hub: Hub, request: Request, kind: str, id: str, name: str) -> Reply:
    """A new branch, from the head of main if nothing else is said."""
    repo = hub.writable(request, kind, id)
    check_ref(name)
    if name in repo.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{name}")
    start = (request.json() if request.body else {}).get("startingPoint") or "main"
    repo.branches[name] = hub.revision(repo, start).id
    return Reply.json({})


def delete_branch(hub: Hub, request: Request, kind: str, id: str, name: str) -> Reply:
    """Remove a branch."""
    repo = hub.writable(request, kind, id)
    if name == "main":
        raise HubError(403, "The main branch cannot be deleted")
    if name not in repo.branches:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del repo.branches[name]
    return Reply.json({})


def create_tag(hub: Hub, request: Request, kind: str, id: str, name: str) -> Reply:
    """A new tag of the revision that the path names."""
    repo = hub.writable(request, kind, id)
    commit, tag = hub.revision(repo, name), request.json()["tag"]
    check_ref(tag)
    if tag in repo.tags:
        raise HubError(409, f"Reference already exists: refs/tags/{tag}")
    repo.tags[tag] = commit.id
    return Reply.json({})


def delete_tag(hub: Hub, request: Request, kind: str, id: str, name: str) -> Reply:
    """Remove a tag."""
    repo = hub.writable(request, kind, id)
    if repo.tags.pop(name, None) is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Reply.json({})


def branch_head(hub: Hub, repo: Repo, revision: str) -> Commit:
    """The commit that a branch points to; commits and tags do not move, so nothing can be put on them."""
    if revision not in repo.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return hub.revision(repo, revision)


def decoded(text: str) -> bytes:
    """Bytes from base64."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise HubError(400, f"Invalid base64: {error}") from error


def preupload(hub: Hub, request: Request, kind: str, id: str, revision: str) -> Reply:
    """How each file is to be sent, and what the repository has at its place."""
    repo = hub.writable(request, kind, id)
    head = branch_head(hub, repo, revision)
    attributes = hub.blobs[head.files[ATTRIBUTES].sha256] if ATTRIBUTES in head.files else b""
    files = []
    for file in request.json()["files"]:
        large = wants_large(file["path"], file["size"], decoded(file["sample"]), attributes)
        mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if file["path"] in head.files:
            mode["oid"] = head.files[file["path"]].etag
        files.append(mode)
    return Reply.json({"files": files, "commitOid": head.id})


def upload_actions(hub: Hub, repo: Repo, sha256: str, size: int) -> dict[str, Any]:
    """Where to send a large file: in one piece, or in parts that are then put together."""
    verify = {"href": f"{hub.url}{repo.web_path}.git/info/lfs/objects/verify"}
    if size <= hub.multipart_over:
        return {"upload": {"href": hub.storage_link(sha256, size=size)}, "verify": verify}
    upload = secrets.token_hex(8)
    hub.uploads[upload] = {}
    parts = range(1, -(-size // hub.part_size) + 1)
    header = {str(part): hub.storage_link(sha256, upload=upload, part=part) for part in parts}
    href = f"{hub.url}/api/complete-upload/{upload}"
    return {"upload": {"href": href, "header": {"chunk_size": str(hub.part_size), **header}}, "verify": verify}


def batch(hub: Hub, request: Request, kind: str | None, id: str) -> Reply:
    """What is to be done for each large file: nothing for those that are there."""
    repo = hub.writable(request, kind, id)
    body = request.json()
    if body.get("operation") != "upload":
        raise HubError(400, "Only uploads are supported here")
    objects = []
    for item in body["objects"]:
        answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub.blobs:
            answer["actions"] = upload_actions(hub, repo, item["oid"], item["size"])
        objects.append(answer)
    multipart = any("header" in answer.get("actions", {}).get("upload", {}) for answer in objects)
    return Reply.json({"transfer": "multipart" if multipart else "basic", "objects": objects})


def receive(hub: Hub, request: Request, sha256: str) -> Reply:
    """A large file or a part of one, sent to the storage."""
    hub.check_storage(request)
    upload, part = request.parameter("upload"), request.parameter("part")
    if upload is None or part is None:
        hub.blobs.put(request.body, sha256=sha256, size=int(request.parameter("size") or 0))
    else:
        hub.uploads[upload][int(part)] = request.body
    return Reply(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def complete(hub: Hub, request: Request, upload: str) -> Reply:
    """All parts of a large file have been sent."""
    body, parts = request.json(), hub.uploads.get(upload)
    if parts is None:
        raise HubError(404, "No such upload")
    etags = {part: f'"{hashlib.md5(data).hexdigest()}"' for part, data in parts.items()}
    if {part["partNumber"]: part["etag"] for part in body["parts"]} != etags:
        raise HubError(400, "The parts are not those that were sent")
    hub.blobs.put(b"".join(parts[part] for part in sorted(parts)), sha256=body["oid"])
    del hub.uploads[upload]
    return Reply.json({})


def verify(hub: Hub, request: Request, kind: str | None, id: str) -> Reply:
    """Whether a large file has arrived."""
    hub.writable(request, kind, id)
    body = request.json()
    if body["oid"] not in hub.blobs or len(hub.blobs[body["oid"]]) != body["size"]:
        raise HubError(404, f"Large file {body['oid']} was not uploaded")
    return Reply.json({})


def check_path(path: str) -> str:
    """Refuse paths that no file of a repository may have."""
    if not path or path.startswith("/") or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
        raise HubError(400, f"Invalid path: {path}")
    return path


def put_regular(hub: Hub, value: dict[str, Any]) -> File:
    """A file whose content the commit brings along."""
    data = decoded(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
    if len(data) > REGULAR_LIMIT:
        raise HubError(400, f"{value['path']} is too large for a regular file")
    return File.regular(hub.blobs.put(data), data)


def put_large(hub: Hub, value: dict[str, Any]) -> File:
    """A file whose content was uploaded before."""
    sha256 = value["oid"]
    if value.get("algo") != "sha256" or sha256 not in hub.blobs:
        raise HubError(400, f"{value['path']} points to a large file that was not uploaded: {sha256}")
    size = len(hub.blobs[sha256])
    if value.get("size", size) != size:
        raise HubError(400, f"{value['path']} has {size} bytes, not {value['size']}")
    return File.large(sha256, size)


def apply(hub: Hub, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    """Carry out one operation of a commit."""
    path = check_path(value["path"])
    if key == "file":
        files[path] = put_regular(hub, value)
    elif key == "lfsFile":
        files[path] = put_large(hub, value)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif key == "deletedFolder":
        inside = [other for other in files if other.startswith(f"{path.rstrip('/')}/")]
        if not inside:
            raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for other in inside:
            del files[other]
    else:
        raise HubError(400, f"Unknown operation: {key}")


def commit(hub: Hub, request: Request, kind: str, id: str, revision: str) -> Reply:
    """Put a commit on a branch: a header and the operations, one JSON object per line."""
    repo = hub.writable(request, kind, id)
    head = branch_head(hub, repo, revision)
    if request.parameter("create_pr"):
        raise HubError(400, "Pull requests are not supported here")
    try:
        lines = [json.loads(line) for line in request.body.splitlines() if line]
    except ValueError as error:
        raise HubError(400, f"Invalid JSON: {error}") from error
    if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
        raise HubError(400, "A commit starts with a header that has a summary")
    if hub.take_fault(request, "stale_parent"):
        name = f"intruder-{len(repo.commits)}.txt"
        hub.commit(id, {name: b"someone else was here\n"}, repo_type=kind, revision=revision)
        head = branch_head(hub, repo, revision)
    header = lines[0]["value"]
    if not head.id.startswith(header.get("parentCommit") or ""):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines[1:]:
        apply(hub, files, line["key"], line["value"])
    if (card := files.get("README.md")) is not None and card != head.files.get("README.md"):
        errors, _ = cards.validate(hub.blobs[card.sha256].decode(), kind)
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    new = repo.commit(revision, files, header["summary"], header.get("description", ""), USER)
    url = f"{hub.url}{repo.web_path}/commit/{new.id}"
    return Reply.json({"success": True, "commitOid": new.id, "commitUrl": url, "hookOutput": ""})


REF = "(?P<name>[^/]+)"
OBJECTS = rf"/{PAGE}\.git/info/lfs/objects"
ROUTES = [
    Route("POST", "/api/repos/create", create),
    Route("POST", f"/api/{REPO}/branch/{REF}", create_branch),
    Route("DELETE", f"/api/{REPO}/branch/{REF}", delete_branch),
    Route("POST", f"/api/{REPO}/tag/{REF}", create_tag),
    Route("DELETE", f"/api/{REPO}/tag/{REF}", delete_tag),
    Route("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)", preupload),
    Route("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)", commit),
    Route("POST", f"{OBJECTS}/batch", batch),
    Route("POST", f"{OBJECTS}/verify", verify),
    Route("POST", "/api/complete-upload/(?P<upload>[0-9a-f]+)", complete),
    Route("PUT", "/storage/(?P<sha256>[0-9a-f]{64})", receive),
]
