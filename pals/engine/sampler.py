"""Turns logits into tokens inside the tail's step, one row for each sampled token.

A token depends on its logits, its session's `Sampling`, its position and what its session's
bank row counts: never on the other rows, nor on how the session was cut into steps. In order:
logit_bias; repetition_penalty; frequency_penalty and presence_penalty; the mask; then the
likeliest token, or: temperature; min_p and top_k; top_p; a draw. Log-probabilities are those
of the model's own logits, before all of these.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# (jax annotates its functions with types that pyright sees as partially unknown)

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pals.engine.bank import MAX_COUNT, Bank, add_counts, unpack_bits
from pals.engine.drawing import (
    Draws,
    draw_tokens,
    pick_likeliest,
    top_tokens,
)
from pals.engine.sampling_rows import MAX_LOGPROBS, ROW_WORDS
from pals.engine.work import Sampled

SMALLEST = 1e-5
"""Temperatures below are greedy; a lower top_p or repetition_penalty acts as this one does."""

_LARGEST = 1e30
_GROUP_ROWS = 8
"""Rows that are drawn together: so many are in the processor's cache at one time, need room
for temporaries, and wait for one of them that wants what the others do not."""


class SamplingRows(NamedTuple):
    """The words of `build_sampling_rows` on the device, one entry a row.

    Attributes:
        temperature, top_p, min_p, repetition, presence, frequency: [S] float32.
        top_k: [S] int32; 0 for all.
        seeds: [S, 2] uint32, the high and low halves.
        slots: [S] int32, rows of the bank; 0 for none.
        is_counted: [S] bool.
        wanted: [S] int32, 0 for no logprobs, else 1 + how many alternatives.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    top_k: jax.Array
    seeds: jax.Array
    slots: jax.Array
    is_counted: jax.Array
    wanted: jax.Array

    @property
    def are_random(self) -> jax.Array:
        return self.temperature >= SMALLEST

    @property
    def are_banked(self) -> jax.Array:
        return self.slots > 0


def abstract_rows(size: int) -> jax.ShapeDtypeStruct:
    """Return the shape of what `build_sampling_rows` builds."""
    return jax.ShapeDtypeStruct((size, ROW_WORDS), jnp.uint32)


def sample(
    logits: jax.Array, rows: jax.Array, positions: jax.Array, bank: Bank
) -> tuple[Sampled, Bank]:
    """Choose one token for each row, and count those that are to be counted.

    A batch pays for a feature only if one of its rows asks for it: greedy ones for a maximum.

    Args:
        logits: [S, V] float32.
        rows: [S, ROW_WORDS] uint32, from `build_sampling_rows`.
        positions: [S] int32, where the chosen tokens will stand in their sessions.
        bank: Donated by the step. Several rows of a session all see it as it comes.
    """
    with jax.named_scope("sample"):
        unpacked = unpack_rows(rows)
        is_plain = ~(unpacked.are_random | unpacked.are_banked)
        ids = lax.cond(
            jnp.all(is_plain),
            lambda: pick_likeliest(logits),
            lambda: _choose(logits, unpacked, positions, bank),
        )
        slots = jnp.where(unpacked.is_counted, unpacked.slots, 0)
        bank = bank._replace(counts=add_counts(bank.counts, slots, ids))
        return score_tokens(logits, ids, unpacked.wanted), bank


def score_tokens(logits: jax.Array, ids: jax.Array, wanted: jax.Array) -> Sampled:
    """Return the tokens with the log-probabilities that their rows want.

    Args:
        logits: [S, V] float32, the model's own.
        ids: [S] int32.
        wanted: [S] int32, as in `SamplingRows`.
    """
    rows, vocab_size = logits.shape
    names = min(MAX_LOGPROBS, vocab_size)
    nothing = jnp.full((rows, names), -1, jnp.int32), jnp.zeros((rows, names))

    def name_top(total: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, tokens = top_tokens(logits, names)
        is_wanted = jnp.arange(names) + 1 < wanted[:, None]
        found = (tokens, values - total)
        return jax.tree.map(lambda a, b: jnp.where(is_wanted, a, b), found, nothing)

    def score() -> tuple[jax.Array, jax.Array, jax.Array]:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        own = (
            jnp.take_along_axis(logits, ids[:, None], axis=-1, mode="promise_in_bounds") - total
        )[:, 0]
        top = lax.cond(jnp.any(wanted > 1), lambda: name_top(total), lambda: nothing)
        return jnp.where(wanted > 0, own, 0), *top

    own, tokens, values = lax.cond(jnp.any(wanted > 0), score, lambda: (jnp.zeros(rows), *nothing))
    padding = [(0, 0), (0, MAX_LOGPROBS - names)]
    tokens = jnp.pad(tokens, padding, constant_values=-1)
    # The same tuple as on the host.
    return Sampled(ids, own, tokens, jnp.pad(values, padding))  # pyright: ignore[reportArgumentType]


def penalise(logits: jax.Array, rows: SamplingRows, bank: Bank) -> jax.Array:
    """Return the logits [S, V] with what each row's slot holds; -inf for what is not allowed.

    Repetition as in https://arxiv.org/abs/1909.05858, of prompt and answer; frequency and
    presence as in OpenAI's API, of the answer.
    """
    vocab_size = logits.shape[1]
    row = jnp.arange(len(logits))[:, None]
    x = logits.at[row, bank.bias_tokens[rows.slots]].add(bank.biases[rows.slots])
    counts = jnp.minimum(bank.counts[rows.slots], MAX_COUNT).astype(jnp.float32)
    is_used = (counts > 0) | unpack_bits(bank.prompt[rows.slots], vocab_size)
    repetition = jnp.maximum(rows.repetition, SMALLEST)[:, None]
    x = jnp.where(is_used, jnp.where(x > 0, x / repetition, x * repetition), x)
    x = x - rows.frequency[:, None] * counts - rows.presence[:, None] * (counts > 0)
    # a temperature divides this next, and the quotient must be finite
    x = jnp.clip(x, -_LARGEST, _LARGEST)
    allowed = unpack_bits(bank.allowed[rows.slots], vocab_size)
    return jnp.where(rows.are_banked[:, None], jnp.where(allowed, x, -jnp.inf), logits)


def unpack_rows(words: jax.Array) -> SamplingRows:
    """Return what `build_sampling_rows` packed (uint32 [S, ROW_WORDS])."""
    floats = lax.bitcast_convert_type(words[:, :6], jnp.float32)
    integers = words.astype(jnp.int32)
    return SamplingRows(
        temperature=floats[:, 0],
        top_p=floats[:, 1],
        min_p=floats[:, 2],
        repetition=floats[:, 3],
        presence=floats[:, 4],
        frequency=floats[:, 5],
        top_k=integers[:, 6],
        seeds=words[:, 7:9],
        slots=integers[:, 9],
        is_counted=words[:, 10] != 0,
        wanted=integers[:, 11],
    )


def _choose(logits: jax.Array, rows: SamplingRows, positions: jax.Array, bank: Bank) -> jax.Array:
    """Choose [S], a few rows at a time."""
    count = len(logits)
    size = min(count, _GROUP_ROWS)

    def choose_group(i: jax.Array, ids: jax.Array) -> jax.Array:
        # the last group begins early enough to be whole, and chooses some rows again
        start = jnp.minimum(i * size, count - size)
        cut = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        chosen = _choose_rows(cut(logits), jax.tree.map(cut, rows), cut(positions), bank)
        return lax.dynamic_update_slice_in_dim(ids, chosen, start, 0)

    return lax.fori_loop(0, -(-count // size), choose_group, jnp.zeros(count, jnp.int32))


def _choose_rows(
    logits: jax.Array, rows: SamplingRows, positions: jax.Array, bank: Bank
) -> jax.Array:
    """Choose [S], all rows at once."""
    penalised = lax.cond(
        jnp.any(rows.are_banked), lambda: penalise(logits, rows, bank), lambda: logits
    )
    likeliest = pick_likeliest(penalised)

    def draw() -> jax.Array:
        temperature = jnp.where(rows.are_random, rows.temperature, 1)
        draws = Draws(
            scaled=penalised / temperature[:, None],
            top_k=jnp.where(rows.top_k < logits.shape[1], rows.top_k, 0),
            top_p=jnp.maximum(rows.top_p, SMALLEST),
            min_p=rows.min_p,
            seeds=rows.seeds,
            positions=positions,
        )
        return jnp.where(rows.are_random, draw_tokens(draws, rows.are_random), likeliest)

    return lax.cond(jnp.any(rows.are_random), draw, lambda: likeliest)
