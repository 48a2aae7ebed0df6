"""One cache of compiled programs for all tests of the engine: compiling is their cost."""

import pytest

from pals.config import CACHE_DIR_VARIABLE


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compile-cache")


@pytest.fixture(autouse=True)
def shared_compile_cache(isolated_environment, compile_cache, monkeypatch):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(compile_cache))
