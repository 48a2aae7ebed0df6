"""The experts of one layer of Qwen3 30B-A3B, and a loop that they are held against."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from benchmarks.bandwidth import ReadLimit
from benchmarks.line_child import serve
from benchmarks.shapes import QWEN3_30B_A3B
from pals import config

if TYPE_CHECKING:
    import jax
    from jax.stages import Compiled

    from pals.models.router import Routing

PALS, SORTED_BLOCKS = "pals", "sorted blocks"
SAMPLE_S = 0.25


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """How many experts there are of the model's 128, and how many threads compute."""

    num_experts: int
    threads: int


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What to run for a while, with how many rows; ``reads`` measures the read bandwidth."""

    system: str
    rows: int


class Took(msgspec.Struct, frozen=True, kw_only=True):
    """What a run took.

    Attributes:
        seconds: Of one call, on average.
        workspace_bytes: Temporaries of the program.
        active_bytes: Of the experts that its rows chose.
    """

    seconds: float
    workspace_bytes: int
    active_bytes: int


class Reads(msgspec.Struct, frozen=True, kw_only=True):
    """How fast memory is read, and on what device experts run."""

    bytes_per_s: float
    device: str


def main() -> None:
    """Answer the questions of standard input."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    config.limit_compute_threads(job.threads)
    # Only a process that computes pays for importing jax, after its threads are set.
    import jax

    device = jax.devices()[0].device_kind
    limit = ReadLimit(job.threads)
    layer = Layer(job.num_experts)
    programs: dict[tuple[str, int], Program] = {}

    def answer(ask: Ask) -> Reads | Took:
        if ask.system == "reads":
            return Reads(bytes_per_s=limit.measure(), device=device)
        key = ask.system, ask.rows
        if key not in programs:
            programs[key] = layer.prepare(ask.system, ask.rows)
        return programs[key].time()

    serve(Ask, answer)


class Program:
    """A compiled way to run the experts over some rows."""

    def __init__(self, compiled: Compiled, arguments: tuple[object, ...], active: int) -> None:
        self._run = partial(compiled, *arguments)
        self._workspace_bytes = compiled.memory_analysis().temp_size_in_bytes
        self._active_bytes = active
        self._run().block_until_ready()

    def time(self) -> Took:
        """Run it for `SAMPLE_S`."""
        calls = 0
        started_s = time.perf_counter()
        while (elapsed_s := time.perf_counter() - started_s) < SAMPLE_S:
            self._run().block_until_ready()
            calls += 1
        return Took(
            seconds=elapsed_s / calls,
            workspace_bytes=self._workspace_bytes,
            active_bytes=self._active_bytes,
        )


class Layer:
    """Router and experts with random weights, the same for each way to run them."""

    def __init__(self, num_experts: int) -> None:
        import jax
        from flax import nnx

        from pals.models.configs import read_config
        from pals.models.configs.moe import SparseConfig
        from pals.models.moe import MoE
        from pals.models.numerics import Numerics

        model = read_config(QWEN3_30B_A3B | {"num_experts": num_experts})
        assert isinstance(model, SparseConfig)
        moe = model.moe[0]
        assert moe is not None
        self._hidden_size = model.hidden_size
        self._expert_bytes = 2 * 3 * moe.intermediate_size * model.hidden_size
        module = nnx.eval_shape(lambda: MoE(moe, model.hidden_size, 0, Numerics.of("bf16")))
        self._graphdef, state = nnx.split(module)
        leaves, self._treedef = jax.tree.flatten(state)
        self._leaves = [draw(number, leaf.shape) for number, leaf in enumerate(leaves)]

    def prepare(self, system: str, rows: int) -> Program:
        """Compile one way for some rows, as `pals.engine` compiles."""
        import jax

        from pals.engine.compilation import compiler_options

        x = draw(rows, (rows, self._hidden_size)) * self._hidden_size**0.5
        routing: Routing = jax.jit(self._route)(self._leaves, x)
        active = len(np.unique(np.asarray(routing.expert_ids))) * self._expert_bytes
        ways: dict[str, Callable[..., jax.Array]] = {
            PALS: self._run,
            SORTED_BLOCKS: self._run_sorted_blocks,
        }
        lowered = jax.jit(ways[system]).lower(self._leaves, x)
        compiled = lowered.compile(compiler_options(jax.default_backend()))
        return Program(compiled, (self._leaves, x), active)

    def _merge(self, leaves: list[jax.Array]):  # noqa: ANN202 # a flax module
        import jax
        from flax import nnx

        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _route(self, leaves: list[jax.Array], x: jax.Array) -> Routing:
        return self._merge(leaves).gate(x)

    def _run(self, leaves: list[jax.Array], x: jax.Array) -> jax.Array:
        module = self._merge(leaves)
        return module.experts(x, module.gate(x))

    def _run_sorted_blocks(self, leaves: list[jax.Array], x: jax.Array) -> jax.Array:
        module = self._merge(leaves)
        experts = module.experts
        matrices = experts.gate_up_proj.weight[...], experts.down_proj.weight[...]
        return run_sorted_blocks(x, module.gate(x), *matrices)


def draw(number: int, sizes: tuple[int, ...]) -> jax.Array:
    """Return random bf16 values of a matrix, or of equal ones that are stacked."""
    import jax
    import jax.numpy as jnp

    values = jax.random.normal(jax.random.key(number), sizes[-2:], "bfloat16")
    return jnp.broadcast_to(values * sizes[-1] ** -0.5, sizes).copy()


def run_sorted_blocks(
    x: jax.Array, routing: Routing, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Sum the experts of each row of [M, D]: what Pals's own way must not be slower than.

    A loop over blocks of the pairs of a row and an expert, sorted by expert; what of a block
    belongs to the next expert counts nothing.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    num_experts, chosen = gate_up.shape[0], routing.expert_ids.shape[1]
    ids = routing.expert_ids.reshape(-1)
    size = max(2, min(2 * -(-ids.size // num_experts), ids.size))
    order = jnp.argsort(ids)
    counts = jnp.bincount(ids, length=num_experts)
    blocks = -(-counts // size)
    ends, firsts = jnp.cumsum(blocks), jnp.cumsum(counts) - counts
    rows = jnp.pad(order // chosen, (0, size))
    weights = jnp.pad(routing.weights.reshape(-1)[order], (0, size))

    def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return lax.dot_general(
            x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    def add_block(number: jax.Array, total: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(ends, number, side="right")
        offset = (number - ends[expert] + blocks[expert]) * size
        taken = lax.dynamic_slice_in_dim(rows, firsts[expert] + offset, size)
        weight = lax.dynamic_slice_in_dim(weights, firsts[expert] + offset, size)
        weight = jnp.where(jnp.arange(size) + offset < counts[expert], weight, 0)
        # As in `pals.models.matrix.take_expert`: else jax 0.10 widens all experts before the loop.
        matrices, index = lax.optimization_barrier(((gate_up, down), expert))
        gate, up = jnp.split(multiply(x[taken], matrices[0][index]), 2, axis=-1)
        out = multiply((jax.nn.silu(gate) * up).astype(x.dtype), matrices[1][index])
        return total.at[taken].add(out * weight[:, None])

    return lax.fori_loop(0, ends[-1], add_block, jnp.zeros(x.shape, jnp.float32))


if __name__ == "__main__":
    main()
