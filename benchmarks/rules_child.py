"""Small programs, each one side of a rule of the formulation; see `benchmarks.engine_rules`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from benchmarks.line_child import serve
from pals import config

if TYPE_CHECKING:
    import jax

KV_HEADS, GROUPS, HEAD_DIM = 8, 4, 128
POSITIONS = 4096
LAYERS = 8
BATCH_ROWS = 32
FEW_ROWS = 8
STACK_SHARE = 4
"""Stacked layers are so many times narrower, so that all of them take two matrices' room."""

SAMPLE_S = 0.15


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The width of the matrices, [3.5 size, size], and how many threads compute."""

    size: int
    threads: int


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A program to run for a while; the empty name waits for the process to be ready."""

    program: str


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """With what it computes."""

    device: str
    jax: str


class Took(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one call, on average."""

    seconds: float


Run = Callable[[], object]
"""Runs a program once and waits for it."""


def main() -> None:
    """Answer the questions of standard input."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    config.limit_compute_threads(job.threads)
    # Only a process that computes pays for importing jax, after its threads are set.
    import jax

    runs: dict[str, Run] = {}
    ready = Ready(device=jax.devices()[0].device_kind, jax=jax.__version__)

    def answer(ask: Ask) -> Ready | Took:
        if not ask.program:
            return ready
        if ask.program not in runs:
            runs[ask.program] = PROGRAMS[ask.program](job.size)
            runs[ask.program]()
        return Took(seconds=time_calls(runs[ask.program]))

    serve(Ask, answer)


def time_calls(run: Run) -> float:
    """Return the seconds of a call, from as many as fit `SAMPLE_S`."""
    calls = 0
    started_s = time.perf_counter()
    while (elapsed_s := time.perf_counter() - started_s) < SAMPLE_S:
        run()
        calls += 1
    return elapsed_s / calls


def draw(*sizes: int) -> jax.Array:
    """Return random bf16 values on the device."""
    import jax

    return jax.random.normal(jax.random.key(0), sizes, "bfloat16") * sizes[-1] ** -0.5


def prepare_matmul(rows: int, sums: str, size: int) -> Run:
    """Multiply ``rows`` rows by a matrix in its checkpoint layout, adding up in ``sums``."""
    import jax

    @jax.jit
    def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
        contracted = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, matrix, contracted, preferred_element_type=sums)

    x, matrix = draw(rows, size), draw(7 * size // 2, size)
    return lambda: multiply(x, matrix).block_until_ready()


def prepare_sum(is_read_in_place: bool, size: int) -> Run:
    """Multiply one row as a sum of products, over the inputs or where the matrix lies."""
    import jax

    from pals.models.in_place import multiply_in_place
    from pals.models.matmul import sum_products

    multiply = jax.jit(multiply_in_place if is_read_in_place else sum_products)
    x, matrix = draw(1, size), draw(7 * size // 2, size)
    return lambda: multiply(x, matrix).block_until_ready()


def prepare_int8(is_read_in_place: bool, size: int) -> Run:
    """Multiply one row by a matrix of int8, as it is or as two planes of integers."""
    import jax
    import jax.numpy as jnp

    from pals.models.in_place import multiply_in_place
    from pals.models.quantized import multiply_planes, split_planes

    @jax.jit
    def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
        if is_read_in_place:
            return multiply_in_place(x, matrix)
        return multiply_planes(split_planes(x, count=2), matrix)

    x = draw(1, size).astype(jnp.float32)
    matrix = jnp.round(100 * draw(7 * size // 2, size)).astype(jnp.int8)
    return lambda: multiply(x, matrix).block_until_ready()


def prepare_sides(is_left: bool, size: int) -> Run:
    """Multiply a few rows with the matrix as the left or the right operand of the product."""
    import jax

    @jax.jit
    def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
        operands = (matrix, x) if is_left else (x, matrix)
        contracted = (((1,), (1,)), ((), ()))
        product = jax.lax.dot_general(*operands, contracted, preferred_element_type="float32")
        return jax.lax.optimization_barrier(product).T if is_left else product

    x, matrix = draw(FEW_ROWS, size), draw(7 * size // 2, size)
    return lambda: multiply(x, matrix).block_until_ready()


def prepare_attention(is_settled: bool, size: int) -> Run:
    """Write a token to a cache that is given up, and attend to all of it."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    positions = POSITIONS * size // 4096

    @partial(jax.jit, donate_argnums=0)
    def step(
        cache: tuple[jax.Array, jax.Array], token: jax.Array, position: int
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        new = token[:, :1]
        keys, values = (lax.dynamic_update_slice(a, new, (0, position, 0)) for a in cache)
        if is_settled:
            keys, values = lax.optimization_barrier((keys, values))
        scores = jnp.einsum("kgh,ksh->kgs", token, keys, preferred_element_type="float32")
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        mixed = jnp.einsum("kgs,ksh->kgh", weights, values, preferred_element_type="float32")
        return (keys, values), mixed

    token = draw(KV_HEADS, GROUPS, HEAD_DIM)
    held = [(draw(KV_HEADS, positions, HEAD_DIM), draw(KV_HEADS, positions, HEAD_DIM))]

    def run() -> object:
        held[0], mixed = step(held[0], token, positions // 2)
        return mixed.block_until_ready()

    return run


def prepare_layers(is_scanned: bool, size: int) -> Run:
    """Run some equal layers of two matrices, stacked for a scan or each an argument."""
    import jax

    width = size // STACK_SHARE

    def layer(x: jax.Array, weights: tuple[jax.Array, jax.Array]) -> jax.Array:
        up, down = weights
        wide = jax.lax.dot_general(
            x, up, (((1,), (1,)), ((), ())), preferred_element_type="float32"
        )
        out = jax.lax.dot_general(
            jax.nn.silu(wide).astype(x.dtype),
            down,
            (((1,), (1,)), ((), ())),
            preferred_element_type="float32",
        )
        return x + out.astype(x.dtype)

    @jax.jit
    def scan(x: jax.Array, stacked: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jax.lax.scan(lambda x, weights: (layer(x, weights), None), x, stacked)[0]

    @jax.jit
    def unroll(x: jax.Array, layers: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        for weights in layers:
            x = layer(x, weights)
        return x

    x, stacked = draw(2, width), (draw(LAYERS, 4 * width, width), draw(LAYERS, width, 4 * width))
    if is_scanned:
        return lambda: scan(x, stacked).block_until_ready()
    layers = [(stacked[0][i], stacked[1][i]) for i in range(LAYERS)]
    return lambda: unroll(x, layers).block_until_ready()


PROGRAMS: dict[str, Callable[[int], Run]] = {
    "one row": partial(prepare_matmul, 1, "float32"),
    "two rows": partial(prepare_matmul, 2, "float32"),
    "sum of one row": partial(prepare_sum, False),
    "one row read in place": partial(prepare_sum, True),
    "int8 read in place": partial(prepare_int8, True),
    "two planes of int8": partial(prepare_int8, False),
    "matrix on the left": partial(prepare_sides, True),
    "matrix on the right": partial(prepare_sides, False),
    "sums in float32": partial(prepare_matmul, BATCH_ROWS, "float32"),
    "sums in bfloat16": partial(prepare_matmul, BATCH_ROWS, "bfloat16"),
    "barrier": partial(prepare_attention, True),
    "no barrier": partial(prepare_attention, False),
    "unrolled": partial(prepare_layers, False),
    "scan": partial(prepare_layers, True),
}


if __name__ == "__main__":
    main()
