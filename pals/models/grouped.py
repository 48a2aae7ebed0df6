# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Rows through the matrix of their own expert: the computation inside a MoE layer.

It is done in one of three ways, chosen once when a model is built:

- ``blocks``, for CPUs: a loop over the experts that were chosen at all, each over its
  tokens in blocks of rows. Temporary memory is one expert's weights and one sum for each
  token, whatever the number of experts.
- ``block_batches``, for GPUs: the same blocks, several at a time, so that one step fills
  the device. XLA expands a ragged product to one with *every* expert there, as on CPUs
  (docs/decisions.md has the figures).
- ``ragged``, for TPUs, where there is a kernel for such a product.

All give a token what it would get alone, to float rounding: a sum over its experts whose
order follows from its own choice, not from who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from pals.models.matmul import matmul_precision
from pals.models.router import Routing

BATCH_BLOCKS = 8
"""Blocks that run at a time on a GPU; each takes the memory of one expert's weights."""

Strategy = Literal["blocks", "block_batches", "ragged"]

GatedActivation = Callable[[jax.Array, jax.Array], jax.Array]
"""Joins the gate and the up projection, both [M, F] in float32."""


def expert_strategy(platform: str, *, is_plain: bool) -> Strategy:
    """Return how experts are computed on ``platform`` (as jax names it).

    Quantised experts have no ragged product anywhere.
    """
    if platform == "cpu":
        return "blocks"
    return "ragged" if platform == "tpu" and is_plain else "block_batches"


class Pairs(NamedTuple):
    """The P = M * A pairs of a token and an expert, sorted by expert.

    Pairs whose expert is not held here come last and belong to no group.

    Attributes:
        tokens: [P] int32, the row of each pair's token.
        weights: [P] float32.
        expert_ids: [P] int32; the number of experts where none is held.
        group_sizes: [E] int32, the pairs of each expert.
        positions: [M, A] int32, where a token's pairs went, its best expert's first.
    """

    tokens: jax.Array
    weights: jax.Array
    expert_ids: jax.Array
    group_sizes: jax.Array
    positions: jax.Array


def sort_pairs(routing: Routing, num_experts: int, rows: jax.Array | None) -> Pairs:
    """Sort by expert; ids outside ``range(num_experts)`` and masked rows are held nowhere.

    Args:
        routing: M tokens.
        num_experts: Experts held here.
        rows: [M] booleans, False for padding; None means that all rows count.
    """
    ids = routing.expert_ids
    held = (ids >= 0) & (ids < num_experts)
    if rows is not None:
        held &= rows[:, None]
    flat_ids = jnp.where(held, ids, num_experts).reshape(-1)
    order = jnp.argsort(flat_ids, stable=True)
    return Pairs(
        tokens=order // ids.shape[1],
        weights=routing.weights.reshape(-1)[order],
        expert_ids=flat_ids[order],
        group_sizes=jnp.bincount(flat_ids, length=num_experts).astype(jnp.int32),
        positions=jnp.argsort(order).reshape(ids.shape),
    )


class ExpertMatrices(Protocol):
    """What the experts ask of a stack of matrices, quantised or not."""

    def apply_one(self, x: jax.Array, expert: jax.Array) -> jax.Array:
        """Map rows [R, in] by the matrix of one expert; returns [R, out] in float32."""
        ...

    def apply_groups(self, x: jax.Array, pairs: Pairs) -> jax.Array:
        """Map [P, in], sorted as ``pairs``, each row by its expert; returns float32.

        Rows that belong to no group come out undefined.
        """
        ...


def ragged_matmul_transposed(
    x: jax.Array, matrices: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """Multiply sorted rows [P, in] by their group's matrix of [E, out, in], in float32.

    XLA's own product on TPU turns all matrices into a copy first, at every call; a kernel
    reads them as they lie. It does not keep float32 exact, which is for comparisons anyway.
    """
    if matrices.dtype == jnp.float32:
        return _ragged_dot(x, matrices, group_sizes)
    product: jax.Array = lax.platform_dependent(
        x, matrices, group_sizes, tpu=_multiply_groups, default=_ragged_dot
    )
    return product


def _multiply_groups(x: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    # Pallas takes as long to import as jax; few machines need it.
    from pals.models.kernels.grouped import multiply_groups

    return multiply_groups(x, matrices, group_sizes)


def _ragged_dot(x: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot_general(
        x,
        matrices,
        group_sizes,
        lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (2,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        ),
        precision=matmul_precision(matrices.dtype),
        preferred_element_type=jnp.float32,
    )


class Blocks(NamedTuple):
    """The blocks of rows in which the sorted pairs are worked off.

    Attributes:
        experts: [N] int32, the expert of each block.
        starts: [N] int32, the first pair of each block.
        counts: [N] int32, the pairs in each block, at least 1 and at most its size.
        total: The blocks that there are; N is the most there can be.
    """

    experts: jax.Array
    starts: jax.Array
    counts: jax.Array
    total: jax.Array


def block_size(num_pairs: int, num_experts: int) -> int:
    """Return the rows of a block: twice an expert's even share, and at least 2.

    Twice, so that an expert somewhat above the average still needs one block, whose
    weights are then read once. XLA's fast CPU kernels begin at 2 rows.
    """
    return max(2, min(2 * -(-num_pairs // num_experts), num_pairs))


def cut_blocks(group_sizes: jax.Array, num_pairs: int, size: int) -> Blocks:
    """Cut each expert's pairs into blocks of ``size``, the last one partial."""
    blocks = -(-group_sizes // size)
    ends = jnp.cumsum(blocks)
    most = num_pairs // size + min(num_pairs, group_sizes.shape[0])
    numbers = jnp.arange(most)
    experts = jnp.searchsorted(ends, numbers, side="right", method="compare_all")
    offsets = (numbers - (ends - blocks)[experts]) * size
    starts = (jnp.cumsum(group_sizes) - group_sizes)[experts] + offsets
    counts = jnp.minimum(group_sizes[experts] - offsets, size)
    return Blocks(experts, starts, counts, ends[-1])


def run_experts(
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    x: jax.Array,
    pairs: Pairs,
    *,
    activation: GatedActivation,
    strategy: Strategy,
) -> jax.Array:
    """Sum the experts of each token of [M, D] by ``strategy``; returns [M, D] in float32."""
    return STRATEGIES[strategy](gate_up, down, x, pairs, activation)


def run_one(
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    x: jax.Array,
    expert: jax.Array,
    activation: GatedActivation,
) -> jax.Array:
    """Run the rows of [R, D] through one expert; returns [R, D] in float32."""
    joined = join(gate_up.apply_one(x, expert), activation).astype(x.dtype)
    return down.apply_one(joined, expert)


def run_blocks(
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    x: jax.Array,
    pairs: Pairs,
    activation: GatedActivation,
) -> jax.Array:
    """Sum the experts of each token of [M, D], one block of rows after another.

    A token's experts are added in the order of their ids: blocks are sorted by expert, and
    a token stands in a block at most once. Adding into [M, D] takes 1/A of the memory of
    a result for each pair, and no more time.
    """
    num_pairs, num_experts = pairs.tokens.shape[0], pairs.group_sizes.shape[0]
    # One token is with no expert twice, and its products are not padded where that is slower.
    size = block_size(num_pairs, num_experts) if x.shape[0] > 1 else 1
    blocks = cut_blocks(pairs.group_sizes, num_pairs, size)
    tokens = jnp.pad(pairs.tokens, (0, size))
    weights = jnp.pad(pairs.weights, (0, size))

    def run_block(number: jax.Array, total: jax.Array) -> jax.Array:
        start, expert = blocks.starts[number], blocks.experts[number]
        rows = lax.dynamic_slice_in_dim(tokens, start, size)
        weight = lax.dynamic_slice_in_dim(weights, start, size)[:, None]
        product = run_one(gate_up, down, x[rows], expert, activation) * weight
        counted = (jnp.arange(size) < blocks.counts[number])[:, None]
        return total.at[rows].add(jnp.where(counted, product, 0))

    return lax.fori_loop(0, blocks.total, run_block, jnp.zeros(x.shape, jnp.float32))


def run_block_batches(
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    x: jax.Array,
    pairs: Pairs,
    activation: GatedActivation,
) -> jax.Array:
    """Sum the experts of each token of [M, D], `BATCH_BLOCKS` blocks of rows at a time."""
    num_pairs, num_experts = pairs.tokens.shape[0], pairs.group_sizes.shape[0]
    size = block_size(num_pairs, num_experts)
    blocks = cut_blocks(pairs.group_sizes, num_pairs, size)
    run = jax.vmap(lambda rows, expert: run_one(gate_up, down, rows, expert, activation))

    def run_batch(batch: jax.Array, results: jax.Array) -> jax.Array:
        numbers = batch * BATCH_BLOCKS + jnp.arange(BATCH_BLOCKS)
        offsets = jnp.arange(size)
        taken = blocks.starts[numbers, None] + offsets
        counted = (numbers < blocks.total)[:, None] & (offsets < blocks.counts[numbers, None])
        product = run(x[pairs.tokens[taken]], blocks.experts[numbers])
        places = jnp.where(counted, taken, num_pairs)
        return results.at[places].set(product, mode="drop")

    batches = -(-blocks.total // BATCH_BLOCKS)
    results = jnp.zeros((num_pairs, x.shape[1]), jnp.float32)
    return sum_pairs(lax.fori_loop(0, batches, run_batch, results), pairs)


def run_ragged(
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    x: jax.Array,
    pairs: Pairs,
    activation: GatedActivation,
) -> jax.Array:
    """Sum the experts of each token of [M, D] by two grouped products."""
    joined = join(gate_up.apply_groups(x[pairs.tokens], pairs), activation).astype(x.dtype)
    return sum_pairs(down.apply_groups(joined, pairs), pairs)


def sum_pairs(results: jax.Array, pairs: Pairs) -> jax.Array:
    """Weigh the sorted results [P, D] and sum those of each token; returns [M, D].

    Each token gathers its own and adds them from its best expert down; GPUs do not keep
    an order when many rows are added into one.
    """
    held = (pairs.expert_ids < pairs.group_sizes.shape[0])[:, None]
    weighted = jnp.where(held, results * pairs.weights[:, None], 0)
    return jnp.sum(weighted[pairs.positions], axis=1)


def join(gate_up: jax.Array, activation: GatedActivation) -> jax.Array:
    """Join the two halves of [R, 2F] to [R, F]."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return activation(gate, up)


STRATEGIES = {"blocks": run_blocks, "block_batches": run_block_batches, "ragged": run_ragged}
