"""What a server that was asked to stop says it waits for."""

from __future__ import annotations

import pytest

from pals.cli import serve
from pals.cli.endpoint import Endpoint
from pals.cli.process import leaving_note


class Line:
    """An admission with so many requests that run."""

    def __init__(self, running: int) -> None:
        self.running = running
        self.is_leaving = False

    def standing(self) -> Line:
        return self

    def leave(self) -> None:
        self.is_leaving = True


class Shard:
    def __init__(self) -> None:
        self.is_leaving = False

    def leave(self) -> None:
        self.is_leaving = True


@pytest.mark.parametrize(
    ("running", "said"),
    [
        (0, ""),
        (1, "waiting for 1 answer, at most 30 s; press Ctrl-C again to leave at once\n"),
        (2, "waiting for 2 answers, at most 30 s; press Ctrl-C again to leave at once\n"),
    ],
)
def test_an_endpoint_says_how_many_answers_run(
    running: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line, shard = Line(running), Shard()

    serve._leave(Endpoint(drivers={}, shard=shard), line, 30.0)

    assert capsys.readouterr().err == said
    assert line.is_leaving
    assert shard.is_leaving


def test_a_shard_says_how_many_sessions_move(capsys: pytest.CaptureFixture[str]) -> None:
    for sessions in (0, 1, 2):
        leaving_note(20.0, sessions)

    assert capsys.readouterr().err.splitlines() == [
        f"waiting for {what} to move to other shards, at most 20 s; "
        "press Ctrl-C again to leave at once"
        for what in ("1 session", "2 sessions")
    ]
