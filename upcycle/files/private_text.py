"""Finds and removes what should not leave this machine in a text: keys to accounts, and names and folders of machine and user.

The patterns of tokens are those that their issuers document (Hugging Face, GitHub, GitLab, AWS, Google, OpenAI, Anthropic, Slack,
PyPI, npm, Stripe). Tokens in this process's environment are found whatever they look like.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_TOKENS = re.compile(
    "|".join(
        [
            r"\bhf_(?:[A-Za-z0-9]{20,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,})",
            r"\bapi_org_[A-Za-z0-9]{20,}",
            r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}",
            r"\bglpat-[A-Za-z0-9_-]{20,}",
            r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
            r"(?i:aws_?secret_?access_?key)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+=]{20,}",
            r"\bAIza[A-Za-z0-9_-]{35}",
            r"\bsk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}|\b[sr]k_live_[A-Za-z0-9]{16,}",
            r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
            r"\bpypi-[A-Za-z0-9_-]{30,}|\bnpm_[A-Za-z0-9]{36}",
            r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
            r"(?i:\bauthorization)[\"']?\s*[:=]\s*[\"']?(?:(?i:bearer|basic|token)\s+[\w.~+/=-]{8,}|(?=\S*\d)[\w.~+/=-]{12,})",
            r"(?i:\bbearer)\s+(?=[A-Za-z._~+/=-]*\d)[A-Za-z0-9._~+/=-]{8,}",
            r"[?&](?i:x-amz-signature|x-amz-credential|x-goog-signature|signature|sig|access_token|token|api_?key)=[^&\s\"'<>]{8,}",
        ]
    )
)
_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\bPuTTY-User-Key-File-\d")
_IN_URL = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)([^\s/@\"'<>]*:[^\s/@\"'<>]*)@")  # user:password@
_NAMED_SECRET = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY)$")
_SECRET_LENGTH = 8  # shorter ones would be found inside ordinary words
_WORD = r"[^\s/\"'<>|;,(){}\[\]*?\\`]+"
_PATH = re.compile(rf"(?<![\w.~/-])(?:file://)?(/(?:{_WORD}/)+(?:{_WORD})?)")
_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:\\+[^\s\\\"']+\\[^\s\"'<>|]*")
# Folders that every machine has, so that a path in them tells nothing about one.
_SYSTEM = {"usr", "bin", "lib", "lib64", "etc", "dev", "proc", "sys", "sbin", "boot", "run"}
# Folders in which people and jobs have theirs, whether or not this machine has such a folder.
_OURS = {
    "home", "Users", "root", "mnt", "media", "data", "scratch", "work", "workspace", "tmp", "srv", "nfs", "gpfs", "lustre", "fsx",
    "private", "Volumes",
}  # fmt: skip
# Names of users and machines that are so common that they identify nobody.
_COMMON = {
    "root", "user", "users", "admin", "administrator", "ubuntu", "debian", "centos", "ec2-user", "azureuser", "vagrant", "runner",
    "jovyan", "docker", "nobody", "test", "tester", "model", "models", "upcycle", "localhost", "localdomain", "host", "home",
    "work", "main", "data", "node", "code", "demo",
}  # fmt: skip
_NAME_LENGTH = 4


@dataclass(frozen=True)
class Finding:
    """Holds one private part of a text: ``what`` it is, the part itself, and whether it is a secret, such as a token."""

    what: str
    text: str
    secret: bool = False

    @property
    def shown(self) -> str:
        """The part as a message may repeat it: of a secret only the first four characters."""
        return f"{self.text[:4]}..." if self.secret else self.text


@dataclass(frozen=True)
class Machine:
    """Holds what identifies a machine: home folders, and the names of its users and of itself."""

    homes: tuple[str, ...]
    users: tuple[str, ...]
    hosts: tuple[str, ...]


def this_machine() -> Machine:
    """Return what identifies this machine, without names that are common to many."""
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() raises where there is none
    homes = {home, os.path.realpath(home)} if home.startswith("/") else set()
    users = {os.environ.get("USER", ""), os.environ.get("LOGNAME", ""), *(Path(each).name for each in homes)}
    with suppress(KeyError, OSError, ImportError):  # a container's user may have no name, and some systems no users
        users.add(getpass.getuser())
    node = platform.node()
    return Machine(
        tuple(sorted((each.rstrip("/") for each in homes if each.strip("/")), key=len, reverse=True)),
        tuple(sorted(filter(_distinctive, users))),
        tuple(sorted(filter(_distinctive, {node, node.partition(".")[0]}), key=len, reverse=True)),
    )


def _distinctive(name: str) -> bool:
    return len(name) >= _NAME_LENGTH and name.lower() not in _COMMON and not name.isdigit()


def secrets_in(text: str) -> Iterator[Finding]:
    """Yield the secrets in a text: tokens, private keys, passwords in addresses."""
    for match in _TOKENS.finditer(text):
        yield Finding("a token", match[0].lstrip("?&"), True)
    for match in _KEY.finditer(text):
        yield Finding("a private key", match[0], True)
    for match in _IN_URL.finditer(text):
        yield Finding("an address with a password", match[0], True)
    for secret in own_secrets():
        if secret in text:
            yield Finding("a token of this machine's", secret, True)


def machine_in(text: str, machine: Machine) -> Iterator[Finding]:
    """Yield what identifies a machine in a text: home folders, other paths, and names of users and machines."""
    for home in machine.homes:
        if match := re.search(re.escape(home) + r"(?![\w.-])", text):
            yield Finding("the home folder", match[0])
    for match in _PATH.finditer(text):
        if _tells(match[1]):
            yield Finding("a folder of a machine", match[1])
    for match in _WINDOWS.finditer(text):
        yield Finding("a folder of a machine", match[0])
    for kind, names in (("the user's name", machine.users), ("the machine's name", machine.hosts)):
        for name in names:
            # A name followed by a slash is the owner of a hub repository.
            if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-]|/)", text):
                yield Finding(kind, name)


def path_in_value(value: str) -> Finding | None:
    """Return a finding if a value of a record is a path, and None if it is a name."""
    plain = value.startswith(("/", "~/", "~\\", "\\\\", "file:/")) or re.match(r"[A-Za-z]:[\\/]", value)
    return Finding("a folder of a machine", value) if plain and value.strip("/~") and "\n" not in value else None


def text_without_folders(text: str) -> str:
    """Return a text in which every path is cut down to its last part."""
    return _WINDOWS.sub(lambda match: _last(match[0]), _PATH.sub(lambda match: _last(match[1]), text))


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _tells(path: str) -> bool:
    root = path.split("/")[1]
    return root in _OURS or (root not in _SYSTEM and Path("/", root).is_dir())


def scrub(text: str) -> str:
    """Return a text with ``***`` in place of every secret."""
    for secret in own_secrets():
        text = text.replace(secret, "***")
    return _IN_URL.sub(r"\1***@", _KEY.sub("***", _TOKENS.sub("***", text)))


def scrub_machine(text: str) -> str:
    """Return a text without secrets and without what identifies this machine: ``~`` stands for home, USER and HOST for names."""
    text, machine = scrub(text), this_machine()
    for home in machine.homes:
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    for name, stand_in in (*((user, "USER") for user in machine.users), *((host, "HOST") for host in machine.hosts)):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", stand_in, text)
    return text


def without_password(url: str) -> str:
    """Return an address without user name and password."""
    return re.sub(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/@]*@", r"\1", url)


def own_secrets() -> tuple[str, ...]:
    """Return the tokens and passwords in this process's environment and of ``hf auth login``, longest first."""
    found = {value.strip() for name, value in os.environ.items() if _NAMED_SECRET.search(name)}
    for name in ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        if match := re.match(r"[^:]+://[^/@]*:([^/@]+)@", os.environ.get(name, "")):
            found.add(match[1])
    home = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))  # noqa: PTH111
    found.add(_stored(os.environ.get("HF_TOKEN_PATH") or str(home / "token")))
    return tuple(sorted((each for each in found if len(each) >= _SECRET_LENGTH), key=len, reverse=True))


@lru_cache
def _stored(path: str) -> str:
    """Return the token that ``hf auth login`` stored in the file ``path``; empty where there is none."""
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            return file.read(4096).strip()
    except OSError:
        return ""
