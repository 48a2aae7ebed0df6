"""A hub of the test's own, and the hub's real client pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests import checkpoints
from tests.integration.models.hub_server import HubServer, Repo

NAME = "org/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Start a hub; this process' client, cache and token are the test's.

    The client reads its variables when it is imported, so that its values are replaced
    here; `tests.integration.models.test_models_cli` sets the variables themselves.
    """
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()
        yield server
        close_session()


@pytest.fixture
def repo(hub: HubServer, tmp_path: Path) -> Repo:
    """Put a model of 4 layers in 3 files on the hub, as ``org/tiny``."""
    folder = checkpoints.make_llama_checkpoint(tmp_path / "source", files=3)
    hub.repos[NAME] = Repo({"main": folder}, tags=["license:apache-2.0"])
    return hub.repos[NAME]
