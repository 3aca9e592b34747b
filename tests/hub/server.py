"""A Hugging Face Hub on this machine, in memory, for tests that speak to it with the real clients.

Each handler of a request is in a table of routes: those of reading are in `reading`, those of writing in `writing`.
Large files are served from a second address, as the Hub serves them from other hosts than its own: clients treat that
differently, and must not send their token there.
"""

import re
from urllib.parse import unquote

from tests.hub import reading, writing
from tests.hub.state import PAGE, READ_TOKEN, REPO, TOKEN, USER, Hub, Route
from tests.hub.store import StoreError
from tests.hub.wire import Call, Fault, HubError, Listener, Reply, Request, shortened
from tests.hub.xet import XetStore

__all__ = ["PAGE", "READ_TOKEN", "REPO", "TOKEN", "USER", "Call", "Fault", "HubServer", "Route"]


class HubServer(Hub):
    """The server, to be used in a `with` statement."""

    def __init__(self) -> None:
        self._listeners = [Listener(self._answer), Listener(self._answer)]
        super().__init__(*(listener.url for listener in self._listeners))
        self.xet = XetStore()  # whether clients use it is their setting
        self.routes: list[Route] = [*reading.ROUTES, *writing.ROUTES, *self.xet.routes()]
        self.requests: list[Call] = []
        self.errors: list[Exception] = []  # mistakes of the server itself

    def __enter__(self) -> "HubServer":
        for listener in self._listeners:
            listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.stop()
        if self.errors:
            raise self.errors[0]

    def _answer(self, request: Request) -> tuple[Reply, int | None]:
        with self.lock:
            self.requests.append(Call(request.method, request.target, request.headers))
            if fault := self.take_fault(request, "status"):
                return HubError(fault.status, "A failure that the test ordered").reply(), None
            reply = self._handle(request)
            if request.method == "HEAD" or reply.status >= 300 or not reply.body:
                return reply, None
            fault = self.take_fault(request, "cut", "truncate")
            if fault is None:
                return reply, None
            return (reply, fault.after) if fault.kind == "cut" else (shortened(reply, fault.after), None)

    def _handle(self, request: Request) -> Reply:
        try:
            for route in self.routes:
                method = "GET" if request.method == "HEAD" else request.method
                if route.method == method and (match := re.fullmatch(route.path, request.path)):
                    groups = {name: unquote(value) if value else value for name, value in match.groupdict().items()}
                    return route.handler(self, request, **groups)
            raise HubError(404, f"Sorry, nothing is at {request.path}")
        except HubError as error:
            return error.reply()
        except StoreError as error:
            return HubError(400, str(error)).reply()
        except Exception as error:
            self.errors.append(error)
            return HubError(500, f"{type(error).__name__}: {error}").reply()
