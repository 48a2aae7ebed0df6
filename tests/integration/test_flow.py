"""A driver that stops taking tokens stops its own session; everybody else goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from pals.config import Profile
from pals.driver.sessions import SessionClient
from pals.net.flow import SAMPLED_WINDOW_TOKENS
from pals.net.shard_service import ShardService
from tests.integration.net.harness import until
from tests.integration.swarm import (
    DEADLINE_S,
    RunningShard,
    TestSwarm,
    ask,
    make_swarm,
    open_client,
    request,
    start_chain,
)
from tests.integration.test_ring import PROMPTS, tokens_of_whole_model

pytestmark = [pytest.mark.trio, pytest.mark.slow, pytest.mark.timeout(180)]

COUNT = 80
ROOT = Path(__file__).parents[2]


async def healthy_tokens(client: SessionClient, prompt: list[int]) -> list[int]:
    return await (await ask(client, request(prompt, count=COUNT - 30))).all_tokens()


async def test_a_driver_that_takes_nothing_stops_its_own_session_and_no_other(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_swarm(tmp_path) as swarm:
        await start_chain(nursery, swarm, "0:3", "3:6")
        async with open_client(swarm) as healthy, open_client(swarm, swarm.peers[2]) as stopped:
            monkeypatch.setattr(stopped._opener, "acknowledge", lambda _: None)
            answer = await ask(stopped, request(PROMPTS[0], count=COUNT))
            for _ in range(SAMPLED_WINDOW_TOKENS + 2):
                await answer.next_token()
            others = [await healthy_tokens(healthy, prompt) for prompt in PROMPTS[1:]]
            with pytest.raises(trio.WouldBlock):
                answer.events.receive_nowait()
            stopped.close(answer.session)
            again = await healthy_tokens(stopped, PROMPTS[1][:4])
        nursery.cancel_scope.cancel()

    assert others == [tokens_of_whole_model(swarm, p, COUNT - 30) for p in PROMPTS[1:]]
    assert answer.tokens == tokens_of_whole_model(swarm, PROMPTS[0], COUNT)[: len(answer.tokens)]
    assert again == tokens_of_whole_model(swarm, PROMPTS[1][:4], COUNT - 30)


@pytest.mark.slow
async def test_a_driver_that_is_suspended_goes_on_later_and_nobody_waits_for_it(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        shards = await start_chain(nursery, swarm, "0:3", "3:6")
        async with open_client(swarm) as healthy:
            with running_driver(swarm, swarm.peers[2]) as driver:
                tokens = [await read_token(driver) for _ in range(3)]
                driver.send_signal(signal.SIGSTOP)
                others = [await healthy_tokens(healthy, prompt) for prompt in PROMPTS[1:]]
                await until(lambda: [sessions_at(shard) for shard in shards] == [1, 1])
                driver.send_signal(signal.SIGCONT)
                tokens += [await read_token(driver) for _ in range(COUNT - 3)]
        nursery.cancel_scope.cancel()

    assert others == [tokens_of_whole_model(swarm, p, COUNT - 30) for p in PROMPTS[1:]]
    assert tokens == tokens_of_whole_model(swarm, PROMPTS[0], COUNT)


def sessions_at(shard: RunningShard) -> int:
    (role,) = shard.node._dispatch.roles
    assert isinstance(role, ShardService)
    return role.sessions


@contextmanager
def running_driver(swarm: TestSwarm, profile: Profile) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [str(profile.path), str(swarm.checkpoint), json.dumps(PROMPTS[0]), str(COUNT)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.driver_child", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def read_token(driver: subprocess.Popen[bytes]) -> int:
    assert driver.stdout is not None
    with trio.fail_after(DEADLINE_S):
        line = await trio.to_thread.run_sync(
            partial(driver.stdout.readline), abandon_on_cancel=True
        )
    return int(line)
