# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Layers that model families share.

Modules follow the subset of Flax NNX that its tree mode keeps: no shared `Param`, no
mutation in ``__call__``. Attribute names are those of the Hugging Face checkpoints, so
that a parameter's path is its weight's name. Matrices keep their ``(out, in)`` layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pals.models.config import Activation
from pals.models.matmul import matmul_transposed
from pals.models.matrix import make_weight, multiply
from pals.models.numerics import Numerics
from pals.models.spread import Split, add_up, check_divides, device_number, join_last


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU (https://arxiv.org/abs/1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": gelu_tanh,
}


class Linear(nnx.Module):
    """An affine map whose matrix is stored as ``(out, in)``.

    Devices may divide its outputs, of which each then has its own, or its inputs, of which
    each takes its own and all get the same sum.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        bias: bool,
        numerics: Numerics,
        split: Split | None = None,
    ) -> None:
        self.weight = make_weight((out_size, in_size), numerics, split)
        axis = 0 if split == "outputs" else None
        self.bias = (
            nnx.Param(jnp.zeros((out_size,), numerics.compute), split_axis=axis) if bias else None
        )
        self.parts = numerics.devices if split == "inputs" else 1

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [M, in] to [M, out]."""
        product = add_up(multiply(x, self.weight), self.parts)
        if self.bias is not None:
            product = product + self.bias[...]
        return product.astype(x.dtype)


class Embedding(nnx.Module):
    """The token embedding, which is also the LM head of models that tie the two.

    Devices divide the vocabulary where it can be divided, and else have all of it each.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, numerics: Numerics) -> None:
        self.parts = 1 if vocab_size % numerics.devices else numerics.devices
        self.weight = nnx.Param(
            jnp.zeros((vocab_size, hidden_size), numerics.compute),
            split_axis=0 if self.parts > 1 else None,
        )

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """Look up [M] ids; returns [M, D]."""
        table = self.weight[...]
        if self.parts == 1:
            return table[token_ids]
        rows = token_ids - device_number(self.parts) * table.shape[0]
        is_here = (rows >= 0) & (rows < table.shape[0])
        found = jnp.where(is_here[:, None], table[jnp.where(is_here, rows, 0)], 0)
        return add_up(found, self.parts)

    def attend(self, x: jax.Array) -> jax.Array:
        """Score [M, D] against every token; returns float32 logits [M, V]."""
        return join_last(matmul_transposed(x, self.weight[...]), self.parts)


class RMSNorm(nnx.Module):
    """Root mean square normalisation (https://arxiv.org/abs/1910.07467).

    Attributes:
        eps: Added to the mean square before the root.
        offset: Added to the weight, which Gemma stores around 0.
    """

    def __init__(self, size: int, *, eps: float, numerics: Numerics, offset: float = 0.0) -> None:
        self.weight = nnx.Param(jnp.ones((size,), numerics.compute))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of [..., D], with the statistics in float32."""
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if not self.offset:
            return wide.astype(x.dtype) * self.weight[...]
        # Gemma multiplies before it rounds: bf16 would lose half of the weight beside 1.
        return (wide * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)


class GatedMLP(nnx.Module):
    """A gated feed-forward block, such as SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        numerics: Numerics,
        bias: bool = False,
        activation: Activation = "silu",
    ) -> None:
        check_divides(intermediate_size, "columns of a feed-forward block", numerics.devices)
        linear = partial(Linear, bias=bias, numerics=numerics)
        self.gate_proj = linear(hidden_size, intermediate_size, split="outputs")
        self.up_proj = linear(hidden_size, intermediate_size, split="outputs")
        self.down_proj = linear(intermediate_size, hidden_size, split="inputs")
        self.activation: Activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [M, D] to [M, D]."""
        with jax.named_scope("mlp"):
            gate = ACTIVATIONS[self.activation](self.gate_proj(x))
            return self.down_proj(gate * self.up_proj(x))


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Squash scores or logits into (-cap, cap) (https://arxiv.org/abs/2408.00118)."""
    return jnp.tanh(x / cap) * cap
