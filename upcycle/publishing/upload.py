"""One file that is published, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path

from upcycle.files.hashing import hash_bytes


@dataclass(frozen=True)
class Upload:
    """A file to publish: small ones are held as they were when they were checked, weights stay where they are.

    ``sha256`` is what their content was checked against: a file that is changed meanwhile cannot be uploaded under it.
    """

    name: str
    size: int
    sha256: str
    content: bytes | Path

    @classmethod
    def of(cls, name: str, content: bytes) -> Upload:
        """One that is held in memory."""
        return cls(name, len(content), hash_bytes(content), content)

    def is_at(self, oid: str) -> bool:
        """Whether that is what the hub has: the SHA-256 of a large file, git's SHA-1 of a small one."""
        if oid == self.sha256:
            return True
        if isinstance(self.content, Path):
            return False
        return oid == sha1(b"blob %d\0" % self.size + self.content, usedforsecurity=False).hexdigest()
