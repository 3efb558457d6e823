"""Publishing, end to end: the real client against a hub on the loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import READER, TOKEN, HubServer
from hub_state import Blob
from huggingface_hub import snapshot_download
from publishing_cases import REPO, Notes, contents, push, record_again, weights

import upcycle
from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.recipe.conversion_recipe import read_recipe


@pytest.mark.one_in(2)
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
    with pytest.raises(UsageError, match="the dense model is needed"):  # nothing that was published says where it lies
        upcycle.verify(there, tokens=64)
    source = read_recipe(out / "recipe.yaml")["source"]
    assert upcycle.verify(there, tokens=64, source=source).verdict == "exact"


@pytest.mark.long
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


@pytest.mark.long
def test_pushing_again_sends_what_changed_and_removes_what_is_gone(hub: HubServer, out: Path) -> None:
    push(out, hub)
    assert push(out, hub).commit is None
    repo = hub.repos[REPO]
    repo.add(
        "main", repo.refs["main"], repo.commits[repo.refs["main"]][1] | {"notes.md": Blob(b"mine", False)}, "by hand"
    )
    gone = weights(out)[-1]
    gone.unlink()
    record_again(out)
    before = len(hub.sent("PUT", "/lfs/"))
    result = push(out, hub)
    assert [file.name for file in result.files if file.status == "deleted"] == [gone.name]
    assert len(hub.sent("PUT", "/lfs/")) == before
    assert set(repo.files()) == set(contents(out)) | {".gitattributes", "notes.md"}
    assert repo.files()["upcycle.json"] == (out / "upcycle.json").read_bytes()


def test_a_pull_request_leaves_main_alone(hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.create(REPO)
    monkeypatch.setenv("HF_TOKEN", READER)  # bob may not write to alice's
    with pytest.raises(EnvironmentFault, match="you may not write to alice/moe"):
        push(out, hub)
    result = push(out, hub, create_pr=True)
    assert result.pull_request == result.url == f"{hub.url}/{REPO}/discussions/1"
    assert set(repo.files()) == {".gitattributes"}
    assert set(repo.files("refs/pr/1")) == set(contents(out)) | {".gitattributes"}


@pytest.mark.long
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


def test_a_dry_run_only_looks(hub: HubServer, out: Path) -> None:
    result = push(out, hub, dry_run=True)
    assert result.bytes_to_send == result.bytes_total > 0
    assert {request.method for request in hub.requests} == {"GET"}
    assert not (out / "README.md").exists()


def test_files_that_nobody_recorded_stay_here(hub: HubServer, out: Path) -> None:
    (out / "passwords.txt").write_text("secret")
    progress = Notes()
    assert push(out, hub, progress=progress).skipped == ["passwords.txt"]
    assert "passwords.txt" not in hub.repos[REPO].files()
    assert any("passwords.txt" in note for note in progress.notes)


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
        {**repo.commits[repo.refs["main"]][1], ".gitignore": Blob(b"recipe.yaml\n", False)},
        "by hand",
    )
    (out / "recipe.yaml").write_text((out / "recipe.yaml").read_text() + "# more\n")
    record_again(out)
    with pytest.raises(UpcycleError, match=r"did not accept recipe.yaml"):
        push(out, hub)


@pytest.mark.long
def test_the_users_section_is_kept_here_and_there(hub: HubServer, out: Path) -> None:
    from upcycle.files.card_section import BEGIN, own_section

    push(out, hub)
    repo = hub.repos[REPO]
    card = repo.files()["README.md"].decode().replace(BEGIN + "\n", BEGIN + "\nWritten *on the hub*.", 1)
    repo.add(
        "main",
        repo.refs["main"],
        {**repo.commits[repo.refs["main"]][1], "README.md": Blob(card.encode(), False)},
        "by hand",
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
        "main",
        repo.refs["main"],
        {**repo.commits[repo.refs["main"]][1], "README.md": Blob(b"# gone", False)},
        "by hand",
    )
    progress = Notes()
    push(out, hub, progress=progress)
    assert any("has no marked section" in note for note in progress.notes)
