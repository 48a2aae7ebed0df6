"""Runs experts spread over four virtual devices; a process of its own, for jax counts its
devices once. Prints how far the results are from those of one device.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from pals.models.array_store import load_arrays, save_arrays
from pals.models.assemble import Assembler
from pals.models.build import AbstractModel
from pals.models.configs.moe import MoEConfig, RouterConfig
from pals.models.moe import MoE
from pals.models.moe_options import MoEOptions
from pals.models.numerics import Numerics
from pals.models.spread import open_mesh, place, places_of, run_apart
from tests.unit.models.moe_reference import F32, ExpertWeights, build_experts, random_routing, run

DEVICES = 4
E, D, F = 8, 16, 12


def run_spread(make, mesh, *arguments):
    """Call a module with each parameter where a model on ``mesh`` has it."""
    abstract = AbstractModel.of(make, mesh)
    _, state = nnx.split(make())
    shapes = abstract.parameters.values()
    leaves = tuple(
        jax.device_put(leaf, shape.sharding)
        for leaf, shape in zip(jax.tree.leaves(state), shapes, strict=True)
    )
    whole = PartitionSpec()

    def step(leaves, *arguments):
        return abstract.merge(leaves)(*arguments)

    places = (places_of(leaves), *[whole] * len(arguments))
    return jax.jit(run_apart(step, mesh, places, whole))(leaves, *arguments)


def experts_difference(mesh, platform, num_tokens, *, masked):
    weights = ExpertWeights.random(E, D, F)
    x = np.random.default_rng(1).standard_normal((num_tokens, D)).astype(np.float32)
    routing = random_routing(num_tokens, E, 3)
    rows = (np.arange(num_tokens) % 3 != 1,) if masked else ()
    together = run(build_experts(weights, platform=platform), x, routing, *rows)
    experts = partial(build_experts, weights, platform=platform, mesh=mesh)
    apart = run_spread(experts, mesh, x, jax.tree.map(np.asarray, routing), *rows)
    return float(np.abs(np.asarray(together) - np.asarray(apart)).max())


def traced_records(mesh):
    """Return the number of records of one step, and the tokens in the first."""
    records = []
    config = MoEConfig(
        router=RouterConfig(kind="softmax_topk", num_experts=E, num_experts_per_tok=2),
        intermediate_size=F,
    )
    numerics = Numerics(compute=F32, mesh=mesh, moe=MoEOptions(trace=records.append))
    moe = partial(MoE, config, D, 0, numerics)
    jax.block_until_ready(run_spread(moe, mesh, np.ones((5, D), np.float32)))
    jax.effects_barrier()
    return [len(records), len(records[0].expert_ids)]


def assembled(mesh, folder):
    """Return whether arrays that are split on each axis come right, part by part, and as kept."""
    values = np.arange(3 * E * D * 4, dtype=np.float32).reshape(E, 3 * D, 4)
    arrays = {}
    for axis in (0, 1, 2, None):
        target = Assembler(values.shape, np.float32, sharding=place(mesh, axis, 3))
        for entry in range(E):
            for start in range(0, 3 * D, 5):
                rows = slice(start, min(start + 5, 3 * D))
                target.write(entry, rows, values[entry, rows])
        arrays[f"axis {axis}"] = target.finish()
    save_arrays(folder, arrays)
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        for name, array in arrays.items()
    }
    kept = load_arrays(folder, shapes)
    return [
        bool(np.array_equal(array, values)) and bool(np.array_equal(kept[name], values))
        for name, array in arrays.items()
    ], [array.addressable_shards[0].data.size / values.size for array in arrays.values()]


def main():
    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh = open_mesh(DEVICES)
    are_right, shares = assembled(mesh, Path(sys.argv[1]) / "arrays")
    results = {
        "differences": [
            experts_difference(mesh, platform, num_tokens, masked=masked)
            for platform in ("cpu", "gpu", "tpu")
            for num_tokens, masked in ((1, False), (21, True))
        ],
        "records": traced_records(mesh),
        "assembled": are_right,
        "shares": shares,
    }
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
