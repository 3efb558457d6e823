"""Publishes a converted model on the Hugging Face hub, in one commit.

Large files are sent first, one by one. The hub keeps each that has arrived (with hf_xet, each part), so that the same command does
not send it again after a lost connection. Then a single commit makes all files appear, and removes the files of an earlier model.
``HfApi.upload_folder`` is not used, since it commits a large folder in several steps, between which the repository is no model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from upcycle.architectures.dense.widened import refuse_masked
from upcycle.checkpoints.licenses import chosen_license
from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.card_section import own_section
from upcycle.files.private_text import without_password
from upcycle.files.records import CARD_FILE, EVALUATION_FILE, FILE, VERIFICATION_FILE
from upcycle.files.user_paths import user_path
from upcycle.notebook import IN_NOTEBOOKS, HtmlShown
from upcycle.progress import Progress
from upcycle.publishing.hub_errors import Hub, from_environment
from upcycle.publishing.hub_repository import Repository, RevisionState, check_repo_name, check_revision, operation_of
from upcycle.publishing.model_card import make_card
from upcycle.publishing.private_files import check_private
from upcycle.publishing.publishable_files import REPORTS, Publishable, publishable
from upcycle.publishing.upload import Upload
from upcycle.version import __version__

_ATTRIBUTES = ".gitattributes"  # says which files are large; every repository has it from the beginning


@dataclass(frozen=True)
class PushedFile:
    """Holds a file and what happens to it: ``new``, ``changed``, ``unchanged`` or ``deleted``."""

    name: str
    size: int
    status: str


@dataclass(frozen=True)
class Push(HtmlShown):
    """Holds what was published or, with ``dry_run``, would be. ``as_dict`` has the documented JSON keys.

    ``bytes_to_send`` counts the files that the repository does not have yet; ``commit`` is None where nothing had changed;
    ``searched`` is the number of files that were searched for private text.
    """

    repo: str
    url: str
    revision: str | None
    commit: str | None
    pull_request: str | None
    collection: str | None
    private: bool
    files: list[PushedFile]
    skipped: list[str]
    bytes_total: int
    bytes_to_send: int
    mark: str | None
    dry_run: bool
    searched: int = 0

    def as_dict(self) -> dict[str, object]:
        """Return plain data for ``--json``."""
        return asdict(self)


def push(
    out: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    collection: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    overwrite: bool = False,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
    allow: Sequence[str] = (),
    endpoint: str | None = None,
    progress: Progress = IN_NOTEBOOKS,
) -> Push:
    """Publish a folder that :func:`upcycle.convert` wrote, with a model card.

    The token is that of the environment (``HF_TOKEN``) or of ``hf auth login``; it is sent to the hub and nowhere else.

    Args:
        out: the converted model.
        repo: ``owner/name``; created if it does not exist.
        private: create a private repository.
        revision: the branch to commit to, created if it does not exist; default: main.
        create_pr: open a pull request instead of committing.
        collection: slug or title of a collection to add the model to.
        dry_run: only return what would be done.
        force: publish a model that is broken or was not verified; the card says so.
        overwrite: delete other files in the repository, which keeps them in its history.
        license, license_name, license_link, base_model: see :func:`upcycle.publishing.model_card.write_card`.
        allow: texts that may be published although they are private to this machine: a folder, a user's or the machine's name.
        endpoint: address of another hub; default: ``HF_ENDPOINT``, or huggingface.co.
        progress: receives the progress.

    Raises:
        UsageError: a name is malformed; the folder is unfinished, unverified or holds private text; the repository holds
            something else, or is public although ``private`` is set; or the sources' licences differ.
        VerificationError: the conversion did not keep its promise.
        CheckpointError: upcycle did not write the folder, or a file was changed since it was verified.
        EnvironmentFault: there is no token, no permission or no network, or the hub does not answer.
        UpcycleError: the repository was changed meanwhile.
    """
    check_repo_name(repo)
    chosen = chosen_license(license, license_name, license_link)
    if revision:
        check_revision(revision)
    owner = repo.partition("/")[0]
    refuse_masked(user_path(out), str(out))
    local = publishable(user_path(out), force, progress, allow, owner)
    for note in _notes(local):
        progress.note(note)
    with _quiet_client():
        repository, page = _connect(repo, endpoint, dry_run, progress)
        there, on_branch = _look(repository, revision, create_pr, dry_run, progress)
        if there:
            _check_contents(there, repo, private, overwrite)
        published = repository.text(CARD_FILE, there) if there and FILE in there.files else ""
        if published and own_section(published, f"the card in {repo}") is None:
            progress.note(f"the card in {repo} has no marked section, so it is replaced; the history keeps it")
        card = make_card(
            local.folder, repo, license=chosen, base_model=base_model, mark=local.mark, published=published
        )
        readme = Upload.of(CARD_FILE, card.encode())
        searched = local.searched + check_private([readme], allow, owner)
        files = sorted([*local.files, readme], key=lambda file: file.name)
        gone = _deletions(files, repository, there, overwrite) if there else []
        made = Push(
            repo=repo,
            url=f"{page}/tree/{quote(revision, safe='')}" if revision and revision != "main" else page,
            revision=revision,
            commit=None,
            pull_request=None,
            collection=None,
            private=there.private if there else private,
            files=[*(PushedFile(file.name, file.size, _status(file, there)) for file in files), *gone],
            skipped=local.skipped,
            bytes_total=sum(file.size for file in files),
            bytes_to_send=sum(file.size for file in files if not (there and there.has(file))),
            mark=local.mark,
            dry_run=dry_run,
            searched=searched,
        )
        if dry_run:
            return made
        repository.check_card(card)
        if there is None:
            repository.create(private)
            there = repository.look() or RevisionState("", private, {})
        if revision and not on_branch:
            repository.create_branch(revision)
        made = _publish(repository, made, files, there, create_pr, progress)
        with suppress(OSError):  # the card on the hub is the one that matters
            write_text_whole(local.folder / CARD_FILE, card)
        if collection:
            made = _collected(repository, made, collection)
    return made


save_to_hub = push


def _publish(
    repository: Repository, made: Push, files: list[Upload], there: RevisionState, create_pr: bool, progress: Progress
) -> Push:
    """Send the files that the repository does not have, and commit them."""
    missing = [file for file in files if not there.has(file)]
    gone = [file.name for file in made.files if file.status == "deleted"]
    if not missing and not gone:
        return made
    with progress.phase("uploading", len(missing)):
        operations = []
        for file in missing:
            large = isinstance(file.content, Path)
            operations.append(repository.send(file, made.revision, create_pr) if large else operation_of(file))
            progress.advance()
    deletions = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in gone]

    def complete(state: RevisionState) -> bool:
        return all(map(state.has, files)) and not set(gone) & set(state.files)

    message = f"Upload a model by upcycle {__version__}"
    everything: list[CommitOperationAdd | CommitOperationDelete] = [*operations, *deletions]
    where: str | None
    if create_pr:
        commit, url, where = repository.propose(everything, there, message, made.revision)
        made = replace(made, commit=commit, url=url, pull_request=url)
    else:
        commit, where = repository.commit(everything, there, message, made.revision, complete), made.revision
        made = replace(made, commit=commit)
    state = repository.look(where)
    lost = [file.name for file in files if state and not state.has(file)]
    if state and state.sha == commit and lost:
        raise UpcycleError(
            f"{made.repo} did not accept {', '.join(lost)}",
            hint=f"a .gitignore in it may exclude that: see {made.url}",
        )
    return made


def _collected(repository: Repository, made: Push, collection: str) -> Push:
    try:
        return replace(made, collection=repository.collect(collection, made.private))
    except UpcycleError as error:
        raise type(error)(f"{made.url} is published, but: {error.message}", hint=error.hint) from None


def _notes(local: Publishable) -> Iterator[str]:
    """Yield what the user might not expect."""
    if local.skipped:
        yield f"not published, because they are not in upcycle's record: {', '.join(local.skipped)}"
    if local.mark:
        yield f"published because of --force: {local.mark}"


def _connect(repo: str, endpoint: str | None, dry_run: bool, progress: Progress) -> tuple[Repository, str]:
    """Return the repository, and the URL of its page.

    Raises:
        EnvironmentFault: there is no token.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token() or ""
    if not token and not dry_run:
        raise EnvironmentFault(
            "there is no token for the hub",
            hint="hf auth login, or set HF_TOKEN (https://huggingface.co/settings/tokens)",
        )
    if not all("!" <= letter <= "~" for letter in token):
        raise EnvironmentFault("the token for the hub holds characters that tokens cannot have", hint="hf auth login")
    api = HfApi(endpoint=endpoint, token=token or False, library_name="upcycle", library_version=__version__)
    address = without_password(api.endpoint)
    hub = Hub(address, repo, token, from_environment(token))
    return Repository(api, hub, progress), f"{address}/{repo}"


def _look(
    repository: Repository, revision: str | None, create_pr: bool, dry_run: bool, progress: Progress
) -> tuple[RevisionState | None, bool]:
    """Return what the repository holds, and whether that is the wanted branch; if not, the branch will be created from it."""
    try:
        there = repository.look(revision)
        if there or not revision:
            found = there is not None
        else:
            found, there = False, repository.look()
    except EnvironmentFault as error:
        if not dry_run:
            raise
        progress.note(f"what the repository holds is not known: {error.message}")
        return None, True
    if not found and (create_pr or (revision or "").startswith("refs/")):
        what = f"revision '{revision}' in {repository.name}" if revision else f"repository {repository.name}"
        raise UsageError(f"there is no {what} to change", hint="check the spelling")
    return there, found


def _check_contents(there: RevisionState, repo: str, private: bool, overwrite: bool) -> None:
    """Refuse to publish into a repository that the user cannot mean.

    Raises:
        UsageError: the repository is public and should be private, or holds something that upcycle did not publish.
    """
    if private and not there.private:
        raise UsageError(
            f"{repo} exists and is public", hint="make it private in its settings first, or choose another name"
        )
    others = sorted(set(there.files) - {_ATTRIBUTES})
    if others and FILE not in there.files and not overwrite:
        listed = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise UsageError(
            f"{repo} holds something else: {listed}",
            hint="choose another name; or replace it with --overwrite (the repository's history keeps it)",
        )


def _deletions(files: list[Upload], repository: Repository, there: RevisionState, overwrite: bool) -> list[PushedFile]:
    """Return the files of an earlier model, which must not stay beside the new one; with ``overwrite``, all other files, too."""
    ours = repository.record(FILE, there).get("files")
    candidates = {VERIFICATION_FILE, EVALUATION_FILE, *REPORTS, *(ours if isinstance(ours, dict) else ())}
    if overwrite:
        candidates = set(there.files) - {_ATTRIBUTES}
    names = (candidates & set(there.files)) - {file.name for file in files}
    return [PushedFile(name, 0, "deleted") for name in sorted(names)]


def _status(file: Upload, there: RevisionState | None) -> str:
    if there is None or file.name not in there.files:
        return "new"
    return "unchanged" if there.has(file) else "changed"


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the client's warnings in the ``with`` block: they contain signed URLs, and upcycle's own messages say the same."""
    from huggingface_hub.utils import logging as client

    before = client.get_verbosity()
    client.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        client.set_verbosity(before)
