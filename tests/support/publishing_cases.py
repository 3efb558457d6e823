"""What tests of publishing share: a push to the hub for tests, and what lies in folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hub_server import HubServer

import upcycle
from upcycle.files.local_names import LOCAL_NAMES_FILE as LOCAL_FILE
from upcycle.progress import Progress

REPO = "alice/moe"


class Notes(Progress):
    """Keeps what is noted, and calls when a phase begins."""

    def __init__(self, began: Callable[[str], None] = lambda title: None) -> None:
        self.notes: list[str] = []
        self._began = began

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[None]:
        self._began(title)
        yield

    def note(self, message: str) -> None:
        self.notes.append(message)


def push(out: Path, hub: HubServer, repo: str = REPO, **options: Any) -> Any:
    return upcycle.push(out, repo, endpoint=hub.url, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """What is for the public: not where things lie on this machine."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name != LOCAL_FILE)
    return {path.name: path.read_bytes() for path in files}


def weights(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def record_again(out: Path) -> None:
    """Make the record and the verification say that the files are as they were meant to be."""
    from upcycle.files import hashing, records

    record = json.loads((out / "upcycle.json").read_text())
    record["files"] = {name: hashing.hash_file(out / name) for name in record["files"] if (out / name).exists()}
    verification = records.read_verification(out)
    (out / "upcycle.json").write_text(json.dumps(record))
    assert verification
    records.write_verification(out, verification)
