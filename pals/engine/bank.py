"""What the tail's sampler knows of sessions with penalties, a bias or a mask, on the device.

The bank is donated to each program that changes it, so that no change copies it.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# (jax annotates its functions with types that pyright sees as partially unknown)

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pals.engine.bank_slots import DEFAULT_BANK_SLOTS
from pals.engine.sampling_rows import MAX_BIASES, check_sampling
from pals.errors import InvalidStep
from pals.types import Sampling

MAX_COUNT = 1 << 15
"""A token counts as often at most. The uint16 behind it may pass this within one program,
which counts at most `COUNTED_AT_ONCE` tokens, and so cannot overflow."""

COUNTED_AT_ONCE = 64


class Bank(NamedTuple):
    """One row for each slot, with W = V/32 rounded up; row 0 changes nothing.

    Attributes:
        counts: [slots, V] uint16, how often the answer has each token.
        prompt: [slots, W] uint32, a bit for each token of the prompt, the lowest first.
        allowed: [slots, W] uint32, a bit for each token that may be sampled.
        bias_tokens: [slots, MAX_BIASES] int32, padded with 0.
        biases: [slots, MAX_BIASES] float32, padded with 0.
    """

    counts: jax.Array
    prompt: jax.Array
    allowed: jax.Array
    bias_tokens: jax.Array
    biases: jax.Array


def abstract_bank(
    vocab_size: int, slots: int = DEFAULT_BANK_SLOTS, *, mesh: Mesh | None = None
) -> Bank:
    """Return the shapes of a bank, whole on each device of ``mesh``."""
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    array, words = partial(jax.ShapeDtypeStruct, sharding=place), _words(vocab_size)
    shapes = (
        array((slots, vocab_size), jnp.uint16),
        array((slots, words), jnp.uint32),
        array((slots, words), jnp.uint32),
        array((slots, MAX_BIASES), jnp.int32),
        array((slots, MAX_BIASES), jnp.float32),
    )
    # Lowering looks at shapes only.
    return Bank(*shapes)  # pyright: ignore[reportArgumentType]


def build_bank(
    vocab_size: int, slots: int = DEFAULT_BANK_SLOTS, *, mesh: Mesh | None = None
) -> Bank:
    """Return a bank whose rows all change nothing, whole on each device of ``mesh``."""
    shapes = abstract_bank(vocab_size, slots, mesh=mesh)
    zeros = Bank(*[jnp.zeros(a.shape, a.dtype, device=a.sharding) for a in shapes])
    return zeros._replace(allowed=~zeros.allowed)


def bank_bytes(vocab_size: int, slots: int = DEFAULT_BANK_SLOTS) -> int:
    """Return the device bytes of a bank."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in abstract_bank(vocab_size, slots))


def reset_slot(
    bank: Bank,
    slot: int,
    sampling: Sampling,
    *,
    prompt: Sequence[int] | np.ndarray = (),
    answer: Sequence[int] | np.ndarray = (),
) -> Bank:
    """Fill a slot for a session that opens, or goes on after a replay.

    Args:
        bank: Donated.
        slot: As `BankSlots.take` gave it.
        sampling: Of the session; its bias is kept here.
        prompt: Token ids that the user sent; only the repetition penalty looks at them.
        answer: Token ids sampled before the replay, which are counted.

    Raises:
        InvalidStep: A token id or a value is out of its range; the bank is as it was.
    """
    slots, vocab_size = bank.counts.shape
    _check_slot(slot, slots)
    check_sampling(sampling, vocab_size)
    counts = np.bincount(_check_tokens(answer, vocab_size), minlength=vocab_size)
    seen = np.zeros(vocab_size, bool)
    seen[_check_tokens(prompt, vocab_size)] = True
    tokens, biases = np.zeros(MAX_BIASES, np.int32), np.zeros(MAX_BIASES, np.float32)
    for place, (token, bias) in enumerate(sampling.logit_bias):
        tokens[place], biases[place] = token, bias
    row = (
        np.minimum(counts, MAX_COUNT).astype(np.uint16),
        pack_bits(seen),
        np.full(_words(vocab_size), 0xFFFFFFFF, np.uint32),
        tokens,
        biases,
    )
    return _write_row(bank, np.int32(slot), row)


def set_allowed(bank: Bank, slot: int, allowed: np.ndarray) -> Bank:
    """Let a slot's next tokens be those of ``allowed`` (uint32 [W], as in `Bank`) only.

    Bits past the vocabulary mean nothing.

    Raises:
        InvalidStep: It allows none, or has another shape; the bank is as it was.
    """
    slots, vocab_size = bank.counts.shape
    _check_slot(slot, slots)
    words = _words(vocab_size)
    if allowed.shape != (words,) or allowed.dtype != np.uint32 or not allowed.any():
        raise InvalidStep(
            problem=f"a mask of {allowed.dtype} {list(allowed.shape)} with "
            f"{np.count_nonzero(allowed)} words that are not 0, instead of uint32 [{words}] "
            "with one or more"
        )
    return bank._replace(allowed=_write_words(bank.allowed, np.int32(slot), allowed))


def count_tokens(bank: Bank, slots: Sequence[int], tokens: Sequence[int]) -> Bank:
    """Count accepted drafts: ``tokens[i]`` in ``slots[i]``, in calls of `COUNTED_AT_ONCE`.

    Raises:
        InvalidStep: A slot or token is out of its range; the bank is as it was.
    """
    num_slots, vocab_size = bank.counts.shape
    for slot in slots:
        _check_slot(slot, num_slots)
    if len(slots) != len(tokens):
        raise InvalidStep(problem=f"{len(tokens)} tokens to count in {len(slots)} slots")
    pairs = np.stack([np.array(slots, np.int32), _check_tokens(tokens, vocab_size)])
    counts = bank.counts
    for start in range(0, pairs.shape[1], COUNTED_AT_ONCE):
        part = pairs[:, start : start + COUNTED_AT_ONCE]
        part = np.pad(part, [(0, 0), (0, COUNTED_AT_ONCE - part.shape[1])])
        counts = _count(counts, part[0], part[1])
    return bank._replace(counts=counts)


def warm_bank(bank: Bank) -> Bank:
    """Run each of these programs once, without an effect, so that none is compiled later."""
    vocab_size = bank.counts.shape[1]
    bank = set_allowed(bank, 0, pack_bits(np.ones(vocab_size, bool)))
    bank = reset_slot(bank, 0, Sampling())
    return count_tokens(bank, [0], [0])


def add_counts(counts: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
    """Count tokens [N] in their slots [N]; those in slot 0 are not counted.

    Args:
        counts: As in `Bank`.
        slots: int32.
        tokens: int32.
    """
    is_counted = (slots > 0) & (counts[slots, tokens] < MAX_COUNT)
    return counts.at[slots, tokens].add(is_counted.astype(jnp.uint16))


def pack_bits(bits: np.ndarray) -> np.ndarray:
    """Return bool [V] as uint32 [W], the lowest bit of a word first."""
    packed = np.packbits(bits, bitorder="little")
    return np.pad(packed, (0, -len(packed) % 4)).view("<u4").astype(np.uint32)


def unpack_bits(words: jax.Array, size: int) -> jax.Array:
    """Return uint32 [S, W] as bool [S, size]."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :size] != 0


def _words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def _check_slot(slot: int, slots: int) -> None:
    if not 0 <= slot < slots:
        raise InvalidStep(problem=f"slot {slot} of the sampler's bank is not in [0, {slots})")


def _check_tokens(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the ids as int32, having checked them."""
    ids = np.asarray(tokens, np.int64)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise InvalidStep(problem=f"token id {wrong[0]} is not in [0, {vocab_size})")
    return ids.astype(np.int32)


def _write(bank: Bank, slot: jax.Array, row: tuple[jax.Array, ...]) -> Bank:
    pairs = zip(bank, row, strict=True)
    return Bank(*[array.at[slot].set(values) for array, values in pairs])


_write_row = jax.jit(_write, donate_argnums=0)
_write_words = jax.jit(lambda words, slot, row: words.at[slot].set(row), donate_argnums=0)
_count = jax.jit(add_counts, donate_argnums=0)
