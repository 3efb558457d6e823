"""Publishing when the line is cut, the hub is busy or says no, and where the token goes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from publishing_cases import REPO, Notes, contents, push, weights

from upcycle.errors import EnvironmentFault, UpcycleError


@pytest.mark.long
def test_a_cut_in_the_middle_of_an_upload_is_made_good(hub: HubServer, out: Path) -> None:
    fault = hub.fail("PUT", "/lfs/", cut=10_000)
    push(out, hub)
    assert fault.times == 0
    assert hub.repos[REPO].files()[weights(out)[0].name] == weights(out)[0].read_bytes()


@pytest.mark.long
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


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    ("status", "headers", "code", "words"),
    [
        (401, {}, 4, "does not accept the token from HF_TOKEN"),
        (403, {}, 4, "may not write to alice/moe"),
        (409, {}, 1, "was changed meanwhile"),
        (412, {}, 1, "was changed meanwhile"),
        (429, {"Retry-After": "3600"}, 4, "too many requests"),
        (500, {}, 4, "fails with error 500"),
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


@pytest.mark.long
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
