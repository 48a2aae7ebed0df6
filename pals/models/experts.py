# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The experts of one layer: each token runs through the few that its router chose.

Matrices are stacked in the checkpoints' ``(out, in)`` layout, one expert after another,
so that a file's bytes go to their place unturned. The work is done in one of two ways,
chosen once when a model is built:

- ``blocks``, for CPUs: a loop over the experts that were chosen at all, each over its
  tokens in blocks of rows. Temporary memory is one expert's weights and one sum for each
  token, whatever the number of experts.
- ``ragged``, for GPUs and TPUs: two grouped products over all tokens at once.
  (XLA expands these to a product with *every* expert on a CPU.)

Both give a token what it would get alone, to float rounding: a sum over its experts whose
order follows from its own choice, not from who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pals.models.layers import matmul_precision, matmul_transposed
from pals.models.router import Routing

EXPERT_AXIS = "model"
"""The mesh axis over which the experts of a layer are split."""

Strategy = Literal["blocks", "ragged"]
Tree = TypeVar("Tree")

GatedActivation = Callable[[jax.Array, jax.Array], jax.Array]
"""Joins the gate and the up projection, both [M, F] in float32."""


def expert_strategy(platform: str) -> Strategy:
    """Return how experts are computed on ``platform`` (as jax names it)."""
    return "blocks" if platform == "cpu" else "ragged"


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Join as almost all families do (https://arxiv.org/abs/2002.05202)."""
    return jax.nn.silu(gate) * up


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiGLU:
    """Joins as gpt_oss does (transformers: modeling_gpt_oss.py).

    Attributes:
        alpha: Steepness of the sigmoid.
        limit: Bounds the gate from above and the up projection on both sides.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Join [M, F] and [M, F]."""
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(gate * self.alpha)


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


class ExpertLinear(nnx.Module):
    """One affine map for each expert, stacked as ``(E, out, in)``."""

    def __init__(
        self, num_experts: int, in_size: int, out_size: int, *, bias: bool, dtype: jnp.dtype
    ) -> None:
        self.weight = nnx.Param(jnp.zeros((num_experts, out_size, in_size), dtype))
        self.bias = nnx.Param(jnp.zeros((num_experts, out_size), dtype)) if bias else None

    def apply_one(self, x: jax.Array, expert: jax.Array) -> jax.Array:
        """Map rows [R, in] by the matrix of one expert; returns [R, out] in float32."""
        product = matmul_transposed(x, take_expert(self.weight[...], expert))
        return product if self.bias is None else product + take_expert(self.bias[...], expert)

    def apply_groups(self, x: jax.Array, pairs: Pairs) -> jax.Array:
        """Map [P, in], sorted as ``pairs``, each row by its expert; returns float32."""
        product = ragged_matmul_transposed(x, self.weight[...], pairs.group_sizes)
        if self.bias is None:
            return product
        return product + self.bias[...].at[pairs.expert_ids].get(mode="clip")


def take_expert(stacked: Tree, expert: jax.Array) -> Tree:
    """Take one expert's part of every array of a tree, [E, ...] each.

    The barrier ties the arrays to the loop that asks. Without it jax 0.10 moves the
    float32 form of a bf16 slice out of the loop, and writes out all experts in float32.
    """
    stacked, expert = lax.optimization_barrier((stacked, expert))
    take = partial(lax.dynamic_index_in_dim, index=expert, keepdims=False)
    return jax.tree.map(take, stacked)


def ragged_matmul_transposed(
    x: jax.Array, matrices: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """Multiply sorted rows [P, in] by their group's matrix of [E, out, in], in float32."""
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


class Experts(nnx.Module):
    """The feed-forward blocks among which a router chooses.

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: F, of each expert.
        activation: Joins gate and up.
        bias: Each projection is affine.
        strategy: See `expert_strategy`.
        mesh: Splits the experts over its axis `EXPERT_AXIS`; None keeps them together.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: GatedActivation = swiglu,
        bias: bool = False,
        strategy: Strategy,
        mesh: Mesh | None = None,
        dtype: jnp.dtype,
    ) -> None:
        if mesh is not None and num_experts % mesh.shape[EXPERT_AXIS]:
            raise ValueError(
                f"{num_experts} experts cannot be split over {mesh.shape[EXPERT_AXIS]} devices"
            )
        matrices = partial(ExpertLinear, num_experts, bias=bias, dtype=dtype)
        self.gate_up_proj = matrices(hidden_size, 2 * intermediate_size)
        self.down_proj = matrices(intermediate_size, hidden_size)
        self.num_experts = num_experts
        self.activation = activation
        self.strategy: Strategy = strategy
        self.mesh = mesh

    def __call__(self, x: jax.Array, routing: Routing, rows: jax.Array | None = None) -> jax.Array:
        """Return each token's weighted sum over its experts.

        Args:
            x: [M, D].
            routing: The experts of each row.
            rows: [M] booleans, False for padding, whose result is 0 and costs nothing;
                None means that all rows count.

        Returns:
            [M, D] in float32.
        """
        with jax.named_scope("experts"):
            run = partial(run_experts, activation=self.activation, strategy=self.strategy)
            if self.mesh is None:
                pairs = sort_pairs(routing, self.num_experts, rows)
                return run(self.gate_up_proj, self.down_proj, x, pairs)
            return self._run_split(run, x, routing, rows)

    def _run_split(
        self,
        run: Callable[[ExpertMatrices, ExpertMatrices, jax.Array, Pairs], jax.Array],
        x: jax.Array,
        routing: Routing,
        rows: jax.Array | None,
    ) -> jax.Array:
        """Let each device run its own experts over all tokens, and add up."""
        assert self.mesh is not None
        held = self.num_experts // self.mesh.shape[EXPERT_AXIS]

        def run_held(
            gate_up: ExpertMatrices,
            down: ExpertMatrices,
            x: jax.Array,
            routing: Routing,
            rows: jax.Array | None,
        ) -> jax.Array:
            first = lax.axis_index(EXPERT_AXIS) * held
            here = routing._replace(expert_ids=routing.expert_ids - first)
            return lax.psum(run(gate_up, down, x, sort_pairs(here, held, rows)), EXPERT_AXIS)

        split, whole = PartitionSpec(EXPERT_AXIS), PartitionSpec()
        return jax.shard_map(
            run_held,
            mesh=self.mesh,
            in_specs=(split, split, whole, whole, whole),
            out_specs=whole,
            check_vma=False,
        )(self.gate_up_proj, self.down_proj, x, routing, rows)


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
    run = run_blocks if strategy == "blocks" else run_ragged
    return run(gate_up, down, x, pairs, activation)


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
    size = block_size(num_pairs, num_experts)
    blocks = cut_blocks(pairs.group_sizes, num_pairs, size)
    tokens = jnp.pad(pairs.tokens, (0, size))
    weights = jnp.pad(pairs.weights, (0, size))

    def run_block(number: jax.Array, total: jax.Array) -> jax.Array:
        start, expert = blocks.starts[number], blocks.experts[number]
        rows = lax.dynamic_slice_in_dim(tokens, start, size)
        weight = lax.dynamic_slice_in_dim(weights, start, size)[:, None]
        joined = join(gate_up.apply_one(x[rows], expert), activation).astype(x.dtype)
        product = down.apply_one(joined, expert) * weight
        counted = (jnp.arange(size) < blocks.counts[number])[:, None]
        return total.at[rows].add(jnp.where(counted, product, 0))

    return lax.fori_loop(0, blocks.total, run_block, jnp.zeros(x.shape, jnp.float32))


def run_ragged(
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    x: jax.Array,
    pairs: Pairs,
    activation: GatedActivation,
) -> jax.Array:
    """Sum the experts of each token of [M, D] by two grouped products.

    Each token gathers its own results and adds them from its best expert down; GPUs do
    not keep an order when many rows are added into one.
    """
    joined = join(gate_up.apply_groups(x[pairs.tokens], pairs), activation).astype(x.dtype)
    product = down.apply_groups(joined, pairs) * pairs.weights[:, None]
    held = pairs.expert_ids < pairs.group_sizes.shape[0]
    return jnp.sum(jnp.where(held[:, None], product, 0)[pairs.positions], axis=1)


def join(gate_up: jax.Array, activation: GatedActivation) -> jax.Array:
    """Join the two halves of [R, 2F] to [R, F]."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return activation(gate, up)
