"""What every test shares: no network, no profile and no cache of the user's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from pals import config

# The hub's client reads it once, when the first test module that names it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# Every run plays the same examples, and a machine under load makes none of them fail.
settings.register_profile("pals", derandomize=True, deadline=None)
settings.load_profile("pals")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache folder of what serves several tests: models that are imported once.

    Its compiled programs are those of every test: what one compiled, the next one loads.
    """
    folder = tmp_path_factory.mktemp("shared-cache")
    (folder / "xla").mkdir(mode=0o700)
    return folder


@pytest.fixture(autouse=True)
def isolated_environment(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    shared_cache: Path,
) -> None:
    """Point every folder at a fresh one, and keep the hub and inherited secrets out."""
    for variable in (config.SWARM_SECRET_VARIABLE, config.INVITE_VARIABLE, config.API_KEY_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(
        config.CONFIG_DIR_VARIABLE, str(tmp_path_factory.mktemp("profile", numbered=True))
    )
    cache = tmp_path_factory.mktemp("cache", numbered=True)
    (cache / "xla").symlink_to(shared_cache / "xla")
    monkeypatch.setenv(config.CACHE_DIR_VARIABLE, str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf", numbered=True)))
    for variable in ("HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
