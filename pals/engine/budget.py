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

RUNTIME_BASE_BYTES = 560 << 20
"""Resident size of a shard's process beside its arrays and programs: Python, jax, libp2p."""

HOST_PART = 0.5
"""Of what the plan leaves on a host, which runs other programs too, and maybe other shards."""

DEVICE_PART = 0.9
"""Of what it leaves on an accelerator, for what nothing accounts for."""


def choose_kv_bytes(
    limits: EngineLimits, format_: PageFormat, *, left_bytes: int, is_host: bool
) -> int:
    """Return the bytes of the cache: those that are named, or a part of what is left.

    Of sizes that nobody names there are few, each twice the one before, for programs are
    compiled for one size: a machine that has a little less free finds its programs again.

    Args:
        limits: Of the shard.
        format_: Of its pages.
        left_bytes: What weights and the process itself leave.
        is_host: The cache is in the memory of the host.
    """
    if limits.kv_bytes is not None:
        return limits.kv_bytes
    context_pages = format_.pages_of(limits.max_context_tokens)
    all_pages = limits.max_sessions * context_pages
    most = min(max(format_.pages_of(AMPLE_TOKENS), context_pages), all_pages)
    fitting = int(max(0, left_bytes) * (HOST_PART if is_host else DEVICE_PART))
    pages = min(format_.pages_of(PLANNED_TOKENS), all_pages)
    while pages < most and (1 + 2 * pages) * format_.page_bytes <= fitting:
        pages = min(2 * pages, most)
    return (1 + pages) * format_.page_bytes
