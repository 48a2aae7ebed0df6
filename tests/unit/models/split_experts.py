"""Runs experts split over four virtual devices; a process of its own, for jax counts its
devices once. Prints how far the results are from those of one device.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pals.models.assemble import Assembler
from pals.models.configs.moe import MoEConfig, RouterConfig
from pals.models.experts import expert_sharding
from pals.models.moe import MoE
from pals.models.moe_options import MoEOptions
from pals.models.numerics import Numerics
from tests.unit.models.moe_reference import F32, ExpertWeights, build_experts, random_routing, run

DEVICES = 4
E, D, F = 8, 16, 12


def split(module, mesh, *prefix):
    """Return the module with its parameters where a model built with ``mesh`` has them."""
    graphdef, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    paths = nnx.to_flat_state(state).paths
    placed = [
        jax.device_put(leaf, expert_sharding((*prefix, *path), mesh))
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, placed))


def experts_difference(mesh, platform, num_tokens, *, masked):
    weights = ExpertWeights.random(E, D, F)
    x = np.random.default_rng(1).standard_normal((num_tokens, D)).astype(np.float32)
    routing = random_routing(num_tokens, E, 3)
    rows = (jnp.arange(num_tokens) % 3 != 1,) if masked else ()
    together = run(build_experts(weights, platform=platform), x, routing, *rows)
    experts = build_experts(weights, platform=platform, mesh=mesh)
    apart = run(split(experts, mesh, "experts"), x, routing, *rows)
    return float(np.abs(np.asarray(together) - np.asarray(apart)).max())


def traced_records(mesh):
    """Return the number of records of one step, and the tokens in the first."""
    records = []
    config = MoEConfig(
        router=RouterConfig(kind="softmax_topk", num_experts=E, num_experts_per_tok=2),
        intermediate_size=F,
    )
    numerics = Numerics(compute=F32, moe=MoEOptions(mesh=mesh, trace=records.append))
    moe = split(MoE(config, D, 0, numerics), mesh)
    jax.block_until_ready(run(moe, jnp.ones((1, 5, D))))
    jax.effects_barrier()
    return [len(records), len(records[0].expert_ids)]


def assembled(mesh):
    """Return whether a split array is right, shard by shard, and whether it was taken over."""
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    values = np.arange(E * D, dtype=np.float32).reshape(E, D)
    target = Assembler(values.shape, np.float32, sharding=sharding)
    for start in range(0, E, 3):
        rows = slice(start, min(start + 3, E))
        target.write(None, rows, values[rows])
    array = target.finish()
    shards = [shard.data.shape for shard in array.addressable_shards]
    return bool(np.array_equal(array, values)) and shards == [(E // DEVICES, D)] * DEVICES


def main():
    jax.config.update("jax_num_cpu_devices", DEVICES)
    results = {}
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((DEVICES,), ("model",), axis_types=(axis_type,))
        results[axis_type.name] = {
            "differences": [
                experts_difference(mesh, platform, num_tokens, masked=masked)
                for platform in ("cpu", "gpu", "tpu")
                for num_tokens, masked in ((1, False), (21, True))
            ],
            "records": traced_records(mesh),
            "assembled": assembled(mesh),
        }
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
