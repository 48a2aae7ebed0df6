"""What one running process does, as people are told of it: `pals ps`. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

_Text = Annotated[str, msgspec.Meta(max_length=1000)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class RoleLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that a process does for its swarm.

    Attributes:
        role: Serve layers, drive a model for an endpoint, or keep the backend.
        model: Its name; empty for none.
        layers: ``a:b``; empty for all or none.
        sessions: That it has now.
        free_tokens: Of cache that sessions to come find room for; None where there is none.
    """

    role: Literal["shard", "driver", "backend"]
    model: _Text = ""
    layers: _Text = ""
    sessions: _Count = 0
    free_tokens: _Count | None = None


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The process that runs with a profile.

    Attributes:
        pid: Its process id.
        peer: Its peer id.
        swarm: The swarm's name.
        swarm_id: In hex.
        uptime_s: Seconds since its network was up.
        memory_bytes: Of the machine's memory that it holds.
        addresses: Multiaddrs at which members reach it.
        endpoint: Where it answers HTTP; empty for nowhere.
        roles: What it does.
    """

    pid: int
    peer: _Text
    swarm: _Text
    swarm_id: _Text
    uptime_s: float
    memory_bytes: _Count
    addresses: tuple[_Text, ...]
    endpoint: _Text
    roles: tuple[RoleLine, ...]
