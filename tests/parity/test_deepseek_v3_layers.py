"""The parts of DeepSeek V3's layers, one by one."""

import jax.numpy as jnp
import numpy as np
import pytest

from pals.models.rope import pair_halves, rotate
from tests.parity.layers import Parts, assert_same, parts_of
from tests.parity.test_deepseek_v3_parity import COMMON, YARN_ROPE

pytestmark = pytest.mark.parity

SMALL = {**COMMON, "num_hidden_layers": 2}
parts = parts_of(
    {
        "compressed-queries": (
            "DeepseekV3ForCausalLM",
            {**SMALL, "rope_parameters": YARN_ROPE, "attention_bias": True},
        ),
        "plain-queries": (
            "DeepseekV3ForCausalLM",
            {**SMALL, "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False},
        ),
    }
)


def test_norms_are_those_of_transformers(parts: Parts):
    parts.assert_same_norms()


def test_norms_of_latents_keep_their_own_epsilon(parts: Parts):
    ours, theirs = parts.ours.layers[0].self_attn, parts.theirs.model.layers[0].self_attn
    tiny = parts.with_hidden(1e-3 * parts.hidden[..., : COMMON["kv_lora_rank"]])

    found = ours.kv_a_layernorm(tiny.tokens)

    assert_same(found, tiny.call(theirs.kv_a_layernorm), "kv_a_layernorm")


def test_rotary_embedding_is_that_of_transformers(parts: Parts):
    import torch
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    (table,) = parts.rows().rope
    heads = parts.hidden[..., None, : table.cos.shape[-1]]
    theirs = torch.tensor(heads).transpose(1, 2)
    is_interleaved = parts.ours.config.attention[0].interleaved
    turn = (
        modeling.apply_rotary_pos_emb_interleave
        if is_interleaved
        else modeling.apply_rotary_pos_emb
    )

    expected, _ = turn(theirs, theirs, *parts.their_tables())

    ours = jnp.array(heads)
    found = rotate(pair_halves(ours) if is_interleaved else ours, table)
    assert_same(found, expected.transpose(1, 2).numpy(), "rope")


def test_absorbed_attention_is_the_expanded_one_of_transformers(parts: Parts):
    for layer in range(parts.ours.config.num_layers):
        found, _ = parts.our_attention(layer)
        assert_same(found, parts.their_attention(layer), f"{layer}")


def test_cache_holds_the_latents_and_turned_keys_of_transformers(parts: Parts):
    from transformers import DynamicCache

    kept = DynamicCache()
    parts.their_attention(0, cache=kept)

    _, (found,) = parts.our_attention(0)

    expected = np.concatenate([kept.layers[0].keys, kept.layers[0].values], axis=-1)
    tokens = parts.hidden.shape[1]
    assert_same(found[:, 1:2].swapaxes(0, 1)[:, :, :tokens], expected, "cache")


def test_mlp_is_that_of_transformers(parts: Parts):
    found = parts.ours.layers[0].mlp(parts.tokens)

    assert_same(found, parts.call(parts.theirs.model.layers[0].mlp), "mlp")


def test_router_chooses_as_transformers_does(parts: Parts):
    parts.assert_same_routing(layer=1)


def test_experts_are_those_of_transformers(parts: Parts):
    found = parts.ours.layers[1].mlp(parts.tokens)

    assert_same(found, parts.call(parts.theirs.model.layers[1].mlp), "experts")
