"""Fixtures that the attacks share with the tests of what they attack."""

from tests.unit.backend.conftest import chain, database_url, path, service, wall_clock
from tests.unit.net.conftest import clock

__all__ = ["chain", "clock", "database_url", "path", "service", "wall_clock"]
