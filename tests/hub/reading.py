"""Requests that read: information, listings and files."""

import base64
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote

from tests.hub import cards
from tests.hub.state import PAGE, REPO, USER, Hub, Route
from tests.hub.store import Commit, File, Repo
from tests.hub.wire import HubError, Reply, Request, content


def whoami(hub: Hub, request: Request) -> Reply:
    """Whose token it is."""
    role = hub.role(request)
    if role is None:
        raise HubError(401, "Invalid username or password.")
    access = {"displayName": "tests", "role": role}
    return Reply.json(
        {
            "type": "user",
            "id": "0" * 24,
            "name": USER,
            "fullname": USER.title(),
            "email": f"{USER}@localhost",
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": access},
        }
    )


def large_info(file: File, key: str) -> dict[str, Any]:
    """What listings say of a large file; `key` is what the SHA-256 is called there."""
    return {key: file.sha256, "size": file.size, "pointerSize": file.pointer}


def sibling(path: str, file: File, *, details: bool) -> dict[str, Any]:
    """A file in the information of a repository."""
    info: dict[str, Any] = {"rfilename": path}
    if details:
        info |= {"size": file.size, "blobId": file.oid}
        if file.pointer is not None:
            info["lfs"] = large_info(file, "sha256")
    return info


def tags_of(card: dict[str, Any]) -> list[str]:
    """Tags that the Hub derives from the metadata of a card, after those that the card gives."""
    tags: list[str] = []
    prefixes = {"license": "license:", "datasets": "dataset:", "base_model": "base_model:"}
    for key in ("tags", "library_name", "language", "pipeline_tag", *prefixes):
        value = card.get(key)
        values = value if isinstance(value, list) else [value]
        tags += [prefixes.get(key, "") + item for item in values if isinstance(item, str)]
    return tags


def repo_info(hub: Hub, request: Request, kind: str, id: str, revision: str | None = None) -> Reply:
    """Information on a repository at a revision."""
    repo = hub.readable(request, kind, id)
    commit = hub.revision(repo, revision or "main")
    info = {
        "_id": repo.commits[next(iter(repo.commits))].id[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.id,
        "createdAt": next(iter(repo.commits.values())).timestamp,
        "lastModified": commit.timestamp,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "usedStorage": sum(file.size for file in commit.files.values()),
        "siblings": [sibling(p, f, details=request.parameter("blobs") == "true") for p, f in commit.files.items()],
    }
    card = cards.metadata(hub.blobs[readme.sha256].decode()) if (readme := commit.files.get("README.md")) else None
    info["tags"] = tags_of(card or {})
    if card:
        info["cardData"] = card
    if kind == "model":
        info["modelId"] = repo.id
        info |= {key: card[key] for key in ("library_name", "pipeline_tag") if card and key in card}
    if wanted := request.query.get("expand"):
        info = {key: value for key, value in info.items() if key in ("_id", "id", *wanted)}
    return Reply.json(info)


def entry(hub: Hub, repo: Repo, commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
    """A file or folder in a listing."""
    info: dict[str, Any]
    if path in commit.folders:
        info = {"type": "directory", "oid": commit.folders[path], "size": 0, "path": path}
    else:
        file = commit.files[path]
        info = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file.pointer is not None:
            info["lfs"] = large_info(file, "oid")
            if file.sha256 in hub.blobs.xet_hashes:
                info["xetHash"] = hub.blobs.xet_hashes[file.sha256]
        if expand:
            info["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    if expand:
        last = repo.last_change(commit, path)
        info["lastCommit"] = {"id": last.id, "title": last.title, "date": last.timestamp}
    return info


def page(hub: Hub, request: Request, items: list[Any]) -> tuple[list[Any], dict[str, str]]:
    """The part of a list that a request asks for, and the header with the address of what follows."""
    start = int(base64.urlsafe_b64decode(request.parameter("cursor") or "MA=="))
    end = start + hub.page_size
    if end >= len(items):
        return items[start:], {}
    cursor = base64.urlsafe_b64encode(str(end).encode()).decode()
    others = "&".join(f"{k}={quote(v)}" for k, values in request.query.items() for v in values if k != "cursor")
    return items[start:end], {"Link": f'<{hub.url}{request.path}?{others}&cursor={quote(cursor)}>; rel="next"'}


def tree(hub: Hub, request: Request, kind: str, id: str, revision: str, path: str | None) -> Reply:
    """Files and folders below a folder; folders come first."""
    repo = hub.readable(request, kind, id)
    commit = hub.revision(repo, revision)
    if path and path not in commit.folders:
        raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
    inside = [
        p for p in [*sorted(commit.folders), *sorted(commit.files)] if p and (not path or p.startswith(f"{path}/"))
    ]
    if request.parameter("recursive") != "true":
        inside = [p for p in inside if p.rpartition("/")[0] == (path or "")]
    paths, headers = page(hub, request, inside)
    expand = request.parameter("expand") == "true"
    return Reply.json([entry(hub, repo, commit, p, expand=expand) for p in paths], headers=headers)


def paths_info(hub: Hub, request: Request, kind: str, id: str, revision: str) -> Reply:
    """Listing entries of those of the given paths that exist."""
    repo = hub.readable(request, kind, id)
    commit = hub.revision(repo, revision)
    form = parse_qs(request.body.decode())
    known = [path for path in form.get("paths", []) if path in commit.files or (path and path in commit.folders)]
    expand = form.get("expand") == ["true"]
    return Reply.json([entry(hub, repo, commit, path, expand=expand) for path in known])


def refs(hub: Hub, request: Request, kind: str, id: str) -> Reply:
    """Branches and tags."""
    repo = hub.readable(request, kind, id)

    def listed(kind: str, points: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in points.items()]

    return Reply.json({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})


def commits(hub: Hub, request: Request, kind: str, id: str, revision: str) -> Reply:
    """A revision and the commits before it."""
    repo = hub.readable(request, kind, id)
    history: Iterable[Commit] = repo.history(hub.revision(repo, revision))
    listed, headers = page(hub, request, list(history))
    described = [
        {
            "id": c.id,
            "title": c.title,
            "message": c.message,
            "authors": [{"user": c.author}],
            "date": c.timestamp,
        }
        for c in listed
    ]
    return Reply.json(described, headers=headers)


def auth_check(hub: Hub, request: Request, kind: str, id: str, write: str | None) -> Reply:
    """Whether the sender may have the files, or may change them."""
    (hub.writable if write else hub.downloadable)(request, kind, id)
    return Reply.json({})


def resolve(hub: Hub, request: Request, kind: str | None, id: str, revision: str, path: str) -> Reply:
    """A file, or for a large one the way to the storage."""
    repo = hub.downloadable(request, kind, id)
    commit = hub.revision(repo, revision)
    headers = {"X-Repo-Commit": commit.id}
    file = commit.files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    name = PurePosixPath(path).name
    if file.pointer is None:
        headers |= {"ETag": f'"{file.etag}"', "Content-Disposition": f'inline; filename="{quote(name)}"'}
        return content(request, hub.blobs[file.sha256], headers)
    headers |= {
        "X-Linked-Size": str(file.size),
        "X-Linked-Etag": f'"{file.etag}"',
        "ETag": f'"{file.etag}"',
        "Accept-Ranges": "bytes",
        "Location": hub.storage_link(file.sha256, filename=name),
    }
    if file.sha256 in hub.blobs.xet_hashes:
        route = f"{hub.url}/api/{repo.kind}s/{repo.id}/xet-read-token/{commit.id}"
        headers |= {"X-Xet-Hash": hub.blobs.xet_hashes[file.sha256], "Link": f'<{route}>; rel="xet-auth"'}
    return Reply(302, f"Found. Redirecting to {headers['Location']}".encode(), headers)


def stored(hub: Hub, request: Request, sha256: str) -> Reply:
    """A large file, from the storage."""
    hub.check_storage(request)
    if sha256 not in hub.blobs:
        raise HubError(404, "No such key")
    return content(request, hub.blobs[sha256], {"ETag": f'"{sha256}"'})


def validate_yaml(hub: Hub, request: Request) -> Reply:
    """What the Hub says of the metadata of a card."""
    body = request.json()
    errors, warnings = cards.validate(body["content"], body.get("repoType", "model"))
    status = 400 if errors else 200
    if request.headers.get("accept") == "text/plain":
        return Reply(status, "\n".join(errors or warnings).encode(), {"Content-Type": "text/plain; charset=utf-8"})
    listed = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return Reply.json(listed, status)


ROUTES = [
    Route("GET", "/api/whoami-v2", whoami),
    Route("POST", "/api/validate-yaml", validate_yaml),
    Route("GET", f"/api/{REPO}/revision/(?P<revision>[^/]+)", repo_info),
    Route("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
    Route("POST", f"/api/{REPO}/paths-info/(?P<revision>[^/]+)", paths_info),
    Route("GET", f"/api/{REPO}/refs", refs),
    Route("GET", f"/api/{REPO}/commits/(?P<revision>[^/]+)", commits),
    Route("GET", f"/api/{REPO}/auth-check(?P<write>/write)?", auth_check),
    Route("GET", f"/api/{REPO}", repo_info),  # after the others, which could pass for names here
    Route("GET", f"/{PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    Route("GET", "/storage/(?P<sha256>[0-9a-f]{64})", stored),
]
