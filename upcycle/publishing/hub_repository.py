"""Makes the few requests about a hub repository that publishing needs; every error says what to do."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from upcycle.errors import CheckpointError, EnvironmentFault, UsageError
from upcycle.files.formats.parsing import parse_json
from upcycle.files.private_text import without_password
from upcycle.progress import Progress
from upcycle.publishing.hub_errors import Hub, passing, patiently
from upcycle.publishing.upload import Upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REVISION = re.compile(r"[\w][\w./-]*")


def check_repo_name(repo: str) -> None:
    """Refuse a name that no repository can have, before anything is read or sent.

    Raises:
        UsageError: the name has no owner, or characters that the hub does not allow.
    """
    if "/" not in repo:
        raise UsageError(
            f"'{repo}' has no owner",
            hint=f"upcycle push OUT YOU/{repo}, where YOU is your user name or your organisation's",
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"'{repo}' is not the name of a repository: {error}", hint="use owner/name") from None


def check_revision(revision: str) -> None:
    """Refuse a name that no branch can have.

    Raises:
        UsageError: it is such a name.
    """
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(f"--revision '{revision}' is not the name of a branch", hint="--revision main, or refs/pr/1")


@dataclass(frozen=True)
class RevisionState:
    """Holds a revision's commit and the object id of each of its files (SHA-256 of large files, git's SHA-1 of small ones)."""

    sha: str
    private: bool
    files: dict[str, str]

    def has(self, file: Upload) -> bool:
        """Return whether the revision has that file with that content."""
        return file.name in self.files and file.is_at(self.files[file.name])


class Repository:
    """Makes requests about one repository."""

    def __init__(self, api: HfApi, hub: Hub, progress: Progress) -> None:
        self._api, self._hub, self._progress = api, hub, progress
        self.name = hub.repo

    def look(self, revision: str | None = None) -> RevisionState | None:
        """Return what a revision holds; None where there is no such repository or revision.

        Raises:
            EnvironmentFault: the hub cannot be reached, or does not answer.
        """
        with self._hub.explained(f"look at {self.name}"):
            try:
                info = patiently(
                    lambda: self._api.model_info(self.name, revision=revision, files_metadata=True), self._progress
                )
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                if error.response.status_code == 401:  # the hub's answer to a token that it does not know
                    raise
                return None
        files = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id or "" for file in info.siblings or []}
        return RevisionState(info.sha or "", bool(info.private), files)

    def create(self, private: bool) -> None:
        """Create the repository."""
        with self._hub.explained(f"create {self.name}"):
            # exist_ok: it may exist because an earlier request succeeded and its answer was lost.
            patiently(lambda: self._api.create_repo(self.name, private=private or None, exist_ok=True), self._progress)

    def create_branch(self, branch: str) -> None:
        """Create a branch from main."""
        with self._hub.explained(f"create the branch {branch}"):
            patiently(lambda: self._api.create_branch(self.name, branch=branch, exist_ok=True), self._progress)

    def text(self, name: str, state: RevisionState) -> str:
        """Return the text of a small file in the repository; empty where there is no such file."""
        if name not in state.files:
            return ""
        with self._hub.explained(f"read {name}"), tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self.name, name, revision=state.sha, local_dir=folder)
            return Path(path).read_text(encoding="utf-8", errors="replace")

    def record(self, name: str, state: RevisionState) -> dict[str, Any]:
        """Return a JSON object in the repository; empty where there is no such file."""
        try:
            found = parse_json(self.text(name, state) or "{}", name)
        except CheckpointError:
            return {}
        return found if isinstance(found, dict) else {}

    def check_card(self, text: str) -> None:
        """Let the hub check a card's metadata before anything is sent; otherwise it would refuse the card after all uploads.

        Raises:
            UsageError: the hub does not accept the metadata.
        """
        from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

        content = {"content": text, "repoType": "model"}

        def ask() -> Any:
            answer = get_session().post(f"{self._api.endpoint}/api/validate-yaml", json=content)
            if answer.status_code not in (400, 404, 405):  # the latter two: a hub that does not check
                hf_raise_for_status(answer)
            return answer

        with self._hub.explained("check the card's metadata"):
            answer = patiently(ask, self._progress)
            if answer.status_code == 400:
                faults = "; ".join(str(error.get("message")) for error in answer.json().get("errors", []))
                raise UsageError(
                    f"the hub does not accept the card's metadata: {self._hub.scrub(faults)}",
                    hint="write the card again with upcycle card, and give --license and --base-model if they are wrong",
                )

    def send(self, file: Upload, revision: str | None, create_pr: bool) -> CommitOperationAdd:
        """Send a large file ahead of the commit; the hub keeps it under its SHA-256.

        Raises:
            CheckpointError: the file was changed since it was checked.
        """
        operation = operation_of(file)
        with self._hub.explained(f"upload {file.name}"):
            self._api.preupload_lfs_files(
                self.name, [operation], revision=revision, create_pr=create_pr, free_memory=False
            )
        return operation

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        parent: RevisionState,
        message: str,
        revision: str | None,
        arrived: Callable[[RevisionState], bool],
    ) -> str:
        """Make one commit on top of ``parent``, and return its id.

        Args:
            operations: the files to add and to delete.
            parent: what the revision holds now.
            message: the commit message.
            revision: the branch; None: main.
            arrived: tells from a revision's state whether the commit was made, where the hub's answer was lost.
        """

        def may_repeat(error: BaseException) -> bool:
            if not passing(error):
                return False
            now = self.look(revision)
            return now is not None and now.sha == parent.sha

        with self._hub.explained(f"commit to {self.name}"):
            try:
                info = patiently(
                    lambda: self._commit(operations, parent, message, revision, False), self._progress, may_repeat
                )
            except Exception as error:
                now = self.look(revision) if passing(error) else None
                if now is None or not arrived(now):
                    raise
                return now.sha
        return str(info.oid)

    def propose(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        parent: RevisionState,
        message: str,
        revision: str | None,
    ) -> tuple[str, str, str]:
        """Open a pull request with one commit, and return the commit's id, the pull request's URL and its ``refs/pr/N``.

        This is never repeated: where the answer is lost, nothing tells whether the pull request was opened.
        """
        with self._hub.explained(f"open a pull request in {self.name}"):
            try:
                info = patiently(
                    lambda: self._commit(operations, parent, message, revision, True),
                    self._progress,
                    lambda error: False,
                )
            except Exception as error:
                if not passing(error):
                    raise
                raise EnvironmentFault(
                    f"the hub did not say whether it opened a pull request in {self.name} ({self._hub.scrub(error)})",
                    hint=f"see {self._hub.endpoint}/{self.name}/discussions before you try again",
                ) from None
        return str(info.oid), without_password(str(info.pr_url)), str(info.pr_revision)

    def _commit(
        self, operations: Sequence[Any], parent: RevisionState, message: str, revision: str | None, create_pr: bool
    ) -> Any:
        return self._api.create_commit(
            self.name,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent.sha or None,
        )

    def collect(self, collection: str, private: bool) -> str:
        """Add the repository to a collection, named by slug or title, and return its URL; a new title creates a collection."""
        with self._hub.explained(f"add {self.name} to the collection '{collection}'"):
            slug = collection
            if "/" not in collection:
                owner = self.name.partition("/")[0]
                made = patiently(
                    lambda: self._api.create_collection(collection, namespace=owner, private=private, exists_ok=True),
                    self._progress,
                )
                slug = made.slug
            found = patiently(
                lambda: self._api.add_collection_item(slug, self.name, "model", exists_ok=True), self._progress
            )
        return without_password(str(found.url))


def operation_of(file: Upload) -> CommitOperationAdd:
    """Return the client's description of a file, with the SHA-256 that it was checked against.

    Raises:
        CheckpointError: the file's size has changed since.
    """
    content = str(file.content) if isinstance(file.content, Path) else file.content
    operation = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=content)
    if operation.upload_info.size != file.size:
        raise CheckpointError(f"{file.name} was changed since it was checked", hint="run the same command again")
    operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation
