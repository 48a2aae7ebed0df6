"""How much memory a shard gives to its KV cache when nobody says how much.

Pure: what the machine has is an argument.
"""

from __future__ import annotations

from pals.engine.pages import PageFormat
from pals.types import EngineLimits

PLANNED_TOKENS = 16384
"""A shard has room for as many at least."""

AMPLE_TOKENS = 131072
"""More are for contexts that are longer: a small model need not fill a large machine."""

HOST_PART = 0.5
"""Of what the plan leaves on a host, which runs other programs too, and maybe other shards."""

DEVICE_PART = 0.9
"""Of what it leaves on an accelerator, for what nothing accounts for."""


def choose_kv_bytes(
    limits: EngineLimits, format_: PageFormat, *, left_bytes: int, is_host: bool
) -> int:
    """Return the bytes of the cache: those that are named, or a part of what is left.

    Args:
        limits: Of the shard.
        format_: Of its pages.
        left_bytes: What weights, temporaries and the process itself leave.
        is_host: The cache is in the memory of the host.
    """
    if limits.kv_bytes is not None:
        return limits.kv_bytes
    context_pages = format_.pages_of(limits.max_context_tokens)
    all_pages = limits.max_sessions * context_pages
    least = min(format_.pages_of(PLANNED_TOKENS), all_pages)
    most = min(max(format_.pages_of(AMPLE_TOKENS), context_pages), all_pages)
    part = HOST_PART if is_host else DEVICE_PART
    fitting = int(max(0, left_bytes) * part) // format_.page_bytes - 1
    return (1 + max(least, min(most, fitting))) * format_.page_bytes
