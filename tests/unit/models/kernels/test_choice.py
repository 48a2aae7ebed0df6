from dataclasses import replace

import jax.numpy as jnp
import pytest

from pals.errors import InvalidConfig
from pals.models.config import AttentionConfig, LatentAttentionConfig
from pals.models.kernels.choice import Chosen, choose_attention
from pals.models.numerics import Numerics

LAYER = AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=128, scale=0.1)
LATENT = LatentAttentionConfig(
    num_heads=8,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    bias=False,
    interleaved=False,
    scale=0.1,
)


def choose(asked, platform, *layers, trial=lambda *_: None):
    numerics = Numerics(compute=jnp.dtype(jnp.float32), platform=platform)
    return choose_attention(asked, layers, numerics, 64, trial=trial)


@pytest.mark.parametrize(("platform", "kernel"), [("gpu", "triton"), ("tpu", "mosaic")])
@pytest.mark.parametrize("asked", ["auto", "pallas"])
def test_accelerators_take_their_kernel(asked, platform, kernel):
    assert choose(asked, platform, LAYER).kernel == kernel


def test_plain_xla_is_taken_when_asked_for():
    assert choose("xla", "gpu", LAYER) == Chosen("xla", "asked for")


@pytest.mark.parametrize(
    ("platform", "layers", "reason"),
    [
        ("cpu", [LAYER], "there is no kernel for cpu"),
        ("gpu", [LAYER, LATENT], "latent attention"),
        ("gpu", [LAYER, replace(LAYER, head_dim=80)], "heads have 80 numbers"),
        ("gpu", [replace(LAYER, head_dim=8)], "heads have 8 numbers"),
        ("tpu", [LATENT], "latent attention"),
    ],
)
def test_what_no_kernel_carries_is_left_to_plain_xla_with_the_reason(platform, layers, reason):
    chosen = choose("auto", platform, *layers)

    assert chosen.kernel == "xla"
    assert reason in chosen.reason
    with pytest.raises(InvalidConfig) as caught:
        choose("pallas", platform, *layers)
    assert caught.value.fields["problem"] == chosen.reason


def test_a_kernel_that_fails_its_trial_is_not_used():
    windowed = replace(LAYER, window=16)
    problems = {LAYER: None, windowed: "the kernel is off by 2 here"}

    def trial(kernel, layer, numerics, page_tokens):
        return problems[layer]

    assert choose("auto", "gpu", LAYER, LAYER, trial=trial).kernel == "triton"
    chosen = choose("auto", "gpu", LAYER, windowed, trial=trial)
    assert chosen == Chosen("xla", "the kernel is off by 2 here")


def test_equal_layers_are_tried_once():
    tried = []

    choose("auto", "tpu", LAYER, LAYER, trial=lambda *arguments: tried.append(arguments))

    assert [layer for _, layer, _, _ in tried] == [LAYER]
