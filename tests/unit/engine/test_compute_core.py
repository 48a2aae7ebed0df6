from __future__ import annotations

import numpy as np

from pals.engine.batch import RowKind, SessionRequest
from pals.engine.compute_core import Compute, Planned
from pals.engine.work import AllowedTokens, InputRow, PenaltyHistory, RowSampling
from pals.types import PeerId, Sampling, SessionId
from tests.unit.engine.virtual_batch import make_batcher

PEER = PeerId("12D3alice")
PROMPT = list(range(100, 160))


def open_core(*texts: bytes) -> Compute:
    """Return a core, not at the tail, with sessions that are admitted."""
    batcher, _ = make_batcher(40)
    core = Compute(batcher, is_tail=False, max_queued_bytes=1 << 20)
    for text in texts:
        request = SessionRequest(
            session=SessionId(text), peer=PEER, prompt_tokens=len(PROMPT), max_tokens=200
        )
        core.open(request, text, None, None, 0.0)
    planned, events = core.plan(0.0)
    assert planned is None
    assert [owned.owner for owned in events] == list(texts)
    return core


def add(
    core: Compute,
    text: bytes,
    kind: RowKind,
    position: int,
    tokens: list[int],
    *,
    allowed: AllowedTokens | None = None,
) -> None:
    row = InputRow(
        owner=text,
        session=SessionId(text),
        kind=kind,
        position=position,
        inputs=np.array(tokens, np.int32),
        arrived_s=float(position),
        allowed=allowed,
    )
    assert core.add([row], 0.0) == []


def run(core: Compute, now: float) -> Planned:
    planned, _ = core.plan(now)
    assert planned is not None
    core.finish(planned, 0.1)
    return planned


def test_chunks_are_cut_by_position_whatever_arrays_they_came_in() -> None:
    core = open_core(b"d", b"p")
    add(core, b"d", "prefill", 0, [1])
    run(core, 0.0)
    add(core, b"d", "decode", 1, [2])
    add(core, b"p", "prefill", 0, PROMPT[:40])
    beside = run(core, 0.0)  # of a prompt as much as others wait for
    add(core, b"p", "prefill", 40, PROMPT[40:56])
    rest = run(core, 10.0)  # nobody decodes any more: all of it, as many as the first array has

    assert [inputs.tolist() for inputs in beside.inputs] == [[2], PROMPT[:16]]
    assert [inputs.tolist() for inputs in rest.inputs] == [PROMPT[16:56]]
    assert [row.arrived_s for row in rest.rows] == [0.0]
    assert core.queued_bytes == 0


def test_what_may_be_sampled_goes_with_the_end_of_a_prompt_however_it_is_cut() -> None:
    batcher, _ = make_batcher(40)
    core = Compute(batcher, is_tail=True, max_queued_bytes=1 << 20)
    prompt = 3 * PROMPT
    request = SessionRequest(
        session=SessionId(b"p"), peer=PEER, prompt_tokens=len(prompt), max_tokens=200
    )
    history = PenaltyHistory(np.zeros(0, np.int32), 0, is_masked=True)
    core.open(request, b"p", Sampling(), history, 0.0)
    changes = core.take_changes()
    assert changes is not None
    given = RowSampling(Sampling(), 1)
    core.set_sampling(changes.opened[0], given)
    core.plan(0.0)
    add(core, b"p", "prefill", 0, prompt[:10])
    add(core, b"p", "prefill", 10, prompt[10:], allowed=np.array([3], np.uint32))

    masks = []
    while core.queued_bytes:
        masks.append([(s, words.tolist()) for s, words in run(core, 0.0).masks])
    add(core, b"p", "decode", len(prompt), [1])

    assert len(masks) > 1
    assert masks == [*[[]] * (len(masks) - 1), [(given, [3])]]
    assert run(core, 0.0).masks == []


def test_array_counts_until_all_of_it_has_run() -> None:
    core = open_core(b"p")
    add(core, b"p", "prefill", 0, PROMPT[:30])
    add(core, b"p", "prefill", 30, PROMPT[30:])
    assert core.queued_bytes == 4 * len(PROMPT)
    core.close_session(SessionId(b"p"))
    assert core.queued_bytes == 0
