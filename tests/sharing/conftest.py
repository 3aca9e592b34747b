import shutil
from pathlib import Path

import pytest

from tests.sharing.made import make_adapter, make_reader, save
from textmeta.encoder.token_states import TokenStateReader
from textmeta.meta.adapter import Adapter


@pytest.fixture(scope="session")
def reader(tiny_model: str) -> TokenStateReader:
    return make_reader(tiny_model)


@pytest.fixture(scope="session")
def adapter(reader: TokenStateReader) -> Adapter:
    return make_adapter(reader)


@pytest.fixture(scope="session")
def saved(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fitted classifier, to be left as it is."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save(folder, tiny_model)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))
