from __future__ import annotations

import h11
import pytest

from pals.api import protocol
from pals.api.heads import check_head
from pals.api.protocol import StrictConnection

HEAD = b"GET /health HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n"


def feed(connection: StrictConnection, data: bytes) -> list[h11.Event]:
    """Let ``data`` arrive a byte at a time, and return what it was read as."""
    events: list[h11.Event] = []
    for byte in data:
        connection.receive_data(bytes([byte]))
        while isinstance(event := connection.next_event(), h11.Event):
            events.append(event)
    return events


@pytest.mark.parametrize(
    "data",
    [
        HEAD.replace(b"\r\nX", b"\nX"),
        HEAD.replace(b"\r\nX", b"\rX"),
        HEAD.replace(b"\r\nX", b"\r\n X"),
        HEAD.replace(b"y", b"\x00"),
    ],
)
def test_a_head_in_single_bytes_is_checked_across_their_borders(data: bytes) -> None:
    connection = StrictConnection(h11.SERVER)

    with pytest.raises(h11.RemoteProtocolError):
        feed(connection, data)

    assert connection.refusal is not None


def test_each_head_of_a_connection_is_checked_from_its_start() -> None:
    connection = StrictConnection(h11.SERVER)
    feed(connection, HEAD)
    connection.send(h11.Response(status_code=204, headers=[]))
    connection.send(h11.EndOfMessage())
    connection.start_next_cycle()

    with pytest.raises(h11.RemoteProtocolError):
        feed(connection, b"G\nT")


def test_a_head_in_single_bytes_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    def counting(received: bytes, checked: int = 0) -> int:
        looked_at.append(len(received) - checked)
        return check_head(received, checked)

    monkeypatch.setattr(protocol, "check_head", counting)

    request, end = feed(StrictConnection(h11.SERVER), HEAD)

    assert isinstance(request, h11.Request)
    assert isinstance(end, h11.EndOfMessage)
    # The byte that came, and a CR before it.
    assert max(looked_at) <= 2
