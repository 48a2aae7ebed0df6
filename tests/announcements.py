"""Announcements for tests that do not sign them."""

from __future__ import annotations

from typing import Any

from pals.net.announce import Announcement
from pals.types import LayerRange, PeerId


def make_announcement(peer: PeerId, layers: str = "0:1", **changes: Any) -> Announcement:
    """Return what the shard of ``layers`` announces, with some fields set otherwise.

    By default those are the last layers of the model, and the record never expires.
    """
    served = LayerRange.parse(layers)
    values: dict[str, Any] = {
        "model_id": "org/model",
        "manifest": bytes(32),
        "num_layers": served.stop,
        "layer_hashes": (bytes(16),) * len(served),
        "dtype": "f32",
        "free_tokens": 4096,
        "max_context_tokens": 2048,
        "step_ms": 1.0,
        "addresses": (),
        "seq": 1,
        "expires_at": float("inf"),
    }
    return Announcement(peer=peer, layers=served, **values | changes)
