"""HTTP beneath the local Hub: requests, replies, and the failures that a test may order."""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote


@dataclass(frozen=True)
class Request:
    """What a client sent; header names are in lower case."""

    method: str
    target: str  # as sent: percent-encoded, with the query
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def path(self) -> str:
        """The path without the query, still percent-encoded: an encoded slash is part of a name."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, list[str]]:
        """The parameters of the query."""
        return parse_qs(self.target.partition("?")[2])

    def parameter(self, name: str) -> str | None:
        """The first value of a parameter of the query."""
        return self.query.get(name, [None])[0]

    def json(self) -> Any:
        """The body as JSON."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from error


@dataclass(frozen=True)
class Reply:
    """What the server answers."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> "Reply":
        """A reply with a JSON body; what JSON has no type for, such as dates of a YAML header, is sent as text."""
        body = json.dumps(value, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


class HubError(Exception):
    """A request that is refused; `code` is what clients tell the kinds of refusals apart by."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}

    def reply(self) -> Reply:
        """The reply in the Hub's form: the message in the body and in a header, the code in a header."""
        # a header has one line of latin-1
        headers = {"X-Error-Message": " ".join(self.message.split()).encode("latin-1", "replace").decode("latin-1")}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return Reply.json({"error": self.message}, self.status, {**headers, **self.headers})


@dataclass
class Fault:
    """A failure to be played: the first `times` requests that match are affected.

    status: nothing is done, and the reply has the `status`.
    cut: the connection ends after `after` bytes of the body, though the headers announced all of it.
    truncate: the body ends after `after` bytes, and the headers of this reply agree with that.
    stale_parent: someone else commits to the branch right before the client's commit is applied.
    """

    kind: Literal["status", "cut", "truncate", "stale_parent"]
    path: str = ""  # regular expression, searched in the decoded path with its query
    method: str | None = None
    status: int = 503
    times: int = 1
    after: int = 0

    def matches(self, request: Request) -> bool:
        """Whether the request is one that this fault affects."""
        return (
            self.times > 0
            and self.method in (None, request.method)
            and re.search(self.path, unquote(request.target)) is not None
        )


class Call(NamedTuple):
    """A request that arrived."""

    method: str
    path: str  # percent-encoded, with the query
    headers: Mapping[str, str]


App = Callable[[Request], tuple[Reply, int | None]]  # the number: how many bytes of the body to send before a cut


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end of the range asked for; None where all is to be sent."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
    if start >= end:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def content(request: Request, data: bytes, headers: Mapping[str, str]) -> Reply:
    """The content of a file, or the range of it that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    span = byte_range(request.headers.get("range"), len(data))
    if span is None:
        return Reply(200, data, headers)
    start, end = span
    return Reply(206, data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


def shortened(reply: Reply, length: int) -> Reply:
    """The reply with a shorter body, in agreement with its headers."""
    body, headers = reply.body[:length], dict(reply.headers)
    if match := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", "")):
        start = int(match.group(1))
        headers["Content-Range"] = f"bytes {start}-{max(start + len(body) - 1, start)}/{match.group(2)}"
    return Reply(reply.status, body, headers)


class Handler(BaseHTTPRequestHandler):
    """Reads requests from a connection and sends what the app replies."""

    protocol_version = "HTTP/1.1"
    server_version = "LocalHub"
    disable_nagle_algorithm = True  # headers and body are written apart, which would wait for each other
    server: "Listener"

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        with contextlib.suppress(ConnectionError):  # a client may leave at any time
            reply, cut = self.server.app(Request(self.command, self.path, headers, self._body()))
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[:cut])
            if cut is not None:
                self.close_connection = True

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(iter(self._chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().partition(b";")[0], 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Listener(ThreadingHTTPServer):
    """An address on this machine where the app answers."""

    def __init__(self, app: App) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.app = app
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def close_request(self, request: Any) -> None:
        """Forget a connection."""
        self._connections.discard(request)
        super().close_request(request)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more, not on connections that are open either."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # its client left
                connection.shutdown(socket.SHUT_RDWR)
