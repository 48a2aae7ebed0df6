"""The parts of gpt-oss's layers, one by one."""

import numpy as np
import pytest

from tests.parity.layers import Parts, assert_same, parts_of
from tests.parity.test_gpt_oss_parity import YARN_ROPE

pytestmark = pytest.mark.parity

LAYERS = range(2)

parts = parts_of(
    {
        "gpt_oss": (
            "GptOssForCausalLM",
            {
                "head_dim": 20,
                "intermediate_size": 24,
                "num_experts_per_tok": 3,
                "num_hidden_layers": len(LAYERS),
                "num_local_experts": 6,
                "rope_parameters": YARN_ROPE,
                "sliding_window": 6,
            },
        ),
    }
)


def test_norms_are_those_of_transformers(parts: Parts):
    parts.assert_same_norms()


def test_rotary_embedding_is_that_of_transformers(parts: Parts):
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    parts.assert_same_turns(apply_rotary_pos_emb)


@pytest.mark.parametrize("layer", LAYERS)
def test_attention_beside_sinks_is_that_of_transformers(parts: Parts, layer):
    window = parts.ours.config.attention[layer].window
    assert (window is None) == (layer == 1)

    found, _ = parts.our_attention(layer)

    assert_same(found, parts.their_attention(layer, window=window), f"{layer}")


@pytest.mark.parametrize("layer", LAYERS)
def test_router_chooses_as_transformers_does(parts: Parts, layer):
    parts.assert_same_routing(layer, name="router")


@pytest.mark.parametrize("layer", LAYERS)
def test_experts_are_those_of_transformers(parts: Parts, layer):
    found = parts.ours.layers[layer].mlp(parts.tokens)

    assert_same(found, parts.call(parts.theirs.model.layers[layer].mlp), f"{layer}")


def test_experts_are_clamped_where_transformers_clamps(parts: Parts):
    loud = parts.with_hidden(parts.hidden * 20)
    limit = parts.ours.config.moe[0].swiglu_limit
    mlp = parts.theirs.model.layers[0].mlp
    products = loud.hidden @ mlp.experts.gate_up_proj.detach().numpy()[0]
    assert (products > limit).any()
    assert (products < -limit).any()

    found = loud.ours.layers[0].mlp(loud.tokens)

    np.testing.assert_allclose(found, loud.call(mlp)[0], rtol=2e-5, atol=2e-4)
