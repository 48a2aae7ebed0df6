"""Draws one token from each row of logits, among those that top_k, top_p and min_p keep.

A draw is the maximum of logits and Gumbel noise (https://arxiv.org/abs/1611.01144), which for
a whole vocabulary costs more than all else. So only the likeliest tokens, the head, have noise
of their own; the rest competes as one, with the logarithm of its mass, which is distributed as
its maximum is. A token of the rest is looked for only when the rest wins. The noise depends on
(seed, position, token) only, so that logits which differ by rounding hardly ever draw
different tokens.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

HEAD_TOKENS = 128

_SORTED_BLOCK = 32
_SEARCHED_BLOCK = 128
_DRAWN_BLOCK = 512

_REST, _FIRST_BLOCK = 1 << 30, 1 << 31
"""Counters of the noise that is no token's: of the rest as one, and of its blocks."""


class Draws(NamedTuple):
    """What is drawn, one entry a row.

    Attributes:
        scaled: [S, V] float32, logits divided by the temperature; -inf is never drawn.
        top_k: [S] int32, 0 to V; 0 keeps all.
        top_p: [S] float32, above 0.
        min_p: [S] float32.
        seeds: [S, 2] uint32.
        positions: [S] int32.
    """

    scaled: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seeds: jax.Array
    positions: jax.Array


def draw_tokens(draws: Draws, is_random: jax.Array) -> jax.Array:
    """Return one token [S] of each row.

    Args:
        draws: Of all rows.
        is_random: [S] bool; the other rows return any token.
    """
    head = find_head(draws, is_random)
    counters = jnp.pad(head.tokens, [(0, 0), (0, 1)], constant_values=_REST)
    noise = draw_noise(draws, counters)
    kept = (head.values >= head.least[:, None]) & (head.values > head.border[:, None])
    scores = jnp.where(kept, head.values, -jnp.inf) + noise[:, :-1]
    tokens = _pick(head.tokens, jnp.argmax(scores, axis=-1))
    rest_score = head.values[:, 0] + jnp.log(head.rest) + noise[:, -1]
    is_rest = is_random & (rest_score > jnp.max(scores, axis=-1))

    def look_in_rest() -> jax.Array:
        return jnp.where(is_rest, _draw_rest(draws, head), tokens)

    return lax.cond(jnp.any(is_rest), look_in_rest, lambda: tokens)


class Head(NamedTuple):
    """The likeliest tokens of each row, and what the row keeps.

    Attributes:
        values: [S, n] float32, their scaled logits, the largest first.
        tokens: [S, n] int32.
        border: [S] float32. The head are the tokens above it, so that no tie is split.
        least: [S] float32, the least scaled logit that the row keeps, or less.
        rest: [S] float32, mass of what the row keeps up to the border, as a part of the
            likeliest token's.
    """

    values: jax.Array
    tokens: jax.Array
    border: jax.Array
    least: jax.Array
    rest: jax.Array


def find_head(draws: Draws, is_random: jax.Array) -> Head:
    """Return the head of each row; what the head does not tell of a cut is searched for."""
    rows, vocab_size = draws.scaled.shape
    values, tokens = top_tokens(draws.scaled, min(HEAD_TOKENS, vocab_size))
    border = values[:, -1] if vocab_size > HEAD_TOKENS else jnp.full(rows, -jnp.inf)
    place = jnp.clip(draws.top_k - 1, 0, values.shape[1] - 1)
    least = jnp.where(draws.top_k > 0, _pick(values, place), -jnp.inf)
    least = jnp.maximum(least, values[:, 0] + jnp.log(draws.min_p))
    head = Head(values, tokens, border, least, weigh_rest(draws, least, border))
    head, is_found = _cut_nucleus(draws, head)
    is_searched = is_random & ~(is_found & (draws.top_k <= values.shape[1]))

    def search() -> tuple[jax.Array, jax.Array]:
        least = jnp.where(is_searched, find_least_kept(draws), head.least)
        return least, jnp.where(is_searched, weigh_rest(draws, least, border), head.rest)

    found = lax.cond(jnp.any(is_searched), search, lambda: (head.least, head.rest))
    return head._replace(least=found[0], rest=found[1])


def _cut_nucleus(draws: Draws, head: Head) -> tuple[Head, jax.Array]:
    """Apply top_p where the nucleus ends in the head; returns also for which rows [S] it does."""
    weights = _weigh(head.values, head.least, head.values[:, 0])
    weights = jnp.where(head.values > head.border[:, None], weights, 0)
    places = jnp.arange(weights.shape[1])
    up_to = jnp.where(places[:, None] >= places, weights[:, None, :], 0)
    held = jnp.sum(up_to, axis=-1)  # a cumsum takes XLA longer to compile than to run
    mass = jnp.sum(weights, axis=-1) + head.rest
    reached = (held >= (draws.top_p * mass)[:, None]) & (weights > 0)
    last = _pick(head.values, jnp.argmax(reached, axis=-1))
    ends_here = (draws.top_p < 1) & jnp.any(reached, axis=-1)
    cut = head._replace(
        least=jnp.where(ends_here, last, head.least), rest=jnp.where(ends_here, 0, head.rest)
    )
    return cut, ends_here | (draws.top_p >= 1) | (head.rest == 0)


def weigh_rest(draws: Draws, least: jax.Array, border: jax.Array) -> jax.Array:
    """Return the mass [S] of tokens from least to border, as a part of the likeliest one's."""
    return jnp.sum(_weigh_rest(draws, least, border), axis=-1)


def _weigh_rest(draws: Draws, least: jax.Array, border: jax.Array) -> jax.Array:
    top = jnp.max(draws.scaled, axis=-1)
    weights = _weigh(draws.scaled, least, top)
    return jnp.where(draws.scaled <= border[:, None], weights, 0)


def _draw_rest(draws: Draws, head: Head) -> jax.Array:
    """Return a token [S] of the rest: first one of its blocks is drawn, then a token there."""
    blocks = _cut_blocks(_weigh_rest(draws, head.least, head.border), _DRAWN_BLOCK, padding=0)
    block = _draw_by_mass(draws, jnp.sum(blocks, axis=-1), jnp.uint32(_FIRST_BLOCK))
    inside = _gather(blocks, block[:, None])[:, 0]
    first = block * _DRAWN_BLOCK
    return first + _draw_by_mass(draws, inside, first[:, None].astype(jnp.uint32))


def _draw_by_mass(draws: Draws, masses: jax.Array, first: jax.Array) -> jax.Array:
    """Return a place [S] in masses [S, n], whose noise has the counters from first on."""
    counters = first + jnp.arange(masses.shape[1], dtype=jnp.uint32)
    counters = jnp.broadcast_to(counters, masses.shape)
    return jnp.argmax(jnp.log(masses) + draw_noise(draws, counters), axis=-1).astype(jnp.int32)


def find_least_kept(draws: Draws) -> jax.Array:
    """Return the least scaled logit [S] that a row keeps; -inf if it keeps all.

    First min_p and top_k cut, then top_p (https://arxiv.org/abs/1904.09751) cuts what they
    leave to the fewest tokens that hold its part of their mass. Tokens that tie with the
    least likely one kept are kept too.
    """
    scaled = draws.scaled
    top = jnp.max(scaled, axis=-1)

    def cut(step: jax.Array, least: jax.Array) -> jax.Array:
        """Cut by top_k in step 0, by top_p in step 1."""
        weights = jnp.where(step == 0, 1.0, _weigh(scaled, least, top))
        part = draws.top_p * jnp.sum(weights, axis=-1)
        target = jnp.where(step == 0, draws.top_k.astype(jnp.float32), part)
        found = _bisect(scaled, weights, target)
        has_cut = jnp.where(step == 0, draws.top_k > 0, draws.top_p < 1)
        return jnp.where(has_cut, jnp.maximum(least, found), least)

    # One loop for both, of as many steps as some row needs, is compiled once.
    first = jnp.where(jnp.any(draws.top_k > 0), 0, 1)
    last = jnp.where(jnp.any(draws.top_p < 1), 1, 0)
    return lax.fori_loop(first, last + 1, cut, top + jnp.log(draws.min_p))


def top_tokens(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the largest values [S, count] of [S, V] and their tokens, the largest first.

    Of equal ones those of the lower token come first. The largest ``count`` values lie in
    the ``count`` blocks with the largest maxima: finding these first leaves little to sort.
    """
    if values.shape[1] <= 2 * count * _SORTED_BLOCK:
        return _top(values, count)
    blocks = _cut_blocks(values, _SORTED_BLOCK, padding=-jnp.inf)
    _, chosen = _top(jnp.max(blocks, axis=-1), count)
    chosen = jnp.sort(chosen, axis=-1)
    inside = _gather(blocks, chosen)
    best, places = _top(inside.reshape(len(values), -1), count)
    block, place = places // _SORTED_BLOCK, places % _SORTED_BLOCK
    return best, _gather(chosen, block) * _SORTED_BLOCK + place


def _top(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    # XLA on CPU takes it for a whole sort once something else is cut from its result. One barrier
    # for both results ends its compiler where several devices take part (jaxlib 0.10.2).
    largest, tokens = lax.top_k(values, count)
    return lax.optimization_barrier(largest), lax.optimization_barrier(tokens)


def pick_likeliest(values: jax.Array) -> jax.Array:
    """Return the token [S] of the largest of values [S, V], the lowest of several.

    XLA on CPU takes a maximum 15 times faster than an argmax, so that is taken over blocks.
    """
    blocks = _cut_blocks(values, _SEARCHED_BLOCK, padding=-jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = _gather(blocks, block[:, None])[:, 0]
    return (block * _SEARCHED_BLOCK + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def draw_noise(draws: Draws, counters: jax.Array) -> jax.Array:
    """Return Gumbel noise [S, n], each of its row's seed and position and a counter [S, n].

    Small uniform numbers, which become large noise and win, keep all 32 bits: ties are rare.
    """
    high, low = draws.seeds[:, :1], draws.seeds[:, 1:]
    positions = jnp.broadcast_to(draws.positions[:, None], counters.shape)
    bits = threefry(high, low, positions.astype(jnp.uint32), counters.astype(jnp.uint32))
    return to_gumbel((bits.astype(jnp.float32) + 0.5) * 2.0**-32)


def threefry(high: jax.Array, low: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the first word of Threefry-2x32-20 under the key (high, low), all uint32.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011). Written out, it is one
    kernel; jax's own is many, which XLA compiles for as long as all else that draws.
    """
    keys = (high, low, high ^ low ^ jnp.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for group in range(5):
        for rotation in (13, 15, 26, 6) if group % 2 == 0 else (17, 29, 16, 24):
            x = x + y
            y = x ^ (y << rotation | y >> 32 - rotation)
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x


def to_gumbel(uniform: jax.Array) -> jax.Array:
    """Return Gumbel noise of uniform numbers in (0, 1], of which 1 is a little less."""
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))


def _weigh(scaled: jax.Array, least: jax.Array, top: jax.Array) -> jax.Array:
    """Return probabilities [S, n] as parts of the likeliest token's; 0 for those below least."""
    return jnp.where(scaled >= least[:, None], jnp.exp(scaled - top[:, None]), 0)


def _cut_blocks(values: jax.Array, size: int, *, padding: float) -> jax.Array:
    """Return [S, V] as [S, V/size rounded up, size]."""
    fill = [(0, 0), (0, -values.shape[1] % size)]
    padded = jnp.pad(values, fill, constant_values=padding)
    return padded.reshape(len(values), -1, size)


def _bisect(values: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Return the largest float [S] from which on values [S, V] weigh the target [S]; or -inf.

    With the order of all bits reversed for negative ones, floats are ordered as their bits
    are. Finding these one by one is far faster on CPU than a sort. Patterns past the
    infinities are no numbers, and nothing is from there on.
    """

    def set_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        is_in = values >= _order_to_float(tried)[:, None]
        weight = jnp.sum(jnp.where(is_in, weights, 0), axis=-1)
        return jnp.where(weight >= target, tried, found)

    found = lax.fori_loop(0, 32, set_bit, jnp.zeros(len(values), jnp.uint32))
    return jnp.where(found == 0, -jnp.inf, _order_to_float(found))


def _order_to_float(order: jax.Array) -> jax.Array:
    bits = jnp.where(order >> 31 != 0, order ^ jnp.uint32(1 << 31), ~order)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _pick(values: jax.Array, place: jax.Array) -> jax.Array:
    """Return one of each row's values: [S, n] at place [S].

    As a sum, which XLA fuses with what is around it, and a gather it does not.
    """
    is_there = jnp.arange(values.shape[1]) == place[:, None]
    return jnp.sum(jnp.where(is_there, values, 0), axis=-1)


def _gather(values: jax.Array, places: jax.Array) -> jax.Array:
    """Return some of each row's values: [S, n, ...] at places [S, m], all in bounds."""
    places = places.reshape(*places.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, places, axis=1, mode="promise_in_bounds")
