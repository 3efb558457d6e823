"""What a hub for tests keeps: repositories with their commits, and what it says no with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field


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
