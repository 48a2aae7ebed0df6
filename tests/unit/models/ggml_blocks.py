"""What the quantised types of GGUF mean, value by value, after ggml's `ggml-quants.c`.

Written from the block layouts and in their order of operations, in float32; slow.
"""

from collections.abc import Callable, Iterator

import numpy as np
from gguf import GGMLQuantizationType as Kind

F = np.float32


def half(raw: bytes) -> np.float32:
    return F(np.frombuffer(raw, "<f2")[0])


def q4_0(b: bytes) -> Iterator[np.float32]:
    d, qs = half(b[:2]), b[2:]
    yield from (d * F((q & 15) - 8) for q in qs)
    yield from (d * F((q >> 4) - 8) for q in qs)


def q4_1(b: bytes) -> Iterator[np.float32]:
    d, m, qs = half(b[:2]), half(b[2:4]), b[4:]
    yield from (d * F(q & 15) + m for q in qs)
    yield from (d * F(q >> 4) + m for q in qs)


def q8_0(b: bytes) -> Iterator[np.float32]:
    d = half(b[:2])
    yield from (d * F(q) for q in np.frombuffer(b[2:], np.int8))


def scale_and_min(scales: bytes, j: int) -> tuple[np.float32, np.float32]:
    if j < 4:
        return F(scales[j] & 63), F(scales[j + 4] & 63)
    scale = (scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4)
    least = (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4)
    return F(scale), F(least)


def q4_k(b: bytes) -> Iterator[np.float32]:
    d, dmin, scales, qs = half(b[:2]), half(b[2:4]), b[4:16], b[16:]
    for j in range(8):
        scale, least = scale_and_min(scales, j)
        part = qs[32 * (j // 2) : 32 * (j // 2 + 1)]
        for q in part:
            yield (d * scale) * F(q >> 4 if j % 2 else q & 15) - (dmin * least)


def q5_k(b: bytes) -> Iterator[np.float32]:
    d, dmin, scales, qh, qs = half(b[:2]), half(b[2:4]), b[4:16], b[16:48], b[48:]
    for j in range(8):
        scale, least = scale_and_min(scales, j)
        for i in range(32):
            low = qs[32 * (j // 2) + i]
            q = (low >> 4 if j % 2 else low & 15) + 16 * ((qh[i] >> j) & 1)
            yield (d * scale) * F(q) - (dmin * least)


def q6_k(b: bytes) -> Iterator[np.float32]:
    ql, qh, scales, d = b[:128], b[128:192], np.frombuffer(b[192:208], np.int8), half(b[208:])
    for i in range(256):
        part, lane, column = i // 128, (i % 128) // 32, i % 32
        low = ql[64 * part + 32 * (lane % 2) + column]
        low = low >> 4 if lane > 1 else low & 15
        high = (qh[32 * part + column] >> (2 * lane)) & 3
        yield (d * F(scales[i // 16])) * F((low | (high << 4)) - 32)


BLOCKS: dict[Kind, tuple[Callable[[bytes], Iterator[np.float32]], tuple[int, ...]]] = {
    Kind.Q4_0: (q4_0, (0,)),
    Kind.Q4_1: (q4_1, (0, 2)),
    Kind.Q8_0: (q8_0, (0,)),
    Kind.Q4_K: (q4_k, (0, 2)),
    Kind.Q5_K: (q5_k, (0, 2)),
    Kind.Q6_K: (q6_k, (208,)),
}
"""For each type the meaning of a block, and where its half-precision scales stand."""
