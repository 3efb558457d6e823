"""What a hub for tests answers, one method per request of https://huggingface.co/docs/hub/api, and which paths they are."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import yaml
from hub_state import Blob, Refused, Repo


class Answers:
    """Methods take the request's body and the parts of its path; what they return is sent as JSON, a tuple as it is."""

    hub: Any
    user: str | None
    query: dict[str, list[str]]

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
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", Answers.create),
    ("POST", "/api/validate-yaml", Answers.validate),
    ("POST", "/api/collections", Answers.collection),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", Answers.collection_of),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", Answers.collected),
    ("GET", f"/api/models/{_REPO}", Answers.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", Answers.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}(?P<folder>/.*)?", Answers.tree),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>.+)", Answers.branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", Answers.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", Answers.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Answers.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", Answers.store),
    ("PUT", r"/part/(?P<oid>[0-9a-f]+)/(?P<number>\d+)", Answers.part),
    ("POST", "/complete/(?P<oid>[0-9a-f]+)", Answers.complete),
    ("POST", "/verify/(?P<oid>[0-9a-f]+)", Answers.verified),
    ("GET", rf"/{_REPO}/resolve/{_REV}/(?P<name>.+)", Answers.download),
]
