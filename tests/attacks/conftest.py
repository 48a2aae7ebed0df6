"""Fixtures that the attacks share with the tests of what they attack."""

from tests.unit.backend.conftest import chain, database_url, path, service, wall_clock

__all__ = ["chain", "database_url", "path", "service", "wall_clock"]
