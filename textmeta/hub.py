"""The Hugging Face Hub: fetching a repository's files into the cache, and its errors in plain words."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, get_token, snapshot_download
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from textmeta.errors import HubError, HubUnreachableError, logger
from textmeta.files import at_home

WAITS = (1, 3, 9)  # seconds before further tries, where the Hub answers that it has trouble
DEADLINE = 5.0  # seconds to wait for an answer
SILENT = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)  # which say that nobody was asked, or answered


@dataclass(frozen=True)
class HubAccess:
    """How the Hub is reached."""

    token: str | bool | None = field(default=None, repr=False)  # None: the one that `hf auth login` stored; False: none
    cache_dir: str | Path | None = None  # of the downloads; by default the Hub library's own
    local_files_only: bool = False  # use what the cache holds, and ask nobody


def fetch_snapshot(
    repo_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    access: HubAccess | None = None,
    ignore: Sequence[str] = (),
    force: bool = False,
) -> Path:
    """Bring the files of a model repository at one commit into the cache; return the folder, named after the commit.

    Patterns are those of a shell. Offline, or where the Hub does not answer, what is in the cache is taken; what is
    there is downloaded again if that is forced. HubError if there is no such repository or revision, or no right to it,
    HubUnreachableError if there is neither an answer nor a copy in the cache.
    """
    check_revision(revision)
    access, silence, waits = access or HubAccess(), None, iter(WAITS)
    if not access.local_files_only:
        try:
            check_reachable(repo_id, revision, token=access.token)
        except HubUnreachableError as error:
            silence = error
    with clear_hub_errors(repo_id, revision, token=access.token):
        while True:
            try:
                found = snapshot_download(
                    repo_id,
                    revision=revision,
                    token=access.token,
                    cache_dir=access.cache_dir and at_home(access.cache_dir),
                    local_files_only=access.local_files_only or silence is not None,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(ignore),
                    force_download=force,
                )
                return Path(found)
            except Exception as error:
                if silence is not None and not isinstance(error, errors.IncompleteSnapshotError):
                    raise silence from error  # says more than that the cache lacks it
                wait = next(waits, None) if _may_pass(error) else None
                if wait is None:
                    raise
                logger.warning("%s; trying again in %s s", _first_line(error), wait)
                time.sleep(wait)


def check_reachable(repo_id: str, revision: str | None = None, *, token: str | bool | None = None) -> None:
    """Check that the Hub answers, whatever it says of a repository; HubUnreachableError after :data:`DEADLINE` seconds.

    Its library waits without a limit in most places.
    """
    with clear_hub_errors(repo_id, revision, token=token):
        try:
            HfApi(token=token).repo_info(repo_id, timeout=DEADLINE)
        except Exception as error:
            if isinstance(error, errors.OfflineModeIsEnabled) or _is_network_error(error):
                raise


def is_repo_id(name: str) -> bool:
    """Whether a name can be a repository's id on the Hub."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return True


def check_revision(revision: str | None) -> None:
    """Check that a revision can be one (HubError): the Hub library makes a path in its cache of it."""
    if revision is None:
        return
    known = isinstance(revision, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,255}", revision)
    if not known or ".." in revision:
        raise HubError(f"{revision!r:.80} is no revision (branch, tag or commit) of a repository on the Hub")


@contextmanager
def clear_hub_errors(
    repo_id: str, revision: str | None = None, *, kind: str = "model", token: str | bool | None = None
) -> Iterator[None]:
    """Turn the Hub library's errors into :class:`HubError`, with what was asked for and what to do."""
    try:
        yield
    except Exception as error:
        what, at = f"the {kind} {repo_id!r}", f"(revision {revision or 'main'})"
        where = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        lacking = "no token was given: log in with `hf auth login`, or give a token"
        if token is not False and (token if isinstance(token, str) else get_token()):
            lacking = "the token given has no right to it"
        own = HubError
        if isinstance(error, errors.GatedRepoError):  # before its base class
            told = f"{what} is gated: ask for access at {where}; {lacking}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            told = f"there is no {kind} {repo_id!r} on the Hub ({where}), or it is private and {lacking}"
        elif isinstance(error, errors.RevisionNotFoundError):
            told = f"{what} has no revision {revision!r} (branch, tag or commit): see {where}"
        elif isinstance(error, errors.HFValidationError):
            told = f"{repo_id!r} is no id of a {kind} on the Hub (such as 'name' or 'owner/name'): {error}"
        elif isinstance(error, errors.IncompleteSnapshotError):
            own, lost = HubUnreachableError, "is in the cache, and the Hub cannot be asked for the rest"
            told = f"only a part of {what} {at} {lost}: {error}"
        elif isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            told = f"the Hub answers status {status} for {what}: {_first_line(error)}"
            told += f"; {lacking}" if status in (401, 403) else ""
        elif isinstance(error, SILENT) or _is_network_error(error):
            own = HubUnreachableError
            cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
            reason = f"{type(cause).__name__}: {_first_line(cause)}" if cause else "only local files were asked for"
            told = f"the Hub ({constants.ENDPOINT}) cannot be reached ({reason}), and {what} {at} is not in the cache"
        elif isinstance(error, OSError | RuntimeError):  # a file that arrived in part or damaged, a full disk
            told = f"{what} could not be transferred: {_first_line(error)}"
        else:
            raise
        raise own(told) from error


def _may_pass(error: BaseException | None) -> bool:
    """Whether the Hub had trouble of its own (it does not try the first request of a download again by itself)."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, errors.LocalEntryNotFoundError) and _may_pass(error.__cause__)


def _is_network_error(error: BaseException) -> bool:
    # of the HTTP client below the Hub library, which has changed before; its base classes are told by their names
    return any(base.__name__ == "TransportError" for base in type(error).__mro__) or isinstance(error, ConnectionError)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")
