"""A hub on the loopback: the requests that ``huggingface_hub`` makes to publish and download models, and faults on demand.

Answers follow https://huggingface.co/docs/hub/api and what the client reads of them. Tests start one per test.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_answers import ROUTES, Answers
from hub_state import Blob, Refused, Repo

TOKEN = "hf_" + "t0psecret" * 3
READER = "hf_" + "reader000" * 3
USERS = {TOKEN: "alice", READER: "bob"}


@dataclass
class Fault:
    """What goes wrong with requests that match, ``times`` times: a status, a connection cut after so many bytes of the request's
    body, or (``lost``) one that is cut after the request was carried out.
    """

    method: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "because the test says so"
    cut: int | None = None
    lost: bool = False
    times: int = 1


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    authorization: str | None
    received: int = 0


class HubServer:
    """State of a hub. ``url`` is its endpoint; ``chunk`` the size of the parts in which it wants larger files, if any."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.slept: list[float] = []
        self.chunk: int | None = None
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        """Serve until the end."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def fail(self, method: str, path: str, **fault: Any) -> Fault:
        """Let requests whose path matches go wrong."""
        self.faults.append(Fault(method, path, **fault))
        return self.faults[-1]

    def create(self, name: str, private: bool = False, **files: bytes) -> Repo:
        """Make a repository, as its owner would on the web."""
        repo = self.repos[name] = Repo(name, private)
        first = {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}
        repo.add("main", "", first | {path: Blob(content, False) for path, content in files.items()}, "initial commit")
        return repo

    def sent(self, method: str, path: str) -> list[Request]:
        """The requests so far that match."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]


class _Handler(Answers, BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        authorization = self.headers.get("Authorization")
        self.user = USERS.get((authorization or "").removeprefix("Bearer "))
        request = Request(self.command, path, authorization)
        if path != "/api/agent-harnesses":  # the client's own question, once in a process; not answered
            self.hub.requests.append(request)
        fault = next(
            (f for f in self.hub.faults if f.times and f.method == self.command and re.search(f.path, path)), None
        )
        if fault:
            fault.times -= 1
        body = self._body(request, fault.cut if fault else None)
        if body is None:
            return self._cut()
        try:
            if fault and fault.status:
                raise Refused(fault.status, fault.message, **fault.headers)
            with self.hub.lock:
                status, headers, content = self._answer(path, body)
        except Refused as refused:
            status, headers, content = refused.status, refused.headers, json.dumps({"error": refused.message}).encode()
        if fault and fault.lost:
            return self._cut()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self, request: Request, most: int | None) -> bytes | None:
        """The request's body; None if it is cut off."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if most is not None and len(body) >= most:
                    request.received = len(body)
                    return None
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length if most is None else min(most, length))
        request.received = len(body)
        return body if most is None else None

    def _answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                found = action(self, body, **match.groupdict())
                return (
                    found
                    if isinstance(found, tuple)
                    else (200, {"Content-Type": "application/json"}, json.dumps(found).encode())
                )
        raise Refused(404, f"Cannot {self.command} {path}")
