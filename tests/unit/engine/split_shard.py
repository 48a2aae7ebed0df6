"""Shards whose experts lie on four virtual devices; a process of its own, for jax counts its
devices once. Prints what each way of holding the model generates, and where it is held.
"""

import json
import sys
from pathlib import Path

import jax

from pals.engine.shard import Shard
from pals.errors import InvalidConfig
from pals.models.snapshot import Snapshot
from pals.types import EngineLimits, LayerRange
from tests.checkpoints import make_llama_checkpoint, make_qwen3_moe_checkpoint
from tests.unit.engine.chains import generate

DEVICES = 4
LAYERS = LayerRange(0, 2)
LIMITS = EngineLimits(max_sessions=2, max_context_tokens=64, max_chunk_tokens=16)
PROMPT = [256, *b"Who?"]


def open_model(folder, make, **sizes):
    return Snapshot.open(make(folder, num_layers=2, **sizes), "test/model")


def answer(snapshot, dtype, *, split):
    """Return the tokens, and the devices that hold the most spread and the least spread leaf."""
    shard = Shard.load(snapshot, LAYERS, dtype=dtype, limits=LIMITS, split_experts=split)
    shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in shard._leaves]
    return generate([shard], PROMPT, count=6), [min(shares), max(shares)]


def main():
    jax.config.update("jax_num_cpu_devices", DEVICES)
    folder = Path(sys.argv[1])
    sparse = open_model(folder / "sparse", make_qwen3_moe_checkpoint, num_experts=8)
    uneven = open_model(folder / "uneven", make_qwen3_moe_checkpoint, num_experts=6)
    dense = open_model(folder / "dense", make_llama_checkpoint)
    results = {
        # int8 twice: the second comes from the layers that the first prepared
        f"{number}-{dtype}": [answer(sparse, dtype, split=split) for split in (False, True)]
        for number, dtype in enumerate(("f32", "int8", "int8"))
    }
    results["dense"] = answer(dense, "f32", split=True)
    try:
        answer(uneven, "f32", split=True)
    except InvalidConfig as error:
        results["uneven"] = str(error)
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
