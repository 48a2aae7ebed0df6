"""Whether received hidden states can be any model's: finite, not absurdly large, not gone.

It does not show that they are right: a member can serve wrong numbers that look like
numbers (docs/security.md). It stops what would turn into NaN further on, and says whose it
was.

Pure, and one pass over the bits: of IEEE 754 numbers without their sign, a greater one has
the greater bit pattern, and infinities and NaN have the greatest of all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pals.errors import InvalidActivation
from pals.types import PeerId

MAX_MAGNITUDE = 2.0**30
"""Norm (the greatest magnitude) that no state exceeds; those of large models reach 1e6."""

_MAGNITUDE_BITS = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF)}
_UNSIGNED = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def are_sound(states: npt.NDArray[np.generic]) -> bool:
    """Return whether every one of some tokens is what a working shard sends.

    One pass for a whole frame; where it is not, `check_states` says which row is at fault.

    Args:
        states: ``[T, D]`` in bfloat16 or float32, contiguous.
    """
    size = states.dtype.itemsize
    norms = (states.view(_UNSIGNED[size]) & _MAGNITUDE_BITS[size]).max(axis=1)
    # Of infinities and NaN the bits are greater than those of any number.
    limit = np.array(MAX_MAGNITUDE, states.dtype).view(_UNSIGNED[size])
    return bool(norms.max() <= limit) and bool(norms.min() > 0)


def check_states(peer: PeerId, states: npt.NDArray[np.generic], *, position: int) -> None:
    """Refuse hidden states that no working shard sends.

    Args:
        peer: Who sent them, named in the error.
        states: ``[T, D]`` in bfloat16 or float32, contiguous.
        position: Of their first token in its session. Tokens whose embedding is zero may
            begin a prompt, and nothing else is zero.

    Raises:
        InvalidActivation: An element is NaN, infinite or beyond `MAX_MAGNITUDE`, or all are
            zero.
    """
    size = states.dtype.itemsize
    bits = states.view(_UNSIGNED[size])
    greatest = (bits & _MAGNITUDE_BITS[size]).max(keepdims=True).view(states.dtype)
    norm = float(greatest.astype(np.float64).item())
    if not np.isfinite(norm):
        raise InvalidActivation(peer=peer, problem="they hold NaN or infinity")
    if norm > MAX_MAGNITUDE:
        raise InvalidActivation(peer=peer, problem=f"their norm is {norm:.3g}")
    if norm == 0.0 and position > 0:
        raise InvalidActivation(peer=peer, problem="all of them are zero")
