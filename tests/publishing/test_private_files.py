"""Nothing that is private is published: in any file of a push, in any shape, and through no link."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from publishing_cases import REPO, contents, push

import upcycle
from upcycle.errors import CheckpointError, UpcycleError, UsageError
from upcycle.files import private_text
from upcycle.files.hashing import hash_file
from upcycle.files.local_names import (
    LOCAL_NAMES_FILE,
    LocalNames,
    file_name,
    here,
    is_path,
    records_without_folders,
    without_paths,
)
from upcycle.files.private_text import machine_in, scrub, scrub_machine, secrets_in, this_machine, without_password
from upcycle.recipe.conversion_recipe import read_recipe

Pico = Callable[[str], Path]
LETTERS = "aB3dE6gH9kL2nO5qR8tU1wX4zA7cD0fG3iJ6"
# One of every kind, made up.
SECRETS = {
    "hugging face": f"hf_{LETTERS[:34]}",
    "hugging face, short": "hf_SECRETSECRET",
    "github": f"ghp_{LETTERS}",
    "github, fine": f"github_pat_{LETTERS}",
    "gitlab": f"glpat-{LETTERS[:20]}",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "aws, secret": f"aws_secret_access_key = {LETTERS}",
    "openai": f"sk-proj-{LETTERS}",
    "slack": "xoxb-1234567890-abcdefghij",
    "json web": f"eyJhbGciOi{LETTERS[:8]}.eyJzdWIiOi{LETTERS[:8]}.{LETTERS}",
    "authorization": "Authorization: Basic YWxpY2U6aHVudGVyMg==",
    "bearer": f"bearer {LETTERS}",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "pgp": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "password in an address": "https://alice:hunter2@hub.example/x",
    "signed address": f"https://s3.example/x?X-Amz-Signature={LETTERS}",
}
INNOCENT = [
    "hf_transfer, hf_quantizer_config, sk-learn and risk-based approaches",
    "https://huggingface.co/docs/hub/repositories-licenses, https://github.com/a/b/blob/main/home/x.py",
    "authorization: required for all users; bearer of bad news",
    "-----BEGIN CERTIFICATE-----",
    "and/or, either/or, 1/2/3, text/html, a /usr/bin/env python, /etc/passwd, /v1/chat/completions",
    "git@github.com:a/b.git, alice@example.com, ssh://git@example.com/x",
]


@pytest.fixture
def alice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's machine: her home folder, her name, its name."""
    home = tmp_path / "home" / "alice-smith"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "alice-smith")
    monkeypatch.setattr(private_text.platform, "node", lambda: "gpu17.lab.example")
    return home


@pytest.mark.parametrize("kind", SECRETS)
def test_every_kind_of_key(kind: str) -> None:
    text = f"before {SECRETS[kind]} behind"
    (found, *_) = secrets_in(text)
    assert found.secret
    assert found.text in SECRETS[kind]
    assert len(found.shown) <= 7
    scrubbed = scrub(text)
    assert not list(secrets_in(scrubbed))
    assert scrubbed.startswith("before ")
    assert scrubbed.endswith(" behind")
    for word in (LETTERS[:12], "hunter2", "SECRETSECRET", "IOSFODNN7"):
        assert word not in scrubbed


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_none(text: str, alice: Path) -> None:
    assert not list(secrets_in(text))
    assert not list(machine_in(text, this_machine()))
    assert scrub(text) == text


def test_keys_of_this_machine_whatever_their_shape(
    alice: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "plain-words-only")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("stored-by-login\n")
    for secret in ("plain-words-only", "stored-by-login"):
        assert [found.text for found in secrets_in(f"a {secret} b")] == [secret]
        assert scrub(f"a {secret} b") == "a *** b"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{home}", "the home folder"),
        ("see {home}/models/x for it", "the home folder"),
        ("/home/bob/models/llama", "a folder of a machine"),
        ("in '/mnt/disk 2/x' there", "a folder of a machine"),
        ("file:///scratch/bob/x.json", "a folder of a machine"),
        ("x=/Users/bob/y", "a folder of a machine"),
        (r"C:\Users\bob\models", "a folder of a machine"),
        ("by alice-smith, with love", "the user's name"),
        ("alice-smith@gpu17", "the user's name"),
        ("on gpu17.lab.example", "the machine's name"),
        ("ran on gpu17 twice", "the machine's name"),
        ("alice-smithson, gpu170, alice-smith/moe is hers", None),
    ],
)
def test_what_tells_of_a_machine(text: str, what: str | None, alice: Path) -> None:
    found = [one.what for one in machine_in(text.format(home=alice), this_machine())]
    assert (what in found) if what else not found


def test_names_that_half_of_all_machines_have_tell_nothing(alice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("root", "ubuntu", "bob", "1234567"):
        monkeypatch.setenv("USER", name)
        assert name not in this_machine().users
    monkeypatch.setenv("HOME", "/")
    assert this_machine().homes == ()


def test_a_report_of_a_fault_is_nobodys(alice: Path) -> None:
    text = scrub_machine(f'File "{alice}/x.py" on gpu17 as alice-smith: {SECRETS["github"]}')
    assert text == 'File "~/x.py" on HOST as USER: ***'
    assert without_password("https://a:b@hub.example/x https://t@h") == "https://hub.example/x https://h"


def put(out: Path, name: str, text: str) -> None:
    """Hide a text in a file of a model, of whatever kind that is, and let everything look as if it belonged there."""
    path = out / name
    if name.endswith(".safetensors"):
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        header["__metadata__"] = {**header.get("__metadata__", {}), "note": text}
        new = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])
    elif name.endswith(".json"):
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**found, "extra": {"note": [text]}}, indent=2))
    elif name.endswith(".yaml"):
        path.write_text(path.read_text() + f"# {text}\n")
    else:
        path.write_text(f"line\n{text}\n")


FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "recipe.yaml",
    "upcycle.json",
    "verification.json",
    "evaluation.json",
    "model.safetensors.index.json",
    "model-00001-of-00003.safetensors",
    "blueprint.safetensors",
    "report.html",
    "report.json",
    "LICENSE",
    "chat_template.jinja",
]


@pytest.mark.one_in(15)
@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_push_is_searched(name: str, out: Path, hub: HubServer, alice: Path) -> None:
    before = (out / name).read_bytes() if (out / name).exists() else None
    for text, shown in ((SECRETS["hugging face"], "a token, hf_a..."), (f"{alice}/patients", "the home folder")):
        put(out, name, text)
        _recorded(out, name)
        with pytest.raises(UsageError, match="private text would be published") as refused:
            push(out, hub)
        assert f"{name}" in refused.value.message
        assert shown in refused.value.message
        assert SECRETS["hugging face"] not in refused.value.message
        assert not hub.repos
        if before is None:
            (out / name).unlink()
        else:
            (out / name).write_bytes(before)


def _recorded(out: Path, name: str) -> None:
    """Let the record list a file as it is, and the verification be about that record."""
    record = json.loads((out / "upcycle.json").read_text())
    if name not in ("upcycle.json", "verification.json", "evaluation.json", "report.html", "report.json"):
        record["files"][name] = hash_file(out / name)
        (out / "upcycle.json").write_text(json.dumps(record))
    for about in ("verification.json", "evaluation.json"):
        if (out / about).exists():
            found = json.loads((out / about).read_text())
            found["upcycle_json_sha256"] = hash_file(out / "upcycle.json")
            (out / about).write_text(json.dumps(found))


@pytest.mark.long
def test_the_line_and_the_key_are_said_and_names_may_be_allowed(out: Path, hub: HubServer, alice: Path) -> None:
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({"who": {"made": "by alice-smith"}, **record}, indent=2))
    _recorded(out, "config.json")
    with pytest.raises(UsageError) as refused:
        push(out, hub)
    assert "config.json, line 3 (who.made): the user's name, alice-smith" in refused.value.message
    assert '--allow "alice-smith"' in (refused.value.hint or "")
    assert push(out, hub, allow=["alice-smith"]).commit
    assert push(out, hub, repo="alice-smith/moe", dry_run=True).searched == 13  # under her own name it is no secret
    (out / "config.json").write_text(json.dumps({"token": SECRETS["github"], **record}))
    _recorded(out, "config.json")
    with pytest.raises(UsageError, match="a token, ghp_"):  # a key never may be
        push(out, hub, allow=[SECRETS["github"]])


def test_the_card_is_searched_too(out: Path, hub: HubServer, alice: Path) -> None:
    card = upcycle.write_card(out)
    text = card.read_text().replace("<!-- yours: end -->", f"ask {SECRETS['aws']}\n<!-- yours: end -->")
    card.write_text(text)
    with pytest.raises(UsageError, match=r"README.md, line \d+: a token, AKIA"):
        push(out, hub)
    assert not hub.repos


@pytest.mark.parametrize("name", ["config.json", "report.html", "README.md", "verification.json", "upcycle.json"])
def test_a_link_that_leaves_the_folder_is_not_published(name: str, out: Path, hub: HubServer, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((out / name).read_bytes() if (out / name).exists() else b"secret")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="leaves its folder"):
        push(out, hub)
    assert not hub.repos


@pytest.mark.long
def test_everything_that_is_made_from_her_folders_is_clean_and_can_be_verified_again(
    pico: Pico, alice: Path, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = alice / "secret-project" / "keep"  # a name that the recipe has as a value, too
    shutil.copytree(pico("llama"), source)
    text = alice / "patients.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 60)
    out = alice / "moe"
    keys: dict[str, Any] = {"dtype": "keep", "method": "weight_kmeans", "experts": 4, "top_k": 2, "router": "ridge"}
    calibration = {"text": [str(text)], "tokens": 256, "window": 64}
    upcycle.convert(str(source), out, calibration=calibration, verification={"text": str(text), "tokens": 64}, **keys)
    upcycle.verify(out, tokens=64, text=str(text))
    upcycle.evaluate(str(out), reference=str(source), speed=True)
    monkeypatch.chdir(tmp_path)
    from upcycle.report.collect import Wanted
    from upcycle.report.write_report import write_report

    write_report(out, wanted=Wanted(texts=(str(text),), tokens=64))
    upcycle.write_card(out)
    for name, content in contents(out).items():
        for word in (b"alice", b"secret-project", b"gpu17", str(tmp_path).encode()):
            assert word not in content, f"{name} tells {word!r}"
    recipe = (out / "recipe.yaml").read_text()
    assert "source: keep-2\n" in recipe
    assert "- patients.txt\n" in recipe
    # On this machine it is known where they are; a model that came from elsewhere needs to be told.
    assert upcycle.verify(out, tokens=64).verdict == "approximate"
    again = read_recipe(out / "recipe.yaml")
    assert again["source"] == str(source)
    assert again["dtype"] == "keep"
    assert push(out, hub).commit
    assert LOCAL_NAMES_FILE not in hub.repos[REPO].files()
    (out / LOCAL_NAMES_FILE).unlink()
    with pytest.raises(UsageError, match="the dense model is needed") as refused:
        upcycle.verify(out, tokens=64)
    assert "--source" in (refused.value.hint or "")
    assert upcycle.verify(out, tokens=64, source=str(source), text=str(text)).verdict == "approximate"


def test_names(alice: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("org/name", "a/m", "b/m", "c/demo"):
        (tmp_path / folder).mkdir(parents=True)
    paths = ["org/name", "./x", "../y/z", "~/z", "/a", r"C:\models\m", r"\\server\share\m", str(alice)]
    assert all(map(is_path, paths))
    assert not any(map(is_path, ["other/name", "org/data:config", "prose", "https://a.b/c", "a\n/b/c", "m", "", "/"]))
    assert [file_name(path) for path in paths] == ["name", "x", "z", "z", "a", "m", "m", "alice-smith"]
    record = {"sources": ["a/m", "b/m", "c/demo", "hub/id"], "keep": "m", "a/m": 1, "positive_prompts": ["/a/b"]}
    names = LocalNames.of(record)
    published = {
        "sources": ["m-2", "m-3", "demo-2", "hub/id"],
        "keep": "m",
        "m-2": 1,
        "positive_prompts": ["/a/b"],
    }
    assert names.published(record) == published
    (tmp_path / "recipe.yaml").write_text("recipe")
    names.remember(tmp_path, "recipe")
    back = here(tmp_path, published)
    assert back["sources"] == [str(tmp_path / name) for name in ("a/m", "b/m", "c/demo")] + ["hub/id"]
    assert back["keep"] == "m"
    (tmp_path / "recipe.yaml").write_text("another recipe")
    assert here(tmp_path, published) == published
    assert without_paths(["a/m", 3, None]) == ["m", 3, None]
    assert records_without_folders({"why": f"{alice}/llama is not it; see https://a.b/c/d"}) == {
        "why": "llama is not it; see https://a.b/c/d"
    }


def test_an_address_with_a_password_is_never_shown(out: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = hub.url.replace("://", "://alice:hunter22@")
    made = upcycle.push(out, REPO, endpoint=endpoint, dry_run=True)
    assert "hunter22" not in json.dumps(made.as_dict())
    hub_down = "http://alice:hunter22@127.0.0.1:9"
    with pytest.raises(UpcycleError) as refused:
        upcycle.push(out, REPO, endpoint=hub_down)
    assert "hunter22" not in f"{refused.value.message} {refused.value.hint}"
