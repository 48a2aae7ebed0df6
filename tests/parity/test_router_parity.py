"""Our routers and experts against transformers' own classes, for each way to route."""

import jax.numpy as jnp
import numpy as np
import pytest

from pals.models.configs.moe import RouterConfig
from pals.models.experts import ClampedSwiGLU, Experts
from pals.models.numerics import Numerics
from pals.models.router import Router, Routing

pytestmark = pytest.mark.parity

NUMERICS = Numerics(compute=jnp.dtype(jnp.float32))
M, D, E = 64, 24, 8

SIZES = {"hidden_size": D, "num_local_experts": E}
GROUPED = {"n_group": 4, "topk_group": 2, "n_routed_experts": E}

# class of transformers, its config, its arguments, our config
CASES = {
    "qwen3-plain": (
        "qwen3_moe.Qwen3MoeTopKRouter",
        "Qwen3MoeConfig",
        {"num_experts": E, "num_experts_per_tok": 3, "norm_topk_prob": False},
        {"kind": "softmax_topk", "num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
    "qwen3-normalised": (
        "qwen3_moe.Qwen3MoeTopKRouter",
        "Qwen3MoeConfig",
        {"num_experts": E, "num_experts_per_tok": 3, "norm_topk_prob": True},
        {"kind": "softmax_topk", "num_experts_per_tok": 3},
    ),
    "mixtral": (
        "mixtral.MixtralTopKRouter",
        "MixtralConfig",
        {"num_experts_per_tok": 2},
        {"kind": "softmax_topk", "num_experts_per_tok": 2},
    ),
    "gpt-oss": (
        "gpt_oss.GptOssTopKRouter",
        "GptOssConfig",
        {"num_experts_per_tok": 4},
        {"kind": "topk_softmax", "num_experts_per_tok": 4, "bias": True},
    ),
    **{
        f"{family}-{'normalised' if norm else 'plain'}": (
            f"{family}.{prefix}TopkRouter",
            f"{prefix}Config",
            {**GROUPED, "num_experts_per_tok": 3, "norm_topk_prob": norm,
             "routed_scaling_factor": 2.5},
            {"kind": "grouped_sigmoid", "num_experts_per_tok": 3, "norm_topk_prob": norm,
             "num_groups": 4, "topk_groups": 2, "routed_scaling_factor": 2.5,
             "correction_bias": True},
        )
        for family, prefix in (("glm4_moe", "Glm4Moe"), ("deepseek_v3", "DeepseekV3"))
        for norm in (True, False)
    },
}  # fmt: skip


def transformers_class(path):
    import importlib

    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    family, name = path.split(".")
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def random_module(path, config):
    """Return a module of transformers with random parameters and buffers."""
    import itertools

    import torch

    torch.manual_seed(0)
    module = transformers_class(path)(config)
    with torch.no_grad():
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            tensor.copy_(torch.randn_like(tensor) / 2)
    return module


def copy_parameters(module, target):
    import itertools

    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        getattr(target, name)[...] = jnp.asarray(tensor.detach().numpy())


@pytest.mark.parametrize("case", CASES)
def test_routing_equals_that_of_transformers(case):
    import torch
    import transformers

    path, config_name, values, ours = CASES[case]
    transformers_class(path)
    config = getattr(transformers, config_name)(**{**SIZES, **values})
    module = random_module(path, config)
    router = Router(RouterConfig(num_experts=E, **ours), D, numerics=NUMERICS)
    copy_parameters(module, router)
    x = np.random.default_rng(0).standard_normal((M, D)).astype(np.float32)

    with torch.no_grad():
        _, expected_weights, expected_ids = module(torch.tensor(x))
    found = router(jnp.asarray(x))

    # transformers leaves the order of grouped routing open
    ours_order = np.argsort(found.expert_ids, axis=1)
    their_order = np.argsort(expected_ids.numpy(), axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(found.expert_ids), ours_order, 1),
        np.take_along_axis(expected_ids.numpy(), their_order, 1),
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(found.weights), ours_order, 1),
        np.take_along_axis(expected_weights.numpy(), their_order, 1),
        atol=1e-6,
    )


def test_experts_of_gpt_oss_equal_those_of_transformers():
    import torch
    import transformers

    path = "gpt_oss.GptOssExperts"
    transformers_class(path)
    config = transformers.GptOssConfig(**SIZES, intermediate_size=20, swiglu_limit=1.5)
    module = random_module(path, config)
    activation = ClampedSwiGLU(limit=1.5)
    experts = Experts(E, D, 20, activation=activation, bias=True, numerics=NUMERICS)
    stored = {name: tensor.detach().numpy() for name, tensor in module.named_parameters()}
    interleaved = stored["gate_up_proj"].swapaxes(1, 2)
    halves = (interleaved[:, ::2], interleaved[:, 1::2])
    experts.gate_up_proj.weight[...] = jnp.asarray(np.concatenate(halves, axis=1))
    bias = stored["gate_up_proj_bias"]
    experts.gate_up_proj.bias[...] = jnp.asarray(np.concatenate([bias[:, ::2], bias[:, 1::2]], 1))
    experts.down_proj.weight[...] = jnp.asarray(stored["down_proj"].swapaxes(1, 2))
    experts.down_proj.bias[...] = jnp.asarray(stored["down_proj_bias"])
    random = np.random.default_rng(0)
    x = random.standard_normal((M, D)).astype(np.float32)
    ids = np.argsort(random.random((M, E)), axis=1)[:, :3]
    weights = random.random((M, 3)).astype(np.float32)

    with torch.no_grad():
        expected = module(torch.tensor(x), torch.tensor(ids), torch.tensor(weights)).numpy()
    found = experts(jnp.asarray(x), Routing(jnp.asarray(ids, jnp.int32), jnp.asarray(weights)))

    np.testing.assert_allclose(found, expected, atol=1e-4)
