"""A local Hub that the clients of this process use, for one test."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.request import getproxies

import datasets
import huggingface_hub
import pytest
import transformers
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.utils import _http, close_session

from tests.given import Patch
from tests.hub.server import HubServer


@pytest.fixture
def hub(monkeypatch: Patch, tmp_path: Path) -> Iterator[HubServer]:
    """Let huggingface_hub, transformers and datasets, imported offline, use an empty Hub, an empty cache and no token.

    Most settings are read from modules at each use. What is kept from one use to the next is replaced or dropped:
    client objects and file systems. Connections that are open do no harm: the Hub at their other end is gone.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")  # the Hub is on this machine, not beyond a proxy
    cache, server = tmp_path / "huggingface", HubServer()
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    HfFileSystem.clear_instance_cache()
    if getproxies().keys() - {"no"}:
        close_session()  # its proxies were chosen when it was made
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made at the first use
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": False,
        "HF_UPDATE_DOWNLOAD_COUNTS": False,  # kept elsewhere than on the Hub
        "USE_PARQUET_EXPORT": False,  # likewise
        "HF_DATASETS_CACHE": cache / "datasets",
        "DOWNLOADED_DATASETS_PATH": cache / "datasets" / "downloads",
        "EXTRACTED_DATASETS_PATH": cache / "datasets" / "downloads" / "extracted",
    }
    for name, value in settings.items():
        monkeypatch.setattr(datasets.config, name, value)
    no_waits = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", no_waits)  # clients try again at once
    with server:
        yield server
