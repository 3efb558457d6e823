"""A hub on the loopback: the requests that ``huggingface_hub`` makes to publish and download models, and faults on demand.

Answers follow https://huggingface.co/docs/hub/api and what the client reads of them. Tests start one per test.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "t0psecret" * 3
READER = "hf_" + "reader000" * 3
USERS = {TOKEN: "alice", READER: "bob"}


class Refused(Exception):  # noqa: N818 - an answer, and none of ours
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass
class Blob:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def git(self) -> str:
        """Git's id of the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        """What LFS calls it."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What a client compares with."""
        return self.sha256 if self.lfs else self.git


@dataclass
class Repo:
    """A repository: commits are (parent, files, message), refs name them."""

    name: str
    private: bool
    commits: dict[str, tuple[str, dict[str, Blob], str]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, parent: str, files: dict[str, Blob], message: str) -> str:
        """A commit, at which the ref then stands."""
        seed = [self.name, parent, message, len(self.commits), sorted((name, file.oid) for name, file in files.items())]
        sha = hashlib.sha1(json.dumps(seed).encode()).hexdigest()
        self.commits[sha] = parent, files, message
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a ``refs/pr/N`` or a commit's id means."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Name -> content."""
        return {name: blob.content for name, blob in self.commits[self.resolve(revision)][1].items()}


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


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    user: str | None
    query: dict[str, list[str]]

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
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                found = action(self, body, **match.groupdict())
                return (
                    found
                    if isinstance(found, tuple)
                    else (200, {"Content-Type": "application/json"}, json.dumps(found).encode())
                )
        raise Refused(404, f"Cannot {self.command} {path}")

    def _repo(self, name: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        if self.user is None and (write or repo is None or repo.private):
            raise Refused(401, "Invalid username or password.")
        if repo is None or (repo.private and name.partition("/")[0] != self.user):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and name.partition("/")[0] != self.user:
            raise Refused(403, f"you, {self.user}, may not write to {name}")
        return repo

    def _json(self, body: bytes) -> Any:
        return json.loads(body or b"{}")

    def create(self, body: bytes) -> Any:
        wanted = self._json(body)
        owner = wanted["organization"] or self.user
        name = f"{owner}/{wanted['name']}"
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if owner != self.user:
            raise Refused(403, f"you, {self.user}, may not create a repository for {owner}")
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo")
        self.hub.create(name, wanted.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def info(self, body: bytes, repo: str, revision: str = "main") -> Any:
        found = self._repo(repo)
        sha = found.resolve(revision)
        return {
            "id": repo,
            "sha": sha,
            "private": found.private,
            "siblings": [_sibling(name, blob) for name, blob in sorted(found.commits[sha][1].items())],
        }

    def tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> Any:
        found = self._repo(repo)
        files = found.commits[found.resolve(revision)][1]
        entries = []
        wanted = {name: blob for name, blob in files.items() if name.startswith((folder or "/").lstrip("/"))}
        if not wanted:
            raise Refused(404, "Entry not found", "EntryNotFound")
        for name, blob in sorted(wanted.items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def branch(self, body: bytes, repo: str, branch: str) -> Any:
        found = self._repo(repo, write=True)
        if branch in found.refs:
            raise Refused(409, "Reference already exists")
        found.refs[branch] = found.refs["main"]
        return {}

    def validate(self, body: bytes) -> Any:
        content = self._json(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else None
        if not isinstance(data, dict):
            errors = [{"message": "metadata must be a mapping"}]
            return 400, {"Content-Type": "application/json"}, json.dumps({"errors": errors, "warnings": []}).encode()
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        found = self._repo(repo, write="create_pr" not in self.query)
        there = found.commits[found.resolve(revision)][1]
        ignored = there[".gitignore"].content.decode().split() if ".gitignore" in there else []
        answers = []
        for file in self._json(body)["files"]:
            name = file["path"]
            large = name.endswith(".safetensors") or file["size"] > 10_000_000
            answer = {"path": name, "uploadMode": "lfs" if large else "regular"}
            answer["shouldIgnore"] = any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
            answers.append(answer | ({"oid": there[name].oid} if name in there else {}))
        return {"files": answers}

    def batch(self, body: bytes, repo: str) -> Any:
        self._repo(repo)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        objects = []
        for wanted in self._json(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}?signature=s3cr3t"}
                if self.hub.chunk and size > self.hub.chunk:
                    count = -(-size // self.hub.chunk)
                    urls = {str(i): f"{self.hub.url}/part/{oid}/{i}?signature=s3cr3t" for i in range(1, count + 1)}
                    upload = {
                        "href": f"{self.hub.url}/complete/{oid}",
                        "header": {"chunk_size": str(self.hub.chunk), **urls},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{oid}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def store(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content's SHA-256 is another")
        self.hub.objects[oid] = body
        return 200, {}, b""

    def part(self, body: bytes, oid: str, number: str) -> Any:
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        return 200, {"ETag": hashlib.sha1(body).hexdigest()}, b""

    def complete(self, body: bytes, oid: str) -> Any:
        parts = self.hub.parts.pop(oid)
        return self.store(b"".join(parts[part["partNumber"]] for part in self._json(body)["parts"]), oid)

    def verified(self, body: bytes, oid: str) -> Any:
        if len(self.hub.objects.get(oid, b"")) != self._json(body)["size"]:
            raise Refused(404, "no such object")
        return {}

    def commit(self, body: bytes, repo: str, revision: str) -> Any:
        proposes = "create_pr" in self.query
        found = self._repo(repo, write=not proposes)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        head = found.resolve(revision)
        files, header = dict(found.commits[head][1]), {}
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(422, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        if header.get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
        ref = f"refs/pr/{number}" if proposes else revision
        sha = found.add(ref, head, files, header["summary"])
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"}
        return answer | ({"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"} if proposes else {})

    def download(self, body: bytes, repo: str, revision: str, name: str) -> Any:
        found = self._repo(repo)
        sha = found.resolve(revision)
        blob = found.commits[sha][1].get(name)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Content-Type": "application/octet-stream"}
        return (
            200,
            headers | ({"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))} if blob.lfs else {}),
            blob.content,
        )

    def collection(self, body: bytes) -> Any:
        wanted = self._json(body)
        slug = f"{wanted['namespace']}/{wanted['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
        known = slug in self.hub.collections
        made = self.hub.collections.setdefault(
            slug,
            {
                **{
                    "slug": slug,
                    "title": wanted["title"],
                    "owner": {"name": wanted["namespace"]},
                    "items": [],
                    "position": 0,
                },
                **{
                    "private": wanted["private"],
                    "theme": "blue",
                    "upvotes": 0,
                    "lastUpdated": "2026-01-01T00:00:00.000Z",
                },
            },
        )
        return (409, {}, json.dumps(made).encode()) if known else made

    def collected(self, body: bytes, slug: str) -> Any:
        if slug not in self.hub.collections:
            raise Refused(404, "Collection not found")
        items, item = self.hub.collections[slug]["items"], self._json(body)["item"]
        if any(other["id"] == item["id"] for other in items):
            raise Refused(409, "already there")
        items.append({"_id": str(len(items)), "id": item["id"], "type": item["type"], "position": len(items)})
        return self.hub.collections[slug]

    def collection_of(self, body: bytes, slug: str) -> Any:
        return self.hub.collections[slug]


def _sibling(name: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": len(blob.content), "blobId": blob.git}
    if blob.lfs:
        entry["lfs"] = {"size": len(blob.content), "sha256": blob.sha256, "pointerSize": 130}
    return entry


_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", "/api/collections", _Handler.collection),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", _Handler.collection_of),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", _Handler.collected),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}(?P<folder>/.*)?", _Handler.tree),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.store),
    ("PUT", r"/part/(?P<oid>[0-9a-f]+)/(?P<number>\d+)", _Handler.part),
    ("POST", "/complete/(?P<oid>[0-9a-f]+)", _Handler.complete),
    ("POST", "/verify/(?P<oid>[0-9a-f]+)", _Handler.verified),
    ("GET", rf"/{_REPO}/resolve/{_REV}/(?P<name>.+)", _Handler.download),
]
