"""The real client sends files to the local Hub and fetches them through the Xet protocol."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from safetensors.numpy import save

from tests.hub import xet
from tests.hub.fixture import environment
from tests.hub.server import READ_TOKEN, TOKEN, Fault, HubServer
from tests.hub.wire import HubError

REPO = "tester/large"


def contents() -> dict[str, bytes]:
    """Files that the client stores in each of the three ways."""
    random = np.random.default_rng(0)
    lines = "".join(f"line {i * i} of {i}\n" for i in range(150_000)).encode()
    return {
        "random.bin": random.bytes(3_000_000),
        "lines.bin": lines[:3_000_000],
        "model.safetensors": save({"weight": random.normal(size=(250, 1000)).astype(np.float32)}),
        "deep/tiny.bin": b"\0\1\2",
        "notes.txt": b"not a large file\n",
    }


FILES = contents()
LARGE = {name: data for name, data in FILES.items() if name != "notes.txt"}


class Bench:
    """A Hub and its client, which uses Xet."""

    def __init__(self, hub: HubServer, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.hub, self.folder, self.patch = hub, folder, patch
        self.store = hub.xet
        self.api = HfApi(endpoint=hub.url, token=TOKEN)
        self.new_machine()

    def new_machine(self, **settings: str) -> None:
        """Let the client start without memory of what it did, with settings of `hf_xet`."""
        self.cache = self.folder / f"machine{len(list(self.folder.glob('machine*')))}"
        self.cache.mkdir()
        xet.enable_client(self.patch, self.cache / "xet", **settings)
        self.hub.requests.clear()

    def upload(self, files: dict[str, bytes], repo: str = REPO) -> None:
        source = self.cache / "source"
        for name, data in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        self.api.create_repo(repo, exist_ok=True)
        self.api.upload_folder(repo_id=repo, folder_path=source)

    def download(self, name: str, repo: str = REPO) -> bytes:
        return Path(self.api.hf_hub_download(repo, name, cache_dir=self.cache / "hub")).read_bytes()

    def paths(self, method: str, pattern: str) -> list[str]:
        """The paths of the requests that were made."""
        return [call.path for call in self.hub.requests if call.method == method and re.search(pattern, call.path)]

    def flip(self, data: bytes, offset: int) -> None:
        """Damage the first chunk of a file in the store, at an offset from its header."""
        file = self.store.files[self.hub.blobs.xet_hashes[hashlib.sha256(data).hexdigest()]]
        xorb = self.store.xorbs[file.terms[0].xorb]
        place = xorb.chunks[file.terms[0].start].start + offset
        damaged = xorb.data[:place] + bytes([xorb.data[place] ^ 1]) + xorb.data[place + 1 :]
        self.store.xorbs[file.terms[0].xorb] = xorb._replace(data=damaged)


@pytest.fixture
def bench(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(hub, tmp_path, monkeypatch)


def test_upload_a_folder_and_download_it(bench: Bench) -> None:
    bench.upload(FILES)
    assert len(bench.paths("POST", "^/cas/v1/xorb-grants/")) == 1, "one xorb has room for all files"
    assert len(bench.paths("PUT", "^/cas/uploads/")) == 1
    assert len(bench.paths("POST", "^/cas/v2/shards$")) == 1
    assert not [call for call in bench.hub.requests if re.search("info/lfs|/storage/", call.path)]
    (xorb,) = bench.store.xorbs.values()
    assert {xorb.data[chunk.start + 4] for chunk in xorb.chunks} == set(xet.DECODERS), "each way of storing a chunk"

    bench.new_machine()
    folder = Path(bench.api.snapshot_download(REPO, cache_dir=bench.cache / "hub"))
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert len(bench.paths("GET", "^/cas/v2/reconstructions/")) == len(LARGE)
    assert len(bench.paths("GET", "^/cas/transfers/")) == len(LARGE)
    assert not bench.paths("GET", "^/storage/")


def test_single_file_of_a_dataset(bench: Bench) -> None:
    bench.api.create_repo(REPO, repo_type="dataset")
    data = FILES["lines.bin"]
    bench.api.upload_file(repo_id=REPO, repo_type="dataset", path_or_fileobj=data, path_in_repo="train.bin")
    bench.new_machine()
    path = bench.api.hf_hub_download(REPO, "train.bin", repo_type="dataset", cache_dir=bench.cache)
    assert Path(path).read_bytes() == data
    assert len(bench.paths("HEAD", "^/datasets/tester/large/resolve/main/train.bin$")) == 1
    assert len(bench.paths("GET", "/xet-read-token/")) == 1
    assert len(bench.paths("GET", "^/cas/transfers/")) == 1


def test_download_without_xet(bench: Bench) -> None:
    bench.upload(FILES)
    bench.new_machine()
    bench.patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert {name: bench.download(name) for name in FILES} == FILES
    assert not bench.paths("GET", "^/cas/")


def test_same_content_again(bench: Bench) -> None:
    data = {"random.bin": FILES["random.bin"]}
    bench.upload(data)
    bench.hub.requests.clear()
    bench.upload(data, "tester/same-machine")
    assert not bench.paths("POST", "^/cas/v1/xorb-grants/"), "the client knows what it has uploaded"
    bench.new_machine()
    bench.upload(data, "tester/other-machine")
    assert len(bench.paths("POST", "^/cas/v1/xorb-grants/")) == 1
    assert not bench.paths("PUT", "^/cas/uploads/"), "the store says that it has the xorb"
    bench.new_machine()
    for repo in ("tester/same-machine", "tester/other-machine"):
        assert bench.download("random.bin", repo) == data["random.bin"]


def test_changed_file(bench: Bench) -> None:
    old = FILES["random.bin"]
    bench.upload({"random.bin": old})
    before = set(bench.store.xorbs)
    new = old[:1_000_000] + b"inserted" + old[1_000_000:2_000_000] + old[2_100_000:]
    bench.upload({"random.bin": new})
    added = sum(len(xorb.data) for name, xorb in bench.store.xorbs.items() if name not in before)
    assert 0 < added < 500_000, "only chunks around the changes are uploaded"
    bench.new_machine()
    assert bench.download("random.bin") == new
    assert len(bench.paths("GET", "^/cas/transfers/")) > 2


def test_repeated_content(bench: Bench) -> None:
    data = FILES["random.bin"][:1_000_000] * 3
    bench.upload({"random.bin": data})
    assert sum(len(xorb.data) for xorb in bench.store.xorbs.values()) < 1_500_000
    bench.new_machine()
    assert bench.download("random.bin") == data
    assert len(bench.paths("GET", "^/cas/transfers/")) == 1, "chunks are fetched once"


def test_ranges_of_a_file(bench: Bench) -> None:
    data = FILES["lines.bin"]
    bench.upload({"lines.bin": data})
    (file,) = bench.store.files.values()
    route = f"{bench.hub.url}/api/models/{REPO}/xet-read-token/main"
    import hf_xet  # noqa: PLC0415 - it opens its log, below the folder that the fixture sets, when it is imported

    group = hf_xet.XetSession().new_download_stream_group(token_refresh_url=route)
    for start, end in [(0, 1), (1_234_567, 1_234_570), (100_000, 900_000), (len(data) - 5, len(data))]:
        stream = group.download_stream(hf_xet.XetFileInfo(file.name, file.size), start=start, end=end)
        assert b"".join(stream) == data[start:end]
    asked = [call.headers.get("range") for call in bench.hub.requests if "/reconstructions/" in call.path]
    assert "bytes=100000-899999" in asked


def test_older_client(bench: Bench) -> None:
    bench.new_machine(
        CLIENT_LEGACY_DIRECT_XORB_UPLOAD="1", CLIENT_SHARD_API_VERSION="1", CLIENT_RECONSTRUCTION_API_VERSION="1"
    )
    bench.upload(FILES)
    assert {name: bench.download(name) for name in FILES} == FILES
    assert len(bench.paths("POST", "^/cas/v1/xorbs/")) == 1
    assert len(bench.paths("POST", "^/cas/v1/shards$")) == 1
    assert len(bench.paths("GET", "^/cas/v1/reconstructions/")) == len(LARGE)
    assert not [call for call in bench.hub.requests if re.search("/v2/|grant", call.path)]


def test_other_process(bench: Bench) -> None:
    source, target = bench.cache / "lines.bin", bench.cache / "fetched"
    source.write_bytes(FILES["lines.bin"])
    program = f"""
import huggingface_hub as hub
hub.create_repo({REPO!r})
hub.upload_file(repo_id={REPO!r}, path_or_fileobj={str(source)!r}, path_in_repo="lines.bin")
hub.snapshot_download({REPO!r}, local_dir={str(target)!r})
"""
    settings = environment(bench.hub, bench.cache, TOKEN, xet=True)
    subprocess.run([sys.executable, "-W", "error", "-c", program], env={**os.environ, **settings}, check=True)
    assert (target / "lines.bin").read_bytes() == FILES["lines.bin"]
    assert len(bench.paths("POST", "^/cas/v1/xorb-grants/")) == 1
    assert len(bench.paths("GET", "^/cas/transfers/")) == 1


def test_client_tries_again(bench: Bench) -> None:
    data = {"random.bin": FILES["random.bin"]}
    for path in ("/xorb-grants/", "/cas/uploads/", "/xorb-commits/", "/v2/shards"):
        bench.hub.faults.append(Fault("status", path))
    bench.upload(data)
    assert len(bench.paths("PUT", "^/cas/uploads/")) == 2
    bench.new_machine()
    bench.hub.faults += [Fault("status", "/reconstructions/"), Fault("cut", "/cas/transfers/", after=100_000)]
    assert bench.download("random.bin") == data["random.bin"]
    assert len(bench.paths("GET", "^/cas/transfers/")) == 2


def test_tokens_that_end_soon(bench: Bench) -> None:
    bench.patch.setattr(xet, "TOKEN_SECONDS", 10)
    bench.upload(FILES)
    bench.new_machine()
    assert bench.download("lines.bin") == FILES["lines.bin"]
    assert len(bench.paths("GET", "/xet-read-token/")) == 2, "both parts of the client ask"


@pytest.mark.xfail(strict=True, reason="hf_xet 1.8 does not compare the hashes of the chunks that it fetches")
def test_damaged_content(bench: Bench) -> None:
    bench.upload({"random.bin": FILES["random.bin"]})
    bench.flip(FILES["random.bin"], 1000)
    bench.new_machine()
    with pytest.raises(RuntimeError):
        bench.download("random.bin")


@pytest.mark.parametrize("offset", [0, 1, 4, 5], ids=["version", "length", "scheme", "size"])
def test_damaged_chunk_header(bench: Bench, offset: int) -> None:
    bench.upload({"random.bin": FILES["random.bin"]})
    bench.flip(FILES["random.bin"], offset)
    bench.new_machine()
    with pytest.raises(RuntimeError, match="Format error"):
        bench.download("random.bin")
    assert len(bench.paths("GET", "^/cas/transfers/")) > 1, "the client tries again"
    assert not [path for path in (bench.cache / "hub").rglob("*") if path.is_file() and path.stat().st_size > 1000]


def send(method: str, url: str, body: bytes = b"", token: str | None = None, **headers: str) -> tuple[int, bytes]:
    """The status and the body of the answer to a request."""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body or None, headers, method=method)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def raw(name: str) -> bytes:
    """A hash, from how the protocol writes it."""
    return struct.pack("<4Q", *struct.unpack(">4Q", bytes.fromhex(name)))


class Parts:
    """A xorb and a shard for one file of two chunks, written by hand."""

    def __init__(self) -> None:
        self.pieces = [b"first piece, ", b"and the second"]
        self.xorb = b"".join(self.chunk(piece) for piece in self.pieces)
        self.hashes = xet.blake3(self.pieces, xet.CHUNK_KEY)
        self.root = xet.tree_hash(self.hashes, [len(piece) for piece in self.pieces])
        self.name = xet.hash_name(self.root)
        self.proof = xet.blake3([b"".join(self.hashes)], xet.TERM_KEY)[0]
        self.sha256 = hashlib.sha256(b"".join(self.pieces)).hexdigest()

    @staticmethod
    def chunk(piece: bytes) -> bytes:
        size = len(piece).to_bytes(3, "little")
        return b"\0" + size + b"\0" + size + piece

    def shard(self, end: int = 2, size: int = 27) -> bytes:
        flags = xet.WITH_VERIFICATION | xet.WITH_SHA256
        records = [
            xet.blake3([self.root], xet.FILE_KEY)[0] + struct.pack("<IIQ", flags, 1, 0),
            raw(self.name) + struct.pack("<4I", 0, size, 0, end),
            self.proof + bytes(16),
            raw(self.sha256) + bytes(16),
            xet.LAST_RECORD + bytes(16),
        ]
        return xet.SHARD_TAG + struct.pack("<QQ", xet.SHARD_VERSION, 0) + b"".join(records)


class Door:
    """The addresses of the store, with a token to write and one to read."""

    def __init__(self, bench: Bench) -> None:
        bench.hub.add_repo(REPO)
        self.api, self.cas = f"{bench.hub.url}/api/models/{REPO}", bench.hub.storage_url + xet.CAS
        self.write, self.read = (json.loads(self.ask(scope)[1])["accessToken"] for scope in ("write", "read"))

    def ask(self, scope: str, token: str = TOKEN) -> tuple[int, bytes]:
        return send("GET", f"{self.api}/xet-{scope}-token/main", token=token)


@pytest.fixture
def door(bench: Bench) -> Door:
    return Door(bench)


def test_hand_written_file_is_accepted(bench: Bench, door: Door) -> None:
    parts = Parts()
    footed = parts.xorb + xet.XORB_FOOTER + bytes(100)  # what clients may add to a xorb says nothing new
    assert send("POST", f"{door.cas}/v1/xorbs/default/{parts.name}", footed, door.write)[0] == 200
    assert send("POST", f"{door.cas}/v1/shards", parts.shard(), door.write)[0] == 200
    assert bench.hub.blobs[parts.sha256] == b"".join(parts.pieces)
    plan = f"{door.cas}/v2/reconstructions/{next(iter(bench.store.files))}"
    for span, skipped, start, end in [("0-12", 0, 0, 1), ("12-13", 12, 0, 2), ("13-26", 0, 1, 2), ("20-", 7, 1, 2)]:
        answer = json.loads(send("GET", plan, token=door.read, Range=f"bytes={span}")[1])
        assert answer["offset_into_first_range"] == skipped
        assert [term["range"] for term in answer["terms"]] == [{"start": start, "end": end}]


def test_tokens_open_what_they_are_for(door: Door) -> None:
    parts = Parts()
    xorb, shards = f"{door.cas}/v1/xorbs/default/{parts.name}", f"{door.cas}/v1/shards"
    assert door.ask("write", READ_TOKEN)[0] == 403
    assert door.ask("read", "hf_unknown")[0] == 401
    assert send("GET", f"{door.api}/xet-read-token/nowhere", token=TOKEN)[0] == 404
    for address in (xorb, shards):
        assert send("POST", address, parts.xorb)[0] == 401
        assert send("POST", address, parts.xorb, TOKEN)[0] == 401, "a token of the Hub"
        assert send("POST", address, parts.xorb, door.read)[0] == 403
    assert send("GET", f"{door.cas}/v2/reconstructions/{parts.name}", token=door.write)[0] == 404
    assert send("GET", f"{door.cas}/v2/reconstructions/{parts.name}")[0] == 401


def test_xorb_that_is_not_what_its_name_says(door: Door) -> None:
    parts = Parts()
    address = f"{door.cas}/v1/xorbs/default/{parts.name}"
    changed = parts.xorb[:-1] + b"!"
    for xorb in (changed, parts.xorb[:-1], parts.xorb + b"\0", parts.xorb[: len(parts.pieces[0]) + 8], b"\1" * 20):
        assert send("POST", address, xorb, door.write)[0] == 400
    assert send("POST", address, parts.xorb, door.write) == (200, b'{"was_inserted": true}')
    assert send("POST", address, parts.xorb, door.write) == (200, b'{"was_inserted": false}')


def test_upload_without_the_granted_content(door: Door) -> None:
    parts = Parts()
    request = json.dumps({"length": len(parts.xorb)}).encode()
    status, answer = send("POST", f"{door.cas}/v1/xorb-grants/default/{parts.name}", request, door.write)
    grant = json.loads(answer)
    commit = f"{door.cas}/v1/xorb-commits/default/{parts.name}/grant/{grant['id']}"
    assert status == 201
    assert send("POST", commit, token=door.write)[0] == 404, "nothing has arrived"
    assert send(grant["method"], grant["url"], parts.xorb + b"more")[0] == 400
    assert send(grant["method"], grant["url"], parts.xorb, door.write)[0] == 403, "a token given away"
    assert send(grant["method"], grant["url"], parts.xorb)[0] == 200
    assert send("POST", commit.replace(parts.name, "0" * 64), token=door.write)[0] == 404, "of another xorb"
    assert send("POST", commit, token=door.write)[0] == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "0" * 64}, "not uploaded"),
        ({"proof": bytes(32)}, "prove"),
        ({"root": bytes(32)}, "another hash"),
        ({"sha256": "0" * 64}, "SHA-256"),
    ],
)
def test_shard_that_is_wrong(door: Door, change: dict[str, str | bytes], message: str) -> None:
    parts = Parts()
    send("POST", f"{door.cas}/v1/xorbs/default/{parts.name}", parts.xorb, door.write)
    vars(parts).update(change)
    status, answer = send("POST", f"{door.cas}/v2/shards", parts.shard(), door.write)
    assert (status, message in answer.decode()) == (400, True)


def test_shard_that_is_cut_off_or_too_long(door: Door) -> None:
    parts = Parts()
    send("POST", f"{door.cas}/v1/xorbs/default/{parts.name}", parts.xorb, door.write)
    cut = [parts.shard()[:length] for length in (8, 48, 60, 150, 240)]
    for shard in (*cut, parts.shard(end=1), parts.shard(end=3), parts.shard(size=26)):
        assert send("POST", f"{door.cas}/v1/shards", shard, door.write)[0] == 400


def test_address_gives_only_its_bytes(bench: Bench, door: Door) -> None:
    bench.upload({"random.bin": FILES["random.bin"]})
    (file,) = bench.store.files.values()
    plan = f"{door.cas}/v1/reconstructions/{file.name}"
    status, answer = send("GET", plan, token=door.read, Range="bytes=70000-70001")
    assert status == 200
    ((info,),) = json.loads(answer)["fetch_info"].values()
    start, end = info["url_range"].values()
    assert send("GET", info["url"], Range=f"bytes={start}-{end}")[0] == 206
    assert send("GET", info["url"], Range=f"bytes={start}-{end + 1}")[0] == 403
    assert send("GET", info["url"])[0] == 403
    assert send("GET", info["url"], token=door.read, Range=f"bytes={start}-{end}")[0] == 403
    assert send("GET", plan, token=door.read, Range=f"bytes={file.size}-")[0] == 416


@pytest.mark.parametrize(
    ("size", "digest"),
    [
        (0, "92b2b75604ed3c761f9d6f62392c8a92"),
        (1, "6d7878dfff2f485635d39013278ae14f"),
        (1024, "75c46f6f3d9eb4f55ecaaee480db732e"),
        (1025, "357dc55de0c7e382c900fd6e320acc04"),
        (102400, "1c35d1a5811083fd7119f5d5d1ba027b"),
    ],
)
def test_blake3_agrees_with_its_published_vectors(size: int, digest: str) -> None:
    message = bytes(i % 251 for i in range(size))
    assert xet.blake3([message], b"whats the Elvish word for friend")[0].hex()[:32] == digest


def test_lz4_of_a_repeated_pattern() -> None:
    out = bytearray()
    xet.lz4_block(bytes([0x2F, *b"ab", 2, 0, 255, 6, 0x10, *b"z"]), out)
    assert out == b"ab" * 141 + b"z"


def test_lz4_match_before_the_start() -> None:
    with pytest.raises(HubError, match="before the start"):
        xet.lz4_block(bytes([0x10, *b"a", 2, 0, 0x10, *b"z"]), bytearray())
