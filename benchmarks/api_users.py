"""Users of an OpenAI endpoint who ask again as soon as they are answered; locust runs it.

``locust -f benchmarks/api_users.py`` in locust's own environment, which has nothing of Pals.
Each user streams answers of a fixed number of tokens to prompts that nobody asked before, each
over a connection of its own: llama-server closes some that it has promised to keep.
What came when goes to a file as JSON lines, one for each answer that ended in time.

Environment: ``API_USERS_MODEL``, ``API_USERS_TOKENS``, ``API_USERS_BANNED`` (ids that
may not come), ``API_USERS_SALT`` (makes the prompts of a round its own), ``API_USERS_OUT``.
"""

from __future__ import annotations

import itertools
import json
import os
import time

from locust import HttpUser, constant, events, task

MODEL = os.environ["API_USERS_MODEL"]
TOKENS = int(os.environ["API_USERS_TOKENS"])
BANNED = os.environ["API_USERS_BANNED"].split(",")
SALT = os.environ["API_USERS_SALT"]
OUT = os.environ["API_USERS_OUT"]
DEADLINE_S = 120.0

_numbers = itertools.count()
_answers: list[dict[str, object]] = []


class User(HttpUser):
    """Asks, reads the answer to its end, and asks the next."""

    wait_time = constant(0)

    @task
    def ask(self) -> None:
        """Stream one answer, and note when its parts came."""
        asked = {
            "model": MODEL,
            "messages": [{"role": "user", "content": _prompt(next(_numbers))}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "logit_bias": dict.fromkeys(BANNED, -100),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began_s = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions",
            json=asked,
            headers={"connection": "close"},
            stream=True,
            catch_response=True,
            timeout=DEADLINE_S,
        ) as response:
            if response.status_code != 200:
                response.failure(
                    f"status {response.status_code}: {response.error or response.text}"
                )
                return
            arrivals_s, tokens = _read(response.iter_lines())
            if tokens != TOKENS:
                response.failure(f"{tokens} tokens came")
                return
        _answers.append({"began_s": began_s, "arrivals_s": arrivals_s, "tokens": tokens})


def _prompt(number: int) -> str:
    return f"Tell me a long story of traveller {SALT}-{number} who finds a letter in a bottle."


def _read(lines) -> tuple[list[float], int]:  # noqa: ANN001 (of locust's environment)
    """Return when parts of the text came, and how many tokens the server says it has."""
    arrivals_s, tokens = [], 0
    for line in lines:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[len(b"data: ") :])
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
        if any(choice["delta"].get("content") for choice in chunk["choices"]):
            arrivals_s.append(time.perf_counter())
    return arrivals_s, tokens


@events.quitting.add_listener
def _write(**_: object) -> None:
    with open(OUT, "w") as file:
        file.writelines(json.dumps(answer) + "\n" for answer in _answers)
