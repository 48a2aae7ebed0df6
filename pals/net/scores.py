"""Log-probabilities on their way from the tail to the driver, as words of a scored frame.

Pure functions over arrays; see `pals.net.wire.SCORED_WIDTH` for the words.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from pals.errors import InvalidFrame
from pals.net.wire import SCORED_WIDTH, TOP_LOGPROBS
from pals.types import Buffer, PeerId

_TOP_IDS = slice(2, 2 + TOP_LOGPROBS)
_TOP_LOGPROBS = slice(2 + TOP_LOGPROBS, SCORED_WIDTH)

Ids = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Score:
    """What a tail says of one token.

    Attributes:
        token: Its id.
        logprob: Of it; None where nobody asked for one.
        top: Ids and log-probabilities of the likeliest tokens, the likeliest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def pack_scores(ids: Ids, logprobs: Logprobs, top_ids: Ids, top_logprobs: Logprobs) -> Ids:
    """Return the words of scored tokens, ``<i4[n, 42]``.

    Args:
        ids: ``[n]``.
        logprobs: ``[n]``.
        top_ids: ``[n, k]`` for at most `TOP_LOGPROBS` alternatives.
        top_logprobs: ``[n, k]``.
    """
    count = top_ids.shape[1]
    words = np.zeros((len(ids), SCORED_WIDTH), "<i4")
    words[:, 0] = ids
    words[:, 1] = logprobs.astype("<f4").view("<i4")
    words[:, _TOP_IDS] = -1
    words[:, _TOP_IDS][:, :count] = top_ids
    words[:, _TOP_LOGPROBS][:, :count] = top_logprobs.astype("<f4").view("<i4")
    return words


def unpack_scores(peer: PeerId, payload: Buffer) -> list[Score]:
    """Read the payload of a scored frame, whole tokens.

    Raises:
        InvalidFrame: What should be a log-probability is no finite number.
    """
    words = np.frombuffer(payload, "<i4").reshape(-1, SCORED_WIDTH)
    logprobs = words[:, 1].copy().view("<f4")
    top_ids, top_logprobs = words[:, _TOP_IDS], words[:, _TOP_LOGPROBS].copy().view("<f4")
    if not np.isfinite(logprobs).all() or not np.isfinite(top_logprobs).all():
        raise InvalidFrame(peer=peer, problem="a log-probability that is no number")
    return [
        Score(token, logprob, tuple(takewhile(_is_there, zip(row_ids, row, strict=True))))
        for token, logprob, row_ids, row in zip(
            words[:, 0].tolist(),
            logprobs.tolist(),
            top_ids.tolist(),
            top_logprobs.tolist(),
            strict=True,
        )
    ]


def _is_there(alternative: tuple[int, float]) -> bool:
    return alternative[0] >= 0
