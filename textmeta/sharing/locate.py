"""What a name means: a folder, an adapter that comes with textmeta, or a repository on the Hub; in this order."""

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from textmeta.errors import AdapterError, DamagedAdapterError, HubError, logger
from textmeta.files import at_home, is_folder
from textmeta.hub import HubAccess, fetch_snapshot, is_repo_id
from textmeta.sharing.folder import ADAPTER_FILES, CARD, MANIFEST, OTHERS, is_there, read_adapter_files

SHIPPED = Path(__file__).parents[1] / "adapters"  # of the package; their names begin with its own
SHIPPED_PREFIX = "textmeta/"
DEFAULT_ADAPTER = "textmeta/minilm-general"


class Location(NamedTuple):
    """Where an adapter was found."""

    folder: Path  # on this machine
    kind: Literal["folder", "shipped", "hub"]  # what its name meant
    commit: str | None = None  # of a repository on the Hub


def read_located(
    name: str | Path, *, revision: str | None = None, subfolder: str | None = None, access: HubAccess | None = None
) -> tuple[dict[str, bytes], Location]:
    """Read the files of an adapter by its name, checked against their hashes; the log says what the name meant.

    It is a folder; an adapter that comes with textmeta; or, with a revision always, an id on the Hub. What is damaged
    in the Hub's cache is downloaded again, once. AdapterError if a name means none of these, or what it means is no
    adapter, of another version, or damaged; HubError if the Hub has no such revision, or cannot be reached.
    """
    where, repo_id = _locate(name, revision, subfolder, access), str(name)
    try:
        return read_adapter_files(where.folder, repo_id if where.kind == "hub" else None), where
    except DamagedAdapterError as error:
        if where.kind != "hub" or (access and access.local_files_only):
            raise
        logger.warning("%s; downloading it again", error)
        where = _locate(name, where.commit, subfolder, access, force=True)
        return read_adapter_files(where.folder, repo_id), where


def _locate(
    name: str | Path, revision: str | None, subfolder: str | None, access: HubAccess | None, force: bool = False
) -> Location:
    """Find the folder of a name, downloading it if it is a repository's, and again if that is forced."""
    prefix = subfolder_prefix(subfolder)
    name = at_home(name)
    text = str(name)
    if revision is None and is_there(name):
        if not (Path(name) / prefix).resolve().is_relative_to(Path(name).resolve()):
            raise AdapterError(f"the subfolder {subfolder} of {name} is a link out of it; it is not followed")
        logger.debug("%s is a folder", Path(name).absolute())
        return Location(Path(name) / prefix, "folder")
    shipped = SHIPPED / text.removeprefix(SHIPPED_PREFIX)
    if revision is None and text.startswith(SHIPPED_PREFIX) and shipped.parent == SHIPPED and is_folder(shipped):
        logger.debug("%s comes with textmeta: %s", text, shipped)
        return Location(shipped / prefix, "shipped")
    if isinstance(name, Path) or not is_repo_id(text):
        told = "nor is it the id of a repository on the Hub (such as 'owner/name')"
        told += f", which alone has revisions (given {revision!r:.80})" if revision is not None else ""
        raise AdapterError(f"no such adapter folder: {text:.200}; {told}")
    try:
        wanted = [prefix + file for file in (*sorted(ADAPTER_FILES), MANIFEST, CARD, *OTHERS)]
        snapshot = None
        if not force and re.fullmatch("[0-9a-f]{40}", str(revision)):  # what a commit holds never changes
            with suppress(HubError):
                here = replace(access or HubAccess(), local_files_only=True)
                snapshot = fetch_snapshot(text, wanted, revision=revision, access=here)
        snapshot = snapshot or fetch_snapshot(text, wanted, revision=revision, access=access, force=force)
    except HubError as error:
        raise type(error)(f"{text!r} is no folder here, and {error}") from error
    logger.info("%s is on the Hub, at commit %s: %s", text, snapshot.name, snapshot)
    return Location(snapshot / prefix, "hub", snapshot.name)


def subfolder_prefix(subfolder: str | None) -> str:
    """Return what stands before the names of a subfolder's files; AdapterError if it is no path below."""
    if subfolder is None:
        return ""
    if not isinstance(subfolder, str) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", subfolder):
        raise AdapterError(f"subfolder must be a path below, such as 'adapters/first', given {subfolder!r:.80}")
    return f"{subfolder}/"
