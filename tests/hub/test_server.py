"""The local Hub through huggingface_hub itself: what is sent arrives, and failures are those of the real one."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    model_info,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from tests.hub.fixture import environment
from tests.hub.server import READ_TOKEN, TOKEN, Fault, HubServer, Route
from tests.hub.wire import Reply

NAME = "tester/model"
LARGE = bytes(range(256)) * 400  # 102,400 bytes that are not text


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """A client that may write, with an empty repository."""
    api = HfApi(token=TOKEN)
    api.create_repo(NAME)
    return api


def made(hub: HubServer, pattern: str) -> list[str]:
    """Requests that were made to paths with a pattern."""
    return [call.method for call in hub.requests if re.search(pattern, call.path)]


def ask(method: str, url: str, **options: Any) -> Any:
    """Send a request and follow no redirects."""
    return get_session().request(method, url, follow_redirects=False, **options)


def downloaded(path: str) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in Path(path).rglob("*") if f.is_file()}


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


# round trips


def test_folder_goes_up_and_comes_down(api: HfApi, hub: HubServer, tmp_path: Path) -> None:
    files = {
        "config.json": b'{"a": "\xc3\xa4"}',
        "a/b/weights.safetensors": LARGE,
        "a/odd name%2F.txt": b"x",
        "empty": b"",
    }
    for name, content in files.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(content)
    done = api.upload_folder(repo_id=NAME, folder_path=tmp_path / "up")
    stored = hub.files(NAME)
    assert stored.pop(".gitattributes")
    assert stored == files
    path = snapshot_download(NAME)
    assert Path(path).name == done.oid
    assert downloaded(path) == hub.files(NAME)
    assert str(tmp_path) in path  # not in the cache of the user


def test_kind_of_file_is_decided_by_name_text_and_size(api: HfApi, hub: HubServer) -> None:
    contents = {"x.bin": b"text", "code.py": b"a = 1\n", "image": b"\x89PNG\0", "long.txt": b"a" * 10_000_001}
    api.create_commit(NAME, [add(path, content) for path, content in contents.items()], commit_message="files")
    large = {file.path: file.lfs.sha256 for file in api.list_repo_tree(NAME) if file.lfs}
    assert large == {path: hashlib.sha256(contents[path]).hexdigest() for path in ("x.bin", "image", "long.txt")}
    assert made(hub, "/storage/") == ["PUT"] * 3
    half = "ä".encode()[:1]  # the sample of 512 bytes that the client sends may end within a character
    samples = {"good": b"a" * 511 + "ä".encode(), "bad": b"a" * 500 + half + b"a" * 11 + half}
    api.create_commit(NAME, [add(path, content) for path, content in samples.items()], commit_message="samples")
    assert [file.path for file in api.get_paths_info(NAME, list(samples)) if file.lfs] == ["bad"]


def test_many_parts_of_one_file(api: HfApi, hub: HubServer) -> None:
    hub.multipart_over, hub.part_size = 50_000, 30_000
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.bin", repo_id=NAME)
    assert made(hub, "/storage/.*part=") == ["PUT"] * 4
    assert made(hub, "/api/complete-upload/") == ["POST"]
    assert hub.files(NAME)["weights.bin"] == LARGE


@pytest.mark.parametrize("mistake", ["etag", "missing", "order", "upload"])
def test_parts_that_do_not_make_the_file(api: HfApi, hub: HubServer, mistake: str) -> None:
    hub.multipart_over = hub.part_size = 60_000
    sha = hashlib.sha256(LARGE).hexdigest()
    body = {"operation": "upload", "transfers": ["multipart"], "objects": [{"oid": sha, "size": len(LARGE)}]}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = ask("POST", f"{hub.url}/{NAME}.git/info/lfs/objects/batch", json=body, headers=headers).json()
    upload = answer["objects"][0]["actions"]["upload"]
    assert (answer["transfer"], upload["header"]["chunk_size"]) == ("multipart", "60000")
    pieces = [LARGE[:60_000], LARGE[60_000:]]
    order = [1, 0] if mistake == "order" else [0, 1]
    sent = [ask("PUT", upload["header"][str(number + 1)], content=pieces[order[number]]) for number in (0, 1)]
    parts = [{"partNumber": number + 1, "etag": reply.headers["ETag"]} for number, reply in enumerate(sent)]
    if mistake == "etag":
        parts[0]["etag"] = '"0"'
    if mistake == "missing":
        parts.pop()
    href = upload["href"] + "0" if mistake == "upload" else upload["href"]
    status = ask("POST", href, json={"oid": sha, "parts": parts}).status_code
    assert status == (404 if mistake == "upload" else 400)
    assert sha not in hub.blobs


def test_known_content_is_not_sent_again(api: HfApi, hub: HubServer) -> None:
    first = api.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.bin", repo_id=NAME)
    again = api.upload_file(path_or_fileobj=LARGE, path_in_repo="weights.bin", repo_id=NAME)
    assert again.oid == first.oid  # nothing changed, so the client makes no commit
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="copy.bin", repo_id=NAME)
    assert made(hub, "/storage/") == ["PUT"]
    assert set(hub.files(NAME)) == {".gitattributes", "weights.bin", "copy.bin"}


def test_commits_are_immutable_and_reproducible(hub: HubServer) -> None:
    first = hub.add_repo(NAME, {"a": b"1"})
    second = hub.commit(NAME, {"a": b"2", "b": b"3"})
    assert re.fullmatch("[0-9a-f]{40}", first)
    assert Path(hf_hub_download(NAME, "a", revision=first)).read_bytes() == b"1"
    assert Path(hf_hub_download(NAME, "a")).read_bytes() == b"2"
    assert model_info(NAME).sha == second
    with HubServer() as other:
        assert other.add_repo("someone/else", {"a": b"1"}) == first
        assert other.commit("someone/else", {"a": b"2", "b": b"4"}) != second
        other.add_repo("some/other", {"a": b"0"})
        assert other.commit("some/other", {"a": b"2", "b": b"3"}) != second  # the same files after something else


def test_deleting_and_copying(api: HfApi, hub: HubServer) -> None:
    hub.commit(NAME, {"a": b"1", "d/b": b"2", "d/e/c": b"3", "w.bin": LARGE})
    operations = [CommitOperationDelete("d/"), CommitOperationDelete("a"), CommitOperationCopy("w.bin", "v.bin")]
    api.create_commit(NAME, operations, commit_message="tidy up")
    files = hub.files(NAME)
    assert set(files) == {".gitattributes", "w.bin", "v.bin"}
    assert files["v.bin"] == LARGE
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("a", NAME)
    with pytest.raises(RemoteEntryNotFoundError, match="A folder with this name doesn't exist"):
        api.delete_folder("d", NAME)


def test_file_names_that_git_cannot_hold(api: HfApi, hub: HubServer) -> None:
    hub.commit(NAME, {"a": b"1"})
    with pytest.raises(BadRequestError, match="lies below a file"):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a/b", repo_id=NAME)
    assert "a/b" not in hub.files(NAME)


# listings


def test_listing(hub: HubServer) -> None:
    hub.add_repo(NAME, {"a": b"1", "d/b": b"22", "d/e/w.bin": LARGE})
    last = hub.commit(NAME, {"d/b": b"333"}, title="change b")
    api = HfApi()
    top = list(api.list_repo_tree(NAME))
    assert [entry.path for entry in top] == ["d", ".gitattributes", "a"]
    everything = {entry.path: entry for entry in api.list_repo_tree(NAME, recursive=True, expand=True)}
    assert set(everything) == {"d", "d/e", ".gitattributes", "a", "d/b", "d/e/w.bin"}
    assert everything["d/b"].last_commit.oid == everything["d"].last_commit.oid == last
    assert everything["d/b"].last_commit.title == "change b"
    assert everything["a"].last_commit.oid != last
    assert everything["d/e/w.bin"].lfs.size == everything["d/e/w.bin"].size == len(LARGE)
    assert everything["a"].blob_id == hashlib.sha1(b"blob 1\x001").hexdigest()
    assert [entry.path for entry in api.list_repo_tree(NAME, "d/e")] == ["d/e/w.bin"]
    assert [entry.path for entry in api.get_paths_info(NAME, ["a", "d", "no"])] == ["a", "d"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(NAME, "a"))


def test_long_listings_come_in_pages(hub: HubServer) -> None:
    hub.page_size = 4
    hub.add_repo(NAME, {f"{number}.txt": b"" for number in range(10)})
    assert len(HfApi().list_repo_files(NAME)) == 11
    assert made(hub, "/tree/") == ["GET"] * 3
    for number in range(5):
        hub.commit(NAME, {"a": str(number).encode()}, title=str(number))
    assert [commit.title for commit in HfApi().list_repo_commits(NAME)][:5] == ["4", "3", "2", "1", "0"]


def test_hashes_of_folders_are_those_of_git(hub: HubServer, tmp_path: Path) -> None:
    files = {"a.txt": b"1", "a/x": b"2", "a/b/y": b"3", "ab": b"4"}
    hub.add_repo(NAME, files)
    attributes = hub.files(NAME)[".gitattributes"].replace(b"filter=lfs", b"")
    hub.commit(NAME, {".gitattributes": attributes})
    for name, content in hub.files(NAME).items():
        (tmp_path / "git" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "git" / name).write_bytes(content)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path / "git", check=True)
    expected = subprocess.run(["git", "write-tree"], cwd=tmp_path / "git", check=True, capture_output=True, text=True)
    head = hub.repos["model", NAME].find("main")
    assert head is not None
    assert head.folders[""] == expected.stdout.strip()


def test_information(hub: HubServer) -> None:
    card = (
        b"---\nlicense: mit\ntags: [a]\nlibrary_name: textmeta\nbase_model: org/base\ndate: 2024-05-01\n---\n# Hello\n"
    )
    sha = hub.add_repo(NAME, {"README.md": card, "w.bin": LARGE}, private=True)
    hub.commit(NAME, {"README.md": None})
    api = HfApi(token=READ_TOKEN)
    info = api.model_info(NAME, revision=sha, files_metadata=True)
    assert info.private
    assert info.sha == sha
    assert info.card_data.license == "mit"
    assert info.library_name == "textmeta"
    assert info.tags == ["a", "textmeta", "license:mit", "base_model:org/base"]
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
    assert sizes["w.bin"] == (len(LARGE), True)
    assert sizes["README.md"] == (len(card), False)
    assert api.model_info(NAME).card_data is None
    assert api.model_info(NAME, expand=["sha"]).siblings is None
    assert api.file_exists(NAME, "w.bin")
    assert not api.file_exists(NAME, "README.md")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info(NAME)  # the kinds have their own names


# files


def test_headers_of_files(hub: HubServer) -> None:
    sha = hub.add_repo(NAME, {"a.txt": b"abc", "w.bin": LARGE})
    small = ask("HEAD", f"{hub.url}/{NAME}/resolve/main/a.txt")
    assert small.status_code == 200
    assert small.headers["ETag"].strip('"') == hashlib.sha1(b"blob 3\0abc").hexdigest()
    assert small.headers["Content-Length"] == "3"
    assert small.headers["X-Repo-Commit"] == sha
    large = ask("HEAD", f"{hub.url}/{NAME}/resolve/main/w.bin")
    assert large.status_code == 302
    assert large.headers["X-Linked-Etag"] == f'"{hashlib.sha256(LARGE).hexdigest()}"'
    assert large.headers["X-Linked-Size"] == str(len(LARGE))
    assert large.headers["Location"].startswith(hub.storage_url)
    assert ask("GET", large.headers["Location"]).content == LARGE
    assert ask("GET", large.headers["Location"][:-1]).status_code == 403  # no longer the signature
    leaking = ask("GET", large.headers["Location"], headers={"Authorization": f"Bearer {TOKEN}"})
    assert leaking.status_code == 400


def test_files_in_xet_storage_say_so(hub: HubServer) -> None:
    sha = hub.add_repo(NAME, {"w.bin": LARGE, "a.txt": b"abc"})
    hub.blobs.put(LARGE, xet="1" * 64)
    assert [file.xet_hash for file in HfApi().get_paths_info(NAME, ["w.bin", "a.txt"])] == ["1" * 64, None]
    found = get_hf_file_metadata(f"{hub.url}/{NAME}/resolve/main/w.bin").xet_file_data
    assert found.file_hash == "1" * 64
    assert found.refresh_route == f"{hub.url}/api/models/{NAME}/xet-read-token/{sha}"
    assert get_hf_file_metadata(f"{hub.url}/{NAME}/resolve/main/a.txt").xet_file_data is None


@pytest.mark.parametrize(
    ("asked", "status", "start", "end"),
    [
        ("bytes=0-9", 206, 0, 10),
        ("bytes=100-", 206, 100, 1000),
        ("bytes=-7", 206, 993, 1000),
        ("bytes=990-5000", 206, 990, 1000),
        ("bytes=1000-", 416, 0, 0),
        ("bytes=5-4", 416, 0, 0),
        ("bytes=0-1,5-6", 200, 0, 1000),
        ("lines=1-2", 200, 0, 1000),
    ],
)
def test_ranges(hub: HubServer, asked: str, status: int, start: int, end: int) -> None:
    content = bytes(32 + number % 95 for number in range(1000))
    hub.add_repo(NAME, {"a": content})
    response = ask("GET", f"{hub.url}/{NAME}/resolve/main/a", headers={"Range": asked})
    assert response.status_code == status
    if status == 416:
        assert response.headers["Content-Range"] == "bytes */1000"
    else:
        assert response.content == content[start:end]
    if status == 206:
        assert response.headers["Content-Range"] == f"bytes {start}-{end - 1}/1000"


def test_file_system_reads_parts(hub: HubServer) -> None:
    hub.add_repo(NAME, {"w.bin": LARGE})
    with HfFileSystem().open(f"{NAME}/w.bin", block_size=1000, cache_type="none") as file:
        file.seek(50_000)
        assert file.read(300) == LARGE[50_000:50_300]
    ranges = [call.headers.get("range") for call in hub.requests if "/storage/" in call.path]
    assert ranges == ["bytes=50000-50299"]


# who may do what


def test_accounts(hub: HubServer) -> None:
    api = HfApi()
    assert api.whoami(TOKEN)["auth"]["accessToken"]["role"] == "write"
    assert api.whoami(READ_TOKEN)["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami("hf_wrong")
    assert ask("GET", f"{hub.url}/api/whoami-v2").status_code == 401


def test_creating(hub: HubServer) -> None:
    api = HfApi(token=TOKEN)
    assert api.create_repo("model").repo_id == NAME
    assert api.create_repo(NAME, repo_type="dataset", private=True).repo_type == "dataset"
    assert hub.repos["dataset", NAME].private
    assert api.create_repo(NAME, exist_ok=True).repo_id == NAME
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api.create_repo(NAME)
    assert caught.value.response.status_code == 409
    assert set(hub.files(NAME)) == {".gitattributes"}
    for token, status in ((READ_TOKEN, 403), (False, 401)):
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo("tester/other", token=token)
        assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="namespace") as caught:
        api.create_repo("someone/model")
    assert caught.value.response.status_code == 403
    with pytest.raises(BadRequestError, match="Invalid repository name"):
        api.create_repo("tester/model.ipynb")
    with pytest.raises(BadRequestError, match="not supported"):
        api.create_repo(NAME, repo_type="space", space_sdk="static")
    for name in ("a--b", "a..b", "-a", "a" * 97, ""):  # the client itself refuses these
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert ask("POST", f"{hub.url}/api/repos/create", json={"name": name}, headers=headers).status_code == 400
    assert ask("POST", f"{hub.url}/api/repos/create", content=b"{", headers=headers).status_code == 400


def test_writing_needs_rights(hub: HubServer) -> None:
    hub.add_repo(NAME)
    hub.add_repo("someone/model")
    for repo, token, status in ((NAME, READ_TOKEN, 403), (NAME, False, 401), ("someone/model", TOKEN, 403)):
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi(token=token).upload_file(path_or_fileobj=b"a", path_in_repo="a", repo_id=repo)
        assert caught.value.response.status_code == status
        assert set(hub.files(repo)) == {".gitattributes"}
    HfApi(token=TOKEN).auth_check(NAME, write=True)
    with pytest.raises(HfHubHTTPError):
        HfApi(token=READ_TOKEN).auth_check(NAME, write=True)


def test_private_and_missing_repositories(hub: HubServer) -> None:
    hub.add_repo(NAME, {"a": b"1"}, private=True)
    hub.add_repo("someone/model", {"a": b"1"}, private=True)
    for repo, token, status in (
        (NAME, False, 401),  # without a token, a private repository looks like none
        ("tester/none", False, 401),
        ("someone/model", TOKEN, 404),
        ("tester/none", TOKEN, 404),
    ):
        for call in (snapshot_download, lambda *args, **keywords: hf_hub_download(*args, "b", **keywords)):
            with pytest.raises(RepositoryNotFoundError) as caught:
                call(repo, token=token)
            assert not isinstance(caught.value, GatedRepoError)
            assert caught.value.response.status_code == status
    assert Path(hf_hub_download(NAME, "a", token=READ_TOKEN)).read_bytes() == b"1"


def test_gated_repositories(hub: HubServer) -> None:
    hub.add_repo("someone/model", {"a": b"1"}, gated=True)
    hub.add_repo(NAME, {"a": b"1"}, gated=True)
    assert model_info("someone/model").gated == "auto"  # anyone may know of it
    for repo, token, status in (("someone/model", False, 401), ("someone/model", TOKEN, 403), (NAME, False, 401)):
        with pytest.raises(GatedRepoError) as caught:
            snapshot_download(repo, token=token)
        assert caught.value.response.status_code == status
    assert downloaded(snapshot_download(NAME, token=READ_TOKEN)) == hub.files(NAME)


def test_missing_revisions_and_files(hub: HubServer) -> None:
    sha = hub.add_repo(NAME, {"a": b"1"})
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(NAME, revision="no")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(NAME, "a", revision="0" * 40)
    with pytest.raises(RemoteEntryNotFoundError) as caught:
        hf_hub_download(NAME, "no")
    assert caught.value.response.headers["X-Repo-Commit"] == sha
    assert Path(hf_hub_download(NAME, "a", revision=sha[:8])).read_bytes() == b"1"


def test_invalid_token(hub: HubServer) -> None:
    hub.add_repo(NAME, {"a": b"1"})
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        model_info(NAME, token="hf_wrong")
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


# branches and tags


def test_branches_and_tags(api: HfApi, hub: HubServer) -> None:
    first = hub.commit(NAME, {"a": b"1"})
    api.create_tag(NAME, tag="v1")
    moved = hub.commit(NAME, {"a": b"new"})
    api.create_branch(NAME, branch="feature/x", revision="v1")
    second = api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=NAME, revision="feature/x").oid
    assert Path(hf_hub_download(NAME, "a", revision="feature/x")).read_bytes() == b"2"
    assert Path(hf_hub_download(NAME, "a", revision="v1")).read_bytes() == b"1"
    assert hub.files(NAME)["a"] == b"new"
    hub.tag(NAME, "v2", "feature/x")
    hub.branch(NAME, "same")
    found = api.list_repo_refs(NAME)
    heads = {ref.name: ref.target_commit for ref in found.branches}
    assert heads == {"main": moved, "same": moved, "feature/x": second}
    assert hub.repos["model", NAME].commits[second].parent == first
    assert {ref.name: ref.target_commit for ref in found.tags} == {"v1": first, "v2": second}
    api.create_branch(NAME, branch="same", exist_ok=True)
    api.create_tag(NAME, tag="v1", exist_ok=True)
    for again in (lambda: api.create_branch(NAME, branch="same"), lambda: api.create_tag(NAME, tag="v1")):
        with pytest.raises(HfHubHTTPError) as caught:
            again()
        assert caught.value.response.status_code == 409
    with pytest.raises(BadRequestError):
        api.create_branch(NAME, branch="refs/pr/5")
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(NAME, tag="v3", revision="no")
    api.delete_branch(NAME, branch="same")
    api.delete_tag(NAME, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(NAME, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_branch(NAME, branch="same")
    assert not api.revision_exists(NAME, "same")
    with pytest.raises(HfHubHTTPError):
        api.delete_branch(NAME, branch="main")


def test_commits_go_to_branches_that_exist(api: HfApi, hub: HubServer) -> None:
    hub.tag(NAME, "v1")
    for revision in ("no", "v1"):
        with pytest.raises(RevisionNotFoundError):
            api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=NAME, revision=revision)


# refused commits


def test_pull_requests_are_refused(api: HfApi) -> None:
    with pytest.raises(BadRequestError, match="not supported"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, create_pr=True)


def test_stale_parent(api: HfApi, hub: HubServer) -> None:
    seen = api.model_info(NAME).sha
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, parent_commit=seen[:7])
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=NAME, parent_commit=seen)
    assert caught.value.response.status_code == 412
    assert hub.files(NAME)["a"] == b"1"


def test_someone_commits_in_between(api: HfApi, hub: HubServer) -> None:
    hub.faults = [Fault("stale_parent", times=2)]
    seen = api.model_info(NAME).sha
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, parent_commit=seen)
    assert set(hub.files(NAME)) == {".gitattributes", "intruder-1.txt"}
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME)  # whoever asks for no parent notices nothing
    assert set(hub.files(NAME)) == {".gitattributes", "intruder-1.txt", "intruder-2.txt", "a"}


def commit_lines(hub: HubServer, *lines: str, header: str = '{"summary": "s"}') -> Any:
    url = f"{hub.url}/api/models/{NAME}/commit/main"
    body = "\n".join([f'{{"key": "header", "value": {header}}}', *lines]).encode()
    return ask("POST", url, content=body, headers={"Authorization": f"Bearer {TOKEN}"})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": "%s"}}' % ("0" * 64), "not uploaded"),
        ('{"key": "file", "value": {"path": "../a", "content": "", "encoding": "base64"}}', "Invalid path"),
        ('{"key": "file", "value": {"path": "a/.git/b", "content": "", "encoding": "base64"}}', "Invalid path"),
        ('{"key": "file", "value": {"path": "a", "content": "%", "encoding": "base64"}}', "Invalid base64"),
        ('{"key": "rename", "value": {"path": "a"}}', "Unknown operation"),
        ("{", "Invalid JSON"),
    ],
)
def test_commits_that_are_refused(hub: HubServer, line: str, problem: str) -> None:
    head = hub.add_repo(NAME)
    good = '{"key": "file", "value": {"path": "b", "content": "MQ==", "encoding": "base64"}}'
    assert commit_lines(hub, good, header="{}").status_code == 400
    response = commit_lines(hub, good, line)
    assert response.status_code == 400
    assert problem in response.json()["error"]
    assert hub.repos["model", NAME].branches["main"] == head  # not even the good half of it was applied
    assert commit_lines(hub, good).json()["commitOid"] != head


def test_large_regular_files_are_refused(hub: HubServer) -> None:
    hub.add_repo(NAME)
    line = '{"key": "file", "value": {"path": "b", "content": "%s", "encoding": "utf-8"}}' % ("a" * 10_000_001)
    assert commit_lines(hub, line).status_code == 400


def test_storage_takes_what_was_announced(hub: HubServer) -> None:
    hub.add_repo(NAME)
    sha = hashlib.sha256(LARGE).hexdigest()
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": sha, "size": len(LARGE)}]}
    address = f"{hub.url}/{NAME}.git/info/lfs/objects"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    actions = ask("POST", f"{address}/batch", json=body, headers=headers).json()["objects"][0]["actions"]
    href = actions["upload"]["href"]
    assert ask("GET", href).status_code == 404
    assert ask("PUT", href.replace(f"size={len(LARGE)}", "size=3"), content=LARGE).status_code == 400
    for wrong in (LARGE[:-1], LARGE + b"a", LARGE[:-1] + b"a"):
        assert ask("PUT", href, content=wrong).status_code == 400
    announced = {"oid": sha, "size": len(LARGE)}
    assert ask("POST", actions["verify"]["href"], json=announced, headers=headers).status_code == 404
    assert ask("PUT", href, content=iter([LARGE[:1000], LARGE[1000:]])).status_code == 200  # sent in chunks
    assert ask("POST", actions["verify"]["href"], json=announced, headers=headers).status_code == 200
    assert ask("POST", f"{address}/batch", json=body).status_code == 401
    body["operation"] = "download"
    assert ask("POST", f"{address}/batch", json=body, headers=headers).status_code == 400
    line = {"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": sha, "size": 3}}
    assert "not 3" in commit_lines(hub, json.dumps(line)).json()["error"]
    assert commit_lines(hub, json.dumps(line).replace(": 3}", f": {len(LARGE)}}}")).status_code == 200


# failures that tests order


def test_failure_that_passes(hub: HubServer) -> None:
    hub.add_repo(NAME, {"a": b"1"})
    fault = Fault("status", path="/tree/", status=503, times=2)
    hub.faults = [fault]
    assert downloaded(snapshot_download(NAME))["a"] == b"1"
    assert fault.times == 0
    assert made(hub, "/tree/") == ["GET"] * 3


def test_failure_that_stays(hub: HubServer) -> None:
    hub.add_repo(NAME, {"a": b"1"})
    hub.faults = [Fault("status", path="resolve/.*/a$", method="HEAD", status=500, times=100)]
    with pytest.raises(LocalEntryNotFoundError) as caught:
        snapshot_download(NAME)
    assert isinstance(caught.value.__cause__, HfHubHTTPError)


def test_upload_is_tried_again(api: HfApi, hub: HubServer) -> None:
    hub.faults = [Fault("status", path="/storage/", method="PUT", status=500)]
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="w.bin", repo_id=NAME)
    assert made(hub, "/storage/") == ["PUT"] * 2
    assert hub.files(NAME)["w.bin"] == LARGE


@pytest.mark.parametrize("name", ["w.bin", "a.txt"])
def test_cut_connection(hub: HubServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    contents = {"w.bin": LARGE, "a.txt": b"abcdefgh" * 1000}
    hub.add_repo(NAME, contents)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what the client keeps of an interrupted download
    hub.faults = [Fault("cut", path=re.escape(name), after=4321)]
    assert Path(hf_hub_download(NAME, name)).read_bytes() == contents[name]
    ranges = [call.headers.get("range") for call in hub.requests if call.method == "GET" and name in call.path]
    assert ranges == [None, "bytes=4300-"]


def test_connection_that_is_always_cut(hub: HubServer) -> None:
    hub.add_repo(NAME, {"w.bin": LARGE})
    hub.faults = [Fault("cut", path="w.bin", after=10, times=100)]
    with pytest.raises(Exception, match="peer closed connection"):
        hf_hub_download(NAME, "w.bin")


def test_lost_answer(api: HfApi, hub: HubServer) -> None:
    hub.faults = [Fault("cut", path="/commit/")]
    with pytest.raises(Exception, match="peer closed connection"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME)
    assert hub.files(NAME)["a"] == b"1"  # the commit was made all the same


@pytest.mark.parametrize("name", ["w.bin", "a.txt"])
def test_truncated_file(hub: HubServer, name: str) -> None:
    hub.add_repo(NAME, {"w.bin": LARGE, "a.txt": b"abcdefgh" * 1000})
    hub.faults = [Fault("truncate", path=re.escape(name), after=4321)]
    with pytest.raises(OSError, match=r"should be of size \d+ but has size 4321"):
        hf_hub_download(NAME, name)
    assert Path(hf_hub_download(NAME, name)).read_bytes() == hub.files(NAME)[name]


def test_truncated_range_says_so(hub: HubServer) -> None:
    hub.add_repo(NAME, {"a": b"abcdefgh"})
    hub.faults = [Fault("truncate", after=2)]
    response = ask("GET", f"{hub.url}/{NAME}/resolve/main/a", headers={"Range": "bytes=3-"})
    assert (response.content, response.headers["Content-Range"]) == (b"de", "bytes 3-4/8")


@pytest.mark.usefixtures("hub")
def test_mistake_of_the_server_is_not_hidden() -> None:
    def mistaken(hub: HubServer, request: object) -> Reply:
        raise ValueError("oh")

    other = HubServer()
    other.routes.append(Route("GET", "/mistake", mistaken))
    other.__enter__()
    assert ask("GET", f"{other.url}/nothing").status_code == 404
    assert ask("GET", f"{other.url}/mistake").status_code == 500
    with pytest.raises(ValueError, match="oh"):
        other.__exit__()


# processes


def test_process_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo(NAME, {"a": b"1"}, private=True)
    code = f"import huggingface_hub as h; print(open(h.hf_hub_download({NAME!r}, 'a')).read(), h.whoami()['name'])"
    variables = {"PATH": "", "HF_HUB_OFFLINE": "1", **environment(hub, tmp_path / "other", TOKEN)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "1 tester\n"
    assert (tmp_path / "other" / "hub" / "models--tester--model").is_dir()
