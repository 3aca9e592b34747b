"""What a name means: an existing folder, an adapter of the package, or a repository on the Hub; in this order."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi

from textmeta.artifact.adapter import Adapter
from textmeta.artifact.card import CARD
from textmeta.artifact.folder import MANIFEST, is_there, seems_to_be
from textmeta.artifact.store import ADAPTER_FILES, load_adapter
from textmeta.errors import AdapterError, DamagedAdapterError, HubError
from textmeta.files import is_folder
from textmeta.hub import HubAccess, clear_hub_errors, fetch_snapshot, is_repo_id
from textmeta.model.encoder import Encoder

__all__ = ["DEFAULT_ADAPTER", "Location", "load_from", "load_with_encoder", "locate", "subfolder_prefix"]

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parents[1] / "adapters"  # of the package; their names begin with its own
SHIPPED_PREFIX = "textmeta/"
DEFAULT_ADAPTER = "textmeta/minilm-general"


@dataclass(frozen=True)
class Location:
    """Where an adapter was found.

    Args:
        folder: on this machine.
        kind: what its name meant.
        commit: of a repository on the Hub.
    """

    folder: Path
    kind: Literal["folder", "shipped", "hub"]
    commit: str | None = None

    def check_encoder(self, model: str) -> None:
        """Check that loading an encoder because this adapter names it opens no folder of the machine's owner.

        Raises:
            AdapterError: if the adapter is from the Hub, but the encoder that it names is not.
        """
        if self.kind == "hub" and (not is_repo_id(model) or is_folder(model)):
            raise AdapterError(
                f"the adapter in {self.folder} names {model!r} as its encoder. It came from the Hub, and no folder of "
                "this machine is opened because somebody else's adapter says so: name the encoder yourself"
            )


def locate(
    name: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    access: HubAccess | None = None,
    force: bool = False,
) -> Location:
    """Find the folder of a name, downloading it if it is a repository's; the log says which it is.

    Args:
        name: a folder; the name of an adapter in the package (``textmeta/minilm-…``); or an id on the Hub.
        revision: branch, tag or commit on the Hub; with one, a name can only mean the Hub.
        subfolder: of the folder or repository.
        access: how the Hub is reached.
        force: download again what is in the cache.

    Raises:
        AdapterError: if it is no folder and cannot be an id on the Hub, or the subfolder none.
        HubError: if the Hub has none of that id and revision, does not let this user at it, or cannot be reached.
    """
    prefix = subfolder_prefix(subfolder)
    text = str(name)
    if revision is None and is_there(name):
        if not (Path(name) / prefix).resolve().is_relative_to(Path(name).resolve()):
            raise AdapterError(f"the subfolder {subfolder} of {name} is a link out of it; it is not followed")
        logger.info("%s is a folder", Path(name).absolute())
        return Location(Path(name) / prefix, "folder")
    shipped = SHIPPED / text.removeprefix(SHIPPED_PREFIX)
    if revision is None and text.startswith(SHIPPED_PREFIX) and shipped.parent == SHIPPED and is_folder(shipped):
        logger.info("%s is shipped with textmeta: %s", text, shipped)
        return Location(shipped / prefix, "shipped")
    if isinstance(name, Path) or not is_repo_id(text):
        raise AdapterError(
            f"no such adapter folder: {text:.200}; nor is it the id of a repository on the Hub (such as 'owner/name')"
            + (f", which alone has revisions (given {revision!r:.80})" if revision is not None else "")
        )
    try:
        wanted = [prefix + file for file in (*sorted(ADAPTER_FILES), MANIFEST, CARD)]
        snapshot = fetch_snapshot(text, wanted, revision=revision, access=access, force=force)
    except HubError as error:
        raise type(error)(f"{text!r} is no folder here, and {error}") from error
    logger.info("%s is on the Hub, at commit %s: %s", text, snapshot.name, snapshot)
    return Location(snapshot / prefix, "hub", snapshot.name)


def subfolder_prefix(subfolder: str | None) -> str:
    """Return what stands before the names of a subfolder's files: nothing, or a path that ends in a slash.

    Raises:
        AdapterError: if it is no path below.
    """
    if subfolder is None:
        return ""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", subfolder):
        raise AdapterError(f"subfolder must be a path below, such as 'adapters/first', given {subfolder!r:.80}")
    return f"{subfolder}/"


def load_from(
    name: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    access: HubAccess | None = None,
) -> tuple[Adapter, Location]:
    """Load an adapter by its name (:func:`locate`); one that is damaged in the Hub's cache is downloaded again, once.

    Args:
        name: a folder, an adapter in the package, or an id on the Hub.
        revision: branch, tag or commit on the Hub.
        subfolder: of the folder or repository.
        access: how the Hub is reached.

    Raises:
        AdapterError: if it is none, or damaged.
        HubError: see :func:`locate`.
    """
    access = access or HubAccess()
    where = locate(name, revision=revision, subfolder=subfolder, access=access)
    if where.kind == "hub" and not (where.folder / MANIFEST).exists():
        raise AdapterError(f"{name!r} on the Hub is no textmeta adapter: {_contents(str(name), revision, access)}")
    try:
        adapter = load_adapter(where.folder)
    except DamagedAdapterError as error:
        if where.kind != "hub" or access.local_files_only:
            raise
        logger.warning("%s; downloading it again", error)
        where = locate(name, revision=where.commit, subfolder=subfolder, access=access, force=True)
        adapter = load_adapter(where.folder)
    return adapter, where


def load_with_encoder(
    name: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    access: HubAccess | None = None,
    device: str | torch.device = "cpu",
    encoder: str | None = None,
) -> tuple[Adapter, Encoder]:
    """Load an adapter by its name (:func:`load_from`), and the encoder that it names, if none is given to load."""
    adapter, where = load_from(name, revision=revision, subfolder=subfolder, access=access)
    if encoder is None:
        where.check_encoder(adapter.encoder.model)
    return adapter, adapter.load_encoder(device, encoder, access)


def _contents(repo_id: str, revision: str | None, access: HubAccess) -> str:
    """Say what a repository seems to be instead."""
    if access.local_files_only:
        return f"it has no {MANIFEST} in the cache"
    with clear_hub_errors(repo_id, revision, token=access.token):
        names = HfApi(token=access.token).list_repo_files(repo_id, revision=revision)
    inside = sorted({str(Path(name).parent) for name in names if Path(name).name == MANIFEST})
    if inside:
        return f"it has adapters in the subfolders {', '.join(inside[:5])}: name one (subfolder=…)"
    return f"it has no {MANIFEST}; it {seems_to_be(names)}"
