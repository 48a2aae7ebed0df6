"""Experts computed one token after another in float64, and random layers to try them on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pals.models.experts import Experts
from pals.models.numerics import Numerics
from pals.models.router import Routing

F32 = jnp.dtype(jnp.float32)


@dataclass(frozen=True)
class ExpertWeights:
    """Random matrices and biases of E experts."""

    gate_up: np.ndarray
    gate_up_bias: np.ndarray
    down: np.ndarray
    down_bias: np.ndarray

    @classmethod
    def random(cls, num_experts: int, hidden_size: int, intermediate_size: int, *, seed: int = 0):
        random = np.random.default_rng(seed)
        wide, narrow = 2 * intermediate_size, intermediate_size
        shapes = [(wide, hidden_size), (wide,), (hidden_size, narrow), (hidden_size,)]
        return cls(
            *(
                random.standard_normal((num_experts, *shape)).astype(np.float32) / shape[-1] ** 0.5
                for shape in shapes
            )
        )

    def sum_experts(self, x: np.ndarray, expert_ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the weighted sum over each token's experts, [M, D] in float64."""
        result = np.zeros(x.shape)
        for token, row in enumerate(x.astype(np.float64)):
            for expert, weight in zip(expert_ids[token], weights[token], strict=True):
                joined = self.gate_up[expert] @ row + self.gate_up_bias[expert]
                gate, up = np.split(joined, 2)
                hidden = gate / (1 + np.exp(-gate)) * up
                result[token] += weight * (self.down[expert] @ hidden + self.down_bias[expert])
        return result


def build_experts(
    weights: ExpertWeights, *, platform: str = "cpu", dtype: jnp.dtype = F32, mesh=None
) -> Experts:
    """Return our experts with these weights."""
    num_experts, hidden_size, intermediate_size = weights.down.shape
    numerics = Numerics(compute=dtype, platform=platform, mesh=mesh)
    experts = Experts(num_experts, hidden_size, intermediate_size, bias=True, numerics=numerics)
    experts.gate_up_proj.weight[...] = jnp.asarray(weights.gate_up, dtype)
    experts.gate_up_proj.bias[...] = jnp.asarray(weights.gate_up_bias, dtype)
    experts.down_proj.weight[...] = jnp.asarray(weights.down, dtype)
    experts.down_proj.bias[...] = jnp.asarray(weights.down_bias, dtype)
    return experts


def random_routing(num_tokens: int, num_experts: int, per_token: int, *, seed: int = 0) -> Routing:
    """Return different experts for each token, and weights."""
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((num_tokens, num_experts)), axis=1)[:, :per_token]
    weights = random.random((num_tokens, per_token), dtype=np.float32)
    return Routing(jnp.asarray(ids, jnp.int32), jnp.asarray(weights))


@jax.jit
def run(module, *arguments):
    """Call a module with its parameters as arguments, as the engine does."""
    return module(*arguments)
