"""Fixtures of the keepers' tests."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from pals.net import keeper as keeper_module
from pals.net import membership as membership_module
from pals.net import polling as polling_module
from tests.unit.net.keepers import Clock


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put everything on the virtual clock, threads included, for which it would not wait."""

    async def run(function: Callable[..., object], *args: object) -> object:
        return function(*args)

    made = Clock()
    monkeypatch.setattr(trio.to_thread, "run_sync", run)
    for module in (keeper_module, membership_module, polling_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=made.time))
    return made
