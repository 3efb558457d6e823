"""Turns errors of the hub's client into errors that say what to do, and repeats requests that may succeed soon.

No message contains the token, whatever the client or the server put into theirs.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from huggingface_hub.errors import (  # type: ignore[attr-defined]  # the client's base class, httpx's of its version
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
)

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.files.private_text import scrub, without_password
from upcycle.progress import Progress

T = TypeVar("T")
TRIES = 5
LONGEST_WAIT = 120.0  # seconds; if the hub asks to wait longer, the error says so
_httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx or httpx2, as the client has it
_NO_CONNECTION = (_httpx.ConnectError, _httpx.ProxyError, _httpx.UnsupportedProtocol, _httpx.LocalProtocolError)
_PASSING = (500, 502, 503, 504)
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # a query may hold a signature that gives access


@dataclass(frozen=True)
class Hub:
    """Holds the hub, the repository and the token of requests, to explain their errors."""

    endpoint: str
    repo: str
    token: str = field(default="", repr=False)
    from_environment: bool = False

    def scrub(self, text: object) -> str:
        """Return a message on one line, without the token and without signed links."""
        message = " ".join(str(text).split())
        if self.token:
            message = message.replace(self.token, "***")
        return without_password(scrub(_QUERY.sub(r"\1", message)))

    @contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Turn the client's errors in the ``with`` block into upcycle's.

        Args:
            doing: what the block does, for messages such as "cannot create org/name".

        Raises:
            EnvironmentFault: there is no network or no permission, or the hub is busy or broken.
            UpcycleError: the repository was changed meanwhile, or the hub refused what was sent.
        """
        try:
            yield
        except UpcycleError:
            raise
        except (OSError, RuntimeError, ValueError, HTTPError) as error:
            raise self._explain(error, doing) from None

    def _explain(self, error: BaseException, doing: str) -> UpcycleError:
        cause = root(error)
        if isinstance(cause, OfflineModeIsEnabled):
            return EnvironmentFault(
                f"cannot {doing}: HF_HUB_OFFLINE is set", hint="unset it, then run the same command again"
            )
        if isinstance(cause, HfHubHTTPError):
            return self._refused(cause, doing)
        if isinstance(cause, HTTPError):
            return EnvironmentFault(
                f"cannot {doing}: the connection to {self.endpoint} failed ({self.scrub(cause) or type(cause).__name__})",
                hint="run the same command again: what has arrived is not sent twice",
            )
        return UpcycleError(f"cannot {doing}: {self.scrub(cause)}")

    def _refused(self, error: HfHubHTTPError, doing: str) -> UpcycleError:
        code, answer = error.response.status_code, self.scrub(error.server_message or "")
        login = "set HF_TOKEN to a valid token" if self.from_environment else "hf auth login"
        wait = f"in {_asked_to_wait(error) or 60:.0f} s"
        kind: type[UpcycleError] = EnvironmentFault
        hint: str | None = "run the same command again later: what has arrived is not sent twice"
        if code == 401:
            what = f"{self.endpoint} does not accept the token from {'HF_TOKEN' if self.from_environment else 'hf auth login'}"
            hint = login
        elif code == 403:
            what = f"you may not write to {self.repo}"
            hint = "use a token that may (https://huggingface.co/settings/tokens), or open a pull request: --create-pr"
        elif code == 404:
            kind, what, hint = UsageError, f"{self.endpoint} does not have that", f"check the spelling of {self.repo}"
        elif code in (409, 412):
            kind, what, hint = UpcycleError, f"{self.repo} was changed meanwhile", "run the same command again"
        elif code == 429:
            what, hint = "too many requests", f"run the same command again {wait}"
        elif code in _PASSING:
            what = f"{self.endpoint} fails with error {code}"
        else:
            kind, what, hint = UpcycleError, f"{self.endpoint} answers {code}", None
        return kind(f"cannot {doing}: {what}" + (f" ({answer})" if answer else ""), hint=hint)


def root(error: BaseException) -> BaseException:
    """Return the error that the client met first, since it wraps those of its threads."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def passing(error: BaseException) -> bool:
    """Return whether the same request may succeed soon; whether this one was carried out is not known."""
    cause = root(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in _PASSING
    return isinstance(cause, HTTPError) and not isinstance(cause, _NO_CONNECTION)


def patiently(call: Callable[[], T], progress: Progress, again: Callable[[BaseException], bool] = passing) -> T:
    """Call ``call``, and repeat it where the hub asks to wait or ``again`` returns True, up to :data:`TRIES` times in all.

    Pauses are as long as the hub asks for, up to :data:`LONGEST_WAIT`, or else 1, 2, 4... seconds.
    """
    for tries in range(TRIES):
        try:
            return call()
        except (OSError, RuntimeError, HTTPError) as error:
            cause = root(error)
            busy = isinstance(cause, HfHubHTTPError) and cause.response.status_code == 429
            wait = (_asked_to_wait(cause) if busy else None) or 2.0**tries
            if tries + 1 == TRIES or wait > LONGEST_WAIT or not (busy or again(error)):
                raise
            progress.note(f"the hub {'asks to wait' if busy else 'did not answer'}: trying again in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _asked_to_wait(error: BaseException) -> float | None:
    """Return the seconds in ``Retry-After`` or in the hub's ``RateLimit``, or None."""
    headers = error.response.headers  # type: ignore[attr-defined]
    if (value := headers.get("Retry-After", "").strip()).isdigit():
        return float(value)
    match = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else None


def from_environment(token: str) -> bool:
    """Return whether a token is that of the environment, which takes precedence over that of ``hf auth login``."""
    return bool(token) and token in (
        os.environ.get("HF_TOKEN", "").strip(),
        os.environ.get("HUGGING_FACE_HUB_TOKEN", "").strip(),
    )
