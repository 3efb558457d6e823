"""Describes one file that is published, and where its content is."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path

from upcycle.files.hashing import hash_bytes


@dataclass(frozen=True)
class Upload:
    """A file to publish. Small files are held in memory as they were checked; weights stay on the disk.

    ``sha256`` is the hash that the content was checked against, so that a file that is changed meanwhile cannot be uploaded.
    """

    name: str
    size: int
    sha256: str
    content: bytes | Path

    @classmethod
    def of(cls, name: str, content: bytes) -> Upload:
        """Return a file that is held in memory."""
        return cls(name, len(content), hash_bytes(content), content)

    def is_at(self, oid: str) -> bool:
        """Return whether ``oid``, the hub's id of a file (SHA-256 if large, git's SHA-1 if small), is that of this file."""
        if oid == self.sha256:
            return True
        if isinstance(self.content, Path):
            return False
        return oid == sha1(b"blob %d\0" % self.size + self.content, usedforsecurity=False).hexdigest()
