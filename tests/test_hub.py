"""Publishing, end to end: the real client against a hub on the loopback, also when the line is cut and the hub says no."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_server import READER, TOKEN, HubServer
from huggingface_hub import constants, snapshot_download

import upcycle
from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError, UsageError, VerificationError
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
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def weights(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def record_again(out: Path) -> None:
    """Make the record and the verification say that the files are as they were meant to be."""
    from upcycle import provenance

    record = json.loads((out / "upcycle.json").read_text())
    record["files"] = {name: provenance.hash_file(out / name) for name in record["files"] if (out / name).exists()}
    verification = provenance.read_verification(out)
    (out / "upcycle.json").write_text(json.dumps(record))
    assert verification
    provenance.write_verification(out, verification)


@pytest.mark.parametrize("chunk", [None, 50_000], ids=["whole", "in parts"])
def test_what_is_downloaded_is_what_was_pushed(hub: HubServer, out: Path, tmp_path: Path, chunk: int | None) -> None:
    hub.chunk = chunk
    result = push(out, hub)
    assert result.url == f"{hub.url}/{REPO}"
    assert result.bytes_total == result.bytes_to_send == sum(map(len, contents(out).values()))
    assert {file.status for file in result.files} == {"new"}
    there = Path(snapshot_download(REPO, endpoint=hub.url, local_dir=tmp_path / "there"))
    assert {name: data for name, data in contents(there).items() if name != ".gitattributes"} == contents(out)
    assert len(hub.repos[REPO].commits) == 2  # the hub's own first one, and one with everything
    assert upcycle.verify(there, tokens=64).verdict == "exact"


def test_a_pushed_model_loads_in_stock_transformers(hub: HubServer, out: Path, tmp_path: Path) -> None:
    push(out, hub, private=True)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"ids = AutoTokenizer.from_pretrained({REPO!r})('def f(x):', return_tensors='pt').input_ids\n"
        f"there, here = (AutoModelForCausalLM.from_pretrained(name) for name in ({REPO!r}, sys.argv[1]))\n"
        "assert torch.equal(there(ids).logits, here(ids).logits)\n"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-P", "-c", code, str(out)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO].private


def test_pushing_again_sends_what_changed_and_removes_what_is_gone(hub: HubServer, out: Path) -> None:
    push(out, hub)
    assert push(out, hub).commit is None
    repo = hub.repos[REPO]
    repo.add("main", repo.refs["main"], repo.commits[repo.refs["main"]][1] | {"notes.md": _blob(b"mine")}, "by hand")
    gone = weights(out)[-1]
    gone.unlink()
    record_again(out)
    before = len(hub.sent("PUT", "/lfs/"))
    result = push(out, hub)
    assert [file.name for file in result.files if file.status == "deleted"] == [gone.name]
    assert len(hub.sent("PUT", "/lfs/")) == before
    assert set(repo.files()) == set(contents(out)) | {".gitattributes", "notes.md"}
    assert repo.files()["upcycle.json"] == (out / "upcycle.json").read_bytes()


def _blob(content: bytes) -> Any:
    from hub_server import Blob

    return Blob(content, False)


def test_a_pull_request_leaves_main_alone(hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.create(REPO)
    monkeypatch.setenv("HF_TOKEN", READER)  # bob may not write to alice's
    with pytest.raises(EnvironmentFault, match="you may not write to alice/moe"):
        push(out, hub)
    result = push(out, hub, create_pr=True)
    assert result.pull_request == result.url == f"{hub.url}/{REPO}/discussions/1"
    assert set(repo.files()) == {".gitattributes"}
    assert set(repo.files("refs/pr/1")) == set(contents(out)) | {".gitattributes"}


def test_a_branch_and_a_collection(hub: HubServer, out: Path) -> None:
    result = push(out, hub, revision="v2", collection="My experts")
    assert result.url == f"{hub.url}/{REPO}/tree/v2"
    assert set(hub.repos[REPO].files("main")) == {".gitattributes"}
    assert "config.json" in hub.repos[REPO].files("v2")
    (slug,) = hub.collections
    again = push(out, hub, revision="v2", collection=slug)
    assert again.collection == result.collection == f"{hub.url}/collections/{slug}"
    assert [item["id"] for item in hub.collections[slug]["items"]] == [REPO]
    with pytest.raises(UsageError, match=f"{REPO}/tree/v2 is published, but: cannot add"):
        push(out, hub, revision="v2", collection="alice/none-1")


def test_a_cut_in_the_middle_of_an_upload_is_made_good(hub: HubServer, out: Path) -> None:
    fault = hub.fail("PUT", "/lfs/", cut=10_000)
    push(out, hub)
    assert fault.times == 0
    assert hub.repos[REPO].files()[weights(out)[0].name] == weights(out)[0].read_bytes()


def test_after_a_lasting_cut_the_same_command_sends_only_the_rest(hub: HubServer, out: Path) -> None:
    last = weights(out)[-1]
    fault = hub.fail("PUT", hashlib.sha256(last.read_bytes()).hexdigest(), cut=1000, times=99)
    with pytest.raises(EnvironmentFault, match=f"cannot upload {last.name}: the connection .* failed") as caught:
        push(out, hub)
    assert "same command again" in (caught.value.hint or "")
    assert set(hub.repos[REPO].files()) == {".gitattributes"}  # nothing of it is visible
    fault.times = 0
    hub.requests.clear()
    push(out, hub)
    assert [request.received for request in hub.sent("PUT", "/lfs/")] == [last.stat().st_size]
    assert set(hub.repos[REPO].files()) == set(contents(out)) | {".gitattributes"}


def test_a_commit_whose_answer_is_lost_is_made_once(hub: HubServer, out: Path) -> None:
    hub.fail("POST", "/commit/", lost=True)
    result = push(out, hub)
    assert result.commit == hub.repos[REPO].refs["main"]
    assert len(hub.repos[REPO].commits) == 2


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub: HubServer, out: Path) -> None:
    hub.create(REPO)
    hub.fail("POST", "/commit/", lost=True)
    with pytest.raises(EnvironmentFault, match="did not say whether") as caught:
        push(out, hub, create_pr=True)
    assert f"{REPO}/discussions" in (caught.value.hint or "")
    assert list(hub.repos[REPO].refs) == ["main", "refs/pr/1"]


def test_a_busy_hub_is_given_the_time_it_asks_for(hub: HubServer, out: Path) -> None:
    for method, path in (("GET", "/api/models/"), ("POST", "/repos/create"), ("POST", "/commit/")):
        hub.fail(method, path, status=429, headers={"Retry-After": "7"})
    hub.fail("POST", "/commit/", status=500)
    progress = Notes()
    assert push(out, hub, progress=progress).commit
    assert [wait for wait in hub.slept if wait == 7] == [7, 7, 7]
    assert sum("asks to wait" in note for note in progress.notes) == 3
    assert sum("did not answer" in note for note in progress.notes) == 1


@pytest.mark.parametrize(
    ("status", "headers", "code", "words"),
    [
        (401, {}, 4, "does not accept the token from HF_TOKEN"),
        (403, {}, 4, "may not write to alice/moe"),
        (409, {}, 1, "was changed meanwhile"),
        (412, {}, 1, "was changed meanwhile"),
        (429, {"Retry-After": "3600"}, 4, "too many requests"),
        (500, {}, 4, "has a fault of its own, 500"),
        (418, {}, 1, "answers 418"),
    ],
)
def test_refusals_are_explained_and_leave_nothing(
    hub: HubServer, out: Path, status: int, headers: dict[str, str], code: int, words: str
) -> None:
    hub.fail("POST", "/commit/", status=status, headers=headers, message=f"said of {TOKEN}", times=99)
    with pytest.raises(UpcycleError) as caught:
        push(out, hub)
    assert caught.value.exit_code == code
    assert words in caught.value.message
    assert "said of ***" in caught.value.message
    assert TOKEN not in f"{caught.value.message}{caught.value.hint}"
    assert "3600 s" in (caught.value.hint or "") or status != 429
    assert set(hub.repos[REPO].files()) == {".gitattributes"}


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: HubServer, out: Path, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", status=403, message=TOKEN, times=1)
    arguments = ["-m", "upcycle.cli.main", "push", str(out), REPO, "--debug"]
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert "may not write" in done.stderr, done.stderr
    for text in (done.stdout, done.stderr, *(data.decode(errors="replace") for data in contents(out).values())):
        assert TOKEN not in text
        assert "s3cr3t" not in text or "curl" in text  # a signed link; HF_DEBUG asks for every request
    assert all(request.authorization is None for request in hub.sent("PUT", "/lfs/"))
    assert not [
        path for path in (tmp_path / "home").rglob("*") if path.is_file() and TOKEN in path.read_text(errors="replace")
    ]


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("moe", "has no owner"),
        ("a/b/c", "no name of a repository"),
        ("alice/m e", "no name of a repository"),
        ("alice/", "no name"),
    ],
)
def test_names_that_are_none_are_refused_before_anything_is_sent(
    hub: HubServer, out: Path, repo: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        push(out, hub, repo)
    with pytest.raises(UsageError, match="no name of a branch"):
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
    with pytest.raises(UsageError, match="exists, and is public"):
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
    assert any("the hub was not asked what is there" in note for note in progress.notes)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE is set"):
        push(out, hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_\u00e9")
    with pytest.raises(EnvironmentFault, match="holds characters that none has"):
        push(out, hub)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(EnvironmentFault, match="there is no token"):
        push(out, hub)
    assert not hub.requests


def test_a_dry_run_only_looks(hub: HubServer, out: Path) -> None:
    result = push(out, hub, dry_run=True)
    assert result.bytes_to_send == result.bytes_total > 0
    assert {request.method for request in hub.requests} == {"GET"}
    assert not (out / "README.md").exists()


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
    from upcycle import provenance

    result = json.loads((out / "verification.json").read_text())
    provenance.write_verification(out, result | {"verdict": "broken", "explanation": "it is *off* by <b>2</b>"})
    with pytest.raises(VerificationError, match="is broken"):
        push(out, hub)
    assert push(out, hub, force=True).mark
    card = hub.repos[REPO].files()["README.md"].decode()
    assert "**Do not rely on this model.** Its verification failed: it is \\*off\\* by &lt;b\\>2&lt;/b\\>." in card
    (out / "verification.json").unlink()
    push(out, hub, force=True)
    assert "published without being verified" in hub.repos[REPO].files()["README.md"].decode()
    assert "verification.json" not in hub.repos[REPO].files()


def test_files_that_nobody_recorded_stay_here(hub: HubServer, out: Path) -> None:
    (out / "passwords.txt").write_text("secret")
    progress = Notes()
    assert push(out, hub, progress=progress).skipped == ["passwords.txt"]
    assert "passwords.txt" not in hub.repos[REPO].files()
    assert any("passwords.txt" in note for note in progress.notes)
    assert any("name folders of this machine" in note for note in progress.notes)


@pytest.mark.parametrize("longer", [False, True])
def test_a_file_that_changes_while_it_is_uploaded_is_not_committed(hub: HubServer, out: Path, longer: bool) -> None:
    path = weights(out)[1]

    def damage(title: str) -> None:
        if title == "uploading":
            data = path.read_bytes()
            path.write_bytes(data + b"\0" if longer else data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(UpcycleError, match="was changed since it was checked" if longer else "SHA-256 is another"):
        push(out, hub, progress=Notes(damage))
    assert set(hub.repos[REPO].files()) == {".gitattributes"}


def test_a_file_that_the_hub_ignores_is_missed(hub: HubServer, out: Path) -> None:
    push(out, hub)
    repo = hub.repos[REPO]
    repo.add(
        "main",
        repo.refs["main"],
        {**repo.commits[repo.refs["main"]][1], ".gitignore": _blob(b"recipe.yaml\n")},
        "by hand",
    )
    (out / "recipe.yaml").write_text((out / "recipe.yaml").read_text() + "# more\n")
    record_again(out)
    with pytest.raises(UpcycleError, match=r"has not taken recipe.yaml"):
        push(out, hub)


def test_the_users_section_is_kept_here_and_there(hub: HubServer, out: Path) -> None:
    from upcycle.card import BEGIN, own_section

    push(out, hub)
    repo = hub.repos[REPO]
    card = repo.files()["README.md"].decode().replace(BEGIN + "\n", BEGIN + "\nWritten *on the hub*.", 1)
    repo.add(
        "main", repo.refs["main"], {**repo.commits[repo.refs["main"]][1], "README.md": _blob(card.encode())}, "by hand"
    )
    push(out, hub, license="mit")
    assert own_section(repo.files()["README.md"].decode(), "there") == "Written *on the hub*."
    local = (out / "README.md").read_text()
    assert local == repo.files()["README.md"].decode()
    assert re.search("^license: mit$", local, re.MULTILINE)
    (out / "README.md").write_text(local.replace("*on the hub*", "here"))
    push(out, hub)
    assert own_section(repo.files()["README.md"].decode(), "there") == "Written here."
    repo.add(
        "main", repo.refs["main"], {**repo.commits[repo.refs["main"]][1], "README.md": _blob(b"# gone")}, "by hand"
    )
    progress = Notes()
    push(out, hub, progress=progress)
    assert any("has no marked section" in note for note in progress.notes)
