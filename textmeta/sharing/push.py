"""Pushing adapters to the Hub: one commit, or none."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from yaml import YAMLError

from textmeta.errors import AdapterError, HubError, logger
from textmeta.files import at_home, is_folder
from textmeta.hub import check_reachable, clear_hub_errors, is_repo_id
from textmeta.meta.adapter import Adapter
from textmeta.sharing.card import PLACEHOLDER
from textmeta.sharing.folder import ADAPTER_FILES, CARD, MANIFEST, manifest_of, read_adapter_files, read_file
from textmeta.sharing.locate import subfolder_prefix
from textmeta.sharing.store import Fitted, adapter_files, load_adapter


def push_adapter(
    adapter: Adapter, fitted: Fitted | None, repo_id: str, *, base_model: str | None = None, **how: Any
) -> CommitInfo:
    """Push an adapter, and a fitted classifier if there is one; see :meth:`~textmeta.FewShotClassifier.push_to_hub`.

    Everything goes in one commit on top of the one that was looked at, so readers see the old adapter or the new one.
    Files of an earlier adapter are deleted; all else in the repository stays. AdapterError if the encoder is no id on
    the Hub; HubError as for ``push_to_hub``, though a repository or branch that was made for it stays.
    """
    if base_model is not None:
        if not is_repo_id(base_model):
            raise AdapterError(f"base_model must be an id on the Hub (such as 'owner/name'), given {base_model!r:.80}")
        adapter = replace(adapter, encoder=replace(adapter.encoder, model=base_model, revision=None), commit=None)
    return _push_files(adapter, adapter_files(adapter, fitted), repo_id, **how)


def push_folder(folder: str | Path, repo_id: str, *, base_model: str | None = None, **how: Any) -> CommitInfo:
    """Push an adapter folder as it is, its card with whatever was edited in it; see :func:`push_adapter`.

    With a ``base_model`` the files that name the encoder, and the card, are written anew. AdapterError, too, if the
    folder is no whole adapter.
    """
    folder = at_home(Path(folder))
    adapter, fitted = load_adapter(folder)
    if base_model is not None:
        return push_adapter(adapter, fitted, repo_id, base_model=base_model, **how)
    files = read_adapter_files(folder)
    if (folder / CARD).is_file():
        files[CARD] = read_file(folder, CARD)
    return _push_files(adapter, files, repo_id, **how)


def _push_files(
    adapter: Adapter,
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    if not is_repo_id(adapter.encoder.model) or is_folder(adapter.encoder.model):
        raise AdapterError(
            f"not pushed: the adapter's encoder is {adapter.encoder.model!r}, a folder of this machine, which nobody "
            "else has; say which encoder on the Hub it is (base_model='owner/name'; its weights are checked on loading)"
        )
    prefix = subfolder_prefix(subfolder)
    contents = {name: content for name, content in files.items() if name != CARD}
    contents[MANIFEST] = manifest_of(contents)
    api = HfApi(token=token)
    check_reachable(repo_id, token=token)
    try:  # before anything is made or uploaded, for a message that names the card
        with clear_hub_errors(repo_id, token=token):
            if CARD in files:
                ModelCard(files[CARD].decode(), ignore_metadata_errors=False).validate(repo_type="model")
    except (ValueError, YAMLError) as error:
        raise AdapterError(f"not pushed: the Hub does not accept the metadata block of {CARD}: {error}") from error
    with clear_hub_errors(repo_id, revision, token=token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its owner's name
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
    if private and not head.private:
        raise HubError(f"not pushed: {repo_id!r} is there already, and is public: make it private first, or a new one")
    if CARD in files:
        name = f'"{repo_id}"' + (f', subfolder="{subfolder}"' if subfolder else "")
        contents[CARD] = files[CARD].replace(PLACEHOLDER.encode(), name.encode())
    present = {file.rfilename for file in head.siblings or []}
    stale = sorted(name for name in ADAPTER_FILES - contents.keys() if prefix + name in present)
    operations: list[Any] = [
        *(CommitOperationAdd(prefix + name, content) for name, content in sorted(contents.items())),
        *(CommitOperationDelete(prefix + name) for name in stale),
    ]
    message = commit_message or f"Upload a textmeta adapter{f' to {subfolder}' if subfolder else ''}"
    try:
        with clear_hub_errors(repo_id, revision, token=token):
            done = api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha
            )
    except HubError as error:
        if isinstance(error.__cause__, HfHubHTTPError) and error.__cause__.response.status_code == 412:
            told = "in the meantime; nothing was changed. Look at what they pushed, then push again"
            raise HubError(f"not pushed: somebody else pushed to {repo_id!r} {told}") from error
        raise
    logger.info("pushed to %s: %s", repo_id, done.commit_url)
    return done
