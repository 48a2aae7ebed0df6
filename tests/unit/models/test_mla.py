from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pals.engine.cache import lone_cache
from pals.models.configs import read_config
from pals.models.decoder import run_layer
from pals.models.mla import LatentAttention
from pals.models.numerics import Numerics
from pals.models.paged import lone_row, make_rows
from pals.types import LayerRange

HEADS, LATENT, TURNED = 8, 20, 8
CONTEXT = 256
CONFIG = read_config(
    {
        "model_type": "deepseek_v3",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "n_routed_experts": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "q_lora_rank": 24,
        "kv_lora_rank": LATENT,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": TURNED,
        "v_head_dim": 10,
    }
)


def build(dtype):
    """Return a random attention and its empty cache."""
    module = LatentAttention(CONFIG, CONFIG.attention[0], Numerics(compute=jnp.dtype(dtype)))
    graphdef, state = nnx.split(module)
    random = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.array(0.3 * random.standard_normal(leaf.shape), leaf.dtype), state
    )
    (cache,) = lone_cache(CONFIG, LayerRange(0, 1), tokens=CONTEXT, dtype=jnp.dtype(dtype))
    return nnx.merge(graphdef, state), cache


def rows(start, tokens):
    return make_rows(CONFIG, *lone_row(tokens, start, 1 + CONTEXT // 64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_steps_of_one_token_equal_one_step_of_all(dtype, tolerance):
    module, cache = build(dtype)
    x = jnp.array(np.random.default_rng(1).standard_normal((9, 32)), dtype)
    expected, _ = run_layer(module, x, cache, rows(0, 9))

    parts = []
    for token in range(9):
        token_rows = rows(token, 1)
        part, cache = run_layer(module, x[token : token + 1], cache, token_rows)
        parts.append(part)

    found = jnp.concatenate(parts)
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance, rtol=tolerance
    )


def test_absorbed_queries_score_latents_as_they_score_their_keys():
    module, _ = build(jnp.float32)
    random = np.random.default_rng(2)
    queries = random.standard_normal((6, HEADS, 12), np.float32)
    latents = random.standard_normal((7, LATENT), np.float32)
    matrices = np.asarray(module.kv_b_proj.weight[...]).reshape(HEADS, 22, LATENT)
    keys = np.einsum("sr,npr->snp", latents, matrices[:, :12])

    absorbed = module.kv_b_proj.absorb_queries(jnp.array(queries))

    found = np.einsum("mnr,sr->mns", absorbed, latents)
    np.testing.assert_allclose(found, np.einsum("mnp,snp->mns", queries, keys), atol=1e-4)


def test_values_are_those_of_the_mixed_latent():
    module, _ = build(jnp.float32)
    latents = np.random.default_rng(3).standard_normal((6, HEADS, LATENT), np.float32)
    matrices = np.asarray(module.kv_b_proj.weight[...]).reshape(HEADS, 22, LATENT)

    found = module.kv_b_proj.expand_values(jnp.array(latents))

    expected = np.einsum("mnr,nwr->mnw", latents, matrices[:, 12:])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def sizes(jaxpr) -> Iterator[int]:
    """Yield the size of every value that a program makes."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for parameter in equation.params.values():
            if hasattr(parameter, "jaxpr"):
                yield from sizes(parameter.jaxpr)


def test_a_step_of_one_token_expands_no_cached_key_or_value():
    module, cache = build(jnp.float32)
    graphdef, state = nnx.split(module)

    def step(state, x, cache):
        return nnx.merge(graphdef, state)(x, cache, rows(5, 1))

    program = jax.make_jaxpr(step)(state, jnp.zeros((1, 32)), cache)

    expanded_values = CONTEXT * HEADS * 10
    assert max(sizes(program.jaxpr)) == cache[0].size < expanded_values
