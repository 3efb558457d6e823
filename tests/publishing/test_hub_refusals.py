"""What is refused before anything is published, and what ``force`` does about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from publishing_cases import REPO, Notes, contents, push, weights

import upcycle
from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError, UsageError, VerificationError


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("moe", "has no owner"),
        ("a/b/c", "not the name of a repository"),
        ("alice/m e", "not the name of a repository"),
        ("alice/", "not the name"),
    ],
)
def test_names_that_are_none_are_refused_before_anything_is_sent(
    hub: HubServer, out: Path, repo: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        push(out, hub, repo)
    with pytest.raises(UsageError, match="not the name of a branch"):
        push(out, hub, revision="../main")
    assert not hub.requests


def test_a_repository_with_other_content_is_left_alone(hub: HubServer, out: Path) -> None:
    repo = hub.create(REPO, **{"pytorch_model.bin": b"old", "README.md": b"# mine"})
    with pytest.raises(UsageError, match=r"holds something else: README.md, pytorch_model.bin"):
        push(out, hub)
    assert repo.files()["pytorch_model.bin"] == b"old"
    push(out, hub, overwrite=True)
    assert set(repo.files()) == set(contents(out)) | {".gitattributes"}


def test_a_private_model_is_not_pushed_to_a_public_repository(hub: HubServer, out: Path) -> None:
    hub.create(REPO)
    with pytest.raises(UsageError, match="exists and is public"):
        push(out, hub, private=True)


def test_nothing_to_change_where_a_pull_request_needs_a_repository(hub: HubServer, out: Path) -> None:
    with pytest.raises(UsageError, match="there is no repository alice/moe"):
        push(out, hub, create_pr=True)
    hub.create(REPO)
    with pytest.raises(UsageError, match=r"there is no revision 'refs/pr/3'"):
        push(out, hub, revision="refs/pr/3")


def test_no_token_no_network_offline(hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        EnvironmentFault, match=r"cannot look at alice/moe: the connection to http://127.0.0.1:9 failed"
    ):
        upcycle.push(out, REPO, endpoint="http://127.0.0.1:9")
    progress = Notes()
    assert upcycle.push(out, REPO, endpoint="http://127.0.0.1:9", dry_run=True, progress=progress).commit is None
    assert any("what the repository holds is not known" in note for note in progress.notes)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE is set"):
        push(out, hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_\u00e9")
    with pytest.raises(EnvironmentFault, match="holds characters that tokens cannot have"):
        push(out, hub)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(EnvironmentFault, match="there is no token"):
        push(out, hub)
    assert not hub.requests


def test_folders_that_must_not_be_published(hub: HubServer, out: Path, tmp_path: Path) -> None:
    def refused(kind: type[UpcycleError], words: str, folder: Path = out, **options: Any) -> None:
        with pytest.raises(kind, match=words):
            push(folder, hub, **options)

    (tmp_path / "strange").mkdir()
    refused(CheckpointError, "has no upcycle.json", tmp_path / "strange")
    refused(UsageError, "no such folder", tmp_path / "none")
    (tmp_path / "run.partial").mkdir()
    for name in ("run", "run.partial"):
        refused(UsageError, "is not finished", tmp_path / name)
    (out / "journal.jsonl").touch()
    refused(UsageError, "is not finished")
    (out / "journal.jsonl").unlink()
    refused(VerificationError, "never published", out.rename(tmp_path / "moe.failed"), force=True)
    (tmp_path / "moe.failed").rename(out)
    (out / "verification.json").rename(tmp_path / "kept.json")
    refused(UsageError, "was not verified")
    (out / "upcycle.json").write_text((out / "upcycle.json").read_text() + "\n")
    (tmp_path / "kept.json").rename(out / "verification.json")
    refused(UsageError, "was not verified since its files were written")
    upcycle.verify(out, tokens=64)
    data = bytearray(weights(out)[0].read_bytes())
    data[-1] ^= 1
    weights(out)[0].write_bytes(data)
    refused(CheckpointError, "is not the file that was written", force=True)
    assert not hub.requests


def test_force_marks_the_card(hub: HubServer, out: Path) -> None:
    from upcycle.files import records

    result = json.loads((out / "verification.json").read_text())
    records.write_verification(out, result | {"verdict": "broken", "explanation": "it is *off* by <b>2</b>"})
    with pytest.raises(VerificationError, match="is broken"):
        push(out, hub)
    assert push(out, hub, force=True).mark
    card = hub.repos[REPO].files()["README.md"].decode()
    assert "**Do not rely on this model.** Its verification failed: it is \\*off\\* by &lt;b\\>2&lt;/b\\>." in card
    (out / "verification.json").unlink()
    push(out, hub, force=True)
    assert "published without being verified" in hub.repos[REPO].files()["README.md"].decode()
    assert "verification.json" not in hub.repos[REPO].files()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_licence_that_the_hub_does_not_know_is_refused_at_once(hub: HubServer, out: Path, dry_run: bool) -> None:
    with pytest.raises(UsageError, match="not a licence that the hub knows"):
        push(out, hub, license="proprietary-v3", dry_run=dry_run)
    assert not hub.requests


def test_metadata_that_the_hub_refuses_is_found_before_anything_is_sent(
    hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hub_server

    errors = json.dumps({"errors": [{"message": '"base_model" is no model'}], "warnings": []}).encode()
    answer = 400, {"Content-Type": "application/json"}, errors
    refuses = ("POST", "/api/validate-yaml", lambda self, body: answer)
    monkeypatch.setattr(hub_server, "ROUTES", [refuses, *hub_server.ROUTES])
    with pytest.raises(UsageError, match='"base_model" is no model'):
        push(out, hub)
    assert not hub.repos
    assert not hub.objects
