"""A driver in a process of its own, which a test can stop: prints each token as it comes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trio

from pals.config import Profile
from tests.integration.swarm import TestSwarm, ask, open_client, request


async def drive(profile: Profile, checkpoint: Path, prompt: list[int], count: int) -> None:
    swarm = TestSwarm(operator=profile, peers=(), checkpoint=checkpoint)
    async with open_client(swarm) as client:
        answer = await ask(client, request(prompt, count=count))
        for _ in range(count):
            sys.stdout.write(f"{(await answer.next_token()).token}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    folder, model, ids, tokens = sys.argv[1:]
    trio.run(drive, Profile(Path(folder)), Path(model), json.loads(ids), int(tokens))
