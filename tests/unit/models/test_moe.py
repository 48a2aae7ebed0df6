import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pals.models.configs.moe import MoEConfig, RouterConfig, RouterOverride
from pals.models.moe import MoE
from pals.models.moe_options import MoEOptions
from pals.models.numerics import Numerics
from tests.unit.models.moe_reference import F32, run

D = 16
CONFIG = MoEConfig(
    router=RouterConfig(kind="softmax_topk", num_experts=6, num_experts_per_tok=2),
    intermediate_size=12,
)


class Recorder:
    """Keeps what the hook is given."""

    def __init__(self):
        self.records = []
        self._lock = threading.Lock()

    def __call__(self, record):
        with self._lock:
            self.records.append(record)


def build_moe(config=CONFIG, *, layer=3, **options):
    """Return a MoE with random weights, equal for equal shapes."""
    numerics = Numerics(compute=F32, moe=MoEOptions(**options))
    graphdef, state = nnx.split(MoE(config, D, layer, numerics))
    random = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(state)
    leaves = [jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


def random_hidden_states(tokens):
    random = np.random.default_rng(1)
    return jnp.asarray(random.standard_normal((tokens, D)), jnp.float32)


def test_the_hook_sees_the_choice_and_the_load_of_each_layer():
    recorder = Recorder()
    moe = build_moe(layer=3, trace=recorder)
    x = random_hidden_states(10)

    jax.block_until_ready(run(moe, x))
    jax.effects_barrier()

    expected = moe.gate(x)
    [record] = recorder.records
    assert record.layer == 3
    np.testing.assert_array_equal(record.expert_ids, expected.expert_ids)
    np.testing.assert_allclose(record.weights, expected.weights, rtol=1e-6)
    assert record.load.sum() == 20
    assert record.load.tolist() == [(record.expert_ids == e).sum() for e in range(6)]


def test_padding_leaves_no_trace_and_changes_no_other_token():
    recorder = Recorder()
    moe = build_moe(trace=recorder)
    x = random_hidden_states(6)
    counted = jnp.array([True, True, False, True, False, False])

    padded = jax.block_until_ready(run(moe, x, counted))
    jax.effects_barrier()

    [record] = recorder.records
    assert record.expert_ids.shape == (3, 2)
    assert record.load.sum() == 6
    np.testing.assert_allclose(padded[counted], run(build_moe(), x)[counted], atol=1e-5)


def test_a_model_without_a_trace_compiles_to_a_program_without_one():
    x = random_hidden_states(4)

    def plain(moe, x):
        with jax.named_scope("moe"):
            return moe.experts(x, moe.gate(x))

    def with_hook(moe, x):
        return moe(x)

    with_hook.__name__ = plain.__name__
    untraced = jax.jit(with_hook).lower(build_moe(), x).as_text()
    traced = jax.jit(with_hook).lower(build_moe(trace=Recorder()), x).as_text()

    assert untraced == jax.jit(plain).lower(build_moe(), x).as_text()
    assert "callback" in traced
    assert "callback" not in untraced


def test_layers_without_a_trace_are_one_program():
    first, _ = nnx.split(build_moe(layer=0))
    second, _ = nnx.split(build_moe(layer=7))

    assert first == second


def test_a_hook_does_not_change_the_result():
    x = random_hidden_states(8)

    np.testing.assert_array_equal(run(build_moe(trace=Recorder()), x), run(build_moe(), x))


def test_an_override_changes_how_many_experts_a_token_takes():
    recorder = Recorder()
    override = RouterOverride(num_experts_per_tok=1)
    moe = build_moe(override=override, trace=recorder)

    jax.block_until_ready(run(moe, random_hidden_states(4)))
    jax.effects_barrier()

    [record] = recorder.records
    assert record.expert_ids.shape == (4, 1)
    np.testing.assert_allclose(record.weights, 1.0, rtol=1e-6)


def test_an_override_that_the_model_cannot_fulfil_is_refused():
    with pytest.raises(ValueError, match="9 of 6 experts"):
        build_moe(override=RouterOverride(num_experts_per_tok=9))


def test_a_shared_expert_is_added_for_every_token():
    shared = MoEConfig(router=CONFIG.router, intermediate_size=12, shared_intermediate_size=20)
    moe = build_moe(shared)
    x = random_hidden_states(4)

    found = run(moe, x)

    routed = moe.experts(x, moe.gate(x))
    np.testing.assert_allclose(found, routed + moe.shared_experts(x), atol=1e-4)
