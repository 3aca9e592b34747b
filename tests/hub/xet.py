"""A content-addressed store that speaks the Xet protocol, in memory: where the Hub keeps large files.

A client cuts a file into chunks, packs new chunks into xorbs, uploads those, and then registers the file with a
shard: the list of chunk ranges that it consists of. To download, it asks for that list and fetches byte ranges.
"""

import secrets
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _xet

from tests.hub.state import REPO, Hub, Route
from tests.hub.wire import HubError, Reply, Request, byte_range

CAS = "/cas"  # every path of the store starts with it
TOKEN_SECONDS = 3600

SHARD_TAG = b"HFRepoMetaData\0" + bytes.fromhex("556967456a7b815783a5bdd95ccdd14aa9")
SHARD_VERSION = 2
RECORD = 48  # bytes of every record of a shard
LAST_RECORD = b"\xff" * 32
WITH_VERIFICATION = 1 << 31
WITH_SHA256 = 1 << 30

XORB_FOOTER = b"XETBLOB\x01"
LZ4_FRAME = 0x184D2204

CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
TERM_KEY = bytes.fromhex("7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3")
FILE_KEY = bytes(32)

BLAKE3_START = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], np.uint32
)
BLAKE3_ORDER = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
FIRST_BLOCK, LAST_BLOCK, PARENT, ROOT, KEYED = 1, 2, 4, 8, 16


class Chunk(NamedTuple):
    """Where a chunk lies in its xorb, header included, and how long its content is."""

    start: int
    end: int
    size: int


class Xorb(NamedTuple):
    """A xorb as it was uploaded, with the place and the hash of each chunk."""

    data: bytes
    chunks: list[Chunk]
    hashes: list[bytes]


class Term(NamedTuple):
    """Consecutive chunks of one xorb: a piece of a file."""

    xorb: str
    start: int
    end: int
    size: int


class XetFile(NamedTuple):
    """What a shard says of a file; `proofs` are the hashes over the chunks of each term."""

    name: str
    terms: list[Term]
    proofs: list[bytes]
    sha256: str | None

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


class Transfer(NamedTuple):
    """Bytes of a xorb that an address gives without a token: `[start, end)`."""

    xorb: str
    start: int
    end: int


def hash_name(raw: bytes) -> str:
    """How the protocol writes a hash: as four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


# BLAKE3, on many messages at once: numpy has one lane for each 1024 bytes


def rotated(words: np.ndarray, bits: int) -> np.ndarray:
    return words >> np.uint32(bits) | words << np.uint32(32 - bits)


def mixed(state: list[np.ndarray], even: np.ndarray, odd: np.ndarray) -> list[np.ndarray]:
    """Half a round: the four columns of the state at once."""
    a, b, c, d = state
    for words, first, second in ((even, 16, 12), (odd, 8, 7)):
        a = a + b + words
        d = rotated(d ^ a, first)
        c = c + d
        b = rotated(b ^ c, second)
    return [a, b, c, d]


def turned(state: list[np.ndarray], step: int) -> list[np.ndarray]:
    """Turn diagonals of the state into columns, or back."""
    return [np.roll(row, step * i, axis=0) for i, row in enumerate(state)]


def compressed(values: np.ndarray, words: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Chaining values, 8 by lanes, after a block of 16 words; the tail has counter, length and flags."""
    lanes = values.shape[1]
    counter, length, flags = tail
    start = np.broadcast_to(BLAKE3_START[:4, None], (4, lanes))
    state = [values[:4], values[4:], start, np.stack([counter, np.zeros_like(counter), length, flags])]
    for _ in range(7):
        state = mixed(state, words[0:8:2], words[1:8:2])
        state = turned(mixed(turned(state, -1), words[8::2], words[9::2]), 1)
        words = words[BLAKE3_ORDER]
    a, b, c, d = state
    return np.concatenate([a ^ c, b ^ d])


def leaf_values(messages: Sequence[bytes], key: np.ndarray) -> list[np.ndarray]:
    """For each message, one column of 8 words for each 1024 bytes."""
    pieces = [max(1, -(-len(message) // 1024)) for message in messages]
    padded = b"".join(message.ljust(count * 1024, b"\0") for message, count in zip(messages, pieces, strict=True))
    words = np.frombuffer(padded, "<u4").reshape(-1, 16, 16).transpose(1, 2, 0)
    counter = np.concatenate([np.arange(count, dtype=np.uint32) for count in pieces])
    sizes = np.repeat([len(message) for message in messages], pieces) - counter.astype(np.int64) * 1024
    last = np.maximum(np.minimum(sizes, 1024) - 1, 0) // 64  # the last block of each lane
    root = np.where(np.repeat(pieces, pieces) == 1, ROOT, 0)
    values = np.repeat(key[:, None], len(counter), axis=1)
    for block in range(int(last.max()) + 1):
        length = np.clip(sizes - block * 64, 0, 64)
        flags = KEYED | (FIRST_BLOCK if block == 0 else 0) | np.where(last == block, LAST_BLOCK | root, 0)
        tail = np.stack([counter, length, flags]).astype(np.uint32)
        values = np.where(block <= last, compressed(values, words[block], tail), values)
    return np.split(values, np.cumsum(pieces)[:-1], axis=1)


def blake3(messages: Sequence[bytes], key: bytes) -> list[bytes]:
    """The keyed BLAKE3 hash of each message."""
    start = np.frombuffer(key, "<u4").astype(np.uint32)
    rows = leaf_values(messages, start)
    while any(row.shape[1] > 1 for row in rows):
        pairs = [row.shape[1] // 2 for row in rows]
        left = np.concatenate([row[:, : 2 * n : 2] for row, n in zip(rows, pairs, strict=True)], axis=1)
        right = np.concatenate([row[:, 1 : 2 * n : 2] for row, n in zip(rows, pairs, strict=True)], axis=1)
        root = np.concatenate(
            [np.full(n, ROOT if row.shape[1] == 2 else 0) for row, n in zip(rows, pairs, strict=True)]
        )
        tail = np.stack([np.zeros_like(root), np.full_like(root, 64), root | PARENT | KEYED]).astype(np.uint32)
        values = np.repeat(start[:, None], len(root), axis=1)
        parents = np.split(compressed(values, np.concatenate([left, right]), tail), np.cumsum(pairs)[:-1], axis=1)
        rows = [np.concatenate([up, row[:, 2 * n :]], axis=1) for up, row, n in zip(parents, rows, pairs, strict=True)]
    return [row[:, 0].astype("<u4").tobytes() for row in rows]


def families(nodes: Sequence[tuple[bytes, int]]) -> Iterator[Sequence[tuple[bytes, int]]]:
    """Cut nodes into those that share a parent: a hash that is a multiple of four ends a family of 3 to 9."""
    while nodes:
        cut = min(9, len(nodes))
        for i in range(2, cut):
            if struct.unpack_from("<Q", nodes[i][0], 24)[0] % 4 == 0:
                cut = i + 1
                break
        yield nodes[:cut]
        nodes = nodes[cut:]


def tree_hash(hashes: Sequence[bytes], sizes: Sequence[int]) -> bytes:
    """The root over the hashes and sizes of consecutive chunks: the hash of a xorb."""
    nodes = list(zip(hashes, sizes, strict=True))
    while len(nodes) > 1:
        groups = list(families(nodes))
        texts = ["".join(f"{hash_name(name)} : {size}\n" for name, size in group).encode() for group in groups]
        totals = [sum(size for _, size in group) for group in groups]
        nodes = list(zip(blake3(texts, NODE_KEY), totals, strict=True))
    return nodes[0][0]


# the three ways in which a chunk is stored


def copy_match(out: bytearray, distance: int, length: int) -> None:
    """Append bytes that were written before; they may reach into those being written."""
    if not 0 < distance <= len(out):
        raise HubError(400, "LZ4 match before the start of the data")
    start = len(out) - distance
    if distance >= length:
        out += out[start : start + length]
    else:
        out += (bytes(out[start:]) * (length // distance + 1))[:length]


def lz4_block(data: bytes, out: bytearray) -> None:
    """Append the content of an LZ4 block."""
    position = 0

    def extended(length: int) -> int:
        nonlocal position
        more = length == 15
        while more:
            length += data[position]
            more = data[position] == 255
            position += 1
        return length

    while position < len(data):
        token = data[position]
        position += 1
        literals = extended(token >> 4)
        out += data[position : position + literals]
        position += literals
        if position >= len(data):  # the last sequence has no match
            return
        distance = data[position] | data[position + 1] << 8
        position += 2
        copy_match(out, distance, extended(token & 15) + 4)


def lz4_frame(data: bytes) -> bytes:
    """The content of an LZ4 frame; its own checksums are passed over, the hash of the chunk says more."""
    magic, flags = struct.unpack_from("<IB", data)
    if magic != LZ4_FRAME:
        raise HubError(400, "No LZ4 frame")
    position = 7 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0)
    out = bytearray()
    while size := struct.unpack_from("<I", data, position)[0]:
        stored, size = size >> 31, size & 0x7FFFFFFF
        block = data[position + 4 : position + 4 + size]
        if stored:
            out += block
        else:
            lz4_block(block, out)
        position += 4 + size + (4 if flags & 0x10 else 0)
    return bytes(out)


def interleaved(data: bytes) -> bytes:
    """Undo the grouping of bytes by their position modulo four."""
    out = bytearray(len(data))
    position = 0
    for group in range(4):
        length = len(range(group, len(data), 4))
        out[group::4] = data[position : position + length]
        position += length
    return bytes(out)


DECODERS: dict[int, Callable[[bytes], bytes]] = {
    0: bytes,
    1: lz4_frame,
    2: lambda data: interleaved(lz4_frame(data)),
}


def chunks_of(data: bytes) -> list[Chunk]:
    """The places of the chunks of a xorb, which may have a footer."""
    chunks = []
    position = 0
    while position < len(data) and not data.startswith(XORB_FOOTER, position):
        header = data[position : position + 8]
        if len(header) < 8 or header[0] != 0 or header[4] not in DECODERS:
            raise HubError(400, f"No chunk at byte {position} of the xorb")
        end = position + 8 + int.from_bytes(header[1:4], "little")
        chunks.append(Chunk(position, end, int.from_bytes(header[5:8], "little")))
        position = end
    if not chunks:
        raise HubError(400, "A xorb without chunks")
    return chunks


def chunk_content(data: bytes, chunk: Chunk) -> bytes:
    """The content of a chunk of a xorb."""
    try:
        return DECODERS[data[chunk.start + 4]](data[chunk.start + 8 : chunk.end])
    except (IndexError, struct.error):
        raise HubError(400, f"The chunk at byte {chunk.start} of the xorb ends too early") from None


def parse_xorb(name: str, data: bytes) -> Xorb:
    """A xorb, if its content, and the lengths that it tells, have the hash that it is named after."""
    chunks = chunks_of(data)
    hashes = blake3([chunk_content(data, chunk) for chunk in chunks], CHUNK_KEY)
    if hash_name(tree_hash(hashes, [chunk.size for chunk in chunks])) != name:
        raise HubError(400, "The xorb has another hash")
    return Xorb(data, chunks, hashes)


def parse_shard(data: bytes) -> list[XetFile]:
    """The files that a shard registers; what it says of xorbs is known from the xorbs themselves."""
    if data[:40] != SHARD_TAG + struct.pack("<Q", SHARD_VERSION):
        raise HubError(400, "Not a shard of version 2")
    records = (data[at : at + RECORD] for at in range(RECORD, len(data), RECORD))
    files = []
    try:
        while (head := next(records))[:32] != LAST_RECORD:
            flags, count = struct.unpack_from("<II", head, 32)
            terms = [parse_term(next(records)) for _ in range(count)]
            proofs = [next(records)[:32] for _ in range(count)] if flags & WITH_VERIFICATION else []
            sha256 = hash_name(next(records)[:32]) if flags & WITH_SHA256 else None
            files.append(XetFile(hash_name(head[:32]), terms, proofs, sha256))
    except (StopIteration, struct.error):
        raise HubError(400, "The shard is cut off") from None
    return files


def parse_term(record: bytes) -> Term:
    size, start, end = struct.unpack_from("<III", record, 36)
    return Term(hash_name(record[:32]), start, end, size)


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges without overlaps, in order."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


class XetStore:
    """Xorbs and the files made of them, with the answers to a client's requests.

    Everything that a client uploads is checked: a xorb against its hash; a file against its own hash, the SHA-256
    that the Hub knows it by, and the proofs that the client has the chunks which it refers to.
    """

    def __init__(self) -> None:
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, XetFile] = {}
        self.tokens: dict[str, tuple[str, int]] = {}  # what each may be used for, and until when
        self.grants: dict[str, tuple[str, int]] = {}  # for each upload that was allowed, the xorb and its length
        self.uploads: dict[str, bytes] = {}  # what was sent for a grant and not yet committed
        self.transfers: dict[str, Transfer] = {}

    def content(self, file: XetFile) -> bytes:
        """The bytes of a file, put together from its chunks."""
        parts = [(self.xorbs[term.xorb], term) for term in file.terms]
        return b"".join(
            chunk_content(xorb.data, chunk) for xorb, term in parts for chunk in xorb.chunks[term.start : term.end]
        )

    # tokens

    def token(self, hub: Hub, request: Request, kind: str, id: str, scope: str, revision: str) -> Reply:
        """A new token to read or to write; one part of the client reads the body of this, another the headers."""
        repo = (hub.writable if scope == "write" else hub.downloadable)(request, kind, id)
        hub.revision(repo, revision)
        url, name, expiry = hub.storage_url + CAS, f"xet_{secrets.token_hex(16)}", int(time.time()) + TOKEN_SECONDS
        self.tokens[name] = scope, expiry
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": name, "X-Xet-Token-Expiration": str(expiry)}
        return Reply.json({"casUrl": url, "accessToken": name, "exp": expiry}, headers=headers)

    def authorise(self, request: Request, scope: str) -> None:
        """Refuse those without a token for this; the Hub's own tokens are not valid here."""
        granted, expiry = self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "), ("", 0))
        if expiry < time.time():
            raise HubError(401, "No valid token")
        if granted != "write" and granted != scope:
            raise HubError(403, f"This token is to {granted} only")

    # uploads

    def put_xorb(self, name: str, data: bytes) -> Reply:
        """Keep a xorb."""
        inserted = name not in self.xorbs
        if inserted:
            self.xorbs[name] = parse_xorb(name, data)
        return Reply.json({"was_inserted": inserted})

    def upload_xorb(self, hub: Hub, request: Request, name: str) -> Reply:
        """A xorb in a single request, as older clients send it."""
        self.authorise(request, "write")
        return self.put_xorb(name, request.body)

    def grant_upload(self, hub: Hub, request: Request, name: str) -> Reply:
        """Where to send a xorb, unless it is here."""
        self.authorise(request, "write")
        if name in self.xorbs:
            return Reply.json({})
        grant = secrets.token_hex(16)
        self.grants[grant] = name, request.json()["length"]
        url = f"{hub.storage_url}{CAS}/uploads/{grant}"
        return Reply.json({"id": grant, "method": "PUT", "url": url, "headers": {}}, 201)

    def take_upload(self, hub: Hub, request: Request, grant: str) -> Reply:
        """A xorb, sent to an address that needs no token."""
        if grant not in self.grants or "authorization" in request.headers:
            raise HubError(403, "No such grant, or a token that does not belong here")
        if len(request.body) != self.grants[grant][1]:
            raise HubError(400, "Not the announced length")
        self.uploads[grant] = request.body
        return Reply()

    def commit_upload(self, hub: Hub, request: Request, name: str, grant: str) -> Reply:
        """The xorb was sent to the address that was granted."""
        self.authorise(request, "write")
        if grant not in self.uploads or self.grants[grant][0] != name:
            raise HubError(404, "Nothing was uploaded for this grant")
        return self.put_xorb(name, self.uploads.pop(grant))

    def check_file(self, file: XetFile) -> None:
        """Refuse a file that is not what its shard says."""
        parts = []
        for term in file.terms:
            xorb = self.xorbs.get(term.xorb)
            if xorb is None or not 0 <= term.start < term.end <= len(xorb.chunks):
                raise HubError(400, "The shard refers to chunks that were not uploaded")
            parts.append((xorb.hashes[term.start : term.end], [c.size for c in xorb.chunks[term.start : term.end]]))
            if sum(parts[-1][1]) != term.size:
                raise HubError(400, "A term of the shard has a wrong length")
        if blake3([b"".join(hashes) for hashes, _ in parts], TERM_KEY) != file.proofs:
            raise HubError(400, "The shard does not prove that the client has the chunks")
        root = tree_hash([h for hashes, _ in parts for h in hashes], [size for _, sizes in parts for size in sizes])
        if hash_name(blake3([root], FILE_KEY)[0]) != file.name:
            raise HubError(400, "The file has another hash")

    def register(self, hub: Hub, request: Request) -> Reply:
        """New files: the Hub has them from now on, for commits and for clients that do not know Xet."""
        self.authorise(request, "write")
        for file in parse_shard(request.body):
            self.check_file(file)
            hub.blobs.put(self.content(file), sha256=file.sha256, xet=file.name)
            self.files[file.name] = file
        return Reply.json({"result": 1})

    def register_streaming(self, hub: Hub, request: Request) -> Reply:
        """The same, answered with lines that tell how far it is; the last is enough."""
        self.register(hub, request)
        return Reply(200, b'{"type": "result"}\n', {"Content-Type": "application/x-ndjson"})

    def known_chunk(self, hub: Hub, request: Request, name: str) -> Reply:
        """Which xorbs have a chunk: it is allowed to know of none, and then the client uploads its own."""
        self.authorise(request, "read")
        raise HubError(404, f"No xorb is known to have the chunk {name}")

    # downloads

    def plan(self, file: XetFile, first: int, end: int) -> tuple[int, list[Term]]:
        """The chunks that have the bytes `[first, end)` of a file, and where in the first chunk those start."""
        terms: list[Term] = []
        skipped = position = 0
        for term in file.terms:
            sizes: dict[int, int] = {}  # of the chunks that are needed
            for index in range(term.start, term.end):
                size = self.xorbs[term.xorb].chunks[index].size
                if position < end and first < position + size:
                    skipped = skipped if terms or sizes else first - position
                    sizes[index] = size
                position += size
            if sizes:
                terms.append(Term(term.xorb, min(sizes), max(sizes) + 1, sum(sizes.values())))
        return skipped, terms

    def transfer(self, hub: Hub, name: str, start: int, end: int) -> dict[str, Any]:
        """An address for chunks of a xorb, which needs no token and has these bytes only."""
        chunks = self.xorbs[name].chunks
        key, transfer = secrets.token_hex(16), Transfer(name, chunks[start].start, chunks[end - 1].end)
        self.transfers[key] = transfer
        return {
            "url": f"{hub.storage_url}{CAS}/transfers/{key}",
            "chunks": {"start": start, "end": end},
            "bytes": {"start": transfer.start, "end": transfer.end - 1},
        }

    def reconstruct(self, hub: Hub, request: Request, version: str, name: str) -> Reply:
        """How to put a file, or a range of it, together; and addresses for what that takes, by xorb."""
        self.authorise(request, "read")
        if name not in self.files:
            raise HubError(404, "No such file")
        file = self.files[name]
        skipped, terms = self.plan(file, *(byte_range(request.headers.get("range"), file.size) or (0, file.size)))
        answer: dict[str, Any] = {
            "offset_into_first_range": skipped,
            "terms": [
                {"hash": t.xorb, "unpacked_length": t.size, "range": {"start": t.start, "end": t.end}} for t in terms
            ],
        }
        transfers = {
            xorb: [self.transfer(hub, xorb, *span) for span in joined([t[1:3] for t in terms if t.xorb == xorb])]
            for xorb in {t.xorb for t in terms}
        }
        if version == "1":
            answer["fetch_info"] = {
                xorb: [{"url": p["url"], "range": p["chunks"], "url_range": p["bytes"]} for p in parts]
                for xorb, parts in transfers.items()
            }
        else:
            answer["xorbs"] = {
                xorb: [{"url": p["url"], "ranges": [{"chunks": p["chunks"], "bytes": p["bytes"]}]} for p in parts]
                for xorb, parts in transfers.items()
            }
        return Reply.json(answer)

    def send_bytes(self, hub: Hub, request: Request, key: str) -> Reply:
        """Chunks of a xorb."""
        transfer = self.transfers.get(key)
        if transfer is None or "authorization" in request.headers:
            raise HubError(403, "No such address, or a token that does not belong here")
        if request.headers.get("range") != f"bytes={transfer.start}-{transfer.end - 1}":
            raise HubError(403, "Not the bytes that this address is for")
        data = self.xorbs[transfer.xorb].data
        headers = {"Content-Range": f"bytes {transfer.start}-{transfer.end - 1}/{len(data)}"}
        return Reply(206, data[transfer.start : transfer.end], headers)

    def routes(self) -> list[Route]:
        """What the store answers, to be added to the routes of a Hub; older clients use the first of two versions."""
        name, grant, key = "(?P<name>[0-9a-f]{64})", "(?P<grant>[0-9a-f]+)", "(?P<key>[0-9a-f]+)"
        return [
            Route("GET", f"/api/{REPO}/xet-(?P<scope>read|write)-token/(?P<revision>[^/]+)", self.token),
            Route("POST", f"{CAS}/v1/xorbs/default/{name}", self.upload_xorb),
            Route("POST", f"{CAS}/v1/xorb-grants/default/{name}", self.grant_upload),
            Route("PUT", f"{CAS}/uploads/{grant}", self.take_upload),
            Route("POST", f"{CAS}/v1/xorb-commits/default/{name}/grant/{grant}", self.commit_upload),
            Route("POST", f"{CAS}(?:/v1)?/shards", self.register),
            Route("POST", f"{CAS}/v2/shards", self.register_streaming),
            Route("GET", f"{CAS}/v1/chunks/[a-z-]+/{name}", self.known_chunk),
            Route("GET", f"{CAS}/v(?P<version>[12])/reconstructions/{name}", self.reconstruct),
            Route("GET", f"{CAS}/transfers/{key}", self.send_bytes),
        ]


def enable_client(monkeypatch: pytest.MonkeyPatch, cache: Path, **settings: str) -> None:
    """Let huggingface_hub use Xet, as if it had not before, with settings of `hf_xet` and an empty folder for it.

    That library reads the environment when a session begins; where its log goes, when it is imported.
    """
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(cache))
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    for name, value in settings.items():
        monkeypatch.setenv(f"HF_XET_{name}", value)
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    monkeypatch.setattr(_xet, "XET_CONNECTION_INFO_CACHE", {})
