"""What the tail of a chain makes of a step: tokens, each to its driver and round the ring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pals.engine.work import InputRow, PenaltyHistory, RowResult, StepOutput, StepResult
from pals.net.control import Sampler, history_of
from pals.net.flow import SessionFlow
from pals.net.guiding import Guides
from pals.net.outbound import Outbound, Tokens
from pals.net.ring import SessionTable, ShardSession
from pals.net.timings import StepTimings
from pals.net.wire import pooled_shape, sampled_shape, scored_shape, tokens_shape
from pals.types import PeerId, Sampling


class TailOutput:
    """Sends sampled tokens.

    Args:
        outbound: Sends frames.
        table: Counts what is sampled.
        flows: The windows of the sessions that are open.
        timings: Told where a session pauses.
        guides: Told what was sampled once it is on its way.
        manifest: Of the model.
        num_layers: Of the model.
        hidden_size: Of the model.
    """

    def __init__(
        self,
        outbound: Outbound,
        table: SessionTable,
        flows: Mapping[ShardSession, SessionFlow[InputRow]],
        timings: StepTimings,
        guides: Guides,
        manifest: bytes,
        num_layers: int,
        hidden_size: int,
    ) -> None:
        self._outbound = outbound
        self._table = table
        self._flows = flows
        self._timings = timings
        self._guides = guides
        self._sampled = sampled_shape(manifest, num_layers)
        self._scored = scored_shape(manifest, num_layers)
        self._pooled = pooled_shape(manifest, num_layers, hidden_size)
        self._to_head = tokens_shape(manifest)

    def send(self, result: StepResult, sessions: Sequence[ShardSession | None], now: float) -> None:
        """Send each sampled token to its driver and, unless it is the last, to the head.

        A driver that lags a window behind gets its token; the head gets it once that driver
        has caught up.

        Args:
            result: A step.
            sessions: That of each row; None where it has ended meanwhile.
            now: On trio's clock.
        """
        assert result.output is not None
        sampled = result.output.sampled
        assert sampled is not None
        ids: list[int] = sampled.ids.tolist()
        to_heads, to_drivers, scored = Tokens(), Tokens(), Tokens()
        guided: list[tuple[ShardSession, int, int]] = []
        for row, session in zip(result.rows, sessions, strict=True):
            if session is None or not row.outputs:
                continue  # a chunk that is not its prompt's last
            if session.sampler.pooling:
                assert row.kind == "prefill"
                self._send_pooled(session, row, result.output)
                continue
            tokens = ids[row.first : row.first + row.outputs]
            is_last = self._go_round(session, row, tokens, to_heads)
            if session.sampler.grammar is not None and not is_last:
                guided.append((session, row.end, tokens[-1]))
            first_at = row.end + 1 - row.outputs
            if session.sampler.logprobs is None:
                to_drivers.add(session.driver, session, first_at, tokens, last=is_last)
            else:
                places = range(row.first, row.first + row.outputs)
                scored.add(session.driver, session, first_at, places, last=is_last)
        # The ring first: the driver only listens.
        self._outbound.send_tokens(self._to_head, to_heads)
        self._outbound.send_tokens(self._sampled, to_drivers)
        self._outbound.send_scores(self._scored, scored, sampled)
        for session, position, token in guided:
            self._guides.advance(session, position, token, now)

    def _send_pooled(self, session: ShardSession, row: RowResult, output: StepOutput) -> None:
        """Send the mean of a prompt's hidden states to its driver, once all of them are there.

        What is pooled is of the step's chunk, and only such rows are of sessions that pool.
        """
        if row.end < session.prompt_tokens or output.pooled is None:
            return
        self._table.take_sample(session, row.end, 0)
        mean = output.pooled / session.prompt_tokens
        self._outbound.send_pooled(self._pooled, session, mean)

    def send_held(self, session: ShardSession) -> None:
        """Let the token of a session that paused go round, if there is room for it now."""
        held = self._flows[session].release_token()
        if held is not None:
            position, token = held
            to_head = Tokens()
            to_head.add(PeerId(session.head.peer), session, position, (token,))
            self._outbound.send_tokens(self._to_head, to_head)

    def _go_round(
        self, session: ShardSession, row: RowResult, tokens: Sequence[int], to_heads: Tokens
    ) -> bool:
        """Let what was sampled after a row go to the head; return whether it is the last.

        What was sampled after each token of a draft goes to the driver alone: who drafted
        says how much of it is right, and where the next row stands.
        """
        position = row.end
        is_last = self._table.take_sample(session, position, tokens[-1])
        if row.kind == "verify":
            return False
        flow = self._flows[session]
        if not is_last and flow.has_room(position):
            to_heads.add(PeerId(session.head.peer), session, position, tokens)
        elif not is_last:
            flow.held_token = position, tokens[0]
            self._timings.note_pause(session.session)
        return is_last


def sampling_of(sampler: Sampler) -> tuple[Sampling, PenaltyHistory | None]:
    """Return how a session is sampled, and what its room in the bank begins with, if it has any."""
    is_masked = sampler.grammar is not None
    if not (is_masked or sampler.history):
        return sampler.to_sampling(), None
    history = PenaltyHistory(history_of(sampler), sampler.answered, is_masked)
    return sampler.to_sampling(), history
