"""What the ring benchmark makes of its sessions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.results import Result, Subject
from benchmarks.ring_shard import Steps
from pals.driver.interface import HopReport

CIPHER_SAMPLES = 2000


@dataclass(slots=True)
class Answer:
    """When the tokens of one session came, after its start."""

    arrivals_s: list[float] = field(default_factory=list)

    @property
    def turns_s(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The turns of one session, in seconds: whole, and what the steps of each took."""

    turns_s: Sequence[float]
    compute_s: Sequence[Sequence[float]]

    @classmethod
    def of(cls, answer: Answer, steps: Sequence[Steps]) -> Round:
        """Pair each turn of a session with its step of each shard."""
        turns_s = answer.turns_s
        compute_s = [shard.decode_s for shard in steps]
        return cls(turns_s=turns_s, compute_s=list(zip(*compute_s, strict=True)))

    def software_ms(self, shards: int, delay_s: float) -> float:
        """Return what a hop costs beside its step and its delay."""
        return 1000 * statistics.median(
            (turn_s - sum(steps_s)) / shards - delay_s
            for turn_s, steps_s in zip(self.turns_s, self.compute_s, strict=True)
        )

    def fraction_of_ideal(self, shards: int, delay_s: float) -> float:
        """Return the part of a turn that is steps and delays."""
        return statistics.median(
            (sum(steps_s) + shards * delay_s) / turn_s
            for turn_s, steps_s in zip(self.turns_s, self.compute_s, strict=True)
        )


def summarise_decode(subject: Subject, rounds: Sequence[Round], delay_s: float) -> list[Result]:
    """Return the speed of decoding and what of it is no step and no delay.

    A round is one sample, and the median of its turns.
    """
    shards = len(rounds[0].compute_s[0])
    hop_delay_s = _hop_delay_s(shards, delay_s)
    rates = [1 / statistics.median(r.turns_s) for r in rounds]
    fractions = [r.fraction_of_ideal(shards, hop_delay_s) for r in rounds]
    software = [r.software_ms(shards, hop_delay_s) for r in rounds]
    return [
        subject.summarise("decode_tokens_per_s", "tokens/s", rates),
        subject.summarise("fraction_of_ideal", "ratio", fractions),
        subject.summarise("hop_software_ms", "ms", software),
    ]


def _hop_delay_s(shards: int, delay_s: float) -> float:
    """Return the delay of a hop; one shard sends its tokens to itself."""
    return delay_s if shards > 1 else 0.0


def summarise_parts(
    subject: Subject, hops: Sequence[HopReport], delay_s: float, crypto_ms: float
) -> list[Result]:
    """Return the parts of a hop; each shard's median is a sample."""
    wire_delay_ms = 1000 * _hop_delay_s(len(hops), delay_s)
    parts = {
        "hop_compute_ms": [hop.step_ms for hop in hops],
        "hop_queue_ms": [hop.queue_ms for hop in hops],
        "hop_handover_ms": [hop.handover_ms for hop in hops],
        "hop_crypto_ms": [crypto_ms],
        "hop_codec_ms": [hop.codec_ms - crypto_ms for hop in hops],
        "hop_wire_ms": [hop.wire_ms - wire_delay_ms for hop in hops],
    }
    return [subject.summarise(name, "ms", samples) for name, samples in parts.items()]


def measure_cipher_ms(size: int) -> float:
    """Return the milliseconds of sealing and opening one frame of ``size`` bytes."""
    cipher, nonce, body, header = AESGCM(bytes(32)), bytes(12), bytes(size), bytes(128)
    samples: list[float] = []
    for _ in range(CIPHER_SAMPLES):
        started_s = time.perf_counter()
        cipher.decrypt(nonce, cipher.encrypt(nonce, body, header), header)
        samples.append(time.perf_counter() - started_s)
    return 1000 * statistics.median(samples)
